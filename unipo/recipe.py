"""A method, as data: objective + sources + controllers.

A method is a function whose keyword arguments are its whole configuration and which returns a `Recipe`. Recipes add and
scale as their objectives do: `grpo() + 0.2 * sft() + 0.1 * dpo()` trains on rollouts, demonstrations and pairs at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from itertools import product
from typing import Any, Self

from unipo.objectives import (
    Category,
    FinalValue,
    Knob,
    Needs,
    Objective,
    Part,
    Rewarded,
    Rows,
    Sum,
    knobs_of,
    number,
    parts_of,
)
from unipo.sources.companions.companion import CompanionSpec
from unipo.sources.controllers import Controller
from unipo.sources.directions import Asking
from unipo.sources.spec import ControlSpec, RolloutSpec
from unipo.sources.stages.arrange import Arrange
from unipo.sources.stages.augment import Augment
from unipo.sources.text.two_stage import DescribeThenReason

KINDS = ("rollout", "demo", "pair", "label")
TEXT_SIGNALS = frozenset({"logp", "entropy", "collision", "value"})
"""What policies over text emit (with a value head); divergences between them have a colon in their name."""
TEXT_COLUMNS = frozenset(
    {"behavior_logp", "chosen", "draw", "kind", "prompt_id", "rating", "reward", "task", "truncated"}
)
"""What text data have; columns with the name of a policy in front of a signal of text are computed."""
REWARD_PART = "reward."
"""Begins the column of one of several rewards: reward.NAME."""


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """A copy of the policy that columns are asked of, such as `reference_logp`: of the start of the run, unless renewed.

    It is renewed at the steps `at` and every `every` steps (0: never), moving by `tau` towards the policy. With `lag` 1 it is
    so after the step's columns were computed: they then come from the policy of one renewal before. `beyond`: when it is
    renewed the policy itself first goes on by this share of its way since the renewal before, and the copy is of where it was
    without that (extrapolation; other snapshots that are renewed behind it copy the policy where it went).
    """

    every: int = 0
    at: tuple[int, ...] = ()
    tau: float = 1.0
    lag: int = 0
    beyond: float = 0.0

    def due(self, step: int) -> bool:
        """Whether it is renewed in `step` (0-based)."""
        return step in self.at or (self.every > 0 and step % self.every == 0 and (step > 0 or self.lag > 0))

    @property
    def moves(self) -> bool:
        return bool(self.every or self.at)


@dataclass(frozen=True, kw_only=True)
class Given:
    """Data that there is: `kinds` of rows, at least `group` rollouts per prompt, log-probs of who sampled where `logged`."""

    kinds: frozenset[str]
    group: int = 1
    logged: bool = True

    def but_unlogged(self) -> Given:
        return replace(self, logged=False)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The frozen parts of a method.

    `rollouts`: of text; `control`: of environments (None: the method is not for them). `policy_step`: an optimiser of the
    policy that takes the whole batch at once (`unipo.optimizers`); critics then train by the other terms. `epochs`: passes
    over each batch; `minibatches`: optimiser updates per pass (groups stay whole). `learning_rate`: multiplies the run's.
    `snapshots`: copies of the policy by name, beside the `reference` of the start. `companions`: models that are trained
    beside the policy (text). `round`: demonstrations that two models make before the first step (text). `arrange`: what is
    made of demonstrations, comparisons and labelled answers before that.
    `gradient_parts`: of so many parts of a batch the gradient is computed apart, and the variance of the whole (metric
    `gradient_noise`) estimated from them; 0: it is not.
    """

    objective: Objective
    rollouts: RolloutSpec = field(default_factory=RolloutSpec)
    control: ControlSpec | None = None
    policy_step: Any = None
    controllers: tuple[Controller, ...] = ()
    epochs: int | Knob = 1
    minibatches: int = 1
    learning_rate: float | Knob = 1.0
    snapshots: Mapping[str, Snapshot] = field(default_factory=dict)
    companions: tuple[CompanionSpec, ...] = ()
    round: DescribeThenReason | None = None
    arrange: tuple[Arrange, ...] = ()
    gradient_parts: int = 0

    def __post_init__(self) -> None:
        knobs = self.knobs
        idle = [c.knob for c in self.controllers if c.knob not in knobs]
        if idle:
            raise ValueError(f"controllers set {idle}, but the recipe has the knobs {sorted(knobs)}")

    @property
    def knobs(self) -> dict[str, float]:
        """Every knob of the objective, the rollouts, the run and of other controllers, with its default."""
        return knobs_of(self.objective) | knobs_of((self.epochs, self.learning_rate, self.rollouts, self.controllers))

    @property
    def needs(self) -> Needs:
        """Derived from the parts: columns, signals, group size."""
        return self.objective.needs

    @property
    def passes(self) -> int:
        """Epochs, where no controller has turned them."""
        return round(number(self.epochs))

    @property
    def tasks(self) -> frozenset[str]:
        """The tasks (values of the column `task`) whose rows its terms claim."""
        return frozenset(t for _, term in self.objective.terms() for t in _claimed_tasks(term.rows))

    @property
    def provided(self) -> frozenset[str]:
        """Columns that its own stages and companions add to batches of text."""
        beside = (*(c.columns for c in self.companions), *(stage.columns for stage in self.arrange))
        return self.rollouts.columns.union(*beside)

    @property
    def judges(self) -> str:
        """What a model says that it trains to judge: of "answers", or of "pairs"; "" where it trains none."""
        if not any(isinstance(part, FinalValue) for part in _within(self.objective)):
            return ""
        return next((stage.judges for stage in self.arrange if stage.judges != "answers"), "answers")

    @property
    def rewards(self) -> frozenset[str]:
        """Single rewards, of several, that it reads, by name."""
        read = {c.removeprefix(REWARD_PART) for c in self.needs.columns if c.startswith(REWARD_PART)}
        return self.rollouts.rewards | read

    @property
    def others(self) -> frozenset[str]:
        """Policies beside the trained one that a run must have, by name: columns or samples are asked of them, or momentum."""
        asked = {column.partition("_")[0] for column in self.needs.columns} & {"reference", *self.snapshots}
        return frozenset(asked | self.rollouts.players | {name for name, s in self.snapshots.items() if s.beyond})

    @property
    def for_text(self) -> bool:
        """Whether a policy over text can be trained by it: it asks for nothing that only environments have."""
        acting = self.control is not None and self.control.acts_apart
        return not self.unmade and self.policy_step is None and not acting

    @property
    def unmade(self) -> frozenset[str]:
        """Columns and signals that it asks for, and that neither text nor its own stages make."""
        signals = {s for s in self.needs.signals if ":" not in s and _plain(s) not in TEXT_SIGNALS}
        columns = {
            c for c in self.needs.columns if _plain(c.partition("_")[2].removeprefix("mismatched_")) not in TEXT_SIGNALS
        }
        known = TEXT_COLUMNS | self.provided | {c for c in columns if c.startswith(REWARD_PART)}
        return frozenset(signals | (columns - known))

    def suits(self, given: Given) -> bool:
        """Whether a run on text can train on that data, whatever else it asks for in its settings."""
        drawn = {"rollout", *(s.provides for s in self.rollouts.augment)} if self.samples else set[str]()
        logged = given.logged or "behavior_logp" not in self.needs.columns
        able = "rollout" in given.kinds or not self.samples
        return (
            self.for_text and able and logged and self.needs.group_size <= given.group
            and set(self.kinds) <= given.kinds | drawn
        )  # fmt: skip

    @property
    def samples(self) -> bool:
        """Whether rollouts are drawn for it: a term claims them, or a stage makes rows of them."""
        return "rollout" in self.kinds or bool(self.rollouts.augment)

    @property
    def given_kinds(self) -> frozenset[str]:
        """Kinds of rows that its terms claim without asking what they were rewarded: such as data have."""
        return frozenset(
            k for _, term in self.objective.terms() if not _asks_reward(term.rows) for k in kinds_of(term.rows)
        )

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of rows that the terms claim, of rollout, demo and pair."""
        found = {kind for _, term in self.objective.terms() for kind in kinds_of(term.rows)}
        return tuple(k for k in KINDS if k in found)

    def but(self, **changes: Any) -> Self:
        """The same with other parts: fields of the recipe, of its rollouts, or of the one part that has them."""
        own = {k: v for k, v in changes.items() if k in {f.name for f in fields(self)}}
        spec = {k: v for k, v in changes.items() if k in {f.name for f in fields(self.rollouts)} and k not in own}
        rest = {k: v for k, v in changes.items() if k not in own and k not in spec}
        if spec:
            own["rollouts"] = replace(own.get("rollouts", self.rollouts), **spec)
        made = replace(self, **own)
        if not rest:
            return made
        terms = made.objective.terms()
        homes = [i for i, (_, term) in enumerate(terms) if set(rest) <= {f.name for f in fields(term)}]
        if len(homes) == 1 and len(terms) > 1:
            total = [(c, t.but(**rest) if i == homes[0] else t) for i, (c, t) in enumerate(terms)]
            return replace(made, objective=made.objective.but(weighted=tuple(total)))
        return replace(made, objective=made.objective.but(**rest))

    def __add__(self, other: Recipe) -> Recipe:
        """Objectives add, controllers and stages join; all else is of the first recipe that draws rollouts.

        A stage that puts other rows in the place of rollouts keeps these where the other recipe claims them. Raises ValueError
        where both measure the same column in different ways.
        """
        lead, second = (self, other) if self.samples or not other.samples else (other, self)
        rollouts = lead.rollouts
        if rollouts.ask == Asking():
            rollouts = replace(rollouts, ask=second.rollouts.ask)
        if second.samples:
            own, more = _stages(lead, second), _stages(second, lead)
            _check_columns(own, more)
            rollouts = replace(rollouts, augment=(*own, *(stage for stage in more if stage not in own)))
        controllers = (*self.controllers, *(c for c in other.controllers if c not in self.controllers))
        joined = self.objective + other.objective
        snapshots = {**other.snapshots, **self.snapshots}
        moved = sorted(name for name, s in other.snapshots.items() if snapshots[name] != s)
        if moved:
            raise ValueError(
                f"both methods of the sum keep a copy of the policy called {', '.join(moved)}, renewed at other steps: give them "
                "the same settings"
            )
        companions = (*self.companions, *(c for c in other.companions if c not in self.companions))
        arrange = (*self.arrange, *(stage for stage in other.arrange if stage not in self.arrange))
        return replace(lead, objective=joined, controllers=controllers, snapshots=snapshots, companions=companions,
                       arrange=arrange, rollouts=rollouts, round=self.round or other.round)  # fmt: skip

    def __mul__(self, scale: float | Knob) -> Recipe:
        return replace(self, objective=self.objective * scale)

    __rmul__ = __mul__


def _within(part: Part) -> Iterator[Part]:
    """A part and everything in it."""
    yield part
    inner = (term for _, term in part.terms()) if isinstance(part, Sum) else parts_of(part)
    for inside in inner:
        yield from _within(inside)


def _plain(signal: str) -> str:
    """`value` of `value.NAME`, one of several values."""
    return "value" if signal.startswith("value.") else signal


def _claimed_tasks(rows: Rows | Part) -> set[str]:
    own = {rows.value} if isinstance(rows, Category) and rows.column == "task" else set()
    return own.union(*(_claimed_tasks(part) for part in parts_of(rows)))


def kinds_of(rows: Rows | Part) -> set[str]:
    """Kinds of rows that a claim can take."""
    if isinstance(rows, Category) and rows.column == "kind":
        return {rows.value}
    inner = [kinds_of(part) for part in parts_of(rows)]
    return set().union(*inner) if inner else (set(KINDS) if type(rows) is Rows else set())


def _asks_reward(rows: Rows | Part) -> bool:
    return isinstance(rows, Rewarded) or any(_asks_reward(part) for part in parts_of(rows))


def _stages(recipe: Recipe, other: Recipe) -> tuple[Augment, ...]:
    stages = recipe.rollouts.augment
    return tuple(stage.beside() for stage in stages) if "rollout" in other.kinds else stages


def _check_columns(own: tuple[Augment, ...], more: tuple[Augment, ...]) -> None:
    for a, b in product(own, more):
        shared = sorted(a.columns & b.columns)
        if a != b and shared:
            raise ValueError(
                f"both methods of the sum measure {', '.join(shared)}, in different ways: {a!r} and {b!r}. Give them the same "
                "settings, or take one of them"
            )
