"""What this machine can do: floating-point operations per second of a large square matmul, of one dtype and thread count.

python -m benchmarks.text.matmul --dtype bfloat16
"""

from __future__ import annotations

import argparse

import torch

from benchmarks.text.timing import Stopwatch, versions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--size", type=int, default=2048)
    parser.add_argument("--seconds", type=float, default=1.0)
    given = parser.parse_args()
    a, b = (torch.randn(given.size, given.size, dtype=getattr(torch, given.dtype)) for _ in range(2))
    watch = Stopwatch(warm=2)
    watch.mark()
    while watch.steps <= watch.warm or watch.last[1] - watch.first[1] < given.seconds:
        a @ b
        watch.mark(2 * given.size**3)
    rate = watch.units / (watch.last[0] - watch.first[0]) / 1e9
    watch.say("flop", versions=versions("torch"), notes=f"{rate:.0f} GFLOP/s per CPU second")


if __name__ == "__main__":
    main()
