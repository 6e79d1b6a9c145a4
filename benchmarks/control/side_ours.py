"""unipo as a side of the control rows, through the doors that `unipo run` takes: configure, start, advance.

    python -m benchmarks.control.side_ours ppo-cartpole --threads 1

No evaluations and no TensorBoard, as on the other sides; metrics, ledger and flushes of every step are part of it.
"""

from __future__ import annotations

import shutil
import tempfile
from typing import Any

from benchmarks.control.settings import OFFLINE, PPO, SAC
from benchmarks.control.side import Meter, parser, prepare, say, say_returns

LIBRARIES = ("unipo", "torch", "gymnasium", "mujoco", "numpy")
METHODS = {"td3bc": "td3-bc", "iql": "iql"}


def ppo_settings(s: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(keyword arguments of ppo, settings of the run); our value term is half the squared error."""
    options = {"clip": s["clip_range"], "gamma": s["gamma"], "lam": s["gae_lambda"], "value": 2 * s["vf_coef"],
               "value_clip": 0.0, "entropy": s["ent_coef"], "epochs": s["n_epochs"]}  # fmt: skip
    return options, {"num_envs": s["n_envs"], "rollout": s["n_steps"], "batch_size": s["batch_size"],
                     "hidden": (s["width"],) * 2, "learning_rate": s["learning_rate"],
                     "clip_norm": s["max_grad_norm"]}  # fmt: skip


def settings_of(row: str, width: int) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """(method, its keyword arguments, settings of the run)."""
    if row in PPO:
        return "ppo", *ppo_settings(PPO[row])
    if row in SAC:
        s = SAC[row]
        settings = {"batch_size": s["batch_size"], "hidden": (s["width"],) * 2, "learning_rate": s["learning_rate"],
                    "learning_starts": s["learning_starts"], "replay_capacity": s["buffer_size"], "rollout": 200}  # fmt: skip
        options = {"gamma": s["gamma"], "tau": s["tau"], "temperature_rate": s["learning_rate"]}
        return "sac", options, settings
    from benchmarks.control.data import make

    s = OFFLINE[row]
    options = {k: v for k, v in s.items() if k not in ("environment", "batch_size", "learning_rate")}
    settings = {"batch_size": s["batch_size"], "hidden": (width,) * 2, "learning_rate": s["learning_rate"],
                "dataset": str(make()), "rollout": 250}  # fmt: skip
    return METHODS[row], options, settings


def build(row: str, width: int, threads: int, seed: int, **more: Any) -> Any:
    """A run of a row at step 0, as `unipo run` makes it."""
    from rich.console import Console

    from unipo.api import configure, start

    method, options, settings = settings_of(row, width)
    environment = {**PPO, **SAC, **OFFLINE}[row]["environment"]
    folder = tempfile.mkdtemp()
    shutil.rmtree(folder)
    settings = {"total_timesteps": 10**9, "tensorboard": False, "evaluations": 0, **settings, **more}
    config, recipe = configure(method, environment, {method: options}, preset=False, threads=threads, seed=seed, out=folder,
                               **settings)  # fmt: skip
    return start(config, recipe, Console(quiet=True))


def returns_of(run: Any, row: str, steps: int, notes: str) -> None:
    """Train to the end and evaluate; offline, steps are updates."""
    import torch

    from unipo.sources.acting.environments import make_environment
    from unipo.sources.acting.spaces import ActionSpec

    while run.step < run.config.steps:
        run.advance()
    shutil.rmtree(run.folder, ignore_errors=True)
    environment = {**PPO, **SAC, **OFFLINE}[row]["environment"]
    spec = ActionSpec.of(make_environment(environment).action_space)

    def act(x: Any) -> Any:
        return spec.native(run.policy.act(torch.from_numpy(x), torch.zeros(len(x), 8), deterministic=True)[0].numpy())

    say_returns(environment, steps, act, notes, LIBRARIES)


def main() -> None:
    asked = parser(__doc__, (*PPO, *SAC, *OFFLINE))
    asked.add_argument("--set", nargs="*", default=[], help="further settings of the run, NAME=VALUE")
    given = asked.parse_args()
    prepare(given.threads)
    more = dict(pair.split("=", 1) for pair in given.set)
    if given.steps:
        more["total_timesteps"] = given.steps
    if given.precision == "autocast":
        more["autocast"] = "bfloat16"
    run = build(given.row, given.width, given.threads, given.seed, **more)
    if given.steps:
        returns_of(run, given.row, given.steps, given.precision)
        return
    meter = Meter("env_step" if given.row in PPO else "update", given.warm, given.seconds)
    going = True
    while going:
        before = run.learner.updates
        run.advance()
        per_step = run.config.num_envs * run.config.rollout
        going = meter.add(per_step if given.row in PPO else run.learner.updates - before)
    shutil.rmtree(run.folder, ignore_errors=True)
    notes = f"{given.threads} thread(s), {given.precision}"
    say(meter.result(notes, LIBRARIES, work=1.0))


if __name__ == "__main__":
    main()
