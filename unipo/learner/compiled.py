"""The whole update as one compiled graph: annotation, signals, coefficients, gradients, clipping, AdamW, slow copies.

For batches of single steps (minibatches of rollouts, replayed transitions): small networks, where a plain update is mostly the
time between its operations. `Learner.update` is the slow twin: the graph is what it does, watched once (`graph_of`), with
the optimiser's and the slow copies' formulas written out; on first use both make the same update and are compared.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from unipo.episodes import Episodes
from unipo.learner.coefficients import Coefficients, TermShare
from unipo.learner.traced import Changes, Graph, NotNow, Unsuited, can_compile, graph_of
from unipo.learner.update import LazyUpdate, Update
from unipo.objectives import Knob, Objective, number, with_settings

if TYPE_CHECKING:
    from unipo.learner.learner import Learner

GRAPHS = 16
"""Most graphs of a run: kinds of updates (a delayed actor makes two) times sizes of minibatches."""
MISSES = 3
"""Batches in a row that a graph leaves to the slow twin until that is told."""
VERIFIED = 2
"""Updates that a graph makes beside the slow twin, to be compared."""
ROUNDING = 1e-6
"""Differences of this share of a tensor's size are rounding, however little the update changed it."""
CLOSE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 0.5}
"""Largest relative difference between the twins in what an update changes (Adam's first steps are signs, also of rounding)."""


@dataclass
class CompiledUpdates:
    """Makes the updates of `learner` by graphs, one for each kind of update; `given_up`: why a kind has none, if one has none.

    `taken`: AdamW's steps of each parameter, as its state has them; None where they have to be read there.
    """

    learner: Learner
    given_up: str = ""
    taken: list[float] | None = None
    _graphs: dict[Any, _Update | None] = field(default_factory=dict)
    _known: list[tuple[Objective, int]] = field(default_factory=list)

    def update(self, episodes: Episodes, objective: Objective, settings: Mapping[str, float]) -> Update | None:
        """One update of a batch of single steps, as `Learner.update` makes it; None where the slow twin has to make it.

        `settings`: of the knobs in the objective.
        """
        made = self._made(episodes, objective, settings) if episodes.is_flat and len(episodes) else None
        if made is None:
            self.taken = None
        return made

    def _made(self, episodes: Episodes, objective: Objective, settings: Mapping[str, float]) -> Update | None:
        try:
            graph = self._graph(self._kind(episodes, objective), episodes, objective, settings)
        except NotNow:
            return None
        return None if graph is None else graph(episodes, settings)

    def steps(self) -> list[float]:
        """`taken`, read where it is not known."""
        if self.taken is None:
            state = self.learner.optimizer.state
            self.taken = torch.stack([state[p]["step"] for p in self.learner.parameters()]).tolist()
        return self.taken

    def forget(self) -> None:
        """Tensors that graphs hold have been replaced."""
        self._graphs.clear()
        self.taken = None

    def _kind(self, episodes: Episodes, objective: Objective) -> Any:
        """What decides which graph an update needs."""
        now, learner = self.learner.updates + 1, self.learner
        due = tuple(now % term.every == 0 for _, term in objective.terms())
        moved = tuple(target.due(now) for target in learner.targets)
        columns = tuple((n, c.level, c.names, c.values.dtype, c.values.shape) for n, c in episodes.columns.items())
        return self._number(objective), due, moved, columns

    def _number(self, objective: Objective) -> int:
        """Equal objectives have equal numbers; the one of the last call is known by identity."""
        for known, number_ in reversed(self._known):
            if known is objective:
                return number_
        found = next((i for known, i in self._known if known == objective), len(self._known))
        self._known = [(known, i) for known, i in self._known if i != found] + [(objective, found)]
        return found

    def _graph(
        self, kind: Any, episodes: Episodes, objective: Objective, settings: Mapping[str, float]
    ) -> _Update | None:
        """The graph of this kind of update, at first compared with the slow twin; None where there is none. Raises NotNow."""
        known = self._graphs.get(kind)
        if kind in self._graphs and (known is None or known.verified >= VERIFIED):
            return known
        if known is None and len(self._graphs) >= GRAPHS:
            return None
        try:
            graph = known or _Update.of(self, episodes, objective, settings)
            graph.verify(episodes, objective, settings)
            self._graphs[kind] = graph
        except Unsuited as why:
            self._graphs[kind] = None
            if not self.given_up:
                warnings.warn(f"updates are not compiled: {why}; they are made one operation at a time", stacklevel=2)
            self.given_up = str(why)
        return self._graphs[kind]


@dataclass
class _Update:
    """One graph with what it takes to turn its outputs into an `Update`."""

    owner: CompiledUpdates
    graph: Graph
    terms: tuple[tuple[float | Knob, Objective], ...]
    knobs: tuple[str, ...]
    shape: list[tuple[str, ...]]
    titles: list[str]
    moves: list[bool]
    misses: int = 0
    verified: int = 0

    @classmethod
    def of(
        cls, owner: CompiledUpdates, episodes: Episodes, objective: Objective, settings: Mapping[str, float]
    ) -> _Update:
        """Raises Unsuited and NotNow."""
        learner = owner.learner
        if lacking := can_compile():
            raise Unsuited(lacking)
        now, knobs = objective.at(learner.updates), tuple(sorted(objective.knobs))
        prepare_states(learner.optimizer)
        shape: list[tuple[str, ...]] = []
        titles: list[str] = []
        moves: list[bool] = []
        names = list(episodes.columns)

        def update(given: Sequence[Tensor]) -> tuple[list[Tensor], Changes]:
            values, factors, turned = given[: len(names)], given[len(names)], given[len(names) + 1 :]
            batch = episodes.with_values(dict(zip(names, values, strict=True)))
            placed = with_settings(now, dict(zip(knobs, turned, strict=True)))  # type: ignore[arg-type]
            annotated, signals, found = learner.look(batch, placed)
            if found.silent:
                raise NotNow
            gradients = _gradients(learner, signals, found)
            norm, changes = _changes(learner, gradients, factors)
            moves[:] = [id(p) in gradients for p in learner.parameters()]
            outputs = _flattened(batch, annotated, signals, found)
            shape[:], titles[:] = list(outputs), [t.title for t in found.terms]
            return [norm, *(x.detach() for x in outputs.values())], changes

        made = cls(owner, None, now.terms(), knobs, shape, titles, moves)  # type: ignore[arg-type]
        made.graph = graph_of(update, made.inputs(episodes, settings))
        unread = [k for k, read in zip(knobs, made.graph.read[-len(knobs) :] if knobs else [], strict=True) if not read]
        if any(k in now.knobs for k in unread):
            raise Unsuited(f"the setting of {unread} is read in a way that cannot be watched")
        return made

    def inputs(self, episodes: Episodes, settings: Mapping[str, float]) -> list[Tensor]:
        """Columns, the `factors` of AdamW, and the knobs."""
        turned = [torch.tensor(settings[k], dtype=torch.float64) for k in self.knobs]
        return [*(c.values for c in episodes.columns.values()), factors(self.learner, self.owner.steps()), *turned]

    @property
    def learner(self) -> Learner:
        return self.owner.learner

    def __call__(self, episodes: Episodes, settings: Mapping[str, float]) -> Update | None:
        agreed, outputs = self.graph(self.inputs(episodes, settings))
        self.misses = 0 if agreed else self.misses + 1
        if self.misses == MISSES:
            warnings.warn(
                f"{MISSES} batches in a row went another way than the compiled update, and were made plainly",
                stacklevel=2,
            )
        if not agreed:
            return None
        self.owner.taken = [t + moved for t, moved in zip(self.owner.steps(), self.moves, strict=True)]
        now = self.learner.updates
        return LazyUpdate(len(self.titles), lambda: self._unflattened(episodes, settings, outputs, now))

    def verify(self, episodes: Episodes, objective: Objective, settings: Mapping[str, float]) -> None:
        """Make this update by both twins and compare; what they changed is put back. Raises Unsuited."""
        before = [t.clone() for t in self.graph.changed]
        agreed, _ = self.graph(self.inputs(episodes, settings))
        fast = [t.clone() for t in self.graph.changed]
        _put_back(self.graph.changed, before)
        if not agreed:
            return
        self.learner.move(episodes, objective, settings)
        slow = [t.clone() for t in self.graph.changed]
        _put_back(self.graph.changed, before)
        limit = max(CLOSE[dtype] for dtype in self._dtypes)
        for a, b, old in zip(fast, slow, before, strict=True):
            apart, moved, size = (float(x.double().norm()) for x in (a - b, b - old, b))
            if not apart <= limit * moved + ROUNDING * size:
                told = f"{apart / max(moved, 1e-300):.1e} of what it changes a tensor of {list(a.shape)} by"
                raise Unsuited(f"the compiled update differs from the plain one by {told}")
        self.verified += 1

    @property
    def _dtypes(self) -> set[torch.dtype]:
        cast = self.learner.settings.autocast
        return {p.dtype for p in self.learner.parameters()} | ({getattr(torch, cast)} if cast != "off" else set())

    def _unflattened(
        self, episodes: Episodes, settings: Mapping[str, float], outputs: Sequence[Tensor], now: int
    ) -> Update:
        """`now`: how many updates were made before."""
        norm, *rest = outputs
        by_kind: dict[str, dict[str, Tensor]] = {}
        for (kind, *path), value in zip(self.shape, rest, strict=True):
            by_kind.setdefault(kind, {})["/".join(path)] = value
        losses = by_kind.get("loss", {})
        shares = tuple(
            TermShare(title, number(with_settings(c, settings)), losses[title], by_kind.get(f"gradient of {title}", {}),
                      by_kind.get(f"facts of {title}", {}))
            for title, (c, _) in zip(self.titles, self.terms, strict=True)
        )  # fmt: skip
        found = Coefficients(by_kind.get("total", {}), shares)
        batch = episodes.with_columns("step", **by_kind["column"]) if "column" in by_kind else episodes
        learner = self.learner
        rate = learner.settings.learning_rate * learner.settings.rate(now)
        return Update(batch, found, by_kind.get("signal", {}), len(batch), float(norm), rate)


# ---- what is traced ------------------------------------------------------------------------------------------------------
def _gradients(learner: Learner, signals: Mapping[str, Tensor], found: Coefficients) -> dict[int, Tensor]:
    """dL/dp by id of the parameter, for those that have one."""
    live = [(signals[n], c.to(signals[n].dtype)) for n, c in found.total.items() if signals[n].requires_grad]
    parameters = learner.parameters()
    made = torch.autograd.grad([s for s, _ in live], parameters, [c for _, c in live], allow_unused=True)
    return {id(p): g for p, g in zip(parameters, made, strict=True) if g is not None}


@torch.no_grad()
def _changes(
    learner: Learner, gradients: Mapping[int, Tensor], factors: Tensor
) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """The gradient's norm, and AdamW's step with what follows it: (tensor, new value)."""
    s, state = learner.settings, learner.optimizer.state
    norm = torch.stack([g.square().sum() for g in gradients.values()]).sum().sqrt()
    if not bool(norm.isfinite()):  # a decision: the slow twin raises the error
        raise NotNow
    clip = (s.clip_norm / (norm + 1e-6)).clamp(max=1.0) if s.clip_norm != float("inf") else None
    changes: list[tuple[Tensor, Tensor]] = []
    for p, (rate, root, kept) in zip(learner.parameters(), factors.unbind(), strict=True):
        if id(p) in gradients:
            g = gradients[id(p)] if clip is None else gradients[id(p)] * clip
            changes += adamw(p, g, state[p], rate, root, kept, s.betas, s.eps)
    new = {id(tensor): value for tensor, value in changes}
    for target in learner.targets:
        if target.due(learner.updates + 1):
            pairs = zip(target.slow.parameters(), target.online.parameters(), strict=True)
            changes += [(slow, torch.lerp(slow, new.get(id(p), p), target.tau)) for slow, p in pairs]
            changes += list(zip(target.slow.buffers(), (b.clone() for b in target.online.buffers()), strict=True))
    return norm, changes


def adamw(p: Tensor, g: Tensor, state: Mapping[str, Tensor], rate: Tensor, root: Tensor, kept: Tensor,
          betas: tuple[float, float], eps: float) -> list[tuple[Tensor, Tensor]]:  # fmt: skip
    """Decoupled weight decay and Adam (arXiv 1711.05101, algorithm 2), as torch.optim.AdamW: (tensor, new value).

    m <- b1 m + (1 - b1) g,   v <- b2 v + (1 - b2) g^2,   t <- t + 1
    p <- kept p - rate m / (sqrt(v) / root + eps)                   with `factors`
    """
    m = torch.lerp(state["exp_avg"], g, 1 - betas[0])
    v = state["exp_avg_sq"] * betas[1] + (1 - betas[1]) * g * g
    moved = p * kept - rate * m / (v.sqrt() / root + eps)
    return [(p, moved), (state["exp_avg"], m), (state["exp_avg_sq"], v), (state["step"], state["step"] + 1)]


def factors(learner: Learner, taken: Sequence[float]) -> Tensor:
    """[parameters, 3]: a / (1 - b1^t), sqrt(1 - b2^t) and 1 - a decay, a the learning rate and t one more than the steps `taken`.

    Made here: in the graph they would be computed again for every few weights.
    """
    s, rows, steps = learner.settings, [], iter(taken)
    now = s.rate(learner.updates)
    known = {t: (1 - s.betas[0] ** (t + 1), math.sqrt(1 - s.betas[1] ** (t + 1))) for t in set(taken)}
    for group, base in zip(learner.optimizer.param_groups, learner.base_rates, strict=True):
        rate, kept = base * now, 1 - base * now * group["weight_decay"]
        for t in islice(steps, len(group["params"])):
            bias, root = known[t]
            rows.append((rate / bias, root, kept))
    first = learner.parameters()[0]
    return torch.tensor(rows, dtype=first.dtype, device=first.device)


def prepare_states(optimizer: torch.optim.Optimizer) -> None:
    """Moments of 0 for parameters that have none yet, as the optimiser itself would make them."""
    for p in (p for group in optimizer.param_groups for p in group["params"]):
        if not optimizer.state[p]:
            optimizer.state[p] = {"step": torch.zeros((), dtype=torch.float32), "exp_avg": torch.zeros_like(p),
                                  "exp_avg_sq": torch.zeros_like(p)}  # fmt: skip


def _flattened(batch: Episodes, annotated: Episodes, signals: Mapping[str, Tensor],
               found: Coefficients) -> dict[tuple[str, ...], Tensor]:  # fmt: skip
    """Everything that an `Update` is made of, by what it is."""
    made: dict[tuple[str, ...], Tensor] = {}
    made |= {
        ("column", n): c.values for n, c in annotated.columns.items() if n not in batch or c.values is not batch[n]
    }
    made |= {("signal", n): s for n, s in signals.items()}
    made |= {("total", n): c for n, c in found.total.items()}
    for share in found.terms:
        made["loss", share.title] = share.loss
        made |= {(f"gradient of {share.title}", n): g for n, g in share.gradient.items()}
        made |= {(f"facts of {share.title}", n): f for n, f in share.facts.items()}
    return made


@torch.no_grad()
def _put_back(tensors: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for tensor, value in zip(tensors, values, strict=True):
        tensor.copy_(value)


__all__ = ["CompiledUpdates"]
