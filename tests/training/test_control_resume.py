"""A run in an environment that is stopped anywhere and resumed ends with the weights of one that was not, bit for bit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from safetensors.torch import load_file

from unipo import api
from unipo.episodes import Episodes
from unipo.learner import Learner
from unipo.methods.actor_critic import dqn, sac
from unipo.methods.catalog import build
from unipo.recipe import Recipe
from unipo.sources.acting.environment_errors import EnvironmentFailure
from unipo.sources.acting.recordings import load_recorded
from unipo.training.config import ControlConfig
from unipo.training.control import EnvironmentData
from unipo.training.loop import Run

PPO = {"task": "CartPole-v1", "total_timesteps": 384, "num_envs": 2, "rollout": 32, "batch_size": 16, "epochs": 2,
       "schedule": "linear", "normalize_observations": True, "normalize_rewards": True, "checkpoints": 3}  # fmt: skip
REPLAYED = {
    "batch_size": 16,
    "rollout": 20,
    "num_envs": 2,
    "learning_starts": 60,
    "total_timesteps": 320,
    "checkpoints": 4,
}
SAC = {**REPLAYED, "task": "Pendulum-v1", "hidden": (8,), "normalize_rewards": True, "n_step": 2}
DQN = {**REPLAYED, "task": "CartPole-v1", "hidden": (8,), "prioritized": 0.6}
CASES: dict[str, tuple[Callable[[], Recipe], dict[str, Any]]] = {
    "ppo": (lambda: build("ppo", {}, environment=True), PPO),
    "ppo in processes": (lambda: build("ppo", {}, environment=True), {**PPO, "asynchronous": True}),
    "sac": (sac, SAC),
    "dqn": (dqn, DQN),
    "sac in a file": (sac, {**SAC, "memory_mapped": True, "replay_capacity": 100}),
}


def begun(recipe: Recipe, out: Path, settings: dict[str, Any]) -> Run:
    small = {"hidden": (8, 8), "eval_episodes": 2, "evaluations": 2, "tensorboard": False, "seed": 3}
    return api.start(ControlConfig(out=str(out), **{**small, **settings}), recipe)


class Killed(BaseException):
    """What no part of the library can catch."""


def killed_at_update(monkeypatch: pytest.MonkeyPatch, run: Run, number: int) -> None:
    """Let the run go until it has made so many updates; then it is gone, in the middle of a step."""
    update = Learner.update

    def until(self: Learner, *args: Any) -> Any:
        if self.updates == number:
            raise Killed
        return update(self, *args)

    with monkeypatch.context() as patched:
        patched.setattr(Learner, "update", until)
        with pytest.raises(Killed):
            run.train()


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "final" / "model.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def measured(folder: Path) -> list[str]:
    """The rows of the metrics, without what is a matter of time."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [str({k: v for k, v in row.items() if k != "seconds"}) for row in rows]


@pytest.mark.parametrize("case", CASES)
def test_stopped_and_resumed_is_as_uninterrupted(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replay and priorities, reward scaler, normaliser, targets, temperature, epsilon and running episodes included."""
    make, settings = CASES[case]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    finished = api.finish(begun(make(), whole, settings))
    run = begun(make(), broken, settings)
    killed_at_update(monkeypatch, run, finished.learner.updates * 3 // 4)
    run.data.close()
    assert 0 < run.step < finished.step
    again = api.resume(broken, recipe=make())
    finished.data.close()
    again.data.close()
    assert again.step == finished.step
    assert same(weights(whole), weights(broken))
    assert all(same(finished.modules[m].state_dict(), again.modules[m].state_dict()) for m in finished.modules)
    assert measured(whole) == measured(broken)


def test_a_recording_run_that_is_resumed_records_every_episode_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: dict[str, Episodes] = {}
    for name in ("whole", "broken"):
        settings = {**PPO, "record": str(tmp_path / f"{name}-v0")}
        run = begun(build("ppo", {}, environment=True), tmp_path / name, settings)
        if name == "broken":
            killed_at_update(monkeypatch, run, 40)
            api.resume(tmp_path / name, recipe=build("ppo", {}, environment=True))
        else:
            api.finish(run)
        found[name] = load_recorded(tmp_path / f"{name}-v0")
    totals = {
        name: sorted(zip(e.lengths().tolist(), e.reduce("reward").tolist(), strict=True)) for name, e in found.items()
    }
    assert totals["whole"] == totals["broken"]
    assert len(totals["whole"]) > 5
    assert found["whole"]["observation"].sum() == pytest.approx(float(found["broken"]["observation"].sum()), abs=1e-3)


def test_a_killed_process_goes_on(tmp_path: Path) -> None:
    """kill -9 from outside, the real command line."""
    arguments = ["CartPole-v1", "--total-timesteps", "1500", "--num-envs", "2", "--rollout", "50", "--batch-size", "50",
                 "--epochs", "2", "--no-preset", "--hidden", "8", "--evaluations", "0", "--checkpoints", "15"]  # fmt: skip
    run = [sys.executable, "-m", "unipo.cli", "run", "ppo", *arguments, "--out"]
    quiet: Any = {
        "env": {**os.environ, "OMP_NUM_THREADS": "1"},
        "stdout": subprocess.DEVNULL,
        "stderr": subprocess.STDOUT,
    }
    assert subprocess.run([*run, str(tmp_path / "whole")], **quiet).returncode == 0
    process = subprocess.Popen([*run, str(tmp_path / "broken")], **quiet)
    lines, deadline = tmp_path / "broken" / "metrics.jsonl", time.monotonic() + 60
    while time.monotonic() < deadline and not (lines.exists() and len(lines.read_text().splitlines()) > 9):
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "broken" / "final").exists()
    resumed = [sys.executable, "-m", "unipo.cli", "resume", str(tmp_path / "broken")]
    assert subprocess.run(resumed, **quiet).returncode == 0
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "broken"))


def test_ctrl_c_reaches_the_run_and_not_its_environments(tmp_path: Path) -> None:
    """A terminal signals the whole group of processes: the environments' go on until the step is done and saved."""
    out = tmp_path / "run"
    run = [sys.executable, "-m", "unipo.cli", "run", "ppo", "CartPole-v1", "--asynchronous", "--num-envs", "2", "--no-preset",
           "--rollout", "64", "--hidden", "8", "--evaluations", "0", "--no-tensorboard", "--out", str(out)]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(run, env=environment, start_new_session=True, text=True, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT)  # fmt: skip
    lines, deadline = out / "metrics.jsonl", time.monotonic() + 60
    while time.monotonic() < deadline and not (lines.exists() and len(lines.read_text().splitlines()) > 2):
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    told = process.communicate(timeout=60)[0]
    assert process.returncode == 130, told
    made = len(lines.read_text().splitlines()) - 1
    assert (out / "checkpoints" / f"step-{made:06d}").exists()


# ---- environments that fail ------------------------------------------------------------------------------------------
class Fragile(gym.Env[Any, Any]):
    """Fails as it is told to in step `fails_at` of its life, unless it has been mended."""

    observation_space, action_space = spaces.Box(-1, 1, (2,), np.float32), spaces.Box(-1, 1, (1,), np.float32)
    mended = False

    def __init__(self, how: str, fails_at: int) -> None:
        self.how, self.fails_at, self.life = how, fails_at, 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.left = 7
        return self.np_random.uniform(-1, 1, 2).astype(np.float32), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.life += 1
        self.left -= 1
        observation, reward = np.array([self.left / 7, float(action[0])], np.float32), -(float(action[0]) ** 2)
        if self.life == self.fails_at and not Fragile.mended:
            if self.how == "crash":
                raise RuntimeError("the gear broke")
            reward = np.nan if self.how == "NaN reward" else reward
            observation = observation[:1] if self.how == "shape" else observation
        return observation, reward, self.left == 0, False, {}


@pytest.fixture
def fragile() -> Iterator[None]:
    gym.register("Fragile-v0", Fragile)
    Fragile.mended = False
    yield
    del gym.registry["Fragile-v0"]


MESSAGES = {
    "NaN reward": "returned a NaN or infinite reward",
    "shape": r"an observation of shape \(1,\), expected \(2,\)",
    "crash": "RuntimeError: the gear broke",
}


@pytest.mark.parametrize("how", MESSAGES)
@pytest.mark.parametrize("case", ["ppo", "sac"])
def test_a_failing_environment_leaves_a_run_that_goes_on_exactly(
    case: str, how: str, fragile: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The state of just before is saved: once the environment is mended, the run ends as if nothing had been."""
    make = CASES[case][0]
    settings = {**CASES[case][1], "task": "Fragile-v0", "evaluations": 0, "checkpoints": 1}
    options = {"how": how, "fails_at": 107}
    run = begun(make(), tmp_path / "broken", {**settings, "env_options": options})
    with pytest.raises(EnvironmentFailure, match=MESSAGES[how]) as failed:
        run.train()
    assert failed.value.env == 0
    assert (failed.value.episode, failed.value.step) == (15, 1)
    assert failed.value.action.shape == (1,)
    assert f"unipo resume {tmp_path / 'broken'}" in str(failed.value)
    assert f"step {run.step}" in str(failed.value)
    assert (tmp_path / "broken" / "checkpoints" / f"step-{run.step:06d}").exists()
    events = [json.loads(line) for line in (tmp_path / "broken" / "events.jsonl").read_text().splitlines()]
    assert [e["level"] for e in events if "environment 0" in e["message"]] == ["error"]
    Fragile.mended = True
    again = api.resume(tmp_path / "broken", recipe=make())
    whole = api.finish(begun(make(), tmp_path / "whole", {**settings, "env_options": options}))
    assert isinstance(again.data, EnvironmentData)
    assert again.step == whole.step
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "broken"))
