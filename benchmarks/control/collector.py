"""Collecting beside bare stepping: what acting, columns and resets add to the environments (rows collector-8 and collector-64).

    python -m benchmarks.control.collector ours --envs 8        the collector: a 64x64 policy acts, episodes come out
    python -m benchmarks.control.collector twin --envs 8        the same by the slow twins: Gymnasium's steps, torch's acting
    python -m benchmarks.control.collector raw --envs 8         the limit: `env.step` of as many copies in a loop

`raw` does actions that were drawn before, of the law of an untrained policy: standard normal and clipped, or uniform.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

from benchmarks.control.side import Meter, prepare, say

ROLLOUT = 128
LIBRARIES = ("unipo", "torch", "gymnasium", "mujoco", "numpy")


def collecting(environment: str, copies: int, fast: bool) -> Callable[[], int]:
    """Rollouts of an untrained policy: returns a function that collects one and says how many steps it was."""
    import torch

    from unipo.policies.acting import Acting
    from unipo.policies.control import ControlPolicy
    from unipo.policies.distributions import Categorical, Distribution, Gaussian
    from unipo.sources.acting.collector import Collector
    from unipo.sources.acting.environments import Environments, make_environment
    from unipo.sources.acting.stepping import Maker, Together

    torch.manual_seed(0)
    make = partial(make_environment, environment)
    environments = Environments(make, copies, seed=0)
    if not fast:
        environments._stepper = Together([Maker(make, i, ())() for i in range(copies)])
        environments.load_state_dict(environments.state_dict())
    spec = environments.action_spec
    law: Distribution = Categorical(spec.size) if spec.kind == "categorical" else Gaussian(spec.size)
    policy = ControlPolicy(environments.observation_spec.size, law)
    collector = Collector(environments, seed=0, noise_size=law.noise)
    act = Acting(policy) if fast else policy.act

    def rollout() -> int:
        return collector.collect(ROLLOUT, act, 0).count("step")

    return rollout


def stepping(environment: str, copies: int) -> Callable[[], int]:
    """The same number of bare steps."""
    import gymnasium
    import numpy as np

    envs: list[Any] = [gymnasium.make(environment, disable_env_checker=True) for _ in range(copies)]
    for i, env in enumerate(envs):
        env.reset(seed=i)
    space, rng = envs[0].action_space, np.random.default_rng(0)
    if isinstance(space, gymnasium.spaces.Discrete):
        actions = rng.integers(0, int(space.n), (ROLLOUT, copies))
    else:
        actions = np.clip(rng.standard_normal((ROLLOUT, copies, *space.shape), dtype=np.float32), space.low, space.high)

    def rollout() -> int:
        for row in actions:
            for env, action in zip(envs, row, strict=True):
                _, _, terminated, truncated, _ = env.step(action)
                if terminated or truncated:
                    env.reset()
        return ROLLOUT * copies

    return rollout


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__)
    asked.add_argument("side", choices=("ours", "twin", "raw"))
    asked.add_argument("--environment", default="HalfCheetah-v5")
    asked.add_argument("--envs", type=int, default=8)
    asked.add_argument("--threads", type=int, default=1)
    asked.add_argument("--seconds", type=float, default=3.0)
    given = asked.parse_args()
    prepare(given.threads)
    if given.side == "raw":
        rollout = stepping(given.environment, given.envs)
    else:
        import torch

        torch.set_num_threads(given.threads)
        rollout = collecting(given.environment, given.envs, fast=given.side == "ours")
    meter, going = Meter("env_step", 0.5, given.seconds), True
    while going:
        going = meter.add(rollout())
    say(meter.result(f"{given.environment}, {given.envs} copies, {given.side}", LIBRARIES, work=1.0))


if __name__ == "__main__":
    main()
