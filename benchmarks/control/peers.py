"""Stable-Baselines3 with its own tuned settings, as the measure of our control results.

    python benchmarks/control/peers.py ppo CartPole-v1 --steps 100000 --out benchmarks/control/peers/ppo-CartPole-v1.json

runs where `stable-baselines3 'gymnasium[box2d,mujoco]'` are installed; unipo is not needed. Per seed it records

- `returns` [50]: undiscounted returns of deterministic episodes after training, on environment seeds no training run uses,
  with the observation statistics frozen;
- `curve` [[step, mean return], ...]: ten such episodes before training and at every tenth of the budget (an on-policy
  method is evaluated after the first whole rollout past the mark: its parameters do not change before);
- `seconds` of wall clock and `cpu_seconds` of processor time spent on training alone (evaluation excluded), one thread;
  `steps_per_second` is steps over `seconds`. `cpu_seconds` says more where other programs share the processor.

Finished seeds are kept: a second call trains only those that are missing.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch
from stable_baselines3 import PPO, SAC
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecEnv, VecNormalize

EPISODES = 50
CURVE_EPISODES, CURVE_POINTS = 10, 10
FINAL_SEEDS, CURVE_SEEDS = 1_000_000, 2_000_000
"""First environment seeds of evaluation; training uses 1000 * seed + index of the environment."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ppo:
    """Every setting of PPO in the words of Stable-Baselines3; defaults are its defaults.

    `learning_rate` and `clip_range`: a number, or "lin_X" for X times the share of the budget that is left.
    `normalize`: running mean and variance of observations and of discounted returns, both clipped at 10.
    """

    n_envs: int = 1
    n_steps: int = 2048
    batch_size: int = 64
    n_epochs: int = 10
    gamma: float = 0.99
    gae_lambda: float = 0.95
    learning_rate: float | str = 3e-4
    clip_range: float | str = 0.2
    ent_coef: float = 0.0
    vf_coef: float = 0.5
    max_grad_norm: float = 0.5
    use_sde: bool = False
    sde_sample_freq: int = -1
    normalize: bool = False
    net_arch: tuple[int, ...] = (64, 64)
    activation: str = "Tanh"
    log_std_init: float = 0.0
    ortho_init: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Sac:
    """Every setting of SAC in the words of Stable-Baselines3; defaults are its defaults."""

    n_envs: int = 1
    learning_rate: float = 3e-4
    buffer_size: int = 1_000_000
    learning_starts: int = 100
    batch_size: int = 256
    tau: float = 0.005
    gamma: float = 0.99
    train_freq: int = 1
    gradient_steps: int = 1
    ent_coef: str | float = "auto"
    normalize: bool = False
    net_arch: tuple[int, ...] = (256, 256)


WIDE: dict[str, Any] = {"net_arch": (256, 256), "activation": "ReLU", "log_std_init": -2.0, "ortho_init": False}

# The settings published by RL Baselines3 Zoo 2.9 (hyperparams/ppo.yml and sac.yml, commit 22e3ff2). MuJoCo was tuned there
# on the v4 environments and one million steps; here only the environment's version and the number of steps change.
SETTINGS: dict[tuple[str, str], Ppo | Sac] = {
    ("ppo", "CartPole-v1"): Ppo(
        n_envs=8, n_steps=32, batch_size=256, n_epochs=20, gamma=0.98, gae_lambda=0.8,
        learning_rate="lin_0.001", clip_range="lin_0.2",
    ),
    ("ppo", "Pendulum-v1"): Ppo(
        n_envs=4, n_steps=1024, n_epochs=10, gamma=0.9, gae_lambda=0.95, learning_rate=1e-3, use_sde=True, sde_sample_freq=4,
    ),
    ("ppo", "Acrobot-v1"): Ppo(n_envs=16, n_steps=256, n_epochs=4, gamma=0.99, gae_lambda=0.94, normalize=True),
    ("ppo", "LunarLander-v3"): Ppo(
        n_envs=16, n_steps=1024, batch_size=64, n_epochs=4, gamma=0.999, gae_lambda=0.98, ent_coef=0.01,
    ),
    ("ppo", "Swimmer-v5"): Ppo(
        n_envs=4, n_steps=1024, batch_size=256, gamma=0.9999, gae_lambda=0.98, learning_rate=6e-4, normalize=True,
    ),
    ("ppo", "Hopper-v5"): Ppo(
        n_steps=512, batch_size=32, n_epochs=5, gamma=0.999, gae_lambda=0.99, learning_rate=9.80828e-05,
        ent_coef=0.00229519, vf_coef=0.835671, max_grad_norm=0.7, normalize=True, **WIDE,
    ),
    ("ppo", "HalfCheetah-v5"): Ppo(
        n_steps=512, batch_size=64, n_epochs=20, gamma=0.98, gae_lambda=0.92, learning_rate=2.0633e-05, clip_range=0.1,
        ent_coef=0.000401762, vf_coef=0.58096, max_grad_norm=0.8, normalize=True, **WIDE,
    ),
    ("sac", "Pendulum-v1"): Sac(learning_rate=1e-3),
    # The Zoo's learning_starts is 10 000, one percent of its budget, and all of ours: one percent of ours is 100.
    ("sac", "HalfCheetah-v5"): Sac(learning_starts=100),
}  # fmt: skip


@dataclass(slots=True)
class Clock:
    """Wall and processor seconds of training; `pause` runs a function that does not count."""

    wall: float = field(default_factory=time.perf_counter)
    cpu: float = field(default_factory=time.process_time)

    def pause(self, function: Callable[[], None]) -> None:
        """Move the starting points by what `function` takes."""
        wall, cpu = time.perf_counter(), time.process_time()
        function()
        self.wall += time.perf_counter() - wall
        self.cpu += time.process_time() - cpu

    def read(self) -> tuple[float, float]:
        """(wall, processor) seconds since the start, pauses left out."""
        return time.perf_counter() - self.wall, time.process_time() - self.cpu


class Curve(BaseCallback):
    """Ten deterministic episodes at the first update boundary past each tenth of the budget."""

    def __init__(self, environment: str, steps: int) -> None:
        super().__init__()
        self.environment, self.every, self.clock = environment, steps / CURVE_POINTS, Clock()
        self.points: list[tuple[int, float]] = []

    def _on_training_start(self) -> None:
        self.clock = Clock()

    def _on_rollout_start(self) -> None:
        if self.num_timesteps >= len(self.points) * self.every:
            self.clock.pause(self.evaluate)

    def _on_step(self) -> bool:
        return True

    def evaluate(self) -> None:
        """Add a point at the present step."""
        returns = episode_returns(self.model, self.environment, CURVE_SEEDS, CURVE_EPISODES)
        self.points.append((self.num_timesteps, round(float(returns.mean()), 3)))


def episode_returns(model: BaseAlgorithm, environment: str, first_seed: int, episodes: int) -> np.ndarray:
    """[episodes] undiscounted returns of the deterministic policy, each episode on its own environment and seed."""
    normalizer = model.get_vec_normalize_env()
    environments = [gymnasium.make(environment) for _ in range(episodes)]
    observations = [env.reset(seed=first_seed + i)[0] for i, env in enumerate(environments)]
    returns, running = np.zeros(episodes), list(range(episodes))
    while running:
        batch = np.stack([observations[i] for i in running])
        actions, _ = model.predict(normalizer.normalize_obs(batch) if normalizer else batch, deterministic=True)
        left = []
        for i, action in zip(running, actions, strict=True):
            observations[i], reward, terminated, truncated, _ = environments[i].step(action)
            returns[i] += float(reward)
            if not (terminated or truncated):
                left.append(i)
        running = left
    for env in environments:
        env.close()
    return returns


def schedule(value: float | str) -> float | Callable[[float], float]:
    """A constant, or for "lin_X" the Zoo's linear schedule: X times the share of the budget that is left."""
    if isinstance(value, float):
        return value
    start = float(value.removeprefix("lin_"))
    return lambda left: left * start


def build_ppo(settings: Ppo, env: VecEnv, seed: int) -> PPO:
    """PPO with exactly these settings."""
    given = asdict(settings)
    for name in ("n_envs", "normalize", "net_arch", "activation", "log_std_init", "ortho_init"):
        del given[name]
    given |= {"learning_rate": schedule(settings.learning_rate), "clip_range": schedule(settings.clip_range)}
    widths = list(settings.net_arch)
    network: dict[str, Any] = {
        "net_arch": {"pi": widths, "vf": widths}, "activation_fn": getattr(torch.nn, settings.activation),
        "log_std_init": settings.log_std_init, "ortho_init": settings.ortho_init,
    }  # fmt: skip
    return PPO("MlpPolicy", env, policy_kwargs=network, seed=seed, device="cpu", **given)


def build_sac(settings: Sac, env: VecEnv, seed: int) -> SAC:
    """SAC with exactly these settings."""
    given = asdict(settings)
    for name in ("n_envs", "normalize", "net_arch"):
        del given[name]
    return SAC("MlpPolicy", env, policy_kwargs={"net_arch": list(settings.net_arch)}, seed=seed, device="cpu", **given)


def train(environment: str, settings: Ppo | Sac, steps: int, seed: int) -> dict[str, Any]:
    """Train one seed, evaluate it, and return its record."""
    first = 1000 * seed  # environments of different runs share no seed
    env: VecEnv = make_vec_env(environment, n_envs=settings.n_envs, seed=first)
    if settings.normalize:
        env = VecNormalize(env, gamma=settings.gamma)
    model = build_ppo(settings, env, first) if isinstance(settings, Ppo) else build_sac(settings, env, first)
    curve = Curve(environment, steps)
    model.learn(total_timesteps=steps, callback=curve)
    wall, cpu = curve.clock.read()
    curve.evaluate()
    record: dict[str, Any] = {
        "seed": seed,
        "returns": [round(float(r), 3) for r in episode_returns(model, environment, FINAL_SEEDS, EPISODES)],
        "curve": curve.points,
        "steps": model.num_timesteps,
        "seconds": round(wall, 2),
        "cpu_seconds": round(cpu, 2),
        "steps_per_second": round(model.num_timesteps / wall, 1),
    }
    if isinstance(model, SAC):
        record |= {"updates": model._n_updates, "updates_per_second": round(model._n_updates / wall, 1)}
    env.close()
    return record


def main(arguments: Sequence[str]) -> None:
    """Train the seeds that the file lacks, and write it after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("algorithm", choices=sorted({algorithm for algorithm, _ in SETTINGS}))
    parser.add_argument("environment", choices=sorted({environment for _, environment in SETTINGS}))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--steps", type=int, required=True, help="environment steps; PPO rounds up to whole rollouts")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args(arguments)
    known = (given.algorithm, given.environment)
    if known not in SETTINGS:
        parser.error(f"no published settings for {known}; there are {sorted(SETTINGS)}")
    torch.set_num_threads(1)
    settings = SETTINGS[known]
    libraries = ("stable-baselines3", "gymnasium", "mujoco", "torch", "numpy")
    table: dict[str, Any] = {
        "algorithm": given.algorithm, "environment": given.environment, "total_steps": given.steps,
        "library": "stable-baselines3", "versions": {name: version(name) for name in libraries},
        "settings": asdict(settings), "seeds": [],
    }  # fmt: skip
    if given.out.exists():
        before = json.loads(given.out.read_text())
        if before["total_steps"] != given.steps or before["settings"] != json.loads(json.dumps(table["settings"])):
            parser.error(f"{given.out} holds other settings or another budget: remove it, or give another --out")
        table["seeds"] = before["seeds"]
    done = {record["seed"] for record in table["seeds"]}
    for seed in [seed for seed in given.seeds if seed not in done]:
        record = train(given.environment, settings, given.steps, seed)
        table["seeds"].append(record)
        write(given.out, table)
        print(f"{given.algorithm} {given.environment} seed {seed}: {np.mean(record['returns']):.1f}", flush=True)


def write(path: Path, table: dict[str, Any]) -> None:
    """One key a line, one seed a line: small, and readable in a diff."""
    seeds = ",\n  ".join(json.dumps(record) for record in table["seeds"])
    rest = "".join(f"{json.dumps(k)}: {json.dumps(v)},\n" for k, v in table.items() if k != "seeds")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'{{\n{rest}"seeds": [\n  {seeds}\n]\n}}\n')


if __name__ == "__main__":
    main(sys.argv[1:])
