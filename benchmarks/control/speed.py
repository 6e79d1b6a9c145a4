"""Speed beside Stable-Baselines3 in the same minutes: short runs of both, in turn, on one thread.

    python benchmarks/control/speed.py --peer-python PYTHON_WITH_STABLE_BASELINES3

writes benchmarks/control/speed.json: per row the rate of each run (environment steps per second for ppo, updates per second
for sac; training without evaluation) and the median of the ratios of neighbouring runs.
"""  # fmt: skip

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROWS = (("ppo", "CartPole-v1", 40_000), ("sac", "Pendulum-v1", 1_600))


def rate(algorithm: str, record: dict[str, Any]) -> float:
    """Steps or updates per second of wall time."""
    seed = record["seeds"][0]
    name = "updates_per_second" if algorithm == "sac" else "steps_per_second"
    return float(seed[name])


def once(command: list[str], out: Path) -> dict[str, Any]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return dict(json.loads(out.read_text()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--peer-python", required=True)
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    found = []
    for algorithm, environment, steps in ROWS:
        ours, theirs = [], []
        for _ in range(given.repeats):
            with tempfile.TemporaryDirectory() as folder:
                out = Path(folder) / f"{algorithm}-{environment}.json"
                mine = [sys.executable, str(HERE / "ours.py"), algorithm, environment, "--total-timesteps", str(steps),
                        "--seeds", "1", "--out", folder]  # fmt: skip
                ours.append(rate(algorithm, once(mine, out)))
                peer = Path(folder) / "peer.json"
                other = [given.peer_python, str(HERE / "peers.py"), algorithm, environment, "--steps", str(steps), "--seeds",
                         "0", "--out", str(peer)]  # fmt: skip
                theirs.append(rate(algorithm, once(other, peer)))
        ratio = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
        unit = "updates/s" if algorithm == "sac" else "steps/s"
        found.append({"algorithm": algorithm, "environment": environment, "steps": steps, "unit": unit,
                      "unipo": ours, "stable-baselines3": theirs, "ratio": round(ratio, 2)})  # fmt: skip
        print(
            f"{algorithm} {environment}: unipo {ours}, Stable-Baselines3 {theirs} {unit}, ratio {ratio:.2f}", flush=True
        )
    (HERE / "speed.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
