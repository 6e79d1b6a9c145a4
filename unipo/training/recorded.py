"""Recorded data: in place of a collector, checked against the environment that the policy is measured in; and written."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import torch

from unipo.episodes import Episodes
from unipo.sources.acting.control_report import finite_episodes
from unipo.sources.acting.environments import ActionSpec, Environments
from unipo.sources.acting.recordings import MinariRecorder, load_recorded
from unipo.sources.spec import ControlSpec
from unipo.training.config import ConfigError, ControlConfig


def recorded_data(config: ControlConfig, spec: ControlSpec, environments: Environments) -> Episodes | None:
    """The episodes of `config.dataset`; None where there is none, and the run collects its own.

    Raises ConfigError for data that cannot be read or is of other spaces, for a method that has to act itself, and where
    a method for recorded data has none.
    """
    if not config.dataset:
        if spec.recorded:
            raise ConfigError(f"{config.method!r} learns from recorded data: give it some with --dataset")
        return None
    if not spec.off_policy:
        raise ConfigError(
            f"{config.method!r} learns from what it does itself, not from --dataset: take iql, td3-bc or sac"
        )
    try:
        episodes = load_recorded(config.dataset)
    except ValueError as error:
        raise ConfigError(f"--dataset cannot be used: {error}") from error
    size, shape = environments.observation_spec.size, _action_shape(environments.action_spec)
    found = (tuple(episodes["observation"].shape[1:]), tuple(episodes["action"].shape[1:]))
    if found != ((size,), shape):
        raise ConfigError(
            f"the data in {config.dataset} has observations of shape {found[0]} and actions of shape {found[1]}; "
            f"{config.task} has {(size,)} and {shape}"
        )
    _check_values(config, episodes, environments.action_spec)
    if spec.compared and not bool(episodes.category("kind", "pair").all()):
        raise ConfigError(
            f"{config.method!r} learns from pairs of segments, and {config.dataset} holds episodes: make pairs of them with "
            f"`unipo data segments {config.dataset} OUT --expert RUN`"
        )
    return episodes


def _check_values(config: ControlConfig, episodes: Episodes, actions: ActionSpec) -> None:
    """Raise ConfigError for numbers that would only break the run later, without saying why."""
    broken = len(episodes) - len(finite_episodes(episodes))
    if broken:
        raise ConfigError(
            f"{broken} of {len(episodes)} episodes in {config.dataset} have NaN or infinite numbers: "
            f"`unipo data check {config.dataset}` says where; leave them out"
        )
    if actions.kind == "box":
        if not episodes["action"].is_floating_point():
            raise ConfigError(f"the actions in {config.dataset} are integers; those of {config.task} are real numbers")
        return
    sizes = torch.tensor(actions.sizes).squeeze()
    if episodes["action"].is_floating_point() or bool(((episodes["action"] < 0) | (episodes["action"] >= sizes)).any()):
        raise ConfigError(
            f"the actions in {config.dataset} lie between {episodes['action'].min():g} and {episodes['action'].max():g}; "
            f"{config.task} has integers from 0 to below {sizes.tolist()}"
        )


def recorder(config: ControlConfig, make: Callable[[], gym.Env[Any, Any]]) -> MinariRecorder | None:
    """Who writes down what is collected, where `config.record` says so. Raises ConfigError for a folder that cannot be used."""
    if not config.record:
        return None
    try:
        return MinariRecorder(Path(config.record), make, config.method, run_name(config))
    except ValueError as error:
        raise ConfigError(f"--record cannot be used: {error}") from error


def run_name(config: ControlConfig) -> str:
    """A name for what the run collects: runs of the same settings collect the same, wherever they are."""
    free = ("out", "record", "video", "keep_checkpoints", "checkpoints", "memory_mapped", "tensorboard", "wandb")
    settings = {n: getattr(config, n) for n in ControlConfig.__dataclass_fields__ if n not in free}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()
    return f"{config.method}-{config.task}-s{config.seed}-{digest[:8]}"


def _action_shape(actions: ActionSpec) -> tuple[int, ...]:
    return () if actions.kind == "categorical" else (actions.size,)
