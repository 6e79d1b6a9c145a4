"""Log-prob, entropy and divergences from hidden states, in row chunks: `[N, vocabulary]` is never kept.

Each chunk is computed under a checkpoint: its logits live only while the chunk is computed, forward and again backward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Head = Callable[[Tensor], Tensor]
"""Hidden states [n, d] -> logits [n, V]."""
CHUNK_BYTES = 64 << 20
"""Logits held at a time; a few temporaries of the same size come on top."""


def chunk_rows(vocabulary: int, element_size: int, budget: int = CHUNK_BYTES) -> int:
    """Rows whose logits fit into `budget` bytes (at least 1)."""
    return max(1, budget // (vocabulary * element_size))


def chunked(fn: Callable[..., Tensor], rows: Sequence[Tensor], size: int) -> Tensor:
    """fn over chunks of `size` rows of equally long tensors, concatenated; nothing inside is kept for backward."""
    n = len(rows[0])
    if n == 0:
        return fn(*rows)
    parts = [tuple(r[i : i + size] for r in rows) for i in range(0, n, size)]
    if not torch.is_grad_enabled():
        return torch.cat([fn(*part) for part in parts])
    return torch.cat([checkpoint(fn, *part, use_reentrant=False, preserve_rng_state=False) for part in parts])


def token_signals(logits: Tensor, tokens: Tensor, temperature: float = 1.0, entropy: bool = False) -> Tensor:
    """Log-prob of `tokens` [n], and the entropy in nats where asked: [n, 1 or 2], from logits [n, V] / temperature.

    Computed in float32 or better.
    """
    logits = (logits if logits.dtype == torch.float64 else logits.float()) / temperature
    log_z = logits.logsumexp(-1)
    logp = logits.gather(-1, tokens[:, None]).squeeze(-1) - log_z
    if not entropy:
        return logp[:, None]
    expected = (torch.softmax(logits, -1) * logits).sum(-1)
    return torch.stack([logp, log_z - expected], -1)
