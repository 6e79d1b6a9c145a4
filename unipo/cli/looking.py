"""unipo report, methods, show, explain, reproduce."""

from __future__ import annotations

import json
from pathlib import Path

from rich.table import Table

from unipo.cli.words import UsageError, console, near, parsed, taken


def report(arguments: list[str]) -> int:
    from unipo.report import write_report

    folders = [Path(a) for a in arguments if not a.startswith("-")]
    if not folders:
        raise UsageError("unipo report takes one or more run directories")
    bad = [f for f in folders if not (f / "config.yaml").exists()]
    if bad:
        raise UsageError(f"{bad[0]} is not a run: it has no config.yaml")
    out = folders[0] / "report.html" if len(folders) == 1 else Path("report.html")
    console.print(f"report  [bold]{write_report(folders, out)}[/]", highlight=False, soft_wrap=True)
    return 0


def methods(arguments: list[str]) -> int:
    from unipo.methods.catalog import catalog

    family = arguments[arguments.index("--family") + 1] if "--family" in arguments[:-1] else None
    known = {"--family", "--json", family}
    unknown = [a for a in arguments if a not in known]
    if unknown:
        raise UsageError(f"unipo methods has no option {unknown[0]!r}{near(unknown[0], ('--family', '--json'))}")
    entries = [e for e in catalog() if family in (None, e.family)]
    if not entries:
        raise UsageError(f"there is no family {family!r}; families: {', '.join(sorted({e.family for e in catalog()}))}")
    if "--json" in arguments:
        print(json.dumps([e.as_dict() for e in entries], indent=1))
        return 0
    shown = ("row", "method", "family", "state", "tests", "verdict", "title")[: 7 if console.width >= 100 else 6]
    table = Table()
    for name in shown:
        table.add_column(name, no_wrap=True, min_width={"row": 3, "state": 7, "verdict": 14}.get(name))
    for e in entries:
        color = {"works": "green", "partial": "yellow"}.get(e.state, "dim")
        row = "" if e.row is None else str(e.row)
        cells = (
            row,
            e.slug,
            e.family,
            f"[{color}]{e.state}[/]",
            str(e.tests or ""),
            e.verdict or "",
            e.title[: console.width - 84],
        )
        table.add_row(*cells[: len(shown)])
    console.print(table)
    states = [e.state for e in entries]
    console.print(
        ", ".join(f"{states.count(s)} {s}" for s in ("works", "partial", "planned")), highlight=False, soft_wrap=True
    )
    return 0


def show(arguments: list[str]) -> int:
    from unipo.methods.catalog import describe

    if len(arguments) != 1:
        raise UsageError("unipo show takes one METHOD")
    console.print(describe(arguments[0]), markup=False, highlight=False, soft_wrap=True)
    return 0


def explain(arguments: list[str]) -> int:
    from unipo.training.explain import explain_run

    for part in explain_run(*parsed("explain", arguments)):
        console.print(part, highlight=False, soft_wrap=True)
    return 0


def reproduce(arguments: list[str]) -> int:
    from unipo.reproduce import CLAIMS, reproduce_claim

    words = [a for i, a in enumerate(arguments) if not a.startswith("-") and (not i or arguments[i - 1] != "--seeds")]
    seeds, _ = taken([a for a in arguments if a not in words], "--seeds", 5)
    if len(words) != 1 or (words[0] != "all" and words[0] not in CLAIMS):
        like = near(words[0], CLAIMS) if words else ""
        raise UsageError(f"unipo reproduce takes one of: all, {', '.join(CLAIMS)}{like}")
    for slug in CLAIMS if words[0] == "all" else words:
        console.print(reproduce_claim(slug, seeds, console))
    return 0
