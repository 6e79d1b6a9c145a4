"""Memory that stays with the process: activations come and go by the same sizes at every update."""

from __future__ import annotations

import ctypes
import sys
from functools import cache

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
LARGE = (1 << 31) - 4096


@cache
def keep_freed_memory() -> bool:
    """Tell glibc to reuse freed memory instead of giving it back to the system; False where there is no glibc.

    By default every block above 32 MB is mapped anew, and its pages are cleared at first touch, at each update.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, LARGE)) and bool(mallopt(M_TRIM_THRESHOLD, LARGE))
