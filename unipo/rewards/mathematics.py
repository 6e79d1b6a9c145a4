"""`math`: is a completion's last answer mathematically equal to the reference answer?"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from unipo.rewards.calling import RewardWarning

SECONDS = 5.0
"""What the verification of one completion may take."""
START_SECONDS = 120.0


@dataclass
class Worker:
    """A process that verifies, replaced when it is killed for taking too long."""

    seconds: float = SECONDS
    _process: subprocess.Popen[str] | None = None
    _owner: int = 0
    _lock: threading.RLock = field(default_factory=threading.RLock)

    def ask(self, answer: str, completion: str) -> dict[str, Any]:
        """What `math_worker.judged` says; {} where it ran out of time or memory."""
        with self._lock:
            return self._exchange(self._started(), json.dumps([answer, completion]), self.seconds) or {}

    def _started(self) -> subprocess.Popen[str]:
        if self._process is None or self._process.poll() is not None or self._owner != os.getpid():
            script = Path(__file__).with_name("math_worker.py")
            pipe = subprocess.PIPE
            process = subprocess.Popen(
                [sys.executable, "-P", str(script)], stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True
            )
            if self._exchange(process, "", START_SECONDS) != "ready":
                raise RuntimeError("the process that runs math-verify does not start: is math-verify installed here?")
            self._process, self._owner = process, os.getpid()
        return self._process

    def _exchange(self, process: subprocess.Popen[str], line: str, seconds: float) -> Any:
        """Send `line` (if any) and wait for one line back; None, and the process killed, after `seconds`."""
        spoilt = False

        def end() -> None:
            nonlocal spoilt
            spoilt = True
            process.kill()

        watchdog = threading.Timer(seconds, end)
        watchdog.daemon = True
        try:
            watchdog.start()
            return _said(process, line)
        except BaseException:
            end()  # half an exchange must not be taken for the next one's
            raise
        finally:
            watchdog.cancel()
            if watchdog.is_alive():
                watchdog.join()
            if spoilt:
                process.wait()


def _said(process: subprocess.Popen[str], line: str) -> Any:
    """One line of JSON in answer to `line`; None when the process is gone."""
    if process.stdin is None or process.stdout is None:
        raise RuntimeError("the process was started without pipes")
    try:
        if line:
            process.stdin.write(f"{line}\n")
            process.stdin.flush()
        reply = process.stdout.readline()
    except BrokenPipeError:
        reply = ""
    if reply:
        return json.loads(reply)
    process.kill()
    process.wait()
    return None


WORKER = Worker()


def math(prompts: Sequence[Any], completions: Sequence[str], answer: Sequence[Any] | None = None, **columns: Any
         ) -> list[float | None]:  # fmt: skip
    r"""1.0 where the completion's last answer equals `answer` by math-verify (LaTeX, \boxed, numbers), else 0.0.

    None where there is no answer. A completion that cannot be verified within 5 s is not right: 0.0, with a RewardWarning.
    Raises ValueError where the reference answer itself is not mathematics.
    """
    answers = answer if answer is not None else [None] * len(completions)
    return [None if a is None else _judged(str(a), c) for c, a in zip(completions, answers, strict=True)]


def _judged(answer: str, completion: str) -> float:
    if answer.strip() and answer.strip() == completion.strip():
        return 1.0
    found = WORKER.ask(answer, completion)
    if "unreadable" in found:
        raise ValueError(
            f"the reference answer {answer[:60]!r} is not mathematics: mend the 'answer' column, or compare letter by letter "
            "with --reward exact_match"
        )
    if not found:
        shown = f"{completion[:60]!r} against {answer[:60]!r}"
        warnings.warn(
            f"verifying took too long (or too much memory) and counts as wrong: {shown}", RewardWarning, stacklevel=3
        )
    return float(found.get("right", False))
