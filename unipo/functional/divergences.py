"""Divergences: Monte-Carlo estimators from log-ratios, and closed forms over full distributions."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def k1(log_ratio: Tensor) -> Tensor:
    """l = log pi - log q of samples of pi: unbiased for KL(pi || q); its own expected gradient is 0, so not a loss."""
    return log_ratio


def k2(log_ratio: Tensor) -> Tensor:
    """l^2 / 2: on samples of pi its gradient is that of KL(pi || q)."""
    return log_ratio.square() / 2


def k3(log_ratio: Tensor) -> Tensor:
    """e^-l - 1 + l: unbiased for KL(pi || q), never negative; its gradient on samples of pi is that of KL(q || pi).

    Small l is evaluated through expm1, so float32 keeps its l^2 / 2 there.
    """
    return torch.expm1(-log_ratio) + log_ratio


def kl(logp: Tensor, logq: Tensor) -> Tensor:
    """KL(p || q) of full distributions, log-probabilities [n, V] -> [n]. Zero-probability entries of p add 0."""
    p = logp.exp()
    return torch.where(p > 0, p * (logp - logq), 0.0).sum(-1)


def entropy(logp: Tensor) -> Tensor:
    """-sum p log p in nats: [n, V] -> [n]."""
    p = logp.exp()
    return -torch.where(p > 0, p * logp, 0.0).sum(-1)


def generalised_jsd(logp_student: Tensor, logp_teacher: Tensor, beta: float) -> Tensor:
    """D_beta = beta KL(T || M) + (1 - beta) KL(S || M), M = (1 - beta) S + beta T: [n, V] -> [n] (GKD, arXiv 2306.13649).

    By definition beta = 0 is KL(T || S) (forward) and beta = 1 is KL(S || T) (reverse).
    """
    if not 0 <= beta <= 1:
        raise ValueError(f"beta is {beta}: expected a number in [0, 1]")
    if beta == 0:
        return kl(logp_teacher, logp_student)
    if beta == 1:
        return kl(logp_student, logp_teacher)
    mixture = torch.logaddexp(logp_student + math.log1p(-beta), logp_teacher + math.log(beta))
    return beta * kl(logp_teacher, mixture) + (1 - beta) * kl(logp_student, mixture)
