"""Run folders: what is read, and what is refused with which words."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from tests.report.synthetic import make_run, write_metrics
from unipo.report.runs import RunFolderError, read_run


def test_what_is_read(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path / "run", steps=50))
    assert len(run) == 51
    assert run.measured("accuracy")[0].tolist() == [0, 25, 50]
    assert run.first("reward") == run.column("reward")[1]
    assert math.isnan(run.last("never_measured"))
    steps, speed = run.speed
    assert steps.tolist() == list(range(1, 51))
    np.testing.assert_allclose(speed, (2800 + 3900) / 0.9)
    assert run.finished
    assert {s["source"] for s in run.samples} == {"held_out", "fresh"}


def test_rows_are_sorted_and_text_columns_left_out(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", steps=3)
    write_metrics(folder, [{"step": 2, "reward": 0.2}, {"step": 1, "reward": 0.1}])
    run = read_run(folder)
    assert run.measured("reward")[1].tolist() == [0.1, 0.2]
    assert not run.finished


def test_half_written_sample_is_left_out(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", steps=3)
    before = len(read_run(folder).samples)
    with open(folder / "samples.jsonl", "a") as file:
        file.write('{"step": 9, "prom')
    assert len(read_run(folder).samples) == before


def test_not_a_run(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="found nothing at"):
        read_run(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(RunFolderError, match=r"no config\.yaml"):
        read_run(tmp_path / "empty")
    folder = make_run(tmp_path / "run", steps=2)
    (folder / "config.yaml").write_text("- a list\n")
    with pytest.raises(RunFolderError, match="does not hold settings"):
        read_run(folder)
    (folder / "config.yaml").write_text("steps: 2\n")
    (folder / "metrics.parquet").write_bytes(b"PAR1 torn")
    with pytest.raises(RunFolderError, match=r"damaged .*unipo resume"):
        read_run(folder)
    (folder / "metrics.parquet").unlink()
    with pytest.raises(RunFolderError, match=r"no step was recorded yet.*unipo resume"):
        read_run(folder)
