"""Several steps on one batch, for surrogates that stay near the policy by themselves."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class RepeatedSteps:
    """`steps` steps of Adam on the whole batch, at the learning rate and with the clipping of the run."""

    steps: int = 10

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"expected at least 1 step, found {self.steps}")
