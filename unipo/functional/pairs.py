"""Losses on margins between two answers, and the quadratic over all pairs of a group."""

from __future__ import annotations

import torch
from torch import Tensor

from unipo.episodes import segment_reduce


def logistic(margin: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """-(1 - s) log sigmoid(m) - s log sigmoid(-m): [P] (DPO, arXiv 2305.18290, eq. 7)."""
    log_sigmoid = torch.nn.functional.logsigmoid
    return -(1 - label_smoothing) * log_sigmoid(margin) - label_smoothing * log_sigmoid(-margin)


def squared(margin: Tensor, target: float) -> Tensor:
    """(m - target)^2: [P] (IPO, arXiv 2310.12036, with target 1 / (2 beta) on the bare log-ratio margin)."""
    return (margin - target).square()


def hinge(margin: Tensor) -> Tensor:
    """max(0, 1 - m): [P] (SLiC, arXiv 2305.10425)."""
    return (1 - margin).clamp(min=0)


def pairwise_square(values: Tensor, index: Tensor, n: int) -> Tensor:
    """Mean over the unordered pairs of each group of (a_i - a_j)^2: [E] -> [n]; 0 for a group of one.

    In O(E): the mean over pairs is 2 G / (G - 1) times the population variance.
    """
    count = torch.bincount(index, minlength=n).to(values.dtype)
    mean = segment_reduce(values, index, n, "mean")
    total = segment_reduce((values - mean[index]).square(), index, n)
    return 2 * total / (count - 1).clamp(min=1)
