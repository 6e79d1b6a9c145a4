"""Losses on margins between two answers, and the quadratic over all pairs of a group."""

from __future__ import annotations

import torch
from torch import Tensor

from unipo.episodes import segment_reduce
from unipo.functional.advantages import group_mean
from unipo.functional.shapes import same_length

__all__ = ["hinge", "logistic", "pair_margin", "pairwise_square", "squared"]


def pair_margin(score: Tensor, chosen: Tensor, index: Tensor, n: int) -> Tensor:
    """Sum of `score` over the chosen rows of each pair - sum over its rejected rows: [P].

    `score`, `chosen` (bool) and the pair's id `index` are per row: per episode, or per step to sum scores over steps.
    """
    same_length(score=score, chosen=chosen, index=index)
    return segment_reduce(torch.where(chosen, score, -score), index, n)


def logistic(margin: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """-(1 - s) log sigmoid(m) - s log sigmoid(-m): [P] (DPO, arXiv 2305.18290, eq. 7).

    s is the probability that a label is flipped (conservative DPO): the minimum is at m = log((1 - s) / s).
    """
    log_sigmoid = torch.nn.functional.logsigmoid
    return -(1 - label_smoothing) * log_sigmoid(margin) - label_smoothing * log_sigmoid(-margin)


def squared(margin: Tensor, target: float) -> Tensor:
    """(m - target)^2: [P] (IPO, arXiv 2310.12036, with target 1 / (2 beta) on the bare log-ratio margin)."""
    return (margin - target).square()


def hinge(margin: Tensor, target: float = 1.0) -> Tensor:
    """max(0, target - m): [P] (SLiC-HF, arXiv 2305.10425)."""
    return (target - margin).clamp(min=0)


def pairwise_square(values: Tensor, index: Tensor, n: int) -> Tensor:
    """Mean over the unordered pairs of each group of (a_i - a_j)^2: [E] -> [n]; 0 for a group of one.

    In O(E): the mean over pairs is 2 G / (G - 1) times the population variance. CoPG (arXiv 2406.19185) is this over
    2 beta at a = R - beta log(pi / ref); the gradient in a_i is 4 / (G - 1) * (a_i - mean a).
    """
    count = torch.bincount(index, minlength=n).to(values.dtype)
    total = segment_reduce((values - group_mean(values, index, n)).square(), index, n)
    return 2 * total / (count - 1).clamp(min=1)
