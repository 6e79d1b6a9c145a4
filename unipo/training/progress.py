"""What a run shows while it goes: one live line with a bar, a line per evaluation, and notes."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Table

SHOWN = {
    "reward": ("reward", "{:.3f}"), "length": ("len", "{:.1f}"), "entropy": ("ent", "{:.2f}"), "kl": ("kl", "{:.1e}"),
    "ess": ("ess", "{:.2f}"), "clipped_share": ("clip", "{:.3f}"),
}  # fmt: skip
ACTED = {"env_steps": ("env steps", "{:,.0f}"), **SHOWN, "reward": ("return", "{:,.1f}"), "length": ("len", "{:.0f}")}
"""What is shown of a step in environments."""
MEASURED = {"accuracy": ("held-out accuracy", "{:.1%}"), "eval_return": ("return", "{:,.1f}")}
"""What an evaluation says, with the interval in NAME_low and NAME_high."""
QUIET_SECONDS = 5.0
"""Where there is no terminal, a line is printed this often."""


class Progress:
    """Live on a terminal; plain lines elsewhere; nothing when `console` is quiet."""

    def __init__(self, steps: int, console: Console | None = None) -> None:
        self.console = console or Console()
        self.steps = steps
        self._bar = Bar(
            TextColumn("[bold]step"), MofNCompleteColumn(), BarColumn(bar_width=20), TimeElapsedColumn(), TextColumn("eta"),
            TimeRemainingColumn(), TextColumn("{task.description}"), console=self.console,
        )  # fmt: skip
        self._task = self._bar.add_task("", total=steps)
        self._printed = 0.0
        self._last = (0.0, 0.0)

    def __enter__(self) -> Self:
        if self.console.is_terminal:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def step(self, row: Mapping[str, float]) -> None:
        """Show the row of a step; a measured accuracy gets a line of its own."""
        shown = ACTED if "env_steps" in row else SHOWN
        line = " ".join(f"{label} {form.format(row[k])}" for k, (label, form) in shown.items() if _finite(row.get(k)))
        line += self._speed(row)
        self._bar.update(self._task, completed=int(row["step"]), description=line)
        place = f"  {row['env_steps']:>9,.0f} env steps" if "env_steps" in row else ""
        for name, (title, form) in MEASURED.items():
            if _finite(row.get(name)):
                low, high = form.format(row[f"{name}_low"]), form.format(row[f"{name}_high"])
                self._say(
                    f"step {int(row['step']):>4}{place}  {title} [bold]{form.format(row[name])}[/] "
                    f"[dim](95 % interval {low} to {high})[/]"
                )
        if not self.console.is_terminal and time.monotonic() - self._printed > QUIET_SECONDS and line:
            self._say(f"step {int(row['step']):>4}/{self.steps}  {line}")

    def _speed(self, row: Mapping[str, float]) -> str:
        """Per second: environment steps where there are any, else tokens sampled and trained."""
        acted, seconds = "env_steps" in row, row.get("seconds", 0.0)
        done = row["env_steps"] if acted else row.get("tokens_sampled", 0.0) + row.get("tokens_trained", 0.0)
        (before, then), self._last = self._last, (done, seconds)
        unit = "steps/s" if acted else "tok/s"
        return f" {(done - before) / (seconds - then):,.0f} {unit}" if seconds > then and done > before else ""

    def terms(self, row: Mapping[str, float], titles: Sequence[str]) -> None:
        """The effective weight of each term, as the first batch has it."""
        unit = "tokens" if "tokens_sampled" in row else "steps"
        table = Table(
            "term", "coefficient", f"{unit} moved", "gradient share", title="what moves the policy (first batch)"
        )
        for title in dict.fromkeys(titles):
            key = f"ledger/term/{title}"
            cells = (
                f"{row[key + '/coefficient']:g}",
                f"{row[key + '/tokens']:.0f}",
                f"{row[key + '/gradient_share']:.1%}",
            )
            table.add_row(title, *cells)
        self.console.print(table)

    def note(self, message: str) -> None:
        self._say(f"[yellow]note[/] {message}")

    def _say(self, text: str) -> None:
        self._printed = time.monotonic()
        self.console.print(text, highlight=False, soft_wrap=True)


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)
