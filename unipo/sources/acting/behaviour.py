"""A second policy that acts, and the memory that it and the target policy share.

PROPS and ROS (arXiv 2311.08290; Zhong et al. 2022): data that is collected by sampling the target policy has sampling error;
a behaviour policy that is pushed towards what the data lack makes the *data* look on-policy, though no action was drawn
from the target. This module says what is asked of such a policy; `unipo.training.adapted` does it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

from unipo.episodes import Episodes
from unipo.objectives import Objective

__all__ = ["Behaviour", "Recent"]


@dataclass(frozen=True, kw_only=True)
class Behaviour:
    """How the acting policy is made anew from the target policy, every `every` steps of each copy of the environment.

    It is set to the target, then trained on the newest batches by `objective`, in which `old` is the target: `epochs`
    passes of `minibatches` updates of Adam that starts over each time, so that nothing but target and data decide what it
    is. Passes end once the k3 estimate of KL(target || behaviour) on the data is above `stop`. `eps`: Adam's; at 1, and
    with gradients well below 1, its first step is a step along the gradient (ROS).
    """

    objective: Objective
    every: int = 16
    epochs: int = 16
    minibatches: int = 4
    learning_rate: float = 1e-3
    eps: float = 1e-8
    stop: float = math.inf

    def __post_init__(self) -> None:
        small = [name for name in ("every", "epochs", "minibatches") if getattr(self, name) < 1]
        if small:
            raise ValueError(f"a behaviour policy needs {', '.join(small)} of at least 1; for none, leave it out")
        if self.learning_rate < 0 or not self.stop > 0:
            raise ValueError(f"expected learning_rate >= 0 and stop > 0, found {self.learning_rate} and {self.stop}")


@dataclass
class Recent:
    """The newest `size` batches, the oldest first. Fragments stay cut where a batch ended."""

    size: int = 1
    batches: list[Episodes] = field(default_factory=list)

    def add(self, batch: Episodes) -> Episodes:
        """All that is remembered, `batch` among it, as one batch."""
        self.batches = [*self.batches, batch][-self.size :]
        return self.joined()

    def joined(self) -> Episodes:
        """Raises IndexError while nothing is remembered."""
        return self.batches[0] if len(self.batches) == 1 else Episodes.cat(self.batches)

    @property
    def newest(self) -> Episodes:
        return self.batches[-1]

    def save(self, folder: Path) -> None:
        for i, batch in enumerate(self.batches):
            batch.save(folder / f"recent-{i:03d}.parquet")

    def load(self, folder: Path) -> None:
        self.batches = [Episodes.load(path) for path in sorted(folder.glob("recent-*.parquet"))]
