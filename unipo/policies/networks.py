"""Networks of control policies and critics: a perceptron, a stack of perceptrons, an input normaliser."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as nnf

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "tanh": nn.Tanh,
    "relu": partial(nn.ReLU, inplace=True),
    "gelu": nn.GELU,
}


def activation_named(name: str) -> nn.Module:
    """The activation called `name`; ValueError lists those that exist."""
    if name not in ACTIVATIONS:
        raise ValueError(f"unknown activation {name!r}: expected one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]()


class MLP(nn.Module):
    """`inputs` -> hidden layers (`trunk`) -> `outputs` (`head`), [N, inputs] -> [N, outputs].

    `orthogonal`: weights orthogonal with gain sqrt 2 (the head `output_gain`), biases 0, as PPO has them; otherwise torch's
    initial values, the head times `output_gain`.
    """

    def __init__(
        self,
        inputs: int,
        hidden: Sequence[int],
        outputs: int,
        activation: str = "tanh",
        output_gain: float = 1.0,
        orthogonal: bool = True,
        layer_norm: bool = False,
    ) -> None:
        super().__init__()
        sizes = (inputs, *hidden)
        self.trunk = nn.Sequential()
        for a, b in pairwise(sizes):
            linear = nn.Linear(a, b)
            if orthogonal:
                orthogonal_(linear, math.sqrt(2))
            self.trunk.extend([linear, *([nn.LayerNorm(b)] if layer_norm else []), activation_named(activation)])
        self.head = nn.Linear(sizes[-1], outputs)
        if orthogonal:
            orthogonal_(self.head, output_gain)
        else:
            with torch.no_grad():
                self.head.weight.mul_(output_gain)
                self.head.bias.mul_(output_gain)

    def forward(self, x: Tensor) -> Tensor:
        """Mixed precision rounds neither inputs nor outputs: the first and the last layer stay in that of their weights (products
        with few columns are no faster in another)."""
        exact = partial(torch.autocast, x.device.type, enabled=False)
        layers = iter(self.trunk)
        if first := next(layers, None):
            with exact():
                x = first(x)
        for layer in layers:
            x = layer(x)
        if self.head.out_features == 1:
            return (x * self.head.weight[0]).sum(
                -1, keepdim=True
            ) + self.head.bias  # a product with one column is slower
        with exact():
            return self.head(x.to(self.head.weight.dtype))


def orthogonal_(linear: nn.Linear, gain: float) -> None:
    """Orthogonal weights times `gain`, bias 0, in place."""
    nn.init.orthogonal_(linear.weight, gain)
    nn.init.zeros_(linear.bias)


class StackedMLP(nn.Module):
    """`members` perceptrons of one shape, computed together: [N, inputs] -> [N, members, outputs].

    One batched product per layer instead of one per layer and member. `forward(x, frozen=True)` uses detached weights: the
    gradient flows to `x` only; `members`: of the first so many alone. Mixed precision is as in `MLP`. Initial values are
    torch's for linear layers, each member its own.
    """

    def __init__(
        self,
        members: int,
        inputs: int,
        hidden: Sequence[int],
        outputs: int,
        activation: str = "relu",
        layer_norm: bool = False,
    ) -> None:
        super().__init__()
        self.members = members
        self.activation = activation_named(activation)
        sizes = tuple(pairwise((inputs, *hidden, outputs)))
        self.weights = nn.ParameterList(_uniform((members, a, b), a) for a, b in sizes)
        self.biases = nn.ParameterList(_uniform((members * b,), a) for a, b in sizes)  # vectors: no weight decay
        norms = hidden if layer_norm else ()
        self.scales = nn.ParameterList(nn.Parameter(torch.ones(members * b)) for b in norms)
        self.shifts = nn.ParameterList(nn.Parameter(torch.zeros(members * b)) for b in norms)

    def forward(self, x: Tensor, frozen: bool = False, members: int | None = None) -> Tensor:
        def of(parameters: nn.ParameterList) -> list[Tensor]:
            """[members, a, b] each; of vectors a = 1."""
            wide = [p if p.ndim > 1 else p.view(self.members, 1, -1) for p in parameters]
            used = wide if members is None else [p[:members] for p in wide]
            return [p.detach() for p in used] if frozen else used

        weights, biases, scales, shifts = of(self.weights), of(self.biases), of(self.scales), of(self.shifts)
        h = x.expand(len(weights[0]), *x.shape)
        for i, (weight, bias) in enumerate(zip(weights[:-1], biases[:-1], strict=True)):
            with nullcontext() if i else torch.autocast(x.device.type, enabled=False):
                h = torch.bmm(h, weight) + bias  # not baddbmm, which copies the bias to every row first
            if scales:
                h = torch.addcmul(shifts[i], nnf.layer_norm(h, h.shape[-1:]), scales[i])
            h = self.activation(h)
        last = weights[-1]
        if last.shape[-1] == 1:
            out = (h * last.mT).sum(-1, keepdim=True)
        else:
            with torch.autocast(x.device.type, enabled=False):
                out = torch.bmm(h.to(last.dtype), last)
        return (out + biases[-1]).transpose(0, 1)


def _uniform(shape: tuple[int, ...], fan_in: int) -> nn.Parameter:
    bound = 1 / math.sqrt(fan_in)
    return nn.Parameter(torch.empty(shape).uniform_(-bound, bound))


class Normaliser(nn.Module):
    """clip((x - mean) / sqrt(var + 1e-8), +-clip) with running statistics over all rows that `update` was given.

    The identity before the first update. The statistics are buffers: saved with the module, never trained.
    """

    mean: Tensor
    var: Tensor
    count: Tensor

    def __init__(self, size: int, clip: float = 10.0) -> None:
        super().__init__()
        self.size, self.clip = size, clip
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("var", torch.ones(size))
        self.register_buffer("count", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        if not self.count:
            return x
        return nnf.batch_norm(x, self.mean, self.var, eps=1e-8).clamp(-self.clip, self.clip)  # one kernel, running form

    @torch.no_grad()
    def update(self, x: Tensor) -> None:
        """Merge the rows of `x` [n, size] (Chan et al. 1979, parallel variance). ValueError where a row is not finite."""
        if not len(x):
            return
        rows = x.double()
        if not bool(rows.isfinite().all()):
            raise ValueError("cannot normalise by observations with NaN or infinite entries: find where they come from")
        total = self.count + len(rows)
        share = len(rows) / total.double()
        delta = rows.mean(0) - self.mean
        within = (1 - share) * self.var + share * rows.var(0, correction=0)
        self.var.copy_(within + share * (1 - share) * delta.square())
        self.mean.add_((share * delta).to(self.mean.dtype))
        self.count.copy_(total)
