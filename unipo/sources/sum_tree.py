"""Draws in proportion to priorities that change: a binary tree of sums in one array."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


class SumTree:
    """`size` priorities, all 0 at first. Node i has children 2i and 2i + 1; the leaves are the last half.

    Sums are made anew from their two children, never added to: the tree is a function of its leaves, and does not drift.
    """

    def __init__(self, size: int) -> None:
        self.depth = max(size - 1, 1).bit_length()
        self._first = 1 << self.depth
        self._sums = np.zeros(2 * self._first)

    @property
    def total(self) -> float:
        return float(self._sums[1])

    def __getitem__(self, leaves: Array) -> Array:
        values: Array = self._sums[self._first + leaves]
        return values

    def __setitem__(self, leaves: Array, priorities: Array | float) -> None:
        """Of a leaf that is named twice, the last priority counts."""
        nodes = self._first + leaves
        self._sums[nodes] = priorities
        for _ in range(self.depth):
            nodes = nodes >> 1
            self._sums[nodes] = self._sums[2 * nodes] + self._sums[2 * nodes + 1]

    def find(self, mass: Array) -> Array:
        """[n] the leaves in whose share of the total the numbers `mass` [n] in [0, total) fall; never one of priority 0."""
        nodes = np.ones(len(mass), dtype=np.int64)
        for _ in range(self.depth):
            left, right = self._sums[2 * nodes], self._sums[2 * nodes + 1]
            go_right = (mass >= left) & (right > 0)
            mass = np.where(go_right, mass - left, mass)
            nodes = 2 * nodes + go_right
        return nodes - self._first
