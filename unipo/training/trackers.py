"""Where metrics go besides the run directory: TensorBoard by default, Weights & Biases by flag."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from unipo.training.config import BaseConfig, ConfigError


class Tracker(Protocol):
    """Receives the row of each step; `close` at the end."""

    def add(self, row: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Scalars in `folder/tensorboard`; what a killed run wrote after `step` is hidden when it is resumed."""

    def __init__(self, folder: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(folder / "tensorboard"), purge_step=step)

    def add(self, row: Mapping[str, float]) -> None:
        for name, value in row.items():
            if name != "step" and math.isfinite(value):
                self._writer.add_scalar(name, value, int(row["step"]))

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """One W&B run per run directory, continued on resume."""

    def __init__(self, config: BaseConfig) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ConfigError("--wandb needs the package: pip install 'unipo[wandb]'") from error
        self._run: Any = wandb.init(project=config.wandb, id=config.folder.name, resume="allow", dir=str(config.folder))

    def add(self, row: Mapping[str, float]) -> None:
        self._run.log({k: v for k, v in row.items() if math.isfinite(v)}, step=int(row["step"]))

    def close(self) -> None:
        self._run.finish()


def trackers(config: BaseConfig, step: int) -> list[Tracker]:
    """What the configuration asks for."""
    found: list[Tracker] = []
    if config.tensorboard:
        found.append(TensorBoard(config.folder, step))
    if config.wandb:
        found.append(WeightsAndBiases(config))
    return found
