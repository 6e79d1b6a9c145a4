"""Random choices keyed by what they are for, never by how often a generator was called."""

from __future__ import annotations

import hashlib
from functools import lru_cache

import numpy as np


def keyed_generator(*key: int | str) -> np.random.Generator:
    """A generator that depends on `key` alone: (seed, "replay", step) gives the same draws after a resume."""
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    return np.random.default_rng(np.frombuffer(digest, dtype=np.uint32))


@lru_cache(maxsize=256)
def name_key(name: str) -> int:
    """A 62-bit number that stands for a name among keys."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") >> 2


def shuffled(index: int, size: int, *key: int | str) -> int:
    """Entry `index` of an endless stream over range(size): every epoch is a fresh keyed permutation."""
    epoch, position = divmod(index, size)
    return int(_permutation(size, *key, "epoch", epoch)[position])


@lru_cache(maxsize=16)
def _permutation(size: int, *key: int | str) -> np.ndarray:
    return keyed_generator(*key).permutation(size)
