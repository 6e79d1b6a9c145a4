"""One self-contained page about a run, or about several side by side."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from itertools import zip_longest
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from unipo.report.commands import full_command
from unipo.report.frontier import (
    DISTANCE,
    GOLD,
    draw_frontier,
    draw_optimisation,
    frontier_column,
    has_gold,
    optimisation_note,
)
from unipo.report.groups import Group, Standing, group, standings
from unipo.report.kinds import Curve, Kind
from unipo.report.ledger import AXES, Shares, in_words, quantities, readable, shares_of
from unipo.report.panels import (
    AXIS_TITLES,
    ROUNDING,
    ledger_panels,
    lines_panel,
    run_lines,
    seeds_line,
    shares_panel,
    shares_panel_with_legend,
)  # fmt: skip
from unipo.report.plots import PALETTE, Draw, Line, colors_of, png, svg
from unipo.report.runs import Row, RunData, read_run
from unipo.report.text import amount, duration, number, percent

MOST_SAMPLES = 6
MOST_LEDGERS = 12
"""A comparison of more runs shows the ledgers of the first so many."""
LARGEST_VIDEO = 2 * 1024 * 1024
"""Bytes; a larger one is named, not embedded: a page can be sent by mail."""


def write_report(run_folders: Sequence[Path], out: Path) -> Path:
    """Write the page to `out`, and `report_curves.png` and `report_ledger.png` beside it; returns `out`.

    One folder: the page of that run. Several: a comparison, where runs that differ in their seed only are one curve with
    the interval over seeds. Raises RunFolderError for a folder that is not a run, ValueError for none.
    """
    if not run_folders:
        raise ValueError("expected at least one run folder, found none")
    runs = [read_run(Path(f)) for f in run_folders]
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    page = _run_page(runs[0]) if len(runs) == 1 else _comparison_page(runs)
    text = _environment().get_template("page.html.jinja").render(page | {"made_by": _made_by()})
    out.write_text(text, encoding="utf-8")
    _write_pictures(runs, out)
    return out


def _write_pictures(runs: Sequence[RunData], out: Path) -> None:
    along, groups = runs[0].kind.axis_title, group(runs)
    curves = [(c.title, lines_panel(c, _unlabelled(lines), along)) for c, lines in _measured_curves(groups)]
    curves += [(title, draw) for title, _, draw in _over_distance(runs)]
    png(out.with_name("report_curves.png"), curves, legend=_colors(groups) if len(groups) > 1 else ())
    apart = [(t, shares_panel_with_legend(s, along)) for t, s in _ledgers(group(runs))]
    shares = ledger_panels(runs[0]) if len(runs) == 1 else apart
    png(out.with_name("report_ledger.png"), shares, columns=2 if len(shares) <= 4 else 3, size=(5.2, 3.2))


# ---- one run ---------------------------------------------------------------------------------------------------------
def _run_page(run: RunData) -> dict[str, Any]:
    axes = [(axis, shares_of(run, axis)) for axis in AXES]
    sources = quantities(run, "source") or quantities(run, "term")
    kind, made = run.kind, run.metrics["step"][-1]
    main = ((kind.measure.curve, PALETTE[2]), (kind.reward, PALETTE[0]))
    return {
        "title": f"{run.setting('method')} on {run.setting('task')}",
        "subtitle": "" if run.finished else f"not finished: {made:.0f} of {kind.planned(run.config)} {kind.words.step}s",
        "facts": _facts(run), "command": run.command, "numbers": _numbers(run), "words_of": kind.words,
        "main": _curve_cards([(c, run_lines(run, c, color)) for c, color in main], kind, "main", 5.6, 2.7)
                + _distance_cards([run]),
        "curves": _curve_cards([(c, run_lines(run, c)) for c in kind.curves] + _knobs(run), kind, "curve"),
        "ledger": _ledger_cards([(axis, s) for axis, s in axes if s is not None], kind),
        "words": in_words(run), "sources": _source_rows(run, sources), "columns": _source_columns(run, sources),
        "video": _video(run),
        "pairs": _before_after(run), "early": _samples(run, 0), "late": _samples(run, -1),
        "events": [dict(e) for e in run.events], "config": _settings(run.config), "full_command": full_command(run.config),
    }  # fmt: skip


def _ledger_cards(axes: list[tuple[str, Shares]], kind: Kind) -> list[dict[str, Any]]:
    """A panel for every axis that has something to divide: an axis with one name is told in words and in the table."""
    divided = [(axis, s) for axis, s in axes if int((s.shares.max(1) > 0).sum()) > 1] or axes[:1]
    width = 5.6 if len(divided) > 1 else 11.6
    return [_ledger_card(AXIS_TITLES[axis], AXES[axis], s, kind, f"ledger-{axis}", width) for axis, s in divided]


def _facts(run: RunData) -> list[tuple[str, str]]:
    found = [
        (words, run.setting(name)) for words, name in run.kind.words.facts if run.config.get(name) not in (None, "")
    ]
    return [
        *found,
        (f"{run.kind.words.step}s", f"{run.metrics['step'][-1]:.0f}"),
        ("time", duration(run.last("seconds"))),
    ]


def _numbers(run: RunData) -> list[dict[str, Any]]:
    """The key numbers: label, value, a second line, and for the measure before and after."""
    found: list[dict[str, Any]] = []
    measure, words = run.kind.measure, run.kind.words
    column = measure.curve.column
    before, after = run.first(column), run.last(column)
    if math.isfinite(after):
        interval = measure.span(run.last(f"{column}_low"), run.last(f"{column}_high"))
        note = f"95 % interval {interval}, over {measure.over}" if interval != "–" else "no interval was recorded"
        earlier = measure.value(before) if run.measured(column)[1].size > 1 else ""
        found.append({"label": measure.curve.title, "value": measure.value(after), "note": note, "wide": True,
                      "fell": after < before, "before": earlier})  # fmt: skip
    reward = run.measured("reward")[1]
    if reward.size:
        early, late = (float(part.mean()) for part in (reward[: _tenth(reward)], reward[-_tenth(reward) :]))
        found.append(
            {"label": run.kind.reward.title, "value": number(late), "note": f"was {number(early)} at the start"}
        )
    work, seconds = run.worked, run.last("seconds")
    if math.isfinite(work):
        details = [f"{amount(run.last(name))} {said}" for name, said in words.details if math.isfinite(run.last(name))]
        found.append({"label": words.work.capitalize(), "value": amount(work), "note": ", ".join(details)})
    rate = f"{amount(work / seconds)} {words.unit}s/s, evaluation included" if work > 0 and seconds > 0 else ""
    found.append({"label": "Time", "value": duration(seconds), "note": rate})
    return found


def _video(run: RunData) -> dict[str, str] | None:
    """An episode of the trained policy as a data address, or where it lies if it is too large for the page."""
    if run.video is None:
        return None
    size = run.video.stat().st_size
    if size >= LARGEST_VIDEO:
        return {"path": str(run.video), "size": f"{size / 1024**2:.1f} MiB"}
    media = "video/mp4" if run.video.suffix == ".mp4" else "image/gif"
    return {"media": media, "data": f"data:{media};base64,{base64.b64encode(run.video.read_bytes()).decode()}"}


def _knobs(run: RunData) -> list[tuple[Curve, list[Line]]]:
    """Settings that a controller turned."""
    names = [n for n in run.metrics if n.startswith("knob/")]
    turned = [n for n in names if run.measured(n)[1].size and float(run.measured(n)[1].std()) > 0]
    curves = [Curve(title=n.removeprefix("knob/"), column=n, note="turned by its controller") for n in turned]
    return [(c, run_lines(run, c, PALETTE[3])) for c in curves]


def _source_columns(run: RunData, rows: list[dict[str, float | str]]) -> list[tuple[str, str]]:
    """(heading, quantity): the columns of the ledger's table in which anything is known."""
    unit = run.kind.words.unit
    headings = {
        "gradient_share": "gradient share", "token_share": f"share of {unit}s", "rows": "rows", "tokens": f"{unit}s",
        "ess": "effective sample size", "clipped_share": "clipped", "kl": "KL to sampler",
    }  # fmt: skip
    if not quantities(run, "source"):  # terms may claim the same rows: they do not divide them
        del headings["token_share"]
    return [(said, name) for name, said in headings.items() if any(math.isfinite(float(r[name])) for r in rows)]


def _source_rows(run: RunData, rows: list[dict[str, float | str]]) -> list[dict[str, str]]:
    """The compact table of the ledger, as text; `width` is the share as a CSS length."""
    axis = "source" if quantities(run, "source") else "term"
    shares = shares_of(run, axis)
    color = dict(zip(shares.names, colors_of(shares), strict=True)) if shares else {}
    return [
        {
            "name": readable(str(r["name"])), "color": color.get(str(r["name"]), PALETTE[0]),
            "rows": amount(float(r["rows"])), "tokens": amount(float(r["tokens"])),
            "token_share": percent(float(r["token_share"]), 0), "gradient_share": percent(float(r["gradient_share"])),
            "width": _css_width(float(r["gradient_share"])),
            "ess": percent(float(r["ess"]), 0), "clipped_share": percent(float(r["clipped_share"])),
            "kl": _small(float(r["kl"])),
        }
        for r in rows
    ]  # fmt: skip


def _before_after(run: RunData) -> list[tuple[Row, Row]]:
    """Held-out prompts with their completion at the first and at the last evaluation, where both were kept."""
    held = [_shown(s, run) for s in run.samples if s.get("source") == "held_out"]
    steps = sorted({s["step"] for s in held})
    if len(steps) < 2:
        return []
    first = {s["prompt"]: s for s in reversed(held) if s["step"] == steps[0]}
    last = {s["prompt"]: s for s in reversed(held) if s["step"] == steps[-1]}
    return [(first[p], last[p]) for p in reversed(first) if p in last][:MOST_SAMPLES]


def _samples(run: RunData, which: int) -> list[Row]:
    """What was trained on at the first (0) or last (-1) step with samples: sources in turn."""
    trained = [_shown(s, run) for s in run.samples if s.get("source") not in ("held_out", *run.kind.words.unshown)]
    if not trained:
        return []
    step = sorted({s["step"] for s in trained})[which]
    by_source: dict[str, list[Row]] = {}
    for s in trained:
        if s["step"] == step:
            by_source.setdefault(s["source"], []).append(s)
    if len(by_source) == 1:  # then it says nothing
        by_source = {"": [{**s, "source": ""} for s in next(iter(by_source.values()))]}
    turns = zip_longest(*by_source.values())
    return [s for turn in turns for s in turn if s is not None][:MOST_SAMPLES]


def _shown(sample: Row, run: RunData) -> dict[str, Any]:
    """A sample as the page needs it, whatever fields it came with."""
    reward = sample.get("reward")
    known = isinstance(reward, int | float) and math.isfinite(reward)
    kind, step = run.kind, int(sample.get("step") or 0)
    place = float(np.interp(step, run.metrics["step"], run.axis))
    return {
        "step": step, "at": kind.words.at.format(amount(place)), "prompt": str(sample.get("prompt", "")),
        "completion": str(sample.get("completion", "")), "source": str(sample.get("source") or "unknown"),
        "reward": number(float(reward or 0)) if known else "", "cut": kind.words.cut if sample.get("truncated") else "",
        "mood": "" if not known or kind.measure.scored else "good" if float(reward or 0) > 0.5 else "bad",
    }  # fmt: skip


def _settings(config: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(k, v if isinstance(v, str) else json.dumps(v, default=str)) for k, v in config.items()]


# ---- several runs ----------------------------------------------------------------------------------------------------
def _comparison_page(runs: Sequence[RunData]) -> dict[str, Any]:
    groups = group(runs)
    kind = groups[0].kind
    title, aggregate = kind.measure.curve.title, kind.aggregate
    rows = standings(groups)
    tasks = list(dict.fromkeys(r.setting("task") for r in runs))
    measured = _measured_curves(groups)
    main = [m for m in measured if m[0] in (kind.measure.curve, kind.reward)]
    color = dict(_colors(groups))
    best = rows[0] if rows and math.isfinite(rows[0].value) else None
    return {
        "title": f"{len(groups)} configurations on {', '.join(tasks)}" if len(groups) > 1 else
                 f"{groups[0].label} on {', '.join(tasks)}, {len(runs)} runs",
        "subtitle": f"best {title.lower()}: {best.label}, {kind.measure.value(best.value)}" if best else "",
        "facts": [("runs", str(len(runs))), ("configurations", str(len(groups)))],
        "legend": list(color.items()), "measure": f"Final {title.lower()}", "aggregate": aggregate.title,
        "versus": aggregate.versus_title.format(groups[0].label) if len(groups) > 1 else "", "said": aggregate.said,
        "work": kind.words.work, "standings": [_standing_row(s, color[s.label], kind) for s in rows],
        "main": _curve_cards(main, kind, "main", 5.6, 2.7) + _distance_cards(runs),
        "curves": _curve_cards([m for m in measured if m not in main], kind, "curve"),
        "ledger": [_ledger_card(t, "", s, kind, f"ledger-{i}", 3.7) for i, (t, s) in enumerate(_ledgers(groups))],
        "left_out": max(0, len(runs) - MOST_LEDGERS),
        "runs": [(str(r.folder), r.command) for r in runs],
    }  # fmt: skip


def _colors(groups: Sequence[Group]) -> list[tuple[str, str]]:
    """(label, colour) of each configuration."""
    return [(g.label, PALETTE[i % len(PALETTE)]) for i, g in enumerate(groups)]


def _measured_curves(groups: Sequence[Group]) -> list[tuple[Curve, list[Line]]]:
    """Every curve with at least one measured value, a line per group; one run alone needs no label."""
    alone = len(groups) == 1
    found = []
    for curve in groups[0].kind.all_curves:
        lines = [
            seeds_line(g.runs, curve, "" if alone else g.label, PALETTE[i % len(PALETTE)]) for i, g in enumerate(groups)
        ]
        found.append((curve, [line for part in lines for line in part]))
    return [(c, lines) for c, lines in found if lines]


def _ledgers(groups: Sequence[Group]) -> list[tuple[str, Shares]]:
    """A panel per run: by source where any run has several, else by direction."""
    runs = [(g.label, r) for g in groups for r in g.runs]
    mixed = any(len(s.names) > 1 for _, r in runs if (s := shares_of(r, "source")) is not None)
    found = [(label, r, shares_of(r, "source" if mixed else "sign")) for label, r in runs[:MOST_LEDGERS]]
    return [(f"{label}, seed {r.setting('seed')}", s) for label, r, s in found if s is not None]


def _standing_row(s: Standing, color: str, kind: Kind) -> dict[str, str]:
    measure = kind.measure
    return {
        "label": s.label, "color": color, "before": measure.value(s.before), "after": measure.value(s.value),
        "interval": measure.span(s.low, s.high), "kind": s.interval, "seeds": str(s.seeds),
        "versus": kind.aggregate.versus_text(*s.versus), "seconds": duration(s.seconds), "work": amount(s.work),
    }  # fmt: skip


# ---- shared ----------------------------------------------------------------------------------------------------------
def _curve_cards(
    found: Sequence[tuple[Curve, list[Line]]], kind: Kind, name: str, width: float = 3.7, height: float = 2.1
) -> list[dict[str, str]]:
    return [
        {"title": c.title, "note": c.note,
         "svg": svg(lines_panel(c, _unlabelled(lines), kind.axis_title), f"{name}-{c.column}", width, height)}
        for c, lines in found if lines
    ]  # fmt: skip


def _over_distance(runs: Sequence[RunData]) -> list[tuple[str, str, Draw]]:
    """(title, how to read it, panel) of what is drawn over the KL from the start: proxy and gold of a run, the frontier of
    several."""
    if len(runs) == 1:
        found = [("Proxy and gold", optimisation_note(runs[0]), draw_optimisation(runs[0]))]
        return found if has_gold(runs[0]) else []
    groups = group(runs)
    column = frontier_column(groups)
    if not column:
        return []
    what = "Gold reward" if column == GOLD else "Reward"
    return [
        (
            f"{what} over the KL",
            "a line is a run, its end the dot; up and left is better",
            draw_frontier(groups, column),
        )
    ]


def _distance_cards(runs: Sequence[RunData]) -> list[dict[str, str]]:
    return [
        {"title": title, "note": note, "svg": svg(draw, f"main-{DISTANCE}", 5.6, 2.7)}
        for title, note, draw in _over_distance(runs)
    ]


def _unlabelled(lines: Sequence[Line]) -> list[Line]:
    """The page has one legend for all panels."""
    return [Line(steps=x.steps, values=x.values, low=x.low, high=x.high, color=x.color, marked=x.marked) for x in lines]


def _ledger_card(title: str, note: str, shares: Shares, kind: Kind, name: str, width: float) -> dict[str, Any]:
    legend = [
        {"name": readable(n), "color": c, "share": percent(shares.mean(n), 0)}
        for n, c in zip(shares.names, colors_of(shares), strict=True)
    ]
    return {
        "title": title,
        "note": note,
        "legend": legend,
        "svg": svg(shares_panel(shares, kind.axis_title), name, width, 2.1),
    }


def _css_width(share: float) -> str:
    return f"{100 * min(1.0, max(0.0, share)):.1f}%" if math.isfinite(share) else "0"


def _small(value: float) -> str:
    return "–" if math.isnan(value) else "0" if abs(value) < ROUNDING else f"{value:.2g}"


def _tenth(values: Any) -> int:
    return max(1, len(values) // 10)


def _made_by() -> str:
    try:
        return f"UniPO {version('unipo')}"
    except PackageNotFoundError:
        return "UniPO"


def _environment() -> jinja2.Environment:
    """Everything is escaped; only the pictures, which we drew, are marked safe in the template."""
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.Undefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
