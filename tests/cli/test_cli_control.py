"""Environments on the command line, typed as a user types it: real commands, tiny budgets, bad input."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import gymnasium as gym
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

import unipo as library
from unipo.cli import main
from unipo.policies import ControlPolicy

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:minari")
PPO = ["--total-timesteps", "256", "--num-envs", "2", "--rollout", "64", "--batch-size", "32", "--epochs", "2", "--no-preset",
       "--hidden", "8", "--evaluations", "1", "--eval-episodes", "3", "--no-tensorboard"]  # fmt: skip
REPLAYED = ["--total-timesteps", "300", "--learning-starts", "100", "--batch-size", "16", "--train-every", "4", "--hidden", "8",
            "--evaluations", "1", "--eval-episodes", "2", "--no-tensorboard"]  # fmt: skip


def unipo(*arguments: str) -> int:
    return main(list(arguments))


def said(capsys: pytest.CaptureFixture[str]) -> str:
    """Everything that was printed, without the line breaks."""
    out, err = capsys.readouterr()
    return " ".join((out + err).split())


def test_a_run_records_films_is_evaluated_and_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, data = tmp_path / "run", tmp_path / "cart-v0"
    arguments = ["run", "ppo", "CartPole-v1", *PPO, "--out", str(out), "--record", str(data), "--video", "--seed", "3"]
    assert unipo(*arguments) == 0
    told = said(capsys)
    for path in (out / "final", data, out / "report.html"):
        assert str(path) in told
    assert next(p.suffix for p in (out / "video").iterdir()) in (".gif", ".mp4")
    assert str(out / "video") in told
    table = pq.read_table(out / "metrics.parquet")
    assert table.column("step").to_pylist() == [0, 1, 2]
    assert {"env_steps", "eval_return", "eval_return_low", "length"} <= set(table.column_names)
    assert table.column("env_steps").to_pylist()[1:] == [128, 256]

    assert unipo("evaluate", str(out), "--episodes", "5", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["return_low"] <= found["return"] <= found["return_high"]
    assert len(found["returns"]) == 5
    assert found["returns"][:3] == pytest.approx(_last_evaluation(out, capsys))
    assert unipo("evaluate", str(out), "--episodes", "5") == 0
    assert "5 episodes" in said(capsys)
    assert unipo("report", str(out)) == 0
    assert not re.search(r"(src|href)=.https?://", (out / "report.html").read_text()), "self-contained"

    assert unipo("data", "check", str(data)) == 0
    told = said(capsys)
    assert "of CartPole-v1" in told
    assert "no problems" in told
    fitting = told.rpartition("methods that fit: ")[2].split(", ")
    assert {"dqn", "iql"} <= set(fitting)
    assert not {"td3", "ppo", "grpo"} & set(fitting)
    assert unipo(*arguments) == 1
    assert "unipo resume" in said(capsys)


def _last_evaluation(out: Path, capsys: pytest.CaptureFixture[str]) -> list[float]:
    """The first episodes are those that the run itself was evaluated on."""
    assert unipo("evaluate", str(out), "--episodes", "3", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    last = pq.read_table(out / "metrics.parquet").column("eval_return").to_pylist()[-1]
    assert found["return"] == pytest.approx(last)
    return list(found["returns"])


def test_recorded_data_train_other_methods(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Record with an off-policy method, learn from it offline, by its folder."""
    data = tmp_path / "swing-v0"
    arguments = [*REPLAYED, "--total-timesteps", "450"]
    assert unipo("run", "sac", "Pendulum-v1", *arguments, "--out", str(tmp_path / "sac"), "--record", str(data)) == 0
    assert unipo("data", "check", str(data), "--reference", str(data), "--bins", "10") == 0
    told = said(capsys)
    assert "2 episodes, 400 steps" in told
    assert "SACo 1.000" in told
    offline = [*REPLAYED, "--total-timesteps", "40", "--dataset", str(data)]
    assert unipo("run", "td3-bc", "Pendulum-v1", *offline, "--out", str(tmp_path / "bc")) == 0
    assert (tmp_path / "bc" / "final" / "model.safetensors").exists()
    for arguments, message in {
        ("iql", "CartPole-v1", *offline): r"observations of shape \(3,\).*CartPole-v1 has \(4,\)",
        ("ppo", "Pendulum-v1", *offline): "learns from what it does itself",
        ("iql", "Pendulum-v1", *REPLAYED): "give it some with --dataset",
        ("iql", "Pendulum-v1", *REPLAYED, "--dataset", str(tmp_path / "gone")): "neither a folder",
        ("sac", "CartPole-v1", *REPLAYED, "--record", str(data)): "already holds episodes",
        ("sac", "CartPole-v1", *REPLAYED, "--record", str(tmp_path / "a b")): "cannot be the name",
    }.items():
        assert unipo("run", *arguments, "--out", str(tmp_path / "never")) == 1
        assert re.search(message, said(capsys)), message
    assert unipo("data", "check", str(data), "--refrence", "x") == 1
    assert "--reference" in said(capsys)


@pytest.mark.parametrize(
    ("arguments", "messages"),
    [
        (["ppo", "CartPol-v1"], ["no environment 'CartPol-v1'", "CartPole-v1"]),
        (["ppo", "ALE/Pong-v5"], ["gymnasium[atari]"]),
        (["pppo", "CartPole-v1"], ["did you mean", "ppo"]),
        (["grpo", "CartPole-v1"], ["'grpo' is not for environments"]),
        (["dqn", "Pendulum-v1"], ["maximum over discrete actions", "sac or td3"]),
        (["td3", "CartPole-v1"], ["needs real-valued (Box) actions", "dqn or ppo"]),
        (["ppo", "CartPole-v1", "--env.gravty", "3"], ["does not accept {'gravty': 3}"]),
        (["ppo", "CartPole-v1", "--ppo.clipp", "3"], ["has no setting 'clipp'", "--ppo.clip"]),
        (["ppo", "nowhere:Thing-v0"], ["nowhere"]),
    ],
)
def test_bad_input(
    arguments: list[str], messages: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert unipo("run", *arguments, "--out", str(tmp_path / "run")) == 1
    told = said(capsys)
    for message in messages:
        assert message in told
    assert not (tmp_path / "run").exists()


CUSTOM = '''
import gymnasium as gym, numpy as np
from gymnasium import spaces

class Corridor(gym.Env):
    """Walk right for `length` steps."""
    action_space = spaces.Discrete(2)
    def __init__(self, length=5, space="dict"):
        self.length = length
        seen = spaces.Box(0, 99, (1,), np.float32)
        text = spaces.Text(5)
        kinds = {"dict": spaces.Dict(at=seen, goal=seen), "text": text, "words": spaces.Dict(at=seen, said=text)}
        self.observation_space = kinds[space]
    def _seen(self):
        return {"at": np.array([self.at], np.float32), "goal": np.array([self.length], np.float32)}
    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.at = self.time = 0
        return self._seen(), {}
    def step(self, action):
        self.at, self.time = max(0, self.at + 2 * int(action) - 1), self.time + 1
        return self._seen(), -1.0, self.at == self.length, self.time == 20, {}

gym.register("Corridor-v0", Corridor)
'''


@pytest.fixture
def corridor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user's own module in the working directory."""
    (tmp_path / "my_corridor.py").write_text(CUSTOM)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    sys.modules.pop("my_corridor", None)
    gym.registry.pop("Corridor-v0", None)


def test_a_users_own_environment(corridor: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Dict observations, options, an environment that is named by its module."""
    assert unipo("run", "ppo", "my_corridor:Corridor-v0", *PPO, "--env.length", "3", "--out", "run") == 0
    policy = library.load_policy("run")
    assert policy.observation_size == 2
    env = gym.make("Corridor-v0", length=3)
    act = library.load_actor("run", env)
    assert act(env.reset(seed=0)[0]) in (0, 1)
    assert unipo("evaluate", "run", "--episodes", "2") == 0
    capsys.readouterr()
    for space, named in (("text", "Text(1, 5"), ("words", "because of Text")):
        assert unipo("run", "ppo", "my_corridor:Corridor-v0", *PPO, "--env.space", space, "--out", "never") == 1
        assert named in said(capsys)


@pytest.mark.parametrize(("method", "task"), [("dqn", "CartPole-v1"), ("sac", "Pendulum-v1"), ("ppo", "Pendulum-v1")])
def test_what_was_trained_loads_in_three_lines(method: str, task: str, tmp_path: Path) -> None:
    """The loaded policy does what the trained one did; in the units of the environment."""
    small = PPO if method == "ppo" else REPLAYED
    run = tmp_path / "run"
    assert unipo("run", method, task, *small, "--normalize-observations", "--out", str(run)) == 0
    env = gym.make(task)
    act = library.load_actor(run, env)
    observation = env.reset(seed=0)[0]
    assert env.action_space.contains(act(observation))
    policy = library.load_policy(run / "final")
    weights = load_file(run / "final" / "model.safetensors")
    mine = policy.state_dict() if isinstance(policy, ControlPolicy) else policy.critic.state_dict()
    assert weights.keys() == mine.keys()
    assert all(torch.equal(weights[k], mine[k]) for k in weights)
    assert "normaliser.mean" in weights
    with pytest.raises(ValueError, match=r"expects . numbers"):
        library.load_actor(run, gym.make("MountainCar-v0"))


@pytest.mark.parametrize("command", [("ppo", "CartPole-v1"), ("sac", "Pendulum-v1"), ("dqn", "CartPole-v1")])
def test_explain_looks_without_leaving_anything(
    command: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert unipo("explain", *command, "--record", "data", "--video") == 0
    told = said(capsys)
    assert "optimiser update(s) a step" in told
    assert "one real batch" in told
    assert list(tmp_path.iterdir()) == []


def test_resume_and_evaluate_say_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert unipo("evaluate", str(tmp_path)) == 1
    assert "is not a run" in said(capsys)
    assert unipo("run", "ppo", "CartPole-v1", *PPO, "--out", str(tmp_path / "run")) == 0
    (tmp_path / "run" / "final" / "config.json").unlink()
    assert unipo("evaluate", str(tmp_path / "run")) == 1
    assert "unipo resume" in said(capsys)
    assert unipo("resume", str(tmp_path / "run")) == 0
    assert unipo("evaluate", str(tmp_path / "run"), "--episodes", "0") == 1
    assert "expected at least 1" in said(capsys)


def test_compare_takes_presets_or_none_and_keeps_no_run_of_other_settings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["compare", "ppo,a2c", "CartPole-v1", "--seeds", "1", *PPO, "--out", str(tmp_path / "c")]
    assert unipo(*arguments) == 0
    assert "preset of" not in said(capsys)
    assert unipo(*arguments, "--num-envs", "4") == 1
    told = said(capsys)
    assert "holds a run with other settings (num_envs 2 instead of 4" in told
    assert "--out" in told
