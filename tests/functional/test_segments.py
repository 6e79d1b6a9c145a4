"""Segments of answers by hand."""

from __future__ import annotations

import torch

from unipo import functional as F

INDEX = torch.tensor([0, 0, 0, 0, 0, 1, 2, 2, 2])


def test_every_kth_counts_marked_entries_of_each_segment_anew() -> None:
    marked = torch.tensor([0, 1, 1, 0, 1, 1, 1, 1, 1]).bool()
    assert F.every_kth(marked, INDEX, 1).tolist() == [1, 2, 4, 5, 6, 7, 8]
    assert F.every_kth(marked, INDEX, 2).tolist() == [1, 4, 5, 6, 8]
    assert F.every_kth(marked, INDEX, 9).tolist() == [1, 5, 6]
    assert F.every_kth(torch.zeros(9).bool(), INDEX, 2).tolist() == []


def test_segment_advantages_by_hand() -> None:
    """Boundaries before steps 1 and 3 of the first answer and 1 of the third; the second has none."""
    value, start = torch.tensor([0.5, 0.2, 0.75]).double(), torch.tensor([1, 3, 7])
    outcome = torch.tensor([1.0, 1.0, 0.0])
    found = F.segment_advantages(value, start, outcome, INDEX)
    expected = torch.tensor([0.0, -0.3, -0.3, 0.8, 0.8, 0.0, 0.0, -0.75, -0.75]).double()
    torch.testing.assert_close(found, expected)
    nothing = F.segment_advantages(value[:0], start[:0], outcome, INDEX)
    assert nothing.tolist() == [0.0] * 9
