"""What collecting and replaying costs, beside the environment itself.

    python benchmarks/control/replay.py [--out FILE]

prints, and writes as JSON:

- `replay`: megabytes of a million HalfCheetah transitions (17 observations, 6 actions), and microseconds of a batch of 256
  with its noise, `Episodes` included, for every kind of replay; the ring is full and the rows are drawn from all over it;
- `collector`: microseconds per environment step of Gymnasium alone (resets included), and what is added to it by `collect`
  and by `step`, with a policy that costs nothing;
- `steps_per_second` of `collect`.

Processor time of one thread, the best of several rounds: what the machine can do when nobody else uses it.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from collections.abc import Callable
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch

from unipo.sources.acting.collector import Collector
from unipo.sources.acting.environments import Environments, make_environment
from unipo.sources.acting.transitions import Prioritised, TransitionReplay

ROWS, BATCH = 1_000_000, 256
NOISE = {"noise": (6,), "next_noise": (6,)}


def best(call: Callable[[], Any], times: int, rounds: int = 15) -> float:
    """Microseconds of processor time per call, in the best round."""
    found = []
    for _ in range(rounds):
        start = time.process_time()
        for _ in range(times):
            call()
        found.append((time.process_time() - start) / times)
    return 1e6 * min(found)


# ---- replay --------------------------------------------------------------------------------------------------------
def halfcheetah_rows(n: int) -> dict[str, np.ndarray]:
    """Rows of the shapes that HalfCheetah has, with episodes of 1000 steps."""
    generator = np.random.default_rng(0)
    wide = {"observation": 17, "next_observation": 17, "action": 6}
    rows = {name: generator.standard_normal((n, size), dtype=np.float32) for name, size in wide.items()}
    return {
        **rows,
        **{name: generator.standard_normal(n, dtype=np.float32) for name in ("reward", "behavior_logp")},
        "terminated": np.zeros(n, dtype=bool),
        "truncated": np.arange(n) % 1000 == 999,
        "env": np.zeros(n, dtype=np.int64),
        "policy_version": np.arange(n),
    }


def filled(replay: TransitionReplay) -> TransitionReplay:
    rows = halfcheetah_rows(10_000)
    for _ in range(ROWS // 10_000):
        replay.add_rows(rows)
    return replay


def measure_replay(folder: Path) -> dict[str, dict[str, float]]:
    made: dict[str, Callable[[], TransitionReplay]] = {
        "uniform": lambda: TransitionReplay(ROWS, 0, noise=NOISE),
        "uniform, 3 steps": lambda: TransitionReplay(ROWS, 0, n_step=3, noise=NOISE),
        "uniform, memory-mapped": lambda: TransitionReplay(ROWS, 0, noise=NOISE, folder=folder),
        "uniform, without noise": lambda: TransitionReplay(ROWS, 0),
        "prioritised": lambda: TransitionReplay(ROWS, 0, noise=NOISE, prioritised=Prioritised()),
    }
    found = {}
    for name, make in made.items():
        replay, steps = filled(make()), count()
        found[name] = {
            "megabytes": replay.nbytes / 1e6,
            "sample_us": best(partial(_sample, replay, steps), 300),
            "add_row_us": best(partial(replay.add_rows, halfcheetah_rows(1)), 300),
        }
        if replay.prioritised:
            batch = replay.sample(BATCH, 0)
            found[name]["update_us"] = best(
                partial(replay.update_priorities, batch["replay_index"], batch["replay_weight"]), 100
            )
    return found


def _sample(replay: TransitionReplay, steps: count[int]) -> None:
    replay.sample(BATCH, next(steps))


# ---- collector -----------------------------------------------------------------------------------------------------
def measure_collector(name: str, num: int, steps: int) -> dict[str, float]:
    collector = Collector(Environments(partial(make_environment, name), num, 0), 0, noise_size=1)
    spec = collector.environments.action_spec
    shape = (num,) if spec.kind == "categorical" else (num, spec.size)
    discrete = spec.kind != "box"
    # discrete: alternating choices, so that episodes of CartPole have their usual length under such a policy
    actions = [torch.full(shape, k, dtype=torch.long) if discrete else torch.zeros(shape) for k in (0, 1)]
    logp, turn = torch.zeros(num), count()

    def act(observation: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return actions[next(turn) % 2], logp

    native = [list(spec.native(a.numpy())) for a in actions]
    envs = [make_environment(name) for _ in range(num)]
    for i, env in enumerate(envs):
        env.reset(seed=i)

    def alone() -> None:
        for t in range(steps):
            for env, action in zip(envs, native[t % 2], strict=True):
                outcome = env.step(action)
                if outcome[2] or outcome[3]:
                    env.reset(seed=t)

    found = {"gymnasium_us": best(alone, 1) / (steps * num)}
    collected = best(lambda: collector.collect(steps, act, 0), 1) / (steps * num)
    stepped = best(lambda: collector.step(act, 0), steps) / num
    return {
        **found,
        "collect_adds_us": collected - found["gymnasium_us"],
        "step_adds_us": stepped - found["gymnasium_us"],
        "steps_per_second": 1e6 / collected,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    torch.set_num_threads(1)
    out = parser.parse_args().out
    with tempfile.TemporaryDirectory() as folder:
        result: dict[str, Any] = {"replay": measure_replay(Path(folder))}
    result["collector"] = {
        f"{name} x {num}": measure_collector(name, num, 512)
        for name, num in [("CartPole-v1", 1), ("CartPole-v1", 8), ("HalfCheetah-v5", 1)]
    }
    result["versions"] = {"python": platform.python_version(), "numpy": np.__version__, "torch": torch.__version__}
    text = json.dumps(result, indent=1)
    print(text)
    if out:
        out.write_text(text + "\n")


if __name__ == "__main__":
    main()
