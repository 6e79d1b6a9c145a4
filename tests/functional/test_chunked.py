"""Chunked head: values and gradients equal those of full logits, whatever the chunk, the head and the quantity."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from unipo.functional import chunked as chunked_module
from unipo.functional.chunked import Divergence, Entropy, Head, LogProb, chunk_rows, chunked, log_probs
from unipo.functional.divergences import generalised_jsd, kl

N, D, V = 7, 4, 11


class Adapted(nn.Module):
    """A frozen linear map with a trained low-rank one beside it, as LoRA has."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(D, V, bias=False, dtype=torch.float64).requires_grad_(False)
        self.down, self.up = (nn.Linear(a, b, bias=False, dtype=torch.float64) for a, b in ((D, 2), (2, V)))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + 0.5 * self.up(self.down(x))


def heads() -> dict[str, Head]:
    torch.manual_seed(0)
    return {
        "plain": Head(nn.Linear(D, V, bias=False, dtype=torch.float64)),
        "bias, scale, cap, temperature": Head(nn.Linear(D, V, dtype=torch.float64), 1.7, 1.3, 0.6),
        "frozen": Head(nn.Linear(D, V, dtype=torch.float64).requires_grad_(False), cap=2.0),
        "adapted": Head(Adapted(), 0.7, None, 1.4),
        "logits": Head(None, temperature=0.5),
    }


def inputs(head: Head) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    width = V if head.linear is None else D
    hidden = torch.randn(N, width, dtype=torch.float64, generator=generator, requires_grad=True)
    other = torch.log_softmax(torch.randn(N, V, dtype=torch.float64, generator=generator), -1)
    return hidden, torch.randint(0, V, (N,), generator=generator), other


def in_full(hidden: Tensor, head: Head, tokens: Tensor, other: Tensor) -> list[Tensor]:
    """The definitions, one by one, from full logits [N, V]."""
    raw = hidden if head.linear is None else head.linear(hidden)
    z = raw * head.scale
    z = head.cap * torch.tanh(z / head.cap) if head.cap else z
    logp = torch.log_softmax(z / head.temperature, -1)
    p, q = logp.exp(), other.exp()
    return [
        logp[torch.arange(N), tokens],
        -(p * logp).sum(-1),
        (p * (logp - other)).sum(-1),
        (q * (other - logp)).sum(-1),
    ]


@pytest.mark.parametrize("size", [1, 3, 7, 100])
@pytest.mark.parametrize("name", list(heads()))
def test_values_and_gradients_equal_full_logits(name: str, size: int) -> None:
    head = heads()[name]
    hidden, tokens, other = inputs(head)
    sides = [Divergence(kl, lambda part: other[part]), Divergence(lambda p, q: kl(q, p), lambda part: other[part])]
    weight = torch.randn(4, N, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    leaves = [hidden, *head.parameters]
    ours = chunked(hidden, head, [LogProb(tokens), Entropy(), *sides], size)
    full = in_full(hidden, head, tokens, other)
    found = torch.autograd.grad((torch.stack(ours) * weight).sum(), leaves)
    expected = torch.autograd.grad((torch.stack(full) * weight).sum(), leaves)
    for a, b in zip([*ours, *found], [*full, *expected], strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-10)
    assert len(leaves) == 1 + {"plain": 1, "frozen": 0, "adapted": 2, "logits": 0}.get(name, 2)


@pytest.mark.parametrize("rows", [0, 2, 4, 100])
@pytest.mark.parametrize("with_entropy", [False, True])
def test_what_forward_keeps_is_what_backward_needs(
    rows: int, with_entropy: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many rows are kept, and whether or not a gradient reaches the entropy."""
    monkeypatch.setattr(chunked_module, "KEPT_BYTES", rows * V * 8)
    head = Head(nn.Linear(D, V, bias=False, dtype=torch.float64), 1.7, None, 0.6)
    hidden, tokens, other = inputs(head)
    leaves = [hidden, *head.parameters]
    ours = chunked(hidden, head, [Entropy(), LogProb(tokens)], 2)
    logp, entropy = in_full(hidden, head, tokens, other)[:2]
    for a, b in zip(ours, (entropy, logp), strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-10)
    weight = torch.randn(2, N, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    weight[0] *= with_entropy
    found = torch.autograd.grad((torch.stack(ours) * weight).sum(), leaves)
    expected = torch.autograd.grad((torch.stack([entropy, logp]) * weight).sum(), leaves)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-10)


def test_logits_are_computed_once_where_they_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counts, not seconds: chunks of logits in forward and backward, 3 chunks of 3 rows at most."""
    computed: list[slice] = []
    original = chunked_module._Slopes.__call__

    def counting(self: Any, h: Tensor, w: Tensor, part: slice, into: Tensor) -> tuple[Tensor, Tensor]:
        computed.append(part)
        return original(self, h, w, part, into)

    monkeypatch.setattr(chunked_module._Slopes, "__call__", counting)
    for kept, expected in ((N, 3), (4, 5), (0, 6)):
        computed.clear()
        monkeypatch.setattr(chunked_module, "KEPT_BYTES", kept * V * 4)
        linear, hidden = nn.Linear(D, V, bias=False), torch.randn(N, D, requires_grad=True)
        chunked(hidden, Head(linear), [LogProb(torch.zeros(N, dtype=torch.long))], 3)[0].sum().backward()
        assert len(computed) == expected


def test_a_certain_token_keeps_its_small_gradient() -> None:
    """p = 1 - 1e-5 in float32: the gradient is c (1 - p), not the difference of two rounded products."""
    linear = nn.Linear(1, 2, bias=False)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([[6.0], [6.0 - math.log(1e5)]]))
    hidden = torch.ones(1, 1, requires_grad=True)
    chunked(hidden, Head(linear), [LogProb(torch.tensor([0]))], 1)[0].sum().backward()
    assert linear.weight.grad is not None
    torch.testing.assert_close(linear.weight.grad[1, 0], torch.tensor(-1e-5), rtol=1e-3, atol=0.0)
    assert float(hidden.grad) == pytest.approx(math.log(1e5) * 1e-5, rel=0.02)


def test_gradients_equal_finite_differences() -> None:
    head = heads()["bias, scale, cap, temperature"]
    hidden, tokens, other = inputs(head)
    divergence = Divergence(lambda p, q: generalised_jsd(p, q, 0.3), lambda part: other[part])

    def both(h: Tensor) -> Tensor:
        return torch.stack(chunked(h, head, [LogProb(tokens), Entropy(), divergence], 2))

    assert torch.autograd.gradcheck(both, (hidden,))


def test_numbers_by_hand() -> None:
    """Logits log 3 and 0 at temperature 1: p = 3/4, 1/4; H = 2 log 2 - 3/4 log 3; KL to uniform = log 2 - H."""
    logits = torch.tensor([[math.log(3.0), 0.0]], dtype=torch.float64)
    uniform = Divergence(kl, log_probs(torch.zeros(1, 2, dtype=torch.float64), Head(None)))
    logp, entropy, divergence = chunked(logits, Head(None), [LogProb(torch.tensor([1])), Entropy(), uniform], 8)
    h = 2 * math.log(2) - 0.75 * math.log(3)
    assert float(logp) == pytest.approx(math.log(1 / 4))
    assert float(entropy) == pytest.approx(h)
    assert float(divergence) == pytest.approx(math.log(2) - h)


def test_excluded_tokens_add_nothing() -> None:
    logits = torch.tensor([[0.0, 0.0, -torch.inf]], requires_grad=True)
    logp, entropy = chunked(logits, Head(None), [LogProb(torch.tensor([0])), Entropy()], 1)
    (logp + entropy).sum().backward()
    assert float(entropy) == pytest.approx(math.log(2))
    torch.testing.assert_close(logits.grad, torch.tensor([[0.5, -0.5, 0.0]]))


def test_low_precision_weights_accumulate_in_float32() -> None:
    """256 equal rows in chunks of 1: a bfloat16 sum would stop growing once a term is below half its spacing."""
    linear = nn.Linear(1, 2, bias=False, dtype=torch.bfloat16)
    nn.init.zeros_(linear.weight)
    hidden = torch.ones(1024, 1, dtype=torch.bfloat16)
    (logp,) = chunked(hidden, Head(linear), [LogProb(torch.zeros(1024, dtype=torch.long))], 1)
    assert logp.dtype == torch.float32
    logp.sum().backward()
    assert linear.weight.grad is not None
    assert linear.weight.grad.flatten().tolist() == [512.0, -512.0]


def test_mixed_precision_is_that_of_the_forward() -> None:
    linear = nn.Linear(D, V)
    hidden = torch.randn(N, D, requires_grad=True)
    tokens = torch.zeros(N, dtype=torch.long)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (ours,) = chunked(hidden, Head(linear), [LogProb(tokens)], 2)
        full = torch.log_softmax(linear(hidden).float(), -1)[:, 0]
    torch.testing.assert_close(ours, full, atol=1e-6, rtol=1e-6)
    leaves = (hidden, linear.weight)
    for a, b in zip(torch.autograd.grad(ours.sum(), leaves), torch.autograd.grad(full.sum(), leaves), strict=True):
        torch.testing.assert_close(a, b, atol=0.02, rtol=0.02)


def test_no_rows_and_small_budgets() -> None:
    head = heads()["plain"]
    (logp,) = chunked(torch.zeros(0, D, dtype=torch.float64), head, [LogProb(torch.zeros(0, dtype=torch.long))], 4)
    assert logp.shape == (0,)
    assert chunk_rows(1000, 4, 40_000) == 10
    assert chunk_rows(1000, 4, 1) == 1
