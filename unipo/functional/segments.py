"""Answers that are cut into segments: where they begin, and what each is worth.

Shapes: [N] steps, [E] episodes, [B] boundaries. A boundary is the flat position of the step that begins a segment; it
stands for the prefix before that step. Boundaries rise, and a segment ends where the next one or the episode's end is.
"""

from __future__ import annotations

import torch
from torch import Tensor

from unipo.functional.shapes import same_length

__all__ = ["every_kth", "segment_advantages"]


def every_kth(marked: Tensor, index: Tensor, k: int) -> Tensor:
    """[B]: positions of the marked entries (bool [N]) number 0, k, 2k, ... of each segment of `index` [N] (sorted)."""
    same_length(marked=marked, index=index)
    places = marked.nonzero().squeeze(1)
    owner = index[places]
    first = torch.searchsorted(owner, owner)
    return places[(torch.arange(len(places), device=places.device) - first) % k == 0]


def segment_advantages(value: Tensor, start: Tensor, outcome: Tensor, index: Tensor) -> Tensor:
    """V(next boundary) - V(own boundary), given to every step of the segment: [N] (SPO, arXiv 2505.23564, eq. 4).

    `value` [B] of the prefixes before the steps `start` [B], `outcome` [E] what an episode is worth at its end, `index`
    [N] the episode of each step. Steps before their episode's first boundary get 0. Along an episode the segments
    telescope: they add up to outcome - V(first boundary).
    """
    same_length(value=value, start=start)
    if not len(start):
        return torch.zeros(len(index), dtype=value.dtype, device=value.device)
    owner = index[start]
    last = torch.ones_like(owner, dtype=torch.bool)
    last[:-1] = owner[1:] != owner[:-1]
    after = torch.where(last, outcome[owner].to(value.dtype), value.roll(-1))
    segment = torch.bucketize(torch.arange(len(index), device=index.device), start, right=True) - 1
    begun = segment.clamp(min=0)
    own = (segment >= 0) & (owner[begun] == index)
    return torch.where(own, (after - value)[begun], 0.0)
