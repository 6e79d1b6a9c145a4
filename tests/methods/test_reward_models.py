"""Models that judge: minimisers on enumerable answers, cycles, best of n by enumeration, the log-ratio of two policies."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from tests.toys import ToyPolicy, gradient, toy_batch
from unipo.episodes import Episodes
from unipo.learner.coefficients import coefficients
from unipo.methods.policy_gradients import rloo
from unipo.methods.preferences import dpo, simpo
from unipo.methods.reward_models import best_of_n, dr_sow, preference_model, reward_model
from unipo.objectives import FinalValue, Listwise, Pairwise, RankedPairs
from unipo.policies.tabular import TabularPolicy
from unipo.recipe import Recipe
from unipo.sources.keyed import keyed_generator
from unipo.sources.spec import RolloutSpec
from unipo.sources.stages.arrange import EveryPair, Rivals
from unipo.sources.stages.augment import Drawn
from unipo.sources.text.tabular import NumberTokenizer, tabular_rollouts
from unipo.tabular.best_of import best_of_n as exact_best
from unipo.tabular.best_of import expected_best, most_kl
from unipo.tabular.games import PreferenceGame, kl
from unipo.tasks.tabular import TabularTask

ARMS, END = 3, 3
"""Answers are one of three tokens, closed by a fourth."""


# ---- comparisons of three answers ---------------------------------------------------------------------------------------
def compared(game: PreferenceGame, counts: int = 40) -> Episodes:
    """Every pair of answers in proportion to who wins it, out of `counts`."""
    rows, chosen = list[list[int]](), list[bool]()
    for a, b in itertools.combinations(range(ARMS), 2):
        won = round(float(game.preference[a, b]) * counts)
        for i in range(counts):
            pair = (a, b) if i < won else (b, a)
            rows += [[y, END] for y in pair]
            chosen += [True, False]
    n = len(rows)
    return Episodes.build(rows, [[0]] * n, [i // 2 for i in range(n)], kind=["pair"] * n, chosen=chosen,
                          prompt_id=[0] * n, truncated=[False] * n, policy_version=[-1] * n)  # fmt: skip


class Ends(NumberTokenizer):
    eos_token_id = END


def fitted(recipe: Recipe, rows: Episodes, states: Tensor, steps: int = 400) -> Tensor:
    """Values of `states` [N] (one free number each) that minimise the recipe's objective, by Newton-like descent: LBFGS."""
    value = torch.zeros((ARMS + 1) ** 2, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([value], max_iter=steps, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        found = recipe.objective(rows, {"value": value[states], "logp": torch.zeros(len(states))})
        found.backward()
        return found

    optimizer.step(loss)
    return value.detach()


def state_of(rows: Episodes) -> Tensor:
    """[N] a number of what a value has read before each step: the context's last answer (or none), and the answer's own."""
    context = rows.context("score")
    assert context.offsets is not None
    sizes, previous = context.offsets.diff(), rows["token"].roll(1)
    rival = torch.where(sizes > 1, context.values[context.offsets[:-1] + (sizes > 1).long()], ARMS)
    own = torch.where(rows.position() == 0, ARMS, previous)
    return rows.expand(rival) * (ARMS + 1) + own


def test_scores_find_the_logits_of_preferences() -> None:
    """Population minimiser: s(y) - s(y') = logit P(y > y') where a score explains P."""
    score = torch.tensor([math.log(4.0), 0.0, -math.log(1.5)], dtype=torch.float64)
    rows = compared(PreferenceGame.bradley_terry(score), 70)
    counted = rows.select(rows["chosen"])["token"].reshape(-1, 2)[:, 0].bincount()
    assert counted.tolist() == [56 + 60, 14 + 42, 10 + 28]
    value = fitted(reward_model(), EveryPair()(rows, Ends()), state_of(rows))
    found = value[ARMS * (ARMS + 1) + torch.arange(ARMS)]
    assert torch.allclose(found - found.mean(), score - score.mean(), atol=1e-5)


def test_a_cycle_is_fitted_by_the_preference_model_alone() -> None:
    """Rock-paper-scissors: the best scores are equal ones, and every P is 1/2; reading the rival, P is what it is."""
    game = PreferenceGame.rock_paper_scissors(0.9)
    rows = compared(game)
    flat = fitted(reward_model(), EveryPair()(rows, Ends()), state_of(rows))[ARMS * (ARMS + 1) + torch.arange(ARMS)]
    assert float(flat.max() - flat.min()) < 1e-6
    beside = Rivals()(rows, Ends())
    value = fitted(preference_model(), beside, state_of(beside)).reshape(ARMS + 1, ARMS + 1)[:ARMS, :ARMS]
    probability = torch.sigmoid(value.T - value)  # s(y | y') is value[y', y]
    off = ~torch.eye(ARMS, dtype=torch.bool)
    assert torch.allclose(probability[off], game.preference[off], atol=1e-4)


def test_rivals_stand_behind_the_prompt() -> None:
    rows = Episodes.build([[1, END], [2, 2, END], [0]], [[7, 8]] * 3, [0, 0, 0], kind=["pair"] * 3, prompt_id=[5] * 3,
                          chosen=[True, False, False])  # fmt: skip
    made = Rivals()(rows, Ends())
    tokens, context = made["token"].split(made.lengths().tolist()), made.context("score")
    assert [t.tolist() for t in tokens] == [[1, END], [2, 2, END], [1, END], [0]]
    assert [context.take(torch.tensor([i])).values.tolist() for i in range(4)] == [
        [7, 8, 2, 2, END], [7, 8, 1, END], [7, 8, 0, END], [7, 8, 1, END]
    ]  # fmt: skip
    assert made["chosen"].tolist() == [True, False] * 2
    assert made.index("group", "episode").tolist() == [0, 0, 1, 1]
    demos = toy_batch().select(toy_batch().category("kind", "demo"))
    assert Rivals()(demos, Ends()) is demos


def test_every_pair_of_a_list_by_rating() -> None:
    """Equal ratings make no pair unless one is chosen, unknown ones none; without ratings the chosen beat the others."""
    rows = Episodes.build([[i] for i in range(8)], [[0]] * 8, [0, 0, 0, 0, 1, 1, 2, 2], kind=["pair"] * 8, prompt_id=[0] * 8,
                          chosen=[True, False, False, False, False, True, True, False])  # fmt: skip
    nan = math.nan
    rated = rows.with_columns("episode", rating=torch.tensor([3.0, 1.0, 1.0, nan, nan, nan, 2.0, 2.0]).double())
    assert [t.item() for t in EveryPair()(rated, None)["token"]] == [0, 1, 0, 2, 5, 4, 6, 7]
    assert [t.item() for t in EveryPair()(rows, None)["token"]] == [0, 1, 0, 2, 0, 3, 5, 4, 6, 7]


def pairs_by_hand() -> tuple[Episodes, dict[str, Tensor]]:
    rows = Episodes.build([[1, 2], [3], [1], [2, 3, 1]], [[0]] * 4, [0, 0, 1, 1], kind=["pair"] * 4, chosen=[True, False] * 2,
                          prompt_id=[0] * 4)  # fmt: skip
    rating = torch.tensor([4.0, 1.0, math.nan, 1.0], dtype=torch.float64)
    return rows.with_columns("episode", rating=rating), {
        "value": torch.tensor([9.0, 0.7, 0.2, -0.4, 9.0, 9.0, 0.1]).double()
    }


def test_the_loss_by_hand() -> None:
    """Scores .7, .2 | -.4, .1; margins are asked for where ratings are known; (s + s')^2 with its own weight."""
    rows, signals = pairs_by_hand()

    def ls(z: float) -> float:
        return math.log1p(math.exp(-z))

    assert float(reward_model().objective(rows, signals)) == pytest.approx((ls(0.5) + ls(-0.5)) / 2)
    assert float(reward_model(margin=0.2).objective(rows, signals)) == pytest.approx((ls(0.5 - 0.6) + ls(-0.5)) / 2)
    centered = reward_model(center=0.3).objective(rows, signals)
    assert float(centered) == pytest.approx((ls(0.5) + ls(-0.5)) / 2 + 0.3 * (0.9**2 + 0.3**2) / 2)
    smooth = reward_model(label_smoothing=0.1).objective(rows, signals)
    assert float(smooth) == pytest.approx((0.9 * (ls(0.5) + ls(-0.5)) + 0.1 * (ls(-0.5) + ls(0.5))) / 2)


def test_only_the_value_at_the_end_is_moved() -> None:
    rows, signals = pairs_by_hand()
    moved = coefficients(reward_model().objective, rows, signals).total["value"]
    sigmoid = torch.sigmoid(torch.tensor([-0.5, 0.5], dtype=torch.float64)) / 2
    wanted = torch.stack([torch.zeros(()), -sigmoid[0], sigmoid[0], -sigmoid[1], *torch.zeros(2), sigmoid[1]])
    assert torch.allclose(moved, wanted.double())


def test_lists_are_all_their_pairs() -> None:
    """Bradley-Terry over the arranged pairs is the ranking loss of the lists themselves."""
    batch = toy_batch()
    lists = batch.select(batch.category("kind", "pair"))
    rating = torch.randn(len(lists), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    lists = lists.with_columns("episode", rating=rating)
    value = ToyPolicy().signals(lists, ["value"])["value"].detach()
    whole = Listwise(score=FinalValue(), ranking=RankedPairs())(lists, {"value": value})
    step = torch.arange(lists.count("step"))
    split = EveryPair()(lists.with_columns("step", step=step), None)
    assert torch.allclose(reward_model().objective(split, {"value": value[split["step"]]}), whole)


def test_preferences_are_antisymmetric_whatever_the_model() -> None:
    """Which of the two is called chosen changes the sign of the margin and nothing else."""
    rows = compared(PreferenceGame.random(ARMS, keyed_generator(0, "game")))
    value = torch.randn(16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    swapped = rows.with_columns("episode", chosen=~rows["chosen"])
    beside = [Rivals()(r, Ends()) for r in (rows, swapped)]
    margins = [Pairwise(score=FinalValue()).evaluate(b, {"value": value[state_of(b)]})[1]["margin"] for b in beside]
    first = [b.reduce(m, how="max")[::2] for b, m in zip(beside, margins, strict=True)]
    assert torch.allclose(first[0], -first[1])
    assert float(first[0].abs().max()) > 0.1


def test_blind_to_its_rival_it_is_a_reward_model() -> None:
    rows = compared(PreferenceGame.random(ARMS, keyed_generator(0, "game")))
    value = torch.randn(ARMS + 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    beside = Rivals()(rows, Ends())
    own, read = (value[state_of(r) % (ARMS + 1)] for r in (rows, beside))
    assert torch.equal(
        preference_model().objective(beside, {"value": read}), reward_model().objective(rows, {"value": own})
    )


def test_what_is_judged_is_known_of_the_recipe() -> None:
    assert reward_model().judges == "answers"
    assert preference_model().judges == "pairs"
    assert (reward_model() + 0.1 * dpo()).judges == "answers"
    assert dpo().judges == best_of_n().judges == ""
    assert reward_model().needs.signals == {"value"}, "no language model's head is computed"


# ---- best of n -----------------------------------------------------------------------------------------------------------
LOGP = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64).log()
TIED = torch.tensor([1.0, 3.0, 2.0, 2.0], dtype=torch.float64)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_best_of_n_by_enumeration(n: int) -> None:
    """All n-tuples of answers; the best of each, equal ones by lot."""
    wanted = torch.zeros(4, dtype=torch.float64)
    for drawn in itertools.product(range(4), repeat=n):
        score = TIED[list(drawn)]
        best = [y for y, s in zip(drawn, score.tolist(), strict=True) if s == float(score.max())]
        for y in best:
            wanted[y] += float(LOGP[list(drawn)].sum().exp()) / len(best)
    assert torch.allclose(exact_best(LOGP, TIED, n).exp(), wanted)


def test_best_of_n_bound_is_tight() -> None:
    """KL(best of n || policy) <= log n - (n - 1)/n: nearly reached with many answers, never with few."""
    for n in (1, 2, 8, 64):
        many = torch.full((4096,), -math.log(4096), dtype=torch.float64)
        near = kl(exact_best(many, torch.arange(4096.0), n), many)
        assert most_kl(n) - 0.02 < near <= most_kl(n) + 1e-9
        assert kl(exact_best(LOGP, TIED, n), LOGP) <= most_kl(n) + 1e-12
    assert most_kl(1) == 0.0
    assert kl(exact_best(LOGP, TIED, 64), LOGP) < most_kl(64) - 1.0
    with pytest.raises(ValueError, match="at least one"):
        exact_best(LOGP, TIED, 0.5)


def test_expected_best_is_unbiased() -> None:
    """Over all sextuples... of three samples, the mean estimate of best of two is the exact one; subsets by hand."""
    worth = torch.tensor([0.3, -1.0, 0.7, 2.0], dtype=torch.float64)
    drawn = torch.tensor(list(itertools.product(range(4), repeat=3)))
    chance = LOGP[drawn].sum(1).exp()
    estimate = expected_best(TIED[drawn], worth[drawn], 2)
    assert torch.allclose((chance * estimate).sum(), exact_best(LOGP, TIED, 2).exp() @ worth)
    assert float(expected_best(TIED, worth, 4)) == pytest.approx(-1.0)
    assert float(expected_best(TIED, worth, 1)) == pytest.approx(float(worth.mean()))
    with pytest.raises(ValueError, match="1 to 4"):
        expected_best(TIED, worth, 5)


def test_best_of_n_gradient() -> None:
    """The score of the best answer of each group, and of no other: - 1 / G per step of it."""
    rows = Episodes.build([[1], [2, 2], [3], [1, 1], [2], [3]], [[0]] * 6, [0, 0, 0, 1, 1, 1], kind=["rollout"] * 6)
    rows = rows.with_columns("episode", reward=torch.tensor([0.0, 2.0, 1.0, 5.0, 4.0, 4.5]).double())
    moved = gradient(best_of_n(n=3).objective, rows, torch.zeros(8).double())
    assert torch.allclose(moved, torch.tensor([0.0, -0.5, -0.5, 0.0, -0.5, -0.5, 0.0, 0.0]).double())


def test_best_of_n_needs_two() -> None:
    with pytest.raises(ValueError, match="at least 2"):
        best_of_n(n=1)


# ---- strong over weak ----------------------------------------------------------------------------------------------------
WORDS = TabularTask(2, 3, 3, lambda prompt, tokens: float((sum(tokens) + prompt) % 4) + 0.3 * len(tokens), end=2)
BETA = 0.7


def optimum(weak: TabularPolicy) -> tuple[Tensor, Tensor]:
    """([P, S] log p of weak exp(r / beta) / Z, [P] log Z)."""
    logp = WORDS.log_probability(weak).detach() + WORDS.rewards / BETA
    return logp.log_softmax(1), logp.logsumexp(1)


def test_the_ratio_is_the_reward_of_its_optimum() -> None:
    """R - r / beta is one number per prompt, so that every comparison within a prompt is right."""
    weak = TabularPolicy.random(2, 3, 3)
    strong, log_z = optimum(weak)
    ratio = strong - WORDS.log_probability(weak).detach()
    assert torch.allclose(ratio - WORDS.rewards / BETA, -log_z[:, None].expand_as(ratio))
    apart = WORDS.rewards[:, :, None] - WORDS.rewards[:, None, :]
    told = ratio[:, :, None] - ratio[:, None, :]
    assert bool((told.sign() == apart.sign())[apart.abs() > 1e-9].all())


def test_constants_of_a_prompt_change_sums_nothing_and_averages_something() -> None:
    """The card's numbers: 2 of one token against 5 of ten; and a constant of -4 turns the comparison of averages around."""
    total, tokens = torch.tensor([2.0, 5.0]), torch.tensor([1.0, 10.0])
    assert int(total.argmax()) == 1
    assert int((total / tokens).argmax()) == 0
    moved = total - 4.0
    assert int(moved.argmax()) == 1
    assert int((moved / tokens).argmax()) == 1


def test_rl_on_the_ratio_ends_at_the_strong_model() -> None:
    """E_pi[R] - KL(pi || weak) = - KL(pi || strong): at pi = strong the exact gradient of RLOO with kl 1 is 0, elsewhere not."""
    task = TabularTask(1, 4, 1, lambda prompt, tokens: 0.0)
    generator = torch.Generator().manual_seed(0)
    weak, strong, other = (torch.randn(4, generator=generator, dtype=torch.float64).log_softmax(0) for _ in range(3))
    reward = strong - weak

    def slope(at: Tensor) -> Tensor:
        groups = list(itertools.product(range(4), repeat=2))
        flat = [y for g in groups for y in g]
        rows = Episodes.build([[y] for y in flat], [[0]] * len(flat), [i // 2 for i in range(len(flat))],
                              kind=["rollout"] * len(flat))  # fmt: skip
        token = torch.tensor(flat)
        rows = rows.with_columns("episode", reward=reward[token]).with_columns(
            "step", behavior_logp=at[token], old_logp=at[token], reference_logp=weak[token]
        )
        each = gradient(rloo(kl=1.0).objective, rows, at[token]) * len(groups)
        chance = at.exp()[torch.tensor(groups)].prod(1).repeat_interleave(2)
        total = torch.zeros(4, dtype=torch.float64).index_add(0, token, chance * each)
        return total - at.exp() * total.sum()

    assert float(slope(strong).abs().max()) < 1e-12
    assert float(slope(other).abs().max()) > 1e-2
    assert task.prompts == 1


def test_annotation_takes_the_extremes() -> None:
    """Best and worst answer by reward, of the policy as it is; a prompt whose rewards are all equal is left out; then SimPO."""
    rewards = {0: lambda tokens: float(tokens[0]), 1: lambda tokens: 1.0}
    task = TabularTask(2, 3, 1, lambda prompt, tokens: rewards[prompt](tokens))
    policy, recipe = TabularPolicy.random(2, 1, 3), dr_sow(group=6)
    source = tabular_rollouts(task, policy, RolloutSpec(group=6), 0)
    groups = source.draw(0, 0)
    drawn = Drawn({i: source.prompts[i] for i in range(2)}, source, 0, 0, 0)  # type: ignore[index]
    made = recipe.rollouts.augment[0](groups, drawn)
    assert made.count("group") == 1
    assert made["chosen"].tolist() == [True, False]
    own = groups.select(groups["prompt_id"] == 0)["token"]
    assert made["token"].tolist() == [int(own.max()), int(own.min())]
    logp = policy.signals(made, ["logp"])["logp"].detach()
    stored = made.with_columns("episode", kind="pair")
    assert torch.equal(gradient(recipe.objective, made, logp), gradient(simpo().objective, stored, logp))
    with_reference = stored.with_columns("step", reference_logp=logp - 0.3)
    by_dpo = dr_sow(group=6, base="dpo", beta=0.1).objective
    assert torch.equal(gradient(by_dpo, with_reference, logp), gradient(dpo(beta=0.1).objective, with_reference, logp))
    with pytest.raises(ValueError, match="simpo, dpo"):
        dr_sow(base="ipo")
