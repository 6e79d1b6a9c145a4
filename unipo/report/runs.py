"""Reading a run folder: config.yaml, metrics.parquet, samples.jsonl, events.jsonl. Everything but the first two is optional."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

Row = Mapping[str, Any]


class RunFolderError(OSError):
    """A folder that is not a run, or a run that has nothing to show yet; the message says what to do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunData:
    """What a run wrote.

    folder: where it is.
    config: config.yaml as plain values.
    metrics: column name -> [T] float64, one value per recorded step, NaN where not measured; sorted by `step`.
    samples: completions, {step, prompt, completion, reward, source, truncated}.
    events: {step, level, message}.
    """

    folder: Path
    config: Mapping[str, Any]
    metrics: Mapping[str, np.ndarray]
    samples: tuple[Row, ...] = ()
    events: tuple[Row, ...] = ()

    def __len__(self) -> int:
        return len(self.metrics["step"])

    def column(self, name: str) -> np.ndarray:
        """[T]; all NaN for a column that this run does not have."""
        return self.metrics.get(name, np.full(len(self), np.nan))

    def measured(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """(steps [M], values [M]) where `name` is finite."""
        values = self.column(name)
        good = np.isfinite(values)
        return self.metrics["step"][good], values[good]

    def first(self, name: str) -> float:
        """The first finite value, or NaN."""
        values = self.measured(name)[1]
        return float(values[0]) if len(values) else float("nan")

    def last(self, name: str) -> float:
        """The last finite value, or NaN."""
        values = self.measured(name)[1]
        return float(values[-1]) if len(values) else float("nan")

    def setting(self, name: str, default: str = "unknown") -> str:
        """A value of config.yaml as text."""
        value = self.config.get(name)
        return default if value in (None, "", {}) else str(value)

    @property
    def tokens_per_second(self) -> tuple[np.ndarray, np.ndarray]:
        """(steps [M], tokens sampled and trained per second between a recorded step and the one before)."""
        tokens = np.nan_to_num(self.column("tokens_sampled")) + np.nan_to_num(self.column("tokens_trained"))
        elapsed, made = np.diff(self.column("seconds")), np.diff(tokens)
        good = np.isfinite(elapsed) & (elapsed > 0) & (made > 0)
        return self.metrics["step"][1:][good], made[good] / elapsed[good]

    @property
    def finished(self) -> bool:
        """Whether the last step that was asked for is there (runs that do not say count as finished)."""
        asked = self.config.get("steps")
        return not isinstance(asked, int) or self.metrics["step"][-1] >= asked


def read_run(folder: Path) -> RunData:
    """Read what is there. Raises RunFolderError for anything that is not the folder of a run with one recorded step."""
    if not folder.is_dir():
        raise RunFolderError(
            f"expected the folder of a run, found nothing at {folder}: give the --out of a `unipo run`"
        )
    config_file, metrics_file = folder / "config.yaml", folder / "metrics.parquet"
    if not config_file.exists():
        raise RunFolderError(f"{folder} is not a run: it has no config.yaml. Give the --out of a `unipo run`")
    if not metrics_file.exists():
        raise RunFolderError(f"{folder} has no metrics.parquet: no step was recorded yet. Go on: unipo resume {folder}")
    try:
        config = yaml.safe_load(config_file.read_text(encoding="utf-8"))
        table = pq.read_table(metrics_file)
    except (yaml.YAMLError, UnicodeDecodeError, pa.ArrowException) as error:
        raise RunFolderError(
            f"{folder} is damaged ({error}): `unipo resume {folder}` writes the metrics again"
        ) from error
    if not isinstance(config, dict):
        raise RunFolderError(f"{config_file} does not hold settings: it is damaged, or not a run's")
    if not table.num_rows or "step" not in table.column_names:
        raise RunFolderError(f"{metrics_file} has no recorded steps. Go on: unipo resume {folder}")
    samples, events = _lines(folder / "samples.jsonl"), _lines(folder / "events.jsonl")
    return RunData(folder=folder, config=config, metrics=_columns(table), samples=samples, events=events)


USUAL = ("steps", "seed", "model", "reward", "prompts", "rollouts", "replay", "demos", "pairs", "learning_rate")
"""The settings that the short command names."""


def command(config: Mapping[str, Any]) -> str:
    """The command line in short: the usual settings, where they are not 0 ("the method's own") or empty."""
    return _command(config, [n for n in USUAL if n == "seed" or config.get(n)])


def full_command(config: Mapping[str, Any]) -> str:
    """The command line with every setting spelled out: it does not depend on what the defaults are."""
    return _command(config, [n for n in config if n not in ("method", "task", "method_options", "out")])


def _command(config: Mapping[str, Any], names: Iterable[str]) -> str:
    words = ["unipo", "run", str(config.get("method", "METHOD")), str(config.get("task", "TASK"))]
    for name in names:
        words += _flag(name, config.get(name))
    for method, options in (config.get("method_options") or {}).items():
        for name, value in options.items():
            words += _flag(f"{method}.{name}", value)
    return shlex.join(words)


def _flag(name: str, value: Any) -> list[str]:
    flag = f"--{name.replace('_', '-')}"
    if isinstance(value, bool):
        return [flag if value else flag.replace("--", "--no-", 1)]
    if isinstance(value, list | tuple):
        return [flag, *map(str, value)] if value else []
    return [] if value in (None, "") else [flag, str(value)]


def _columns(table: pa.Table) -> dict[str, np.ndarray]:
    order = np.argsort(np.asarray(table["step"].to_numpy(), dtype=np.float64), kind="stable")
    found = {}
    for name in table.column_names:
        kind = table[name].type
        if pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind):
            found[name] = table[name].to_numpy().astype(np.float64)[order]
    return found


def _lines(path: Path) -> tuple[Row, ...]:
    """JSON objects, one per line; a line that was cut by a crash is left out."""
    found = []
    if path.exists():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                continue
            if isinstance(row, dict):
                found.append(row)
    return tuple(found)
