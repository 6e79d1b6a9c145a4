"""Tables for a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from unipo.report.groups import group, standings
from unipo.report.runs import read_run
from unipo.report.text import amount, duration


def comparison_table(run_folders: Sequence[Path]) -> Table:
    """What each configuration ends with, best first, with its 95 % interval, seeds, time and work done.

    Raises RunFolderError for a folder that is not a run, and for runs that are measured by different things.
    """
    groups = group([read_run(Path(f)) for f in run_folders])
    rows, kind = standings(groups), groups[0].kind
    measure, aggregate = kind.measure, kind.aggregate
    table = Table(title=f"{measure.curve.title.lower()}: {aggregate.title}, 95 % intervals", title_justify="left")
    table.add_column("method", overflow="fold")
    names = [
        "before",
        "after",
        "interval",
        "from",
        *[aggregate.versus_title.format(groups[0].label)] * (len(groups) > 1),
    ]
    for name in (*names, "seeds", "time", kind.words.work):
        table.add_column(name, justify="left" if name == "from" else "right")
    for i, row in enumerate(rows):
        style = "bold" if i == 0 and len(rows) > 1 else None
        cells = [
            row.label,
            measure.value(row.before),
            measure.value(row.value),
            measure.span(row.low, row.high),
            row.interval,
        ]
        cells += [aggregate.versus_text(*row.versus)] * (len(groups) > 1)
        table.add_row(*cells, str(row.seeds), duration(row.seconds), amount(row.work), style=style)
    return table
