"""Flow matching between normal noise and data, the error of a velocity as an outlier score, and what of it stands out.

    x_t = t h + (1 - t) e        velocity of the straight path h - e        e ~ N(0, I), t in (0, 1)

For data h ~ N(0, 1) the best velocity is (2 t - 1) x / (t^2 + (1 - t)^2); its squared error grows with |h|.
"""

from __future__ import annotations

import torch
from torch import Tensor

from unipo.episodes import segment_reduce
from unipo.functional.selection import places
from unipo.functional.shapes import same_length, same_shape

__all__ = ["flow_error", "noised", "running_mean", "standouts"]


def noised(data: Tensor, noise: Tensor, time: Tensor) -> Tensor:
    """x_t = t h + (1 - t) e: [..., d], of `data` h and `noise` e [..., d] at `time` t [..., 1]."""
    same_shape(data=data, noise=noise)
    return time * data + (1 - time) * noise


def flow_error(velocity: Tensor, data: Tensor, noise: Tensor) -> Tensor:
    """Mean over the d features of (v - (h - e))^2: [..., d] -> [...]."""
    same_shape(velocity=velocity, data=data, noise=noise)
    return (velocity - (data - noise)).square().mean(-1)


def standouts(score: Tensor, index: Tensor, n: int, known: Tensor, threshold: float, top: int) -> Tensor:
    """Scores [N] in [0, 1] of what stands out in its segment; 0 elsewhere (RLFR, arXiv 2510.10201).

    Each segment's known scores (bool [N]) are scaled to [0, 1] by their smallest and largest; all 0 where these are equal.
    Kept: what is above `threshold`, and of that the `top` largest of the segment, of equal ones the first.
    """
    same_length(score=score, index=index, known=known)
    low = segment_reduce(score.masked_fill(~known, torch.inf), index, n, "min")[index]
    high = segment_reduce(score.masked_fill(~known, -torch.inf), index, n, "max")[index]
    varied = known & (high > low)
    scaled = torch.where(varied, (score - low) / torch.where(varied, high - low, 1.0), 0.0)
    return torch.where((scaled > threshold) & (places(scaled, index, n) < top), scaled, 0.0)


def running_mean(values: Tensor, index: Tensor) -> Tensor:
    """(1 / t) sum over i <= t of the entries of one segment, in order: [N] -> [N]; `index` [N] sorted."""
    same_length(values=values, index=index)
    first = torch.searchsorted(index, index)
    upto = values.double().cumsum(0)
    count = torch.arange(1, len(index) + 1, device=index.device) - first
    before = torch.where(first > 0, upto[(first - 1).clamp(min=0)], 0.0)
    return ((upto - before) / count).to(values.dtype)
