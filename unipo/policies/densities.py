"""Densities, divergences and quantile functions that action distributions are made of."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from scipy.special import betainc, betaincc, betaincinv
from torch import Tensor
from torch.nn.functional import softplus

HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)
LOG_4 = 2 * math.log(2)


def inside(action: Tensor) -> Tensor:
    """`action` kept one rounding step off -1 and 1, where squashed and Beta densities are 0 or infinite."""
    edge = torch.finfo(action.dtype).eps
    return action.clamp(-1 + edge, 1 - edge)


def inverse_cdf(probability: Tensor, noise: Tensor) -> Tensor:
    """[N] int64: the category a with F(a - 1) < Phi(noise) <= F(a), from `probability` [N, n] and normal `noise` [N].

    Phi is scaled by the rounded total of the probabilities, so that a trailing category of probability 0 is never drawn.
    """
    cdf = probability.detach().cumsum(-1)
    level = torch.special.ndtr(noise)[..., None] * cdf[..., -1:]
    return (level > cdf[..., :-1]).sum(-1)


# ---- Gaussian ------------------------------------------------------------------------------------------------------
def normal_logp(z: Tensor, log_std: Tensor) -> Tensor:
    """log N(mean + std z; mean, std) summed over the last axis; z and `log_std` [..., A]."""
    return -torch.addcmul(log_std, z, z, value=0.5).sum(-1) - z.shape[-1] * HALF_LOG_2PI


def log_slope(u: Tensor) -> Tensor:
    """log d tanh(u)/du = log(1 - tanh(u)^2) = 2 (log 2 - u - softplus(-2u)), no cancellation at large |u|; summed."""
    return u.shape[-1] * LOG_4 - 2 * (u + softplus(-2 * u)).sum(-1)


def squashed_logp(z: Tensor, log_std: Tensor, u: Tensor) -> Tensor:
    """log-density of tanh(u), u = mean + std z: `normal_logp` - `log_slope`, with one sum over the last axis."""
    cost = torch.addcmul(log_std, z, z, value=0.5).sub(u + softplus(-2 * u), alpha=2)
    return -cost.sum(-1) - z.shape[-1] * (HALF_LOG_2PI + LOG_4)


def normal_kl(mean_p: Tensor, log_std_p: Tensor, mean_q: Tensor, log_std_q: Tensor) -> Tensor:
    """KL of diagonal Gaussians, summed over the last axis."""
    spread = (2 * (log_std_p - log_std_q)).exp() + ((mean_p - mean_q) * (-log_std_q).exp()).square()
    return (log_std_q - log_std_p + 0.5 * (spread - 1)).sum(-1)


# ---- Beta on [0, 1] ------------------------------------------------------------------------------------------------
def log_beta(alpha: Tensor, beta: Tensor) -> Tensor:
    """log B(alpha, beta)."""
    return torch.lgamma(alpha) + torch.lgamma(beta) - torch.lgamma(alpha + beta)


def beta_logp(alpha: Tensor, beta: Tensor, x: Tensor) -> Tensor:
    """log-density of Beta(alpha, beta) at `x` in (0, 1), elementwise."""
    return (alpha - 1) * x.log() + (beta - 1) * torch.log1p(-x) - log_beta(alpha, beta)


def beta_entropy(alpha: Tensor, beta: Tensor) -> Tensor:
    """Differential entropy, elementwise."""
    digamma = torch.digamma
    return (
        log_beta(alpha, beta)
        - (alpha - 1) * digamma(alpha)
        - (beta - 1) * digamma(beta)
        + (alpha + beta - 2) * digamma(alpha + beta)
    )


def beta_kl(alpha_p: Tensor, beta_p: Tensor, alpha_q: Tensor, beta_q: Tensor) -> Tensor:
    """KL(Beta_p || Beta_q), elementwise."""
    total = alpha_p - alpha_q + beta_p - beta_q
    return (
        log_beta(alpha_q, beta_q)
        - log_beta(alpha_p, beta_p)
        + (alpha_p - alpha_q) * torch.digamma(alpha_p)
        + (beta_p - beta_q) * torch.digamma(beta_p)
        - total * torch.digamma(alpha_p + beta_p)
    )


def beta_quantile(alpha: Tensor, beta: Tensor, u: Tensor) -> Tensor:
    """x with F(x; alpha, beta) = `u`, elementwise; differentiable in alpha and beta, `u` constant."""
    return _BetaQuantile.apply(alpha, beta, u)


class _BetaQuantile(torch.autograd.Function):
    """dx/dalpha = -(dF/dalpha) / f(x): F(x) = u stays. dF by central differences in float64, in the smaller tail."""

    @staticmethod
    def forward(ctx: Any, alpha: Tensor, beta: Tensor, u: Tensor) -> Tensor:
        a, b, level = (t.detach().cpu().double().numpy() for t in (alpha, beta, u))
        x = np.clip(betaincinv(a, b, level), 1e-12, 1 - 1e-12)
        ctx.known = a, b, x
        return torch.from_numpy(np.asarray(x)).to(alpha)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        a, b, x = ctx.known
        density = beta_logp(*(torch.from_numpy(np.asarray(t)) for t in (a, b, x))).exp().clamp(min=1e-300).numpy()
        by_alpha = _tail_change(a * (1 - 1e-5), b, a * (1 + 1e-5), b, x) / (2e-5 * a)
        by_beta = _tail_change(a, b * (1 - 1e-5), a, b * (1 + 1e-5), x) / (2e-5 * b)
        alpha, beta = (grad * torch.from_numpy(-d / density).to(grad) for d in (by_alpha, by_beta))
        return alpha, beta, None


def _tail_change(a0: Any, b0: Any, a1: Any, b1: Any, x: Any) -> Any:
    """F(x; a1, b1) - F(x; a0, b0), by whichever tail is smaller: no cancellation near F = 1."""
    lower = betainc(a1, b1, x) - betainc(a0, b0, x)
    upper = betaincc(a0, b0, x) - betaincc(a1, b1, x)
    return np.where(betainc(a0, b0, x) < 0.5, lower, upper)
