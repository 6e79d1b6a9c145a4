"""A list of parameters seen as one vector [P], and back."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Matvec = Callable[[Tensor], Tensor]


def flat(tensors: Sequence[Tensor]) -> Tensor:
    """All entries as one detached vector [P], a copy."""
    return torch.cat([t.detach().reshape(-1) for t in tensors])


def unflat(vector: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """The vector [P] cut into tensors of the shapes of `like`."""
    parts = vector.split([t.numel() for t in like])
    return [part.view_as(t) for part, t in zip(parts, like, strict=True)]


def assign(parameters: Sequence[Tensor], vector: Tensor) -> None:
    """Overwrite the parameters in place with the vector [P]; no graph is recorded."""
    with torch.no_grad():
        for parameter, value in zip(parameters, unflat(vector, parameters), strict=True):
            parameter.copy_(value)


def flat_gradient(scalar: Tensor, parameters: Sequence[Tensor], *, create_graph: bool = False) -> Tensor:
    """The gradient of a scalar as one vector [P], its graph kept; 0 for parameters that it does not depend on."""
    found = torch.autograd.grad(
        scalar, list(parameters), create_graph=create_graph, retain_graph=True, materialize_grads=True
    )
    return torch.cat([g.reshape(-1) for g in found])


def matched(parameters: Sequence[Tensor], gradient: Sequence[Tensor]) -> Tensor:
    """The gradient as a vector [P], after the check that it is finite and fits the parameters.

    Raises:
        ValueError: the shapes differ, the parameters have several dtypes, or an entry is not finite.
    """
    expected, found = [tuple(p.shape) for p in parameters], [tuple(g.shape) for g in gradient]
    if expected != found:
        raise ValueError(
            f"expected a gradient of shapes {expected}, found {found}: pass one tensor per parameter, in the same order"
        )
    if len({(p.dtype, p.device) for p in parameters}) != 1:
        raise ValueError("expected parameters of one dtype on one device: optimise each such group by itself")
    vector = flat(gradient)
    if not bool(vector.isfinite().all()):
        raise ValueError(
            f"expected a finite gradient, found {int((~vector.isfinite()).sum())} entries that are not: "
            "lower the learning rate or skip this batch"
        )
    return vector
