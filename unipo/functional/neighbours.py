"""How far apart points lie, and which of many are worth keeping: margins, quality and spread in one score."""

from __future__ import annotations

import torch
from torch import Tensor

from unipo.functional.shapes import same_length

__all__ = ["importance", "log_spacing", "neighbour_distance", "standardised"]

LEAST_SPACING = 1e-3
"""The floor of a distance, relative to the median one."""
ROUNDING = 1e-12
"""Squared distances below this share of the squared norms are 0."""
CHUNK = 1 << 24
"""Products at a time."""


def neighbour_distance(points: Tensor, k: int) -> Tensor:
    """d_k: the Euclidean distance of every point to its k-th nearest other one: [n] of `points` [n, d].

    A point with k or more copies has 0. With no more than k points it is the distance to the farthest; of one point 0. In
    float64, in chunks of rows: n^2 d products in all.
    """
    if points.ndim != 2 or k < 1:
        raise ValueError(f"points have shape {list(points.shape)} and k is {k}: expected [n, d], and k of 1 or more")
    n = len(points)
    if n < 2:
        return points.new_zeros(n)
    x = (points - points.mean(0)).double()
    norm, found = x.square().sum(1), []
    for rows in torch.arange(n).split(max(1, CHUNK // n)):
        scale = norm[rows, None] + norm
        square = scale - 2.0 * x[rows] @ x.T
        square[square <= ROUNDING * scale] = 0.0
        square[torch.arange(len(rows)), rows] = torch.inf
        found.append(square.topk(min(k, n - 1), dim=1, largest=False).values[:, -1].sqrt())
    return torch.cat(found).to(points.dtype)


def log_spacing(distance: Tensor) -> Tensor:
    """log max( d, median(d) / 1000 ): [n]; its mean is, but for constants, d times the nearest-neighbour estimate of entropy.

    The floor keeps copies finite; it is relative, so that scaling all points by a adds log a. The median is of the distances
    above 0; where there are none, all are 0.
    """
    positive = distance[distance > 0]
    if not len(positive):
        return torch.zeros_like(distance)
    return distance.clamp(min=LEAST_SPACING * float(positive.median())).log()


def standardised(x: Tensor) -> Tensor:
    """(x - mean) / std: [n], the std with divisor n; 0 where all are equal."""
    centred = x - x.mean()
    std = centred.square().mean().sqrt()
    return centred / std if float(std) > 1e-12 * (1.0 + float(x.abs().max())) else torch.zeros_like(x)


def importance(margin: Tensor, quality: Tensor, spacing: Tensor, alpha: float, gamma: float) -> Tensor:
    """f = margin + alpha * quality + gamma * spacing, each standardised: [n] (FiFA, arXiv 2410.10166).

    `margin` [n]: |r(y_w) - r(y_l)| of a reward model; `quality` [n]: of the prompt; `spacing` [n]: `log_spacing` of d_k of its
    embedding. Taking the largest f is the greedy maximum of mean margin + alpha * mean quality + gamma * entropy, with d_k as it
    is among all.
    """
    same_length(margin=margin, quality=quality, spacing=spacing)
    return standardised(margin) + alpha * standardised(quality) + gamma * standardised(spacing)
