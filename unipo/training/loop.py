"""The loop: draw a batch, annotate it, update, turn the knobs, write it down. It knows no method."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from unipo.episodes import Episodes
from unipo.learner import Learner, Player, annotate, ledger, summary
from unipo.learner.learner import Update
from unipo.objectives import Objective, with_settings
from unipo.policies import TokenPolicy
from unipo.recipe import Recipe
from unipo.sources.controllers import State
from unipo.sources.keyed import keyed_generator
from unipo.sources.mixer import Mixer
from unipo.sources.replay import Replay
from unipo.sources.rollouts import Rollouts
from unipo.training.checkpoint import (
    flatten_optimizer,
    load_latest,
    save_checkpoint,
    unflatten_optimizer,
)
from unipo.training.config import ConfigError, RunConfig
from unipo.training.evaluate import Evaluation, evaluate
from unipo.training.progress import Progress
from unipo.training.records import Records
from unipo.training.trackers import Tracker, trackers

GUARD_STEPS = 5
"""A term that has given no gradient for so many steps from the start is reported."""


class Interrupted(Exception):
    """The run was asked to stop (Ctrl-C or SIGTERM) and has saved itself."""


@dataclass
class Run:
    """A run with everything it is made of. `train()` takes it from where it stands to `config.steps`."""

    config: RunConfig
    folder: Path
    recipe: Recipe
    policy: TokenPolicy
    references: Mapping[str, Player]
    learner: Learner
    mixer: Mixer
    rollouts: Rollouts | None
    replay: Replay | None
    held_out: Evaluator
    records: Records
    progress: Progress
    fingerprint: str
    step: int = 0
    seconds: float = 0.0
    tokens_trained: int = 0
    controllers: dict[str, State] = field(default_factory=dict)
    silent: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.controllers = self.controllers or {c.knob: c.start() for c in self.recipe.controllers}
        self._stop_asked = False
        self._trackers: list[Tracker] = []
        self._started = time.perf_counter() - self.seconds

    # ---- the loop ----------------------------------------------------------------------------------------------------
    def train(self) -> Run:
        """Make the remaining steps. Raises Interrupted after saving when asked to stop; the folder is then resumable."""
        self._trackers = trackers(self.config, self.step)
        with self._stoppable(), self.progress, closing_all(self._trackers):
            self._started = time.perf_counter() - self.seconds
            if self.step == 0:
                self.save()
                self._measure(0, {"step": 0})
            while self.step < self.config.steps:
                self.advance()
                if self.step % self.config.checkpoint_every == 0 or self.step == self.config.steps or self._stop_asked:
                    self.save()
                if self._stop_asked and self.step < self.config.steps:
                    raise Interrupted(f"stopped and saved at step {self.step}; go on with: unipo resume {self.folder}")
        return self

    def advance(self) -> dict[str, float]:
        """One step: batch, updates, controllers, metrics."""
        version = self.learner.updates
        settings = {c.knob: c.setting(self.controllers[c.knob], self.step) for c in self.recipe.controllers}
        objective = with_settings(self.recipe.objective, settings)
        batch = self.mixer.draw(self.step, version)
        policies = {**self.references, "old": self.policy}
        batch = annotate(batch, self.recipe.needs, policies, self.config.token_budget)
        updates = [self.learner.update(part, objective) for part in self._minibatches(batch)]
        self.step += 1
        self._remember(batch)
        metrics = self._metrics(batch, updates, objective, version, settings)
        for controller in self.recipe.controllers:
            state = self.controllers[controller.knob]
            self.controllers[controller.knob] = controller.observe(state, metrics)
        every = self.config.eval_every
        due = self.step == self.config.steps or (every > 0 and self.step % every == 0)
        return self._measure(self.step, metrics, due)

    def _minibatches(self, batch: Episodes) -> Iterator[Episodes]:
        """Groups stay whole; the order is keyed by (seed, step, epoch). One minibatch is the batch itself, unshuffled."""
        parts = self.recipe.minibatches
        for epoch in range(self.recipe.epochs):
            if parts <= 1:
                yield batch
                continue
            order = keyed_generator(self.config.seed, "minibatch", self.step, epoch).permutation(batch.count("group"))
            for chunk in torch.from_numpy(order).tensor_split(min(parts, batch.count("group"))):
                yield batch.select(chunk, "group")

    def _remember(self, batch: Episodes) -> None:
        if self.rollouts is None:
            return
        fresh = batch.select(batch.category("source", "fresh"))
        if self.replay is not None:
            self.replay.add(_logged(fresh))
        if self.config.save_episodes and len(fresh):
            _logged(fresh).save(self.folder / "episodes" / f"step_{self.step:06d}.parquet")

    # ---- measuring -----------------------------------------------------------------------------------------------------
    def _metrics(self, batch: Episodes, updates: list[Update], objective: Objective, version: int,
                 settings: Mapping[str, float]) -> dict[str, float]:  # fmt: skip
        first, last = updates[0], updates[-1]
        self.tokens_trained += sum(u.episodes.count("step") for u in updates)
        metrics = {**summary(last), **ledger(first, version), **{f"knob/{k}": v for k, v in settings.items()}}
        metrics["kl"] = summary(last).get("kl", float("nan"))
        if self.rollouts is not None:
            metrics.update(self.rollouts.metrics)
            metrics.update({f"dropped/{k}": float(v) for k, v in self.rollouts.dropped.items() if v})
        metrics["passes"] = float(first.passes)
        self._guard(first)
        if self.step == 1:
            self.progress.terms(metrics, [t.title for t in first.coefficients.terms])
        self._samples(batch)
        return metrics

    def _measure(self, step: int, metrics: Mapping[str, float], due: bool = True) -> dict[str, float]:
        """Evaluate where due, and write the step's row."""
        self.seconds = time.perf_counter() - self._started
        sampled = self.rollouts.tokens_sampled if self.rollouts else 0
        row = {"step": step, "seconds": self.seconds, "reward": float("nan"), "accuracy": float("nan"), **metrics,
               "tokens_sampled": float(sampled), "tokens_trained": float(self.tokens_trained)}  # fmt: skip
        if due and self.held_out.prompts:
            found = self.held_out(self.policy)
            row.update(found.metrics())
            self.records.samples({"step": step, "source": "held_out", "truncated": False, **e} for e in found.examples)
        self.records.add(row)
        self.records.flush()
        for tracker in self._trackers:
            tracker.add(row)
        self.progress.step(row)
        return row

    def _samples(self, batch: Episodes, n: int = 4) -> None:
        """Write the first rows of each source for people to read."""
        if self.step % max(1, self.config.eval_every or 25) not in (0, 1):
            return
        for name in batch.column("source").names:
            rows = batch.category("source", name).nonzero().squeeze(1)[:n]
            self.records.samples(self.describe(batch.select(rows)))

    def describe(self, episodes: Episodes) -> Iterator[dict[str, Any]]:
        """Readable rows: prompt and completion text, reward, source, truncated."""
        source, prompt = episodes.column("source"), episodes.context("score")
        for i in range(len(episodes)):
            steps, turn = episodes.step_index(torch.tensor([i])), prompt.take(torch.tensor([i]))
            reward = float(episodes["reward"][i]) if "reward" in episodes else float("nan")
            yield {
                "step": self.step,
                "prompt": self.policy.tokenizer.decode(turn.values.tolist()),
                "completion": self.policy.tokenizer.decode(episodes["token"][steps].tolist()),
                "reward": None if reward != reward else reward,
                "source": source.names[int(source.values[i])],
                "truncated": bool(episodes["truncated"][i]) if "truncated" in episodes else False,
            }

    def _guard(self, update: Update) -> None:
        """The dead-term guard: a term without any gradient from the start is reported, with what it waited for."""
        for term in update.coefficients.terms:
            alive = any(bool((g != 0).any()) for g in term.gradient.values())
            self.silent[term.title] = (
                -1 if alive else self.silent.get(term.title, 0) + (self.silent.get(term.title, 0) >= 0)
            )
            if self.silent[term.title] == GUARD_STEPS and term.coefficient != 0:
                self.warn(
                    f"term {term.title!r} gave no gradient in the first {GUARD_STEPS} steps: its groups may all have equal "
                    "rewards (are the prompts too hard or too easy?), or no row in the batch is of the kind it claims"
                )

    def warn(self, message: str) -> None:
        self.records.event(self.step, "warning", message)
        self.progress.note(message)

    # ---- saving --------------------------------------------------------------------------------------------------------
    def save(self) -> Path:
        """An atomic checkpoint of everything that the rest of the run depends on."""
        learned = self.learner.state_dict()
        tensors, groups = flatten_optimizer(learned["optimizer"])
        weights: dict[str, Tensor] = {f"policy/{n}": p for n, p in self.policy.named_parameters() if p.requires_grad}
        state = {
            "optimizer": groups, "updates": learned["updates"], "seconds": self.seconds,
            "tokens_trained": self.tokens_trained, "controllers": self.controllers, "silent": self.silent,
            "sources": self.mixer.state_dict(), "fingerprint": self.fingerprint,
        }  # fmt: skip
        replayed = self.replay.save if self.replay is not None else (lambda folder: None)
        return save_checkpoint(self.folder / "checkpoints", self.step, state, {**weights, **tensors}, replayed,
                               self.config.keep_checkpoints)  # fmt: skip

    def restore(self, check: bool = True) -> None:
        """Go back to the newest whole checkpoint; without one the run starts over.

        Raises ConfigError when `check` and the checkpoint was made by other code or another configuration.
        """
        found = load_latest(self.folder / "checkpoints", lambda m: self.warn(m))
        if found is None:
            self.records.rewind(-1)
            return
        state = found.state
        if check and state["fingerprint"] != self.fingerprint:
            raise ConfigError(
                f"the run was made by other code, another configuration or other --threads than now ({found.folder.name} has "
                f"fingerprint {state['fingerprint']}, now {self.fingerprint}): the result would be neither run's. Restore "
                "that version, or pass --changed-code to go on from the checkpoint all the same."
            )
        self._load(found.state, found.tensors, found.folder)

    def _load(self, state: Mapping[str, Any], tensors: Mapping[str, Tensor], folder: Path) -> None:
        with torch.no_grad():
            for name, parameter in self.policy.named_parameters():
                if parameter.requires_grad:
                    parameter.copy_(tensors[f"policy/{name}"])
        optimizer = unflatten_optimizer(tensors, state["optimizer"])
        self.learner.load_state_dict({"optimizer": optimizer, "updates": state["updates"]})
        self.mixer.load_state_dict(state["sources"])
        if self.replay is not None:
            self.replay.load(folder)
        self.controllers, self.silent = dict(state["controllers"]), dict(state["silent"])
        self.step, self.seconds, self.tokens_trained = state["step"], state["seconds"], state["tokens_trained"]
        self.records.rewind(self.step)
        if self.step == 0:
            self.records.rewind(-1)

    @contextmanager
    def _stoppable(self) -> Iterator[None]:
        """Ctrl-C and SIGTERM finish the step, save, and stop; a second Ctrl-C stops at once."""

        def ask(number: int, frame: FrameType | None) -> None:
            if self._stop_asked:
                raise KeyboardInterrupt
            self._stop_asked = True
            self.progress.note("stopping after this step (once more to stop at once)")

        try:
            before = {s: signal.signal(s, ask) for s in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:  # not in the main thread: nobody can press Ctrl-C here
            before = {}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


@contextmanager
def closing_all(open_trackers: list[Tracker]) -> Iterator[None]:
    """Close trackers however the run ends."""
    try:
        yield
    finally:
        for tracker in open_trackers:
            tracker.close()


@dataclass
class Evaluator:
    """Held-out prompts with the sampler and reward that score them."""

    prompts: list[Any]
    sampler: Any
    reward: Any
    seed: int
    samples: int

    def __call__(self, policy: TokenPolicy) -> Evaluation:
        return evaluate(self.prompts, self.sampler, policy.tokenizer, self.reward, self.seed, self.samples)


def _logged(episodes: Episodes) -> Episodes:
    """What is kept of fresh rollouts: facts, without the mix they were drawn into or numbers computed for one update."""
    derived = [
        n
        for n in episodes.columns
        if n.split("_")[0] in ("old", "reference", "teacher") and n.endswith(("logp", "value"))
    ]
    return episodes.without("source", "sampling_weight", *derived)
