"""Fresh processes without the wait for imports: sides that name what to preload are forked from one process that has it.

A fork before any work is as fresh as a new process: no tensors, no threads, its own clocks and its own resident size; only
the imports, which are never timed, are there already. That is what makes `make bench QUICK=1` quick.

    python -m benchmarks.forks MODULE ...      imports these, then reads one request per line and answers with an exit status
"""

from __future__ import annotations

import importlib
import json
import os
import runpy
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from benchmarks.harness import Result, Side, SideFailed, concluded, run_fresh
from benchmarks.peers import ROOT, home


class Forks:
    """A `Runner` with one waiting process for each kind of side; a context, so that they end with it."""

    def __init__(self) -> None:
        self._waiting: dict[Any, subprocess.Popen[str] | None] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for process in self._waiting.values():
            if process is not None:
                _channel(process.stdin).close()
                process.wait()

    def __call__(self, side: Side, quick: bool, threads: int) -> Result:
        """What the side prints, from a forked process where that works. Raises SideFailed."""
        process = self._process(side, threads) if side.preload else None
        if process is None:
            return run_fresh(side, quick, threads)
        with tempfile.TemporaryDirectory() as folder:
            said, complained = Path(folder, "stdout"), Path(folder, "stderr")
            request = {"arguments": side.arguments(quick), "stdout": str(said), "stderr": str(complained)}
            channel = _channel(process.stdin)
            channel.write(json.dumps(request) + "\n")
            channel.flush()
            status = _channel(process.stdout).readline()
            if not status:
                raise SideFailed("the process that forks sides has ended")
            return concluded(int(status), said.read_text(), complained.read_text())

    def _process(self, side: Side, threads: int) -> subprocess.Popen[str] | None:
        """None where the imports failed: the side will say how, in a process of its own."""
        key = (side.home, side.preload, threads, tuple(sorted(side.environment.items())))
        if key not in self._waiting:
            place = home(side.home)
            process = subprocess.Popen(
                [str(place.python), "-m", "benchmarks.forks", *side.preload], cwd=ROOT, text=True,
                env={**place.environment(threads), **side.environment},
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            )  # fmt: skip
            ready = _channel(process.stdout).readline() == "ready\n"
            self._waiting[key] = process if ready else None
        return self._waiting[key]


def _channel(stream: IO[str] | None) -> IO[str]:
    assert stream is not None
    return stream


# ---- in the waiting process --------------------------------------------------------------------------------------------
def wait(modules: list[str]) -> None:
    """Import, say so, and fork one process per request; the answer is its exit status."""
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for module in modules:
        importlib.import_module(module)
    print("ready", file=answer, flush=True)
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            os._exit(_work(json.loads(line)))
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), file=answer, flush=True)


def _work(request: dict[str, Any]) -> int:
    """Run a module or a file as the main program, its output in files."""
    for number, name in ((1, request["stdout"]), (2, request["stderr"])):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT), number)
    first, *rest = request["arguments"]
    try:
        if first == "-m":
            sys.argv = rest
            runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        else:
            sys.argv = [first, *rest]
            sys.path.insert(0, str(Path(first).resolve().parent))
            runpy.run_path(first, run_name="__main__")
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0


if __name__ == "__main__":
    wait(sys.argv[1:])
