"""How much raises and how much lowers probabilities, and clip bounds that balance them (BAPO, arXiv 2510.18927)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from unipo.functional.shapes import same_shape

__all__ = ["active_balance", "balanced_bounds", "value_balance"]

Pair = tuple[float, float]


def active_balance(ratio: Tensor, advantage: Tensor, low: float, high: float, dual: float,
                   weight: Tensor | None = None) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(S+, S-) of the steps [N] that a clip to [low, high] lets move, S- up to the dual clip; `weight` [N], default 1.

        S+ = sum_{A > 0, r <= high} w r A        S- = sum_{A < 0, low <= r <= dual} w r |A|

    The l1 norms of the coefficients of each sign: raising `high` raises S+, raising `low` lowers S-.
    """
    same_shape(ratio=ratio, advantage=advantage)
    push = ratio * advantage if weight is None else weight * ratio * advantage
    up = (advantage > 0) & (ratio <= high)
    down = (advantage < 0) & (ratio >= low) & (ratio <= dual)
    return torch.where(up, push, 0.0).sum(), -torch.where(down, push, 0.0).sum()


def value_balance(ratio: Tensor, advantage: Tensor, low: float, high: float, dual: float,
                  weight: Tensor | None = None) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(S+, S-) as parts of the loss's value: S+ = sum_{A > 0} w min(r, high) A, S- = sum_{A < 0} w max(r, low) |A|.

    A clipped step counts at its bound here, so that raising `low` raises S-. `dual` is not looked at.
    """
    same_shape(ratio=ratio, advantage=advantage)
    size = advantage if weight is None else weight * advantage
    up = torch.where(advantage > 0, ratio.clamp(max=high) * size, 0.0)
    down = torch.where(advantage < 0, ratio.clamp(min=low) * size, 0.0)
    return up.sum(), -down.sum()


def balanced_bounds(sums: Callable[[float, float], tuple[Tensor, Tensor]], start: Pair, limit: Pair, step: Pair,
                    target: float = 1.0, order: tuple[int, int] = (0, 1)) -> Pair:  # fmt: skip
    """(low, high): raised from `start` by `step` up to `limit`, until S+ >= target * S-, as `sums(low, high)` says.

    One bound is raised to its limit before the other; `order` (0, 1) raises low first. Raises ValueError for a limit below
    its start, and for a step that is not positive.
    """
    if limit[0] < start[0] or limit[1] < start[1] or min(step) <= 0:
        raise ValueError(
            f"bounds start at {start}, end at {limit}, in steps of {step}: expected start <= end, steps > 0"
        )
    bounds = list(start)

    def met() -> bool:
        up, down = sums(bounds[0], bounds[1])
        return bool(up >= target * down)

    for side in order:
        raises = 0
        while bounds[side] < limit[side] and not met():
            raises += 1
            bounds[side] = min(start[side] + raises * step[side], limit[side])
    return bounds[0], bounds[1]
