"""Physical limits of the control rows: stepping alone, and the updates' matrix products alone.

    python -m benchmarks.control.limits stepping --row ppo-halfcheetah
    python -m benchmarks.control.limits products --row sac-halfcheetah --precision bfloat16

`stepping`: environment steps per second of Gymnasium's fastest way to step that many copies, random actions, nothing else.
`products`: updates per second if an update were only the matrix products that it cannot do without, forward and backward
(twin critics as one batched product), with data and outputs in place.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence

from benchmarks.control.settings import OFFLINE, PPO, SAC
from benchmarks.control.side import Meter, prepare, say

OBSERVATIONS, ACTIONS, BATCH = 17, 6, 256
Pass = tuple[int, Sequence[tuple[int, int]], bool, bool]
"""(how many networks at once, (inputs, outputs) of their layers, gradients of weights, gradient of the input)."""


def passes(row: str, width: int) -> list[tuple[float, Pass]]:
    """(times per update, forward passes of networks and what is differentiated) that an update cannot do without."""
    actor = lambda out: [(OBSERVATIONS, width), (width, width), (width, out)]  # noqa: E731
    critic = [(OBSERVATIONS + ACTIONS, width), (width, width), (width, 1)]
    value = [(OBSERVATIONS, width), (width, width), (width, 1)]
    if row == "sac-halfcheetah":
        return [(1, (1, actor(2 * ACTIONS), False, False)), (1, (2, critic, False, False)), (1, (2, critic, True, False)),
                (1, (1, actor(2 * ACTIONS), True, False)), (1, (2, critic, False, True))]  # fmt: skip
    if row == "td3bc":
        return [(1, (1, actor(ACTIONS), False, False)), (1, (2, critic, False, False)), (1, (2, critic, True, False)),
                (0.5, (1, actor(ACTIONS), True, False)), (0.5, (1, critic, False, True))]  # fmt: skip
    return [(1, (2, critic, False, False)), (1, (1, value, False, False)), (1, (2, critic, True, False)),
            (1, (1, value, True, False)), (1, (1, actor(ACTIONS), True, False))]  # fmt: skip


def products(row: str, width: int, dtype: object) -> Callable[[], float]:
    """One update's worth of products; returns a function that makes them and says how many updates it was."""
    import torch

    work: list[tuple[float, Callable[[], None]]] = []
    for times, (nets, layers, weights, inputs) in passes(row, width):
        x = {n: torch.randn(nets, BATCH, n).to(dtype) for layer in layers for n in layer}
        w = [torch.randn(nets, a, b).to(dtype) for a, b in layers]

        def one(x=x, w=w, layers=layers, weights=weights, inputs=inputs) -> None:  # type: ignore[no-untyped-def]
            for (a, _), m in zip(layers, w, strict=True):
                torch.bmm(x[a], m)
            for i in reversed(range(len(layers))):
                a, b = layers[i]
                if weights:
                    torch.bmm(x[a].transpose(1, 2), x[b])
                if (weights or inputs) and (i > 0 or inputs):
                    torch.bmm(x[b], w[i].transpose(1, 2))

        work.append((times, one))

    def update() -> float:
        for times, one in work:
            for _ in range(round(2 * times)):
                one()
        return 2.0

    return update


def flop(row: str, width: int) -> float:
    """Floating-point operations of an update's products."""
    total = 0.0
    for times, (nets, layers, weights, inputs) in passes(row, width):
        for i, (a, b) in enumerate(layers):
            count = 1 + weights + ((weights or inputs) and (i > 0 or inputs))
            total += times * nets * count * 2 * BATCH * a * b
    return total


def measure_products(given: argparse.Namespace) -> None:
    import torch

    torch.set_num_threads(given.threads)
    update = products(given.row, given.width, getattr(torch, given.precision))
    meter, going = Meter("update", 0.5, given.seconds), True
    with torch.no_grad():
        while going:
            going = meter.add(int(update()))
    say(meter.result(f"products only, {given.precision}, {given.threads} thread(s)", ("torch",),
                     work=flop(given.row, given.width)))  # fmt: skip


def measure_stepping(given: argparse.Namespace) -> None:
    """The fastest of: one copy after the other in a loop, the native vector environment."""
    s = {**PPO, **SAC}[given.row]
    copies = s.get("n_envs", 1)
    ways = [_loop, _native] if s["environment"] == "CartPole-v1" else [_loop]
    found = [_rate(way(s["environment"], copies), given.seconds / len(ways)) for way in ways]
    say(max(found, key=lambda r: r["rate"]))


def _rate(step: Callable[[], int], seconds: float) -> dict[str, object]:
    meter, going = Meter("env_step", 0.3, seconds), True
    while going:
        going = meter.add(sum(step() for _ in range(100)))
    return meter.result(step.__doc__ or "", ("gymnasium", "mujoco"))


def _loop(environment: str, copies: int) -> Callable[[], int]:
    import gymnasium

    envs = [gymnasium.make(environment).unwrapped for _ in range(copies)]
    for i, env in enumerate(envs):
        env.reset(seed=i)
    actions = [envs[0].action_space.sample() for _ in range(64)]
    clock = [0]

    def step() -> int:
        """bare environments in a loop, without their wrappers"""
        clock[0] += 1
        for i, env in enumerate(envs):
            ended = env.step(actions[(clock[0] + i) % 64])[2]
            if ended or clock[0] % 1000 == 0:
                env.reset()
        return copies

    return step


def _native(environment: str, copies: int) -> Callable[[], int]:
    import gymnasium
    import numpy as np

    envs = gymnasium.make_vec(environment, num_envs=copies, vectorization_mode="vector_entry_point")
    envs.reset(seed=0)
    drawn = np.random.default_rng(0).integers(0, 2, (64, copies))
    clock = [0]

    def step() -> int:
        """the native vector environment of gymnasium"""
        clock[0] += 1
        envs.step(drawn[clock[0] % 64])
        return copies

    return step


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__)
    asked.add_argument("kind", choices=("stepping", "products"))
    asked.add_argument("--row", choices=(*PPO, *SAC, *OFFLINE), required=True)
    asked.add_argument("--threads", type=int, default=int(os.environ.get("OMP_NUM_THREADS", "1")))
    asked.add_argument("--seconds", type=float, default=2.0)
    asked.add_argument("--width", type=int, default=256)
    asked.add_argument("--precision", default="float32")
    given = asked.parse_args()
    prepare(given.threads)
    (measure_products if given.kind == "products" else measure_stepping)(given)


if __name__ == "__main__":
    main()
