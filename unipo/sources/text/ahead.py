"""Acting while learning: rollouts are drawn some steps before they are trained on, in a thread of their own.

The batch of step k is sampled with the weights of step max(0, k - steps), whichever side is faster: a run is a function of
its configuration, can be resumed, and its rollouts are never older than that.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from unipo.episodes import Episodes
from unipo.sources.spec import RolloutSpec
from unipo.sources.text.arms import Arms
from unipo.sources.text.rollouts import Rollouts


class Weights(Protocol):
    """A policy whose parameters can be copied."""

    def state_dict(self) -> dict[str, Tensor]: ...

    def load_state_dict(self, state: Mapping[str, Tensor]) -> Any: ...


@dataclass(frozen=True, slots=True)
class Made:
    """A batch, and what `Rollouts` said of itself when it had been drawn."""

    batch: Episodes
    metrics: dict[str, float] = field(default_factory=dict)
    tokens_sampled: int = 0
    dropped: Counter[str] = field(default_factory=Counter)


class Ahead:
    """`rollouts`, which sample from `actor`, a copy of `policy`, `steps` steps ahead of a run of `last` steps.

    It stands where `Rollouts` stands; its metrics are of the batch that was drawn last. While a batch is being sampled
    nothing of `rollouts` may be touched from outside.
    """

    def __init__(self, rollouts: Rollouts, actor: Weights, policy: Weights, steps: int, last: int) -> None:
        if steps < 1:
            raise ValueError(f"steps is {steps}: rollouts are sampled at least one step ahead")
        self._rollouts, self._actor, self._policy, self._steps, self._last = rollouts, actor, policy, steps, last
        self._worker = ThreadPoolExecutor(1, "actor")
        self._pending: dict[int, Future[Made]] = {}
        self._next = 0
        self._said = Made(Episodes.build([]), tokens_sampled=rollouts.tokens_sampled)
        self.spec = rollouts.spec

    # ---- a source ----------------------------------------------------------------------------------------------------
    def draw(self, step: int, version: int) -> Episodes:
        """The batch of `step`; the sampling of later ones begins with the weights as they are now."""
        due = [s for s in range(self._next, step + self._steps + 1) if s < self._last or s == step]
        due += [step] if step not in self._pending and step not in due else []
        if due:
            weights = {name: value.detach().clone() for name, value in self._policy.state_dict().items()}
            for s in due:
                self._pending[s] = self._worker.submit(self._drawn, weights, s, version, self.spec)
            self._next = max(self._next, *(s + 1 for s in due))
        self._said = self._pending.pop(step).result()
        return self._said.batch

    def _drawn(self, weights: Mapping[str, Tensor], step: int, version: int, spec: RolloutSpec) -> Made:
        with torch.no_grad():
            self._actor.load_state_dict(weights)
        source = self._rollouts
        source.spec = spec
        batch = source.draw(step, version)
        return Made(batch, dict(source.metrics), source.tokens_sampled, Counter(source.dropped))

    def between(self, call: Callable[[], Any]) -> None:
        """Have `call`, which touches the rollouts, made between two draws: before those that are asked for later."""
        self._worker.submit(call)

    @property
    def arms(self) -> Arms | None:
        """Prompts are not drawn by what was learned: that is not known yet when they are."""
        return None

    # ---- what rollouts say of themselves -----------------------------------------------------------------------------
    @property
    def metrics(self) -> dict[str, float]:
        return self._said.metrics

    @property
    def tokens_sampled(self) -> int:
        return self._said.tokens_sampled

    @property
    def dropped(self) -> Counter[str]:
        return self._said.dropped

    # ---- checkpoints -------------------------------------------------------------------------------------------------
    def state_dict(self) -> dict[str, Any]:
        """Waits for what is being sampled."""
        ahead = {
            str(step): {
                "metrics": found.metrics,
                "tokens_sampled": found.tokens_sampled,
                "dropped": dict(found.dropped),
            }
            for step, found in self._settled().items()
        }
        return {**self._rollouts.state_dict(), "next": self._next, "ahead": ahead}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._rollouts.load_state_dict(state)
        self._next, self._pending = int(state["next"]), {}
        self._said = replace(self._said, tokens_sampled=self._rollouts.tokens_sampled)
        for step, said in state["ahead"].items():
            self._pending[int(step)] = ready = Future[Made]()
            ready.set_result(Made(self._said.batch, said["metrics"], said["tokens_sampled"], Counter(said["dropped"])))

    def save(self, folder: Path) -> None:
        for step, found in self._settled().items():
            found.batch.save(folder / f"ahead_{step}.parquet")
        self._rollouts.save(folder)

    def load(self, folder: Path) -> None:
        for step, found in self._settled().items():
            self._pending[step] = ready = Future[Made]()
            ready.set_result(replace(found, batch=Episodes.load(folder / f"ahead_{step}.parquet")))
        self._rollouts.load(folder)

    def _settled(self) -> dict[int, Made]:
        return {step: future.result() for step, future in sorted(self._pending.items())}

    def close(self) -> None:
        self._worker.shutdown(wait=True, cancel_futures=True)
