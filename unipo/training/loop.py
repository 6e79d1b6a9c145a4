"""The loop: draw a batch, annotate it, update, turn the knobs, write it down. It knows no method, and no kind of data."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from unipo.episodes import Episodes
from unipo.learner import Learner, Player, annotate, ledger, summary
from unipo.learner.learner import Update
from unipo.objectives import Needs, Objective, hoisted, knobs_of, number, with_settings
from unipo.recipe import Recipe
from unipo.sources.acting.environment_errors import EnvironmentFailure
from unipo.sources.controllers import Controller, State
from unipo.sources.keyed import keyed_generator
from unipo.sources.spec import RolloutSpec
from unipo.training.checkpoint import (
    flatten_optimizer,
    load_latest,
    save_checkpoint,
    unflatten_optimizer,
)
from unipo.training.config import BaseConfig, ConfigError
from unipo.training.progress import Progress
from unipo.training.records import Records
from unipo.training.trackers import Tracker, trackers

FLUSH_SECONDS = 2.0
"""`metrics.parquet` is written anew at most so often (and at the end)."""
GUARD_STEPS = 5
"""A term that has given no gradient for so many steps from the start is reported."""


class Interrupted(Exception):
    """The run was asked to stop (Ctrl-C or SIGTERM) and has saved itself."""


class PolicyStep(Protocol):
    """A step of the policy on the whole batch by an optimiser of its own, such as a trust region."""

    facts: dict[str, float]

    def __call__(self, batch: Episodes, objective: Objective) -> tuple[Objective, Update]:
        """Take the policy's terms of the objective; returns the rest of it and what was done. `facts` then say more."""

    def deployed(self) -> AbstractContextManager[None]:
        """While it lasts, the policy is what is evaluated and kept, where that is not what acts."""

    def state_dict(self) -> dict[str, Tensor]: ...

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None: ...


class Data(Protocol):
    """Where the batches of a run come from, and how its policy is measured: prompts and files, or environments.

    `needs`: columns that it asks the annotator for, beside the recipe's. `unit`: what minibatches are drawn of, "group" or
    "step" (parts that look along episodes are then evaluated before: `hoisted`).
    """

    needs: Needs
    unit: str

    def batches(self, step: int, version: int) -> Iterator[Episodes]:
        """The batches of a step, one after the other; each is trained on before the next is drawn."""

    def turn(self, rollouts: RolloutSpec) -> None:
        """What the recipe asks of rollouts from now on, with the knobs as they stand; called where it has any."""

    @property
    def batches_per_step(self) -> int:
        """How many batches a step has, once training has begun."""

    def minibatches(self, batch: Episodes, asked: int) -> int:
        """Into how many minibatches a batch is divided, `asked` by the recipe."""

    def learned(self, batch: Episodes, step: int) -> None:
        """The batch of a step has been trained on: remember it, write it down."""

    def updated(self, update: Update) -> None:
        """`update` was made: what depends on it, such as priorities, is told."""

    def metrics(self) -> dict[str, float]:
        """What the step just made says of the data."""

    def samples(self, batch: Episodes, step: int) -> Iterator[dict[str, Any]]:
        """Readable rows of a batch."""

    def evaluate(self, step: int) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """Held-out metrics and readable examples; empty where there is nothing to evaluate on."""

    def state_dict(self) -> dict[str, Any]:
        """Numbers for the checkpoint."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...

    def save(self, folder: Path) -> None:
        """Files for the checkpoint."""

    def load(self, folder: Path) -> None: ...

    def describe(self) -> Iterator[str]:
        """What a step draws, in words."""

    def close(self) -> None: ...


@dataclass
class Run:
    """A run with everything it is made of. `train()` takes it from where it stands to `config.steps`.

    `policy`: what is trained, evaluated and saved. `annotators`: who computes the columns `<who>_<signal>`. `modules`:
    what is checkpointed besides the policy's parameters: critics, targets, statistics.
    """

    config: BaseConfig
    folder: Path
    recipe: Recipe
    policy: Any
    annotators: Mapping[str, Player]
    learner: Learner
    data: Data
    records: Records
    progress: Progress
    fingerprint: str
    modules: Mapping[str, nn.Module] = field(default_factory=dict)
    policy_step: PolicyStep | None = None
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
        """Make the remaining steps. Raises Interrupted when asked to stop and EnvironmentFailure, both after saving: the
        folder is then resumable."""
        self._trackers = trackers(self.config, self.step)
        with self._stoppable(), self.progress, closing_all(self._trackers), self._saving():
            self._started = time.perf_counter() - self.seconds
            if self.step == 0:
                self.save()
                self._measure(0, {"step": 0})
            while self.step < self.config.steps:
                self.advance()
                if self.config.checkpoint_due(self.step) or self._stop_asked:
                    self.save()
                if self._stop_asked and self.step < self.config.steps:
                    raise Interrupted(f"stopped and saved at step {self.step}; go on with: unipo resume {self.folder}")
        return self

    def advance(self) -> dict[str, float]:
        """One step: batches, updates, controllers, metrics."""
        version, first, last, batch = self.learner.updates, None, None, None
        settings = self.settings()
        if knobs_of(self.recipe.rollouts):
            self.data.turn(with_settings(self.recipe.rollouts, settings))
        self._renew(lag=0)
        for drawn in self.data.batches(self.step, version):
            batch = drawn if self.learner.prepare is not None else self._annotated(drawn)
            self._renew(lag=1)
            for update in self._updates(batch):
                first, last = _fuller(first, update), update
        self.step += 1
        if batch is not None:
            self.data.learned(batch, self.step)
        metrics = {f"knob/{k}": v for k, v in settings.items()} | self._metrics(batch, first, last, version)
        for controller in self.recipe.controllers:
            if not controller.every_update:
                self._turn(controller, metrics, settings)
        return self._measure(self.step, metrics, self.config.evaluation_due(self.step))

    def _renew(self, lag: int) -> None:
        """Move the copies of the policy whose turn it is."""
        for name, snapshot in self.recipe.snapshots.items():
            if snapshot.lag == lag and snapshot.due(self.step) and name in self.annotators:
                renew(self.annotators[name], self.policy, snapshot.tau, snapshot.beyond)

    def draw(self) -> Episodes:
        """The first batch that the data has to give now, annotated: to look at, not to train on."""
        return self._annotated(next(self.data.batches(self.step, self.learner.updates)))

    def _annotated(self, batch: Episodes) -> Episodes:
        return annotate(batch, self.recipe.needs | self.data.needs, self.annotators, self.config.token_budget)

    def settings(self) -> dict[str, float]:
        """The knobs now."""
        step = self.step
        return {c.knob: c.setting(self.controllers[c.knob], step) for c in self.recipe.controllers}

    def objective(self) -> Objective:
        """The recipe's objective with the knobs as they stand now."""
        return with_settings(self.recipe.objective, self.settings())

    def _updates(self, batch: Episodes) -> Iterator[Update]:
        """Train on one batch: epochs of minibatches."""
        objective, settings = self.recipe.objective, self.settings()
        self.learner.rate_scale = number(with_settings((self.recipe.learning_rate,), settings)[0])
        if self.policy_step is not None:
            objective, update = self.policy_step(batch, self.objective())
            yield update
        for objective_now, part in self._minibatches(batch, objective):
            update = self.learner.update(part, objective_now, settings)
            self.data.updated(update)
            self.tokens_trained += part.count("step")
            for controller in self.recipe.controllers:
                if controller.every_update:
                    self._turn(controller, update.means(), settings)
            yield update

    def _minibatches(self, batch: Episodes, objective: Objective) -> Iterator[tuple[Objective, Episodes]]:
        """Groups (or steps) stay whole; the order is keyed by (seed, step, epoch). One minibatch is the batch, unshuffled."""
        parts = self.data.minibatches(batch, self.recipe.minibatches)
        epochs = round(number(with_settings((self.recipe.epochs,), self.settings())[0]))
        if epochs * parts > 1 and self.data.unit == "step":
            objective, batch = hoisted(objective, batch, self.settings())
            batch = batch.as_steps()
        for epoch in range(epochs):
            if parts <= 1:
                yield objective, batch
                continue
            order = keyed_generator(self.config.seed, "minibatch", self.step, epoch).permutation(batch.count("group"))
            for part in batch.minibatches(torch.from_numpy(order), min(parts, batch.count("group"))):
                yield objective, part

    def deployed(self) -> AbstractContextManager[None]:
        """While it lasts, the policy is the one to evaluate and to keep."""
        return nullcontext() if self.policy_step is None else self.policy_step.deployed()

    def _turn(self, controller: Controller, metrics: Mapping[str, float], settings: Mapping[str, float]) -> None:
        """Let a controller observe, with its own knobs (which others turn) as they were in the step."""
        state = self.controllers[controller.knob]
        self.controllers[controller.knob] = with_settings(controller, settings).observe(state, metrics)

    # ---- measuring -----------------------------------------------------------------------------------------------------
    def _metrics(self, batch: Episodes | None, first: Update | None, last: Update | None,
                 version: int) -> dict[str, float]:  # fmt: skip
        metrics: dict[str, float] = {}
        if first is not None and last is not None and batch is not None:
            metrics.update({"kl": float("nan"), **summary(last), **ledger(first, version)})
            metrics["passes"] = float(first.passes)
            self._guard(first)
            self._samples(batch)
        if self.policy_step is not None:
            metrics.update({f"policy_step/{k}": v for k, v in self.policy_step.facts.items()})
        metrics.update(self.data.metrics())
        if self.step == 1 and first is not None:
            self.progress.terms(metrics, [t.title for t in first.coefficients.terms])
        return metrics

    def _measure(self, step: int, metrics: Mapping[str, float], due: bool = True) -> dict[str, float]:
        """Evaluate where due, and write the step's row."""
        self.seconds = time.perf_counter() - self._started
        row = {"step": step, "seconds": self.seconds, "reward": float("nan"), "accuracy": float("nan"),
               "tokens_sampled": 0.0, **metrics, "tokens_trained": float(self.tokens_trained)}  # fmt: skip
        if due:
            with self.deployed():
                found, examples = self.data.evaluate(step)
            row.update(found)
            self.records.samples({"step": step, "source": "held_out", "truncated": False, **e} for e in examples)
        self.records.add(row)
        self.records.flush(every=FLUSH_SECONDS)
        for tracker in self._trackers:
            tracker.add(row)
        self.progress.step(row)
        return row

    def _samples(self, batch: Episodes) -> None:
        """Write the first rows of each source for people to read."""
        if self.step == 1 or self.config.evaluation_due(self.step):
            self.records.samples(self.data.samples(batch, self.step))

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
        self.records.flush()
        learned = self.learner.state_dict()
        tensors, groups = flatten_optimizer(learned["optimizer"])
        weights: dict[str, Tensor] = {f"policy/{n}": p for n, p in self.policy.named_parameters() if p.requires_grad}
        weights |= {f"{m}/{n}": t for m, n, t in _states(self.modules)}
        if self.policy_step is not None:
            weights |= {f"policy_step/{n}": t for n, t in self.policy_step.state_dict().items()}
        state = {
            "optimizer": groups, "updates": learned["updates"], "seconds": self.seconds,
            "tokens_trained": self.tokens_trained, "controllers": self.controllers, "silent": self.silent,
            "sources": self.data.state_dict(), "fingerprint": self.fingerprint,
        }  # fmt: skip
        return save_checkpoint(self.folder / "checkpoints", self.step, state, {**weights, **tensors}, self.data.save,
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
        for name, key, tensor in _states(self.modules):
            tensor.copy_(tensors[f"{name}/{key}"])
        if self.policy_step is not None:
            self.policy_step.load_state_dict(_under(tensors, "policy_step"))
        optimizer = unflatten_optimizer(tensors, state["optimizer"])
        self.learner.load_state_dict({"optimizer": optimizer, "updates": state["updates"]})
        self.data.load_state_dict(state["sources"])
        self.data.load(folder)
        self.controllers, self.silent = dict(state["controllers"]), dict(state["silent"])
        self.step, self.seconds, self.tokens_trained = state["step"], state["seconds"], state["tokens_trained"]
        self.records.rewind(self.step)
        if self.step == 0:
            self.records.rewind(-1)

    @contextmanager
    def _saving(self) -> Iterator[None]:
        """A run whose environment fails saves what it was before, and says so."""
        try:
            yield
        except EnvironmentFailure as failed:
            self.save()
            self.records.event(self.step, "error", str(failed))
            raise failed.with_remedy(
                f"The run is saved as it was before that, at step {self.step}; then go on: unipo resume {self.folder}"
            ) from failed

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


@torch.no_grad()
def follow(copy: Any, policy: Any, tau: float = 1.0) -> None:
    """Move the parameters of a copy by `tau` towards the policy's; 1 makes them equal."""
    for mine, theirs in zip(copy.parameters(), policy.parameters(), strict=True):
        mine.lerp_(theirs, tau) if tau < 1.0 else mine.copy_(theirs)


@torch.no_grad()
def renew(copy: Any, policy: Any, tau: float, beyond: float) -> None:
    """Move a snapshot by `tau` towards the policy; `beyond`: the policy goes on by that share of the way between the two."""
    if not beyond:
        follow(copy, policy, tau)
        return
    for mine, theirs in zip(copy.parameters(), policy.parameters(), strict=True):
        here, before = theirs.clone(), mine.clone()
        theirs.lerp_(before, -beyond)
        mine.lerp_(here, tau)


def _fuller(first: Update | None, update: Update) -> Update:
    """The update that the ledger reads: the first of a step in which most terms have their turn."""
    return first if first is not None and first.terms >= update.terms else update


@contextmanager
def closing_all(open_trackers: list[Tracker]) -> Iterator[None]:
    """Close trackers however the run ends."""
    try:
        yield
    finally:
        for tracker in open_trackers:
            tracker.close()


def _states(modules: Mapping[str, nn.Module]) -> Iterator[tuple[str, str, Tensor]]:
    """(module, name, tensor) of every parameter and buffer, once: what two modules share belongs to the first."""
    seen: set[int] = set()
    for name, module in modules.items():
        for key, tensor in module.state_dict().items():
            if tensor.data_ptr() not in seen:
                seen.add(tensor.data_ptr())
                yield name, key, tensor


def _under(tensors: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """The tensors whose name starts with `name/`, without it."""
    return {k.partition("/")[2]: v for k, v in tensors.items() if k.startswith(f"{name}/")}
