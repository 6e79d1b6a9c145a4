"""Nelder and Mead's search of a maximum without gradients, as a conversation: a point is asked for, its value is told."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence

Point = tuple[float, ...]


def nelder_mead(simplex: Sequence[Point], *, reflect: float = 1.0, expand: float = 2.0, contract: float = 0.5,
                shrink: float = 0.5, near: float = 0.0, spread: float = 0.0) -> Generator[Point, float, Point]:  # fmt: skip
    """Yields points of n numbers and is sent their values; returns the best when the values differ by at most `spread`.

    `simplex`: n + 1 points. With c the mean of all but the worst point w: reflected c + reflect (c - w); if it is the best so
    far, expanded c + expand (reflected - c); if it is no better than the second worst, contracted c + contract (w - c); if
    that is worse than w, all move to the best b: b + shrink (p - b). A point within `near` of one whose value is known, in
    every coordinate, has that value. `spread`: of the values, their population standard deviation. Raises ValueError for
    another number of points. Source: Nelder and Mead (1965), Computer Journal 7:308.
    """
    size = len(simplex[0])
    if len(simplex) != size + 1 or any(len(p) != size for p in simplex):
        raise ValueError(f"expected {size + 1} points of {size} numbers, found {len(simplex)}")
    known: dict[Point, float] = {}

    def value(point: Point) -> Generator[Point, float, float]:
        close = (p for p in known if all(abs(a - b) <= near for a, b in zip(p, point, strict=True)))
        same = next(close, point)
        if same not in known:
            known[same] = yield point
        return known[same]

    points = list(simplex)
    while True:
        ranked = []
        for p in points:
            ranked.append(((yield from value(p)), p))
        ranked.sort(key=lambda found: -found[0])
        points, values = [p for _, p in ranked], [v for v, _ in ranked]
        if _deviation(values) <= spread:
            return points[0]
        centre = tuple(sum(c) / size for c in zip(*points[:-1], strict=True))
        new = yield from _instead_of_worst(points, values, centre, value, (reflect, expand, contract))
        points = [*points[:-1], new] if new else [points[0], *(_towards(points[0], p, shrink) for p in points[1:])]


def _instead_of_worst(points: list[Point], values: list[float], centre: Point,
                      value: Callable[[Point], Generator[Point, float, float]], steps: tuple[float, float, float]
                      ) -> Generator[Point, float, Point]:  # fmt: skip
    """What takes the place of the worst point; () where nothing is better."""
    reflect, expand, contract = steps
    reflected = _towards(centre, points[-1], -reflect)
    found = yield from value(reflected)
    if found > values[0]:
        expanded = _towards(centre, reflected, expand)
        return expanded if (yield from value(expanded)) > found else reflected
    if found > values[-2]:
        return reflected
    contracted = _towards(centre, points[-1], contract)
    return contracted if (yield from value(contracted)) > values[-1] else ()


def _towards(start: Point, end: Point, share: float) -> Point:
    """start + share (end - start)."""
    return tuple(a + share * (b - a) for a, b in zip(start, end, strict=True))


def _deviation(values: Sequence[float]) -> float:
    mean = sum(values) / len(values)
    return float((sum((v - mean) ** 2 for v in values) / len(values)) ** 0.5)
