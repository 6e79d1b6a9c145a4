"""What a run writes for people and scripts: metrics, samples, events."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq


class Records:
    """Append-only JSON lines (crash-safe: a half-written last line is dropped), and `metrics.parquet` made from them.

    `metrics.jsonl` has a line per step; `samples.jsonl` completions; `events.jsonl` {step, level, message}.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.metrics: list[dict[str, float]] = _read(folder / "metrics.jsonl")
        self._flushed = -math.inf

    def rewind(self, step: int) -> None:
        """Forget everything after `step`: those steps will be made again."""
        self.metrics = [m for m in self.metrics if m["step"] <= step]
        for name in ("metrics", "samples", "events"):
            path = self.folder / f"{name}.jsonl"
            if path.exists():
                write_atomic(path, "".join(_line(r) for r in _read(path) if r["step"] <= step))

    def add(self, row: Mapping[str, float]) -> None:
        self.metrics.append(dict(row))
        self._append("metrics", [row])

    def samples(self, rows: Iterable[Mapping[str, Any]]) -> None:
        self._append("samples", rows)

    def event(self, step: int, level: str, message: str) -> None:
        self._append("events", [{"step": step, "level": level, "message": message}])

    def flush(self, every: float = 0.0) -> None:
        """Write `metrics.parquet`, atomically; not within `every` seconds of the last time."""
        if not self.metrics or time.monotonic() - self._flushed < every:
            return
        self._flushed = time.monotonic()
        names = dict.fromkeys(name for row in self.metrics for name in row)
        columns = {n: [float(row.get(n, math.nan)) for row in self.metrics] for n in names}
        arrays = {n: pa.array([int(v) for v in c]) if n == "step" else pa.array(c) for n, c in columns.items()}
        temporary = self.folder / ".metrics.parquet.tmp"
        pq.write_table(pa.table(arrays), temporary)
        os.replace(temporary, self.folder / "metrics.parquet")

    def _append(self, name: str, rows: Iterable[Mapping[str, Any]]) -> None:
        with open(self.folder / f"{name}.jsonl", "a", encoding="utf-8") as file:
            file.write("".join(_line(r) for r in rows))


def write_atomic(path: Path, text: str) -> None:
    """Readers see the old text or the new, never a part."""
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def _read(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows
