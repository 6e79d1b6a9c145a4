"""Per-step losses to one number: every function returns (numerator, denominator), divided once by the caller.

Over a split of the rows both add up, means do not; a denominator is at least 1, so that nothing gives 0, not NaN (leave
empty parts out of such a sum). Masked steps are left out by the caller; episodes are counted as `n`, stepless ones too.
"""

from __future__ import annotations

from torch import Tensor

from unipo.episodes import segment_reduce
from unipo.functional.shapes import same_length

__all__ = ["constant", "episode_mean", "episode_sum", "token_mean"]


def token_mean(x: Tensor) -> tuple[Tensor, int]:
    """TOK: the sum over steps [N], and the number of steps (at least 1)."""
    return x.sum(), max(len(x), 1)


def episode_mean(x: Tensor, index: Tensor, n: int) -> tuple[Tensor, int]:
    """SEQ: the sum over episodes of the mean over their steps, and the number of episodes.

    An episode without steps adds 0 and counts.
    """
    same_length(x=x, index=index)
    return segment_reduce(x, index, n, "mean").sum(), max(n, 1)


def episode_sum(x: Tensor, n: int) -> tuple[Tensor, int]:
    """SUM: the sum over steps, and the number of episodes."""
    return x.sum(), max(n, 1)


def constant(x: Tensor, n: int, budget: float) -> tuple[Tensor, float]:
    """CONST: the sum over steps, and budget * number of episodes (Dr. GRPO, arXiv 2503.20783)."""
    if not budget > 0:
        raise ValueError(f"the token budget is {budget}: expected a positive number, such as the longest completion")
    return x.sum(), max(n, 1) * budget
