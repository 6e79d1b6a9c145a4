"""Lists of rated answers, goals that are ratings, and the two switches of on-policy learning from rewards."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import pytest
import torch
from torch import Tensor

from tests.toys import gradient
from unipo import functional as F
from unipo.episodes import Episodes
from unipo.methods.policy_gradients import grpo, sft
from unipo.methods.preference_lists import lipo, reward_augmented_dpo, suboptimal_onpolicy
from unipo.methods.preferences import dpo
from unipo.objectives import (
    EpisodeSum,
    HingeLink,
    Listwise,
    LogRatioScore,
    Normalised,
    Objective,
    Pairwise,
    Plain,
    PointLogistic,
    PolicyGradient,
    ShapedOutcome,
    SwapGain,
    by_content,
)
from unipo.policies import load_policy
from unipo.policies.tabular import TabularPolicy
from unipo.recipe import Recipe
from unipo.reproduce.training import FreshAndReplayed, train
from unipo.sources.directions import Asking
from unipo.sources.keyed import keyed_generator
from unipo.sources.prompts import Prompt
from unipo.sources.rows import pair_episodes
from unipo.sources.spec import Writer
from unipo.sources.stages.explained import texts_of
from unipo.sources.stages.goals import GoalPairs, RatingGoal
from unipo.sources.stages.rated import Rated
from unipo.sources.text.tabular import NumberTokenizer, tabular_rollouts
from unipo.tasks.tabular import TabularTask

BETA = 0.3
number = partial(torch.tensor, dtype=torch.float64)
LOSSES = ("lambda", "pairs", "hinge", "list-mle", "softmax", "point-mse", "point-sigmoid")
INVARIANT = LOSSES[:5]


def lists(ratings: Sequence[Sequence[float]], drift: float = 1.0, seed: int = 0) -> tuple[Episodes, Tensor]:
    """Stored lists with these ratings, answers of one to three tokens, and log-probs [N] at a distance from the reference."""
    generator = torch.Generator().manual_seed(seed)
    flat = [r for group in ratings for r in group]
    sizes = [1 + int(torch.randint(3, (1,), generator=generator)) for _ in flat]
    best = [r == max(group) for group in ratings for r in group]
    made = Episodes.build(
        [torch.randint(7, (n,), generator=generator).tolist() for n in sizes], [[0]] * len(flat),
        [g for g, group in enumerate(ratings) for _ in group], kind=["pair"] * len(flat), chosen=best,
    )  # fmt: skip
    n = made.count("step")
    reference = -torch.rand(n, generator=generator, dtype=torch.float64)
    logp = reference + drift * torch.randn(n, generator=generator, dtype=torch.float64)
    made = made.with_columns("episode", rating=torch.tensor(flat, dtype=torch.float64))
    return made.with_columns("step", reference_logp=reference), logp


def scores(batch: Episodes, logp: Tensor, beta: float = BETA) -> Tensor:
    return beta * batch.reduce(logp - batch["reference_logp"])


def of(**settings: object) -> Objective:
    return lipo(beta=BETA, **settings).objective  # type: ignore[arg-type]


def advantages(objective: Objective, batch: Episodes, logp: Tensor) -> Tensor:
    """A [E] = - dL / dlp of the answer; the same for each of its tokens."""
    slope = -gradient(objective, batch, logp)
    first = torch.cumsum(batch.lengths(), 0) - batch.lengths()
    torch.testing.assert_close(slope, batch.expand(slope[first]))
    return slope[first]


def same(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)


# ---- labels ----------------------------------------------------------------------------------------------------------
def test_win_shares_by_hand() -> None:
    """Ranks of three: 5/6, 1/2, 1/6; ties share; the mean is 1/2 in every list; unknown ratings meet nobody."""
    rating, index = number([3.0, 1.0, 2.0, 7.0, 7.0]), torch.tensor([0, 0, 0, 1, 1])
    same(F.win_shares(rating, index, 2), number([5 / 6, 1 / 6, 1 / 2, 1 / 2, 1 / 2]))
    batch, logp = lists([[3.0, math.nan, 1.0, 2.0], [math.nan] * 3])
    share = lipo().objective.rating(batch, {"logp": logp})  # type: ignore[attr-defined]
    assert share[:4].tolist() == pytest.approx([5 / 6, math.nan, 1 / 6, 1 / 2], nan_ok=True)
    assert share[4:].tolist() == [1 / 2] * 3, "without any rating all that are not chosen are equal"


def test_ratings_are_replaced_by_who_was_chosen_where_there_are_none() -> None:
    batch, logp = lists([[math.nan, math.nan], [2.0, 5.0]])
    batch = batch.with_columns("episode", chosen=torch.tensor([False, True, True, False]))
    assert of().rating(batch, {"logp": logp}).tolist() == [1 / 4, 3 / 4, 1 / 4, 3 / 4]  # type: ignore[attr-defined]


# ---- pairs of a list -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("settings", "factor"),
    [({"base": math.e, "sized": False}, 0.532456), ({"sized": False}, 0.369070), ({}, 0.738140)],
)
def test_two_items_are_dpo(settings: dict[str, object], factor: float) -> None:
    """psi = (1, 0): Delta is a constant, whatever the order of the scores; the loss is that times DPO's."""
    batch, logp = lists([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]], 2.0)
    margin = scores(batch, logp).reshape(3, 2).diff(dim=1)
    assert bool((margin > 0).any())
    assert bool((margin < 0).any())
    made, baseline = of(labels="ratings", **settings), dpo(beta=BETA).objective
    discount = math.log(settings.get("base", 2.0))  # type: ignore[arg-type]
    exact = (1 / math.log(2) - 1 / math.log(3)) * discount * (2 if settings.get("sized", True) else 1)
    assert exact == pytest.approx(factor, abs=1e-6)
    same(made(batch, {"logp": logp}), exact * baseline(batch, {"logp": logp}))
    same(gradient(made, batch, logp), exact * gradient(baseline, batch, logp))


def test_swap_gain_is_the_change_of_dcg() -> None:
    """Every two items exchanged in place, DCG computed anew."""
    rating = number([0.9, 0.1, 0.4, 0.4, 0.7])
    index, place = torch.zeros(5, dtype=torch.long), torch.tensor([3, 0, 4, 1, 2])
    for base in (2.0, math.e):
        before = F.discounted_gain(rating, place, index, 1, base)
        by_hand = sum((2 ** float(r) - 1) / math.log(int(p) + 2, base) for r, p in zip(rating, place, strict=True))
        assert float(before) == pytest.approx(by_hand)
        for i, j in itertools.combinations(range(5), 2):
            swapped = place.clone()
            swapped[i], swapped[j] = place[j], place[i]
            after = F.discounted_gain(rating, swapped, index, 1, base)
            found = F.swap_gain(rating, place, torch.tensor([i]), torch.tensor([j]), base)
            same(found, (after - before).abs())


def test_ndcg_is_one_for_the_right_order() -> None:
    rating, index = number([0.2, 0.9, 0.5, 0.0, 0.0]), torch.tensor([0, 0, 0, 1, 1])
    assert F.ndcg(rating, rating, index, 2).tolist() == [1.0, 1.0]
    worst = float(F.ndcg(-rating, rating, index, 2)[0])
    gains = [2**0.9 - 1, 2**0.5 - 1, 2**0.2 - 1]
    best = sum(g / math.log2(i + 2) for i, g in enumerate(gains))
    assert worst == pytest.approx(sum(g / math.log2(4 - i) for i, g in enumerate(gains)) / best)


def test_alike_weights_are_dpo_on_all_pairs() -> None:
    """The mean over all pairs of all lists is DPO's on as many groups of two."""
    ratings = [[3.0, 1.0, 2.0, 2.0], [1.0, 5.0]]
    batch, logp = lists(ratings)
    x = logp.clone().requires_grad_()
    s, start = scores(batch, x), 0
    each = []
    for group in ratings:
        own = range(start, start + len(group))
        each += [s[i] - s[j] for i in own for j in own if group[i - start] > group[j - start]]
        start += len(group)
    assert len(each) == 6
    loss = -torch.nn.functional.logsigmoid(torch.stack(each)).mean()
    made = of(loss="pairs")
    same(made(batch, {"logp": logp}), loss.detach())
    same(gradient(made, batch, logp), torch.autograd.grad(loss, x)[0])
    same(of(loss="pairs", per="group")(batch, {"logp": logp}), 6 / 2 * loss.detach())


def test_list_mle_of_two_is_dpo() -> None:
    batch, logp = lists([[1.0, 0.0], [4.0, 2.0]], 2.0)
    same(of(loss="list-mle")(batch, {"logp": logp}), dpo(beta=BETA).objective(batch, {"logp": logp}))
    same(gradient(of(loss="list-mle"), batch, logp), gradient(dpo(beta=BETA).objective, batch, logp))


def test_hinge_of_two_is_slic() -> None:
    batch, logp = lists([[1.0, 0.0], [4.0, 2.0], [1.0, 0.0]], 6.0)
    margin = -scores(batch, logp).reshape(3, 2).diff(dim=1)
    assert bool((margin > 1).any())
    assert bool((margin < 1).any())
    slic = Pairwise(score=LogRatioScore(BETA), link=HingeLink())
    same(of(loss="hinge")(batch, {"logp": logp}), (1 - margin).clamp(min=0).mean())
    same(gradient(of(loss="hinge"), batch, logp), gradient(slic, batch, logp))


def test_lists_match_a_second_derivation() -> None:
    """Every loss on one list of four, from its formula."""
    psi = number([0.8, 0.1, 0.6, 0.3])
    batch, logp = lists([psi.tolist()])
    s = scores(batch, logp)
    order = psi.argsort(descending=True)
    rank = (-s).argsort().argsort().double() + 1
    delta = [
        (abs(2 ** psi[i] - 2 ** psi[j]) * abs(1 / torch.log2(1 + rank[i]) - 1 / torch.log2(1 + rank[j]))
         * 4 * torch.log1p((s[j] - s[i]).exp()))
        for i in range(4) for j in range(4) if psi[i] > psi[j]
    ]  # fmt: skip
    by_hand = {
        "lambda": torch.stack(delta).mean(),
        "list-mle": -sum(s[order[k]] - s[order[k:]].logsumexp(0) for k in range(4)),
        "softmax": -(psi / psi.sum() * s.log_softmax(0)).sum(),
        "point-mse": (psi - s).square().sum(),
        "point-sigmoid": torch.nn.functional.binary_cross_entropy_with_logits(s, psi, reduction="sum"),
    }
    for loss, expected in by_hand.items():
        same(of(loss=loss, labels="ratings")(batch, {"logp": logp}), torch.as_tensor(expected))
    ideal = F.discounted_gain(psi, F.places(psi, torch.zeros(4).long(), 1), torch.zeros(4).long(), 1)
    same(of(labels="ratings", normalised=True)(batch, {"logp": logp}), by_hand["lambda"] / ideal[0])


def test_advantages_of_the_card() -> None:
    """A_i = beta ( sum over worse of Delta sig(s_j - s_i) - sum over better of Delta sig(s_i - s_j) ), over the pairs."""
    psi = number([0.8, 0.1, 0.6, 0.3, 0.6])
    batch, logp = lists([psi.tolist()])
    s, index = scores(batch, logp), torch.zeros(5, dtype=torch.long)
    better, worse = F.ordered_pairs(psi, index, 1)
    delta = SwapGain().of(s, psi, index, 1, better, worse)
    pull = BETA * delta * torch.sigmoid(s[worse] - s[better]) / len(better)
    expected = torch.zeros(5).double().index_add(0, better, pull).index_add(0, worse, -pull)
    same(advantages(of(labels="ratings"), batch, logp), expected)


@pytest.mark.parametrize("loss", LOSSES)
def test_shifts_and_sums_of_advantages(loss: str) -> None:
    """A constant added to every score of a list changes nothing, and advantages sum to 0; not so for pointwise losses."""
    batch, logp = lists([[0.9, 0.2, 0.5], [0.1, 0.3, 0.8, 0.4]], 2.0)
    made, shifted = of(loss=loss, labels="ratings"), batch.with_columns("step", reference_logp=batch["reference_logp"])
    shift = batch.expand(number([0.7, -1.3]), level="group") / batch.expand(batch.lengths())
    shifted = batch.with_columns("step", reference_logp=batch["reference_logp"] - shift)
    sums = batch.reduce(advantages(made, batch, logp), to="group", level="episode")
    if loss in INVARIANT:
        same(made(shifted, {"logp": logp}), made(batch, {"logp": logp}))
        same(sums, torch.zeros(2).double())
    else:
        assert abs(float(made(shifted, {"logp": logp}) - made(batch, {"logp": logp}))) > 1e-3
        assert float(sums.abs().min()) > 1e-3


@pytest.mark.parametrize("loss", ["lambda", "pairs", "hinge"])
def test_equal_labels_contribute_nothing(loss: str) -> None:
    """A list of equals has no pair: no gradient, and no part in the mean."""
    batch, logp = lists([[0.5, 0.5, 0.5], [1.0, 0.0]])
    alone = batch.select(torch.tensor([1]), "group")
    same(of(loss=loss)(batch, {"logp": logp}), of(loss=loss)(alone, {"logp": logp[-alone.count("step") :]}))
    same(advantages(of(loss=loss), batch, logp)[:3], torch.zeros(3).double())
    equals = batch.select(torch.tensor([0]), "group")
    own = logp[: equals.count("step")]
    assert float(of(loss=loss)(equals, {"logp": own})) == 0.0
    assert float(gradient(of(loss=loss), equals, own).norm()) == 0.0


@pytest.mark.parametrize("loss", LOSSES)
def test_unknown_ratings_are_left_out(loss: str) -> None:
    whole, logp = lists([[0.9, 0.4, 0.2], [0.3, 0.6]])
    rating = whole["rating"].clone()
    rating[1] = math.nan
    keep = torch.tensor([0, 2, 3, 4])
    steps = whole.step_index(keep)
    part = whole.with_columns("episode", rating=rating)
    made = of(loss=loss)
    same(made(part, {"logp": logp}), made(whole.select(keep), {"logp": logp[steps]}))
    assert float(gradient(made, part, logp)[whole.step_index(torch.tensor([1]))].norm()) == 0.0


def test_ties_are_broken_by_content() -> None:
    """At the reference all scores are 0; how a list is ordered in its file does not matter then either."""
    batch, logp = lists([[0.9, 0.2, 0.5, 0.7]], 0.0)
    order = torch.tensor([2, 0, 3, 1])
    turned = batch.select(order)
    there = torch.cat([batch.step_index(order[i : i + 1]) for i in range(4)])
    slope = gradient(of(), batch, logp)
    same(gradient(of(), turned, logp[there]), slope[there])
    assert batch["token"][batch.step_index(by_content(batch))].tolist() == turned["token"][
        turned.step_index(by_content(turned))].tolist()  # fmt: skip


def test_ratings_out_of_range_are_told() -> None:
    batch, logp = lists([[3.0, 1.0]])
    with pytest.raises(ValueError, match="a rating is 3: the cross-entropy takes ratings from 0 to 1"):
        of(loss="point-sigmoid", labels="ratings")(batch, {"logp": logp})
    with pytest.raises(ValueError, match="loss is 'best'"):
        lipo(loss="best")
    with pytest.raises(ValueError, match="per is 'list'"):
        lipo(per="list")


def test_groups_of_rollouts_become_lists() -> None:
    rows = Episodes.build([[1], [2], [3], [4], [5]], [[0]] * 5, [0, 0, 0, 1, 1], kind=["rollout"] * 5)
    rows = rows.with_columns("episode", reward=number([1.0, 3.0, 3.0, 0.0, -1.0]))
    made = Rated()(rows, None)  # type: ignore[arg-type]
    assert made["chosen"].tolist() == [False, True, True, True, False]
    assert made["rating"].tolist() == made["reward"].tolist()
    assert bool(made.category("kind", "pair").all())
    both = Rated().beside()(rows, None)  # type: ignore[arg-type]
    assert both.category("kind", "rollout").tolist() == [True] * 5 + [False] * 5
    assert isinstance(lipo(lists="own").objective, Listwise)
    assert lipo(lists="own").samples
    assert not lipo().samples
    assert PointLogistic() == lipo(loss="point-sigmoid").objective.ranking  # type: ignore[attr-defined]


# ---- own answers, and what is pushed away ----------------------------------------------------------------------------
ARMS = 4
WORTH = number([0.1, 1.3, 0.7, 0.4])


def law(seed: int, n: int = ARMS) -> Tensor:
    return torch.from_numpy(keyed_generator(seed, "policy").normal(size=n)).log_softmax(0)


def table(logp: Tensor) -> TabularPolicy:
    return TabularPolicy(logp.expand(1, 1, len(logp) + 1, len(logp)))


def drawn_groups(tuples: Sequence[Sequence[int]], worth: Tensor = WORTH) -> Episodes:
    """Groups of single-token rollouts of one prompt."""
    flat = [y for group in tuples for y in group]
    made = Episodes.build(
        [[y] for y in flat], [[0]] * len(flat), [g for g, group in enumerate(tuples) for _ in group],
        kind=["rollout"] * len(flat), prompt_id=[0] * len(flat), truncated=[False] * len(flat),
    )  # fmt: skip
    return made.with_columns("episode", reward=worth[torch.tensor(flat)])


def expected(objective: Objective, logp: Tensor, size: int, drawn_by: Tensor | None = None) -> Tensor:
    """- dE[L] / dlogits [A] over all groups of `size` independent answers of `drawn_by` (None: of the policy)."""
    tuples = list(itertools.product(range(len(logp)), repeat=size))
    batch = drawn_groups(tuples, WORTH[: len(logp)])
    slope = gradient(objective, batch, logp[batch["token"]]) * len(tuples)
    chance = (logp if drawn_by is None else drawn_by).exp()[torch.tensor(tuples)].prod(1).repeat_interleave(size)
    return -(chance * slope) @ (torch.nn.functional.one_hot(batch["token"], len(logp)) - logp.exp())


def policy_gradient(logp: Tensor) -> Tensor:
    p = logp.exp()
    return p * (WORTH - p @ WORTH)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_reinforce_is_the_policy_gradient(size: int) -> None:
    """A = R: exactly; A = R - mean: (N - 1) / N times it; over the std of the group: near it in direction, no multiple."""
    logp, made = law(0), suboptimal_onpolicy(loss="reinforce", group=size)
    truth = policy_gradient(logp)
    same(expected(made.but(advantage=Plain()).objective, logp, size), truth)
    same(expected(made.but(advantage=Normalised()).objective, logp, size), (size - 1) / size * truth)
    standard = expected(made.objective, logp, size)
    cosine = float(torch.nn.functional.cosine_similarity(standard, truth, dim=0))
    assert 0.9 < cosine < 1 - 1e-4


def test_without_coefficient_the_best_is_imitated() -> None:
    """- mean over prompts of log pi(best), the first of equal ones."""
    batch = drawn_groups([(0, 2, 1, 1), (3, 3, 0, 0)])
    logp = law(1)[batch["token"]]
    best = -(logp[2] + logp[4]) / 2
    for negative in ("none", "worst", "mean", "sum"):
        made = suboptimal_onpolicy(negative=negative, coefficient=0.0, group=4).objective
        same(made(batch, {"logp": logp}), best)
    none = suboptimal_onpolicy(negative="none", coefficient=5.0, group=4).objective
    same(gradient(none, batch, logp), number([0, 0, -0.5, 0, -0.5, 0, 0, 0]))


def test_negatives_by_hand() -> None:
    batch, c = drawn_groups([(0, 2, 1), (3, 1, 2)]), 0.7
    logp = law(1)[batch["token"]]
    slopes = {
        "worst": number([c, 0, -1, c, -1, 0]) / 2,
        "mean": number([c / 2, c / 2, -1, c / 2, -1, c / 2]) / 2,
        "sum": number([c, c, -1, c, -1, c]) / 2,
    }
    for negative, slope in slopes.items():
        same(gradient(suboptimal_onpolicy(negative=negative, coefficient=c, group=3).objective, batch, logp), slope)


def test_worst_of_two_is_dpo_at_the_reference() -> None:
    """- (log pi_w - log pi_l): DPO's gradient where pi = ref, times beta / 2; with two answers the negatives are all alike."""
    batch, beta = drawn_groups([(0, 2), (1, 3), (2, 1)]), 0.4
    logp = law(2)[batch["token"]]
    found = gradient(suboptimal_onpolicy(negative="worst", group=2).objective, batch, logp)
    won = batch["reward"] == batch.expand(batch.reduce("reward", to="group", how="max"), level="group")
    same(found, torch.where(won, -1.0, 1.0).double() / 3)
    for negative in ("mean", "sum"):
        same(gradient(suboptimal_onpolicy(negative=negative, group=2).objective, batch, logp), found)
    pairs = batch.with_columns("episode", kind="pair", chosen=won).with_columns("step", reference_logp=logp)
    same(gradient(suboptimal_onpolicy(loss="dpo", beta=beta).objective, pairs, logp), beta / 2 * found)


def test_rwr_by_hand() -> None:
    """exp((R - the batch's maximum) / beta), mean over all answers; large rewards do not overflow."""
    batch, beta = drawn_groups([(0, 2), (1, 3)], 1000 * WORTH), 90.0
    logp = law(2)[batch["token"]]
    weight = ((batch["reward"] - batch["reward"].max()) / beta).exp()
    made = suboptimal_onpolicy(loss="rwr", beta=beta, group=2).objective
    same(gradient(made, batch, logp), -weight / 4)
    steep = suboptimal_onpolicy(loss="rwr", beta=1e-3, group=2).objective
    assert gradient(steep, batch, logp).float().tolist() == [0.0, 0.0, -0.25, 0.0]


def test_forward_and_reverse_kl() -> None:
    """RWR on the reference's answers descends KL(q || pi), dL/dlogit = pi - q; the policy's own reward less beta log(pi / ref)
    descends KL(pi || q), dL/dlogit = pi (log(pi / q) - KL); q = ref exp(R / beta) / Z."""
    logp, reference, beta = law(0), law(5), 0.6
    q = (reference + WORTH / beta).log_softmax(0)
    p = logp.exp()
    forward = expected(suboptimal_onpolicy(loss="rwr", beta=beta, group=2).objective, logp, 2, reference)
    scale = ((WORTH - WORTH.max()) / beta).exp() @ reference.exp()
    batch = drawn_groups(list(itertools.product(range(ARMS), repeat=2)))
    assert float(batch["reward"].max()) == float(WORTH.max()), "all groups in one batch share its maximum"
    same(-forward, scale * (p - q.exp()))
    level = logp.clone().requires_grad_()
    now = level.log_softmax(0)
    reverse = torch.autograd.grad((now.exp() * (now - q)).sum(), level)[0]
    divergence = float(p @ (logp - q))
    same(reverse, p * (logp - q - divergence))
    shaped = PolicyGradient(advantage=Plain(ShapedOutcome(beta)), aggregate=EpisodeSum())
    batch = drawn_groups([(y,) for y in range(ARMS)]).with_columns("step", reference_logp=reference)
    slope = gradient(shaped, batch, logp) * ARMS
    same((p * slope) @ (torch.eye(ARMS).double() - p), beta * reverse)


def test_pairs_are_far_apart() -> None:
    """All pairs in the order of rewards that are at least 0.2 apart, one mean over those of all prompts; IPO's target is beta."""
    task = TabularTask(1, 5, 1, lambda q, y: (0.0, 0.1, 0.25, 0.6, 1.0)[y[0]])
    source = tabular_rollouts(task, table(law(0, 5)), suboptimal_onpolicy(loss="dpo", group=10).rollouts, 0)
    made = source.draw(0, 0)
    apart = made["reward"][::2] - made["reward"][1::2]
    assert float(apart.min()) >= 0.2
    assert bool(made["chosen"][::2].all())
    ipo = suboptimal_onpolicy(loss="ipo", beta=3.0).objective
    batch = made.with_columns("step", reference_logp=law(1, 5)[made["token"]])
    logp = law(0, 5)[made["token"]]
    margin = (logp - batch["reference_logp"])[::2] - (logp - batch["reference_logp"])[1::2]
    same(ipo(batch, {"logp": logp}), (margin - 3.0).square().mean())


@dataclass
class Recorded(FreshAndReplayed):
    """Remembers what it drew."""

    seen: list[Episodes] = field(default_factory=list)

    def __call__(self, step: int) -> Episodes:
        self.seen.append(super().__call__(step))
        return self.seen[-1]


def trained(recipe: Recipe, steps: int, seed: int = 0) -> tuple[TabularPolicy, list[Episodes]]:
    """A policy over two prompts, and the batches that it learned from."""
    task = TabularTask(2, ARMS, 1, lambda q, y: float(WORTH[y[0] - q]))
    policy = TabularPolicy(law(3).expand(2, 1, ARMS + 1, ARMS))
    source = Recorded(tabular_rollouts(task, policy, recipe.rollouts, seed), seed)
    train((recipe,), policy, source, steps=steps, rate=0.1, reference=TabularPolicy(policy.logits))
    return policy, source.seen


def test_same_answers_until_they_are_renewed() -> None:
    """refresh 3: the same answers for three steps, of the policy as it was in the first of them; 0: the start's for ever."""
    _, seen = trained(suboptimal_onpolicy(refresh=3), 9)
    tokens = [batch["token"].tolist() for batch in seen]
    assert tokens[0] == tokens[1] == tokens[2] != tokens[3] == tokens[4] == tokens[5] != tokens[6]
    assert torch.equal(seen[3]["behavior_logp"], seen[5]["behavior_logp"])
    torch.testing.assert_close(seen[0]["behavior_logp"], law(3)[seen[0]["token"]].float())
    assert float((seen[3]["behavior_logp"] - law(3)[seen[3]["token"]]).abs().min()) > 1e-3
    assert bool((seen[0]["policy_version"] == -1).all())
    _, offline = trained(suboptimal_onpolicy(refresh=0), 4)
    assert all(batch["token"].tolist() == tokens[0] for batch in offline)
    new = suboptimal_onpolicy(refresh=0).but(writer=Writer("reference"))
    _, others = trained(new, 3)
    assert others[0]["token"].tolist() == tokens[0]
    assert others[1]["token"].tolist() != tokens[0]
    torch.testing.assert_close(others[2]["behavior_logp"], law(3)[others[2]["token"]].float())


@pytest.mark.parametrize("loss", ["best-of-n", "dpo"])
def test_refreshing_is_epochs(loss: str) -> None:
    """R steps on the answers of the first of them are one step of R epochs."""
    apart, _ = trained(suboptimal_onpolicy(loss=loss, refresh=4), 4)
    once, _ = trained(suboptimal_onpolicy(loss=loss, epochs=4), 1)
    assert torch.equal(apart.logits, once.logits)
    other, _ = trained(suboptimal_onpolicy(loss=loss, refresh=2), 4)
    assert not torch.equal(apart.logits, other.logits)


# ---- goals that are ratings ------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class NumberedGoal(RatingGoal):
    """The goal r of prompt q is prompt q + 2 r."""

    def behind(self, prompt: object, rating: float) -> str:
        return str(int(str(prompt)) + 2 * round(self.rounded(rating)))


GOAL = NumberedGoal()


def rated_pairs(ratings: Sequence[Sequence[float]]) -> Episodes:
    """A pair of answers (0, 1) or more to prompt 0 for each of `ratings`."""
    answers = [[str(i) for i in range(len(r))] for r in ratings]
    return pair_episodes(
        NumberTokenizer(), ["0"] * len(ratings), [a[:1] for a in answers], [a[1:] for a in answers], ratings
    )


def goals_of(rows: Episodes, goal: RatingGoal = GOAL) -> Episodes:
    return GoalPairs(goal)(rows, NumberTokenizer())


def test_both_answers_are_chosen_once() -> None:
    """(x | 9): the 9 over the 8; (x | 8): the 8 over the 9; chosen and rejected are exchanged, not only the goal."""
    made = goals_of(rated_pairs([[9.0, 8.0]]))
    assert made["token"].tolist() == [0, 1, 1, 0]
    assert made["chosen"].tolist() == [True, False, True, False]
    assert made.context().values.tolist() == [18, 18, 16, 16]
    assert made["rating"].tolist() == [9.0, 8.0, 8.0, 9.0]
    assert made.lengths("group", "episode").tolist() == [2, 2]
    lists = goals_of(rated_pairs([[7.0, 2.0, 4.0]]))
    assert lists.count("group") == 6
    wanted = torch.div(lists.context().values, 2, rounding_mode="floor")
    assert wanted[::2].tolist() == lists["rating"][::2].tolist(), "the chosen answer is what the goal asks for"


def test_equal_ratings_cancel_and_are_dropped() -> None:
    assert goals_of(rated_pairs([[9.2, 8.8], [9.0, 3.0]])).count("group") == 2
    fine = goals_of(rated_pairs([[9.2, 8.8]]), NumberedGoal(step=0.1))
    assert fine.count("group") == 2
    same_goal = goals_of(rated_pairs([[9.2, 8.8]]), NumberedGoal(step=0.1)).with_context("score", [[18]] * 4)
    logp = law(0, 2)[same_goal["token"]]
    batch = same_goal.with_columns("step", reference_logp=law(1, 2)[same_goal["token"]])
    found = gradient(dpo(beta=1.0).objective, batch, logp)
    margin = float((logp - batch["reference_logp"])[0] - (logp - batch["reference_logp"])[1])
    per_answer = number([found[0] + found[3], found[1] + found[2]])
    pull = (1 / (1 + math.exp(-margin)) - 1 / (1 + math.exp(margin))) / 2
    same(per_answer, number([pull, -pull]))


def test_a_goal_blind_policy_learns_nothing() -> None:
    """One prompt for every goal: the mean over both copies is cDPO with label smoothing 1/2, least at 0, where it is flat."""
    rows = goals_of(rated_pairs([[9.0, 8.0], [3.0, 5.0], [2.0, 1.0]]))
    plain = rated_pairs([[9.0, 8.0], [5.0, 3.0], [2.0, 1.0]])
    flat, logp = law(4, 2), law(0, 2)
    one, two = (b.with_columns("step", reference_logp=flat[b["token"]]) for b in (rows, plain))
    made, half = reward_augmented_dpo(beta=0.7).objective, dpo(beta=0.7, label_smoothing=0.5).objective
    same(made(one, {"logp": logp[one["token"]]}), half(two, {"logp": logp[two["token"]]}))
    slope = torch.zeros(2).double().index_add(0, one["token"], gradient(made, one, logp[one["token"]]))
    other = torch.zeros(2).double().index_add(0, two["token"], gradient(half, two, logp[two["token"]]))
    same(slope.abs(), other.abs())
    level = gradient(made, one, flat[one["token"]])
    same(torch.zeros(2).double().index_add(0, one["token"], level), torch.zeros(2).double())


def test_first_copies_of_one_goal_are_dpo() -> None:
    rows = goals_of(rated_pairs([[9.0, 8.0], [7.0, 4.0]]))
    first = rows.select(torch.tensor([0, 2]), "group").with_context("score", [[0]] * 4)
    policy, reference = table(law(0, 2)), table(law(1, 2))
    plain = rated_pairs([[9.0, 8.0], [7.0, 4.0]])
    found = []
    for batch in (first, plain):
        with torch.no_grad():
            logp, other = (p.signals(batch, ["logp"])["logp"] for p in (policy, reference))
        made = reward_augmented_dpo(beta=0.3).objective
        found.append(gradient(made, batch.with_columns("step", reference_logp=other), logp))
    same(found[0], found[1])


def test_goals_in_text() -> None:
    """The goal stands in front of the prompt, in pairs and in evaluations; logged log-probs of the bare prompt are dropped."""
    policy = load_policy("unipo/tasks/tiny")
    rows = pair_episodes(policy.tokenizer, ["2+3="], ["5"], ["6"], [[9.0, 2.0]])
    rows = rows.with_columns("step", reference_logp=torch.zeros(rows.count("step")))
    recipe = reward_augmented_dpo(goal="Score {rating:g}: ", best=8.0)
    made = recipe.arrange[0](rows, policy.tokenizer)
    texts = [policy.tokenizer.decode(tokens, skip_special_tokens=True) for tokens in texts_of(made, "prompt")]
    assert [t.replace(" ", "") for t in texts] == ["Score9:2+3="] * 2 + ["Score2:2+3="] * 2
    assert "reference_logp" not in made
    asked = recipe.rollouts.ask.held_out(Prompt(id=1, text="2+3="))
    assert asked.text == "Score 8: 2+3="
    chat = recipe.rollouts.ask.held_out(Prompt(id=1, text=[{"role": "user", "content": "2+3="}]))
    assert chat.text[0] == {"role": "system", "content": "Score 8:"}


def test_in_a_sum_all_prompts_ask_for_the_best() -> None:
    goal = reward_augmented_dpo(best=8.0)
    for made in (grpo() + 0.1 * goal, goal + sft(), sft() + goal):
        assert made.rollouts.ask == goal.rollouts.ask
        assert made.arrange == goal.arrange
    assert (grpo() + dpo()).rollouts.ask == Asking()


def test_pairs_without_ratings_are_told() -> None:
    with pytest.raises(ValueError, match="1 of 1 pairs have no ratings"):
        goals_of(rated_pairs([[9.0, 8.0]]).without("rating"))
    with pytest.raises(ValueError, match=r"expected a text with \{rating\} in it"):
        reward_augmented_dpo(goal="best")
