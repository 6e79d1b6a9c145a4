"""Divergences: Monte-Carlo estimators from log-ratios, and closed forms over full distributions.

An estimator of KL(pi || q), differentiated directly, need not give the gradient of what it estimates. With samples y of
pi, l = log pi(y) - log q(y) and rho = pi / sg(pi_old), the expected gradients are

    k1 = l                     0 (of use inside a reward or an advantage only)
    k2 = l^2 / 2               that of KL(pi || q)
    k3 = e^-l - 1 + l          that of KL(q || pi)
    rho k3                     that of KL(pi || q); sample by sample rho l grad log pi

(estimators: Schulman, "Approximating KL divergence", 2020). Full distributions are normalised log-probabilities [n, V];
-inf marks an excluded outcome, which adds exactly 0 to value and gradient.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from unipo.functional.shapes import same_shape
from unipo.functional.weights import LOG_LIMIT

__all__ = ["entropy", "generalised_jsd", "k1", "k2", "k3", "kl", "weighted_k3"]


def k1(log_ratio: Tensor) -> Tensor:
    """l = log pi - log q of samples of pi: unbiased for KL(pi || q); its own expected gradient is 0, so not a loss."""
    return log_ratio


def k2(log_ratio: Tensor) -> Tensor:
    """l^2 / 2: on samples of pi its gradient is that of KL(pi || q)."""
    return log_ratio.square() / 2


def k3(log_ratio: Tensor, log_limit: float = LOG_LIMIT) -> Tensor:
    """e^-l - 1 + l: unbiased for KL(pi || q), never negative; its gradient on samples of pi is that of KL(q || pi).

    Small l is evaluated through expm1, so float32 keeps its l^2 / 2 there; l is held above -log_limit (no gradient below).
    """
    held = log_ratio.clamp(min=-log_limit)
    return torch.expm1(-held) + held


def weighted_k3(log_ratio: Tensor, ratio: Tensor, log_limit: float = LOG_LIMIT) -> Tensor:
    """rho k3: [N], differentiated through `ratio` rho = pi / sg(pi_old) too: the gradient of KL(pi || q) for y of pi_old."""
    same_shape(log_ratio=log_ratio, ratio=ratio)
    return ratio * k3(log_ratio, log_limit)


def kl(logp: Tensor, logq: Tensor) -> Tensor:
    """KL(p || q) of full distributions, log-probabilities [n, V] -> [n]. Infinite where q excludes what p does not."""
    same_shape(logp=logp, logq=logq)
    outside = torch.isneginf(logp)  # filled on both sides before subtracting: -inf times 0 would make the gradient NaN
    return (logp.exp() * (logp.masked_fill(outside, 0.0) - logq.masked_fill(outside, 0.0))).sum(-1)


def entropy(logp: Tensor) -> Tensor:
    """-sum p log p in nats: [n, V] -> [n]."""
    return -kl(logp, torch.zeros_like(logp))


def generalised_jsd(logp_student: Tensor, logp_teacher: Tensor, beta: float) -> Tensor:
    """D_beta = beta KL(T || M) + (1 - beta) KL(S || M), M = (1 - beta) S + beta T: [n, V] -> [n] (GKD, arXiv 2306.13649).

    By definition beta = 0 is KL(T || S) (forward) and beta = 1 is KL(S || T) (reverse). These
    ends are no limits: D_beta / beta -> KL(T || S) while D_beta -> 0. Raises `ValueError` for beta outside [0, 1].
    """
    same_shape(logp_student=logp_student, logp_teacher=logp_teacher)
    if not 0 <= beta <= 1:
        raise ValueError(f"beta is {beta}: expected a number in [0, 1]")
    if beta == 0:
        return kl(logp_teacher, logp_student)
    if beta == 1:
        return kl(logp_student, logp_teacher)
    neither = torch.isneginf(logp_student) & torch.isneginf(logp_teacher)  # logaddexp(-inf, -inf) has a NaN gradient
    student, teacher = logp_student.masked_fill(neither, 0.0), logp_teacher.masked_fill(neither, 0.0)
    mixture = torch.logaddexp(student + math.log1p(-beta), teacher + math.log(beta))
    return beta * kl(logp_teacher, mixture) + (1 - beta) * kl(logp_student, mixture)
