"""Identity tests of preference losses."""

from __future__ import annotations

import torch

from tests.toys import gradient
from unipo.episodes import Episodes
from unipo.methods.catalog import find
from unipo.objectives import GroupSquare, Outcome


def pairs(drift: float) -> tuple[Episodes, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    lengths = [2, 3, 1, 4, 2, 2]
    episodes = Episodes.build([[0] * n for n in lengths], [[0]] * 6, [0, 0, 1, 1, 2, 2], kind=["pair"] * 6,
                              chosen=[True, False] * 3)  # fmt: skip
    n = episodes.count("step")
    reference = -torch.rand(n, generator=generator, dtype=torch.float64)
    logp = reference + drift * torch.randn(n, generator=generator, dtype=torch.float64)
    return episodes.with_columns("step", reference_logp=reference), logp


def margins(episodes: Episodes, logp: torch.Tensor) -> torch.Tensor:
    score = torch.stack([(logp - episodes["reference_logp"])[episodes.index("episode") == i].sum() for i in range(6)])
    return score[0::2] - score[1::2]


def test_dpo_gradient_at_the_reference() -> None:
    """At pi = ref the slope of -log sigmoid is 1/2: every chosen token gets -beta / 2 / P, every rejected one +beta / 2 / P."""
    episodes, logp = pairs(0.0)
    found = gradient(find("dpo").build(beta=0.3).objective, episodes, logp)
    sign = torch.where(episodes.expand("chosen"), -1.0, 1.0).double()
    torch.testing.assert_close(found, sign * 0.3 / 2 / 3)


def test_dpo_matches_a_second_derivation() -> None:
    episodes, logp = pairs(1.0)
    x = logp.clone().requires_grad_()
    loss = torch.log1p(torch.exp(-0.2 * margins(episodes, x))).mean()
    objective = find("dpo").build(beta=0.2).objective
    torch.testing.assert_close(objective(episodes, {"logp": logp}), loss.detach())
    torch.testing.assert_close(gradient(objective, episodes, logp), torch.autograd.grad(loss, x)[0])


def test_label_smoothing_is_the_mixture_of_both_labels() -> None:
    episodes, logp = pairs(1.0)
    m = 0.2 * margins(episodes, logp)
    expected = (0.9 * torch.log1p(torch.exp(-m)) + 0.1 * torch.log1p(torch.exp(m))).mean()
    torch.testing.assert_close(
        find("dpo").build(beta=0.2, label_smoothing=0.1).objective(episodes, {"logp": logp}), expected
    )


def test_ipo_is_copg_with_half_reward_margin() -> None:
    """R+ - R- = 1/2 in CoPG gives (beta / 2) (h - 1 / (2 beta))^2 = beta / 2 * IPO."""
    episodes, logp = pairs(0.7)
    beta = 0.25
    reward = torch.where(episodes["chosen"], 0.5, 0.0).double()
    copg = GroupSquare(beta=beta, outcome=Outcome()).but(rows=find("ipo").build().objective.rows)
    rewarded = episodes.with_columns("episode", reward=reward)
    ipo = find("ipo").build(beta=beta).objective
    found = gradient(copg, rewarded, logp)
    torch.testing.assert_close(found, beta / 2 * gradient(ipo, episodes, logp))
    by_hand = ((margins(episodes, logp) - 1 / (2 * beta)) ** 2).mean()
    torch.testing.assert_close(ipo(episodes, {"logp": logp}), by_hand)
