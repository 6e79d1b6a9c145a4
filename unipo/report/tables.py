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
    measure, aggregate, counted = kind.measure, kind.aggregate, kind.words.counted
    over = list(dict.fromkeys(row.interval for row in rows))
    shared = f" ({over[0]})" if len(over) == 1 and over[0] else ""
    title = f"{measure.curve.title.lower()}: {aggregate.title}, 95 % intervals{shared}"
    table = Table(title=title, title_justify="left")
    table.add_column("method", overflow="fold")
    for name in ("before", "after", "interval", *["over"] * (not shared)):
        table.add_column(name, justify="left" if name == "over" else "right", no_wrap=name != "over")
    for name in (*[aggregate.versus_title.format(groups[0].label)] * (len(groups) > 1), "seeds", "time", counted):
        table.add_column(name, justify="right", overflow="fold")
    for i, row in enumerate(rows):
        style = "bold" if i == 0 and len(rows) > 1 else None
        cells = [row.label, measure.value(row.before), measure.value(row.value), measure.span(row.low, row.high)]
        cells += [row.interval] * (not shared) + [aggregate.versus_text(*row.versus)] * (len(groups) > 1)
        table.add_row(*cells, str(row.seeds), duration(row.seconds), amount(row.work), style=style)
    return table
