"""Identity tests of rec, topr, nft, bnpo and copg."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import optimize, special
from torch import Tensor

from tests.toys import gradient, rollouts_of
from unipo.episodes import Episodes
from unipo.functional import beta_parameters
from unipo.methods.catalog import find
from unipo.objectives import (
    AffineOutcome,
    BetaScale,
    EpisodeSum,
    GroupMean,
    GroupSquare,
    GroupStd,
    KLPenalty,
    LeaveOneOut,
    Likelihood,
    Normalised,
    Outcome,
    Plain,
    PolicyGradient,
    SequenceRatio,
    ShapedOutcome,
    TokenMean,
    Total,
    rollouts,
)

REWARDS = [[1.0, 0.0, 0.0, 1.0], [0.0, 1.0, 1.0, 1.0]]
LENGTHS = [[2, 3, 1, 4], [1, 2, 5, 2]]


def data(drift: float = 0.4, seed: int = 0) -> tuple[Episodes, Tensor]:
    return rollouts_of(REWARDS, LENGTHS, seed, drift)


def of(slug: str, episodes: Episodes, logp: Tensor, **settings: object) -> Tensor:
    return gradient(find(slug).build(**settings).objective, episodes, logp)


def reinforce(episodes: Episodes, logp: Tensor) -> Tensor:
    """Group-relative REINFORCE, token mean, without weight or mask."""
    return gradient(PolicyGradient(advantage=Normalised(), aggregate=TokenMean()), episodes, logp)


# ---- REC -------------------------------------------------------------------------------------------------------------
def test_rec_one_side_is_ppo() -> None:
    episodes, logp = data()
    r = episodes["reward"].reshape(2, 4)
    advantage = (r - r.mean(1, keepdim=True)).flatten()[episodes.index("episode")]
    x = logp.clone().requires_grad_()
    ratio = (x - episodes["behavior_logp"]).exp()
    (expected,) = torch.autograd.grad(-torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage).mean(), x)
    torch.testing.assert_close(of("rec", episodes, logp), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("clip", ["none", "one-side", "two-side", "ring", "gspo-one-side"])
@pytest.mark.parametrize("weight", ["none", "importance_sampling", "gspo"])
def test_all_rec_clips_agree_on_policy(clip: str, weight: str) -> None:
    episodes, logp = data(drift=0.0)
    torch.testing.assert_close(of("rec", episodes, logp, clip=clip, weight=weight), reinforce(episodes, logp))


def test_rec_clips_differ_off_policy() -> None:
    episodes, logp = data(drift=1.5)
    found = [of("rec", episodes, logp, clip=c) for c in ("none", "one-side", "two-side", "ring")]
    assert all(not torch.equal(a, b) for i, a in enumerate(found) for b in found[:i])


def test_asymre_is_forward_kl() -> None:
    """A baseline shifted by -0.1 is REINFORCE plus 0.1 times the likelihood of all samples, exactly."""
    episodes, logp = data()
    summed = find("rec").build(weight="none", clip="none", forward_kl=0.1).objective
    torch.testing.assert_close(of("asymre", episodes, logp), gradient(summed, episodes, logp))
    likelihood = gradient(Likelihood(rows=rollouts), episodes, logp)
    torch.testing.assert_close(of("asymre", episodes, logp), reinforce(episodes, logp) + 0.1 * likelihood)


def test_k2_gradient_vanishes_on_policy() -> None:
    episodes, logp = data(drift=0.0)
    torch.testing.assert_close(of("opmd", episodes, logp), reinforce(episodes, logp))
    episodes, logp = data(drift=0.5)
    pull = of("opmd", episodes, logp, k2=0.3) - reinforce(episodes, logp)
    torch.testing.assert_close(pull, 2 * 0.3 * (logp - episodes["behavior_logp"]) / len(logp))


def test_red_weight_at_infinite_temperature() -> None:
    episodes, logp = data()
    torch.testing.assert_close(of("red-weight", episodes, logp, temperature=1e12), reinforce(episodes, logp))
    a = Normalised()(episodes, {"logp": logp})
    torch.testing.assert_close(of("red-weight", episodes, logp), -a.exp() * a / len(logp))


def test_red_drop_on_balanced_groups() -> None:
    """As many negatives as others: nothing is dropped."""
    episodes, logp = rollouts_of([[1.0, 0.0, 0.0, 1.0]], [[2, 3, 1, 4]])
    torch.testing.assert_close(of("red-drop", episodes, logp), reinforce(episodes, logp))


def test_red_drop_balances() -> None:
    """One right, three wrong: two wrong ones get 0, the others -1/2 and 1/2 around their own mean."""
    episodes, logp = rollouts_of([[1.0, 0.0, 0.0, 0.0]], [[1, 1, 1, 1]])
    found = of("red-drop", episodes, logp) * 4
    assert found[0] == -0.5
    assert sorted(found[1:].tolist()) == [0.0, 0.0, 0.5]
    assert torch.equal(found, of("red-drop", episodes, logp) * 4), "the choice is the same in every evaluation"


def test_ring_limit_is_two_side() -> None:
    episodes, logp = data(drift=1.5)
    ring = of("rec", episodes, logp, clip="ring", outer_low=1.0, outer_high=1e30)
    torch.testing.assert_close(ring, of("rec", episodes, logp, clip="two-side"))


def test_pairwise_loss_at_the_old_policy_is_group_reinforce() -> None:
    """(1/2) sum_{i<j} (a_i - a_j)^2, a = R - tau log(pi / pi_old), has slope -tau G (R_i - mean) at pi = pi_old."""
    episodes, logp = rollouts_of([[1.0, 0.0, 0.2, 0.7]], [[2, 3, 1, 4]])
    tau, size = 0.3, 4
    per_pair = gradient(GroupSquare(beta=tau, to="old", outcome=Outcome()), episodes, logp)
    ours = per_pair * 2 * tau * (size * (size - 1) / 2) / 2
    centred = episodes["reward"] - episodes["reward"].mean()
    torch.testing.assert_close(ours, -tau * size * episodes.expand(centred))


def test_k2_is_a_regression_without_the_free_constant() -> None:
    """OPMD on one-token episodes: c * mean (rho - A / (2 c))^2 has the same gradient."""
    episodes, logp = rollouts_of(REWARDS, [[1] * 4] * 2, drift=0.5)
    c = 0.4
    a = Normalised()(episodes, {"logp": logp})
    x = logp.clone().requires_grad_()
    (expected,) = torch.autograd.grad((c * (x - episodes["behavior_logp"] - a / (2 * c)) ** 2).mean(), x)
    torch.testing.assert_close(of("opmd", episodes, logp, k2=c), expected)
    assert isinstance(find("opmd").build().objective.terms()[1][1], KLPenalty)


# ---- TOPR ------------------------------------------------------------------------------------------------------------
def signed_reinforce(episodes: Episodes, logp: Tensor) -> Tensor:
    return gradient(PolicyGradient(advantage=Plain(AffineOutcome()), aggregate=EpisodeSum()), episodes, logp)


def test_topr_on_policy_is_reinforce() -> None:
    episodes, logp = data(drift=0.0)
    torch.testing.assert_close(of("topr", episodes, logp), signed_reinforce(episodes, logp))


def test_topr_positives_are_weighted_sft() -> None:
    episodes, logp = rollouts_of([[1.0, 1.0]], [[2, 3]], drift=2.0)
    torch.testing.assert_close(of("topr", episodes, logp), torch.full_like(logp, -1 / 2))


def test_topr_unclipped_is_importance_sampling() -> None:
    episodes, logp = data(drift=0.5)
    weighted = PolicyGradient(advantage=Plain(AffineOutcome()), weight=SequenceRatio(), aggregate=EpisodeSum())
    found = of("topr", episodes, logp, positive=(0.0, math.inf), negative=(0.0, math.inf))
    torch.testing.assert_close(found, gradient(weighted, episodes, logp))
    naive = of("topr", episodes, logp, positive=(1.0, 1.0), negative=(1.0, 1.0))
    torch.testing.assert_close(naive, signed_reinforce(episodes, logp))


def test_topr_is_the_gradient_of_its_taper() -> None:
    """V(pi) = R pi where pi <= mu, R mu (1 + log(pi / mu)) beyond: E_mu of the update is its gradient, for R = -1."""
    mu = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    theta = torch.tensor([0.2, -0.4, 0.9], dtype=torch.float64, requires_grad=True)
    p = torch.softmax(theta, 0)
    potential = torch.where(p <= mu, -p, -mu * (1 + (p / mu).log())).sum()
    (expected,) = torch.autograd.grad(potential, theta)
    x = theta.detach().clone().requires_grad_()
    logp = torch.log_softmax(x, 0)
    episodes = Episodes.build([[0], [1], [2]], [[0]] * 3, [0, 0, 0], kind=["rollout"] * 3)
    episodes = episodes.with_columns("episode", reward=torch.zeros(3, dtype=torch.float64))
    episodes = episodes.with_columns("step", behavior_logp=mu.log())
    coefficient = of("topr", episodes, logp.detach()) * 3 * mu
    (found,) = torch.autograd.grad(-(coefficient * logp).sum(), x)
    torch.testing.assert_close(found, expected)


def test_topr_is_bounded_where_reinforce_is_not() -> None:
    """A fixed wrong sample, pushed 100 times: TOPR's total push is finite, REINFORCE's grows without bound."""
    reached = {}
    for slug, settings in (("topr", {}), ("topr", {"negative": (1.0, 1.0)})):
        logp = torch.tensor([-1.0], dtype=torch.float64)
        episodes = Episodes.build([[0]], [[0]], kind=["rollout"]).with_columns(
            "episode", reward=torch.zeros(1, dtype=torch.float64)
        )
        episodes = episodes.with_columns("step", behavior_logp=logp.clone())
        for _ in range(100):
            logp = logp - of(slug, episodes, logp, **settings)
        reached[bool(settings)] = float(logp)
    assert reached[True] == -101.0
    assert reached[False] > -8.0


# ---- NFT -------------------------------------------------------------------------------------------------------------
def test_nft_on_policy_is_dr_grpo() -> None:
    """omega = 1 - p, r = 1: right 1 - p, wrong -p: the reward minus the group's mean."""
    episodes, logp = data(drift=0.0)
    expected = gradient(PolicyGradient(advantage=Normalised(), aggregate=Total(1000.0)), episodes, logp)
    torch.testing.assert_close(of("nft", episodes, logp), expected)


def test_nft_sqrt_is_grpo() -> None:
    episodes, logp = data(drift=0.0)
    scaled = Normalised(center=GroupMean(), scale=GroupStd(eps=0.0, ddof=0))
    expected = gradient(PolicyGradient(advantage=scaled, aggregate=Total(1000.0)), episodes, logp)
    torch.testing.assert_close(of("nft", episodes, logp, omega="sqrt"), expected)


def test_nft_without_negatives_is_rft() -> None:
    episodes, logp = data(drift=0.4)
    right = episodes.expand("reward")
    torch.testing.assert_close(of("nft", episodes, logp, omega="1", negative=0.0), -right / 1000)


def test_nft_is_the_gradient_of_its_loss() -> None:
    """Autograd of -log r and of -log with the straight-through clamp, written out."""
    episodes, logp = data(drift=0.6)
    p = torch.tensor([0.5] * 4 + [0.75] * 4, dtype=torch.float64)[episodes.index("episode")]
    right = episodes.expand("reward") > 0.5
    x = logp.clone().requires_grad_()
    r = (x - episodes["behavior_logp"]).exp()
    proxy = (1 - p * r) / (1 - p)
    clamped = proxy + (proxy.clamp(min=1.0) - proxy).detach()
    loss = ((1 - p) * torch.where(right, -r.log(), -clamped.log())).sum() / 1000
    (expected,) = torch.autograd.grad(loss, x)
    torch.testing.assert_close(of("nft", episodes, logp), expected)
    assert (proxy[~right] < 1).any()
    assert (proxy[~right] > 1).any()


def test_nft_minimiser() -> None:
    """Population: -c / rho + (1 - c) p / (1 - p rho) vanishes at rho = c / p, by the recipe's own coefficients (v tiny)."""
    p, c = 0.4, 0.3
    rho = c / p
    episodes, _ = rollouts_of([[1.0, 1.0, 0.0, 0.0, 0.0]], [[1] * 5])
    logp = episodes["behavior_logp"] + math.log(rho)
    found = of("nft", episodes, logp, omega="1", floor=1e-9) * 1000
    assert (c * found[0] + (1 - c) * found[-1]).item() == pytest.approx(0.0, abs=1e-12)


# ---- BNPO ------------------------------------------------------------------------------------------------------------
def bnpo_advantage(episodes: Episodes, parameters: tuple[float, float] | None) -> Tensor:
    return Normalised(scale=BetaScale(parameters))(episodes, {})


def test_bnpo_at_one_one_is_dr_grpo() -> None:
    episodes, _ = data()
    torch.testing.assert_close(bnpo_advantage(episodes, (1.0, 1.0)), Normalised()(episodes, {}))


def test_bnpo_at_three_halves_is_grpo() -> None:
    """Beta(3/2, 3/2) = (8 / pi) sqrt(p (1 - p)): GRPO with the population std, times pi / 8."""
    episodes, _ = data()
    grpo = Normalised(scale=GroupStd(eps=0.0, ddof=0))(episodes, {})
    torch.testing.assert_close(bnpo_advantage(episodes, (1.5, 1.5)), math.pi / 8 * grpo)


def test_bnpo_parameters_are_stationary() -> None:
    """They minimise B(alpha, beta)^2 B(a + 3 - 2 alpha, b + 3 - 2 beta) / B(a, b), the expected squared gradient."""
    rate = torch.tensor([0.15, 0.3, 0.4, 0.55, 0.8], dtype=torch.float64)
    mean, variance = float(rate.mean()), float(rate.var())
    common = mean * (1 - mean) / variance - 1
    a, b = common * mean, common * (1 - mean)

    def second_moment(x: list[float]) -> float:
        return float(2 * special.betaln(x[0], x[1]) + special.betaln(a + 3 - 2 * x[0], b + 3 - 2 * x[1]))

    best = optimize.minimize(second_moment, [1.2, 1.2], method="Nelder-Mead", options={"xatol": 1e-8, "fatol": 1e-12}).x
    assert beta_parameters(rate) == pytest.approx(tuple(best), abs=1e-5)


def test_bnpo_sums_to_zero_and_handles_edges() -> None:
    episodes, _ = rollouts_of([[1.0, 0.0, 0.0, 0.0], [1.0] * 4, [0.0] * 4, [1.0, 1.0, 0.0, 0.0]], [[1] * 4] * 4)
    advantage = bnpo_advantage(episodes, None)
    assert advantage.isfinite().all()
    torch.testing.assert_close(episodes.reduce(advantage, to="group"), torch.zeros(4, dtype=torch.float64))
    assert not advantage[4:12].any()
    alone, _ = rollouts_of([[1.0, 0.0]], [[1, 1]])
    assert bnpo_advantage(alone, None).tolist() == [0.5, -0.5], "a single prompt: f = 1"


# ---- CoPG ------------------------------------------------------------------------------------------------------------
def test_copg_minimiser_for_any_data() -> None:
    """Off-policy bandit, full support: gradient descent ends at ref * exp(R / beta) / Z, where the loss is 0."""
    reward = torch.tensor([1.0, 0.2, 0.5], dtype=torch.float64)
    reference = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64).log()
    beta = 0.5
    theta = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    episodes = Episodes.build([[0], [1], [2]], [[0]] * 3, [0, 0, 0], kind=["rollout"] * 3)
    episodes = episodes.with_columns("episode", reward=reward).with_columns("step", reference_logp=reference)
    objective = find("copg").build(beta=beta).objective
    optimizer = torch.optim.LBFGS([theta], lr=1.0, max_iter=200, tolerance_grad=1e-12, tolerance_change=1e-16)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = objective(episodes, {"logp": torch.log_softmax(theta, 0)})
        loss.backward()
        return loss

    optimizer.step(closure)
    target = torch.log_softmax(reference + reward / beta, 0)
    torch.testing.assert_close(torch.log_softmax(theta, 0), target, atol=1e-6, rtol=1e-6)
    assert float(closure().detach()) < 1e-10


def test_copg_gradient_is_rloo_with_kl_inside() -> None:
    """All pairs of n: (2 / n) sum_i (Rb_i - mean of the others) grad log pi: twice RLOO with the KL in the reward."""
    episodes, logp = data(drift=0.3)
    beta = 0.2
    shaped = ShapedOutcome(beta, outcome=Outcome())
    rloo = PolicyGradient(advantage=Normalised(center=LeaveOneOut(), outcome=shaped), aggregate=EpisodeSum())
    torch.testing.assert_close(of("copg", episodes, logp, beta=beta), 2 * gradient(rloo, episodes, logp))


def test_copg_ignores_a_constant_per_prompt() -> None:
    episodes, logp = data(drift=0.3)
    shifted = episodes["reward"] + torch.tensor([3.0] * 4 + [-7.0] * 4, dtype=torch.float64)
    moved = episodes.with_columns("episode", reward=shifted)
    torch.testing.assert_close(of("copg", moved, logp), of("copg", episodes, logp))
