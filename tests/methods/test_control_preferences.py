"""Contrastive preference learning: its kinship to DPO, the conservative factor, its minimiser, and pairs of segments."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.toys import gradient
from unipo.episodes import Episodes
from unipo.functional import logistic
from unipo.methods.control_preferences import UNIT, cpl
from unipo.methods.preferences import dpo
from unipo.objectives import EpisodeMean, Likelihood, pairs
from unipo.policies.control import ControlPolicy
from unipo.policies.distributions import Categorical, Gaussian
from unipo.sources.acting.segment_pairs import Earned, Regret, SegmentPairs, labelled, segments, write_pairs
from unipo.training.build import build_run
from unipo.training.config import ConfigError, ControlConfig


def compared(lengths: int = 1, count: int = 4, seed: int = 0) -> tuple[Episodes, Tensor]:
    """`count` pairs of segments of `lengths` steps, and log-probs [N]."""
    n = 2 * count
    rows = Episodes.build([[0] * lengths] * n, [[0]] * n, [i // 2 for i in range(n)], kind=["pair"] * n,
                          chosen=[True, False] * count)  # fmt: skip
    draw = torch.Generator().manual_seed(seed)
    logp = -torch.rand(n * lengths, generator=draw, dtype=torch.float64) - 0.1
    return rows.with_columns(
        "step", reference_logp=logp - torch.rand(len(logp), generator=draw, dtype=torch.float64)
    ), logp


def test_segments_of_one_step_are_dpo() -> None:
    rows, logp = compared()
    mine = gradient(cpl(alpha=0.3, lam=1.0, reference="cloned").objective, rows, logp)
    assert torch.equal(mine, gradient(dpo(beta=0.3).objective, rows, logp))
    uniform = rows.with_columns("step", reference_logp=torch.full_like(logp, -1.4))
    mine = gradient(cpl(alpha=0.3, lam=1.0).objective, rows, logp)
    torch.testing.assert_close(mine, gradient(dpo(beta=0.3).objective, uniform, logp), rtol=1e-12, atol=0)
    assert float(mine.abs().sum()) > 0


def test_advantages_of_both_sides() -> None:
    """A(+) = alpha gamma^t sig(lam S- - S+), A(-) = -lam times that."""
    rows, logp = compared(lengths=3, count=1)
    alpha, lam, gamma = 0.4, 0.6, 0.9
    discount = torch.tensor([1, gamma, gamma**2], dtype=torch.float64)
    won, lost = (alpha * (discount * x).sum() for x in logp.split(3))
    push = alpha * discount * torch.sigmoid(lam * lost - won)
    found = gradient(cpl(alpha=alpha, lam=lam, gamma=gamma).objective, rows, logp)
    torch.testing.assert_close(-found, torch.cat([push, -lam * push]))


def test_only_a_factor_below_one_sees_how_likely_all_of_the_data_are() -> None:
    rows, logp = compared(lengths=4)
    for lam, falls in ((1.0, False), (0.5, True)):
        loss = cpl(lam=lam).objective
        values = [float(loss(rows, {"logp": logp + c})) for c in (0.0, 1.0, 2.0)]
        if falls:
            assert values[0] > values[1] > values[2]
        else:
            assert max(values) - min(values) < 1e-12


def test_regret_labels_have_the_best_policy_as_minimiser() -> None:
    """One state, all pairs of actions with their odds: the gradient is 0 at log pi = A* / alpha + const."""
    advantage, alpha = torch.tensor([0.0, -0.2, -0.5, -1.0], dtype=torch.float64), 0.5
    logp = (advantage / alpha).log_softmax(0)
    slopes = torch.zeros(4, dtype=torch.float64)
    for policy, optimal in ((logp, True), (torch.full((4,), 0.25, dtype=torch.float64).log(), False)):
        x = policy.clone().requires_grad_(True)
        first, second = torch.triu_indices(4, 4, 1)
        margin = alpha * (x.log_softmax(0)[first] - x.log_softmax(0)[second])
        sure = torch.sigmoid(advantage[first] - advantage[second])
        (sure * logistic(margin) + (1 - sure) * logistic(-margin)).sum().backward()
        assert x.grad is not None
        slopes = x.grad
        assert (float(slopes.abs().max()) < 1e-12) == optimal


def test_much_cloning_is_behaviour_cloning() -> None:
    rows, logp = compared(lengths=3)
    alone = gradient(Likelihood(rows=pairs, aggregate=EpisodeMean()), rows, logp)
    torch.testing.assert_close(gradient(cpl(bc=1e9).objective, rows, logp) / 1e9, alone, rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient(cpl(clone=5).objective, rows, logp), alone)
    later = gradient(cpl(clone=5).objective, rows, logp, {"clone": 0.0})
    assert torch.equal(later, gradient(cpl().objective, rows, logp))


def test_the_fixed_gaussian_has_no_constant() -> None:
    law = Gaussian(2)
    raw = torch.tensor([[0.3, -0.2, UNIT, UNIT]], dtype=torch.float64)
    action = torch.tensor([[0.5, 0.1]], dtype=torch.float64)
    by_hand = -torch.pi * (0.2**2 + 0.3**2)
    assert float(law.logp(raw, action)) == pytest.approx(by_hand, rel=1e-12)


# ---- segments and their pairs ------------------------------------------------------------------------------------------
def recorded(lengths: tuple[int, ...] = (3, 6, 9)) -> Episodes:
    """Episodes whose observations count steps over all of them."""
    n = sum(lengths)
    made = Episodes.build([[0] * k for k in lengths], kind=["rollout"] * len(lengths), terminated=[True] * len(lengths),
                          truncated=[False] * len(lengths))  # fmt: skip
    number = torch.arange(n, dtype=torch.float32)
    ends = torch.cumsum(torch.tensor(lengths), 0).float()
    made = made.with_columns("step", observation=number[:, None], action=torch.arange(n) % 2, reward=number)
    return made.with_columns("episode", final_observation=ends[:, None] - 0.5).without("token")


def test_segments_are_whole_stretches() -> None:
    parts = segments(recorded(), 4, 400, seed=0)
    seen = parts["observation"].reshape(400, 4)
    assert torch.equal(seen.diff(dim=1), torch.ones(400, 3))
    starts, counts = seen[:, 0].unique(return_counts=True)
    assert starts.tolist() == [3, 4, 5, 9, 10, 11, 12, 13, 14]
    assert counts.min() > 20
    last = seen[:, -1]
    over = (last == 8) | (last == 17)
    assert torch.equal(parts["terminated"], over)
    assert torch.equal(parts["final_observation"][:, 0], torch.where(over, last + 0.5, last + 1.0))
    with pytest.raises(ValueError, match="no episode has 10 steps"):
        segments(recorded(), 10, 2, seed=0)


def test_the_better_segment_is_preferred() -> None:
    parts = segments(recorded(), 2, 20, seed=1)
    made = labelled(parts, Earned()(parts))
    won, lost = made.reduce("reward").reshape(-1, 2).T
    assert made.category("kind", "pair").all()
    assert (won >= lost).all()
    torch.testing.assert_close(made["confidence"][::2], torch.sigmoid((won - lost).double()))
    close = labelled(parts, 0.05 * Earned()(parts), seed=3)
    assert not (close["rating"][::2] >= close["rating"][1::2]).all()


def test_an_expert_judges_by_its_log_probabilities(tmp_path: Path) -> None:
    policy = ControlPolicy(1, Categorical(2), hidden=(4,))
    with torch.no_grad():
        policy.network.head.bias.copy_(torch.tensor([0.0, 2.0]))
    parts = segments(recorded(), 3, 10, seed=0)
    logp = policy.signals(parts, ["logp"])["logp"].reshape(10, 3)
    expected = 0.5 * (logp * torch.tensor([1, 0.9, 0.81])).sum(1)
    torch.testing.assert_close(Regret(policy, 0.5, 0.9)(parts), expected)
    policy.save(tmp_path / "run" / "final")
    recorded().save(tmp_path / "data" / "part.parquet")
    made = write_pairs(str(tmp_path / "data"), tmp_path / "pairs", str(tmp_path / "run"), length=3, pairs=7)
    again = Episodes.load(tmp_path / "pairs" / "pairs.parquet")
    assert again.count("group") == 7
    assert torch.equal(again["chosen"], made["chosen"])


def test_pairs_are_drawn_by_key() -> None:
    parts = segments(recorded(), 2, 40, seed=1)
    source = SegmentPairs(5)
    source.add(labelled(parts, Earned()(parts)))
    first, second = (list(source.samples(8, 3, 2)) for _ in range(2))
    assert torch.equal(first[1]["observation"], second[1]["observation"])
    assert not torch.equal(first[0]["observation"], first[1]["observation"])
    assert first[0].lengths("group", "episode").tolist() == [2] * 8
    with pytest.raises(ValueError, match="no pairs of segments"):
        SegmentPairs(0).add(parts)


def test_a_run_learns_from_pairs_and_from_nothing_else(tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(0)
    made = recorded((20,) * 10)
    made = made.with_columns("step", observation=torch.randn(200, 4, generator=draw))
    made = made.with_columns("episode", final_observation=torch.zeros(10, 4))
    made.save(tmp_path / "episodes" / "a.parquet")
    parts = segments(made, 5, 60, seed=0)
    labelled(parts, parts.reduce(parts["action"].float())).save(tmp_path / "pairs" / "pairs.parquet")

    def config(data: str) -> ControlConfig:
        return ControlConfig(method="cpl", task="CartPole-v1", dataset=str(tmp_path / data), out=str(tmp_path / data / "run"),
                             total_timesteps=60, rollout=20, batch_size=8, evaluations=0, hidden=(8,),
                             tensorboard=False)  # fmt: skip

    recipe = cpl(clone=1, reference="cloned")
    with pytest.raises(ConfigError, match="unipo data segments"):
        build_run(config("episodes"), recipe)
    run = build_run(config("pairs"), recipe)
    run.train()
    found = run.policy.signals(parts, ["logp"])["logp"].detach()
    liked = parts["action"] == 1
    assert float(found[liked].mean()) > float(found[~liked].mean())
    kept = run.annotators["reference"].signals(parts, ["logp"])["logp"]
    assert not torch.equal(kept, found)
