"""Log-prob, entropy and divergences from hidden states, in row chunks: logits [n, V] are never kept.

With z = post(linear(h)) a chunk's logits and l = log softmax(z) its normalised log-probs, every quantity is a function
q(l) of each row. Forward keeps q alone, [n]; backward computes each chunk's l again and pulls dL/dq back to

    dL/dl = sum_q dL/dq dq/dl        dL/dz = dL/dl - softmax(z) sum_V dL/dl        dL/dh, dL/dweight by the linear map

Weight gradients of all chunks add into one buffer of the weight's size.

Most updates ask for l[y] alone, of z = k W h. Then S = softmax(z) - onehot(y) is all that backward needs, whatever the
coefficients c = dL/dl[y] will be:

    dL/dh = - k c (S W)        dL/dW = - S^T (k c h)        entropy = logsumexp(z) - k (S W + W[y]) . h

so forward computes S W, reads the entropy from it, and keeps S of as many rows as `KEPT_BYTES` hold: for them backward is
one product; the others compute their logits again. Measured for 2048 rows of width 384 and 32768 words on one core, log-prob
with gradient and entropy without, CPU seconds: all rows kept 0.95, none kept 1.20, any quantity (`_Chunked`) 1.44; the four
products alone would take 1.03, three of them 0.77.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

CHUNK_BYTES = 32 << 20
"""Logits of one chunk; where `S` cannot be used, about four temporaries of the same size come on top."""
KEPT_BYTES = 256 << 20
"""What forward may keep of S, so that backward need not compute logits again."""


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
        total = torch.exp(logp).mul_(logp).sum(-1)
        if bool(total.isnan().any()):
            total = torch.exp(logp).mul_(finite(logp)).sum(-1)
        return -total

    def slope(self, logp: Tensor, part: slice) -> Tensor:
        return torch.exp(logp).mul_(finite(logp).add_(1.0)).neg_()


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


def finite(logp: Tensor) -> Tensor:
    """Log-probs with the lowest finite number for -inf, so that 0 times it is 0."""
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
    leaves = (hidden, *head.parameters)
    kept = torch.is_grad_enabled() and any(x.requires_grad for x in leaves) and _is_plain(head, quantities)
    function: Any = _Kept if kept else _Chunked
    return tuple(function.apply(size, head, quantities, *leaves).unbind(0))


class _Chunked(torch.autograd.Function):
    """Any quantities of any head: nothing is kept, backward computes the logits again."""

    @staticmethod
    def forward(ctx: Any, size: int, head: Head, quantities: Sequence[Quantity], hidden: Tensor,
                *parameters: Tensor) -> Tensor:  # fmt: skip
        ctx.size, ctx.head, ctx.quantities, ctx.cast = size, head, quantities, _autocast(hidden.device.type)
        ctx.save_for_backward(hidden, *parameters)
        values = wide(hidden.new_empty(0)).new_empty(len(quantities), len(hidden))
        for part in chunks(len(hidden), size):
            logp = _log_softmax(head, hidden[part])
            for row, quantity in zip(values, quantities, strict=True):
                row[part] = quantity.value(logp, part)
        return values

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        hidden, *parameters = ctx.saved_tensors
        return None, None, None, *_pulled_again(ctx, grad, hidden, parameters)


def _log_softmax(head: Head, hidden: Tensor) -> Tensor:
    """Log-probs [r, V], in the memory of the logits where they are not the hidden states themselves."""
    z = head(hidden)
    return torch.log_softmax(z, -1) if head.linear is None else torch.log_softmax(z, -1, out=z)


def _pulled_again(ctx: Any, grad: Tensor, hidden: Tensor, parameters: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    """dL/dhidden and dL/dparameters from dL/dq [quantities, n], the logits computed once more."""
    into = [torch.zeros_like(p, dtype=wide(p.new_empty(0)).dtype) for p in parameters]
    pulled = torch.zeros_like(hidden) if ctx.needs_input_grad[3] else None
    active = [(q, g) for q, g in zip(ctx.quantities, grad, strict=True) if bool(g.any())]
    with ctx.cast:
        for part in chunks(len(hidden) if active else 0, ctx.size):
            slope = _logit_slope(ctx.head, hidden[part], active, part)
            back = _through_linear(ctx.head.linear, hidden[part], slope, parameters, into)
            if pulled is not None:
                pulled[part] = back
    return pulled, *(g.to(p.dtype) for g, p in zip(into, parameters, strict=True))


# ---- log-prob alone: forward keeps what backward needs -------------------------------------------------------------------
def _is_plain(head: Head, quantities: Sequence[Quantity]) -> bool:
    """Whether z = k W h, and the quantities are one log-prob and perhaps the entropy."""
    kinds = sorted(type(q).__name__ for q in quantities)
    linear = type(head.linear) is nn.Linear and head.linear.bias is None
    return linear and head.cap is None and kinds in (["LogProb"], ["Entropy", "LogProb"])


class _Kept(torch.autograd.Function):
    """One log-prob, and perhaps the entropy, of z = k W h; a gradient that reaches the entropy computes logits again."""

    @staticmethod
    def forward(ctx: Any, size: int, head: Head, quantities: Sequence[Quantity], hidden: Tensor,
                *parameters: Tensor) -> Tensor:  # fmt: skip
        ctx.size, ctx.head, ctx.quantities, ctx.cast = size, head, quantities, _autocast(hidden.device.type)
        ctx.slopes = slopes = _Slopes.of(hidden, head, quantities)
        h, w, k = hidden.to(slopes.dtype), slopes.weight(head), slopes.factor
        kept = h.new_empty(slopes.fits(len(h), size), len(w))
        spare = h.new_empty(min(size, len(h) - len(kept)), len(w))
        values, pull = wide(hidden.new_empty(0)).new_empty(len(quantities), len(h)), torch.empty_like(h)
        for part in chunks(len(h), size):
            into = kept[part] if part.stop <= len(kept) else spare[: part.stop - part.start]
            logp, norm = slopes(h[part], w, part, into)
            torch.mm(into, w, out=pull[part])
            for row, quantity in zip(values, quantities, strict=True):
                mean = (pull[part] + w[slopes.tokens[part]]).mul_(h[part]).sum(-1)
                row[part] = logp if isinstance(quantity, LogProb) else norm - k * mean
        ctx.save_for_backward(hidden, kept, pull, *parameters)
        return values

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        hidden, kept, pull, *parameters = ctx.saved_tensors
        known = [isinstance(q, LogProb) for q in ctx.quantities]
        if any(bool(g.any()) for g, is_logp in zip(grad, known, strict=True) if not is_logp):
            return None, None, None, *_pulled_again(ctx, grad, hidden, parameters)
        slopes = ctx.slopes
        c = (grad[known.index(True)] * -slopes.factor).to(slopes.dtype)[:, None]
        back = (c * pull).to(hidden.dtype) if ctx.needs_input_grad[3] else None
        if not parameters:
            return None, None, None, back
        h, w = hidden.to(slopes.dtype), slopes.weight(ctx.head)
        scaled = c * h
        into = wide(kept.t() @ scaled[: len(kept)])
        spare = h.new_empty(min(ctx.size, len(h) - len(kept)), len(w))
        for part in chunks(len(h), ctx.size):
            if part.stop > len(kept):
                again = spare[: part.stop - part.start]
                slopes(h[part], w, part, again)
                _add_product(into, again, scaled[part])
        return None, None, None, back, into.to(parameters[0].dtype)


@dataclass(frozen=True, slots=True)
class _Slopes:
    """S = softmax(k W h) - onehot(tokens), products in `dtype`, exponentials in float32 or better."""

    tokens: Tensor
    factor: float
    dtype: torch.dtype
    words: int

    @staticmethod
    def of(hidden: Tensor, head: Head, quantities: Sequence[Quantity]) -> _Slopes:
        assert isinstance(head.linear, nn.Linear)
        device = hidden.device.type
        mixed = torch.is_autocast_enabled(device)
        tokens = next(q.tokens for q in quantities if isinstance(q, LogProb))
        dtype = torch.get_autocast_dtype(device) if mixed else hidden.dtype
        return _Slopes(tokens, head.scale / head.temperature, dtype, len(head.linear.weight))

    def weight(self, head: Head) -> Tensor:
        assert isinstance(head.linear, nn.Linear)
        return head.linear.weight.detach().to(self.dtype)

    def fits(self, n: int, size: int) -> int:
        """Rows of S that are kept: all n, or whole chunks."""
        rows = KEPT_BYTES // (self.dtype.itemsize * self.words)
        return n if n <= rows else rows // size * size

    def __call__(self, h: Tensor, w: Tensor, part: slice, into: Tensor) -> tuple[Tensor, Tensor]:
        """(log-prob of the tokens, logsumexp of the logits) [r]; S [r, V] is left in `into`."""
        y = self.tokens[part, None]
        z = wide(torch.mm(h, w.t(), out=into))
        if self.factor != 1.0:
            z.mul_(self.factor)
        chosen = z.gather(-1, y)
        torch.log_softmax(z, -1, out=z)
        logp = z.gather(-1, y)
        z.exp_().scatter_add_(-1, y, z.new_full((len(z), 1), -1.0))
        if z is not into:
            into.copy_(z)
        return logp.squeeze(-1), (chosen - logp).squeeze(-1)


def _add_product(into: Tensor, left: Tensor, right: Tensor) -> None:
    """into += left^T right, in place where dtypes allow."""
    if into.dtype == left.dtype:
        into.addmm_(left.t(), right)
    else:
        into.add_(left.t() @ right)


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
        else:
            _add_product(buffer, slope.to(hidden.dtype), hidden)
    return (slope.to(linear.weight.dtype) @ linear.weight).to(hidden.dtype)


def _autocast(device: str) -> torch.autocast:
    """The mixed precision that is on now, to be entered again in backward."""
    return torch.autocast(device, dtype=torch.get_autocast_dtype(device), enabled=torch.is_autocast_enabled(device))
