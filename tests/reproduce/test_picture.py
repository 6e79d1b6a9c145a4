"""Pictures of verdicts: drawn from what is written, of the metrics that decide."""

from __future__ import annotations

from pathlib import Path

import pytest

from unipo.reproduce.page import verdicts
from unipo.reproduce.picture import deciding, picture


def made(**changes: object) -> dict:
    spread = {"seeds": [0.1, None, 0.3], "mean": 0.2, "interval": [0.0, 0.4]}
    one = {"seeds": [0.1], "mean": 0.1, "interval": [None, None]}
    numbers = {"method": {"learning_rate": 0.1, "success": spread, "length": spread},
               "grpo": {"learning_rate": 0.1, "success": one, "length": one}}  # fmt: skip
    parts = [{"expected": "0 < success: method - grpo"}]
    return {
        "slug": "method",
        "verdict": "reproduced",
        "seeds": [0, 1, 2],
        "numbers": numbers,
        "expectations": parts,
        **changes,
    }


def test_panels_are_the_metrics_that_decide(tmp_path: Path) -> None:
    assert deciding(made()) == ["success"]
    assert deciding(made(expectations=[])) == ["success", "length"]
    assert picture(made(), tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("verdict", verdicts(), ids=lambda v: v["slug"])
def test_every_verdict_names_what_it_measured(verdict: dict) -> None:
    assert 1 <= len(deciding(verdict)) <= 4
    assert "learning_rate" not in deciding(verdict)
