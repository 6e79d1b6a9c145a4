"""The reward of the end-to-end rows, called by both sides: the share of words that end in an even digit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def even_share(prompts: Sequence[Any], completions: Sequence[str], **_: Any) -> list[float]:
    """One number in [0, 1] per completion."""
    return [sum(word[-1] in "02468" for word in text.split()) / max(1, len(text.split())) for text in completions]
