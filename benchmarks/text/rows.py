"""The rows about text: scoring and update beside TRL, end to end with generation, and the learner beside the matmul rate."""

from __future__ import annotations

from benchmarks.harness import Row

ROWS: tuple[Row, ...] = ()
