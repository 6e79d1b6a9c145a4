"""The operations that a step has to make: multiply-adds of its equations, for tokens that have to be computed.

Not counted is what padding, computing a shared prompt again, softmax, norms or the optimiser cost.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.text.shapes import Batch


def forward(config: Any, prompt: int, lengths: Sequence[float]) -> float:
    """Of the completions [n] of one prompt, which is computed once; the last token of each is no input.

    2 per weight of a matrix and token (the head: per completion token); 2 d per pair of positions that see each other and
    layer, for each of the two products of attention.
    """
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    width, kv = config.num_attention_heads * size, config.num_key_value_heads * size
    layer = config.hidden_size * (2 * width + 2 * kv) + 3 * config.hidden_size * config.intermediate_size
    tokens = prompt + sum(n - 1 for n in lengths)
    pairs = prompt**2 / 2 + sum((n - 1) * (prompt + (n - 1) / 2) for n in lengths)
    body = config.num_hidden_layers * (2 * layer * tokens + 4 * width * pairs)
    return body + 2 * config.hidden_size * config.vocab_size * sum(lengths)


def update(config: Any, batch: Batch) -> float:
    """Of a scripted step: forward once, backward twice."""
    group = len(batch.completions) // len(batch.prompts)
    lengths = [len(c) for c in batch.completions]
    groups = (lengths[i * group : (i + 1) * group] for i in range(len(batch.prompts)))
    return sum(3 * forward(config, len(p), own) for p, own in zip(batch.prompts, groups, strict=True))
