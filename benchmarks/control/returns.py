"""Do the fast sides learn what the slow ones and the peers learn: returns at the end of longer runs, over seeds.

    python -m benchmarks.control.returns sac-halfcheetah [--seeds 5] [--only fast]

trains the fast side (compiled, and bfloat16 where the row has it), its slow twin (neither) and the peer, and writes
benchmarks/control/returns/ROW.json: per seed the mean of 20 deterministic episodes from the same starts, per side the mean
over seeds, and the differences from the fast side with Welch's 95 % interval. `same`: no difference reaches below 0 in whole.
Slow and peer of SAC are taken from the runs of docs/benchmarks/control.md. The gate of a row in the table of `make bench` is
this file; seeds that it has are kept.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from scipy.stats import t as student

from benchmarks.control.settings import SAC
from benchmarks.control.side import EPISODES
from benchmarks.harness import Side, run_fresh

HERE = Path(__file__).with_name("returns")
EAGER = ("--set", "compile=off")
COMPILED = ("--set", "compile=on")


@dataclass(frozen=True, slots=True)
class Trial:
    """A row's longer run: so many environment steps (updates where nothing is collected)."""

    steps: int
    peer: tuple[str, str]
    fast: tuple[str, ...] = ()


SB3 = ("Stable-Baselines3", "side_sb3")
BFLOAT16 = ("--precision", "autocast")
TRIALS = {
    "ppo-cartpole": Trial(40_000, SB3),
    "ppo-halfcheetah": Trial(80_000, SB3),
    "sac-halfcheetah": Trial(10_000, SB3, BFLOAT16),
    "sac-pendulum": Trial(10_000, SB3, BFLOAT16),
    "td3bc": Trial(4_000, ("CORL-style", "corl_style"), BFLOAT16),
    "iql": Trial(4_000, ("CORL-style", "corl_style"), BFLOAT16),
}


def side(row: str, which: str) -> Side:
    """`fast`, `slow` or `peer` of a row."""
    trial = TRIALS[row]
    steps = (row, "--steps", str(trial.steps))
    if which == "peer":
        name, module = trial.peer
        return Side(name=name, command=("-m", f"benchmarks.control.{module}", *steps), home="venv")
    given = (*trial.fast, *COMPILED) if which == "fast" else EAGER
    return Side(name=which, command=("-m", "benchmarks.control.side_ours", *steps, *given))


def train(row: str, which: str, seed: int) -> list[float]:
    """The returns of one seed."""
    asked = side(row, which)
    made = run_fresh(Side(name=asked.name, command=(*asked.command, "--seed", str(seed)), home=asked.home), False, 1)
    return [float(x) for x in made.gate["returns"]]


def longer_runs(row: str) -> dict[str, dict[str, float]]:
    """Slow and peer scores of SAC from the runs of docs/benchmarks/control.md: the same settings, budget and first starts."""
    found: dict[str, dict[str, float]] = {"fast": {}, "slow": {}, "peer": {}}
    for which, folder in (("slow", "ours"), ("peer", "peers")) if row in SAC else ():
        record = json.loads((HERE.parent / folder / f"sac-{SAC[row]['environment']}.json").read_text())
        if record["total_steps"] == TRIALS[row].steps:
            scores = {str(s["seed"]): s["returns"][:EPISODES] for s in record["seeds"]}
            found[which] = {seed: round(statistics.fmean(returns), 1) for seed, returns in scores.items()}
    return found


def concluded(row: str, scores: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    """What the means over seeds say. `scores`: {side: {seed: mean return}}."""
    values = {which: list(found.values()) for which, found in scores.items()}
    differences = {which: welch(values["fast"], values[which]) for which in ("slow", "peer") if enough(values, which)}
    means = {which: round(statistics.fmean(v), 1) for which, v in values.items() if v}
    return {"row": row, "steps": TRIALS[row].steps, "same": bool(differences) and all(d[2] >= 0 for d in differences.values()),
            "ours": means.get("fast"), "slow": means.get("slow"), "peer": means.get("peer"),
            "peer_name": TRIALS[row].peer[0], "differences": differences, "fast": list(TRIALS[row].fast),
            "when": datetime.now(UTC).isoformat(timespec="minutes"),
            "command": f"python -m benchmarks.control.returns {row}", "scores": scores}  # fmt: skip


def enough(values: Mapping[str, Sequence[float]], which: str) -> bool:
    return min(len(values.get("fast", ())), len(values.get(which, ()))) > 1


def welch(a: Sequence[float], b: Sequence[float]) -> tuple[float, float, float]:
    """mean(a) - mean(b), and its 95 % interval with unequal variances."""
    spread = [statistics.variance(x) / len(x) for x in (a, b)]
    difference, error = statistics.fmean(a) - statistics.fmean(b), sum(spread) ** 0.5
    freedom = sum(spread) ** 2 / max(sum(s**2 / (len(x) - 1) for s, x in zip(spread, (a, b), strict=True)), 1e-300)
    half = float(student.ppf(0.975, max(freedom, 1.0))) * error
    return round(difference, 1), round(difference - half, 1), round(difference + half, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("row", choices=TRIALS)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--only", nargs="*", default=["fast", "slow", "peer"])
    given = parser.parse_args()
    path = HERE / f"{given.row}.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    kept = known.get("scores", {}) if known.get("steps") == TRIALS[given.row].steps else {}
    scores = {which: {**stored, **kept.get(which, {})} for which, stored in longer_runs(given.row).items()}
    for seed in range(given.seeds):
        for which in given.only:
            if str(seed) not in scores[which]:
                scores[which][str(seed)] = round(statistics.fmean(train(given.row, which, seed)), 1)
                HERE.mkdir(exist_ok=True)
                path.write_text(json.dumps(concluded(given.row, scores), indent=1) + "\n")
    print({k: v for k, v in concluded(given.row, scores).items() if k != "scores"})


if __name__ == "__main__":
    main()
