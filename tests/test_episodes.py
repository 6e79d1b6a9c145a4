"""The ragged type: levels, the two verbs, selection, concatenation, splitting, disk."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unipo.episodes import Episodes, offsets_of, segment_reduce


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
    assert [p.tolist() for p in parts] == [[2], [0, 1]]
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
