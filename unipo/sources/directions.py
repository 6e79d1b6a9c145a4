"""Which way several rewards are to be followed, said in the prompt: one policy for every direction."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from unipo.episodes import Episodes
from unipo.sources.keyed import keyed_generator
from unipo.sources.prompts import Prompt
from unipo.sources.stages.augment import Augment, Drawn
from unipo.sources.text.encode import Message

WEIGHTS = "direction"
"""The column of prompts with their direction's weights."""


@dataclass(frozen=True)
class Asking:
    """What a prompt becomes before it is answered, a function of (prompt, seed, step); `held_out` for evaluations.

    This one leaves it as it is.
    """

    def __call__(self, prompt: Prompt, seed: int, step: int) -> Prompt:
        return prompt

    def held_out(self, prompt: Prompt) -> Prompt:
        return prompt


@dataclass(frozen=True)
class Directed(Asking):
    """Directional preference alignment (arXiv 2402.18571): v = (cos a, sin a), written as integers round(100 v).

    `names`: of the two rewards. The angle a in degrees is uniform in [low, high], or one of `angles`; a prompt that is met
    twice in a step has one direction. A chat begins with the paper's system message; a plain text with "[W1,W2] ".
    `shown`: the angle of evaluations.
    """

    names: tuple[str, str] = ("helpfulness", "verbosity")
    low: float = -45.0
    high: float = 0.0
    angles: tuple[float, ...] = ()
    shown: float = 0.0

    def __call__(self, prompt: Prompt, seed: int, step: int) -> Prompt:
        drawn = keyed_generator(seed, "direction", step, prompt.id)
        if self.angles:
            return self.at(prompt, self.angles[int(drawn.integers(len(self.angles)))])
        return self.at(prompt, float(drawn.uniform(self.low, self.high)))

    def held_out(self, prompt: Prompt) -> Prompt:
        return self.at(prompt, self.shown)

    def at(self, prompt: Prompt, angle: float) -> Prompt:
        """The prompt with a direction, and its weights (the integers / 100) in the column `direction`."""
        whole = weights_at(angle)
        weights = tuple(w / 100 for w in whole)
        return replace(prompt, text=self.written(prompt, whole), columns={**prompt.columns, WEIGHTS: weights})

    def written(self, prompt: Prompt, weights: tuple[int, int]) -> str | Sequence[Message]:
        """The prompt's text with the weights."""
        if isinstance(prompt.text, str):
            return f"[{weights[0]},{weights[1]}] {prompt.text}"
        rating = " + ".join(f"{name}*{w}" for name, w in zip(self.names, weights, strict=True))
        said = f"You are a helpful assistant. Your response should maximize weighted rating = {rating}."
        return [{"role": "system", "content": said}, *prompt.text]


def weights_at(angle: float) -> tuple[int, int]:
    """(round(100 cos a), round(100 sin a)), `angle` in degrees; `math.atan2` of them is within half a degree of it."""
    a = math.radians(angle)
    return round(100 * math.cos(a)), round(100 * math.sin(a))


@dataclass(frozen=True)
class Along(Augment):
    """The reward of each answer becomes v . (scale r): its prompt's direction along the rewards `names`, each times its scale.

    A reward that does not apply to an answer (NaN) adds nothing.
    """

    filtered: ClassVar[bool] = False

    names: tuple[str, ...] = ("helpfulness", "verbosity")
    scales: tuple[float, ...] = (1.0, 1.0)

    @property
    def rewards(self) -> frozenset[str]:
        return frozenset(self.names)

    def __call__(self, groups: Episodes, drawn: Drawn) -> Episodes:
        asked: Sequence[Sequence[float]] = [prompt.columns[WEIGHTS] for prompt in drawn.prompt_of(groups)]
        weights = torch.tensor(asked, dtype=torch.float64)[groups.index("group", "episode")]
        each = torch.stack(
            [s * groups[f"reward.{n}"].double() for n, s in zip(self.names, self.scales, strict=True)], 1
        )
        return groups.with_columns("episode", reward=(weights * each).nansum(1))
