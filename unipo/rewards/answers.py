"""Where the answer is in a completion."""

from __future__ import annotations

MARK = "#"
"""In a completion, the answer follows the last mark; without a mark all of it is the answer."""


def final_answer(completion: str) -> str:
    """What follows the last mark (all of it without one), stripped."""
    return completion.rpartition(MARK)[2].strip()
