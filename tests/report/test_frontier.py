"""Rewards over the KL: what is drawn, what is said of it, and when there is nothing to draw."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from tests.report.synthetic import make_run
from unipo.report.frontier import (
    GOLD,
    PROXY,
    draw_frontier,
    draw_optimisation,
    frontier_column,
    has_gold,
    optimisation_note,
    path_of,
)
from unipo.report.groups import group
from unipo.report.html import write_report
from unipo.report.runs import RunData, read_run


def run_of(
    folder: Path, gold: np.ndarray | None, proxy: np.ndarray, kl: np.ndarray | None, **config: object
) -> RunData:
    """A run with these columns, step 0 without any."""
    made = read_run(make_run(folder, **config))  # type: ignore[arg-type]
    steps = len(made)
    columns = dict(made.metrics)
    for name, values in (("gold", gold), ("reward", proxy), ("kl_answer", kl)):
        if values is not None:
            columns[name] = np.append(
                np.nan, np.interp(np.linspace(0, 1, steps - 1), np.linspace(0, 1, len(values)), values)
            )
    return RunData(folder=made.folder, config=made.config, metrics=columns, samples=made.samples)


KL = np.linspace(0.0, 9.0, 50)
PEAKED = np.sqrt(KL) - 0.3 * KL


def test_a_path_is_in_the_order_of_the_steps_and_of_few_points(tmp_path: Path) -> None:
    run = run_of(tmp_path / "a", PEAKED, np.sqrt(KL), KL)
    path = path_of(run, GOLD)
    assert path is not None
    assert len(path.steps) == 12
    assert (np.diff(path.steps) > 0).all()
    assert (np.diff(path.distance) > 0).all()
    assert path.distance[path.top] == pytest.approx((1 / 0.6) ** 2, abs=0.5), "the top of sqrt(x) - 0.3 x"
    assert path_of(run, "nothing") is None


def test_what_is_said_of_the_gold_reward(tmp_path: Path) -> None:
    fallen = optimisation_note(run_of(tmp_path / "a", PEAKED, np.sqrt(KL), KL))
    assert "and then falls to" in fallen
    rising = optimisation_note(run_of(tmp_path / "b", np.sqrt(KL), np.sqrt(KL), KL))
    assert rising.startswith("gold does not fall")
    assert optimisation_note(run_of(tmp_path / "c", None, np.sqrt(KL), KL)) == ""
    assert not has_gold(run_of(tmp_path / "d", PEAKED, np.sqrt(KL), None))


def test_two_axes_where_sizes_differ(tmp_path: Path) -> None:
    for scale, offset, axes in ((0.5, 0.0, 1), (100.0, 0.0, 2), (1.0, 50.0, 2)):
        run = run_of(tmp_path / f"{scale}{offset}", PEAKED, scale * np.sqrt(KL) + offset, KL)
        figure = Figure()
        draw_optimisation(run)(figure.add_subplot())
        assert len(figure.axes) == axes
        assert figure.axes[0].get_xlim()[0] == 0.0


def test_a_frontier_needs_two_configurations(tmp_path: Path) -> None:
    first = run_of(tmp_path / "a", PEAKED, np.sqrt(KL), KL, method="grpo")
    second = run_of(tmp_path / "b", np.sqrt(KL), np.sqrt(KL), KL, method="rloo")
    without = run_of(tmp_path / "c", None, np.sqrt(KL), KL, method="gspo")
    assert frontier_column(group([first, second])) == GOLD
    assert frontier_column(group([first, without])) == PROXY
    assert frontier_column(group([first])) == ""
    figure = Figure()
    draw_frontier(group([first, second]), GOLD)(figure.add_subplot())
    assert len(figure.axes[0].lines) == 4, "a path and its end for each run"


def test_reports_have_the_panels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = {name: run_of(tmp_path / name, PEAKED, np.sqrt(KL), KL, method=name) for name in ("grpo", "rloo")}
    monkeypatch.setattr("unipo.report.html.read_run", lambda folder: runs[folder.name])
    alone = write_report([tmp_path / "grpo"], tmp_path / "out" / "one.html").read_text()
    assert "Proxy and gold" in alone
    assert "and then falls to" in alone
    both = write_report([tmp_path / "grpo", tmp_path / "rloo"], tmp_path / "out" / "two.html").read_text()
    assert "Gold reward over the KL" in both
