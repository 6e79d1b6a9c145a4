"""Reading a run folder: config.yaml and metrics.parquet; samples.jsonl, events.jsonl and a video where there are any."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from unipo.report.commands import full_command
from unipo.report.kinds import Kind, kind_of

Row = Mapping[str, Any]


class RunFolderError(OSError):
    """A folder that is not a run, or a run that has nothing to show yet; the message says what to do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunData:
    """What a run wrote.

    folder: where it is.
    config: config.yaml as plain values.
    metrics: column name -> [T] float64, one value per recorded step, NaN where not measured; sorted by `step`.
    samples: completions or episodes, {step, prompt, completion, reward, source, truncated}.
    events: {step, level, message}.
    video: the smallest file `video*.mp4` or `video*.gif` in the folder, or in its folder `video`.
    """

    folder: Path
    config: Mapping[str, Any]
    metrics: Mapping[str, np.ndarray]
    samples: tuple[Row, ...] = ()
    events: tuple[Row, ...] = ()
    video: Path | None = None

    @property
    def kind(self) -> Kind:
        return kind_of(self.config)

    @property
    def command(self) -> str:
        """The command line that makes it again: `command.txt`, or with every setting spelled out."""
        file = self.folder / "command.txt"
        return file.read_text(encoding="utf-8").strip() if file.exists() else full_command(self.config)

    def __len__(self) -> int:
        return len(self.metrics["step"])

    def column(self, name: str) -> np.ndarray:
        """[T]; all NaN for a column that this run does not have."""
        return self.metrics.get(name, np.full(len(self), np.nan))

    @property
    def axis(self) -> np.ndarray:
        """[T] where the recorded steps stand on the axis of this kind of run; it starts at 0, unknown places lie between."""
        steps, places = self.metrics["step"], self.column(self.kind.axis)
        known = np.isfinite(places) & (steps > 0)
        if not known.any():
            return steps
        return np.interp(steps, np.append(0.0, steps[known]), np.append(0.0, places[known]))

    def measured(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """(places on the axis [M], values [M]) where `name` is finite."""
        values = self.column(name)
        good = np.isfinite(values)
        return self.axis[good], values[good]

    def scores(self, place: float) -> np.ndarray:
        """[E] the scores behind the measure at a `place` of the axis; the measure itself [1] where they were not all kept."""
        measure, at = self.kind.measure, int(np.searchsorted(self.axis, place))
        value = self.column(measure.curve.column)[at]
        step = self.metrics["step"][at]
        rows = (
            s for s in self.samples if measure.scored and s.get("source") == measure.scored and s.get("step") == step
        )
        kept = np.array([r for s in rows if isinstance(r := s.get("reward"), int | float)], dtype=np.float64)
        return kept if len(kept) and np.isclose(kept.mean(), value) else np.array([value])

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
    def work(self) -> np.ndarray:
        """[T] the work done so far, tokens sampled and trained or environment steps: 0 at step 0, NaN where not recorded."""
        parts = np.stack([self.column(name) for name in self.kind.work])
        return np.where(np.isfinite(parts).any(0) | (self.metrics["step"] == 0), np.nan_to_num(parts).sum(0), np.nan)

    @property
    def worked(self) -> float:
        """The work of the whole run, or NaN."""
        known = self.work[np.isfinite(self.work)]
        return float(known[-1]) if len(known) and known[-1] > 0 else float("nan")

    @property
    def speed(self) -> tuple[np.ndarray, np.ndarray]:
        """(places [M], work per second since the recorded step before)."""
        known = np.isfinite(self.work) & np.isfinite(self.column("seconds"))
        elapsed, made = np.diff(self.column("seconds")[known]), np.diff(self.work[known])
        good = (elapsed > 0) & (made > 0)
        return self.axis[known][1:][good], made[good] / elapsed[good]

    @property
    def finished(self) -> bool:
        """Whether the last step that was asked for is there (runs that do not say count as finished)."""
        asked = self.kind.planned(self.config)
        return asked is None or bool(self.metrics["step"][-1] >= asked)


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
    return RunData(
        folder=folder, config=config, metrics=_columns(table), samples=samples, events=events, video=_video(folder)
    )


def _video(folder: Path) -> Path | None:
    found = [p for place in (folder, folder / "video") for end in ("mp4", "gif") for p in place.glob(f"video*.{end}")]
    return min(found, key=lambda p: (p.stat().st_size, p.name), default=None)


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
