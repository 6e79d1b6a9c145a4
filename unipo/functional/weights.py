"""Importance weights by denominator and level, and stabilisation as masks (True: the step may move the policy).

A clipped objective min(r A, clip(r) A) has, away from its kinks, the gradient mask * r * A * grad(logp). Shapes: [N] steps;
`index` [N] are ids of any level (turn, episode) below `n`. A NaN (behaviour unknown) is passed on: select rows first.
"""

from __future__ import annotations

import torch
from torch import Tensor

from unipo.episodes import segment_reduce
from unipo.functional.shapes import same_length, same_shape

__all__ = [
    "clip_mask",
    "dual_clip_mask",
    "effective_sample_size",
    "geometric_ratio",
    "log_ratio",
    "ring_mask",
    "sequence_ratio",
    "shaped_slope",
    "taper",
    "token_ratio",
    "truncate",
    "two_side_mask",
]

LOG_LIMIT = 30.0
"""|log ratio| beyond which a ratio is clamped: e^30 squared is still finite in float32."""


def log_ratio(logp: Tensor, denominator_logp: Tensor) -> Tensor:
    """log pi - log mu: [N], in the policy's dtype."""
    same_shape(logp=logp, denominator_logp=denominator_logp)
    return logp - denominator_logp.to(logp.dtype)


def token_ratio(log_ratio: Tensor, log_limit: float = LOG_LIMIT) -> Tensor:
    """r_n = exp(l_n): [N], the exponent clamped to +-log_limit (no gradient beyond it)."""
    return log_ratio.clamp(-log_limit, log_limit).exp()


def sequence_ratio(log_ratio: Tensor, index: Tensor, n: int, log_limit: float = LOG_LIMIT) -> Tensor:
    """s_i = exp(sum of l over the segment): [N] -> [n], summed before it is clamped; 1 for an empty one."""
    same_length(log_ratio=log_ratio, index=index)
    return token_ratio(segment_reduce(log_ratio, index, n), log_limit)


def geometric_ratio(log_ratio: Tensor, index: Tensor, n: int, log_limit: float = LOG_LIMIT) -> Tensor:
    """gm_i = exp(mean of l over the segment): [N] -> [n] (GSPO, arXiv 2507.18071, eq. 7); 1 for an empty one."""
    same_length(log_ratio=log_ratio, index=index)
    return token_ratio(segment_reduce(log_ratio, index, n, "mean"), log_limit)


def clip_mask(ratio: Tensor, advantage: Tensor, low: float, high: float) -> Tensor:
    """PPO's clip (arXiv 1707.06347, eq. 7) as a mask: False where A > 0 and r > 1 + high, or A < 0 and r < 1 - low."""
    same_shape(ratio=ratio, advantage=advantage)
    return ~(((advantage > 0) & (ratio > 1 + high)) | ((advantage < 0) & (ratio < 1 - low)))


def dual_clip_mask(ratio: Tensor, advantage: Tensor, limit: float) -> Tensor:
    """Dual clip (arXiv 1912.09729): False where A < 0 and r > limit (limit > 1)."""
    same_shape(ratio=ratio, advantage=advantage)
    return ~((advantage < 0) & (ratio > limit))


def two_side_mask(ratio: Tensor, low: float, high: float) -> Tensor:
    """False where r is outside [1 - low, 1 + high], whatever the advantage."""
    return (ratio >= 1 - low) & (ratio <= 1 + high)


def ring_mask(ratio: Tensor, advantage: Tensor, low: float, high: float, outer_low: float, outer_high: float) -> Tensor:
    """True in [1 - low, 1 + high], or A >= 0 and r <= 1 - outer_low, or A <= 0 and r >= 1 + outer_high (REC, 2509.24203)."""
    same_shape(ratio=ratio, advantage=advantage)
    far = ((advantage >= 0) & (ratio <= 1 - outer_low)) | ((advantage <= 0) & (ratio >= 1 + outer_high))
    return two_side_mask(ratio, low, high) | far


def truncate(ratio: Tensor, high: float, low: float = 0.0) -> Tensor:
    """The ratio held in [low, high]; CISPO's and AIPO's weight is min(r, high) (arXiv 2506.13585, 2505.24034).

    Where low equals high the ratio is not read, so a NaN (behaviour unknown) gives that constant.
    """
    return torch.full_like(ratio, low) if low == high else ratio.clamp(low, high)


def taper(
    ratio: Tensor,
    advantage: Tensor,
    positive: tuple[float, float] = (1.0, 1.0),
    negative: tuple[float, float] = (0.0, 1.0),
) -> Tensor:
    """Hold the ratio in `positive` where A >= 0 and in `negative` where A < 0 (TOPR, arXiv 2503.14286: the defaults).

    (0, inf) twice is importance sampling; (1, 1) twice ignores where the samples came from. With positives at (1, 1) their
    behaviour may be unknown (NaN).
    """
    same_shape(ratio=ratio, advantage=advantage)
    raised, lowered = truncate(ratio, positive[1], positive[0]), truncate(ratio, negative[1], negative[0])
    return torch.where(advantage >= 0, raised, lowered)


def shaped_slope(logp: Tensor, gamma: float) -> Tensor:
    """d f / d log p = gamma p / (p + gamma)^2 of the shaped probability f(p) = p / (p + gamma) (LUFFY, arXiv 2504.14945): [N].

    10 p for p -> 0 with gamma = 0.1, 1/4 at p = gamma, where it is largest, and gamma / (1 + gamma)^2 at p = 1.
    """
    p = logp.exp()
    return gamma * p / (p + gamma).square()


def effective_sample_size(weight: Tensor) -> Tensor:
    """(sum w)^2 / (n sum w^2): 1 for equal weights, 1/n when one dominates; 1 for an empty or all-zero [n]."""
    largest = weight.abs().amax() if len(weight) else weight.new_zeros(())
    if not float(largest) > 0:
        return weight.new_ones(())
    w = weight / largest
    return w.sum().square() / (len(w) * w.square().sum())
