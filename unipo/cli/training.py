"""unipo run, resume, compare."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import tyro

from unipo.cli.words import UsageError, console, divided, parsed, taken


def run(arguments: list[str]) -> int:
    from unipo.api import finish, start

    config, recipe = parsed("run", arguments)
    made = start(config, recipe, console)
    console.print(
        f"[bold]{config.method}[/] on [bold]{config.task}[/], seed {config.seed}, in {config.folder}", highlight=False
    )
    if "--no-preset" not in arguments:
        _tell_preset(config.method, config.task)
    return _finished(finish(made))


def _tell_preset(method: str, task: str) -> None:
    """Which settings of a pair are not the method's own, where there are such."""
    from unipo.training.presets import preset_of

    fields, keywords = preset_of(method, task)
    if fields or keywords:
        told = ", ".join(f"{k} {v}" for k, v in {**fields, **keywords}.items())
        console.print(f"preset of {method} on {task} (--no-preset for none): {told}", highlight=False, soft_wrap=True)


def resume(arguments: list[str]) -> int:
    from unipo import api

    def parse(folder: Annotated[str, tyro.conf.Positional], changed_code: bool = False) -> Any:
        """Go on with a run from its newest whole checkpoint.

        Args:
            folder: The run directory.
            changed_code: Go on although code or configuration have changed since.
        """
        return api.resume(folder, console, changed_code)

    return _finished(tyro.cli(parse, prog="unipo resume", args=arguments))


def _finished(made: Any) -> int:
    """Say what came out, write the report, name its path last."""
    from unipo.report import write_report
    from unipo.training.judging import by_margin

    for name, shown, form in (("accuracy", "held-out accuracy", "{:.1%}"), ("eval_return", "return", "{:,.1f}")):
        measured = [m for m in made.records.metrics if m.get(name, float("nan")) == m.get(name)]
        if measured:
            first, last = measured[0], measured[-1]
            low, high = form.format(last[f"{name}_low"]), form.format(last[f"{name}_high"])
            console.print(
                f"{shown} [bold]{form.format(first[name])}[/] -> [bold]{form.format(last[name])}[/] "
                f"(95 % interval {low} to {high}) in {last['seconds']:.0f} s",
                highlight=False,
            )
            told = by_margin(last) if name == "accuracy" else ""
            if told:
                console.print(told, highlight=False, soft_wrap=True)
    kind = "judge " if getattr(made.policy, "judges", "") else "policy"
    console.print(f"{kind}  {made.folder / 'final'}", highlight=False, soft_wrap=True)
    if getattr(made.config, "record", ""):
        told = f"{made.data.collector.recorder.recorded:,} episodes; unipo data check {made.config.record}"
        console.print(f"data    {made.config.record}  ({told})", highlight=False, soft_wrap=True)
    for path in sorted((made.folder / "video").glob("*.*")):
        console.print(f"video   {path}", highlight=False, soft_wrap=True)
    page = write_report([made.folder], made.folder / "report.html")
    console.print(f"report  [bold]{page}[/]", highlight=False, soft_wrap=True)
    return 0


def compare(arguments: list[str]) -> int:
    from unipo import api
    from unipo.methods.catalog import parse as parse_method
    from unipo.report import comparison_table, write_report

    words, _, flags = divided(arguments)
    if len(words) != 2:
        raise UsageError("unipo compare takes METHOD,METHOD,... and TASK first, then flags such as --seeds 3")
    methods, task = words[0].split(","), words[1]
    for method in methods:
        parse_method(method)
    seeds, flags = taken(flags, "--seeds", 3)
    preset, flags = "--no-preset" not in flags, [f for f in flags if f != "--no-preset"]
    default, _ = api.configure(methods[0], task, {}, preset=False)
    config = tyro.cli(type(default), prog="unipo compare METHODS TASK --seeds K", args=flags, default=default)
    out = config.out or f"runs/compare-{Path(task).stem.replace(':', '_')}"
    skip = {"method", "task", "seed", "out", "method_options"}
    changed = {
        n: v
        for n in type(default).__dataclass_fields__
        if n not in skip and (v := getattr(config, n)) != getattr(default, n)
    }
    for method in methods if preset else ():
        _tell_preset(method, task)
    folders = api.compare(methods, task, seeds, out, console, preset=preset, **changed)
    console.print(comparison_table(folders))
    console.print(
        f"report  [bold]{write_report(folders, Path(out) / 'report.html')}[/]", highlight=False, soft_wrap=True
    )
    return 0
