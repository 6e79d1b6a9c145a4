"""Quantities of the whole distribution: definitions, chunks, draws."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from unipo.episodes import Episodes
from unipo.functional.chunked import Head, chunked
from unipo.functional.quantities import PLAIN, Share, Shares, Tempered, measured, parametric, quantity

N, D, V = 7, 4, 11
NAMES = ["logp", "entropy", "collision", "tempered:1.7", "tempered_share:1.7", "drawn:1.7:5", "drawn_share:1.7:5"]


def steps(draw: int = 0) -> Episodes:
    tokens = torch.randint(0, V, (N,), generator=torch.Generator().manual_seed(1)).tolist()
    made = Episodes.build([tokens[:3], tokens[3:]], [[0], [0]])
    return made.with_columns("episode", draw=torch.tensor([draw, draw + 1]))


def inputs() -> Tensor:
    return torch.randn(N, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1), requires_grad=True)


def in_full(logits: Tensor, episodes: Episodes) -> dict[str, Tensor]:
    """The definitions from full logits [N, V]; draws by the cumulative distribution, one by one."""
    logp, y = logits.log_softmax(-1), episodes["token"][:, None]
    q = (logp / 1.7).softmax(-1).detach()
    drawn = Shares(Tempered(1.7), quantity("drawn:1.7:5", episodes).q.key, 5)(logp.detach(), slice(0, N))  # type: ignore[attr-defined]
    return {
        "logp": logp.gather(1, y)[:, 0], "entropy": -(logp.exp() * logp).sum(1), "collision": (logp.exp() ** 2).sum(1),
        "tempered:1.7": (q * logp).sum(1), "tempered_share:1.7": q.gather(1, y)[:, 0],
        "drawn:1.7:5": (drawn * logp).sum(1), "drawn_share:1.7:5": drawn.gather(1, y)[:, 0],
    }  # fmt: skip


@pytest.mark.parametrize("size", [1, 3, 100])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_values_and_gradients_equal_full_logits(size: int, temperature: float) -> None:
    torch.manual_seed(0)
    head, hidden, episodes = Head(nn.Linear(D, V, dtype=torch.float64), temperature=temperature), inputs(), steps()
    ours = chunked(hidden, head, [quantity(n, episodes) for n in NAMES], size)
    full = in_full(head(hidden), episodes)
    weight = torch.randn(len(NAMES), N, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    leaves = [hidden, *head.parameters]
    found = torch.autograd.grad((torch.stack(ours) * weight).sum(), leaves)
    expected = torch.autograd.grad((torch.stack([full[n] for n in NAMES]) * weight).sum(), leaves)
    for a, b in zip([*ours, *found], [*full.values(), *expected], strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-10)


def test_quantities_of_logits_are_those_of_the_head() -> None:
    logits, episodes = torch.randn(N, V, dtype=torch.float64), steps()
    for name, value in measured(NAMES, logits, episodes).items():
        torch.testing.assert_close(value, in_full(logits, episodes)[name])


def test_excluded_tokens_are_never_drawn_and_add_nothing() -> None:
    logits = torch.randn(N, V, dtype=torch.float64)
    logits[:, ::2] = -torch.inf
    q = Shares(Tempered(1.3), torch.arange(N), 400)(logits.log_softmax(-1), slice(0, N))
    assert not q[:, ::2].any()
    torch.testing.assert_close(q.sum(1), torch.ones(N, dtype=torch.float64))
    for name, value in measured(NAMES, logits, steps()).items():
        assert name == "logp" or value.isfinite().all(), name


def test_draws_follow_the_distribution_and_their_key() -> None:
    """A thousand rows of 50 draws: shares within 4 standard errors; another `draw`, other draws; the same, the same."""
    logp = torch.randn(1, V, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    rows = logp.expand(1000, V)
    q = Shares(Tempered(1.3), torch.arange(1000) * 77, 50)(rows, slice(0, 1000))
    exact = (logp / 1.3).softmax(-1)
    assert ((q.mean(0) - exact).abs() < 4 * (exact * (1 - exact) / 50_000).sqrt()).all()
    logits = torch.randn(N, V, dtype=torch.float64)
    one, same, other = (measured(["drawn:1.3:4"], logits, steps(i))["drawn:1.3:4"] for i in (0, 0, 5))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_names() -> None:
    assert parametric([*NAMES, "value", "reverse_kl:teacher"]) == frozenset(NAMES) - PLAIN
    for wrong in (
        "tempered",
        "tempered:0",
        "tempered:x",
        "tempered:1.3:5",
        "drawn:1.3",
        "drawn:1.3:0",
        "drawn_share:1.3:a",
    ):
        with pytest.raises(ValueError, match="expected tempered:KAPPA or drawn:KAPPA:K"):
            parametric([wrong])
    with pytest.raises(KeyError, match="no quantity is called 'q'"):
        quantity("q", steps())
    with pytest.raises(KeyError, match="draw"):
        quantity("drawn:1.3:4", steps().without("draw"))
    assert isinstance(quantity("tempered_share:2", steps()), Share)
