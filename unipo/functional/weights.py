"""Importance weights by denominator and level, and stabilisation as masks (True: the step may move the policy)."""

from __future__ import annotations

import torch
from torch import Tensor

from unipo.episodes import segment_reduce

LOG_LIMIT = 30.0
"""|log ratio| beyond which a ratio is clamped: e^30 squared is still finite in float32."""


def log_ratio(logp: Tensor, denominator_logp: Tensor) -> Tensor:
    """log pi - log mu: [N], in the policy's dtype."""
    return logp - denominator_logp.to(logp.dtype)


def token_ratio(log_ratio: Tensor, log_limit: float = LOG_LIMIT) -> Tensor:
    """r_n = exp(l_n): [N], the exponent clamped to +-log_limit."""
    return log_ratio.clamp(-log_limit, log_limit).exp()


def sequence_ratio(log_ratio: Tensor, index: Tensor, n: int, log_limit: float = LOG_LIMIT) -> Tensor:
    """s_i = exp(sum of l over the segment): [N] -> [n]."""
    return token_ratio(segment_reduce(log_ratio, index, n), log_limit)


def geometric_ratio(log_ratio: Tensor, index: Tensor, n: int, log_limit: float = LOG_LIMIT) -> Tensor:
    """gm_i = exp(mean of l over the segment): [N] -> [n] (GSPO, arXiv 2507.18071)."""
    return token_ratio(segment_reduce(log_ratio, index, n, "mean"), log_limit)


def clip_mask(ratio: Tensor, advantage: Tensor, low: float, high: float) -> Tensor:
    """PPO's clip (arXiv 1707.06347, eq. 7) as a mask: False where A > 0 and r > 1 + high, or A < 0 and r < 1 - low."""
    return ~(((advantage > 0) & (ratio > 1 + high)) | ((advantage < 0) & (ratio < 1 - low)))


def dual_clip_mask(ratio: Tensor, advantage: Tensor, limit: float) -> Tensor:
    """Dual clip (arXiv 1912.09729): False where A < 0 and r > limit."""
    return ~((advantage < 0) & (ratio > limit))


def two_side_mask(ratio: Tensor, low: float, high: float) -> Tensor:
    """False where r is outside [1 - low, 1 + high], whatever the advantage."""
    return (ratio >= 1 - low) & (ratio <= 1 + high)


def ring_mask(ratio: Tensor, advantage: Tensor, low: float, high: float, outer_low: float, outer_high: float) -> Tensor:
    """True in [1 - low, 1 + high], or A >= 0 and r <= 1 - outer_low, or A <= 0 and r >= 1 + outer_high (REC, 2509.24203)."""
    far = ((advantage >= 0) & (ratio <= 1 - outer_low)) | ((advantage <= 0) & (ratio >= 1 + outer_high))
    return two_side_mask(ratio, low, high) | far


def taper(ratio: Tensor, advantage: Tensor, positive: tuple[float, float], negative: tuple[float, float]) -> Tensor:
    """Clamp the ratio to `positive` where A >= 0 and to `negative` where A < 0 (TOPR, arXiv 2503.14286)."""
    return torch.where(advantage >= 0, ratio.clamp(*positive), ratio.clamp(*negative))


def effective_sample_size(weight: Tensor) -> Tensor:
    """(sum w)^2 / (n sum w^2): 1 for equal weights, 1/n when one dominates; 1 for an empty or all-zero [n]."""
    largest = weight.abs().amax() if len(weight) else weight.new_zeros(())
    if not float(largest) > 0:
        return weight.new_ones(())
    w = weight / largest
    return w.sum().square() / (len(w) * w.square().sum())
