"""Identity tests of drpo-decoupled, reg-grpo, dapo-direct-advantage, oorl-gepo, and of the quadratics that they share."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tests.toys import gradient, rollouts_of
from unipo import functional as F
from unipo.episodes import Episodes
from unipo.methods.catalog import find
from unipo.objectives import (
    AffineOutcome,
    Contrast,
    EpisodeMean,
    EpisodeSum,
    GroupMean,
    GroupStd,
    LogRatioScore,
    Normalised,
    Outcome,
    PolicyGradient,
    ScoreRegression,
    Standardised,
    Zero,
)
from unipo.sources.text.filters import DistinctAdvantages, RewardGap

REWARDS = [[1.0, 0.0, 0.0, 1.0], [0.0, 1.0, 1.0, 1.0]]
LENGTHS = [[2, 3, 1, 4], [1, 2, 5, 2]]


def data(drift: float = 0.4, seed: int = 0, rewards: list[list[float]] = REWARDS) -> tuple[Episodes, Tensor]:
    return rollouts_of(rewards, LENGTHS, seed, drift)


def of(slug: str, episodes: Episodes, logp: Tensor, **settings: object) -> Tensor:
    return gradient(find(slug).build(**settings).objective, episodes, logp)


def differentiated(loss: object, logp: Tensor) -> Tensor:
    """The gradient of `loss(logp)` [N]."""
    x = logp.clone().requires_grad_()
    return torch.autograd.grad(loss(x), x)[0]  # type: ignore[operator]


# ---- DRPO ------------------------------------------------------------------------------------------------------------
def disco(episodes: Episodes, logp: Tensor, tau: float, weights: list[Tensor]) -> Tensor:
    """-J by its definition, prompt by prompt: `weights` of each prompt's right answers."""
    s, total = episodes.reduce(logp, how="mean"), torch.zeros((), dtype=torch.float64)
    for g, w in enumerate(weights):
        rows, right = episodes.index("group", "episode") == g, episodes["reward"] > 0.5
        wrong = s[rows & ~right]
        if len(wrong) and len(w):
            total = total - ((w * s[rows & right]).sum() - tau * (wrong / tau).exp().mean().log())
    return total / len(weights)


def test_drpo_is_the_gradient_of_its_objective() -> None:
    """Weights by hand: w = exp(l / 0.1) / sum, l = 1 - T / 10, on the right answers of LENGTHS."""
    episodes, logp = data()
    weights = [torch.tensor(x, dtype=torch.float64) for x in ([0.8, 0.6], [0.8, 0.5, 0.8])]
    weights = [(x / 0.1).exp() / (x / 0.1).exp().sum() for x in weights]
    expected = differentiated(lambda x: disco(episodes, x, 2.0, weights), logp)
    found = of("drpo-decoupled", episodes, logp, longest=10, tau=2.0, strength=0.0)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


def test_drpo_without_temper_is_disco() -> None:
    """temper inf: equal weights; adding a constant to every preference changes nothing either."""
    episodes, logp = data()
    equal = [torch.full((k,), 1 / k, dtype=torch.float64) for k in (2, 3)]
    expected = differentiated(lambda x: disco(episodes, x, 10.0, equal), logp)
    found = of("drpo-decoupled", episodes, logp, temper=math.inf, longest=10, strength=0.0)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    drpo = find("drpo-decoupled").build(strength=0.0)
    rewarded = episodes.with_columns("episode", style=torch.arange(8).double(), moved=torch.arange(8).double() + 7)
    plain, shifted = (
        gradient(drpo.but(advantage=Contrast(Outcome(c))).objective, rewarded, logp) for c in ("style", "moved")
    )
    torch.testing.assert_close(plain, shifted)
    assert not torch.allclose(plain, found), "the preference matters"


def test_one_right_answer_has_no_rival() -> None:
    episodes, logp = data(rewards=[[0.0, 1.0, 0.0, 0.0]] * 2)
    found = [of("drpo-decoupled", episodes, logp, temper=t, longest=5) for t in (0.01, math.inf)]
    torch.testing.assert_close(*found)


def test_drpo_at_infinity_is_grpo_without_std() -> None:
    """1 / (p (1 - p)) times the per-prompt gradient of R - mean_g under SEQ."""
    episodes, logp = data()
    found = of("drpo-decoupled", episodes, logp, temper=math.inf, tau=math.inf, strength=0.0)
    plain = gradient(PolicyGradient(advantage=Normalised(), aggregate=EpisodeMean()), episodes, logp)
    p = episodes.reduce("reward", to="group", how="mean")
    torch.testing.assert_close(found, plain * episodes.expand(1 / (p * (1 - p)), level="group"))


def test_drpo_at_tau_zero_lowers_the_likeliest_wrong_answer() -> None:
    episodes, logp = data()
    lowered = of("drpo-decoupled", episodes, logp, tau=1e-4, strength=0.0) > 1e-12
    s, wrong = episodes.reduce(logp, how="mean"), episodes["reward"] < 0.5
    best = {int(s[:4].masked_fill(~wrong[:4], -9).argmax()), 4}
    assert {int(i) for i in episodes.index("episode")[lowered]} == best


def test_right_answers_are_never_lowered() -> None:
    """And the shares of each prompt sum to +1 and -1; a prompt all right adds 0 and counts."""
    episodes, logp = rollouts_of([*REWARDS, [1.0, 1.0]], [*LENGTHS, [2, 3]], drift=0.4)
    found = of("drpo-decoupled", episodes, logp, longest=10, strength=0.0)
    total = episodes.reduce(found)
    assert (total[episodes["reward"] > 0.5] <= 0).all()
    assert (total[episodes["reward"] < 0.5] > 0).all()
    torch.testing.assert_close(episodes.reduce(total, to="group", level="episode"), torch.zeros(3).double())
    raised = episodes.reduce(-total.clamp(max=0), to="group", level="episode")
    torch.testing.assert_close(raised, torch.tensor([1 / 3, 1 / 3, 0.0]).double())


def test_the_trust_region_is_free_at_first() -> None:
    """At pi = old nothing is added; beyond the limit the gradient is that of strength (KL - limit) KL, KL held in front."""
    episodes, logp = data(drift=0.0)
    free = [of("drpo-decoupled", episodes, logp, strength=s) for s in (0.0, 1e3)]
    assert torch.equal(*free)
    moved = logp - 0.3
    kl, limit = 0.3, 0.1
    pull = of("drpo-decoupled", episodes, moved, strength=7.0, limit=limit)
    pull = pull - of("drpo-decoupled", episodes, moved, strength=0.0)
    torch.testing.assert_close(pull, torch.full_like(logp, -7.0 * (kl - limit) / len(logp)))
    other_way = of("drpo-decoupled", episodes, logp + 0.3, strength=7.0, limit=limit)
    torch.testing.assert_close(other_way, of("drpo-decoupled", episodes, logp + 0.3, strength=0.0))


def test_a_length_penalty_lowers_a_long_right_answer() -> None:
    """Three right answers of 2, 2, 9 tokens and a wrong one, R = right * (1 - 0.9 T / 10): GRPO lowers the long right one."""
    episodes, logp = rollouts_of([[1.0, 1.0, 1.0, 0.0]], [[2, 2, 9, 2]])
    shortened = episodes["reward"] * (1 - 0.9 * episodes.lengths() / 10)
    penalised = episodes.with_columns("episode", reward=shortened)
    assert float(episodes.reduce(of("grpo", penalised, logp))[2]) > 0, "the likelihood of a right answer falls"
    assert float(episodes.reduce(of("drpo-decoupled", episodes, logp, longest=10))[2]) < 0


# ---- Reg-GRPO --------------------------------------------------------------------------------------------------------
def zscore(x: Tensor) -> Tensor:
    return (x - x.mean()) / x.std(correction=0)


def one_group(rewards: list[float], drift: float = 0.5, seed: int = 1) -> tuple[Episodes, Tensor, Tensor]:
    """A group of one-token answers, their log-probs, and log-ratios rho to the old policy."""
    episodes, logp = rollouts_of([rewards], [[1] * len(rewards)], seed, drift)
    return episodes, logp, logp - episodes["old_logp"]


def test_reg_grpo_is_a_correlation() -> None:
    """eps 0: L = 2 - 2 corr(R, rho)."""
    episodes, logp, rho = one_group([1.0, 0.0, 0.2, 0.7, 0.1])
    loss = find("reg-grpo").build(eps=0.0, kl=0.0).objective(episodes, {"logp": logp})
    corr = (zscore(episodes["reward"]) * zscore(rho)).mean()
    torch.testing.assert_close(loss, 2 - 2 * corr)
    assert 0.0 <= float(loss) <= 4.0


@pytest.mark.parametrize("eps", [0.0, 0.7, 2.0])
def test_reg_grpo_gradient(eps: float) -> None:
    """-(2 / n) (A - (1 - v + c) Ahat) / sqrt(var + eps^2), v = mean Ahat^2, c = mean A Ahat; eps 0: corr in the middle."""
    episodes, logp, rho = one_group([1.0, 0.0, 0.2, 0.7, 0.1])
    scale = (rho.var(correction=0) + eps**2).sqrt()
    a, ahat = zscore(episodes["reward"]), (rho - rho.mean()) / scale
    v, c = ahat.square().mean(), (a * ahat).mean()
    if eps == 0.0:
        torch.testing.assert_close(v, torch.ones_like(v))
    torch.testing.assert_close(
        of("reg-grpo", episodes, logp, eps=eps, kl=0.0), -(2 / 5) * (a - (1 - v + c) * ahat) / scale
    )


def test_reg_grpo_is_affine_invariant() -> None:
    episodes, logp, rho = one_group([1.0, 0.0, 0.2, 0.7, 0.1])
    objective = find("reg-grpo").build(eps=0.0, kl=0.0).objective
    moved = episodes["old_logp"] + 3.0 * rho - 0.4
    torch.testing.assert_close(objective(episodes, {"logp": logp}), objective(episodes, {"logp": moved}))
    mirrored = episodes["old_logp"] - rho
    found = objective(episodes, {"logp": logp}) + objective(episodes, {"logp": mirrored})
    torch.testing.assert_close(found, torch.tensor(4.0, dtype=torch.float64))


@pytest.mark.parametrize("eps", [0.5, 2.0])
def test_reg_grpo_starts_as_group_reinforce(eps: float) -> None:
    """rho = 0: -(2 / (n eps)) A per answer, that is 2 / eps times REINFORCE with z-scores, sequence sums, mean over the group."""
    episodes, logp = data(drift=0.0)
    plain = PolicyGradient(
        advantage=Normalised(scale=GroupStd(eps=0.0, ddof=0)), aggregate=EpisodeSum()
    )  # equal groups: a mean over episodes is one over groups
    torch.testing.assert_close(
        of("reg-grpo", episodes, logp, eps=eps, kl=0.0), 2 / eps * gradient(plain, episodes, logp)
    )


def test_reg_grpo_leaves_out_equal_rewards() -> None:
    """They add nothing and count in the mean over groups."""
    alone, logp = rollouts_of([[1.0, 0.0]], [[1, 1]], drift=0.5)
    both, more = rollouts_of([[1.0, 0.0], [0.3, 0.3]], [[1, 1]] * 2, drift=0.5)
    found = of("reg-grpo", both, more, kl=0.0)
    assert not found[2:].any()
    both = both.with_columns("step", old_logp=torch.cat([alone["old_logp"], both["old_logp"][2:]]))
    found = of("reg-grpo", both, torch.cat([logp, more[2:]]), kl=0.0)
    torch.testing.assert_close(found[:2], of("reg-grpo", alone, logp, kl=0.0) / 2)


# ---- the one quadratic -----------------------------------------------------------------------------------------------
def test_one_quadratic() -> None:
    """a = R - beta rho over G answers: REC pairs G^2 / 2 Var, reg-grpo without z-scores Var / beta^2, dapo-direct with a
    free constant Var / (2 beta^2), CoPG G / (G - 1) Var / beta: values and gradients."""
    episodes, logp, _ = one_group([1.0, 0.0, 0.2, 0.7, 0.1])
    beta, size = 0.3, 5

    def variance(x: Tensor) -> Tensor:
        return (episodes["reward"] - beta * (x - episodes["old_logp"])).var(correction=0)

    ratio = LogRatioScore(1.0, "old")
    plain = 2.0 * ScoreRegression(target=AffineOutcome(1 / beta, 0.0), score=ratio, center=GroupMean())
    direct = find("dapo-direct-advantage").build(beta=beta, constant="free").objective
    copg = find("copg").build(beta=beta).objective
    family = {
        plain: 1 / beta**2, direct: 1 / (2 * beta**2), copg: size / (size - 1) / beta,
        find("rebel").build(beta=beta).objective: size / (size - 1) / beta,
    }  # fmt: skip
    for objective, factor in family.items():
        torch.testing.assert_close(objective(episodes, {"logp": logp}), factor * variance(logp))
        found = gradient(objective, episodes, logp)
        torch.testing.assert_close(found, factor * differentiated(variance, logp))
    a = episodes["reward"] - beta * (logp - episodes["old_logp"])
    pairs = sum((a[i] - a[j]) ** 2 / 2 for i in range(size) for j in range(i))
    torch.testing.assert_close(pairs, size**2 / 2 * variance(logp))


def test_opmd_is_the_quadratic_without_the_free_constant() -> None:
    """c mean (rho - A / (2 c))^2 = 2 c * (regression to A / (2 c)): on one-token answers OPMD has its gradient."""
    episodes, logp, _ = one_group([1.0, 0.0, 0.2, 0.7, 0.1])
    c = 0.4
    episodes = episodes.with_columns("step", reference_logp=episodes["behavior_logp"])
    centred = Standardised(outcome=AffineOutcome(1 / (2 * c), 0.0))
    fixed = ScoreRegression(target=centred, score=LogRatioScore(1.0))
    torch.testing.assert_close(of("opmd", episodes, logp, k2=c), 2 * c * gradient(fixed, episodes, logp))


def test_a_regression_of_whole_answers_is_direct_advantage() -> None:
    """dapo-direct with the whole answer as the step and the group mean as baseline, on a group without duplicates."""
    episodes, logp = data()
    labelled = DistinctAdvantages()(_distinct(episodes), 9)
    assert len(labelled) == len(episodes)
    beta = 0.5
    rho = labelled.reduce(logp - labelled["reference_logp"])
    r = episodes["reward"].reshape(2, 4)
    expected = ((r - r.mean(1, keepdim=True)).flatten() / beta - rho).square().mean() / 2
    objective = find("dapo-direct-advantage").build(beta=beta).objective
    torch.testing.assert_close(objective(labelled, {"logp": logp}), expected)


def _distinct(episodes: Episodes) -> Episodes:
    return episodes.with_columns("step", token=torch.arange(episodes.count("step")))


# ---- direct advantages -----------------------------------------------------------------------------------------------
def test_direct_gradient_at_the_reference() -> None:
    """-gradient = mean( A grad log pi ) / beta at pi = ref; and A = 0 keeps the reference."""
    episodes, logp = data(drift=0.0)
    beta = 0.2
    expected = -episodes.expand("reward") / beta / len(episodes)
    torch.testing.assert_close(of("dapo-direct-advantage", episodes, logp, beta=beta), expected)


def test_no_advantage_keeps_the_reference() -> None:
    episodes, logp = data(drift=0.0, rewards=[[0.0] * 4] * 2)
    assert not of("dapo-direct-advantage", episodes, logp).any()
    episodes, logp = data(drift=0.5, rewards=[[0.0] * 4] * 2)
    rho = episodes.reduce(logp - episodes["reference_logp"])
    torch.testing.assert_close(of("dapo-direct-advantage", episodes, logp), episodes.expand(rho) / len(episodes))


def test_candidate_advantages_sum_to_zero() -> None:
    """Over all candidates, not over the distinct ones: q = 1, 1, 1, 0 of answers a, a, a, b gives A = 1/4, and -3/4."""
    episodes = Episodes.build(
        [[5], [5], [5], [6]], [[0]] * 4, [0] * 4, kind=["rollout"] * 4, reward=[1.0, 1.0, 1.0, 0.0]
    )
    found = DistinctAdvantages()(episodes, 9)
    assert (found["token"].tolist(), found["reward"].tolist()) == ([5, 6], [0.25, -0.75])
    apart = DistinctAdvantages()(_distinct(episodes), 9)
    assert (apart["reward"].tolist(), float(apart["reward"].sum())) == ([0.25] * 3 + [-0.75], 0.0)
    different = DistinctAdvantages()(episodes.with_columns("episode", reward=torch.tensor([1.0, 0.0, 0.5, 0.5])), 9)
    assert different["reward"].tolist() == [0.0, 0.0], "equal answers of different value: their mean"
    both = Episodes.cat([episodes, episodes])
    assert DistinctAdvantages()(both, 9)["reward"].tolist() == [0.25, -0.75] * 2, "groups are apart"
    near = both.with_columns("episode", reward=torch.tensor([1.0, 0.0, 0.0, 0.0, 0.55, 0.5, 0.5, 0.5]))
    assert RewardGap(least=0.1)(near).tolist() == [True, False]


def bandit(reward: Tensor, reference: Tensor) -> Episodes:
    """Every action of one state once, uniform nu; `reference` are log-probs."""
    n = len(reward)
    made = Episodes.build([[i] for i in range(n)], [[0]] * n, [0] * n, kind=["rollout"] * n)
    return made.with_columns("episode", reward=reward).with_columns("step", reference_logp=reference)


def minimised(slug: str, episodes: Episodes, **settings: object) -> Tensor:
    """The log-probs of the softmax policy that minimises the loss."""
    objective = find(slug).build(**settings).objective
    theta = episodes["reference_logp"].clone().requires_grad_()
    optimizer = torch.optim.LBFGS([theta], lr=1.0, max_iter=500, tolerance_grad=1e-13, tolerance_change=1e-18,
                                  line_search_fn="strong_wolfe")  # fmt: skip

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = objective(episodes, {"logp": theta.log_softmax(0)})
        loss.backward()
        return loss

    optimizer.step(closure)
    return theta.detach().log_softmax(0)


def draw(seed: int, n: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    """(q, log ref, A = q - E_ref q)"""
    generator = torch.Generator().manual_seed(seed)
    q = torch.rand(n, generator=generator, dtype=torch.float64)
    reference = torch.randn(n, generator=generator, dtype=torch.float64).log_softmax(0)
    return q, reference, q - (reference.exp() * q).sum()


def test_a_shifted_baseline_moves_the_minimiser_only() -> None:
    """Of actions drawn from the reference the expected gradient on logits is the same; the minimiser is another."""
    q, reference, advantage = draw(0)
    beta, found, ends = 0.5, [], []
    for shift in (0.0, 0.4):
        episodes = bandit(advantage + shift, reference)
        x = of("dapo-direct-advantage", episodes, reference, beta=beta) * len(q)  # per drawn action
        p = reference.exp()
        found.append(p * x - p * (p * x).sum())
        ends.append(minimised("dapo-direct-advantage", episodes, beta=beta))
    torch.testing.assert_close(*found)
    assert float((ends[0] - ends[1]).abs().max()) > 1e-3


@pytest.mark.parametrize("seed", range(8))
def test_direct_minimiser_improves(seed: int) -> None:
    """E_pi[A] - beta KL(pi || ref) >= 0 at the minimiser, and more than 0 where A is not 0."""
    _, reference, advantage = draw(seed)
    beta = 0.3
    best = minimised("dapo-direct-advantage", bandit(advantage, reference), beta=beta)
    gain = (best.exp() * advantage).sum() - beta * F.kl(best[None], reference[None])[0]
    assert float(gain) > 1e-6


def test_direct_minimiser_with_a_free_constant() -> None:
    """ref exp(A / beta) / Z with loss 0; with the constant fixed a residual stays."""
    _, reference, advantage = draw(3)
    episodes, beta = bandit(advantage, reference), 0.3
    target = (reference + advantage / beta).log_softmax(0)
    best = minimised("dapo-direct-advantage", episodes, beta=beta, constant="free")
    torch.testing.assert_close(best, target, atol=1e-6, rtol=1e-6)
    fixed = find("dapo-direct-advantage").build(beta=beta).objective
    assert float(fixed(episodes, {"logp": target})) > 1e-3


# ---- GEPO ------------------------------------------------------------------------------------------------------------
def preferences(sizes: list[tuple[int, int]], drift: float = 0.5, seed: int = 2) -> tuple[Episodes, Tensor]:
    """Groups of (winners, losers) of 1 to 3 tokens."""
    generator = torch.Generator().manual_seed(seed)
    chosen = [c for won, lost in sizes for c in [True] * won + [False] * lost]
    group = [g for g, (won, lost) in enumerate(sizes) for _ in range(won + lost)]
    lengths = (1 + torch.randint(3, (len(chosen),), generator=generator)).tolist()
    made = Episodes.build(
        [[0] * n for n in lengths], [[0]] * len(chosen), group, kind=["pair"] * len(chosen), chosen=chosen
    )
    n = made.count("step")
    reference = -torch.rand(n, generator=generator, dtype=torch.float64)
    logp = reference + drift * torch.randn(n, generator=generator, dtype=torch.float64)
    return made.with_columns("step", reference_logp=reference), logp


def test_gepo_of_a_pair_is_dpo() -> None:
    episodes, logp = preferences([(1, 1)] * 3)
    assert torch.equal(of("gepo", episodes, logp, beta=0.3), of("dpo", episodes, logp, beta=0.3))


def by_hand(episodes: Episodes, logp: Tensor, beta: float, spread: float) -> Tensor:
    h, group = episodes.reduce(logp - episodes["reference_logp"]), episodes.index("group", "episode")
    total = torch.zeros((), dtype=torch.float64)
    for g in range(episodes.count("group")):
        won, lost = (h[(group == g) & (episodes["chosen"] == side)] for side in (True, False))
        total = total + torch.log1p(torch.exp(-beta * (won.mean() - lost.mean()))) + spread * won.var(correction=0)
    return total / episodes.count("group")


@pytest.mark.parametrize("spread", [0.0, 0.8])
def test_gepo_without_spread_is_dpo_on_means(spread: float) -> None:
    episodes, logp = preferences([(2, 3), (1, 1), (3, 1), (1, 2)])
    objective = find("gepo").build(beta=0.3, spread=spread).objective
    torch.testing.assert_close(objective(episodes, {"logp": logp}), by_hand(episodes, logp, 0.3, spread))
    expected = differentiated(lambda x: by_hand(episodes, x, 0.3, spread), logp)
    torch.testing.assert_close(gradient(objective, episodes, logp), expected)


def test_gepo_at_the_reference() -> None:
    """log 2, and a spread without gradient."""
    episodes, logp = preferences([(2, 3), (3, 1)], drift=0.0)
    objective = find("gepo").build(spread=5.0).objective
    assert float(objective(episodes, {"logp": logp})) == pytest.approx(math.log(2))
    torch.testing.assert_close(gradient(objective, episodes, logp), of("gepo", episodes, logp, spread=0.0))


def test_gepo_ignores_a_constant_per_prompt() -> None:
    episodes, logp = preferences([(2, 3), (3, 1)])
    first = torch.ones(episodes.count("step"), dtype=torch.bool)
    first[1:] = episodes.index("episode").diff() > 0
    moved = logp + torch.where(first, torch.tensor([0.7, -0.4]).double()[episodes.index("group")], 0.0)
    objective = find("gepo").build().objective
    torch.testing.assert_close(objective(episodes, {"logp": moved}), objective(episodes, {"logp": logp}))


def test_gepo_spread_gradient() -> None:
    """(2 / n) (h_i - mean h) on every token of winner i, over the number of groups; nothing on losers."""
    episodes, logp = preferences([(3, 2), (2, 1)])
    found = of("gepo", episodes, logp, spread=0.6) - of("gepo", episodes, logp, spread=0.0)
    h, expected = episodes.reduce(logp - episodes["reference_logp"]), torch.zeros(8, dtype=torch.float64)
    for rows in ([0, 1, 2], [5, 6]):
        expected[rows] = 0.6 * 2 / len(rows) * (h[rows] - h[rows].mean()) / 2
    torch.testing.assert_close(found, episodes.expand(expected))


def test_equal_winners_have_no_spread() -> None:
    episodes, _ = preferences([(3, 1)])
    logp = episodes["reference_logp"] + 0.3 / episodes.expand(episodes.lengths())
    spread = find("gepo").build().objective.terms()[1][1]
    assert float(spread(episodes, {"logp": logp})) == pytest.approx(0.0, abs=1e-15)
    assert isinstance(spread, ScoreRegression)
    assert spread.target == Zero()


def test_oorl_advantage_by_hand() -> None:
    """R at the last step less 0.5 (blp - ref) from here on; whitened over all tokens with Bessel's correction."""
    episodes, _ = rollouts_of([[1.0, 0.0]], [[2, 1]])
    episodes = episodes.with_columns(
        "step", reference_logp=episodes["behavior_logp"] - torch.tensor([0.2, 0.4, -0.6]).double()
    )
    raw = torch.tensor([1.0 - 0.5 * 0.6, 1.0 - 0.5 * 0.4, 0.0 + 0.5 * 0.6]).double()
    gradient_term = find("oorl-gepo").build(kl=0.5).objective.terms()[0][1]
    assert isinstance(gradient_term, PolicyGradient)
    torch.testing.assert_close(gradient_term.advantage(episodes, {}), (raw - raw.mean()) / (raw.std() + 1e-8))
