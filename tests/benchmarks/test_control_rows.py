"""The control rows: what is counted, what a limit is made of, and what the comparison of returns says."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from benchmarks.control import limits, returns, rows, side
from benchmarks.control.settings import OFFLINE, PPO, SAC
from benchmarks.control.side_ours import settings_of

NAMES = ("ppo-cartpole", "ppo-halfcheetah", "sac-halfcheetah", "td3bc", "iql", "collector-8", "collector-64")


def test_a_meter_leaves_the_warm_up_out_and_stops_after_its_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(side.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(side, "processor_seconds", lambda: 0.5 * clock[0])
    meter = side.Meter("update", warm=2.0, seconds=3.0)
    going = []
    for _ in range(6):
        clock[0] += 1.0
        going.append(meter.add(10))
    assert going == [True, True, True, True, False, False]  # begun after the second, three seconds from there
    found = meter.result()
    assert (found["units"], found["wall_seconds"], found["cpu_seconds"], found["warm_seconds"]) == (40, 4.0, 2.0, 2.0)


def test_the_products_of_an_update_by_hand() -> None:
    """Networks of width 256 on 17 observations and 6 actions, batch 256; multiply-adds count two."""
    actor, critic = 17 * 256 + 256 * 256 + 256 * 12, 23 * 256 + 256 * 256 + 256
    forward = 2 * actor + 6 * critic  # s' and s of the actor; slow twins, twins, twins under the actor
    weights = actor + 2 * critic
    inputs = (256 * 256 + 256 * 12) + 2 * (256 * 256 + 256) + 2 * critic  # to layer 1 of those, to the actions of these
    assert limits.flop("sac-halfcheetah", 256) == 2 * 256 * (forward + weights + inputs)


def test_welch_by_hand() -> None:
    difference, low, high = returns.welch([3.0, 5.0], [1.0, 1.0])
    half = 12.706 * 1.0  # spread 2 / 2 on one side, 0 on the other: one degree of freedom
    assert difference == 3.0
    assert (low, high) == (pytest.approx(3.0 - half, abs=0.1), pytest.approx(3.0 + half, abs=0.1))


def test_returns_are_the_same_unless_the_fast_side_is_below() -> None:
    def verdict(fast: list[float], slow: list[float]) -> bool:
        scores = {"fast": dict(zip("012", fast, strict=True)), "slow": dict(zip("012", slow, strict=True)), "peer": {}}
        return bool(returns.concluded("iql", scores)["same"])

    assert verdict([10.0, 11.0, 12.0], [11.0, 12.0, 10.0])
    assert verdict([30.0, 31.0, 32.0], [11.0, 12.0, 10.0])
    assert not verdict([10.0, 11.0, 12.0], [31.0, 32.0, 30.0])


def test_a_row_without_compared_returns_has_no_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "RETURNS", tmp_path)
    gate = rows.stored_returns("iql")
    assert "benchmarks.control.returns iql" in gate([], [])
    for same in (True, False):
        found = {"same": same, "ours": 1.0, "peer": 2.0, "when": "today"}
        (tmp_path / "iql.json").write_text(json.dumps(found))
        assert (gate([], []) == "") is same


@pytest.mark.parametrize("row", sorted(PPO))
def test_ours_has_the_settings_of_the_row(row: str) -> None:
    method, options, settings = settings_of(row, 64)
    given = PPO[row]
    assert method == "ppo"
    assert options["value"] == 2 * given["vf_coef"]  # our term is half the squared error
    assert settings["num_envs"] * settings["rollout"] == given["n_envs"] * given["n_steps"]
    assert settings["hidden"] == (given["width"],) * 2


def test_every_row_of_the_issue_is_there_with_ours_and_a_quick_peer() -> None:
    found = {row.name: row for row in rows.ROWS}
    assert set(NAMES) <= set(found)
    for row in found.values():
        assert row.limit is not None
        if not row.name.startswith("collector"):
            assert any(peer.quick is not None for peer in row.peers), row.name
    assert all(math.isfinite(row.goal) and row.goal > 0 for row in found.values())
    assert set(returns.TRIALS) <= {*PPO, *SAC, *OFFLINE}
