"""Identity tests of bapo-balanced, d3s, adora, lite-ppo and pf-ppo."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from tests.toys import ToyPolicy, gradient, rollouts_of, toy_batch
from unipo import functional as F
from unipo.episodes import Episodes
from unipo.learner import Learner, LearnerSettings, summary
from unipo.learner.coefficients import coefficients
from unipo.methods.catalog import find
from unipo.methods.group_variants import FILTERS, filter_r2
from unipo.objectives import (
    Aggregate,
    AllOf,
    BalancedClipMask,
    Budget,
    EpisodeMean,
    EpisodeSum,
    GroupStd,
    LargestScores,
    LongerIsBetter,
    MostVaried,
    Normalised,
    PolicyGradient,
    RankWeight,
    SolvedAtMost,
    Stored,
    TokenMean,
    TokenRatio,
    ValueBalance,
    hoisted,
    with_settings,
)
from unipo.objectives.returns import step_rewards

REWARDS = [[1.0, 0.0, 0.0, 1.0], [0.0, 1.0, 1.0, 1.0]]
LENGTHS = [[2, 3, 1, 4], [1, 2, 5, 2]]
INF = math.inf


def data(drift: float = 0.4, seed: int = 0) -> tuple[Episodes, Tensor]:
    return rollouts_of(REWARDS, LENGTHS, seed, drift)


def of(slug: str, episodes: Episodes, logp: Tensor, **settings: object) -> Tensor:
    return gradient(find(slug).build(**settings).objective, episodes, logp)


def token_mean_grpo(episodes: Episodes, logp: Tensor, clip: float = 0.2) -> Tensor:
    return gradient(find("grpo").build(clip=clip).but(aggregate=TokenMean()).objective, episodes, logp)


def numbers(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


# ---- BAPO ------------------------------------------------------------------------------------------------------------
def fixed(low: float, high: float) -> dict[str, object]:
    return {"low": (low, low), "high": (high, high), "dual_clip": INF}


def test_fixed_bounds_are_the_fixed_clip() -> None:
    """0.8 and 1.2 are PPO's clip, 0.8 and 1.28 DAPO's, with the gradient of the ratio form with dual clip."""
    episodes, logp = data(drift=1.0)
    torch.testing.assert_close(of("bapo-balanced", episodes, logp, **fixed(0.8, 1.2)), token_mean_grpo(episodes, logp))
    dapo = of("dapo-bytedance", episodes, logp)
    torch.testing.assert_close(of("bapo-balanced", episodes, logp, **fixed(0.8, 1.28)), dapo)
    assert not torch.equal(dapo, token_mean_grpo(episodes, logp))
    a = Normalised(scale=GroupStd())(episodes, {})
    x = logp.clone().requires_grad_()
    r = (x - episodes["behavior_logp"]).exp()
    clipped = torch.minimum(r * a, r.clamp(0.8, 1.28) * a)
    dual = torch.where(a < 0, torch.maximum(clipped, 1.5 * a), clipped)
    (expected,) = torch.autograd.grad(-dual.mean(), x)
    found = of("bapo-balanced", episodes, logp, **(fixed(0.8, 1.28) | {"dual_clip": 1.5}))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    assert not torch.equal(found, dapo)


def test_target_zero_leaves_the_bounds_at_their_start() -> None:
    episodes, logp = data(drift=1.0)
    a = Normalised()(episodes, {})
    for balance in (BalancedClipMask().balance, ValueBalance()):
        mask = BalancedClipMask(target=0.0, balance=balance)
        assert mask.bounds(a, episodes, {"logp": logp}) == (0.6, 1.2)
        assert mask.but(target=1e9).bounds(a, episodes, {"logp": logp}) == (0.8, 2.0)


@pytest.mark.parametrize("target", [0.0, 1.0, 1e9])
def test_on_policy_any_bounds_are_grpo(target: float) -> None:
    episodes, logp = data(drift=0.0)
    torch.testing.assert_close(of("bapo-balanced", episodes, logp, target=target), token_mean_grpo(episodes, logp))


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
@pytest.mark.parametrize("seed", range(5))
def test_bounds_are_monotone_and_stay_inside(order: tuple[int, int], seed: int) -> None:
    """A higher target never lowers a bound; the second is raised only when the first is at its limit."""
    episodes, logp = data(drift=1.5, seed=seed)
    a = Normalised()(episodes, {})
    before = (0.6, 1.2)
    for target in (0.0, 0.3, 0.6, 1.0, 1.5, 2.0, 4.0, 1e9):
        low, high = now = BalancedClipMask(order=order, target=target).bounds(a, episodes, {"logp": logp})
        assert before[0] <= low <= 0.8
        assert before[1] <= high <= 2.0
        first_full = low == 0.8 if order == (0, 1) else high == 2.0
        assert first_full or (high == 1.2 if order == (0, 1) else low == 0.6)
        before = now
    assert before == (0.8, 2.0)


def test_bounds_do_not_depend_on_the_scale_of_advantages() -> None:
    episodes, logp = data(drift=1.5)
    a = Normalised()(episodes, {})
    for mask in (BalancedClipMask(), BalancedClipMask(balance=ValueBalance(), order=(1, 0))):
        bounds = {mask.bounds(c * a, episodes, {"logp": logp}) for c in (1e-3, 1.0, 1e3)}
        assert len(bounds) == 1


def test_bounds_by_hand() -> None:
    """Ratios 1.6 and 1 with A = 1, .65 and .9 with A = -1, .5 and 0 aside. Active sums: at (.6, 1.2) S+ 1, S- 1.55."""
    ratio, a = numbers(1.6, 1.0, 0.65, 0.9, 2.5), numbers(1, 1, -1, -1, 0)
    assert [float(s) for s in F.active_balance(ratio, a, 0.6, 1.2, 3.0)] == pytest.approx([1.0, 1.55])
    assert [float(s) for s in F.active_balance(ratio, a, 0.6, 1.2, 0.8)] == pytest.approx([1.0, 0.65])
    assert [float(s) for s in F.value_balance(ratio, a, 0.6, 1.2, 3.0)] == pytest.approx([2.2, 1.55])
    weight = numbers(1.0, 2.0, 3.0, 4.0, 5.0)
    assert [float(s) for s in F.active_balance(ratio, a, 0.6, 2.0, 3.0, weight)] == pytest.approx([3.6, 5.55])
    assert [float(s) for s in F.value_balance(ratio, a, 0.7, 1.2, 3.0, weight)] == pytest.approx([3.2, 5.7])

    def found(target: float, order: tuple[int, int]) -> tuple[float, float]:
        def sums(low: float, high: float) -> tuple[Tensor, Tensor]:
            return F.active_balance(ratio, a, low, high, 3.0)

        return F.balanced_bounds(sums, (0.6, 1.2), (0.8, 2.0), (0.05, 0.1), target, order)

    assert found(1.0, (0, 1)) == pytest.approx((0.7, 1.2))  # .65 leaves: S- = .9 <= 1
    assert found(1.0, (1, 0)) == pytest.approx((0.6, 1.6))  # 1.6 enters: S+ = 2.6 >= 1.55
    assert found(2.0, (0, 1)) == pytest.approx((0.8, 1.6))  # low at its limit, then S+ = 2.6 >= 1.8
    assert found(0.6, (0, 1)) == (0.6, 1.2)
    with pytest.raises(ValueError, match="expected start <= end"):
        F.balanced_bounds(lambda low, high: (a, a), (0.9, 1.2), (0.8, 2.0), (0.05, 0.05))
    assert F.balanced_bounds(lambda low, high: (a.sum() * 0, a.sum() * 0), (0.6, 1.2), (0.8, 2.0), (0.05, 0.05)) == (
        0.6,
        1.2,
    )


def test_value_sums_rise_with_the_low_bound() -> None:
    """Why "active" is the default: a clipped negative still counts at its bound, so raising low raises S-."""
    ratio, a = numbers(0.5, 0.65, 0.9), numbers(-1, -1, -1)
    value = [float(F.value_balance(ratio, a, low, 1.2, 3.0)[1]) for low in (0.6, 0.7, 0.8)]
    active = [float(F.active_balance(ratio, a, low, 1.2, 3.0)[1]) for low in (0.6, 0.7, 0.8)]
    assert value == pytest.approx([2.15, 2.3, 2.5])
    assert active == pytest.approx([1.55, 0.9, 0.9])


class ScalarToy(ToyPolicy):
    """A policy that says that its signals are numbers, so that the learner tries one pass."""

    scalar_signals = True


def test_bounds_are_of_the_whole_batch() -> None:
    """Micro-batches of a group each would search other bounds: the learner sees it and passes twice."""
    episodes = toy_batch(seed=3, demos=False)
    noise = torch.randn(episodes.count("step"), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    episodes = episodes.with_columns("step", behavior_logp=episodes["behavior_logp"] + 0.4 * noise)
    rows = episodes.category("kind", "rollout")
    objective = find("bapo-balanced").build(low=(0.5, 0.9), high=(1.1, 3.0)).objective
    flat, passes = [], []
    for budget in (10_000, 40):
        learner = Learner({"policy": ScalarToy()}, LearnerSettings(token_budget=budget))
        passes.append(learner.gradient(episodes, objective).passes)
        flat.append(torch.cat([p.grad.flatten() for p in learner.parameters() if p.grad is not None]))
    assert passes == [1, 2]
    torch.testing.assert_close(flat[1], flat[0], rtol=1e-10, atol=1e-13)
    logp, mask = ToyPolicy().signals(episodes, ["logp"])["logp"].detach(), objective.terms()[0][1].mask
    a = Normalised()(episodes.select(rows), {})
    parts = {mask.bounds(Normalised()(g, {}), g, {"logp": ToyPolicy().signals(g, ["logp"])["logp"].detach()})
             for g in (episodes.select(rows).select(torch.tensor([i]), "group") for i in range(4))}  # fmt: skip
    whole = mask.bounds(a, episodes.select(rows), {"logp": logp[episodes.expand(rows)]})
    assert len(parts | {whole}) > 2


def test_the_bounds_are_facts() -> None:
    episodes, logp = data(drift=1.5)
    objective = find("bapo-balanced").build().objective
    facts = objective.loss(episodes, {"logp": logp}).facts
    a = Normalised(scale=GroupStd())(episodes, {})
    low, high = objective.mask.bounds(a, episodes, {"logp": logp})
    up, down = F.active_balance((logp - episodes["behavior_logp"]).exp(), a, low, high, 3.0)
    assert facts["clip_low"].tolist() == [low] * len(logp)
    assert facts["clip_high"].tolist() == [high] * len(logp)
    assert facts["positive_share"].tolist() == pytest.approx([float(up / (up + down))] * len(logp))
    told = summary(Learner({"policy": ToyPolicy()}).update(toy_batch(), objective))
    assert 0.6 <= told["clip_low"] <= 0.8 + 1e-6
    assert 0.0 < told["positive_share"] < 1.0


# ---- D3S -------------------------------------------------------------------------------------------------------------
def entropies(n: int, seed: int = 0) -> Tensor:
    return torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.1


def d3s_gradient(episodes: Episodes, logp: Tensor, entropy: Tensor, **settings: object) -> Tensor:
    objective = with_settings(find("d3s").build(**settings).objective, {})
    return coefficients(objective, episodes, {"logp": logp, "entropy": entropy}).total["logp"]


def test_d3s_with_everything_is_grpo_by_token_mean() -> None:
    episodes, logp = data(drift=1.0)
    found = d3s_gradient(episodes, logp, entropies(len(logp)), rollouts=(1.0, 1.0), tokens=(1.0, 1.0))
    torch.testing.assert_close(found, token_mean_grpo(episodes, logp), rtol=0, atol=0)


def test_kept_tokens_are_the_denominator() -> None:
    """With half of the tokens kept each counts twice; the others have coefficient 0, and NaN in the facts."""
    episodes, logp = data(drift=0.02)
    entropy = entropies(len(logp))
    full = token_mean_grpo(episodes, logp)
    found = d3s_gradient(episodes, logp, entropy, rollouts=(1.0, 1.0), tokens=(0.5, 0.5))
    kept = found != 0
    assert int(kept.sum()) == 10
    torch.testing.assert_close(found[kept], full[kept] * 20 / 10)
    score = Normalised(scale=GroupStd())(episodes, {}).abs() * entropy
    assert float(score[kept].min()) > float(score[~kept].max())
    objective = with_settings(find("d3s").build(tokens=(0.5, 0.5), rollouts=(1.0, 1.0)).objective, {})
    facts = objective.loss(episodes, {"logp": logp, "entropy": entropy}).facts
    assert torch.equal(facts["weight"].isnan(), ~kept)


def test_selection_ignores_the_scale_of_advantages() -> None:
    episodes, logp = data()
    signals = {"logp": logp, "entropy": entropies(len(logp))}
    a = Normalised()(episodes, {})
    counted = LargestScores(0.4, among=MostVaried(0.5))
    kept = [counted.of(c * a, episodes, signals) for c in (1e-4, 1.0, 1e4)]
    assert torch.equal(kept[0], kept[1])
    assert torch.equal(kept[1], kept[2])


def test_tokens_without_advantage_are_dropped_first() -> None:
    """A group of equal rewards has A = 0: with room for the other group's ten tokens, exactly these are kept."""
    episodes, logp = rollouts_of([[1.0] * 4, [0.0, 1.0, 1.0, 1.0]], LENGTHS)
    found = LargestScores(0.5).of(Normalised()(episodes, {}), episodes, {"entropy": entropies(len(logp))})
    assert torch.equal(found, torch.arange(20) >= 10)
    more = LargestScores(0.6).of(Normalised()(episodes, {}), episodes, {"entropy": entropies(len(logp))})
    assert more.nonzero().flatten().tolist() == [0, 1, *range(10, 20)], "of equal scores the first"


def test_constant_entropy_selects_by_advantage() -> None:
    episodes, logp = data()
    a = Normalised(scale=GroupStd())(episodes, {})
    found = LargestScores(0.3).of(a, episodes, {"entropy": torch.full_like(logp, 0.7)})
    assert torch.equal(found, F.largest(a.abs(), 6))


def best_by_force(values: Tensor, count: int) -> float:
    subsets = itertools.combinations(range(len(values)), count)
    return max(float(values[list(s)].var(correction=0)) for s in subsets)


@pytest.mark.parametrize("seed", range(20))
def test_max_variance_subset_is_the_best_of_all(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(9, generator=generator, dtype=torch.float64).round(decimals=seed % 3)
    for count in range(1, 10):
        kept = F.max_variance_subset(values, count)
        assert int(kept.sum()) == count
        assert float(values[kept].var(correction=0)) == pytest.approx(best_by_force(values, count), abs=1e-12)


def test_ties_of_the_subset_are_settled() -> None:
    """2 right + 1 wrong vary as 1 right + 2 wrong: the fewest smallest win, that is the last three in ascending order."""
    assert F.max_variance_subset(numbers(1, 0, 1, 0), 3).tolist() == [True, False, True, True]
    noisy = numbers(1, 0, 1, 0) + numbers(0, 3e-12, 0, 0)
    assert F.max_variance_subset(noisy, 3).tolist() == [True, False, True, True]
    assert F.max_variance_subset(-numbers(0.1, 0.7, 0.2), 1).tolist() == [True, False, False]
    assert F.max_variance_subset(numbers(5, 5, 5), 2).tolist() == [False, True, True]
    assert F.ascending(numbers(0.3, 0.1 + 0.2, 0.1)).tolist() == [2, 0, 1]
    assert F.largest(numbers(0, 2, 1, 2, 1), 3).tolist() == [False, True, True, True, False]
    assert [F.share_of(10, x) for x in (0.0, 0.01, 0.7, 0.71, 1.0)] == [1, 1, 7, 8, 10]
    assert F.share_of(0, 0.5) == 0


def test_the_unbiased_variance_of_the_best_subset() -> None:
    """It is at least that of the whole set; with population variance it need not be."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        values = torch.randn(6, generator=generator, dtype=torch.float64)
        for count in range(2, 6):
            kept = values[F.max_variance_subset(values, count)]
            assert float(kept.var()) >= float(values.var()) * (1 - 1e-12)
    even = numbers(-1, -1, 1, 1)
    assert float(even[F.max_variance_subset(even, 3)].var(correction=0)) == pytest.approx(8 / 9)


@pytest.mark.parametrize(
    ("right", "kept"), [(3, (3, 5)), (14, (6, 2)), (4, (4, 4)), (8, (4, 4)), (0, (0, 8)), (16, (8, 0))]
)
def test_binary_rewards_keep_the_minority(right: int, kept: tuple[int, int]) -> None:
    values = torch.cat([torch.ones(right), torch.zeros(16 - right)]).double()
    chosen = values[F.max_variance_subset(values, 8)]
    assert (int(chosen.sum()), int((1 - chosen).sum())) == kept


def test_the_two_steps_of_selection() -> None:
    """Within groups each keeps its share; pooled, a group of equal rewards loses everything."""
    episodes, _ = rollouts_of([[1.0] * 4, [0.0, 1.0, 1.0, 1.0]], [[1] * 4] * 2)
    a = Normalised(scale=GroupStd())(episodes, {})
    own = MostVaried(0.5, within="group")
    assert own.of(a, episodes, {}).tolist() == [False, False, True, True, True, False, False, True]
    both = MostVaried(0.25, among=own)
    assert both.of(a, episodes, {}).tolist() == [False, False, False, False, True, False, False, True]
    assert MostVaried(0.5).of(a, episodes, {}).sum() == 4
    assert own.of(a, episodes.select(torch.tensor([1, 0]), "group"), {}).sum() == 4


def test_max_variance_of_rewards_is_that_of_advantages() -> None:
    """Within one group A is affine in R; across groups it is not."""
    episodes, _ = rollouts_of([[0.1, 0.9, 0.3, 0.7, 0.2]], [[1] * 5])
    a = Normalised(scale=GroupStd())(episodes, {})
    assert torch.equal(MostVaried(0.6).of(a, episodes, {}), F.max_variance_subset(episodes["reward"], 3))
    episodes, _ = rollouts_of([[0.0, 1.0, 1.0, 1.0], [0.4, 0.4, 0.4, 0.5]], [[1] * 4] * 2)
    a = Normalised(scale=GroupStd())(episodes, {})
    assert not torch.equal(MostVaried(0.25).of(a, episodes, {}), F.max_variance_subset(episodes["reward"], 2))


def test_the_schedule_of_d3s() -> None:
    """Linear from start to end over the run, however long: the mean share of tokens is 0.158."""
    recipe = find("d3s").build()
    controllers = [c.lasting(1000) for c in recipe.controllers]
    shares = [[c.setting({}, step) for step in (0, 500, 1000)] for c in controllers]
    assert shares == [[0.25, 0.375, 0.5], pytest.approx([0.2, 0.4, 0.6])]
    used = [math.prod(c.setting({}, step) for c in controllers) for step in range(1000)]
    assert sum(used) / 1000 == pytest.approx(0.1583, abs=2e-4)
    assert recipe.objective.knobs == {"rollout_share": 0.25, "token_share": 0.2}


def test_a_selection_plugs_into_gspo() -> None:
    """Ratios are of whole answers; steps without a place add nothing, episodes keep theirs."""
    episodes, logp = data()
    objective = find("gspo").build().objective.but(counted=MostVaried(0.5))
    found, full = gradient(objective, episodes, logp), gradient(find("gspo").build().objective, episodes, logp)
    kept = MostVaried(0.5).of(Normalised(scale=GroupStd())(episodes, {}), episodes, {})
    torch.testing.assert_close(found, torch.where(kept, full, 0.0))


@pytest.mark.parametrize("slug", ["d3s", "adora", "pf-ppo"])
def test_choices_among_episodes_need_whole_ones(slug: str) -> None:
    """Minibatches of single steps have no groups to choose in: told, not done."""
    with pytest.raises(ValueError, match="looks along episodes"):
        hoisted(find(slug).build().objective, toy_batch())


# ---- ADORA -----------------------------------------------------------------------------------------------------------
def grpo_gradient(episodes: Episodes, logp: Tensor) -> Tensor:
    return gradient(find("grpo").build().objective, episodes, logp)


def test_weight_one_is_grpo() -> None:
    episodes, logp = data(drift=1.0)
    expected = grpo_gradient(episodes, logp)
    torch.testing.assert_close(of("adora", episodes, logp, factor=1.0), expected)
    for rule in ("attenuate", "verl", "openrlhf"):
        torch.testing.assert_close(of("adora", episodes, logp, rule=rule, damping=1.0), expected)


def ratios_to_grpo(rewards: list[list[float]], lengths: list[list[int]], cut: tuple[int, ...] = (), **settings: object
                   ) -> list[float]:  # fmt: skip
    """The weight of each group: its gradient over GRPO's, from one step that has an advantage."""
    episodes, logp = rollouts_of(rewards, lengths)
    truncated = torch.zeros(len(episodes), dtype=torch.bool)
    truncated[list(cut)] = True
    episodes = episodes.with_columns("episode", truncated=truncated)
    weight = find("adora").build(**settings).objective.weight.of(torch.ones_like(logp), episodes, {"logp": logp})
    return episodes.reduce(weight, to="group", how="max").tolist()


def test_group_sums_stay_zero() -> None:
    """One weight per group: advantages of one-token answers still sum to 0, doubled where the criteria are met."""
    episodes, logp = rollouts_of([[1.0, 0.0, 0.0], [1.0, 1.0, 0.0]], [[1] * 3] * 2)
    found = of("adora", episodes, logp, criteria="difficulty")
    assert episodes.reduce(found, to="group").tolist() == pytest.approx([0.0, 0.0], abs=1e-15)
    torch.testing.assert_close(found, grpo_gradient(episodes, logp) * numbers(2, 2, 2, 1, 1, 1))


def test_the_criteria_by_hand() -> None:
    """Right answers of 2 and 5, wrong ones of 3 and 5: the longest, 5, beats their mean, 4; equal does not."""
    rewards, lengths = [[1.0, 1.0, 0.0, 0.0]], [[2, 5, 3, 5]]
    assert ratios_to_grpo(rewards, lengths, criteria="length") == [2.0]
    assert ratios_to_grpo(rewards, [[2, 4, 3, 5]], criteria="length") == [1.0]
    assert ratios_to_grpo(rewards, [[2, 4, 3, 5]], cut=(3,), criteria="length") == [2.0], "a cut answer does not count"
    assert ratios_to_grpo(rewards, [[2, 4, 3, 5]], criteria="length", longest=5) == [2.0], (
        "nor one of the limit's length"
    )
    assert ratios_to_grpo(rewards, [[2, 4, 3, 5]], rule="attenuate") == [0.1]
    assert ratios_to_grpo(rewards, lengths, rule="attenuate") == [1.0]


def test_criteria_join() -> None:
    """Longer and hard, longer only, hard only, neither."""
    rewards = [[1.0, 0.0, 0.0], [1.0, 1.0, 0.0], [1.0, 0.0, 0.0], [1.0, 1.0, 0.0]]
    lengths = [[5, 2, 3], [5, 1, 3], [1, 2, 3], [1, 1, 3]]
    expected = {"and": [2, 1, 1, 1], "or": [2, 2, 2, 1], "length": [2, 2, 1, 1], "difficulty": [2, 1, 2, 1]}
    for criteria, weights in expected.items():
        assert ratios_to_grpo(rewards, lengths, criteria=criteria) == weights
    assert AllOf()(rollouts_of(rewards, lengths)[0], {}).all()


def test_undefined_lengths_are_neutral() -> None:
    """No right answer, or no wrong one that counts: weight 1 by the paper's rules."""
    rewards, lengths = [[0.0, 0.0], [1.0, 1.0], [1.0, 0.0]], [[1, 2], [1, 2], [5, 1]]
    for rule in ("amplify", "attenuate"):
        assert ratios_to_grpo(rewards, lengths, cut=(5,), rule=rule, criteria="length") == [1.0, 1.0, 1.0]


def test_the_two_public_codes() -> None:
    """All wrong, all right, all wrong ones cut, shorter right, longer right. Where they differ and the advantage is 0 for
    binary rewards the gradients agree; they do not where all wrong answers were cut."""
    rewards = [[0.0, 0.0], [1.0, 1.0], [1.0, 0.0], [1.0, 0.0], [1.0, 0.0]]
    lengths = [[1, 2], [1, 2], [1, 4], [1, 4], [4, 1]]
    verl = ratios_to_grpo(rewards, lengths, cut=(5,), rule="verl")
    openrlhf = ratios_to_grpo(rewards, lengths, cut=(5,), rule="openrlhf")
    assert verl == [0.1, 1.0, 1.0, 0.1, 1.0]
    assert openrlhf == [1.0, 0.1, 0.1, 0.1, 1.0]
    episodes, logp = rollouts_of(rewards, lengths)
    cut = torch.tensor([i == 5 for i in range(10)])
    a, b = (
        of("adora", episodes.with_columns("episode", truncated=cut), logp, rule=rule) for rule in ("verl", "openrlhf")
    )
    groups = episodes.expand(torch.arange(5), level="group")
    assert torch.equal(a[groups != 2], b[groups != 2])
    torch.testing.assert_close(a[groups == 2], 10 * b[groups == 2])
    assert float(a[groups == 2].abs().min()) > 0
    partly = [[0.0, 0.4], [1.0, 0.0]]
    found = [of("adora", *rollouts_of(partly, [[1, 2], [4, 1]]), rule=rule) for rule in ("verl", "openrlhf")]
    torch.testing.assert_close(10 * found[0][:3], found[1][:3])


def test_only_the_ratio_of_weights_matters() -> None:
    """(2, 1) and c (2, 1) give gradients that are proportional: the same direction for Adam."""
    episodes, logp = rollouts_of([[1.0, 0.0, 0.0], [1.0, 1.0, 0.0]], [[5, 2, 3], [1, 1, 3]], drift=0.5)
    base = find("adora").build().objective
    weights = base.weight.weights
    scaled = base.but(weight=base.weight.but(weights=(weights[0], weights[1].but(holds=6.0, fails=3.0))))
    torch.testing.assert_close(gradient(scaled, episodes, logp), 3 * gradient(base, episodes, logp))


def test_conditions_ignore_the_scale_of_rewards() -> None:
    """With the threshold scaled along, only lengths and who is right matter."""
    lengths = [[5, 2, 3], [1, 1, 3]]
    a, _ = rollouts_of([[1.0, 0.0, 0.2], [0.9, 1.0, 0.0]], lengths)
    b, _ = rollouts_of([[70.0, -9.0, 0.0], [60.0, 51.0, 3.0]], lengths)
    for condition in (LongerIsBetter, SolvedAtMost):
        assert torch.equal(condition(right=0.5)(a, {}), condition(right=50.0)(b, {}))


def test_difficulty_flips_at_tau() -> None:
    episodes, _ = rollouts_of([[1.0, 1.0, 0.0, 0.0], [1.0, 1.0, 1.0, 0.0]], [[1] * 4] * 2)
    assert SolvedAtMost(0.5)(episodes, {}).tolist() == [True, False]
    assert SolvedAtMost(0.75)(episodes, {}).tolist() == [True, True]
    assert SolvedAtMost(0.49)(episodes, {}).tolist() == [False, False]


# ---- Lite PPO --------------------------------------------------------------------------------------------------------
def lite_advantage(episodes: Episodes, settings: dict[str, float] | None = None, **options: object) -> Tensor:
    """[E], unbounded unless asked."""
    objective = with_settings(find("lite-ppo").build(**({"limit": INF} | options)).objective, settings or {})
    return episodes.reduce(objective.advantage(episodes, {}), how="mean")


def test_one_prompt_is_grpo() -> None:
    episodes, logp = rollouts_of([[1.0, 0.0, 0.3, 1.0]], [[2, 3, 1, 4]], drift=1.0)
    found = of("lite-ppo", episodes, logp, limit=INF, dual_clip=INF)
    torch.testing.assert_close(found, token_mean_grpo(episodes, logp), rtol=1e-12, atol=0)
    two, other = data(drift=1.0)
    assert not torch.allclose(of("lite-ppo", two, other, limit=INF, dual_clip=INF), token_mean_grpo(two, other))


def test_without_std_it_is_dr_grpo() -> None:
    episodes, logp = data(drift=1.0)
    found = of(
        "lite-ppo",
        episodes,
        logp,
        std="none",
        aggregate="seq-mean-token-sum-norm",
        budget=7.0,
        limit=INF,
        dual_clip=INF,
    )
    torch.testing.assert_close(found, of("dr-grpo", episodes, logp, budget=7.0))


def test_affine_rewards() -> None:
    """a R + b for the whole batch leaves A; a shift per prompt leaves R - mean and changes the std of the batch."""
    episodes, _ = data()
    reward, shift = episodes["reward"], numbers(0, 0, 0, 0, 3, 3, 3, 3)
    own = lite_advantage(episodes, eps=0.0)
    torch.testing.assert_close(lite_advantage(episodes.with_columns("episode", reward=3 * reward - 5), eps=0.0), own)
    moved = lite_advantage(episodes.with_columns("episode", reward=reward + shift), eps=0.0)
    ratio = float(reward.std() / (reward + shift).std())
    torch.testing.assert_close(moved, own * ratio)
    assert ratio < 0.5


def test_scale_per_prompt_against_grpo() -> None:
    """GRPO over Lite PPO, binary rewards, population stds: std_batch / sqrt(p (1 - p)); 1 where p = 1/2 everywhere."""
    episodes, _ = data()
    population = episodes["reward"].std(correction=0)
    grpo = episodes.reduce(Normalised(scale=GroupStd(eps=0.0, ddof=0))(episodes, {}), how="mean")
    lite = lite_advantage(episodes, eps=0.0) * episodes["reward"].std() / population
    p = numbers(0.5, 0.5, 0.5, 0.5, 0.75, 0.75, 0.75, 0.75)
    torch.testing.assert_close(grpo / lite, population / (p * (1 - p)).sqrt())
    even, _ = rollouts_of([[1.0, 0.0], [0.0, 1.0]], [[1, 1]] * 2)
    lite = lite_advantage(even, eps=0.0) * even["reward"].std() / even["reward"].std(correction=0)
    torch.testing.assert_close(lite, numbers(1, -1, -1, 1))


def test_equal_lengths_make_aggregates_agree() -> None:
    episodes, logp = rollouts_of(REWARDS, [[3] * 4] * 2, drift=0.5)
    base = of("lite-ppo", episodes, logp)
    for name, factor in (
        ("seq-mean-token-mean", 1.0),
        ("seq-mean-token-sum", 3.0),
        ("seq-mean-token-sum-norm", 3 / 1024),
    ):
        torch.testing.assert_close(of("lite-ppo", episodes, logp, aggregate=name), factor * base)


def test_running_moments_are_those_of_everything_seen() -> None:
    """Three batches: controllers carry the first two, the part adds the third, and the result is that of all together."""
    batches = [rollouts_of([[1.0, 0.0, 0.3]], [[1] * 3])[0], rollouts_of([[0.2, 0.9]], [[1] * 2])[0], data()[0]]
    recipe = find("lite-ppo").build(mean="running", std="running", eps=0.0, limit=INF)
    states = {c.knob: c.start() for c in recipe.controllers}
    for batch in batches[:2]:
        r = batch["reward"]
        metrics = {"rollouts": float(len(r)), "reward": float(r.mean()), "reward_std": float(r.std(correction=0))}
        states = {c.knob: c.observe(states[c.knob], metrics) for c in recipe.controllers}
    settings = {c.knob: c.setting(states[c.knob], 2) for c in recipe.controllers}
    everything, last = torch.cat([b["reward"] for b in batches]), batches[2]
    found = lite_advantage(last, settings, mean="running", std="running", eps=0.0)
    torch.testing.assert_close(found, (last["reward"] - everything.mean()) / everything.std())
    first = lite_advantage(last, mean="running", std="running", eps=0.0)
    torch.testing.assert_close(first, lite_advantage(last, mean="batch", std="batch", eps=0.0))
    assert recipe.controllers[0].observe({"count": 1.0}, {"reward": math.nan}) == {"count": 1.0}


@pytest.mark.parametrize("mean", ["group", "batch", "running"])
@pytest.mark.parametrize("std", ["none", "group", "batch", "running"])
def test_equal_rewards_have_no_advantage(mean: str, std: str) -> None:
    episodes, _ = rollouts_of([[0.3] * 3, [0.3] * 3], [[1] * 3] * 2)
    assert lite_advantage(episodes, mean=mean, std=std).tolist() == [0.0] * 6


def test_advantages_are_bounded() -> None:
    """One right answer of sixteen: z = 3.75, held at 2; cut answers and prompts of other difficulty are left out."""
    episodes, _ = rollouts_of([[1.0] + [0.0] * 15], [[1] * 16])
    assert float(lite_advantage(episodes).max()) == pytest.approx(3.75, abs=1e-4)
    assert float(lite_advantage(episodes, limit=2.0).max()) == 2.0
    spec = find("lite-ppo").build(overlong="mask", difficulty=(0.1, 0.95)).rollouts
    assert spec.keep(episodes).tolist() == [False]
    assert len(spec.relabel) == 1
    assert find("lite-ppo").build().rollouts.keep(episodes).tolist() == [True]


# ---- PF-PPO ----------------------------------------------------------------------------------------------------------
def critic_data(rewards: list[list[float]], lengths: list[list[int]], drift: float = 0.3
                ) -> tuple[Episodes, dict[str, Tensor]]:  # fmt: skip
    episodes, logp = rollouts_of(rewards, lengths, drift=drift)
    value = entropies(len(logp), 5)
    return episodes.with_columns("step", old_value=value), {"logp": logp, "value": value + 0.1}


def pf_gradients(episodes: Episodes, signals: dict[str, Tensor], **settings: object) -> dict[str, Tensor]:
    return dict(coefficients(find("pf-ppo").build(**{"reward_kl": 0.0, **settings}).objective, episodes, signals).total)


FIVE = [[0.9, 0.1, 0.5, 0.3, 0.7], [0.2, 0.8, 0.6, 0.4, 0.0]]
FIVE_LENGTHS = [[2, 3, 1, 4, 2], [1, 2, 5, 2, 3]]


def test_shares_by_rank() -> None:
    """Of 5: best-random (.5, 4 x .125), best-worst (.5, 0, 0, 0, .5); the paper's 0.4 and 0.1 of 0.8 are the first."""
    values, index = torch.tensor(FIVE, dtype=torch.float64).flatten(), torch.arange(10) // 5
    assert F.places(values, index, 2).tolist() == [0, 4, 2, 3, 1, 3, 0, 1, 2, 4]
    expected = {"bon": [1, 0, 0, 0, 0], "br": [0.5, 0.125, 0.125, 0.125, 0.125], "bw": [0.5, 0.5, 0, 0, 0]}
    for name, shares in expected.items():
        assert F.rank_shares(values, index, 2, *FILTERS[name])[:5].tolist() == pytest.approx(shares)
        assert float(F.rank_shares(values, index, 2, *FILTERS[name]).sum()) == pytest.approx(2.0)
        assert F.rank_shares(values[:1], index[:1], 1, *FILTERS[name]).tolist() == [1.0]
    assert F.rank_shares(values[:5], index[:5], 1, 0.4 / 0.8, 0.4 / 0.8, 0.0).tolist() == pytest.approx(expected["br"])
    assert F.places(numbers(1, 1, 0, 1), torch.zeros(4).long(), 1).tolist() == [0, 1, 3, 2], "of equal ones the first"


def test_uniform_shares_are_ppo() -> None:
    """Best 1/N and the others (N - 1)/N, or no filter at all, is PPO on all N answers, with its critic."""
    episodes, signals = critic_data(FIVE, FIVE_LENGTHS, drift=1.0)
    plain = find("ppo").build(group=5, epochs=1)
    ppo = plain.objective.but(weighted=tuple((c, t.but(aggregate=EpisodeMean())) for c, t in plain.objective.terms()))
    expected = coefficients(ppo, episodes, signals).total
    found = pf_gradients(episodes, signals, filter="none")
    uniform = find("pf-ppo").build(reward_kl=0.0).objective
    even = RankWeight(0.2, 0.8, 0.0)
    policy, critic = (t for _, t in uniform.terms())
    even_policy = policy.but(weight=policy.weight.but(weights=(TokenRatio(), even)))
    ranked = coefficients(even_policy + 0.1 * critic.but(weight=even), episodes, signals).total
    for name in ("logp", "value"):
        torch.testing.assert_close(found[name], expected[name])
        torch.testing.assert_close(ranked[name], expected[name])


def test_two_answers_make_br_bw_and_ppo_one() -> None:
    episodes, signals = critic_data([[0.9, 0.1], [0.2, 0.8]], [[2, 3], [1, 4]], drift=1.0)
    ppo, br, bw, bon = (pf_gradients(episodes, signals, filter=f) for f in ("none", "br", "bw", "bon"))
    for name in ("logp", "value"):
        torch.testing.assert_close(br[name], ppo[name])
        torch.testing.assert_close(bw[name], ppo[name])
    assert not torch.allclose(bon["logp"], ppo["logp"])


def test_best_of_n_has_no_negative_advantage() -> None:
    """With the group's mean as the baseline the best answer is above it: cloning, without anything to avoid."""
    episodes, _ = rollouts_of(FIVE, FIVE_LENGTHS)
    a = Normalised()(episodes, {})
    weighted = RankWeight(*FILTERS["bon"])(episodes, {}) * a
    assert (weighted >= 0).all()
    assert (a < 0).any()
    assert (RankWeight(*FILTERS["bw"])(episodes, {}) * a < 0).any()


@dataclass(frozen=True)
class Drawn:
    """Every way to draw N of N answers with replacement, each with its probability."""

    episodes: Episodes
    logp: Tensor
    shares: Tensor

    def expected(self, aggregate: Aggregate) -> Tensor:
        """The expected gradient of training on what was drawn, at the steps of the answers themselves."""
        total, n = torch.zeros_like(self.logp), len(self.episodes)
        objective = PolicyGradient(advantage=Stored("given"), aggregate=aggregate)
        for draw in itertools.product(range(n), repeat=n):
            probability = float(self.shares[list(draw)].prod())
            if probability:
                rows, steps = torch.tensor(draw), self.episodes.step_index(torch.tensor(draw))
                found = gradient(objective, self.episodes.select(rows), self.logp[steps])
                total.index_add_(0, steps, probability * found)
        return total


def drawn(which: str) -> tuple[Drawn, Tensor]:
    episodes, logp = rollouts_of([[0.9, 0.1, 0.5]], [[2, 3, 1]])
    given = torch.randn(6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    episodes = episodes.with_columns("step", given=given)
    shares = F.rank_shares(episodes["reward"], torch.zeros(3).long(), 1, *FILTERS[which])
    return Drawn(episodes, logp, shares), logp


@pytest.mark.parametrize("aggregate", [EpisodeMean(), EpisodeSum(), Budget(7.0)])
@pytest.mark.parametrize("which", ["bon", "br", "bw"])
def test_resampling_in_expectation(which: str, aggregate: Aggregate) -> None:
    """Drawing N by the shares = weighing by N * share, for means over episodes."""
    case, logp = drawn(which)
    weighted = PolicyGradient(advantage=Stored("given"), weight=RankWeight(*FILTERS[which]), aggregate=aggregate)
    torch.testing.assert_close(gradient(weighted, case.episodes, logp), case.expected(aggregate))


def test_resampling_is_not_exact_for_token_means() -> None:
    """How many tokens were drawn is random, and so is what they are divided by."""
    case, logp = drawn("br")
    weighted = PolicyGradient(advantage=Stored("given"), weight=RankWeight(*FILTERS["br"]), aggregate=TokenMean())
    assert not torch.allclose(gradient(weighted, case.episodes, logp), case.expected(TokenMean()), rtol=1e-2)


@pytest.mark.parametrize("which", ["none", "bon", "br", "bw"])
def test_r2_without_noise_is_one(which: str) -> None:
    reward, index = torch.tensor(FIVE, dtype=torch.float64).flatten(), torch.arange(10) // 5
    assert filter_r2(2 * reward - 1, reward, index, 2, which) == pytest.approx(1.0)
    noisy = reward.square() + numbers(*([0.3, -0.3] * 5))
    found = filter_r2(noisy, reward, index, 2, which)
    w = torch.ones(10) if which == "none" else F.rank_shares(reward, index, 2, *FILTERS[which])
    rows = torch.repeat_interleave(torch.arange(10), (w * 8).round().long())
    assert found == pytest.approx(float(torch.corrcoef(torch.stack([noisy[rows], reward[rows]]))[0, 1] ** 2))


def test_r2_of_what_does_not_vary() -> None:
    flat, rising = numbers(1, 1, 1), numbers(0, 1, 2)
    assert float(F.weighted_r2(rising, flat, flat)) == 0.0
    assert math.isnan(float(F.weighted_r2(flat, rising, flat)))


def test_whitening_comes_before_the_filter() -> None:
    """Advantages are those of all answers, not of what the filter leaves, which would be others."""
    episodes, signals = critic_data(FIVE, FIVE_LENGTHS)
    shown = {}
    for which in ("none", "bw"):
        gradient_term = find("pf-ppo").build(filter=which, reward_kl=0.0).objective.terms()[0][1]
        shown[which] = gradient_term.loss(episodes, signals).facts["advantage"]
    assert torch.equal(shown["none"], shown["bw"])
    assert float(shown["bw"].mean()) == pytest.approx(0.0, abs=1e-12)
    assert float(shown["bw"].std()) == pytest.approx(1.0, abs=1e-5)
    left = shown["bw"][RankWeight(*FILTERS["bw"])(episodes, {}) > 0]
    assert abs(float(left.mean())) > 0.01


def test_the_divergence_is_in_the_reward() -> None:
    """A reference that is behind by d at every token takes reward_kl * d off each; the rank is that of the plain reward."""
    episodes, signals = critic_data(FIVE, FIVE_LENGTHS)
    behind = torch.linspace(0.0, 1.0, len(signals["logp"]), dtype=torch.float64)
    known = episodes.with_columns("step", reference_logp=episodes["behavior_logp"] - behind)
    paid = step_rewards(episodes) - 0.5 * behind
    for name in ("logp", "value"):
        found = pf_gradients(known, signals, filter="none", reward_kl=0.5)[name]
        torch.testing.assert_close(
            found, pf_gradients(episodes.with_columns("step", reward=paid), signals, filter="none")[name]
        )
        assert not torch.allclose(found, pf_gradients(episodes, signals, filter="none")[name])
        ranked = pf_gradients(known, signals, filter="bw", reward_kl=0.5)[name]
        left = RankWeight(*FILTERS["bw"])(episodes, {})
        torch.testing.assert_close(ranked, left * found)
