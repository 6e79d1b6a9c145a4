"""What one update did."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from unipo.episodes import Episodes
from unipo.learner.coefficients import Coefficients


@dataclass(frozen=True)
class Update:
    """What one update did: the coefficients, the signals [N] they belong to (NaN where a step was skipped), norms.

    `gradient_noise`: the variance of the gradient, where it was measured.
    """

    episodes: Episodes
    coefficients: Coefficients
    signals: Mapping[str, Tensor]
    tokens_computed: int
    grad_norm: float = 0.0
    learning_rate: float = 0.0
    passes: int = 1
    gradient_noise: float = math.nan

    @property
    def terms(self) -> int:
        """How many terms of the objective were in it."""
        return len(self.coefficients.terms)

    def fact(self, name: str) -> Tensor:
        """A per-step fact [N] over all terms: NaN where no term that states it claims the step; the last such term counts."""
        found = torch.full((self.episodes.count("step"),), torch.nan, device=self.episodes.device)
        for term in self.coefficients.terms:
            if name in term.facts:
                fact = term.facts[name].to(found)
                found = torch.where(fact.isnan(), found, fact)
        return found

    def means(self) -> Mapping[str, float]:
        """The mean of every signal, for controllers that turn a knob at every update."""
        return SignalMeans(self.signals)


class LazyUpdate(Update):
    """An update whose parts are put together when somebody asks for them: of many of a step only a few are looked at."""

    def __init__(self, terms: int, whole: Callable[[], Update]) -> None:
        vars(self).update(_terms=terms, _whole=whole)

    @property
    def terms(self) -> int:
        return int(vars(self)["_terms"])

    def __getattribute__(self, name: str) -> Any:
        if name in PARTS and name not in vars(self):
            vars(self).update(vars(vars(self)["_whole"]()))
        return super().__getattribute__(name)


PARTS = frozenset(f.name for f in fields(Update))


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
