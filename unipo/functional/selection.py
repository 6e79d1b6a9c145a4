"""Which entries count: subsets of largest variance, largest scores, and shares by place within a group.

Equal entries are ordered by their index, and so are entries that differ by rounding alone (1e-9 of the largest): a choice
among equals must not depend on the order of a summation.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from unipo.episodes import offsets_of
from unipo.functional.shapes import same_length

__all__ = ["ascending", "largest", "max_variance_subset", "places", "rank_shares", "share_of"]

TOLERANCE = 1e-9
"""Relative difference below which two numbers are equal."""


def share_of(n: int, share: float) -> int:
    """ceil(share * n) entries of n: at least 1 and at most n (0 of 0)."""
    return min(max(math.ceil(share * n - TOLERANCE), 1), n)


def ascending(values: Tensor) -> Tensor:
    """Positions [n] of `values` [n] in ascending order, ties by index."""
    if len(values) < 2:
        return torch.arange(len(values), device=values.device)
    order = values.argsort(stable=True)
    apart = values[order].diff() > TOLERANCE * values.abs().amax()
    level = torch.zeros_like(order)
    level[order[1:]] = apart.cumsum(0)
    return level.argsort(stable=True)


def largest(score: Tensor, count: int) -> Tensor:
    """bool [n]: the `count` largest of `score` [n]; of equal ones the first."""
    kept = torch.zeros_like(score, dtype=torch.bool)
    kept[ascending(-score)[:count]] = True
    return kept


def max_variance_subset(values: Tensor, count: int) -> Tensor:
    """bool [n]: the `count` of `values` [n] with the largest variance among all subsets of that size.

    It is the k smallest and the count - k largest for some k; of equal variances the smallest k wins
    (D3S, arXiv 2509.22115; the lemma for one dimension is in PODS, arXiv 2504.13818).
    """
    n = len(values)
    kept = torch.zeros_like(values, dtype=torch.bool)
    if count >= n:
        return ~kept
    order = ascending(values)
    x = values[order].double()
    x = x - x.mean()
    k = torch.arange(count + 1, device=values.device)

    def chosen_mean(y: Tensor) -> Tensor:
        before = torch.cat([y.new_zeros(1), y.cumsum(0)])
        return (before[k] + before[n] - before[n - count + k]) / count

    variance = chosen_mean(x.square()) - chosen_mean(x).square()
    best = int((variance >= variance.amax() - TOLERANCE * x.square().mean()).nonzero()[0])
    kept[order[:best]] = True
    kept[order[n - count + best :]] = True
    return kept


def places(values: Tensor, index: Tensor, n: int) -> Tensor:
    """[E] int64: 0 for the largest of `values` [E] in its own group, 1 for the next; of equal ones the first is better."""
    same_length(values=values, index=index)
    order = (-values).argsort(stable=True)
    order = order[index[order].argsort(stable=True)]
    first = offsets_of(torch.bincount(index, minlength=n))[:-1]
    place = torch.empty_like(index)
    place[order] = torch.arange(len(index), device=index.device) - first[index[order]]
    return place


def rank_shares(values: Tensor, index: Tensor, n: int, best: float, others: float, worst: float) -> Tensor:
    """Shares [E] of each group by place: `best` to the largest of `values` [E], `worst` to the smallest, `others` evenly to
    all but the largest. They sum to best + others + worst in every group; a group of one has it all.
    """
    place, size = places(values, index, n), torch.bincount(index, minlength=n)[index]
    even = others / (size - 1).clamp(min=1).to(values.dtype)
    rest = torch.where(size > 1, even * (place > 0), others)
    first, last = ((place == at).to(values.dtype) for at in (torch.zeros_like(size), size - 1))
    return best * first + rest + worst * last
