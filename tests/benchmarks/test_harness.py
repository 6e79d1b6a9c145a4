"""The harness with sides that are made up: turns, ratios, gates, what is written, what a failure looks like."""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from rich.console import Console

from benchmarks.bench import bench, chosen
from benchmarks.forks import Forks
from benchmarks.harness import (
    Result,
    Row,
    Side,
    SideFailed,
    compare,
    measure,
    parse,
    run_fresh,
    same_returns,
    same_update,
    turn_ratios,
)
from benchmarks.peers import DIRECT, LOCK, ROOT, install
from benchmarks.report import table, time_text

OURS, FAST, SLOW = (Side(name=name, command=()) for name in ("ours", "fast peer", "slow peer"))
LIMIT = Side(name="limit", command=())
ROW = Row(name="row", title="a row", ours=OURS, peers=(SLOW, FAST), turns=3, goal=2.0)


def result(seconds: float, **more: object) -> Result:
    """Ten steps in ten times `seconds`; the wall clock ran twice as long."""
    return Result(unit="step", units=10, cpu_seconds=10 * seconds, wall_seconds=20 * seconds, **more)  # type: ignore[arg-type]


class Script:
    """Answers each side from its own list, and writes down who was asked."""

    def __init__(self, answers: Mapping[str, list[Result | SideFailed]]) -> None:
        self.answers: dict[str, Iterator[Result | SideFailed]] = {k: iter(v) for k, v in answers.items()}
        self.asked: list[str] = []

    def __call__(self, side: Side, quick: bool, threads: int) -> Result:
        self.asked.append(side.name)
        answer = next(self.answers[side.name])
        if isinstance(answer, SideFailed):
            raise answer
        return answer


def test_turns_alternate_and_a_slow_setting_has_one() -> None:
    run = Script({"ours": [result(1)] * 4, "fast peer": [result(3)] * 3, "slow peer": [result(4)] * 3})
    made = measure(ROW, run, False, {})
    turn = ["ours", "fast peer"]
    assert run.asked == ["ours", "slow peer", "fast peer", *turn, *turn, "ours"]
    assert compare(made, OURS).peer_name == "fast peer"


def test_the_ratio_is_the_median_over_turns_of_the_peer_over_ours_around_it() -> None:
    ours, peer = [1.0, 3.0, 1.0, 1.0], [4.0, 8.0, 3.0]
    assert turn_ratios(ours, peer) == [2.0, 4.0, 3.0]
    run = Script({"ours": [result(x) for x in ours], "fast peer": [result(x) for x in peer], "slow peer": [result(99)]})
    found = compare(measure(ROW, run, False, {}), OURS)
    assert found.ratio == 3.0
    assert found.interval == (8 / 3, 8.0) or found.interval == (pytest.approx(4 / 3), 8.0)
    assert (found.ours, found.peer) == (1.0, 4.0)


def test_drift_of_the_machine_cancels() -> None:
    """Everything becomes slower by the same amount per process: the ratio does not see it."""
    speed = [1 + 0.1 * i for i in range(7)]
    assert turn_ratios(speed[0::2], [3 * s for s in speed[1::2]]) == pytest.approx([3.0, 3.0, 3.0])


def test_the_column_counts() -> None:
    wall = Row(name="row", title="", ours=OURS, peers=(FAST,), turns=1, column="wall_seconds")
    run = Script({"ours": [result(1)] * 2, "fast peer": [result(3)]})
    assert compare(measure(wall, run, False, {}), OURS).ours == 2.0


def test_no_number_without_the_gate() -> None:
    row = Row(name="row", title="", ours=OURS, peers=(FAST,), turns=1, gate=same_update())

    def ran(loss: float, norm: float) -> Script:
        own = result(1, gate={"loss": 0.5, "grad_norm": 2.0})
        return Script({"ours": [own] * 2, "fast peer": [result(3, gate={"loss": loss, "grad_norm": norm})]})

    assert compare(measure(row, ran(0.500009, 2.0001), False, {}), OURS).ratio == 3.0
    for loss, norm in ((0.50002, 2.0), (0.5, 2.0003)):
        found = compare(measure(row, ran(loss, norm), False, {}), OURS)
        assert math.isnan(found.ratio)
        assert found.why.startswith("gate: loss 0.5 and")


def test_returns_are_gated_by_overlap() -> None:
    def runs(*returns: float) -> list[Result]:
        return [result(1, gate={"returns": [x]}) for x in returns]

    gate = same_returns()
    assert gate(runs(10, 12, 11), runs(11, 12, 13)) == ""
    assert gate(runs(20, 21, 22), runs(1, 2, 3)) == ""
    assert "below" in gate(runs(1, 2, 3), runs(20, 21, 22))


def test_a_limit_is_measured_beside_and_the_share_is_of_it() -> None:
    """100 flop a step at 2 s a step are 50 flop/s; the machine does 10 units in 10 * 0.01 s, which is 100 flop/s."""
    row = Row(name="row", title="", ours=OURS, turns=1, limit=LIMIT)
    run = Script({"ours": [result(2, work=100)] * 2, "limit": [result(0.01)]})
    found = compare(measure(row, run, False, {}), OURS)
    assert found.fraction == pytest.approx(0.5)
    assert found.why == ""


def test_failures_are_said_and_the_others_go_on() -> None:
    peers = (FAST, SLOW, Side(name="absent", command=(), needs="trl"))
    row = Row(name="row", title="", ours=OURS, peers=peers, turns=2)
    run = Script({"ours": [result(1)] * 3, "fast peer": [SideFailed("exit 1: boom")], "slow peer": [result(5)] * 2})
    made = measure(row, run, False, {"trl": "no such package"})
    assert made.failed == {"fast peer": "exit 1: boom", "absent": "not installed: no such package"}
    assert compare(made, OURS).ratio == 5.0
    alone = measure(
        row, Script({"ours": [SideFailed("exit 2: oh")], "fast peer": [result(1)], "slow peer": [result(1)]}), False, {}
    )
    assert compare(alone, OURS).why == "ours: exit 2: oh"


def test_quick_leaves_settings_out() -> None:
    losing = Side(name="slow peer", command=(), quick=None)
    row = Row(name="row", title="", ours=OURS, peers=(losing, FAST))
    run = Script({"ours": [result(1)] * 2, "fast peer": [result(3)]})
    measure(row, run, True, {})
    assert run.asked == ["ours", "fast peer", "ours"]
    assert Side(name="x", command=("-m", "x"), quick=("--steps", "1")).arguments(True) == ["-m", "x", "--steps", "1"]


def test_a_process_of_its_own_and_its_last_line() -> None:
    code = (
        "print('noise'); import json; print(json.dumps(dict(unit='step', units=2, cpu_seconds=1, wall_seconds=4, x=1)))"
    )
    found = run_fresh(Side(name="ours", command=("-c", code)), False, 1)
    assert found.seconds("cpu_seconds") == 0.5
    with pytest.raises(SideFailed, match="exit 1: ValueError: what went wrong"):
        run_fresh(Side(name="ours", command=("-c", "raise ValueError('what went wrong')")), False, 1)
    for printed in (
        "",
        "no json",
        "[1]",
        json.dumps({"unit": "step", "units": 0, "cpu_seconds": 1, "wall_seconds": 1}),
    ):
        with pytest.raises(SideFailed):
            parse(printed)


def test_forked_sides_are_as_fresh_and_fail_as_loudly(tmp_path: Path) -> None:
    script = tmp_path / "side.py"
    script.write_text(
        "import json, os, sys\nassert sys.argv[1] != 'bad', 'it is bad'\n"
        "print(json.dumps(dict(unit='step', units=1, cpu_seconds=1, wall_seconds=1, notes=str(os.getpid()),"
        " versions=dict(loaded=str('fractions' in sys.modules)))))"
    )
    with Forks() as run:
        sides = [Side(name=x, command=(str(script), x), preload=("fractions",)) for x in ("good", "good", "bad")]
        first, second = (run(side, False, 1) for side in sides[:2])
        assert first.notes != second.notes
        assert first.versions == {"loaded": "True"}
        with pytest.raises(SideFailed, match="exit 1: AssertionError: it is bad"):
            run(sides[2], False, 1)
        absent = Side(name="x", command=(str(script), "good"), preload=("no_such_module",))
        assert run(absent, False, 1).versions == {"loaded": "False"}


def test_the_file_keeps_other_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.bench.install", dict)
    out, console = tmp_path / "results" / "latest.json", Console(record=True, width=200)
    for name, ours in (("first", 1.0), ("second", 1.0), ("first", 2.0)):
        row = Row(name=name, title="", ours=OURS, peers=(FAST,), turns=1, also=(SLOW,))
        run = Script({"ours": [result(ours)] * 2, "fast peer": [result(6)], "slow peer": [result(3)]})
        bench([row], run, False, out, console)
    found = {r["name"]: r for r in json.loads(out.read_text())}
    assert [(name, r["ours"], r["peer"], r["ratio"], r["interval"]) for name, r in found.items()] == [
        ("first", 2.0, 6.0, 3.0, [3.0, 3.0]),
        ("second", 1.0, 6.0, 6.0, [6.0, 6.0]),
    ]
    assert found["first"]["also"]["slow peer"]["ratio"] == 2.0
    assert found["first"]["limit_fraction"] is None
    assert "6 s/step" in console.export_text()
    assert table(list(found.values())).row_count == 4


def test_rows_are_chosen_by_name() -> None:
    assert chosen([ROW], ["row"]) == [ROW]
    assert chosen([ROW], []) == [ROW]
    with pytest.raises(SystemExit, match="no row is called x; there are row"):
        chosen([ROW], ["x"])


def test_times_are_read_at_a_glance() -> None:
    assert [time_text(x, "/step") for x in (12.34, 0.01234, 5e-6, 2e-9)] == [
        "12.3 s/step", "12.3 ms/step", "5 us/step", "2 ns/step",
    ]  # fmt: skip


def test_a_peer_that_cannot_be_installed_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lock as a whole fails, then each peer is tried by itself; what is there is not installed again."""
    asked: list[str] = []

    def pip(python: Path, *arguments: str) -> str:
        asked.append(arguments[-1])
        return "no wheel" if arguments[0] == "-r" or arguments[-1].startswith("sbx") else ""

    (tmp_path / "venv" / "bin").mkdir(parents=True)
    (tmp_path / "venv" / "bin" / "python").touch()
    (tmp_path / "trl-1.10.0").mkdir()
    monkeypatch.setattr("benchmarks.peers._pip", pip)
    assert install(tmp_path) == {"sbx-rl": "no wheel"}
    assert asked[0].endswith("requirements-peers.txt")
    assert "trl==1.16.0" in asked
    assert asked[-1] == "d3rlpy==2.8.1"


def test_the_extra_names_the_versions_that_are_locked() -> None:
    """pyproject.toml, peers.py and the lock agree."""
    extra = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["bench"]
    locked = {line.lower().replace("_", "-") for line in LOCK.read_text().splitlines()}
    assert set(extra) <= locked
    assert {name for name in DIRECT if not any(line.startswith(f"{name}==") for line in locked)} == set()
