"""Draws in proportion to priorities that change: a binary tree of sums in one array."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
_COARSE = 1 << 12
"""Nodes of the level that is searched at once; the levels below it are walked down."""


class SumTree:
    """`size` priorities, all 0 at first. Node i has children 2i and 2i + 1; the leaves are the last half.

    Sums are made anew from their two children, never added to: the tree is a function of its leaves, and does not drift.
    They are made when they are needed: several changes between two draws cost one way up.
    """

    def __init__(self, size: int) -> None:
        self.depth = max(size - 1, 1).bit_length()
        self._first = 1 << self.depth
        self._sums = np.zeros(2 * self._first)
        self._changed: list[Array] = []

    @property
    def total(self) -> float:
        self._settle()
        return float(self._sums[1])

    def __getitem__(self, leaves: Array) -> Array:
        values: Array = self._sums[self._first + leaves]
        return values

    def __setitem__(self, leaves: Array, priorities: Array | float) -> None:
        """Of a leaf that is named twice, the last priority counts."""
        nodes = self._first + leaves
        self._sums[nodes] = priorities
        self._changed.append(nodes)

    def _settle(self) -> None:
        if not self._changed:
            return
        nodes = np.concatenate(self._changed)
        self._changed = []
        for _ in range(self.depth):
            nodes = nodes >> 1
            left = 2 * nodes
            self._sums[nodes] = self._sums[left] + self._sums[left + 1]

    def find(self, mass: Array) -> Array:
        """[n] the leaves in whose share of the total the numbers `mass` [n] in [0, total) fall; never one of priority 0."""
        self._settle()
        width = min(_COARSE, self._first)
        coarse = self._sums[width : 2 * width]
        bounds = coarse.cumsum()
        mass = np.minimum(mass, np.nextafter(bounds[-1], 0))
        nodes = bounds.searchsorted(mass, side="right")
        mass = np.maximum(mass - (bounds[nodes] - coarse[nodes]), 0.0)
        nodes = nodes + width
        while width < self._first:
            nodes, width = 2 * nodes, 2 * width
            left = self._sums[nodes]
            go_right = (mass >= left) & (self._sums[nodes + 1] > 0)
            mass = np.where(go_right, mass - left, mass)
            nodes += go_right
        return nodes - self._first
