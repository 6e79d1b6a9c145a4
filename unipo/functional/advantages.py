"""Advantages: centre and scale chosen independently, discounting, GAE, and BNPO's adaptive scale.

Shapes: [E] episodes, [N] steps, [G] groups. Two rules hold exactly, whatever rounding does and without any eps: a group
of one has advantage 0, and so has a group of equal values (largest equals smallest; "std > 0" would be no test, since the
mean of 0.3, 0.3, 0.3 need not be 0.3). The slot that an advantage fills detaches it; nothing here does.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from unipo.episodes import segment_reduce
from unipo.functional.shapes import same_length

__all__ = [
    "batch_mean",
    "batch_std",
    "beta_parameters",
    "beta_scale",
    "discounted_return",
    "gae",
    "group_mean",
    "group_softmax",
    "group_std",
    "group_variance",
    "leave_one_out_mean",
    "normalize",
    "score_square",
    "softened",
    "weighted_leave_one_out_mean",
]


def group_mean(values: Tensor, index: Tensor, n: int) -> Tensor:
    """Mean of each entry's own group: [E] -> [E]. A group of equal values gives exactly that value."""
    same_length(values=values, index=index)
    low, high = (segment_reduce(values, index, n, how) for how in ("min", "max"))
    mean = segment_reduce(values, index, n, "mean")
    return torch.where(low == high, low, mean)[index]


def leave_one_out_mean(values: Tensor, index: Tensor, n: int) -> Tensor:
    """Mean of the other members of the group: [E] -> [E]; the value itself in a group of one (advantage 0).

    R - leave_one_out = G / (G - 1) * (R - mean) (RLOO, arXiv 2402.14740).
    """
    count = torch.bincount(index, minlength=n)[index]
    mean = group_mean(values, index, n)
    size = count.to(values.dtype)
    return torch.where(count > 1, values - (values - mean) * size / (size - 1).clamp(min=1), values)


def weighted_leave_one_out_mean(values: Tensor, weight: Tensor, index: Tensor, n: int) -> Tensor:
    """Weighted mean of the other members of the group, weights [E] >= 0: [E] -> [E]; their plain mean where they have none.

        b_i = sum_{j != i} w_j v_j / sum_{j != i} w_j

    Summed in float64 around the group's mean, so that equal values give exactly themselves and equal weights
    `leave_one_out_mean`; held between the smallest and the largest value of the group.
    """  # fmt: skip
    same_length(values=values, weight=weight, index=index)
    mean = group_mean(values, index, n)
    v, w = (values - mean).double(), weight.double()
    total = segment_reduce(w, index, n)[index]
    others, moment = total - w, segment_reduce(w * v, index, n)[index] - w * v
    weighed = others > 1e-12 * total
    low, high = (segment_reduce(v, index, n, how)[index] for how in ("min", "max"))
    found = (moment / torch.where(weighed, others, 1.0)).clamp(low, high).to(values.dtype)
    return torch.where(weighed, mean + found, leave_one_out_mean(values, index, n))


def score_square(logp: Tensor, collision: Tensor) -> Tensor:
    """|| grad_logits log pi(y) ||^2 = 1 - 2 pi(y) + sum_a pi(a)^2 of a softmax: [N], from log pi(y) and sum_a pi(a)^2."""
    same_length(logp=logp, collision=collision)
    return (1.0 - 2.0 * logp.exp() + collision).clamp(min=0.0)


def batch_mean(values: Tensor) -> Tensor:
    """Mean of all entries, as [E]; exactly their value when they are equal."""
    if len(values) == 0 or bool(values.max() == values.min()):
        return values.clone()
    return values.mean().expand_as(values)


def group_std(values: Tensor, index: Tensor, n: int, unbiased: bool = True) -> Tensor:
    """Standard deviation of each entry's own group: [E] -> [E]; exactly 0 for equal values and groups of one."""
    return group_variance(values, index, n, unbiased).sqrt()


def group_variance(values: Tensor, index: Tensor, n: int, unbiased: bool = True) -> Tensor:
    """Variance of each entry's own group: [E] -> [E]; exactly 0 for equal values and groups of one. Smooth, the std is not."""
    square = (values - group_mean(values, index, n)).square()
    count = torch.bincount(index, minlength=n).to(values.dtype)
    denominator = (count - 1 if unbiased else count).clamp(min=1)
    return (segment_reduce(square, index, n) / denominator)[index]


def group_softmax(values: Tensor, index: Tensor, n: int, where: Tensor) -> Tensor:
    """Softmax over the entries of each group that `where` (bool [E]) names: [E] -> [E]; 0 elsewhere. Shares that sum to 1."""
    same_length(values=values, index=index, where=where)
    top = segment_reduce(values.masked_fill(~where, -torch.inf), index, n, "max")[index]
    size = torch.where(where, (values - torch.where(where, top, values)).exp(), 0.0)
    return size / torch.where(where, segment_reduce(size, index, n)[index], 1.0)


def batch_std(values: Tensor, unbiased: bool = True) -> Tensor:
    """Standard deviation of all entries, as [E]; exactly 0 for fewer than two or equal entries."""
    if len(values) < 2 or bool(values.max() == values.min()):
        return torch.zeros_like(values)
    return values.std(correction=int(unbiased)).expand_as(values)


def normalize(values: Tensor, center: Tensor, scale: Tensor, eps: float = 0.0) -> Tensor:
    """(values - center) / (scale + eps): [E]; exactly 0 where the numerator or the whole denominator is 0.

    A group without spread (scale 0, eps 0) has advantage 0 whatever the centre; with eps > 0 only where its centre is its
    own mean.
    """
    same_length(values=values, center=center, scale=scale)
    centred, divisor = values - center, scale + eps
    silent = (centred == 0) | (divisor == 0)
    return torch.where(silent, 0.0, centred / torch.where(silent, 1.0, divisor))


def gae(reward: Tensor, value: Tensor, index: Tensor, n: int, gamma: float, lam: float,
        bootstrap: Tensor | None = None) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Generalised advantage estimation (arXiv 1506.02438, eq. 16) over ragged episodes.

    `reward`, `value` [N] in time order, `index` [N] the (sorted) episode of each step, `bootstrap` [n] the value after the
    last step (default 0: terminated). Returns (advantage [N], return = advantage + value [N]), both detached from nothing:
    detach `value` first if no gradient should pass. Raises `ValueError` where the steps are not sorted by episode.

        delta_t = r_t + gamma V_{t+1} - V_t;   A_t = delta_t + gamma lam A_{t+1}
    """
    same_length(reward=reward, value=value, index=index)
    if bool((index.diff() < 0).any()):
        raise ValueError("expected steps sorted by episode, found descending ids in `index`; sort the steps first")
    after = value.new_zeros(n) if bootstrap is None else bootstrap.to(value.dtype)
    if after.shape != (n,):
        raise ValueError(f"expected `bootstrap` [{n}], one value per episode, found {list(after.shape)}")
    continues = torch.cat([index[1:] == index[:-1], index.new_zeros(min(len(index), 1)).bool()])
    following = torch.where(continues, value.roll(-1), after[index])
    advantage = _discounted_sum(reward + gamma * following - value, index, gamma * lam)
    return advantage, advantage + value


def _discounted_sum(x: Tensor, index: Tensor, discount: float) -> Tensor:
    """y_t = sum_k discount^k x_{t+k} within the episode: [N], by doubling: pass j makes y_t cover 2^j steps."""
    longest = int(torch.bincount(index).max()) if len(index) else 0
    reach = 1
    while reach < longest:
        ahead = torch.where(index[reach:] == index[:-reach], x[reach:], 0.0)
        x = x + discount**reach * torch.cat([ahead, x.new_zeros(reach)])
        reach *= 2
    return x


def discounted_return(reward: Tensor, index: Tensor, n: int, gamma: float, bootstrap: Tensor | None = None) -> Tensor:
    """sum_k gamma^k r_{t+k} to the end of the episode, then the discounted `bootstrap` [n]: [N]. GAE without a critic."""
    return gae(reward, torch.zeros_like(reward), index, n, gamma, 1.0, bootstrap)[0]


def beta_parameters(rate: Tensor) -> tuple[float, float]:
    """BNPO's normaliser (arXiv 2506.02864): Beta(a, b) by moments over prompts' success rates [G], then 1 + a/3, 1 + b/3.

    One prompt, or equal rates: (1, 1). Both parameters are at least 1.
    """
    if len(rate) < 2 or bool(rate.max() == rate.min()):
        return 1.0, 1.0
    mean, variance = float(rate.double().mean()), float(rate.double().var())
    common = mean * (1.0 - mean) / variance - 1.0
    return max(1.0 + common * mean / 3.0, 1.0), max(1.0 + common * (1.0 - mean) / 3.0, 1.0)


def beta_scale(rate: Tensor, alpha: float, beta: float, largest: float = 1e6) -> Tensor:
    """Beta density f(p; alpha, beta) as a divisor [E], with 1/f clamped to [0, largest] and 0^0 = 1.

    alpha = beta = 1: f = 1 (Dr. GRPO); alpha = beta = 3/2: GRPO with the population std, up to pi / 8. In float64 inside:
    the log-gamma of a large parameter cancels.
    """
    p = rate.double()
    a, b = (torch.tensor(x, dtype=torch.float64, device=rate.device) for x in (alpha, beta))
    log_f = (
        torch.xlogy(a - 1, p) + torch.xlogy(b - 1, 1 - p) - (torch.lgamma(a) + torch.lgamma(b) - torch.lgamma(a + b))
    )
    return log_f.exp().clamp(min=1.0 / largest).to(rate.dtype)


def softened(values: Tensor, threshold: float, slope: float, steepness: float) -> Tensor:
    """Rewards that count little beyond a threshold c and much below it: [E] -> [E], continuous and rising.

        v >= c:  c + slope log(v - c + 1)          v < c:  c - (e^(steepness (c - v)) - 1) / (e^steepness - 1)

    TempSamp-R1 (arXiv 2509.18056) with c = 0.8, slope 0.01, steepness 1: 0 -> 0.0868, 0.5 -> 0.5964, 1 -> 0.8018.
    """  # fmt: skip
    above = threshold + slope * (values - threshold).clamp(min=0.0).log1p()
    below = threshold - torch.expm1(steepness * (threshold - values).clamp(min=0.0)) / math.expm1(steepness)
    return torch.where(values >= threshold, above, below)
