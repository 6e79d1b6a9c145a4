"""The table of control results: its statistics by hand, what it pairs up, and where it writes."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

FILE = Path(__file__).resolve().parents[2] / "benchmarks" / "control" / "table.py"
SPEC = importlib.util.spec_from_file_location("control_table", FILE)
assert SPEC is not None
assert SPEC.loader is not None
table = importlib.util.module_from_spec(SPEC)
sys.modules["control_table"] = table
SPEC.loader.exec_module(table)


def record(folder: Path, side: str, scores: list[float], steps: int = 100, **settings: Any) -> Path:
    """A file with one seed per score: two episodes around it, a curve from 0 to it, 50 steps a second."""
    seeds = [
        {
            "seed": i,
            "returns": [score - 1, score + 1],
            "curve": [[0, 0.0], [steps, score]],
            "seconds": steps / (100 if side == "ours" else 50),
        }
        for i, score in enumerate(scores)
    ]
    content = {
        "algorithm": "ppo",
        "environment": "CartPole-v1",
        "total_steps": steps,
        "settings": settings,
        "seeds": seeds,
    }
    path = folder / side / "ppo-CartPole-v1.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def build(folder: Path) -> str:
    page = folder / "control.md"
    table.main(["--peers", str(folder / "peers"), "--ours", str(folder / "ours"), "--page", str(page)])
    return page.read_text()


def test_the_interquartile_mean_of_five_is_that_of_the_middle_three() -> None:
    assert table.iqm(np.array([100.0, 1.0, 2.0, 6.0, -50.0])) == pytest.approx((1 + 2 + 6) / 3)


def test_welch_by_hand() -> None:
    """a: mean 4, s2/n = 4/3; b: mean 1, s2/n = 1/4. nu = (19/12)^2 / ((4/3)^2/2 + (1/4)^2/3) = 2.75584."""
    a, b = np.array([2.0, 4.0, 6.0]), np.array([0.0, 1.0, 2.0, 1.0]) * math.sqrt(1.5) + 1 - math.sqrt(1.5)
    nu = (19 / 12) ** 2 / ((4 / 3) ** 2 / 2 + (1 / 4) ** 2 / 3)
    assert nu == pytest.approx(2.7558, abs=1e-4)
    difference, low, high = table.welch_interval(a, b)
    assert difference == pytest.approx(3.0)
    assert high - 3 == pytest.approx(3 - low)
    t = (high - 3) / math.sqrt(19 / 12)
    assert _t_cdf(t, nu) == pytest.approx(0.975, abs=1e-6)


def _t_cdf(t: float, nu: float) -> float:
    """Student's distribution function by integrating its density."""
    x = np.linspace(0, t, 200_001)
    density = (1 + x**2 / nu) ** (-(nu + 1) / 2)
    constant = math.gamma((nu + 1) / 2) / (math.sqrt(nu * math.pi) * math.gamma(nu / 2))
    return 0.5 + constant * float(np.trapezoid(density, x))


def test_constant_samples_have_no_width_and_one_seed_has_no_interval() -> None:
    assert table.welch_interval(np.full(5, 3.0), np.full(4, 1.0)) == (2.0, 2.0, 2.0)
    difference, low, high = table.welch_interval(np.array([3.0]), np.array([1.0, 2.0]))
    assert difference == 1.5
    assert math.isnan(low)
    assert math.isnan(high)


@pytest.mark.parametrize(
    ("interval", "said"),
    [
        ((-2.0, -3.0, -1.0), "below"),
        ((2.0, 1.0, 3.0), "above"),
        ((0.5, -1.0, 2.0), "no difference shown"),
        ((0.0, 0.0, 0.0), "no difference shown"),
        ((1.0, math.nan, math.nan), "one seed"),
    ],
)
def test_verdicts(interval: tuple[float, float, float], said: str) -> None:
    assert table.verdict(interval) == said


def test_both_sides_in_a_row(tmp_path: Path) -> None:
    record(tmp_path, "peers", [10.0, 10.0, 10.0], gamma=0.98, n_envs=8)
    record(tmp_path, "ours", [7.0, 7.0, 7.0], rollout=1)
    text = build(tmp_path)
    row = next(line for line in text.splitlines() if line.startswith("| ppo"))
    assert row == (
        "| ppo | CartPole-v1 | 100 | 3/3 | 7.0 [7.0, 7.0] | 10.0 [10.0, 10.0] | -3.0 [-3.0, -3.0] | below "
        "| 100 steps/s | 50 steps/s | 2.00 |"
    )
    assert "| gamma | 0.98 |\n| n_envs | 8 |" in text
    assert (tmp_path / "control.png").stat().st_size > 1000


def test_peers_alone_leave_our_side_empty_and_the_rest_of_the_page_stands(tmp_path: Path) -> None:
    record(tmp_path, "peers", [1.0, 2.0])
    (tmp_path / "control.md").write_text(f"# Title\n\nbefore\n\n{table.START}\nold\n{table.END}\n\nafter\n")
    text = build(tmp_path)
    assert text.startswith("# Title\n\nbefore\n\n")
    assert text.endswith(f"{table.END}\n\nafter\n")
    assert "old" not in text
    assert "| ppo | CartPole-v1 | 100 | 2 |  | 1.5 [1.0, 2.0] |  |  |  | 50 steps/s |  |" in text
    assert build(tmp_path) == text


def test_processor_time_and_updates_are_shown_where_both_sides_have_them(tmp_path: Path) -> None:
    for side, seconds in (("ours", 4.0), ("peers", 2.0)):
        path = record(tmp_path, side, [1.0])
        content = json.loads(path.read_text())
        content["seeds"][0] |= {"cpu_seconds": seconds, "steps": 120, "updates": 60}
        path.write_text(json.dumps(content))
    assert "| 15 updates/CPU s | 30 updates/CPU s | 0.50 |" in build(tmp_path)
    record(tmp_path, "ours", [1.0])
    assert "| 100 steps/s | 60 steps/s | 1.67 |" in build(tmp_path)


def test_bad_input_says_what_to_do(tmp_path: Path) -> None:
    peers = table.read_scores(record(tmp_path, "peers", [1.0]))
    ours = table.read_scores(record(tmp_path, "ours", [1.0], steps=200))
    with pytest.raises(ValueError, match="ppo on CartPole-v1: expected one budget, found 200 and 100 steps"):
        table.pair_up([ours], [peers])
    with pytest.raises(ValueError, match="at least one finished seed"):
        table.read_scores(record(tmp_path, "peers", []))
    with pytest.raises(ValueError, match="expected finite returns"):
        table.read_scores(record(tmp_path, "peers", [math.nan]))
    with pytest.raises(ValueError, match="put both where the table belongs"):
        table.written("no markers", [])
