"""The command lines on the page make the same run again: they are read back by the command line itself."""

from __future__ import annotations

import dataclasses
import shlex
from typing import Any

import pytest
import yaml

from unipo.api import configure
from unipo.cli import words as command_line
from unipo.commands import command
from unipo.report.commands import full_command
from unipo.training import BaseConfig


def plain(config: BaseConfig) -> dict[str, Any]:
    return dict(yaml.safe_load(config.to_yaml()))


def parsed(line: str) -> dict[str, Any]:
    words = shlex.split(line)
    assert words[:2] == ["unipo", "run"]
    return plain(command_line.parsed("run", words[2:])[0])


RUNS: tuple[tuple[str, str, dict[str, Any], dict[str, Any]], ...] = (
    ("ppo", "CartPole-v1", {}, {}),
    ("ppo", "CartPole-v1", {}, {"total_timesteps": 5000, "hidden": (), "seed": 3, "normalize_observations": True}),
    ("ppo", "CartPole-v1", {"ppo": {"gamma": 0.98, "lam": 0.8, "clip": 0.1}}, {"num_envs": 2, "log_std_init": -2.0}),
    ("ppo", "CartPole-v1", {"ppo": {"gamma": 0.5}}, {"preset": False}),
    ("ppo", "Pendulum-v1", {}, {"env_options": {"g": 9.5, "render_mode": "rgb_array"}, "schedule": "linear"}),
    ("grpo+0.2*sft", "arithmetic", {"grpo": {"clip": 0.28}}, {"steps": 5, "stop": ("\n", "END"), "chat": True}),
)


@pytest.mark.parametrize(("method", "task", "options", "settings"), RUNS)
def test_commands_are_read_back(method: str, task: str, options: dict[str, Any], settings: dict[str, Any]) -> None:
    config = plain(configure(method, task, options, **settings)[0])
    for line in (command(config), full_command(config)):
        assert parsed(line) == config, line


def test_the_short_command_is_short() -> None:
    config = configure("ppo", "CartPole-v1", {}, total_timesteps=10000)[0]
    assert command(plain(config)) == "unipo run ppo CartPole-v1 --seed 0 --total-timesteps 10000"
    wider = dataclasses.replace(config, hidden=(32, 16), env_options={"sutton_barto_reward": True})  # type: ignore[call-arg]
    assert command(plain(wider)).endswith("--total-timesteps 10000 --hidden 32 16 --env.sutton-barto-reward True")
    bare = configure("ppo", "CartPole-v1", {}, preset=False)[0]
    assert command(plain(bare)) == "unipo run ppo CartPole-v1 --seed 0 --total-timesteps 100000 --no-preset"


def test_words_that_look_like_numbers_stay_words() -> None:
    config = {
        "method": "gone",
        "task": "my file.jsonl",
        "method_options": {"gone": {"a": "1", "b": "far", "c": None}},
        "seed": 1,
    }
    expected = "unipo run gone 'my file.jsonl' --seed 1 --gone.a ''\"'\"'1'\"'\"'' --gone.b far --gone.c None"
    assert command(config) == full_command(config) == expected
