"""Identity tests of filtered preference data and of the reference to a power; the page's experiments in small."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tests.toys import gradient
from unipo import functional as F
from unipo.episodes import Episodes
from unipo.methods.preference_data import dpo_gamma, fifa
from unipo.methods.preferences import dpo
from unipo.sources.data.pair_filters import Diverse, Important, Length, Margin, Quality, kept_by, margins, read_filters
from unipo.sources.data.problems import DataError

N = 40


def rows(seed: int = 0, n: int = N, prompts: list[list[int]] | None = None) -> Episodes:
    """Rated pairs, each to a prompt of its own, with random lengths, ratings and embeddings."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 6, (2 * n,), generator=generator).tolist()
    owner = [i // 2 for i in range(2 * n)]
    asked = prompts or [[i, 7 * i] for i in range(n)]
    made = Episodes.build([[0] * t for t in lengths], [asked[i] for i in owner], owner, kind=["pair"] * (2 * n),
                          chosen=[True, False] * n, prompt_id=[asked[i][0] for i in owner])  # fmt: skip
    points = torch.randn(n, 3, generator=generator, dtype=torch.float64).repeat_interleave(2, 0)
    rating = torch.randn(2 * n, generator=generator, dtype=torch.float64)
    return made.with_columns("episode", rating=rating, embedding=points)


def kept(made: Episodes) -> list[int]:
    return made["prompt_id"][::2].tolist()


# ---- FiFA ------------------------------------------------------------------------------------------------------------
def test_without_weights_the_widest_margins_stay() -> None:
    data = rows()
    wide = margins(data).abs().argsort(descending=True)[:10].sort().values
    (stage,) = fifa(share=0.25, alpha=0.0, gamma=0.0).arrange
    assert kept(stage(data, None)) == wide.tolist()


def test_the_whole_share_is_dpo() -> None:
    """K = |D|: every row, in its order; and the objective is DPO's at any share."""
    recipe, data = fifa(beta=0.2, share=1.0), rows()
    (stage,) = recipe.arrange
    assert kept(stage(data, None)) == list(range(N))
    assert recipe.objective == dpo(beta=0.2).objective


def test_importance_does_not_depend_on_the_order_of_rows() -> None:
    data, order = rows(), torch.randperm(N, generator=torch.Generator().manual_seed(1))
    stage = Important(share=0.3, gamma=1.0, k=3)
    moved = data.select(order, "group")
    assert sorted(kept(moved.select(stage(moved), "group"))) == kept(data.select(stage(data), "group"))


def test_embeddings_may_be_moved_and_scaled() -> None:
    data, stage = rows(), Important(share=0.3, gamma=1.0, k=3)
    points = data["embedding"]
    for other in (points + 5, 9 * points):
        assert torch.equal(stage(data.with_columns("episode", embedding=other)), stage(data))
    bent = points * torch.tensor([9.0, 1.0, 1.0]).double()
    assert not torch.equal(stage(data.with_columns("episode", embedding=bent)), stage(data))


def test_copies_of_a_prompt_go_first() -> None:
    """Six pairs to one prompt: with k = 5 they see each other at distance 0; of a margin like the others' they go first."""
    data = rows(prompts=[[99, 3] if i < 6 else [i, 7 * i] for i in range(N)])
    points = data["embedding"].clone()
    points[:12] = points[0]
    level = torch.tensor([1.0, 0.0] * N).double()
    data = data.with_columns("episode", embedding=points, rating=level)
    assert 99 not in kept(data.select(Important(share=0.85, per_prompt=0)(data), "group"))
    assert kept(data.select(Important(share=1.0, per_prompt=1)(data), "group")).count(99) == 1
    assert kept(data.select(Important(share=1.0, per_prompt=0)(data), "group")).count(99) == 6


def test_the_objective_is_the_sum_of_its_three_terms() -> None:
    """By hand: margins, quality and spacing standardised, the third highest sum is the last to stay."""
    data = rows()
    quality = torch.randn(N, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    data = data.with_columns("episode", quality=quality.repeat_interleave(2))
    points = data["embedding"][::2]
    distance = torch.cdist(points, points).sort(1).values[:, 5]
    parts = [(data["rating"][::2] - data["rating"][1::2]).abs(), quality, distance.log()]
    z = [(x - x.mean()) / x.std(correction=0) for x in parts]
    best = (z[0] + 0.5 * z[1] + 0.25 * z[2]).argsort(descending=True)[:3]
    stage = Important(share=3 / N, alpha=0.5, gamma=0.25)
    assert sorted(kept(data.select(stage(data), "group"))) == sorted(best.tolist())


def test_a_cap_makes_wide_margins_equal() -> None:
    data = rows().with_columns("episode", rating=torch.arange(2.0 * N).double() * torch.tensor([3.0, -1.0] * N))
    first = data.select(Important(share=0.1, gamma=0.0, cap=0.1)(data), "group")
    assert kept(first) == [0, 1, 2, 3]  # all are at the cap: of equal ones the first
    assert 0 not in kept(data.select(Important(share=0.1, gamma=0.0)(data), "group"))


# ---- the other filters -----------------------------------------------------------------------------------------------
def graded() -> Episodes:
    """A list rated 5 5 2, a pair 4 > 3.5, a pair that is chosen against its ratings, of lengths 3, 2 and 1 + its place."""
    made = Episodes.build([[0] * t for t in (3, 1, 1, 2, 1, 1, 4)], [[1, 2]] * 3 + [[1, 2, 3]] * 2 + [[9, 8]] * 2,
                          [0, 0, 0, 1, 1, 2, 2], kind=["pair"] * 7, prompt_id=[0, 0, 0, 1, 1, 2, 2],
                          chosen=[True, True, False, True, False, True, False])  # fmt: skip
    return made.with_columns("episode", rating=torch.tensor([5.0, 4.5, 2.0, 4.0, 3.5, 1.0, 3.0]))


@pytest.mark.parametrize(
    ("spelled", "expected"),
    [
        ("margin(0.5)", [True, True, False]),
        ("margin(least=0.6)", [True, False, False]),
        ("margin(-2)", [True, True, True]),
        ("length(2)", [False, True, False]),
        ("length(3)", [True, True, False]),
        ("quality(4)", [True, True, False]),
        ("quality(4.2)", [True, False, False]),
        ("diverse(share=0.3,k=1)", [False, False, True]),
    ],
)
def test_filters_by_hand(spelled: str, expected: list[bool]) -> None:
    (one,) = read_filters(spelled)
    assert one(graded()).tolist() == expected


def test_filters_follow_one_another_and_say_what_they_left() -> None:
    assert read_filters(" length(3), margin(0.6) ") == (Length(most=3), Margin(least=0.6))
    left, said = kept_by(graded(), read_filters("length(3),margin(0.6)"))
    assert left["prompt_id"].tolist() == [0, 0, 0]
    assert [(before, after) for _, before, after in said] == [(3, 2), (2, 1)]
    assert read_filters("diverse(0.2, k=3)") == (Diverse(share=0.2, k=3),)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("margins(1)", "did you mean 'margin'"),
        ("margin(x)", "write margin\\(least=NUMBER\\)"),
        ("margin(most=3)", "the settings of margin are least"),
        ("diverse(2)", "keeps a share of 2"),
        ("length 3", "unknown filter 'length 3'"),
    ],
)
def test_filters_that_cannot_be_read(text: str, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        read_filters(text)


def test_filters_tell_what_they_lack() -> None:
    blank = graded().with_columns("episode", rating=torch.full((7,), math.nan))
    for one in (Margin(), Quality(), Important()):
        with pytest.raises(DataError, match="3 of 3 comparisons have no ratings to look at"):
            kept_by(blank, (one,))
    with pytest.raises(DataError, match="keeps none of 3 comparisons"):
        kept_by(graded(), (Margin(least=9),))


def test_prompts_that_share_words_are_near() -> None:
    """Without embeddings: of three prompts of which two share their beginning, the third is the most apart."""
    made = graded()
    assert Diverse(share=0.3, k=1)(made).tolist() == [False, False, True]
    same = Episodes.build([[0]] * 4, [[5, 6], [5, 6], [6, 5], [1, 2]], [0, 1, 2, 3])
    same = same.with_columns("episode", chosen=torch.ones(4, dtype=torch.bool))
    assert Diverse(share=0.5, k=1)(same).tolist() == [False, False, True, True]


# ---- the reference to a power ----------------------------------------------------------------------------------------
def pairs() -> tuple[Episodes, Tensor]:
    made = rows(3, 6)
    generator = torch.Generator().manual_seed(4)
    logp, reference = -3 * torch.rand((2, made.count("step")), generator=generator, dtype=torch.float64)
    return made.with_columns("step", reference_logp=reference), logp


def test_the_whole_reference_is_dpo() -> None:
    batch, logp = pairs()
    one, other = dpo_gamma(beta=0.3, gamma=1.0).objective, dpo(beta=0.3).objective
    torch.testing.assert_close(one(batch, {"logp": logp}), other(batch, {"logp": logp}), rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient(one, batch, logp), gradient(other, batch, logp), rtol=1e-12, atol=0)


@pytest.mark.parametrize("gamma", [0.0, 0.25, 2.0])
def test_a_power_of_the_reference_by_hand(gamma: float) -> None:
    """L = mean -log sigmoid( beta ( log pi(w) / pi(l) + gamma c ) ), c = log ref(l) / ref(w)."""
    batch, logp = pairs()
    policy, reference = (batch.reduce(x) for x in (logp, batch["reference_logp"]))
    z, c = policy[::2] - policy[1::2], reference[1::2] - reference[::2]
    expected = torch.log1p(torch.exp(-0.3 * (z + gamma * c))).mean()
    torch.testing.assert_close(dpo_gamma(beta=0.3, gamma=gamma).objective(batch, {"logp": logp}), expected)


def test_without_a_reference_the_loss_ranks() -> None:
    """gamma 0: a pair's loss is below log 2 exactly where it is ranked right, whatever the reference."""
    batch, logp = pairs()
    policy = batch.reduce(logp)
    objective = dpo_gamma(gamma=0.0).objective
    for i in range(6):
        pair = batch.select(torch.tensor([i]), "group")
        loss = objective(pair, {"logp": logp[batch.step_index(torch.tensor([2 * i, 2 * i + 1]))]})
        assert (float(loss) < math.log(2)) == bool(
            F.ranks_right(policy[2 * i : 2 * i + 1], policy[2 * i + 1 : 2 * i + 2])
        )
