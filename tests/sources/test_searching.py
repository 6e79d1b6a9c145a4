"""Searches inside a run: the simplex against hand-made steps, proposals that are held, told and remembered."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace

import pytest

from unipo.functional.simplex import nelder_mead
from unipo.sources.controllers import State
from unipo.sources.searching import SimplexSearch


def searched(f: Callable[..., float], simplex: list[tuple[float, ...]], most: int = 300, **settings: float
             ) -> tuple[tuple[float, ...] | None, list[tuple[float, ...]]]:  # fmt: skip
    """(what it ends with, the points that it asked for)."""
    search, asked = nelder_mead(simplex, **settings), []
    try:
        point = next(search)
        for _ in range(most):
            asked.append(point)
            point = search.send(f(*point))
    except StopIteration as end:
        return end.value, asked
    return None, asked


def test_nelder_mead_finds_the_top() -> None:
    best, _ = searched(lambda x: -((x - 0.3) ** 2), [(0.0,), (1.0,)], spread=1e-12)
    assert best == pytest.approx((0.3,), abs=1e-4)
    best, _ = searched(
        lambda x, y: -((x - 0.3) ** 2) - 3 * (y - 0.7) ** 2, [(0.0, 0.0), (1.0, 0.0), (0.0, 1.0)], spread=1e-12
    )
    assert best == pytest.approx((0.3, 0.7), abs=1e-4)


def test_the_steps_of_the_simplex_by_hand() -> None:
    """-x^2 from 3 and 2: reflected 1 is better and expanded 0 better still; from 0 and 2 reflected -2 is no better than 2,
    contracted 1 is, and then reflected -1 from 0 and 1 is not better than 1, contracted 1/2 is."""
    _, asked = searched(lambda x: -(x**2), [(3.0,), (2.0,)], most=8)
    assert [x for (x,) in asked] == [3.0, 2.0, 1.0, 0.0, -2.0, -1.0, 0.5, -0.5]


def test_a_simplex_shrinks_to_its_best() -> None:
    """Nothing is better than the middle of three: reflected, then contracted, then both others half way to it."""
    _, asked = searched(lambda x, y: float(x == y == 0), [(0.0, 0.0), (2.0, 0.0), (0.0, 2.0)], most=7)
    assert asked[3:] == [(2.0, -2.0), (0.5, 1.0), (1.0, 0.0), (0.0, 1.0)]


def test_values_nearby_are_taken_over_and_points_must_fit() -> None:
    _, asked = searched(lambda x: -(x**2), [(1.0,), (1.004,)], near=5e-3, spread=1e-9)
    assert asked == [(1.0,)], "the second has the value of the first, and the spread is 0"
    with pytest.raises(ValueError, match="expected 3 points of 2 numbers, found 2"):
        next(nelder_mead([(0.0, 0.0), (1.0, 1.0)]))


def told(search: SimplexSearch, steps: int, follow: float, top: float) -> tuple[State, list[float]]:
    """A world whose metric goes a share `follow` of the way to the proposal each step, and whose score is best at `top`."""
    state, now, proposals = search.start(), 0.0, []
    for step in range(steps):
        proposals.append(search.setting(state, step))
        now += follow * (proposals[-1] - now)
        state = search.observe(json.loads(json.dumps(state)), {"reward": now, "gold": -((now - top) ** 2)})
    return state, proposals


def test_a_search_in_a_run_finds_the_threshold() -> None:
    search = SimplexSearch(knob="threshold", low=(0.1,), high=(1.0,), patience=20, every=5, most=14, spread=0.0)
    state, proposals = told(search, 400, 0.3, 0.6)
    assert proposals[-1] == pytest.approx(0.6, abs=0.05)
    assert state["proposals"] == 14.0
    assert len(set(proposals)) <= 14


def test_a_proposal_is_held_until_it_is_reached_or_patience_ends() -> None:
    search = SimplexSearch(knob="threshold", low=(0.4,), high=(0.9,), patience=20, every=5, most=4)
    _, reached = told(search, 5, 1.0, 0.6)
    assert len(set(reached)) == 1, "held while it is looked at"
    state, _ = told(search, 5, 1.0, 0.6)
    assert state["proposals"] == 1.0, "reached at once: scored after `every` steps"
    state, _ = told(search, 19, 0.0, 0.6)
    assert state["proposals"] == 0.0
    state, _ = told(search, 20, 0.0, 0.6)
    assert state["proposals"] == 1.0, "never reached: scored when patience ends"
    assert search.observe(search.start(), {"reward": 0.5}) == search.start(), "without a score nothing is seen"


def test_axes_agree_and_patience_is_a_tenth_of_the_run() -> None:
    shared = SimplexSearch(knob="", metrics=("reward/a", "reward/b"), low=(0.0, 0.5), high=(0.5, 1.0)).lasting(60)
    assert isinstance(shared, SimplexSearch)
    first, second = (replace(shared, knob=f"threshold/{i}", axis=i) for i in range(2))
    assert first.patience == second.patience == 6
    states = [first.start(), second.start()]
    for i in range(30):
        assert states[0] == states[1]
        a, b = first.setting(states[0], i), second.setting(states[1], i)
        assert 0.0 <= a <= 0.5 <= b <= 1.0 or i > 18, "the first points lie between the corners"
        metrics = {"reward/a": a, "reward/b": b, "gold": a - b}
        states = [c.observe(s, metrics) for c, s in zip((first, second), states, strict=True)]
