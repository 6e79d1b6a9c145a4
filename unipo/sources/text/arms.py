"""Prompts in arms (categories), of which those are drawn more often that teach more now: a bandit over the data."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unipo.episodes import Episodes
from unipo.sources.keyed import keyed_generator
from unipo.sources.prompts import Prompt, Prompts

Numbers = NDArray[np.float64]


# ---- how likely each arm is, from its value ----------------------------------------------------------------------------
def boltzmann(values: Numbers, temperature: float) -> Numbers:
    """softmax(Q / temperature): a constant added to every value changes nothing; uniform at an infinite temperature."""
    size = np.exp((values - values.max()) / temperature)
    return size / size.sum()


def proportional(values: Numbers) -> Numbers:
    """Q / sum Q, negative values as 0; uniform where all are 0."""
    held = values.clip(min=0.0)
    return held / held.sum() if held.sum() > 0 else np.full(len(values), 1 / len(values))


def epsilon_greedy(values: Numbers, epsilon: float) -> Numbers:
    """The best arms alike, or with probability `epsilon` any arm."""
    best = values == values.max()
    return (1 - epsilon) * best / best.sum() + epsilon / len(values)


# ---- what an arm is paid -----------------------------------------------------------------------------------------------
def _absolute_advantage(episodes: Episodes, advantage: Tensor) -> Tensor:
    return episodes.reduce(torch.nan_to_num(advantage).abs(), how="mean")


def _absolute_distance(episodes: Episodes, advantage: Tensor) -> Tensor:
    reward = torch.nan_to_num(episodes["reward"])
    mean = episodes.reduce(reward, to="group", how="mean", level="episode")
    return (reward - mean[episodes.index("group", "episode")]).abs()


def _reward(episodes: Episodes, advantage: Tensor) -> Tensor:
    return torch.nan_to_num(episodes["reward"])


SIGNALS: Mapping[str, Callable[[Episodes, Tensor], Tensor]] = {
    "advantage": _absolute_advantage, "unnormalised": _absolute_distance, "progress": _reward,
}  # fmt: skip
"""By name: a number per episode [E], averaged over those of an arm. Of "progress" it is the change since the arm's last."""
UNSAMPLED = ("decay", "keep")


@dataclass(frozen=True, kw_only=True)
class ArmChoice:
    """How prompts are drawn from arms (SEC, arXiv 2505.14970): Q <- (1 - rate) Q + rate * r of each arm after every step.

    `by`: what makes an arm: the levels of an embedded task, or the joint values of these columns of a dataset
    ("difficulty,type"). `rule`: softmax (at `temperature`), proportional, or greedy (but for a share `epsilon`).
    `signal`: r is the mean over its rollouts of the mean |advantage| of their tokens ("advantage"), of |R - group mean|
    ("unnormalised"), or the change of the mean reward ("progress"). `unsampled`: an arm that had no rollouts is paid 0
    ("decay"), or keeps its value ("keep").
    """

    by: str = "category"
    rate: float = 0.5
    rule: str = "softmax"
    temperature: float = 1.0
    epsilon: float = 0.1
    signal: str = "advantage"
    unsampled: str = "decay"

    def __post_init__(self) -> None:
        options = {"rule": RULES, "signal": SIGNALS, "unsampled": UNSAMPLED}
        for name, known in options.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {getattr(self, name)!r}: expected one of {', '.join(known)}")
        if not 0.0 <= self.rate <= 1.0 or not self.temperature > 0.0 or not 0.0 <= self.epsilon <= 1.0:
            raise ValueError(
                f"rate is {self.rate}, temperature {self.temperature}, epsilon {self.epsilon}: expected 0 to 1, above 0, 0 to 1"
            )

    def probabilities(self, values: Numbers) -> Numbers:
        """How likely each arm is to be drawn from, by its value [arms]."""
        return RULES[self.rule](values, self)


RULES: Mapping[str, Callable[[Numbers, ArmChoice], Numbers]] = {
    "softmax": lambda values, choice: boltzmann(values, choice.temperature),
    "proportional": lambda values, choice: proportional(values),
    "greedy": lambda values, choice: epsilon_greedy(values, choice.epsilon),
}


class Arms:
    """Prompts of several arms by name. Its state: the value of each arm, and how many prompts were taken from it.

    `take` draws prompts; `observe` is told of every update that was made of their rollouts, `settle` of the step's end.
    """

    def __init__(self, arms: Mapping[str, Prompts], choice: ArmChoice, seed: int) -> None:
        if not arms:
            raise ValueError("there are no arms to draw prompts from: expected at least one")
        self.names, self.prompts = tuple(arms), tuple(arms.values())
        self.choice, self.seed = choice, seed
        self.values = np.zeros(len(arms))
        self.taken = [0] * len(arms)
        self.last = np.full(len(arms), np.nan)
        self._total, self._count = np.zeros(len(arms)), np.zeros(len(arms))

    @property
    def probabilities(self) -> Numbers:
        """[arms] of the next draw."""
        return self.choice.probabilities(self.values)

    def take(self, n: int, position: int) -> list[Prompt]:
        """`n` prompts, the arm of each drawn on its own (keyed by `position`, how many came before), the prompts of an arm in
        turn. Their column `arm` says where they are from."""
        bounds = self.probabilities.cumsum()
        drawn = keyed_generator(self.seed, "arms", position).random(n) * bounds[-1]
        found: list[Prompt] = []
        for arm in np.searchsorted(bounds, drawn, side="right").tolist():
            prompt = self.prompts[arm][self.taken[arm]]
            self.taken[arm] += 1
            found.append(replace(prompt, columns={**prompt.columns, "arm": self.names[arm]}))
        return found

    def observe(self, episodes: Episodes, advantage: Tensor) -> None:
        """Add the rollouts of an update, with the `advantage` [N] that moved them (NaN: no term claimed the step)."""
        if "arm" not in episodes:
            return
        paid = SIGNALS[self.choice.signal](episodes, advantage)
        acted = episodes.category("kind", "rollout")
        for arm, name in enumerate(self.names):
            own = acted & episodes.category("arm", name)
            self._total[arm] += float(paid[own].double().sum())
            self._count[arm] += int(own.sum())

    def settle(self) -> None:
        """Move the values by what was observed since the last call; nothing observed at all changes nothing."""
        seen = self._count > 0
        if not seen.any():
            return
        mean = self._total / np.where(seen, self._count, 1.0)
        paid = np.where(np.isnan(self.last), 0.0, mean - self.last) if self.choice.signal == "progress" else mean
        moved = (1 - self.choice.rate) * self.values + self.choice.rate * np.where(seen, paid, 0.0)
        self.values = moved if self.choice.unsampled == "decay" else np.where(seen, moved, self.values)
        self.last = np.where(seen, mean, self.last)
        self._total, self._count = np.zeros_like(self._total), np.zeros_like(self._count)

    def metrics(self) -> dict[str, float]:
        """Value and probability of each arm."""
        found = zip(self.names, self.values.tolist(), self.probabilities.tolist(), strict=True)
        return {k: v for name, q, p in found for k, v in ((f"arm/{name}/value", q), (f"arm/{name}/probability", p))}

    def state_dict(self) -> dict[str, Any]:
        """At the end of a step, when nothing is waiting to be settled."""
        last = [None if np.isnan(x) else x for x in self.last.tolist()]
        return {"names": list(self.names), "values": self.values.tolist(), "taken": list(self.taken), "last": last}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises ValueError where the arms are not those of the checkpoint."""
        if tuple(state["names"]) != self.names:
            raise ValueError(
                f"the checkpoint has the arms {state['names']}, the run {list(self.names)}: the data changed"
            )
        self.values, self.taken = np.array(state["values"], dtype=np.float64), list(map(int, state["taken"]))
        self.last = np.array([np.nan if x is None else x for x in state["last"]], dtype=np.float64)


def by_columns(rows: Sequence[Prompt], by: str) -> dict[str, list[Prompt]]:
    """Prompts by the joint values of the columns `by` (comma-separated), in order of name.

    Raises ValueError naming the columns that there are, where one is missing.
    """
    columns, found = [c.strip() for c in by.split(",")], dict[str, list[Prompt]]()
    for row in rows:
        missing = [c for c in columns if row.columns.get(c) is None]
        if missing:
            raise ValueError(
                f"prompts are drawn by the column {missing[0]!r}, which prompt {str(row.text)[:50]!r} has not: it has "
                f"{', '.join(sorted(row.columns)) or 'no columns'}. Name the columns that make a category, or add one"
            )
        found.setdefault(" ".join(str(row.columns[c]) for c in columns), []).append(row)
    return dict(sorted(found.items()))
