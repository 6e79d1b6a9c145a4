"""Pictures of verdicts: drawn from what is written, of the metrics that decide."""

from __future__ import annotations

from pathlib import Path

import pytest

from unipo.methods.catalog import BY_SLUG, STUDIES
from unipo.reproduce.catalog_page import catalog_page
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


def test_the_page_of_methods_shows_whatever_is_built() -> None:
    """Every method and study once, with its rows; a verdict links to its claim."""
    shown = catalog_page()
    for slug in (*BY_SLUG, *STUDIES):
        assert shown.count(f"| `{slug}` |") == 1, slug
    assert "| `grpo` | Group relative policy optimization, arXiv 2402.03300, eq. 3 and 4 | rollouts | text |" in shown
    assert "[reproduced](claims.md#copg)" in shown
