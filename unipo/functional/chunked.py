"""Log-prob, entropy and divergences from hidden states, in row chunks: logits [n, V] are never kept.

With z = post(linear(h)) a chunk's logits and l = log softmax(z) its normalised log-probs, every quantity is a function
q(l) of each row. Forward keeps q alone, [n]; backward computes each chunk's l again and pulls dL/dq back to

    dL/dl = sum_q dL/dq dq/dl        dL/dz = dL/dl - softmax(z) sum_V dL/dl        dL/dh, dL/dweight by the linear map

Weight gradients of all chunks add into one buffer of the weight's size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

CHUNK_BYTES = 32 << 20
"""Logits of one chunk; about four temporaries of the same size come on top."""


def chunk_rows(vocabulary: int, element_size: int, budget: int = CHUNK_BYTES) -> int:
    """Rows whose logits fit into `budget` bytes (at least 1)."""
    return max(1, budget // (vocabulary * element_size))


def chunks(n: int, size: int) -> Iterator[slice]:
    """Slices of at most `size` rows that cover range(n)."""
    return (slice(i, min(i + size, n)) for i in range(0, n, size))


def wide(x: Tensor) -> Tensor:
    """x in float32 or better."""
    return x if x.dtype == torch.float64 else x.float()


# ---- heads -------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Head:
    """z = cap * tanh(scale * linear(h) / cap) / temperature: hidden states [r, d] -> logits [r, V], float32 or better.

    `linear`: a module (plain, tied, frozen, with LoRA), or None where h are the logits already. `scale` (Cohere,
    Granite) and `cap` (Gemma's soft cap; None: no cap) are what architectures put after the linear map.
    """

    linear: nn.Module | None
    scale: float = 1.0
    cap: float | None = None
    temperature: float = 1.0

    @property
    def parameters(self) -> tuple[nn.Parameter, ...]:
        """What it is differentiated in besides h."""
        return () if self.linear is None else tuple(p for p in self.linear.parameters() if p.requires_grad)

    def __call__(self, hidden: Tensor) -> Tensor:
        raw = hidden if self.linear is None else self.linear(hidden)
        z = wide(raw) * self.scale if self.scale != 1.0 else wide(raw)
        z = torch.tanh(z / self.cap) * self.cap if self.cap else z
        return z / self.temperature if self.temperature != 1.0 else z

    def pull(self, grad: Tensor, logits: Tensor) -> Tensor:
        """dL/dlinear(h) from dL/dz and z, both [r, V]: the derivative of scale, cap and temperature."""
        grad = grad * (self.scale / self.temperature) if self.scale != self.temperature else grad
        return grad * (1 - (logits * (self.temperature / self.cap)) ** 2) if self.cap else grad


# ---- quantities --------------------------------------------------------------------------------------------------------
class Quantity(Protocol):
    """A number per row, as a function of its log-probs l [r, V]. `part` says which rows of the whole these are."""

    def value(self, logp: Tensor, part: slice) -> Tensor:
        """q(l): [r]."""

    def slope(self, logp: Tensor, part: slice) -> Tensor:
        """dq/dl: [r, V], a tensor that the caller may change."""


@dataclass(frozen=True, slots=True)
class LogProb:
    """l[y]: log-prob of `tokens` y [n]."""

    tokens: Tensor

    def value(self, logp: Tensor, part: slice) -> Tensor:
        return logp.gather(-1, self.tokens[part, None]).squeeze(-1)

    def slope(self, logp: Tensor, part: slice) -> Tensor:
        return torch.zeros_like(logp).scatter_(-1, self.tokens[part, None], 1.0)


@dataclass(frozen=True, slots=True)
class Entropy:
    """H = - sum_V e^l l, in nats; an excluded token (l = -inf) adds 0."""

    def value(self, logp: Tensor, part: slice) -> Tensor:
        return -(torch.exp(logp).mul_(_finite(logp))).sum(-1)

    def slope(self, logp: Tensor, part: slice) -> Tensor:
        return torch.exp(logp).mul_(_finite(logp).add_(1.0)).neg_()


@dataclass(frozen=True, slots=True)
class Divergence:
    """`fn(l, other(part))` of full distributions, such as `divergences.kl`; the other side is constant.

    `other`: rows -> normalised log-probs [r, V], computed when they are needed, forward and backward.
    """

    fn: Callable[[Tensor, Tensor], Tensor]
    other: Callable[[slice], Tensor]

    def value(self, logp: Tensor, part: slice) -> Tensor:
        return self.fn(logp, self.other(part).to(logp.dtype))

    def slope(self, logp: Tensor, part: slice) -> Tensor:
        with torch.enable_grad():
            leaf = logp.detach().requires_grad_()
            total = self.fn(leaf, self.other(part).to(logp.dtype)).sum()
        return torch.autograd.grad(total, leaf)[0]


def _finite(logp: Tensor) -> Tensor:
    return logp.clamp(min=torch.finfo(logp.dtype).min)


def log_probs(hidden: Tensor, head: Head) -> Callable[[slice], Tensor]:
    """The other side of a `Divergence`: log-probs of rows of constant hidden states [n, d] through a head."""

    def rows(part: slice) -> Tensor:
        with torch.no_grad():
            return torch.log_softmax(head(hidden[part]), -1)

    return rows


# ---- the chunked function ----------------------------------------------------------------------------------------------
def chunked(hidden: Tensor, head: Head, quantities: Sequence[Quantity], size: int) -> tuple[Tensor, ...]:
    """Each quantity [n] of hidden states [n, d], `size` rows at a time; differentiable in `hidden` and the head, once.

    Dtype: float32, or float64 for float64 hidden states.
    """
    return tuple(_Chunked.apply(size, head, quantities, hidden, *head.parameters).unbind(0))


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, size: int, head: Head, quantities: Sequence[Quantity], hidden: Tensor,
                *parameters: Tensor) -> Tensor:  # fmt: skip
        ctx.size, ctx.head, ctx.quantities, ctx.cast = size, head, quantities, _autocast(hidden.device.type)
        ctx.save_for_backward(hidden, *parameters)
        values = wide(hidden.new_empty(0)).new_empty(len(quantities), len(hidden))
        for part in chunks(len(hidden), size):
            logp = torch.log_softmax(head(hidden[part]), -1)
            for row, quantity in zip(values, quantities, strict=True):
                row[part] = quantity.value(logp, part)
        return values

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        hidden, *parameters = ctx.saved_tensors
        into = [torch.zeros_like(p, dtype=wide(p.new_empty(0)).dtype) for p in parameters]
        pulled = torch.zeros_like(hidden) if ctx.needs_input_grad[3] else None
        active = [(q, g) for q, g in zip(ctx.quantities, grad, strict=True) if bool(g.any())]
        with ctx.cast:
            for part in chunks(len(hidden) if active else 0, ctx.size):
                slope = _logit_slope(ctx.head, hidden[part], active, part)
                back = _through_linear(ctx.head.linear, hidden[part], slope, parameters, into)
                if pulled is not None:
                    pulled[part] = back
        return None, None, None, pulled, *(g.to(p.dtype) for g, p in zip(into, parameters, strict=True))


def _logit_slope(head: Head, hidden: Tensor, active: Sequence[tuple[Quantity, Tensor]], part: slice) -> Tensor:
    """dL/dlinear(h) [r, V] of one chunk."""
    z = head(hidden)
    logp = torch.log_softmax(z, -1)
    (first, grad), *others = active
    total = first.slope(logp, part).mul_(grad[part, None])
    for quantity, grad in others:
        total.add_(quantity.slope(logp, part).mul_(grad[part, None]))
    # one fused pass of dL/dz = dL/dl - softmax(z) * sum dL/dl
    return head.pull(torch._log_softmax_backward_data(total, logp, -1, z.dtype), z)


def _through_linear(linear: nn.Module | None, hidden: Tensor, slope: Tensor, parameters: Sequence[Tensor],
                    into: Sequence[Tensor]) -> Tensor:  # fmt: skip
    """dL/dh [r, d] from dL/dlinear(h) [r, V]; adds dL/dparameter to `into`."""
    if linear is None:
        return slope.to(hidden.dtype)
    if type(linear) is nn.Linear:
        return _through_dense(linear, hidden, slope, parameters, into)
    with torch.enable_grad():
        h = hidden.detach().requires_grad_()
        out = linear(h)
    back, *found = torch.autograd.grad(out, (h, *parameters), slope.to(out.dtype), allow_unused=True)
    for buffer, g in zip(into, found, strict=True):
        if g is not None:
            buffer.add_(g)
    return back


def _through_dense(linear: nn.Linear, hidden: Tensor, slope: Tensor, parameters: Sequence[Tensor],
                   into: Sequence[Tensor]) -> Tensor:  # fmt: skip
    """As `_through_linear`; the weight's gradient is added in place, without a temporary of its size where dtypes allow."""
    for p, buffer in zip(parameters, into, strict=True):
        if p.ndim == 1:
            buffer.add_(slope.sum(0))
        elif buffer.dtype == hidden.dtype:
            buffer.addmm_(slope.to(buffer.dtype).t(), hidden)
        else:
            buffer.add_(slope.to(hidden.dtype).t() @ hidden)
    return (slope.to(linear.weight.dtype) @ linear.weight).to(hidden.dtype)


def _autocast(device: str) -> torch.autocast:
    """The mixed precision that is on now, to be entered again in backward."""
    return torch.autocast(device, dtype=torch.get_autocast_dtype(device), enabled=torch.is_autocast_enabled(device))
