"""Tables for a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from unipo.report.groups import group, standings
from unipo.report.runs import read_run
from unipo.report.text import amount, between, percent


def comparison_table(run_folders: Sequence[Path]) -> Table:
    """Final held-out accuracy per configuration, best first, with its 95 % interval, seeds, seconds and tokens.

    Raises RunFolderError for a folder that is not a run.
    """
    rows = standings(group([read_run(Path(f)) for f in run_folders]))
    table = Table(title="held-out accuracy, 95 % intervals", title_justify="left")
    table.add_column("method", overflow="fold")
    for name in ("before", "after", "interval", "from", "seeds", "seconds", "tokens"):
        table.add_column(name, justify="left" if name == "from" else "right")
    for i, row in enumerate(rows):
        style = "bold" if i == 0 and len(rows) > 1 else None
        cells = (row.label, percent(row.before), percent(row.accuracy), between(row.low, row.high), row.interval)
        table.add_row(*cells, str(row.seeds), amount(row.seconds), amount(row.tokens), style=style)
    return table
