"""Whole episodes of a fixed policy: returns, lengths, and a video of them."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from math import ceil
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium.wrappers import RecordVideo
from numpy.typing import NDArray
from torch import Tensor

from unipo.sources.acting.collector import Act
from unipo.sources.acting.environment_errors import TaskEnvironmentError
from unipo.sources.acting.environments import Environments
from unipo.sources.acting.remembering import Mode, act_in
from unipo.sources.keyed import keyed_generator

Array = NDArray[Any]
Make = Callable[..., gym.Env[Any, Any]]
"""Makes an environment; passes keyword arguments such as render_mode on to it."""
GIF_FRAMES_PER_SECOND = 20


@dataclass(frozen=True, slots=True)
class Evaluation:
    """`returns`, `lengths` [n]: of whole episodes (terminated, or ended by the environment's own time limit)."""

    returns: Array
    lengths: Array


def evaluate(act: Act | Mode, make: Make, episodes: int, seed: int, copies: int = 8, noise_size: int = 0) -> Evaluation:
    """`episodes` episodes, a function of (act, seed) alone; episode k is number k // copies of copy k % copies.

    The episodes are fixed beforehand: taking those that end first would favour short ones. `noise_size` as in Collector;
    a deterministic `act` ignores it.
    """
    copies = min(copies, episodes)
    environments = Environments(make, copies, seed)
    act = act_in(environments, act)
    rounds = ceil(episodes / copies)
    returns, lengths = np.zeros((rounds + 1, copies)), np.zeros((rounds + 1, copies), dtype=np.int64)
    everyone, wanted, step = np.arange(copies), -(-(episodes - np.arange(copies)) // copies), 0
    while (environments.episode_number < wanted).any():
        number = np.minimum(environments.episode_number, rounds)  # those that are done wait in the last row
        outcome = environments.step(act(*_given(environments, noise_size, step))[0].numpy())
        returns[number, everyone] += outcome.reward
        lengths[number, everyone] += 1
        step += 1
    environments.close()
    done = everyone[None, :] + copies * np.arange(rounds)[:, None] < episodes
    return Evaluation(returns[:rounds][done], lengths[:rounds][done])


def filmable(make: Make) -> None:
    """Raises TaskEnvironmentError, with the remedy, where `film` could not draw or write: so that no training is in vain."""
    if find_spec("moviepy") is None and find_spec("imageio") is None:
        raise TaskEnvironmentError('a video needs moviepy (MP4) or imageio (GIF): pip install "unipo[video]"')
    warnings.filterwarnings("ignore", module="glfw")
    try:
        env = make(render_mode="rgb_array")
        env.reset(seed=0)
        drawn: Any = env.render() if "rgb_array" in env.metadata.get("render_modes", []) else None
        env.close()
    except gym.error.DependencyNotInstalled as error:
        raise TaskEnvironmentError(f"the environment cannot be drawn: {error}") from error
    except TaskEnvironmentError:
        raise
    except Exception as error:
        raise TaskEnvironmentError(
            f"the environment cannot be filmed ({type(error).__name__}: {error}): expected a render_mode 'rgb_array'. MuJoCo "
            "without a screen needs MUJOCO_GL=egl or MUJOCO_GL=osmesa and that library; or leave out --video"
        ) from error
    if np.ndim(drawn) != 3:
        raise TaskEnvironmentError(
            f"{env} cannot be filmed: it has no render mode 'rgb_array' that draws [height, width, 3]"
        )


def film(act: Act | Mode, make: Make, folder: Path, seed: int, episodes: int = 1, noise_size: int = 0) -> list[Path]:
    """Videos of `episodes` episodes in `folder`: MP4 by Gymnasium's own wrapper where moviepy is installed, else GIF.

    Raises TaskEnvironmentError for an environment that cannot draw itself, and where neither package is installed.
    """
    filmable(make)
    folder.mkdir(parents=True, exist_ok=True)

    def recording() -> gym.Env[Any, Any]:
        env = make(render_mode="rgb_array")
        if find_spec("moviepy") is not None:
            return RecordVideo(env, str(folder), episode_trigger=lambda number: number < episodes, name_prefix="video")
        return GifRecorder(env, folder)

    environments, step = Environments(recording, 1, seed), 0
    act = act_in(environments, act)
    while environments.episode_number[0] < episodes:
        environments.step(act(*_given(environments, noise_size, step))[0].numpy())
        step += 1
    environments.close()
    return sorted(path for path in folder.iterdir() if path.suffix in (".mp4", ".gif"))


def _given(environments: Environments, noise_size: int, step: int) -> tuple[Tensor, Tensor]:
    generator = keyed_generator(environments.seed, "evaluation noise", step)
    noise = generator.standard_normal((environments.num, noise_size), dtype=np.float32)
    return torch.from_numpy(environments.observation), torch.from_numpy(noise)


class GifRecorder(gym.Wrapper[Any, Any, Any, Any]):
    """Writes every episode to `folder/video-episode-K.gif` while it happens, at about 20 frames per second."""

    def __init__(self, env: gym.Env[Any, Any], folder: Path) -> None:
        super().__init__(env)
        rate = float(env.metadata.get("render_fps", 30))
        self.folder, self.episode, self.every = folder, -1, max(1, round(rate / GIF_FRAMES_PER_SECOND))
        self.milliseconds = 1000 * self.every / rate
        self._writer: Any = None
        self._time = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        self._end()
        begun = self.env.reset(seed=seed, options=options)
        self.episode, self._time = self.episode + 1, 0
        return begun

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        if self._writer is None:
            path = self.folder / f"video-episode-{self.episode}.gif"
            self._writer = import_module("imageio.v2").get_writer(path, duration=self.milliseconds, loop=0)
            self._writer.append_data(self.env.render())
        outcome = self.env.step(action)
        self._time += 1
        if self._time % self.every == 0:
            self._writer.append_data(self.env.render())
        return outcome

    def close(self) -> None:
        self._end()
        super().close()

    def _end(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None
