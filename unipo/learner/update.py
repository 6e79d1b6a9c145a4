"""What one update did."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from unipo.episodes import Episodes
from unipo.learner.coefficients import Coefficients


@dataclass(frozen=True)
class Update:
    """What one update did: the coefficients, the signals [N] they belong to (NaN where a step was skipped), norms."""

    episodes: Episodes
    coefficients: Coefficients
    signals: Mapping[str, Tensor]
    tokens_computed: int
    grad_norm: float = 0.0
    learning_rate: float = 0.0
    passes: int = 1

    def means(self) -> Mapping[str, float]:
        """The mean of every signal, for controllers that turn a knob at every update."""
        return SignalMeans(self.signals)


@dataclass(frozen=True)
class SignalMeans(Mapping[str, float]):
    """Means of signals, computed when they are asked for: of `name`, or of member j alone as `name/j`."""

    signals: Mapping[str, Tensor]

    def __getitem__(self, key: str) -> float:
        name, _, member = key.partition("/")
        signal = self.signals[name]
        return float((signal[:, int(member)] if member else signal).mean())

    def __iter__(self) -> Iterator[str]:
        return iter(self.signals)

    def __len__(self) -> int:
        return len(self.signals)
