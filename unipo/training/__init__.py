"""The loop, the run directory, checkpoints, evaluation and progress."""

from unipo.training.build import build_run
from unipo.training.config import BaseConfig, ConfigError, ControlConfig, RunConfig, read_config
from unipo.training.loop import Interrupted, Run

__all__ = [
    "BaseConfig",
    "ConfigError",
    "ControlConfig",
    "Interrupted",
    "Run",
    "RunConfig",
    "build_run",
    "read_config",
]
