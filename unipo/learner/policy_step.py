"""Steps of a policy that a plain update of the learner is not: in a trust region, with momentum of another kind, repeated.

A recipe with a `policy_step` divides its objective. The terms that read the policy's signals alone are taken here, on the
whole batch, by the optimiser that the recipe names; what is left, the critics, is trained by the learner afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from unipo.episodes import Episodes
from unipo.learner.learner import Learner, Update
from unipo.learner.player import Player
from unipo.objectives import Knob, Objective, Sum, hoisted
from unipo.optimizers import (
    HessianAidedRecursive,
    ImplicitGradientTransport,
    NormalisedMomentum,
    RepeatedSteps,
    StochasticGradient,
    TrustRegion,
    gradient_difference,
)
from unipo.optimizers.vectors import assign, flat

FIRST_ORDER = (StochasticGradient, NormalisedMomentum, ImplicitGradientTransport, HessianAidedRecursive)
Sample = Callable[[], Episodes]
"""Annotated episodes of the policy with its parameters as they are at the call."""


@dataclass
class PolicyOptimiser:
    """The policy step of a run: `optimizer`, a record of `unipo.optimizers`, applied to `policy` on whole batches.

    `learner` holds the policy alone: it computes gradients by micro-batches, and its own Adam makes `RepeatedSteps`.
    `sample` is asked by `HessianAidedRecursive` only. `facts`: what the last step said of itself, for the metrics.
    """

    policy: Player
    learner: Learner
    optimizer: Any
    sample: Sample | None = None
    state: dict[str, Tensor] = field(default_factory=dict)
    facts: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if type(self.optimizer) not in MOVES:
            known = ", ".join(kind.__name__ for kind in MOVES)
            raise TypeError(f"{self.optimizer!r} is no optimiser of a policy step: expected one of {known}")
        if isinstance(self.optimizer, FIRST_ORDER):
            self.state = self.optimizer.init(self.parameters)

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [p for _, p in self.policy.named_parameters() if p.requires_grad]

    def __call__(self, batch: Episodes, objective: Objective) -> tuple[Objective, Update]:
        """Move the policy; returns the rest of the objective and what was done.

        Raises FloatingPointError or ValueError for a gradient that is not finite, before anything is moved.
        """
        own, rest = parted(objective, self.policy)
        update, self.facts = MOVES[type(self.optimizer)](self, batch, own)
        return rest, update

    def gradient(self, batch: Episodes, own: Objective) -> tuple[Update, list[Tensor]]:
        """What the learner's `gradient` says, with the gradient itself, one tensor per parameter; nothing is moved."""
        self.learner.optimizer.zero_grad(set_to_none=True)
        update = self.learner.gradient(batch, own)
        found = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in self.parameters]
        self.learner.optimizer.zero_grad(set_to_none=True)
        return replace(update, grad_norm=float(flat(found).norm())), found

    @contextmanager
    def deployed(self) -> Iterator[None]:
        """While it lasts, the parameters are those to evaluate and to keep, and not where the next batch is drawn."""
        if not isinstance(self.optimizer, FIRST_ORDER):
            yield
            return
        ahead = flat(self.parameters)
        assign(self.parameters, flat(self.optimizer.deployed(self.parameters, self.state)))
        try:
            yield
        finally:
            assign(self.parameters, ahead)

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors for the checkpoint: the optimiser's own state, or the moments of the learner's Adam."""
        moments = self.learner.optimizer.state_dict()["state"]
        adam = {f"adam/{i}/{name}": tensor for i, kept in moments.items() for name, tensor in kept.items()}
        return {**self.state, **adam, "updates": torch.tensor(self.learner.updates)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.state = {name: state[name] for name in self.state}
        self.learner.updates = int(state["updates"])
        moments: dict[int, dict[str, Tensor]] = {}
        for name, tensor in state.items():
            if name.startswith("adam/"):
                _, i, kind = name.split("/")
                moments.setdefault(int(i), {})[kind] = tensor
        whole = self.learner.optimizer.state_dict()
        self.learner.optimizer.load_state_dict({**whole, "state": moments})


def parted(objective: Objective, policy: Player) -> tuple[Sum, Sum]:
    """(the terms that read signals of the policy, the others). Raises ValueError for a term that reads both kinds."""
    own: list[tuple[float | Knob, Objective]] = []
    rest: list[tuple[float | Knob, Objective]] = []
    for weight, term in objective.terms():
        asked = term.needs.signals
        if asked & policy.emits and not asked <= policy.emits:
            raise ValueError(
                f"term {term.title!r} reads {sorted(asked)}, of which {sorted(asked - policy.emits)} are not the policy's: "
                "a policy step needs terms of the policy alone; write what is left as a term of its own"
            )
        (own if asked & policy.emits else rest).append((weight, term))
    return Sum(weighted=tuple(own)), Sum(weighted=tuple(rest))


# ---- how each optimiser moves the policy -----------------------------------------------------------------------------
def _trust_region(step: PolicyOptimiser, batch: Episodes, own: Objective) -> tuple[Update, dict[str, float]]:
    """The KL is the mean of KL(old || new) over the batch's states; the loss that must fall is that of the policy's terms."""
    own, batch = hoisted(own, batch)
    with torch.no_grad():
        batch = batch.with_columns("step", old_parameters=step.policy.signals(batch, ["parameters"])["parameters"])
    update, gradient = step.gradient(batch, own)
    names = sorted(own.needs.signals)

    def kl() -> Tensor:
        return step.policy.signals(batch, ["forward_kl:old"])["forward_kl:old"].mean()

    def loss() -> Tensor:
        return own.loss(batch, step.policy.signals(batch, names)).value

    facts = step.optimizer.step(step.parameters, gradient, kl, loss)
    return replace(update, learning_rate=facts["step_norm"]), facts


def _first_order(step: PolicyOptimiser, batch: Episodes, own: Objective) -> tuple[Update, dict[str, float]]:
    """One gradient, one step; where it is taken is the optimiser's affair."""
    update, gradient = step.gradient(batch, own)
    step.state, facts = step.optimizer.step(step.parameters, gradient, step.state)
    return replace(update, learning_rate=facts["rate"]), facts


def _hessian_aided(step: PolicyOptimiser, batch: Episodes, own: Objective) -> tuple[Update, dict[str, float]]:
    """As `_first_order`, with a second batch drawn between the last two policies. Fragments count as trajectories, so that
    the objective must be a mean over them (`EpisodeSum`)."""
    update, gradient = step.gradient(batch, own)

    def difference(parameters: Sequence[Tensor], direction: Sequence[Tensor]) -> Sequence[Tensor]:
        assert step.sample is not None, "a Hessian-aided step draws a batch of its own"
        drawn = step.sample()
        asked = step.policy.signals(drawn, sorted(own.needs.signals | {"logp"}))
        surrogate = torch.stack([own.loss(drawn.select(i), _of(asked, drawn, i)).value for i in _each(drawn)])
        return gradient_difference(parameters, direction, drawn.reduce(asked["logp"]), surrogate)

    step.state, facts = step.optimizer.step(step.parameters, gradient, step.state, difference)
    return replace(update, learning_rate=facts["rate"]), facts


def _each(episodes: Episodes) -> list[Tensor]:
    return list(torch.arange(len(episodes)).split(1))


def _of(signals: Mapping[str, Tensor], episodes: Episodes, row: Tensor) -> dict[str, Tensor]:
    steps = episodes.step_index(row)
    return {name: value[steps] for name, value in signals.items()}


def _repeated(step: PolicyOptimiser, batch: Episodes, own: Objective) -> tuple[Update, dict[str, float]]:
    """The first of the updates is reported: the others look at the same batch."""
    own, batch = hoisted(own, batch)
    made = [step.learner.update(batch, own) for _ in range(step.optimizer.steps)]
    return made[0], {"grad_norm": made[-1].grad_norm}


Move = Callable[[PolicyOptimiser, Episodes, Objective], tuple[Update, dict[str, float]]]
MOVES: Mapping[type, Move] = {
    TrustRegion: _trust_region,
    StochasticGradient: _first_order,
    NormalisedMomentum: _first_order,
    ImplicitGradientTransport: _first_order,
    HessianAidedRecursive: _hessian_aided,
    RepeatedSteps: _repeated,
}
