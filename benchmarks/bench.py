"""Speed beside pinned peers: `make bench`, `make bench QUICK=1`, `make bench ROWS="grpo-s1 dpo-d1"`. See benchmarks/README.md."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from rich.console import Console

from benchmarks.forks import Forks
from benchmarks.harness import Row, Runner, measure
from benchmarks.peers import install
from benchmarks.report import record, table, write

PARTS = ("benchmarks.text.rows", "benchmarks.text.time_to_90_rows", "benchmarks.control.rows")
ROWS: tuple[Row, ...] = tuple(row for part in PARTS if find_spec(part) for row in import_module(part).ROWS)
LATEST = Path(__file__).parent / "results" / "latest.json"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"of {', '.join(row.name for row in ROWS)}; default all")
    parser.add_argument("--quick", action="store_true", help="fewer turns and smaller work: all rows in minutes")
    parser.add_argument("--known", action="store_true", help="only the settings of peers that won earlier sweeps")
    parser.add_argument("--peers", default="", help="only settings of peers whose name contains this")
    parser.add_argument("--turns", type=int, help="of each peer; ours has one more (default: each row's own)")
    parser.add_argument("--threads", type=int, help="of both sides (default: each row's own, mostly one)")
    parser.add_argument("--out", type=Path, default=LATEST, help="the JSON file; rows that are not run now stay in it")
    given = parser.parse_args(arguments)
    console = Console(width=None if sys.stdout.isatty() else 140)
    wanted = chosen(ROWS, given.rows)
    rows = [shaped(row, given) for row in wanted if given.rows or not (given.quick and row.extra)]
    with Forks() as run:
        bench(rows, run, given.quick, given.out, console)


def shaped(row: Row, given: argparse.Namespace) -> Row:
    """The row with the turns, threads and peers that are asked for."""
    peers = tuple(side for side in row.peers if given.peers in side.name and not (given.known and side.quick is None))
    turns = (given.turns, given.turns) if given.turns else (row.turns, row.quick_turns)
    return replace(row, peers=peers, turns=turns[0], quick_turns=turns[1], threads=given.threads or row.threads)


def chosen(rows: Sequence[Row], names: Sequence[str]) -> list[Row]:
    """The rows of these names (all when there are none). Raises SystemExit for an unknown one."""
    unknown = sorted(set(names) - {row.name for row in rows})
    if unknown:
        raise SystemExit(f"no row is called {', '.join(unknown)}; there are {', '.join(row.name for row in rows)}")
    return [row for row in rows if not names or row.name in names]


def bench(rows: Sequence[Row], run: Runner, quick: bool, out: Path, console: Console) -> None:
    """Measure row by row, write after every one, print one table."""
    missing, records = install(), []
    for name, why in missing.items():
        console.print(f"{name} could not be installed: {why}", style="yellow")
    for row in rows:
        start = time.perf_counter()
        made = measure(row, run, quick, missing)
        records.append(record(made, quick))
        write(out, records[-1:])
        console.print(f"{row.name}: {time.perf_counter() - start:.0f} s", style="dim", highlight=False)
        for name, why in made.failed.items():
            console.print(f"  {name}: {why}", style="yellow", highlight=False, markup=False)
    console.print(table(records))


if __name__ == "__main__":
    main()
