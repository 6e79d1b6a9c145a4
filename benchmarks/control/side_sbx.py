"""SBX (Stable-Baselines3's interface on JAX) as a side of the PPO and SAC rows: everything else as `side_sb3.py`.

build/peers/venv/bin/python -m benchmarks.control.side_sbx ppo-cartpole --threads 1
"""

from __future__ import annotations

import os
from typing import Any

from benchmarks.control.settings import PPO, SAC
from benchmarks.control.side import Meter, parser, prepare, say, say_returns

GIVEN = parser(__doc__, (*PPO, *SAC)).parse_args()
prepare(GIVEN.threads)
os.environ["JAX_PLATFORMS"] = "cpu"
if GIVEN.threads == 1:
    os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"

import flax.linen as nn  # noqa: E402
import jax  # noqa: E402
import sbx  # noqa: E402
import torch  # noqa: E402
from stable_baselines3.common.env_util import make_vec_env  # noqa: E402

from benchmarks.control.timed import Timed  # noqa: E402

LIBRARIES = ("sbx-rl", "jax", "stable-baselines3", "gymnasium", "mujoco", "numpy")


def build(row: str) -> tuple[Any, int]:
    """The model, and the units of a rollout."""
    s = {**PPO, **SAC}[row]
    env = make_vec_env(s["environment"], n_envs=s.get("n_envs", 1), seed=GIVEN.seed)
    kept = {k: v for k, v in s.items() if k not in ("environment", "n_envs", "width")}
    if row in PPO:
        net = {"net_arch": {"pi": [s["width"]] * 2, "vf": [s["width"]] * 2}, "activation_fn": nn.tanh}
        return sbx.PPO("MlpPolicy", env, policy_kwargs=net, seed=GIVEN.seed, **kept), s["n_envs"] * s["n_steps"]
    net = {"net_arch": [s["width"]] * 2}
    return sbx.SAC("MlpPolicy", env, policy_kwargs=net, seed=GIVEN.seed, train_freq=1, gradient_steps=1, **kept), 1


def main() -> None:
    torch.set_num_threads(GIVEN.threads)
    if GIVEN.precision != "float32":
        jax.config.update("jax_default_matmul_precision", "bfloat16")
    model, per_rollout = build(GIVEN.row)
    meter = Meter("env_step" if GIVEN.row in PPO else "update", GIVEN.warm, GIVEN.seconds)
    if GIVEN.steps:
        model.learn(total_timesteps=GIVEN.steps)
        found = {**PPO, **SAC}[GIVEN.row]["environment"]
        say_returns(found, GIVEN.steps, lambda x: model.predict(x, deterministic=True)[0], GIVEN.precision, LIBRARIES)
        return
    model.learn(total_timesteps=10**9, callback=Timed(meter, per_rollout))
    notes = f"SBX on JAX, {GIVEN.threads} thread(s), {GIVEN.precision}"
    say(meter.result(notes, LIBRARIES))


if __name__ == "__main__":
    main()
