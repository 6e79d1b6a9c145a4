"""Best of n: the answer that a score likes best among n samples of a policy, as a distribution and as an estimate.

It needs no training, moves away from the policy by at most log n - (n - 1) / n nats, and is hard to beat at that distance
(arXiv 2112.09332, 2401.01879): the yardstick of everything that is trained on a score.

Shapes: A enumerable answers, with log-probabilities [..., A] and scores [A] or [..., A] in float64.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def best_of_n(logp: Tensor, score: Tensor, n: float) -> Tensor:
    """log pi_n [..., A]: of n independent samples the one with the highest score, equal ones by lot.

        pi_n(y) = p(y) / P(s = s_y) * ( P(s <= s_y)^n - P(s < s_y)^n )

    n need not be whole (the interpolation is the distribution's own). Raises ValueError for n below 1.
    """
    if n < 1:
        raise ValueError(f"n is {n}: expected at least one sample")
    p, (score, _) = logp.exp(), torch.broadcast_tensors(score, logp)
    below = ((score[..., None, :] < score[..., :, None]) * p[..., None, :]).sum(-1)
    equal = ((score[..., None, :] == score[..., :, None]) * p[..., None, :]).sum(-1)
    return logp + torch.log((below + equal).clamp(max=1.0) ** n - below**n) - torch.log(equal)


def most_kl(n: float) -> float:
    """log n - (n - 1) / n, in nats: KL(best of n || policy) is never above, and equal where no two answers score the same
    and none has much probability (arXiv 2401.01879, theorem 1)."""
    return math.log(n) - (n - 1) / n


def expected_best(score: Tensor, worth: Tensor, n: int) -> Tensor:
    """[...]: unbiased estimate of E[ worth of the best of n by score ] from N >= n samples [..., N].

    The mean over all subsets of size n: the i-th smallest score (i = 1..N) is the best of C(i-1, n-1) of C(N, n); samples
    with equal scores share what is theirs. Raises ValueError for n outside 1..N.
    """
    N = score.shape[-1]
    if not 1 <= n <= N:
        raise ValueError(f"n is {n}: expected 1 to {N}, the number of samples")
    share = [math.comb(i, n) / math.comb(N, n) for i in range(N + 1)]
    until = torch.tensor(share, dtype=torch.float64)
    below = (score[..., None, :] < score[..., :, None]).sum(-1)
    equal = (score[..., None, :] == score[..., :, None]).sum(-1)
    weight = (until[below + equal] - until[below]) / equal
    return (weight * worth.double()).sum(-1)
