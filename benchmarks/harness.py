"""Sides, rows, turns and what is concluded from them: the contract of the benchmarks.

A *side* is ours or one peer in one setting: a command that is run in a fresh process with the right interpreter and prints
one JSON object as its last line, the fields of `Result`. A *row* lets sides take turns (ours, peers, ours, peers, ..., ours),
so that each turn of a peer has ours before and after it; noise and drift of the machine are then in both.

    ratio of a turn = seconds of the peer / mean of the seconds of ours before and after it        (per unit of work)

The peer of a row is the setting with the smallest median of its own. No number is given where the gate says that the two
sides did not compute the same.
"""

from __future__ import annotations

import json
import statistics
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

from benchmarks.peers import OURS, ROOT, home
from unipo.statistics import bootstrap_interval

CONTENDERS = 1.3
"""After its first turn a peer's setting that is slower than the fastest by more than this has no further turns."""
FEW = 4
"""With fewer ratios than this the interval is their range."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What a side prints.

    units: of `unit` that were timed, in `cpu_seconds` (user + system of the process and its children) and `wall_seconds`;
    warm_seconds: what came before (compilation, warm-up). peak_mb: largest resident size of the fresh process.
    gate: what both sides must agree in. work: what one unit costs in the unit of the row's limit (such as flop).
    """

    unit: str
    units: float
    cpu_seconds: float
    wall_seconds: float
    peak_mb: float = 0.0
    warm_seconds: float = 0.0
    gate: Mapping[str, Any] = field(default_factory=dict)
    work: float = 0.0
    versions: Mapping[str, str] = field(default_factory=dict)
    notes: str = ""

    def seconds(self, column: str) -> float:
        """Per unit."""
        return float(getattr(self, column)) / self.units


Gate = Callable[[Sequence[Result], Sequence[Result]], str]
"""(results of ours, of a peer) -> empty, or why they may not be compared."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """A contestant in one setting.

    command: what the interpreter of `home` gets, such as ("-m", "benchmarks.text.ours", "grpo", "s1"); quick: what is added
    to it under QUICK=1 (None: left out then, as a setting that lost every sweep). needs: the peer that must be installed.
    preload: modules that take long to import; sides with the same ones are forked from one process that has them.
    """

    name: str
    command: tuple[str, ...]
    quick: tuple[str, ...] | None = ()
    home: str = OURS
    needs: str = ""
    preload: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)

    def arguments(self, quick: bool) -> list[str]:
        return [*self.command, *((self.quick or ()) if quick else ())]


def no_gate(ours: Sequence[Result], theirs: Sequence[Result]) -> str:
    """For rows in which the two sides draw at random: what they do is the same in distribution only."""
    return ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """`goal`: the ratio to reach (of issue 4), or the share of the limit for a row without peers. `also`: further sides of
    ours, shown on lines of their own. `limit`: a side that measures what the machine could do, in units of its own.
    `column`: cpu_seconds or wall_seconds; what counts. `turns`, `quick_turns`: of each peer; ours has one more (under QUICK=1
    not where `compiles` says that every run of ours compiles first, which takes longer than what is timed). `extra`: not in
    QUICK=1 unless it is named.
    """

    name: str
    title: str
    ours: Side
    peers: tuple[Side, ...] = ()
    also: tuple[Side, ...] = ()
    goal: float = 0.0
    column: str = "cpu_seconds"
    turns: int = 5
    quick_turns: int = 1
    gate: Gate = no_gate
    limit: Side | None = None
    threads: int = 1
    compiles: bool = False
    extra: bool = False


class SideFailed(RuntimeError):
    """A side ended badly or printed no result; the message is the last line that it wrote."""


Runner = Callable[[Side, bool, int], Result]
"""(side, quick, threads) -> what it printed."""


def parse(printed: str) -> Result:
    """The last line as a Result. Raises SideFailed where it is none."""
    lines = [line for line in printed.splitlines() if line.strip()]
    try:
        found = json.loads(lines[-1])
        known = {f.name for f in fields(Result)}
        result = Result(**{k: v for k, v in found.items() if k in known})
    except (IndexError, ValueError, TypeError, AttributeError) as error:
        raise SideFailed(f"no result in its last line: {lines[-1][:200] if lines else 'it printed nothing'}") from error
    if result.units <= 0:
        raise SideFailed(f"it timed {result.units} {result.unit}s")
    return result


def run_fresh(side: Side, quick: bool, threads: int) -> Result:
    """A fresh process. Raises SideFailed."""
    place = home(side.home)
    command = [str(place.python), *side.arguments(quick)]
    environment = {**place.environment(threads), **side.environment}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    return concluded(done.returncode, done.stdout, done.stderr)


def concluded(status: int, printed: str, complained: str) -> Result:
    """The result of a process that has ended. Raises SideFailed where it failed."""
    if status:
        said = complained.strip().splitlines() or printed.strip().splitlines() or ["it said nothing"]
        raise SideFailed(f"exit {status}: {said[-1][:300]}")
    return parse(printed)


@dataclass(slots=True)
class Measured:
    """Turns of a row: name of a side -> its results in order (ours has one more than a peer), or why it has none."""

    row: Row
    results: dict[str, list[Result]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    def seconds(self, side: Side) -> list[float]:
        return [result.seconds(self.row.column) for result in self.results.get(side.name, [])]

    def median(self, side: Side) -> float:
        return statistics.median(self.seconds(side))


def measure(row: Row, run: Runner, quick: bool, missing: Mapping[str, str]) -> Measured:
    """Let the sides of a row take turns. `missing`: peers that are not installed, and why."""
    made = Measured(row)
    turns = row.quick_turns if quick else row.turns
    others = [side for side in (*row.peers, *row.also) if not quick or side.quick is not None]
    others = [side for side in others if not _absent(side, missing, made)]
    others += [row.limit] if row.limit else []
    for turn in range(turns):
        _turn(made, row.ours, run, quick)
        if row.ours.name in made.failed:
            return made
        for side in others:
            _turn(made, side, run, quick)
        others = [side for side in others if side.name not in made.failed]
        others = others if turn else _contenders(made, others)
    if row.peers and not (quick and row.compiles):
        _turn(made, row.ours, run, quick)
    return made


def _absent(side: Side, missing: Mapping[str, str], made: Measured) -> bool:
    if side.needs not in missing:
        return False
    made.failed[side.name] = f"not installed: {missing[side.needs]}"
    return True


def _turn(made: Measured, side: Side, run: Runner, quick: bool) -> None:
    try:
        made.results.setdefault(side.name, []).append(run(side, quick, made.row.threads))
    except SideFailed as failure:
        made.failed[side.name] = str(failure)
        made.results.pop(side.name, None)


def _contenders(made: Measured, others: list[Side]) -> list[Side]:
    peers = [side for side in others if side in made.row.peers]
    if not peers:
        return others
    fastest = min(made.median(side) for side in peers)
    return [side for side in others if side not in peers or made.median(side) <= CONTENDERS * fastest]


# ---- conclusions -----------------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """`ours`, `peer`: seconds per unit, medians; `interval`: of the ratio, 95% bootstrap of the median over turns (the range
    where there are few); `fraction`: of the physical limit; `why`: there is no number."""  # fmt: skip

    ours: float = float("nan")
    peer: float = float("nan")
    peer_name: str = ""
    ratio: float = float("nan")
    interval: tuple[float, float] = (float("nan"), float("nan"))
    memory: float = float("nan")
    fraction: float = float("nan")
    why: str = ""


def compare(made: Measured, ours: Side) -> Comparison:
    """`ours` (the row's, or one of its `also`) with the fastest peer that ran."""
    row = made.row
    if ours.name not in made.results:
        return Comparison(why=f"ours: {made.failed.get(ours.name, 'not run')}")
    own = made.results[ours.name]
    fraction = _fraction(made, own)
    ran = [side for side in row.peers if side.name in made.results]
    if not ran:
        why = "; ".join(f"{s.name}: {made.failed[s.name]}" for s in row.peers if s.name in made.failed)
        return Comparison(ours=made.median(ours), fraction=fraction, why=why)
    peer = min(ran, key=made.median)
    theirs = made.results[peer.name]
    if why := row.gate(own, theirs):
        return Comparison(peer_name=peer.name, fraction=fraction, why=f"gate: {why}")
    ratios = turn_ratios(made.seconds(ours), made.seconds(peer))
    return Comparison(ours=made.median(ours), peer=made.median(peer), peer_name=peer.name, fraction=fraction,
                      ratio=statistics.median(ratios), interval=interval(ratios, made.seconds(ours), made.seconds(peer)),
                      memory=_peak(own) / max(_peak(theirs), 1e-9))  # fmt: skip


def turn_ratios(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """Of each turn of the peer: its seconds over the mean of ours before and after it."""
    around = [(ours[i] + ours[min(i + 1, len(ours) - 1)]) / 2 for i in range(len(theirs))]
    return [b / a for a, b in zip(around, theirs, strict=True)]


def interval(ratios: Sequence[float], ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float]:
    """95% bootstrap interval of the median; with few turns the range of all ratios of neighbours."""
    if len(ratios) >= FEW:
        _, low, high = bootstrap_interval(list(ratios), np.median)
        return float(low), float(high)
    neighbours = [theirs[i] / a for i in range(len(theirs)) for a in ours[i : i + 2]]
    return min(neighbours), max(neighbours)


def _fraction(made: Measured, own: Sequence[Result]) -> float:
    """Work of ours per second over the units of the limit per second."""
    limit = made.row.limit
    if limit is None or limit.name not in made.results or not own[0].work:
        return float("nan")
    column = made.row.column
    rate = statistics.median(result.work / result.seconds(column) for result in own)
    return rate * statistics.median(made.seconds(limit))


def _peak(results: Sequence[Result]) -> float:
    return statistics.median(result.peak_mb for result in results)


# ---- gates -----------------------------------------------------------------------------------------------------------
def same_update(loss: float = 1e-5, grad_norm: float = 1e-4) -> Gate:
    """Loss within `loss` (absolute below 1, relative above) and gradient norm within `grad_norm` relative."""

    def gate(ours: Sequence[Result], theirs: Sequence[Result]) -> str:
        a, b = ours[0].gate, theirs[0].gate
        off_loss = abs(a["loss"] - b["loss"]) / max(1.0, abs(b["loss"]))
        off_norm = abs(a["grad_norm"] - b["grad_norm"]) / abs(b["grad_norm"])
        if off_loss <= loss and off_norm <= grad_norm:
            return ""
        return f"loss {a['loss']:.7g} and {b['loss']:.7g}, gradient norm {a['grad_norm']:.7g} and {b['grad_norm']:.7g}"

    return gate


def same_returns(allowed: float = 0.0) -> Gate:
    """The 95% intervals of the mean returns at the end overlap, or ours is better; `allowed`: a gap that does not count."""

    def gate(ours: Sequence[Result], theirs: Sequence[Result]) -> str:
        (a, _, high), (b, low, _) = _mean(ours), _mean(theirs)
        return (
            "" if high + allowed >= low else f"returns {a:.1f} are below {b:.1f} of the peer, intervals do not overlap"
        )

    return gate


def _mean(results: Sequence[Result]) -> tuple[float, float, float]:
    returns = [float(x) for result in results for x in result.gate["returns"]]
    mean, low, high = bootstrap_interval(returns, np.mean)
    return float(mean), float(low), float(high)
