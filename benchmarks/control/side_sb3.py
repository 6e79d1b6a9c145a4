"""Stable-Baselines3 as a side of the PPO and SAC rows: DummyVecEnv, on the CPU, without logging.

build/peers/venv/bin/python -m benchmarks.control.side_sb3 ppo-cartpole --threads 1 [--compile]
"""

from __future__ import annotations

from typing import Any

from benchmarks.control.settings import PPO, SAC
from benchmarks.control.side import Meter, parser, prepare, say, say_returns

ASKED = parser(__doc__, (*PPO, *SAC))
ASKED.add_argument("--compile", action="store_true", help="th.compile(model.policy), as its documentation suggests")
GIVEN = ASKED.parse_args()
prepare(GIVEN.threads)

import torch  # noqa: E402
from stable_baselines3 import PPO as Ppo  # noqa: E402
from stable_baselines3 import SAC as Sac  # noqa: E402
from stable_baselines3.common.env_util import make_vec_env  # noqa: E402

from benchmarks.control.timed import Timed  # noqa: E402

LIBRARIES = ("stable-baselines3", "torch", "gymnasium", "mujoco", "numpy")


def build(row: str, seed: int) -> tuple[Any, Meter]:
    """The model of a row, and the meter that counts its environment steps or its updates."""
    if row in PPO:
        s = PPO[row]
        env = make_vec_env(s["environment"], n_envs=s["n_envs"], seed=seed)
        kept = {k: v for k, v in s.items() if k not in ("environment", "n_envs", "width")}
        net = {"net_arch": {"pi": [s["width"]] * 2, "vf": [s["width"]] * 2}}
        meter = Meter("env_step", GIVEN.warm, GIVEN.seconds)
        return Ppo("MlpPolicy", env, policy_kwargs=net, seed=seed, device="cpu", **kept), meter
    s = SAC[row]
    env = make_vec_env(s["environment"], n_envs=1, seed=seed)
    kept = {k: v for k, v in s.items() if k not in ("environment", "width")}
    net = {"net_arch": [s["width"]] * 2}
    meter = Meter("update", GIVEN.warm, GIVEN.seconds)
    return Sac(
        "MlpPolicy", env, policy_kwargs=net, seed=seed, device="cpu", train_freq=1, gradient_steps=1, **kept
    ), meter


def main() -> None:
    torch.set_num_threads(GIVEN.threads)
    if GIVEN.precision == "mkldnn":
        torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    model, meter = build(GIVEN.row, GIVEN.seed)
    if GIVEN.compile:
        model.policy = torch.compile(model.policy)
    per_rollout = PPO[GIVEN.row]["n_envs"] * PPO[GIVEN.row]["n_steps"] if GIVEN.row in PPO else 1
    if GIVEN.precision == "autocast":  # of the updates: actions in bfloat16 have no numpy
        model.train = torch.autocast("cpu", dtype=torch.bfloat16)(model.train)
    if GIVEN.steps:
        model.learn(total_timesteps=GIVEN.steps)
        found = {**PPO, **SAC}[GIVEN.row]["environment"]
        say_returns(found, GIVEN.steps, lambda x: model.predict(x, deterministic=True)[0], GIVEN.precision, LIBRARIES)
        return
    model.learn(total_timesteps=10**9, callback=Timed(meter, per_rollout))
    notes = (
        f"DummyVecEnv, {GIVEN.threads} thread(s), {GIVEN.precision}{', th.compile(policy)' if GIVEN.compile else ''}"
    )
    say(meter.result(notes, LIBRARIES))


if __name__ == "__main__":
    main()
