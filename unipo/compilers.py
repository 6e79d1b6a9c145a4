"""The compilers of this machine, and where what they make is kept: C sources of this package, compiled once per machine."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

FLAGS = ("-O3", "-std=gnu11", "-shared", "-fPIC", "-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros",
         "-fassociative-math", "-ffinite-math-only")  # fmt: skip
VARIANTS = (
    ("-march=native", "-mprefer-vector-width=512", "-fopenmp"),
    ("-march=native", "-fopenmp"),
    ("-mcpu=native",),
    (),
)
"""Tried in turn: compilers differ in what they know."""


class NotCompiled(RuntimeError):
    """This C source cannot be had as a library; the message says why."""


def c_compiler() -> str | None:
    """The C compiler ($CC, or the first that is installed), or None."""
    return os.environ.get("CC") or next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)


def cpp_compiler() -> str | None:
    """The C++ compiler ($CXX, or the first that is installed), or None."""
    return os.environ.get("CXX") or next(filter(None, map(shutil.which, ("g++", "clang++", "c++"))), None)


def user_cache() -> Path:
    """The folder of compiled code: not made here."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "unipo"


def loaded(source: Path) -> ctypes.CDLL:
    """The functions of a C file, compiled for this processor or taken from the user's cache. Raises `NotCompiled`."""
    compiler = c_compiler()
    if compiler is None or not source.exists():
        raise NotCompiled("there is no C compiler" if compiler is None else f"{source.name} is not installed")
    try:
        return ctypes.CDLL(str(_compiled(source, compiler)))
    except (OSError, subprocess.SubprocessError) as error:
        raise NotCompiled(f"{source.name} could not be compiled: {str(error)[:200]}") from error


def _compiled(source: Path, compiler: str) -> Path:
    """The shared library for this source, compiler and processor; made under another name first, so that it is whole."""
    identity = [source.read_text(), compiler, *FLAGS, *map(str, VARIANTS), _processor()]
    name = hashlib.sha256("\n".join(identity).encode()).hexdigest()[:16]
    folder = user_cache()
    path = folder / f"{source.stem}-{name}.so"
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    handle, draft = tempfile.mkstemp(dir=folder, suffix=".so")
    os.close(handle)
    for variant in VARIANTS:
        command = [compiler, *FLAGS, *variant, str(source), "-o", draft, "-lm"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        if done.returncode == 0:
            os.replace(draft, path)
            return path
    os.unlink(draft)
    raise OSError(done.stderr.strip() or f"{compiler} failed")


def _processor() -> str:
    """What distinguishes processors with other instructions."""
    info = Path("/proc/cpuinfo")
    flags = (
        [line for line in info.read_text().splitlines() if line.startswith(("flags", "Features"))]
        if info.exists()
        else []
    )
    return " ".join([platform.machine(), platform.processor(), *flags[:1]])
