"""The ragged type: levels, the two verbs, selection, concatenation, splitting, disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unipo.episodes import LEVELS, Column, Episodes, offsets_of, segment_reduce


def example() -> Episodes:
    """Two prompts, three answers, six tokens: the worked example of the module."""
    return Episodes.build([[7, 8], [9], [7, 7, 2]], [[1, 5], [1, 5], [3]], [0, 0, 1], reward=[1.0, 0.0, 1.0],
                          kind=["rollout"] * 3, behavior_logp=[[-0.1, -0.2], [-0.3], [-0.1, -0.1, -0.4]])  # fmt: skip


def test_the_worked_example() -> None:
    e = example()
    assert [e.count(level) for level in ("step", "turn", "episode", "group")] == [6, 3, 3, 2]
    assert e.expand("reward", to="step").tolist() == [1, 1, 0, 1, 1, 1]
    assert e.reduce("reward", to="group", how="mean").tolist() == [0.5, 1.0]
    assert e.reduce("behavior_logp").tolist() == pytest.approx([-0.3, -0.3, -0.6])
    assert e.position().tolist() == [0, 1, 0, 0, 1, 2]
    assert e.index("group").tolist() == [0, 0, 0, 1, 1, 1]
    assert e.lengths("group", "episode").tolist() == [2, 1]
    assert e.lengths("group").tolist() == [3, 3]


def test_a_group_relative_advantage_in_three_lines() -> None:
    e = example()
    mean = e.reduce("reward", to="group", how="mean")
    advantage = e["reward"] - e.expand(mean, to="episode", level="group")
    assert e.expand(advantage).tolist() == [0.5, 0.5, -0.5, 0, 0, 0]


def test_select_keeps_columns_of_every_level_aligned() -> None:
    e = example().with_columns("group", level=torch.tensor([4, 5]))
    picked = e.select(torch.tensor([2, 0]))
    assert picked["token"].tolist() == [7, 7, 2, 7, 8]
    assert picked["reward"].tolist() == [1, 1]
    assert picked["level"].tolist() == [5, 4]
    assert picked.context().values.tolist() == [3, 1, 5]
    assert e.select(torch.tensor([1]), "group")["token"].tolist() == [7, 7, 2]
    short = e.select(torch.tensor([True, False, False, True, True, True]), "step")
    assert short.lengths().tolist() == [1, 0, 3], "episodes without steps stay"
    assert len(e.select(torch.zeros(3, dtype=torch.bool))) == 0


def test_cat_fills_what_a_part_lacks() -> None:
    demo = Episodes.build([[1, 2]], [[4]], kind=["demo"]).with_columns("step", mask=torch.tensor([True, False]))
    both = Episodes.cat([example(), demo])
    assert both["behavior_logp"].isnan().tolist() == [False] * 6 + [True] * 2
    assert both["mask"].tolist() == [True] * 7 + [False], "a missing mask means that the step counts"
    assert both.column("kind").names == ("rollout", "demo")
    assert both.category("kind", "demo").tolist() == [False, False, False, True]
    assert not both.category("kind", "pair").any()
    assert both.count("group") == 3
    with pytest.raises(ValueError, match="lives on levels"):
        Episodes.cat([example(), demo.with_columns("step", reward=torch.zeros(2))])
    with pytest.raises(ValueError, match="empty list"):
        Episodes.cat([])


def test_contexts_fall_back_to_the_prompt() -> None:
    e = example().with_context("teacher", [[9, 9, 9], [], [8]])
    assert e.context("teacher").values.tolist() == [9, 9, 9, 8]
    assert e.context("sample").values.tolist() == e.context().values.tolist() == [1, 5, 1, 5, 3]


def test_split_covers_all_within_the_budget_and_may_cut_groups() -> None:
    e = example()
    parts = e.split(4, e.lengths())
    assert sorted(int(i) for p in parts for i in p) == [0, 1, 2]
    assert [p.tolist() for p in parts] == [[0, 1], [2]], "groups stay whole where they fit"
    assert len(e.split(1, e.lengths())) == 3


def test_nested_turns_and_vector_columns_survive_the_disk(tmp_path: Path) -> None:
    offsets = {"turn": offsets_of(torch.tensor([2, 1, 3])), "episode": offsets_of(torch.tensor([2, 1])),
               "group": offsets_of(torch.tensor([2]))}  # fmt: skip
    e = Episodes(offsets, {}).with_columns(
        "step", token=torch.arange(6), state=torch.randn(6, 3), mask=torch.arange(6) > 0
    )
    e = (
        e.with_context("score", [[1, 2], [3], []])
        .with_columns("episode", source=["a", "b"])
        .with_columns("group", id=torch.tensor([7]))
    )
    e.save(tmp_path / "x.parquet")
    again = Episodes.load(tmp_path / "x.parquet")
    assert again.lengths("turn").tolist() == [2, 1, 3]
    assert again.lengths("episode", "turn").tolist() == [2, 1]
    for name, column in e.columns.items():
        other = again.column(name)
        assert torch.equal(column.values, other.values)
        assert (column.level, column.names, column.values.dtype) == (other.level, other.names, other.values.dtype)
    assert again.context().offsets is not None
    assert [p.name for p in tmp_path.iterdir()] == ["x.parquet"], "no half-written file stays"


def test_errors_say_what_was_expected() -> None:
    with pytest.raises(KeyError, match="no column 'value'; they have: behavior_logp"):
        example()["value"]
    with pytest.raises(ValueError, match="2 values for the 3 entries"):
        example().expand(torch.zeros(2))
    with pytest.raises(ValueError, match="has 2 entries, level 'episode' has 3"):
        example().with_columns("episode", x=torch.zeros(2))
    with pytest.raises(KeyError, match="unknown level"):
        example().count("batch")


ragged = st.lists(st.lists(st.integers(0, 9), min_size=0, max_size=5), min_size=1, max_size=8)


@given(ragged, st.randoms(use_true_random=False))
@settings(max_examples=50, deadline=None)
def test_selecting_and_concatenating_are_inverse(rows: list[list[int]], random: object) -> None:
    e = Episodes.build(rows, [[1]] * len(rows), reward=[float(sum(r)) for r in rows])
    again = Episodes.cat([e.select(torch.tensor([i])) for i in range(len(e))])
    assert again["token"].tolist() == e["token"].tolist()
    assert again.lengths().tolist() == [len(r) for r in rows]
    assert e.reduce("token").tolist() == [sum(r) for r in rows]
    assert e.expand("reward").tolist() == [float(sum(r)) for r in rows for _ in r]


def test_segment_reduce_by_hand() -> None:
    x, index = torch.tensor([1.0, 3.0, 5.0]), torch.tensor([0, 0, 2])
    assert segment_reduce(x, index, 3).tolist() == [4, 0, 5]
    assert segment_reduce(x, index, 3, "mean").tolist() == [2, 0, 5]
    assert segment_reduce(x, index, 3, "max").tolist() == [3, -float("inf"), 5]
    assert segment_reduce(x > 2, index, 3, "any").tolist() == [True, False, True]
    assert segment_reduce(x > 2, index, 3, "all").tolist() == [False, True, True]
    with pytest.raises(ValueError, match="unknown reduction"):
        segment_reduce(x, index, 3, "median")


# ---- flat batches: every verb gives what the same batch built the ordinary way gives ----------------------------------
def flat_pair(n: int = 5) -> tuple[Episodes, Episodes]:
    """The same transitions by `flat`, and by the ordinary constructor, whose offsets are three tensors."""
    generator = torch.Generator().manual_seed(n)
    step = {"observation": torch.randn(n, 2, generator=generator), "reward": torch.randn(n, generator=generator)}
    step["token"] = torch.randint(9, (n,), generator=generator)
    episode = {"terminated": torch.arange(n) % 2 == 0, "discount": torch.rand(n, generator=generator)}
    quick = Episodes.flat(step, episode, kind="rollout", source="replay")
    columns = {name: Column(v, "step") for name, v in step.items()}
    columns |= {name: Column(v, "episode") for name, v in episode.items()}
    columns |= {k: Column(torch.zeros(n, dtype=torch.long), "episode", None, (v,))
                for k, v in (("kind", "rollout"), ("source", "replay"))}  # fmt: skip
    return quick, Episodes({level: torch.arange(n + 1) for level in LEVELS[1:]}, columns)


def assert_same(a: Episodes, b: Episodes) -> None:
    assert [a.count(level) for level in LEVELS] == [b.count(level) for level in LEVELS]
    for upper in LEVELS[1:]:
        for lower in LEVELS[: LEVELS.index(upper)]:
            assert torch.equal(a.lengths(upper, lower), b.lengths(upper, lower)), (upper, lower)
            assert torch.equal(a.index(upper, lower), b.index(upper, lower)), (upper, lower)
    assert a.columns.keys() == b.columns.keys()
    for name, column in a.columns.items():
        other = b.column(name)
        assert (column.level, column.names, column.values.dtype) == (other.level, other.names, other.values.dtype), name
        torch.testing.assert_close(column.values, other.values, rtol=0, atol=0, equal_nan=True)
        assert (column.offsets is None) == (other.offsets is None), name


VERBS: dict[str, Callable[[Episodes], Any]] = {
    "itself": lambda e: e,
    "select rows in any order": lambda e: e.select(torch.tensor([4, 0, 2])),
    "select a row twice": lambda e: e.select(torch.tensor([1, 0, 1])),
    "select by mask": lambda e: e.select(torch.tensor([True, False, False, True, False])),
    "select none": lambda e: e.select(torch.zeros(5, dtype=torch.bool)),
    "select groups": lambda e: e.select(torch.tensor([3, 1]), "group"),
    "select groups by mask": lambda e: e.select(torch.tensor([False, True, True, False, False]), "group"),
    "select steps": lambda e: e.select(torch.tensor([True, False, True, True, False]), "step"),
    "select steps, then rows": lambda e: e.select(torch.tensor([0, 4]), "step").select(torch.tensor([4, 1, 0])),
    "select of a selection": lambda e: e.select(torch.tensor([4, 0, 2])).select(torch.tensor([2, 0])),
    "more columns": lambda e: e.with_columns("step", x=torch.arange(5)).with_columns("group", id=torch.arange(5)),
    "a category": lambda e: e.with_columns("episode", source=["a", "b", "a", "a", "b"]),
    "a context": lambda e: e.with_context("score", [[1], [], [2, 3], [4], []]).select(torch.tensor([3, 2])),
    "fewer columns": lambda e: e.without("token"),
    "one group": lambda e: e.as_one_group(),
    "one group, selected": lambda e: e.as_one_group().select(torch.tensor([3, 0])),
    "to a device": lambda e: e.to("cpu").select(torch.tensor([1, 0])),
    "doubled": lambda e: Episodes.cat([e, e]).select(torch.tensor([9, 0])),
    "beside ragged ones": lambda e: Episodes.cat([e, example().without("reward")]),
    "as steps": lambda e: e.as_steps(),
    "through a table": lambda e: Episodes.from_arrow(e.to_arrow()),
}


@pytest.mark.parametrize("verb", VERBS)
def test_a_flat_batch_is_the_ordinary_batch(verb: str) -> None:
    quick, ordinary = flat_pair()
    assert quick.is_flat
    assert not ordinary.is_flat
    assert_same(VERBS[verb](quick), VERBS[verb](ordinary))
    assert_same(*flat_pair())


NUMBERS: dict[str, Callable[[Episodes], torch.Tensor]] = {
    "sum": lambda e: e.reduce("reward"),
    "mean of vectors": lambda e: e.reduce("observation", how="mean"),
    "mean of integers": lambda e: e.reduce("token", how="mean"),
    "sum of integers": lambda e: e.reduce("token"),
    "max to groups": lambda e: e.reduce("reward", to="group", how="max"),
    "min": lambda e: e.reduce("reward", how="min"),
    "any": lambda e: e.reduce("terminated", to="group", how="any"),
    "any number": lambda e: e.reduce(torch.tensor([0.0, 2.0, -1.0, 0.0, 1.0]), how="any"),
    "all": lambda e: e.reduce(torch.tensor([True, False, True, True, False]), how="all"),
    "up from episodes": lambda e: e.reduce("discount", to="group"),
    "down to steps": lambda e: e.expand("discount"),
    "down from groups": lambda e: e.expand(torch.arange(5), level="group"),
    "down from groups to episodes": lambda e: e.expand(torch.arange(5), "episode", "group"),
    "position": lambda e: e.position(),
    "positions of steps": lambda e: e.step_index(torch.tensor([4, 1])),
    "lengths": lambda e: e.lengths(),
    "index": lambda e: e.index("episode"),
    "category": lambda e: e.category("kind", "rollout"),
    "another category": lambda e: e.category("kind", "demo"),
}


@pytest.mark.parametrize("number", NUMBERS)
def test_a_flat_batch_gives_the_same_numbers(number: str) -> None:
    quick, ordinary = flat_pair()
    a, b = NUMBERS[number](quick), NUMBERS[number](ordinary)
    assert a.dtype == b.dtype
    assert torch.equal(a, b)


def test_gradients_pass_through_the_verbs_of_a_flat_batch() -> None:
    x = torch.arange(5.0, requires_grad=True)
    quick, ordinary = flat_pair()
    for e in (quick, ordinary):
        (e.reduce(3 * x).square().sum() + e.expand(x).sum()).backward()
    assert x.grad is not None
    assert x.grad.tolist() == [2 * (18.0 * k + 1) for k in range(5)], "both batches: d/dx (9 x^2 + x), twice"


def test_what_is_flat_stays_flat_and_what_is_not_does_not() -> None:
    quick, _ = flat_pair()
    assert quick.select(torch.tensor([0, 3])).is_flat
    assert quick.with_columns("step", x=torch.zeros(5)).is_flat
    assert quick.without("token").is_flat
    assert quick.to("cpu").is_flat
    assert not quick.as_one_group().is_flat, "a group of five is not five groups"
    assert not quick.select(torch.tensor([0]), "step").is_flat, "four episodes have no step"
    assert not example().is_flat
    assert example().as_steps().is_flat


def test_a_flat_batch_refuses_what_an_ordinary_one_refuses() -> None:
    for e in flat_pair():
        with pytest.raises(ValueError, match="4 values for the 5 entries"):
            e.reduce(torch.zeros(4))
        with pytest.raises(ValueError, match="4 values for the 5 entries"):
            e.expand(torch.zeros(4))
        with pytest.raises(ValueError, match="unknown reduction"):
            e.reduce("reward", how="median")
        with pytest.raises(ValueError, match="cannot select at level 'turn'"):
            e.select(torch.tensor([0]), "turn")
        with pytest.raises(ValueError, match="has 2 entries, level 'episode' has 5"):
            e.with_columns("episode", x=torch.zeros(2))
        with pytest.raises(IndexError):
            e.select(torch.tensor([5]))


def test_flat_batches_of_one_size_share_no_state() -> None:
    first, second = flat_pair()[0], flat_pair()[0]
    for made in (first.lengths(), first.index("episode"), first.position()):
        made.fill_(7)
    assert second.lengths().tolist() == [1] * 5
    assert second.index("episode").tolist() == [0, 1, 2, 3, 4]
    assert second.step_index(torch.tensor([3])).tolist() == [3]


def test_as_steps_keeps_what_is_true_of_every_step() -> None:
    """Categories and integers of episodes go down to their steps; booleans, floats, groups and contexts stay behind."""
    e = example().with_columns("episode", policy_version=torch.tensor([3, 4, 5]), truncated=torch.tensor([1, 0, 0]) > 0)
    e = e.with_columns("group", level=torch.tensor([4, 5])).with_columns("step", mask=torch.arange(6) > 0)
    steps = e.as_steps()
    assert set(steps.columns) == {"token", "behavior_logp", "mask", "kind", "policy_version"}
    assert [steps.count(level) for level in LEVELS] == [6, 6, 6, 6]
    assert steps["policy_version"].tolist() == [3, 3, 4, 5, 5, 5]
    assert steps.column("policy_version").level == steps.column("kind").level == "episode"
    assert steps.column("kind").names == ("rollout",)
    assert steps["token"].tolist() == [7, 8, 9, 7, 7, 2]
    shuffled = steps.select(torch.tensor([5, 0, 3]), "group")
    assert shuffled["token"].tolist() == [2, 7, 7]
    assert shuffled["policy_version"].tolist() == [5, 3, 5]
    gone = e.select(torch.tensor([False, False, True, True, False, True]), "step").as_steps()
    assert gone["policy_version"].tolist() == [4, 5, 5], "an episode without steps has none to carry to"


@pytest.mark.parametrize("budget", [1, 4, 7, 9, 100])
def test_split_is_the_same_set_whatever_the_budget(budget: int) -> None:
    cost = torch.tensor([3, 1, 2, 2, 1])
    for e in flat_pair():
        parts = e.split(budget, cost)
        assert sorted(i for p in parts for i in p.tolist()) == [0, 1, 2, 3, 4]
        assert all(len(p) == 1 or int(cost[p].sum()) <= budget for p in parts)
        assert (len(parts) == 1) == (budget >= 9)
    assert [p.tolist() for p in flat_pair()[0].split(4, cost)] == [[0, 1], [2, 3], [4]]
    assert flat_pair()[0].split(9, cost)[0].tolist() == [0, 1, 2, 3, 4], "one batch keeps its order"
