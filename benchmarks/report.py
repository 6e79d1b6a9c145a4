"""What a row has shown: its object in latest.json, and its lines in the table."""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks.harness import Comparison, Measured, compare
from benchmarks.peers import ROOT

COLUMNS = ("row", "ours", "peer", "ratio", "goal", "memory", "limit", "fastest peer")


# ---- latest.json -----------------------------------------------------------------------------------------------------
def record(made: Measured, quick: bool) -> dict[str, Any]:
    """`ours` and `peer`: seconds per `unit`; numbers that do not exist are null, and `why` says so."""
    row = made.row
    ran = made.results.get(row.ours.name, [])
    also = {side.name: numbers(compare(made, side)) for side in row.also if side.name in made.results}
    return {
        "name": row.name, "title": row.title, **numbers(compare(made, row.ours)), "goal": row.goal,
        "unit": ran[0].unit if ran else "", "column": row.column, "threads": row.threads, "quick": quick,
        "also": also, "failed": made.failed,
        "machine": machine(), "commit": commit(), "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "turns": {name: [asdict(result) for result in results] for name, results in made.results.items()},
    }  # fmt: skip


def numbers(found: Comparison) -> dict[str, Any]:
    """The numbers of a comparison as JSON has them."""
    low, high = found.interval
    return {
        "ours": _known(found.ours), "peer": _known(found.peer), "ratio": _known(found.ratio),
        "interval": [_known(low), _known(high)], "limit_fraction": _known(found.fraction),
        "peer_name": found.peer_name, "memory_ratio": _known(found.memory), "why": found.why,
    }  # fmt: skip


def write(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Put the records into the file's list; rows of other names stay."""
    new = {r["name"]: r for r in records}
    old = {r["name"]: r for r in json.loads(path.read_text())} if path.exists() else {}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(list((old | new).values()), indent=1) + "\n")


def _known(x: float) -> float | None:
    return float(f"{x:.6g}") if math.isfinite(x) else None


@cache
def machine() -> str:
    """Processor and number of cores."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores"


@cache
def commit() -> str:
    """The commit that was measured, with a + where files differ from it."""
    said = subprocess.run(["git", "describe", "--always", "--dirty=+"], cwd=ROOT, capture_output=True, text=True)
    return said.stdout.strip()


# ---- the table -------------------------------------------------------------------------------------------------------
def table(records: Sequence[Mapping[str, Any]]) -> Table:
    """One line per row, and one for each further side of ours. Reads records, so that it can be printed from the file."""
    title = f"{records[0]['machine']}, {records[0]['commit']}: seconds of processor time per unit" if records else ""
    made = Table(*COLUMNS, title=title, title_justify="left")
    for found in records:
        made.add_row(*_line(found, found["name"], found), end_section=not found["also"])
        for i, (name, other) in enumerate(found["also"].items()):
            made.add_row(*_line(found, f"  {name}", other), end_section=i == len(found["also"]) - 1)
    return made


def _line(row: Mapping[str, Any], name: str, found: Mapping[str, Any]) -> tuple[str, ...]:
    unit = f"/{row['unit']}" + (" wall" if row["column"] == "wall_seconds" else "")
    ours, peer = (time_text(found[side], unit) for side in ("ours", "peer"))
    ratio = found["why"]
    if found["ratio"] is not None:
        low, high = found["interval"]
        ratio = f"{found['ratio']:.2f} \\[{low:.2f}, {high:.2f}]"
    goal = "" if not row["goal"] else f"{100 * row['goal']:.0f} %" if row["goal"] < 1 else f"{row['goal']:g}"
    memory = "" if found["memory_ratio"] is None else f"{found['memory_ratio']:.2f}"
    limit = "" if found["limit_fraction"] is None else f"{100 * found['limit_fraction']:.0f} %"
    return name, ours, peer, ratio, goal, memory, limit, found["peer_name"]


def time_text(seconds: float | None, unit: str) -> str:
    """12.3 ms/update; nothing where there is no number."""
    if seconds is None:
        return ""
    scale, name = next((s, n) for s, n in ((1.0, "s"), (1e-3, "ms"), (1e-6, "us"), (0.0, "ns")) if seconds >= s)
    return f"{seconds / (scale or 1e-9):.3g} {name}{unit}"
