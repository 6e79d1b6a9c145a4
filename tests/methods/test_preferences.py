"""Identity tests of preference losses."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from tests.toys import ToyPolicy, gradient, toy_batch
from unipo.episodes import Episodes
from unipo.learner import Learner, LearnerSettings, annotate
from unipo.learner.annotate import elsewhere
from unipo.learner.coefficients import coefficients
from unipo.learner.ledger import ledger
from unipo.methods.catalog import MethodError, build, find
from unipo.methods.preferences import (
    cdpo,
    dpo,
    hypo,
    ipo,
    kto,
    orpo,
    rdpo,
    rpo,
    simpo,
    slic,
    slic_norm,
    vpo,
    vpo_online,
)
from unipo.objectives import (
    EpisodeMean,
    EpisodeSum,
    GroupSquare,
    HingeLink,
    Likelihood,
    Link,
    LogRatioScore,
    Marked,
    Objective,
    Outcome,
    Pairwise,
    SquaredLink,
    Unflipped,
    number,
    own_pairs,
)
from unipo.objectives import pairs as compared
from unipo.policies.tabular import TabularPolicy
from unipo.reproduce.training import train
from unipo.sources.text.tabular import tabular_rollouts
from unipo.tasks.tabular import TabularTask


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


# ---- links and scores --------------------------------------------------------------------------------------------------
def counted(first: int, second: int) -> Episodes:
    """Comparisons of answers 0 and 1 of a bandit: `first` times 0 was preferred, `second` times 1."""
    tokens = [[0], [1]] * first + [[1], [0]] * second
    n = first + second
    episodes = Episodes.build(tokens, [[0]] * (2 * n), [i // 2 for i in range(2 * n)], kind=["pair"] * (2 * n),
                              chosen=[True, False] * n)  # fmt: skip
    return episodes.with_columns("step", reference_logp=torch.full((2 * n,), -0.7, dtype=torch.float64))


def slope(objective: Objective, episodes: Episodes, ratio: float) -> float:
    """dL / dDelta where log-ratio 0 - log-ratio 1 = Delta."""
    delta = torch.tensor(ratio, dtype=torch.float64, requires_grad=True)
    shift = torch.where(episodes["token"] == 0, delta / 2, -delta / 2)
    return float(torch.autograd.grad(objective(episodes, {"logp": episodes["reference_logp"] + shift}), delta)[0])


def logit(p: float) -> float:
    return math.log(p / (1 - p))


def test_population_minimisers() -> None:
    """Two answers, 0 preferred with p = .7 by clean labels and q = (1 - 2 e) p + e = .66 where e = .1 of them are flipped."""
    beta, e, p = 0.3, 0.1, 0.7
    q = (1 - 2 * e) * p + e
    noisy = counted(66, 34)
    expected = (
        (dpo(beta=beta), logit(q) / beta),
        (cdpo(beta=beta, label_smoothing=e), logit((1 - e) * q + e * (1 - q)) / beta),
        (rdpo(beta=beta, flipped=e), logit(p) / beta),
        (ipo(beta=beta), (2 * q - 1) / (2 * beta)),
    )
    for recipe, best in expected:
        assert slope(recipe.objective, noisy, best) == pytest.approx(0.0, abs=1e-12)
        assert slope(recipe.objective, noisy, best - 0.5) < 0 < slope(recipe.objective, noisy, best + 0.5)


def sums(episodes: Episodes, x: Tensor) -> tuple[Tensor, Tensor]:
    """Sums over the chosen and over the rejected answer of each pair."""
    total = torch.stack([x[episodes.index("episode") == i].sum() for i in range(len(episodes))])
    return total[0::2], total[1::2]


def test_baselines_match_a_second_derivation() -> None:
    episodes, logp = pairs(1.0)
    logp = -logp.abs()
    x = logp.clone().requires_grad_()
    won, lost = sums(episodes, x)
    T = episodes.lengths()
    a, b = won / T[0::2], lost / T[1::2]
    odds = torch.log(a.exp() / (1 - a.exp())) - torch.log(b.exp() / (1 - b.exp()))
    by_hand = (
        (slic(beta=0.7, margin=0.9), torch.relu(0.9 - 0.7 * (won - lost)).mean()),
        (slic_norm(beta=0.4), torch.relu(1 - 0.4 * margins(episodes, x)).mean()),
        (simpo(beta=2.0, margin=0.3), torch.log1p(torch.exp(0.3 - 2.0 * (a - b))).mean()),
        (orpo(lam=0.2), (-a + 0.2 * torch.log1p(torch.exp(-odds))).mean()),
    )
    for recipe, loss in by_hand:
        torch.testing.assert_close(recipe.objective(episodes, {"logp": logp}), loss.detach())
        grad = torch.autograd.grad(loss, x, retain_graph=True)[0]
        assert float(grad.abs().max()) > 0
        torch.testing.assert_close(gradient(recipe.objective, episodes, logp), grad)


def test_hinges_are_silent_beyond_their_margin() -> None:
    """SLiC stops pulling at a pair as soon as its margin is there; DPO never does."""
    episodes, near = counted(1, 0), torch.tensor([-0.1, -3.0], dtype=torch.float64)
    assert gradient(slic(margin=2.0).objective, episodes, near).eq(0).all()
    assert gradient(slic_norm(beta=0.5).objective, episodes, near).eq(0).all()
    torch.testing.assert_close(gradient(slic(margin=3.0).objective, episodes, near), torch.tensor([-1.0, 1.0]).double())
    assert gradient(dpo().objective, episodes, near).ne(0).all()


def test_simpo_of_equal_lengths_is_dpo_without_a_reference() -> None:
    episodes = Episodes.build([[0] * 3] * 6, [[0]] * 6, [0, 0, 1, 1, 2, 2], kind=["pair"] * 6, chosen=[True, False] * 3)
    logp = -torch.rand(18, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    free = episodes.with_columns("step", reference_logp=torch.zeros(18, dtype=torch.float64))
    torch.testing.assert_close(
        gradient(simpo(beta=0.6, margin=0.0).objective, episodes, logp), gradient(dpo(beta=0.2).objective, free, logp)
    )
    assert "reference_logp" not in simpo().needs.columns | orpo().needs.columns | slic().needs.columns


def test_orpo_without_odds_is_likelihood_of_the_chosen() -> None:
    episodes, logp = pairs(1.0)
    shown = Likelihood(rows=compared & Marked(), aggregate=EpisodeMean())
    torch.testing.assert_close(gradient(orpo(lam=0.0).objective, episodes, logp), gradient(shown, episodes, logp))
    certain = torch.zeros_like(logp)
    assert gradient(orpo().objective, episodes, certain).isfinite().all(), "an answer of probability 1 has finite odds"


# ---- answers judged on their own -----------------------------------------------------------------------------------------
def judged(drift: float = 1.0) -> tuple[Episodes, Tensor]:
    generator = torch.Generator().manual_seed(5)
    lengths = [2, 3, 1, 4, 2]
    episodes = Episodes.build([[0] * n for n in lengths], [[0]] * 5, kind=["label"] * 5,
                              chosen=[True, False, False, True, True])  # fmt: skip
    columns = -torch.rand((4, sum(lengths)), generator=generator, dtype=torch.float64)
    names = ("reference_logp", "old_mismatched_logp", "reference_mismatched_logp")
    episodes = episodes.with_columns("step", **dict(zip(names, columns, strict=False)))
    return episodes, columns[0] + drift * columns[3]


def test_kto_matches_a_second_derivation() -> None:
    episodes, logp = judged()
    for lift in (-3.0, 3.0):
        seen = episodes.with_columns("step", old_mismatched_logp=episodes["old_mismatched_logp"] + lift)
        x = logp.clone().requires_grad_()
        steps = episodes.index("episode")
        ratio = torch.stack([(x - seen["reference_logp"])[steps == i].sum() for i in range(5)])
        apart = seen["old_mismatched_logp"] - seen["reference_mismatched_logp"]
        z0 = max(0.0, float(sum(apart[steps == i].sum() for i in range(5)) / 5))
        assert (z0 > 0) == (lift > 0)
        values = [0.2 * (ratio[i] - z0) for i in range(5)]
        good, bad = (torch.stack([values[i] for i in rows]) for rows in ((0, 3, 4), (1, 2)))
        loss = (1.3 * (1 - good.sigmoid()).sum() + 0.8 * (1 - (-bad).sigmoid()).sum()) / 5
        objective = kto(beta=0.2, good=1.3, bad=0.8).objective
        torch.testing.assert_close(objective(seen, {"logp": logp}), loss.detach())
        torch.testing.assert_close(gradient(objective, seen, logp), torch.autograd.grad(loss, x)[0])


def test_kto_saturates_on_both_sides() -> None:
    """At z0 a good answer is pulled with beta / 4; far above and far below it hardly."""
    episodes, _ = judged()
    one = episodes.select(torch.tensor([0]))
    anchor = one.with_columns("step", old_mismatched_logp=one["reference_mismatched_logp"])
    pulls = [
        float(gradient(kto(beta=0.1).objective, anchor, anchor["reference_logp"] + h)[0]) for h in (-200.0, 0.0, 200.0)
    ]
    assert pulls[1] == pytest.approx(-0.1 / 4)
    assert -1e-8 < pulls[0] <= 0
    assert -1e-8 < pulls[2] <= 0


def test_kto_of_pairs_judges_both_sides() -> None:
    episodes, logp = pairs(1.0)
    more = dict.fromkeys(("old_mismatched_logp", "reference_mismatched_logp"), episodes["reference_logp"])
    found = gradient(kto(beta=0.2, rows="pairs").objective, episodes.with_columns("step", **more), logp)
    alone = episodes.with_columns("step", **more).with_columns("episode", kind=["label"] * 6).grouped(torch.arange(6))
    torch.testing.assert_close(found, gradient(kto(beta=0.2).objective, alone, logp))


def test_mismatched_log_ratios_are_of_answers_behind_other_prompts() -> None:
    """Each labelled answer is read behind the prompt of the one before it, whatever else is in the batch."""
    batch = toy_batch().without("old_mismatched_logp", "reference_mismatched_logp")
    policy, reference = ToyPolicy(), ToyPolicy(1)
    made = annotate(batch, kto().needs, {"old": policy, "reference": reference}, 12)
    rows = batch.category("kind", "label").nonzero().squeeze(1)
    context = batch.context()
    assert context.offsets is not None
    prompts = [context.values[context.offsets[i] : context.offsets[i + 1]].tolist() for i in rows.tolist()]
    alone = batch.select(rows)
    swapped = alone.with_context("score", [prompts[-1], *prompts[:-1]])
    steps = batch.step_index(rows)
    for who, player in (("old", policy), ("reference", reference)):
        expected, own = (player.signals(rows_of, ["logp"])["logp"].detach() for rows_of in (swapped, alone))
        assert float((expected - own).abs().max()) > 0.01
        torch.testing.assert_close(made[f"{who}_mismatched_logp"][steps].double(), expected, rtol=1e-6, atol=1e-6)
    assert made["old_mismatched_logp"][batch.expand(batch.category("kind", "rollout"))].isnan().all()


def test_sides_of_a_pair_are_read_behind_the_prompt_of_another_pair() -> None:
    episodes = Episodes.build([[0]] * 4, [[1], [1], [2, 2], [2, 2]], [0, 0, 1, 1], kind=["pair"] * 4)
    context = elsewhere(episodes).context()
    assert context.offsets is not None
    assert context.values.tolist() == [2, 2, 2, 2, 1, 1]
    assert context.offsets.tolist() == [0, 2, 4, 5, 6]


# ---- robust DPO ----------------------------------------------------------------------------------------------------------
MARGINS = torch.linspace(-6.0, 6.0, 25, dtype=torch.float64)


def test_robust_dpo_without_flips_is_dpo() -> None:
    episodes, logp = pairs(1.0)
    torch.testing.assert_close(
        gradient(rdpo(beta=0.2, flipped=0.0).objective, episodes, logp),
        gradient(dpo(beta=0.2).objective, episodes, logp),
    )
    with pytest.raises(MethodError, match="below 1/2"):
        build("rdpo-robust", {"rdpo-robust": {"flipped": 0.5}})


def test_robust_dpo_is_unbiased_under_flips() -> None:
    """All 2^3 ways to flip the labels of three pairs, each with its probability: the mean is DPO's loss on clean labels."""
    episodes, logp = pairs(1.0)
    e, total, slopes = 0.2, 0.0, torch.zeros_like(logp)
    for flips in itertools.product((False, True), repeat=3):
        chance = math.prod(e if f else 1 - e for f in flips)
        label = [side for f in flips for side in (not f, f)]
        seen = episodes.with_columns("episode", chosen=torch.tensor(label))
        objective = rdpo(beta=0.3, flipped=e).objective
        total += chance * float(objective(seen, {"logp": logp}))
        slopes += chance * gradient(objective, seen, logp)
    assert total == pytest.approx(float(dpo(beta=0.3).objective(episodes, {"logp": logp})), abs=1e-12)
    torch.testing.assert_close(slopes, gradient(dpo(beta=0.3).objective, episodes, logp))


def test_robust_and_smoothed_dpo_differ_from_dpo_by_a_linear_term() -> None:
    """ls(-m) = ls(m) + m: robust DPO is ls(m) - e / (1 - 2 e) m, smoothed DPO is ls(m) + e m."""
    e = 0.1
    plain = Link().of(MARGINS)
    torch.testing.assert_close(Unflipped(e).of(MARGINS), plain - e / (1 - 2 * e) * MARGINS)
    smoothed = cdpo(label_smoothing=e).objective.link  # type: ignore[attr-defined]
    torch.testing.assert_close(smoothed.of(MARGINS), plain + e * MARGINS)


def test_other_links_are_debiased_alike() -> None:
    """(1 - e) robust(m) + e robust(-m) = link(m), for hinge and square; robust IPO regresses to target / (1 - 2 e)."""
    for link in (HingeLink(), SquaredLink(target=0.7)):
        robust = Unflipped(0.2, link)
        torch.testing.assert_close(0.8 * robust.of(MARGINS) + 0.2 * robust.of(-MARGINS), link.of(MARGINS))
    at = torch.tensor([0.7 / 0.6], dtype=torch.float64, requires_grad=True)
    found = torch.autograd.grad(Unflipped(0.2, SquaredLink(target=0.7)).of(at).sum(), at)[0]
    assert float(found) == pytest.approx(0.0, abs=1e-12)


def test_the_push_of_robust_dpo_never_ends() -> None:
    """A_w = beta (sigmoid(-m) + e / (1 - 2 e)), at least beta e / (1 - 2 e) however large the margin."""
    episodes = counted(1, 0)
    for gap in (0.0, 5.0, 500.0):
        found = gradient(rdpo(beta=0.5, flipped=0.1).objective, episodes, torch.tensor([gap, 0.0]).double())
        expected = 0.5 * (1 / (1 + math.exp(0.5 * gap)) + 0.1 / 0.8)
        torch.testing.assert_close(found, torch.tensor([-expected, expected]).double())


# ---- RPO and VPO, offline --------------------------------------------------------------------------------------------------
def test_rpo_at_zero_weight_is_dpo() -> None:
    episodes, logp = pairs(1.0)
    found = gradient(rpo(beta=0.2, sft=0.0).objective, episodes, logp)
    torch.testing.assert_close(found, gradient(dpo(beta=0.2).objective, episodes, logp))


def test_rpo_without_margin_is_likelihood() -> None:
    """beta -> 0 at a fixed weight: sft times the likelihood of the chosen."""
    episodes, logp = pairs(1.0)
    shown = Likelihood(rows=compared & Marked(), aggregate=EpisodeSum())
    found = gradient(rpo(beta=1e-12, sft=0.3, per="answer").objective, episodes, logp)
    torch.testing.assert_close(found, 0.3 * gradient(shown, episodes, logp))


def test_rpo_gradients_add() -> None:
    """A_w = beta sigmoid(-m) + sft on every token of the chosen (sft / |w| per token), A_l = -beta sigmoid(-m)."""
    episodes, logp = pairs(1.0)
    pull = 0.2 * torch.sigmoid(-0.2 * margins(episodes, logp)) / 3
    for per, length in (("answer", torch.ones(3)), ("token", episodes.lengths()[0::2])):
        advantage = torch.stack([pull + 0.3 / 3 / length, -pull], 1).flatten()
        found = gradient(rpo(beta=0.2, sft=0.3, per=per).objective, episodes, logp)
        torch.testing.assert_close(found, -episodes.expand(advantage).double())


def bandit_pairs(counts: dict[tuple[int, int], int]) -> Episodes:
    """Comparisons of single tokens: (preferred, other) -> how often."""
    every = [pair for pair, n in counts.items() for _ in range(n)]
    return Episodes.build([[t] for pair in every for t in pair], [[0]] * (2 * len(every)),
                          [i for i in range(len(every)) for _ in range(2)], kind=["pair"] * (2 * len(every)),
                          chosen=[True, False] * len(every))  # fmt: skip


def arms(*probability: float) -> TabularPolicy:
    logits = torch.tensor(probability, dtype=torch.float64).log()
    return TabularPolicy(logits.expand(1, 1, len(probability) + 1, len(probability)))


def law(policy: TabularPolicy) -> Tensor:
    return policy.logits.detach()[0, 0, -1].softmax(0)


def test_rpo_keeps_winners_likely_where_dpo_need_not() -> None:
    """Three arms, pairs of the first two: DPO's loss does not change when both lose their mass to the third, RPO's grows."""
    episodes, losses = bandit_pairs({(0, 1): 3, (1, 0): 1}), {}
    for mass in (0.9, 1e-3, 1e-6):
        policy, reference = arms(0.75 * mass, 0.25 * mass, 1 - mass), arms(0.3, 0.3, 0.4)
        batch = annotate(episodes, dpo().needs, {"reference": reference}, 1 << 20)
        signals = {"logp": policy.signals(batch, ["logp"])["logp"].detach()}
        losses[mass] = [float(r.objective(batch, signals)) for r in (dpo(), rpo(beta=0.1, sft=0.05))]
    assert losses[1e-6][0] == pytest.approx(losses[0.9][0], abs=1e-9)
    assert losses[1e-6][1] - losses[0.9][1] == pytest.approx(0.05 * math.log(0.9 / 1e-6), abs=1e-9)


def test_offline_vpo_on_the_chosen_is_rpo() -> None:
    """Equal gradients with sft = alpha beta; J* has another constant, which no gradient sees."""
    episodes, logp = pairs(1.0)
    found = gradient(vpo(beta=0.2, alpha=0.5).objective, episodes, logp)
    torch.testing.assert_close(found, gradient(rpo(beta=0.2, sft=0.1, per="answer").objective, episodes, logp))
    assert not torch.allclose(found, gradient(dpo(beta=0.2).objective, episodes, logp))


def test_vpo_without_alpha_is_dpo() -> None:
    episodes, logp = pairs(1.0)
    for calibration in ("chosen", "all"):
        found = gradient(vpo(beta=0.2, alpha=0.0, calibration=calibration).objective, episodes, logp)
        torch.testing.assert_close(found, gradient(dpo(beta=0.2).objective, episodes, logp))


def calibrated(beta: float) -> tuple[Tensor, Tensor, Tensor]:
    """A reference, a calibration policy, and a reward with mean 0 under it: [5] each."""
    generator = torch.Generator().manual_seed(2)
    reference, calibration, reward = torch.randn((3, 5), generator=generator, dtype=torch.float64)
    reference, calibration = reference.softmax(0), calibration.softmax(0)
    return reference, calibration, reward - calibration @ reward


def test_the_optimal_value() -> None:
    """J*(r) = max_pi E r - beta KL(pi || ref) = - beta E_calibration log(pi_r / ref), where E_calibration r = 0."""
    beta = 0.4
    reference, calibration, reward = calibrated(beta)
    best = (reference.log() + reward / beta).softmax(0)
    value = best @ reward - beta * (best @ (best / reference).log())
    torch.testing.assert_close(value, -beta * (calibration @ (best / reference).log()))
    moved = (0.98 * best + 0.02 * reference).log()
    assert moved.exp() @ reward - beta * (moved.exp() @ (moved - reference.log())) < value


def test_the_gradient_of_the_optimal_value() -> None:
    """dJ* / dr(b) = pi_r(b) - calibration(b); the calibration term of VPO is alpha J* up to a constant."""
    beta, alpha = 0.4, 0.3
    reference, calibration, reward = calibrated(beta)
    r = reward.clone().requires_grad_()
    policy = (reference.log() + r / beta).log_softmax(0)
    value = -beta * (calibration @ (policy - reference.log()))
    expected = torch.autograd.grad(value, r, retain_graph=True)[0]
    torch.testing.assert_close(expected, policy.exp().detach() - calibration)
    own = vpo(beta=beta, alpha=alpha, calibration="demonstrations").objective.terms()[1]
    counts = torch.tensor([10, 20, 5, 40, 25])
    shown = Episodes.build([[i] for i in range(5) for _ in range(int(counts[i]))], [[0]] * 100, kind=["demo"] * 100)
    loss = number(own[0]) * own[1](shown, {"logp": policy[shown["token"]]})
    found = torch.autograd.grad(loss, r)[0]
    torch.testing.assert_close(found, alpha * (policy.exp().detach() - counts / 100))


# ---- VPO, online -----------------------------------------------------------------------------------------------------------
def test_online_vpo_without_alpha_is_dpo_on_its_own_pairs() -> None:
    batch = toy_batch()
    logp = ToyPolicy().signals(batch, ["logp"])["logp"].detach()
    own = Pairwise(score=LogRatioScore(0.3), confidence=Outcome("confidence"), rows=own_pairs)
    found = gradient(vpo_online(beta=0.3, alpha=0.0).objective, batch, logp)
    assert float(found.abs().max()) > 0
    torch.testing.assert_close(found, gradient(own, batch, logp))


def test_optimism_is_silent_at_the_reference() -> None:
    """E_ref grad log pi = 0 at pi = ref; elsewhere the step lowers what the reference would say."""
    reference = arms(0.5, 0.3, 0.2)
    coefficient, term = vpo_online(beta=0.1, alpha=1.0).objective.terms()[1]
    shown = Episodes.build([[0]] * 5 + [[1]] * 3 + [[2]] * 2, [[0]] * 10, kind=["demo"] * 10)
    for policy, expected in ((arms(0.5, 0.3, 0.2), [0.0, 0.0, 0.0]), (arms(0.2, 0.3, 0.5), [0.03, 0.0, -0.03])):
        loss = number(coefficient) * term(shown, policy.signals(shown, ["logp"]))
        found = torch.autograd.grad(loss, policy.logits)[0][0, 0, -1]
        torch.testing.assert_close(found, 0.1 * (law(reference) - law(policy)), atol=1e-12, rtol=0)
        torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), atol=1e-12, rtol=0)


def test_calibration_answers_are_drawn_from_the_reference() -> None:
    task = TabularTask(2, 4, 1, lambda prompt, tokens: float(tokens[0]))
    recipe = vpo_online(group=3)
    start, policy = arms(1e-30, 1.0, 1e-30, 1e-30), TabularPolicy.random(2, 1, 4)
    reference = TabularPolicy(start.logits.expand(2, 1, 5, 4))
    source = tabular_rollouts(task, policy, recipe.rollouts, 0)
    source.players = {"reference": tabular_rollouts(task, reference, recipe.rollouts, 0).sampler}
    batch = source.draw(0, 0)
    shown = batch.category("kind", "demo")
    assert batch["token"][shown].tolist() == [1] * int(shown.sum())
    assert int(shown.sum()) == 2 * batch.count("group")
    pairs_of = batch.select(own_pairs(batch))
    assert pairs_of.count("group") == 6, "three answers to each of two prompts make three pairs each"
    assert recipe.rollouts.players == {"reference"}
    assert set(recipe.kinds) >= {"demo", "pair"}


# ---- HyPO ------------------------------------------------------------------------------------------------------------------
def test_hypo_without_kl_is_dpo() -> None:
    batch = toy_batch()
    logp = ToyPolicy().signals(batch, ["logp"])["logp"].detach()
    found = gradient(hypo(beta=0.2, kl=0.0).objective, batch, logp)
    torch.testing.assert_close(found, gradient(dpo(beta=0.2).objective, batch, logp))


TASK = TabularTask(1, 3, 2, lambda prompt, tokens: 0.0)


def expected_gradient(objective: Objective, policy: TabularPolicy, reference: TabularPolicy, group: int) -> Tensor:
    """The mean gradient over all groups of `group` answers of the policy, each with its probability: like the logits."""
    every = TASK.episodes()
    logp = TASK.log_probability(policy)[0].detach()
    total = torch.zeros_like(policy.logits)
    for members in itertools.product(range(len(logp)), repeat=group):
        one = every.select(torch.tensor(members)).as_one_group()
        batch = annotate(one, objective.needs, {"reference": reference}, 1 << 20)
        loss = objective(batch, policy.signals(batch, ["logp"]))
        total += logp[list(members)].sum().exp() * torch.autograd.grad(loss, policy.logits)[0]
    return total


def divergence(policy: TabularPolicy, reference: TabularPolicy) -> float:
    logp, other = (TASK.log_probability(p).detach() for p in (policy, reference))
    return float((logp.exp() * (logp - other)).sum())


def divergence_gradient(policy: TabularPolicy, reference: TabularPolicy) -> Tensor:
    logp, other = TASK.log_probability(policy)[0], TASK.log_probability(reference)[0].detach()
    return torch.autograd.grad((logp.exp() * (logp - other)).sum(), policy.logits)[0]


def test_the_online_term_is_the_gradient_of_kl() -> None:
    policy, reference = TabularPolicy.random(1, 2, 3, 0), TabularPolicy.random(1, 2, 3, 1)
    online = hypo(kl=0.3).objective.terms()[1][1]
    exact = divergence_gradient(policy, reference)
    assert float(exact.abs().max()) > 0.01
    torch.testing.assert_close(expected_gradient(online, policy, reference, 2), exact)
    assert hypo(kl=0.3).objective.terms()[1][0] == 0.3


def test_log_ratios_to_go_have_the_gradient_of_whole_answers() -> None:
    policy, reference = TabularPolicy.random(1, 2, 3, 0), TabularPolicy.random(1, 2, 3, 1)
    online = hypo(per="token").objective.terms()[1][1]
    torch.testing.assert_close(expected_gradient(online, policy, reference, 1), divergence_gradient(policy, reference))


def held(kl: float, start: TabularPolicy, episodes: Episodes) -> Tensor:
    """The minimiser of HyPO's loss with its online term exact: kl KL(pi || ref)."""
    policy, reference = TabularPolicy(start.logits), arms(0.3, 0.3, 0.4)
    pair_term = hypo(beta=0.5).objective.terms()[0][1]
    optimizer = torch.optim.LBFGS(policy.parameters(), max_iter=60, line_search_fn="strong_wolfe")
    batch = annotate(episodes, dpo().needs, {"reference": reference}, 1 << 20)

    def loss() -> Tensor:
        optimizer.zero_grad()
        logp = policy.logits[0, 0, -1].log_softmax(0)
        total = kl * (logp.exp() * (logp - law(reference).log())).sum() + pair_term(
            batch, policy.signals(batch, ["logp"])
        )
        total.backward()
        return total

    optimizer.step(loss)
    return law(policy)


def test_answers_of_no_pair_are_free_in_dpo_and_held_by_hypo() -> None:
    """Pairs of arms 0 and 1 of three: DPO keeps the third where it starts, with the KL there is one minimiser."""
    episodes = bandit_pairs({(0, 1): 3, (1, 0): 1})
    starts = (arms(0.1, 0.1, 0.8), arms(0.45, 0.45, 0.1))
    free = [held(0.0, start, episodes) for start in starts]
    assert abs(float(free[0][2] - free[1][2])) > 0.3
    one, other = (held(0.05, start, episodes) for start in starts)
    torch.testing.assert_close(one, other, atol=1e-4, rtol=0)


def test_without_pairs_hypo_returns_to_the_reference() -> None:
    """The recipe itself, with all answers enumerated in groups of two: the gradient vanishes at the reference alone."""
    reference = TabularPolicy.random(1, 2, 3, 1)
    online = hypo().objective.terms()[1][1]
    at_home = expected_gradient(online, TabularPolicy(reference.logits), reference, 2)
    torch.testing.assert_close(at_home, torch.zeros_like(at_home), atol=1e-12, rtol=0)
    policy = TabularPolicy(reference.logits + 0.3 * TabularPolicy.random(1, 2, 3, 4).logits)
    before = divergence(policy, reference)
    moved = TabularPolicy(policy.logits - 0.5 * expected_gradient(online, policy, reference, 2))
    after = divergence(moved, reference)
    assert after < 0.9 * before


# ---- closed forms on bandits, by training ------------------------------------------------------------------------------------
def test_training_ends_at_the_closed_form() -> None:
    """All pairs of four arms, Bradley-Terry labels: DPO ends at ref exp(r / beta), robust DPO too if they are flipped."""
    reward, beta, e = torch.tensor([0.0, 0.5, 1.0, -0.5], dtype=torch.float64), 0.5, 0.2
    reference = arms(0.4, 0.3, 0.2, 0.1)
    rows, sure = [], []
    for i, j in itertools.combinations(range(4), 2):
        rows += [[i], [j]]
        sure += [torch.sigmoid(reward[i] - reward[j])] * 2
    batch = Episodes.build(rows, [[0]] * 12, [k // 2 for k in range(12)], kind=["pair"] * 12, chosen=[True, False] * 6)
    clean, noisy = torch.stack(sure), (1 - 2 * e) * torch.stack(sure) + e
    expected = (law(reference).log() + reward / beta).softmax(0)
    for recipe, label in ((dpo(beta=beta), clean), (rdpo(beta=beta, flipped=e), noisy)):
        labelled = batch.with_columns("episode", confidence=label)
        policy = TabularPolicy(reference.logits)
        made = recipe.but(confidence=Outcome("confidence"))
        train((made,), policy, lambda step, own=labelled: own, steps=200, rate=0.06, reference=reference)  # type: ignore[misc]
        torch.testing.assert_close(law(policy), expected, atol=3e-3, rtol=0)


# ---- beside rollouts -----------------------------------------------------------------------------------------------------------
def test_the_ledger_says_what_pairs_do_beside_rollouts() -> None:
    """Shares of kinds add up to 1 and agree with those of terms; a tenth of the weight is a tenth of the mass."""
    batch, shares = toy_batch(), {}
    for weight in (0.1, 1.0):
        recipe = build(f"grpo+{weight}*dpo", {})
        learner = Learner({"policy": ToyPolicy()}, LearnerSettings(token_budget=1 << 20))
        found = ledger(learner.gradient(batch, recipe.objective), 5)
        kinds = {name: found[f"ledger/kind/{name}/gradient_share"] for name in ("rollout", "pair", "demo", "label")}
        assert sum(kinds.values()) == pytest.approx(1.0)
        assert kinds["demo"] == kinds["label"] == 0.0
        assert kinds["pair"] == pytest.approx(found["ledger/term/dpo/gradient_share"])
        shares[weight] = kinds["pair"] / kinds["rollout"]
    assert shares[1.0] == pytest.approx(10 * shares[0.1])


def test_pairs_fall_silent_as_their_margins_grow() -> None:
    """The mass of a pair is beta sigmoid(-m): at a margin of 4 it has 3.6 % of that at 0; the mass of rollouts stays."""
    batch, masses = toy_batch(), []
    policy = ToyPolicy()
    logp = policy.signals(batch, ["logp"])["logp"].detach()
    sign = torch.where(batch.expand("chosen"), 1.0, -1.0).double() / batch.expand(batch.lengths())
    for margin in (0.0, 4.0):
        seen = batch.with_columns("step", reference_logp=logp - sign * margin / 2 / 0.1)
        found = coefficients(build("grpo+dpo", {}).objective, seen, {"logp": logp})
        masses.append([float(term.gradient["logp"].abs().sum()) for term in found.terms])
    assert masses[1][0] == masses[0][0] > 0
    assert masses[1][1] == pytest.approx(masses[0][1] * 2 / (1 + math.exp(4)))
