"""The derivative of an objective with respect to its signals: one number per step and signal."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from unipo.episodes import Episodes
from unipo.objectives import Objective, Signals, number


def per_step(x: Tensor) -> Tensor:
    """[N, k] of [N, ...]: all numbers of a step in one row, in an empty batch as well."""
    return x.flatten(1) if x.ndim > 1 else x[:, None]


@dataclass(frozen=True)
class TermShare:
    """What one weighted term of the objective asks for."""

    title: str
    coefficient: float
    loss: Tensor
    gradient: Mapping[str, Tensor]
    facts: Mapping[str, Tensor]


@dataclass(frozen=True)
class Coefficients:
    """dL/dsignal, shaped as each signal: in `total`, and for each term apart in `terms`."""

    total: Mapping[str, Tensor]
    terms: tuple[TermShare, ...]

    @property
    def loss(self) -> Tensor:
        return torch.stack([t.coefficient * t.loss for t in self.terms]).sum() if self.terms else torch.zeros(())

    def active(self) -> Tensor:
        """bool [N]: steps with any non-zero coefficient."""
        return torch.stack([per_step(c != 0).any(-1) for c in self.total.values()]).any(0)

    @property
    def silent(self) -> bool:
        """Whether no step of the batch has a coefficient: there is nothing to learn from it."""
        return not any(bool((c != 0).any()) for c in self.total.values())


def coefficients(objective: Objective, episodes: Episodes, signals: Signals) -> Coefficients:
    """Evaluate the objective once on the whole batch and differentiate it with respect to the signals only.

    `signals`: [N, ...] tensors; they are detached here. Each term is differentiated apart (it costs [N] scalars), so that the
    ledger can say which term moved which rows. Raises FloatingPointError when a coefficient is not finite.
    """
    leaves = {name: signals[name].detach().requires_grad_(True) for name in sorted(objective.needs.signals)}
    total = {name: torch.zeros_like(leaf, requires_grad=False) for name, leaf in leaves.items()}
    shares: list[TermShare] = []
    for weight, term in objective.terms():
        title = _free(term.title, {share.title for share in shares})
        result = term.loss(episodes, leaves)
        scale = number(weight)
        gradient = _gradient(scale * result.value, {n: leaves[n] for n in sorted(term.needs.signals)})
        for name, g in gradient.items():
            if not torch.isfinite(g).all():
                raise FloatingPointError(_where(title, name, g, episodes))
            total[name] = total[name] + g
        shares.append(TermShare(title, scale, result.value.detach(), gradient, result.facts))
    return Coefficients(total, tuple(shares))


def separable(objective: Objective, episodes: Episodes, signals: Signals, split: Sequence[Tensor]) -> bool:
    """Whether the coefficients of each micro-batch of `split` depend on no signals but its own: tried out, on [N] numbers.

    The signals of all other episodes are moved by up to 0.1 in either direction; no coefficient inside may move.
    """
    shift = 0.1 * torch.cos(torch.arange(episodes.count("step"), device=episodes.device))
    try:
        before = coefficients(objective, episodes, signals).total
        for part in split:
            steps = episodes.step_index(part)
            moved = {name: x + shift.to(x) for name, x in signals.items()}
            for name, x in signals.items():
                moved[name][steps] = x[steps]
            after = coefficients(objective, episodes, moved).total
            if any(not agree(after[n][steps], c[steps]) for n, c in before.items()):
                return False
    except FloatingPointError:
        return False
    return True


def agree(a: Tensor, b: Tensor) -> bool:
    """Equal up to the last bits."""
    return torch.allclose(a, b, rtol=64 * torch.finfo(b.dtype).eps, atol=0.0)


def _free(title: str, taken: set[str]) -> str:
    """The title, numbered where another term of the sum has it already: the ledger keeps them apart by it."""
    names = (title if i == 1 else f"{title} {i}" for i in itertools.count(1))
    return next(name for name in names if name not in taken)


def _gradient(loss: Tensor, leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
    if not loss.requires_grad:
        return {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
    grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    return {n: torch.zeros_like(leaf) if g is None else g for (n, leaf), g in zip(leaves.items(), grads, strict=True)}


def _where(title: str, name: str, gradient: Tensor, episodes: Episodes) -> str:
    row = int(episodes.index("episode")[int((~torch.isfinite(gradient)).nonzero()[0])])
    source = ""
    if "source" in episodes:
        column = episodes.column("source")
        source = f" (source {column.names[int(column.values[row])]!r})"
    return (
        f"term {title!r} has a coefficient on {name!r} that is not finite, first in episode {row} of the batch{source}. "
        "Look there for a NaN reward or log-prob, or a ratio that overflows; nothing was updated."
    )
