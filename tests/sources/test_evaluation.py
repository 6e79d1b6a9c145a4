"""Evaluation: whole episodes, fixed beforehand; videos."""

from __future__ import annotations

from functools import partial
from typing import Any

import gymnasium as gym
import imageio.v2 as imageio
import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import Tensor

from unipo.sources.acting.environment_errors import TaskEnvironmentError
from unipo.sources.acting.environments import make_environment
from unipo.sources.acting.evaluation import evaluate, film


class Dice(gym.Env[Any, Any]):
    """An episode lasts as many steps as its seed says, 1 to 6; every step pays what it was told, plus 1."""

    observation_space, action_space = spaces.Box(0, 9, (1,)), spaces.Discrete(2)
    metadata = {"render_modes": ["rgb_array"], "render_fps": 40}

    def __init__(self, render_mode: str | None = None) -> None:
        self.render_mode, self.left = render_mode, 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.left = int(self.np_random.integers(1, 7))
        return np.array([self.left], np.float32), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.left -= 1
        return np.array([self.left], np.float32), float(action) + 1, self.left == 0, False, {}

    def render(self) -> Any:
        return np.full((8, 8, 3), 40 * self.left, dtype=np.uint8)


def ones(observation: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    return torch.ones(len(observation), dtype=torch.long), torch.zeros(len(observation))


def test_episodes_are_whole_and_fixed_beforehand() -> None:
    few = evaluate(ones, Dice, 40, seed=1, copies=7)
    assert few.lengths.shape == (40,)
    assert few.returns.tolist() == (2 * few.lengths).tolist()
    assert set(few.lengths.tolist()) == {1, 2, 3, 4, 5, 6}
    many = evaluate(ones, Dice, 1200, seed=1, copies=7)
    assert many.lengths[:40].tolist() == few.lengths.tolist()
    assert many.lengths.mean() == pytest.approx(3.5, abs=0.2)  # short episodes are not favoured
    assert evaluate(ones, Dice, 3, seed=1).lengths.shape == (3,)
    assert evaluate(ones, Dice, 40, seed=2, copies=7).lengths.tolist() != few.lengths.tolist()


def test_noise_is_given_when_asked_for() -> None:
    seen = []

    def act(observation: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        seen.append(noise.shape)
        return ones(observation, noise)

    evaluate(act, Dice, 2, seed=0, noise_size=3)
    assert set(seen) == {(2, 3)}


def test_a_gif_of_every_episode(tmp_path, monkeypatch) -> None:
    """40 frames per second are halved; the first frame is the reset."""
    monkeypatch.setattr("unipo.sources.acting.evaluation.find_spec", lambda name: None if name == "moviepy" else name)
    paths = film(ones, Dice, tmp_path, seed=3, episodes=2)
    assert [p.name for p in paths] == ["video-episode-0.gif", "video-episode-1.gif"]
    lengths = evaluate(ones, Dice, 2, seed=3, copies=1).lengths
    for path, length in zip(paths, lengths, strict=True):
        frames = imageio.mimread(path)
        assert len(frames) == 1 + length // 2
        assert frames[0][0, 0, 0] == 40 * length


def test_environments_that_cannot_be_filmed(tmp_path) -> None:
    class Blind(Dice):
        metadata: dict[str, Any] = {"render_modes": []}

    with pytest.raises(TaskEnvironmentError, match="cannot be filmed"):
        film(ones, Blind, tmp_path, seed=0)


def test_missing_packages_are_named(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("unipo.sources.acting.evaluation.find_spec", lambda name: None)
    with pytest.raises(TaskEnvironmentError, match=r"unipo\[video\]"):
        film(ones, Dice, tmp_path, seed=0)


def test_cartpole_is_filmed(tmp_path) -> None:
    (path,) = film(ones, partial(make_environment, "CartPole-v1"), tmp_path, seed=0)
    assert path.stat().st_size > 0
