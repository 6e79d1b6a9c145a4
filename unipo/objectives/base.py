"""The algebra of objectives: parts, rows, terms, sums, knobs, and what they need.

An objective is a pure function `(episodes, signals) -> loss` over the whole batch, written as in its paper and built from
exchangeable parts. A *part* is a frozen record that is called like a function; parts nest, so what an objective needs is
derived by walking them and never listed by hand, and a kin objective is `objective.but(advantage=...)`. Objectives add
with `+` and scale with `*`.

Each term claims rows (`rows`) and sees only those, with the steps under `mask=False` already taken out: nothing below can
average over a row that it does not own, or touch a NaN that belongs to somebody else.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import cache, cached_property
from operator import is_
from typing import Any, ClassVar, Self, TypeVar

import torch
from torch import Tensor

from unipo.episodes import Episodes

Signals = Mapping[str, Tensor]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Needs:
    """What must be there: `columns` of the data, differentiable `signals`, and at least `group_size` rows per group.

    A column `<who>_<signal>` with who = reference, old or teacher is computed by the learner where the data lacks it.
    """

    columns: frozenset[str] = frozenset()
    signals: frozenset[str] = frozenset()
    group_size: int = 1

    def __or__(self, other: Needs) -> Needs:
        size = max(self.group_size, other.group_size)
        return Needs(self.columns | other.columns, self.signals | other.signals, size)

    @classmethod
    def of(cls, *, columns: str = "", signals: str = "", group_size: int = 1) -> Needs:
        """`Needs.of(columns="reward behavior_logp", signals="logp")`."""
        return cls(frozenset(columns.split()), frozenset(signals.split()), group_size)


NOTHING = Needs()


@dataclass(frozen=True, slots=True)
class Knob:
    """A number that a controller turns during the run; `default` is the setting without one.

    Arithmetic with numbers stays a knob: `1 - mu` is `Knob("mu", ..., scale=-1, shift=1)`.
    """

    name: str
    default: float
    scale: float = 1.0
    shift: float = 0.0

    def at(self, setting: float) -> float:
        """The number at a setting: shift + scale * setting."""
        return self.shift + self.scale * setting

    def __mul__(self, factor: float) -> Knob:
        if not isinstance(factor, int | float):
            return NotImplemented
        return replace(self, scale=self.scale * factor, shift=self.shift * factor)

    __rmul__ = __mul__

    def __add__(self, term: float) -> Knob:
        return replace(self, shift=self.shift + term)

    __radd__ = __add__

    def __rsub__(self, term: float) -> Knob:
        return self * -1.0 + term


@dataclass(frozen=True)
class Part:
    """A frozen record that is a function `(episodes, signals) -> Tensor`; its fields are its whole configuration.

    A subclass must define `__call__` and may define `own_needs`; it must not keep state or read anything else. Shapes: a
    part that fills an advantage, weight or mask slot returns one number per step [N] of the episodes that it is given.
    `along_episodes`: its numbers depend on which steps are of one episode, so that it needs whole ones.
    """

    along_episodes: ClassVar[bool] = False

    def __call__(self, episodes: Episodes, signals: Signals) -> Tensor:
        raise TypeError(f"{type(self).__name__} is abstract: define __call__(episodes, signals)")

    def own_needs(self) -> Needs:
        """What this part itself reads, its fields apart."""
        return NOTHING

    @cached_property
    def needs(self) -> Needs:
        """What this part and all parts in it read."""
        needs = self.own_needs()
        for part in parts_of(self):
            needs = needs | part.needs
        return needs

    @cached_property
    def knobs(self) -> dict[str, float]:
        """Every knob in it, with its default."""
        return knobs_of(self)

    def but(self, **changes: Any) -> Self:
        """The same with other parts: in this record where it has such fields, else in the one part inside that has them."""
        return _but(self, changes)

    def __repr__(self) -> str:
        shown = (f"{f.name}={getattr(self, f.name)!r}" for f in fields(self) if f.repr)
        return f"{type(self).__name__}({', '.join(shown)})"


def parts_of(record: Any) -> Iterator[Part]:
    """The parts directly inside a record (also inside its tuples)."""
    for f in fields(record):
        value = getattr(record, f.name)
        for item in value if isinstance(value, tuple) else (value,):
            if isinstance(item, Part):
                yield item


def knobs_of(record: Any) -> dict[str, float]:
    """Every knob in a tree of records with its default."""
    if isinstance(record, Knob):
        return {record.name: record.default}
    if isinstance(record, tuple):
        return {k: v for item in record for k, v in knobs_of(item).items()}
    if is_dataclass(record) and not isinstance(record, type):
        return {k: v for f in fields(record) for k, v in knobs_of(getattr(record, f.name)).items()}
    return {}


def with_settings(record: T, settings: Mapping[str, float]) -> T:
    """The same tree of records with every knob replaced by its setting (its default where none is given)."""
    return _turn(record, settings)


def _turn(value: Any, settings: Mapping[str, float]) -> Any:
    if isinstance(value, Knob):
        return value.at(settings.get(value.name, value.default))
    if isinstance(value, tuple):
        items = tuple(_turn(item, settings) for item in value)
        return value if all(map(is_, items, value)) else items
    if is_dataclass(value) and not isinstance(value, type):
        now = {name: getattr(value, name) for name in _settable(type(value))}
        turned = {name: new for name, old in now.items() if (new := _turn(old, settings)) is not old}
        return replace(value, **turned) if turned else value
    return value


@cache
def _settable(record: type) -> tuple[str, ...]:
    """Names of the fields of a record's class."""
    return tuple(f.name for f in fields(record) if f.init)


def _but(record: T, changes: Mapping[str, Any]) -> T:
    own = {f.name for f in fields(record) if f.init}  # type: ignore[arg-type]
    if set(changes) <= own:
        return replace(record, **changes)  # type: ignore[type-var]
    homes = [path for path in _paths(record) if set(changes) <= {f.name for f in fields(_at(record, path))}]
    if len(homes) != 1:
        found = "no part has" if not homes else f"{len(homes)} parts have"
        raise TypeError(f"{found} the fields {sorted(changes)} in {record!r}; name fields of exactly one part")
    return _put(record, homes[0], replace(_at(record, homes[0]), **changes))


def _paths(record: Any) -> Iterator[tuple[str | int, ...]]:
    """Paths of the outermost records below `record`."""
    for f in fields(record):
        value = getattr(record, f.name)
        items = [((f.name, i), v) for i, v in enumerate(value)] if isinstance(value, tuple) else [((f.name,), value)]
        for path, item in items:
            if is_dataclass(item) and not isinstance(item, type):
                yield path
                yield from ((*path, *rest) for rest in _paths(item))


def _at(record: Any, path: tuple[str | int, ...]) -> Any:
    for step in path:
        record = record[step] if isinstance(step, int) else getattr(record, step)
    return record


def _put(record: Any, path: tuple[str | int, ...], value: Any) -> Any:
    if not path:
        return value
    head, rest = path[0], path[1:]
    if isinstance(head, int):
        return (*record[:head], _put(record[head], rest, value), *record[head + 1 :])
    return replace(record, **{head: _put(getattr(record, head), rest, value)})


# ---- rows ----------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, repr=False)
class Rows(Part):
    """Which episodes a term claims: bool [E] of the whole batch. This one claims all; `&` narrows, `|` widens."""

    def __call__(self, episodes: Episodes, signals: Signals | None = None) -> Tensor:
        return torch.ones(len(episodes), dtype=torch.bool, device=episodes.device)

    def __and__(self, other: Rows) -> Rows:
        return Both(self, other)

    def __or__(self, other: Rows) -> Rows:
        return Either(self, other)


@dataclass(frozen=True, repr=False)
class Category(Rows):
    """Episodes whose categorical `column` is `value`."""

    value: str
    column: str = "kind"

    def __call__(self, episodes: Episodes, signals: Signals | None = None) -> Tensor:
        return episodes.category(self.column, self.value)

    def __repr__(self) -> str:
        return f"{self.column}={self.value}"

    def own_needs(self) -> Needs:
        return Needs.of(columns=self.column)


@dataclass(frozen=True, repr=False)
class Both(Rows):
    """Episodes that two claims agree on."""

    left: Rows
    right: Rows

    def __repr__(self) -> str:
        return f"{self.left!r} & {self.right!r}"

    def __call__(self, episodes: Episodes, signals: Signals | None = None) -> Tensor:
        return self.left(episodes) & self.right(episodes)


@dataclass(frozen=True, repr=False)
class Either(Rows):
    """Episodes of one claim or the other."""

    left: Rows
    right: Rows

    def __repr__(self) -> str:
        return f"({self.left!r} | {self.right!r})"

    def __call__(self, episodes: Episodes, signals: Signals | None = None) -> Tensor:
        return self.left(episodes) | self.right(episodes)


@dataclass(frozen=True, repr=False)
class Rewarded(Rows):
    """Episodes whose reward is known."""

    def __call__(self, episodes: Episodes, signals: Signals | None = None) -> Tensor:
        return ~episodes["reward"].isnan()

    def __repr__(self) -> str:
        return "rewarded"

    def own_needs(self) -> Needs:
        return Needs.of(columns="reward")


everything = Rows()
rollouts = Category("rollout")
demonstrations = Category("demo")
pairs = Category("pair")
"""Answers to one prompt that were compared, each group a comparison: two, or a list (columns `chosen`, `rating`)."""
labels = Category("label")
"""Answers that were judged on their own (column `chosen`)."""
own_pairs = pairs & Rewarded()
"""Pairs that a stage made of rollouts."""
answers = (rollouts | demonstrations) & Rewarded()
"""Whoever wrote them: rollouts, and demonstrations that were judged as rollouts are."""


# ---- objectives ----------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Loss:
    """A scalar `value`, and per-step `facts` [N] of the whole batch (NaN on rows not claimed) for the ledger."""

    value: Tensor
    facts: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, repr=False)
class Objective(Part):
    """A term: it claims `rows` and is a function of them alone.

    A subclass defines `evaluate(episodes, signals)` over its own rows: the scalar loss and per-step facts. `linear` says
    that the coefficients dL/dsignal do not depend on the signals' current values, so that one pass is enough. `every`: the
    term is in every so many updates only (a delayed actor).
    """

    rows: Rows = everything
    every: int = field(default=1, repr=False)
    name: str = field(default="", repr=False)

    def evaluate(self, episodes: Episodes, signals: Signals) -> tuple[Tensor, dict[str, Tensor]]:
        raise TypeError(f"{type(self).__name__} is abstract: define evaluate(episodes, signals)")

    def __call__(self, episodes: Episodes, signals: Signals) -> Tensor:
        """The scalar loss of the whole batch."""
        return self.loss(episodes, signals).value

    def loss(self, episodes: Episodes, signals: Signals) -> Loss:
        """Take the rows that this term claims, without masked steps, and evaluate it there. No rows: zero."""
        mine, steps = self.claimed(episodes)
        own = {name: signals[name] for name in self.needs.signals}
        if steps is None:
            value, facts = self.evaluate(mine, own)
            return Loss(value, {k: v.detach() for k, v in facts.items()})
        own = {name: signal[steps] for name, signal in own.items()}
        if not len(steps):
            return Loss(sum((s.sum() for s in own.values()), torch.zeros((), device=episodes.device)))
        value, facts = self.evaluate(mine, own)
        blank = torch.full((episodes.count("step"),), torch.nan, device=episodes.device)
        return Loss(value, {k: blank.index_put((steps,), v.detach().to(blank.dtype)) for k, v in facts.items()})

    def claimed(self, episodes: Episodes) -> tuple[Episodes, Tensor | None]:
        """The rows that this term claims without their masked steps, and where those steps are in the batch (None: all)."""
        own = self.rows(episodes)
        if "mask" not in episodes and bool(own.all()):
            return episodes, None
        counted = episodes.expand(own)
        if "mask" in episodes:
            counted = counted & episodes["mask"]
        return episodes.select(counted, "step").select(own), counted.nonzero().squeeze(1)

    def at(self, update: int) -> Objective:
        """What is left of this objective in an update (0-based): terms whose turn it is, the last of every so many."""
        return self if (update + 1) % self.every == 0 else nothing

    @property
    def linear(self) -> bool:
        return False

    def terms(self) -> tuple[tuple[float | Knob, Objective], ...]:
        """The weighted terms of this objective: itself once, unless it is a sum."""
        return ((1.0, self),)

    def __add__(self, other: Objective) -> Sum:
        return Sum(weighted=(*self.terms(), *other.terms()))

    def __mul__(self, scale: float | Knob) -> Sum:
        return Sum(weighted=tuple((_times(scale, c), term) for c, term in self.terms()))

    __rmul__ = __mul__

    @property
    def title(self) -> str:
        return self.name or type(self).__name__


@dataclass(frozen=True, kw_only=True, repr=False)
class Sum(Objective):
    """A weighted sum of terms. The empty sum is the neutral element: zero loss, no needs."""

    weighted: tuple[tuple[float | Knob, Objective], ...] = ()

    @cached_property
    def needs(self) -> Needs:
        needs = NOTHING
        for _, term in self.weighted:
            needs = needs | term.needs
        return needs

    def loss(self, episodes: Episodes, signals: Signals) -> Loss:
        value = torch.zeros((), device=episodes.device)
        for coefficient, term in self.weighted:
            value = value + number(coefficient) * term.loss(episodes, signals).value
        return Loss(value)

    def at(self, update: int) -> Objective:
        due = tuple((c, term) for c, term in self.weighted if (update + 1) % term.every == 0)
        return self if len(due) == len(self.weighted) else replace(self, weighted=due)

    @property
    def linear(self) -> bool:
        return all(term.linear for _, term in self.weighted)

    def terms(self) -> tuple[tuple[float | Knob, Objective], ...]:
        return self.weighted

    def __repr__(self) -> str:
        return " + ".join(f"{c if isinstance(c, Knob) else f'{c:g}'} * {t!r}" for c, t in self.weighted) or "nothing"


nothing = Sum()


def number(value: float | Knob) -> float:
    """What a coefficient is without a controller."""
    return value.at(value.default) if isinstance(value, Knob) else value


def _times(scale: float | Knob, coefficient: float | Knob) -> float | Knob:
    if isinstance(scale, Knob) and isinstance(coefficient, Knob):
        raise TypeError(
            f"cannot multiply the knobs {scale.name!r} and {coefficient.name!r}: let one controller set both"
        )
    return coefficient * scale if isinstance(coefficient, Knob) else scale * coefficient  # type: ignore[operator]
