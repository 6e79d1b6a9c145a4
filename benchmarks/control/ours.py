"""unipo in the environments of `peers.py`, with the presets that `unipo run METHOD ENVIRONMENT` applies.

    python benchmarks/control/ours.py ppo CartPole-v1 --total-timesteps 100000 --seeds 5

writes benchmarks/control/ours/<algorithm>-<environment>.json, in the form that `table.py` reads: per seed the returns of 50
deterministic episodes after training, a curve of 10 episodes every tenth of the budget, and the seconds of training alone.
"""  # fmt: skip

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from unipo.api import configure, start
from unipo.sources.acting.environments import make_environment
from unipo.sources.acting.spaces import ActionSpec

EPISODES, STARTS = 50, 1_000_000
HERE = Path(__file__).parent / "ours"


def train(algorithm: str, environment: str, steps: int, seed: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """One seed: its record, and the settings that it ran with."""
    folder = tempfile.mkdtemp()
    shutil.rmtree(folder)
    settings = {"total_timesteps": steps, "seed": seed, "out": folder, "tensorboard": False, "threads": 1}
    config, recipe = configure(algorithm, environment, {}, **settings)
    run = start(config, recipe, Console(quiet=True))
    away = {"wall": 0.0, "cpu": 0.0}
    measure = run.data.run_episodes

    def timed(number: int) -> Any:
        wall, cpu = time.perf_counter(), time.process_time()
        found = measure(number)
        away["wall"] += time.perf_counter() - wall
        away["cpu"] += time.process_time() - cpu
        return found

    run.data.run_episodes = timed
    wall, cpu = time.perf_counter(), time.process_time()
    run.train()
    seconds, cpu_seconds = time.perf_counter() - wall - away["wall"], time.process_time() - cpu - away["cpu"]
    rows = run.records.metrics
    done = int(rows[-1]["env_steps"])
    curve = [[int(m.get("env_steps", 0)), round(m["eval_return"], 1)] for m in rows if "eval_return" in m]
    returns = [round(r, 2) for r in final_returns(run.policy, environment)]
    shutil.rmtree(folder, ignore_errors=True)
    skip = (
        "out",
        "seed",
        "task",
        "method",
        "tensorboard",
        "wandb",
        "device",
        "video",
        "record",
        "dataset",
        "keep_checkpoints",
    )
    used = {k: getattr(config, k) for k in type(config).__dataclass_fields__ if k not in skip}
    record = {"seed": seed, "returns": returns, "curve": curve, "steps": done, "seconds": round(seconds, 2),
              "cpu_seconds": round(cpu_seconds, 2), "steps_per_second": round(done / seconds, 1),
              "updates": run.learner.updates, "updates_per_second": round(run.learner.updates / seconds, 1)}  # fmt: skip
    return record, used


def final_returns(policy: Any, environment: str) -> list[float]:
    """50 episodes with the policy's mode, from the same starts as `peers.py`: env.reset(seed=1000000 + i)."""
    found = []
    for i in range(EPISODES):
        env = make_environment(environment)
        spec, ended, total = ActionSpec.of(env.action_space), False, 0.0
        observation, _ = env.reset(seed=STARTS + i)
        while not ended:
            seen = torch.from_numpy(np.asarray(observation, dtype=np.float32)[None])
            action, _ = policy.act(seen, torch.zeros(1, 8), deterministic=True)
            observation, reward, terminated, truncated, _ = env.step(spec.native(action.numpy())[0])
            total, ended = total + float(reward), terminated or truncated
        found.append(total)
        env.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("algorithm")
    parser.add_argument("environment")
    parser.add_argument("--total-timesteps", type=int, default=100_000)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=HERE)
    given = parser.parse_args()
    torch.set_num_threads(1)
    found = [train(given.algorithm, given.environment, given.total_timesteps, seed) for seed in range(given.seeds)]
    given.out.mkdir(exist_ok=True)
    record = {"algorithm": given.algorithm, "environment": given.environment, "total_steps": given.total_timesteps,
              "library": "unipo", "settings": found[0][1], "seeds": [r for r, _ in found]}  # fmt: skip
    path = given.out / f"{given.algorithm}-{given.environment.replace('/', '_')}.json"
    path.write_text(json.dumps(record, indent=1, default=str) + "\n")
    scores = [round(sum(r["returns"]) / len(r["returns"]), 1) for r in record["seeds"]]
    print(f"{path.name}: {scores}, {[r['steps_per_second'] for r in record['seeds']]} steps/s")


if __name__ == "__main__":
    main()
