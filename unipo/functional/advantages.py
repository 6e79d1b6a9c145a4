"""Advantages: centre and scale chosen independently, discounting, GAE, and BNPO's adaptive scale."""

from __future__ import annotations

import torch
from torch import Tensor

from unipo.episodes import offsets_of, segment_reduce


def group_mean(values: Tensor, index: Tensor, n: int) -> Tensor:
    """Mean of each entry's own group: [E] -> [E]. A group of equal values gives exactly that value."""
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


def batch_mean(values: Tensor) -> Tensor:
    """Mean of all entries, as [E]."""
    return values.mean().expand_as(values) if len(values) else values


def group_std(values: Tensor, index: Tensor, n: int, unbiased: bool = True) -> Tensor:
    """Standard deviation of each entry's own group: [E] -> [E]; exactly 0 for equal values and groups of one."""
    square = (values - group_mean(values, index, n)).square()
    count = torch.bincount(index, minlength=n).to(values.dtype)
    denominator = (count - 1 if unbiased else count).clamp(min=1)
    return (segment_reduce(square, index, n) / denominator).sqrt()[index]


def batch_std(values: Tensor) -> Tensor:
    """Standard deviation of all entries (Bessel's correction), as [E]; 0 for fewer than two or equal entries."""
    if len(values) < 2 or bool(values.max() == values.min()):
        return torch.zeros_like(values)
    return values.std().expand_as(values)


def normalize(values: Tensor, center: Tensor, scale: Tensor) -> Tensor:
    """(values - center) / scale, exactly 0 where the numerator is 0, also at scale 0: [E]."""
    centred = values - center
    return torch.where(
        centred == 0, torch.zeros_like(centred), centred / torch.where(scale == 0, torch.ones_like(scale), scale)
    )


def gae(reward: Tensor, value: Tensor, index: Tensor, n: int, gamma: float, lam: float,
        bootstrap: Tensor | None = None) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Generalised advantage estimation (arXiv 1506.02438, eq. 16) over ragged episodes.

    `reward`, `value` [N] in time order, `index` [N] the (sorted) episode of each step, `bootstrap` [n] the value after the
    last step (default 0: terminated). Returns (advantage [N], return = advantage + value [N]), both detached from nothing:
    detach `value` first if no gradient should pass.

        delta_t = r_t + gamma V_{t+1} - V_t;   A_t = delta_t + gamma lam A_{t+1}
    """
    counts = torch.bincount(index, minlength=n)
    starts = offsets_of(counts)[:-1]
    last = torch.zeros(n, dtype=value.dtype, device=value.device) if bootstrap is None else bootstrap.to(value.dtype)
    following, ahead = last, torch.zeros_like(last)
    advantage = torch.zeros_like(value)
    for back in range(int(counts.max()) if n else 0):
        live = (counts > back).nonzero().squeeze(1)
        at = starts[live] + counts[live] - 1 - back
        delta = reward[at] + gamma * following[live] - value[at]
        step = delta + gamma * lam * ahead[live]
        advantage = advantage.index_put((at,), step)
        ahead, following = ahead.index_put((live,), step), following.index_put((live,), value[at])
    return advantage, advantage + value


def discounted_return(reward: Tensor, index: Tensor, n: int, gamma: float) -> Tensor:
    """sum_k gamma^k r_{t+k} to the end of the episode: [N]."""
    return gae(reward, torch.zeros_like(reward), index, n, gamma, 1.0)[0]


def beta_parameters(rate: Tensor) -> tuple[float, float]:
    """BNPO's normaliser (arXiv 2506.02864): Beta(a, b) by moments over prompts' success rates [G], then 1 + a/3, 1 + b/3.

    One prompt, or equal rates: (1, 1). Both parameters are at least 1.
    """
    if len(rate) < 2 or bool(rate.max() == rate.min()):
        return 1.0, 1.0
    mean, variance = float(rate.mean()), float(rate.var())
    common = mean * (1.0 - mean) / variance - 1.0
    return max(1.0 + common * mean / 3.0, 1.0), max(1.0 + common * (1.0 - mean) / 3.0, 1.0)


def beta_scale(rate: Tensor, alpha: float, beta: float, largest: float = 1e6) -> Tensor:
    """Beta density f(p; alpha, beta) as a divisor [E], with 1/f clamped to [0, largest] and 0^0 = 1."""
    a, b = torch.tensor(alpha, dtype=rate.dtype), torch.tensor(beta, dtype=rate.dtype)
    log_f = (
        torch.xlogy(a - 1, rate)
        + torch.xlogy(b - 1, 1 - rate)
        - (torch.lgamma(a) + torch.lgamma(b) - torch.lgamma(a + b))
    )
    return log_f.exp().clamp(min=1.0 / largest)
