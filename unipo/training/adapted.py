"""The behaviour policy at work: it acts, remembers what it did, and is made anew from target and data as it goes."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from unipo import functional as F
from unipo.episodes import Episodes
from unipo.learner import Learner, LearnerSettings, annotate
from unipo.learner.annotate import emitted
from unipo.sources.acting.behaviour import Behaviour
from unipo.sources.keyed import keyed_generator

BUDGET = 1 << 20


@dataclass
class Adapted:
    """Acts instead of `target`, with a policy of the same form that `spec` makes of it and of the newest `memory` steps
    of `copies` environments.

    A batch begins with `begin`; from there on everything follows from the target, the data and (seed, version): a run
    resumes exactly without saving anything of it. `divergence`: k3 of KL(target || behaviour) on the data, when last made.
    """

    spec: Behaviour
    target: Any
    memory: int
    seed: int
    copies: int = 1
    version: int = 0
    steps: int = 0
    divergence: float = 0.0
    _rows: list[tuple[Tensor, Tensor]] = field(default_factory=list, repr=False)

    def __post_init__(self) -> None:
        self.policy = copy.deepcopy(self.target)

    def begin(self, past: Sequence[Episodes], version: int) -> None:
        """A new batch, after those of `past` (environment by environment, the oldest first), by the target of `version`."""
        self.version, self.steps = version, 0
        self._rows = [(self._by_time(b["observation"]), self._by_time(b["action"])) for b in past]

    def _by_time(self, rows: Tensor) -> Tensor:
        return rows.unflatten(0, (self.copies, -1)).transpose(0, 1).flatten(0, 1)

    def act(self, observation: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Actions [n, ...] and their log-probs [n] under the behaviour policy, which is due to be made anew every so often."""
        if self.steps % self.spec.every == 0:
            self.adapt()
        action, logp = self.policy.act(observation, noise)
        self._rows.append((observation.clone(), action))
        self.steps += 1
        return action, logp

    def adapt(self) -> None:
        """phi <- theta, then epochs over the newest steps."""
        self.policy.load_state_dict(self.target.state_dict())
        self.divergence = 0.0
        if not self._rows:
            return
        data, settings = self._data(), self.spec
        learner = Learner({"policy": self.policy}, LearnerSettings(
            learning_rate=settings.learning_rate, betas=(0.9, 0.999), eps=settings.eps, clip_norm=float("inf"),
            token_budget=BUDGET))  # fmt: skip
        for epoch in range(settings.epochs):
            order = keyed_generator(self.seed, "behaviour", self.version, self.steps, epoch).permutation(len(data))
            for chunk in torch.from_numpy(order).tensor_split(min(settings.minibatches, len(data))):
                learner.update(data.select(chunk, "group"), settings.objective)
            self.divergence = self._divergence(data)
            if self.divergence > settings.stop:
                break

    def _data(self) -> Episodes:
        """The newest steps, one by one, with what the target says of them."""
        observation, action = (torch.cat(column)[-self.memory :] for column in zip(*self._rows, strict=True))
        self._rows = [(observation, action)]
        data = Episodes.flat(step={"observation": observation, "action": action}, kind="rollout")
        needs = self.spec.objective.needs
        return annotate(data, needs, {"old": self.target}, BUDGET)

    def _divergence(self, data: Episodes) -> float:
        logp = emitted(data, ["logp"], self.policy, BUDGET)["logp"]
        return float(F.k3(data["old_logp"] - logp).mean())
