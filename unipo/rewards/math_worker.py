"""The process in which math-verify runs: one JSON line in, one out. Started by `unipo.rewards.mathematics`, by path.

Answers are untrusted: `9^{9^{9^9}}` makes the parser compute that number, in C code that neither a signal nor a thread can
stop. A process can be killed. Nothing of `unipo` is imported here, so that starting it is cheap.
"""

from __future__ import annotations

import contextlib
import json
import logging
import signal
import sys
from functools import lru_cache
from typing import Any

from math_verify import parse, verify

MEMORY = 4 << 30
"""Bytes of address space."""
SECONDS = 60
"""Seconds after which the system ends this process, were nobody left who would."""


@lru_cache(maxsize=4096)
def parsed(answer: str) -> list[Any]:
    """The reference answer: as mathematics where it is not marked as such, else as it stands."""
    return list(parse(f"${answer}$", parsing_timeout=None) or parse(answer, parsing_timeout=None))


def judged(answer: str, completion: str) -> dict[str, Any]:
    """{"right": bool}, {"unreadable": True} where the reference answer is no mathematics, {} where memory ran out."""
    try:
        expected = parsed(answer)
        if not expected:
            return {"unreadable": True}
        return {"right": bool(verify(expected, parse(completion, parsing_timeout=None), timeout_seconds=None))}
    except MemoryError:
        return {}


def main() -> None:
    logging.disable(logging.CRITICAL)
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource  # only where the system has it

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    out = sys.stdout
    sys.stdout = sys.stderr
    print(json.dumps("ready"), file=out, flush=True)
    alarm = getattr(signal, "alarm", lambda seconds: 0)
    for line in sys.stdin:
        alarm(SECONDS)  # without a handler: the system's own reaction, which needs no interpreter
        print(json.dumps(judged(*json.loads(line))), file=out, flush=True)
        alarm(0)


if __name__ == "__main__":
    main()
