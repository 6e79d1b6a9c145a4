"""The loop, the run directory, checkpoints, evaluation and progress."""

from unipo.training.build import build_run
from unipo.training.config import ConfigError, RunConfig
from unipo.training.loop import Interrupted, Run

__all__ = ["ConfigError", "Interrupted", "Run", "RunConfig", "build_run"]
