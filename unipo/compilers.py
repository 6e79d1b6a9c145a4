"""The compilers of this machine, and where what they make is kept."""

from __future__ import annotations

import os
import shutil
from pathlib import Path


def c_compiler() -> str | None:
    """The C compiler ($CC, or the first that is installed), or None."""
    return os.environ.get("CC") or next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)


def cpp_compiler() -> str | None:
    """The C++ compiler ($CXX, or the first that is installed), or None."""
    return os.environ.get("CXX") or next(filter(None, map(shutil.which, ("g++", "clang++", "c++"))), None)


def user_cache() -> Path:
    """The folder of compiled code: not made here."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "unipo"
