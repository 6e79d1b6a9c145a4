"""Functions as graphs: equal to themselves, what is outside read anew, decisions kept or nothing changed."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from unipo.learner import traced
from unipo.learner.traced import Changes, NotNow, Unsuited, graph_of


@pytest.fixture(params=["watched", "native"])
def compiler(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The graph as it was traced, and as native code."""
    if request.param == "watched":
        monkeypatch.setattr(traced, "inductor", lambda graph, example: graph)


class Descent:
    """w <- w - rate * dL/dw with L = mean (x w - y)^2, on batches without a negative x."""

    def __init__(self) -> None:
        self.w = nn.Parameter(torch.tensor([1.0, -2.0, 0.5]))
        self.seen = torch.zeros(())

    def __call__(self, given: Sequence[Tensor]) -> tuple[list[Tensor], Changes]:
        x, y, rate = given
        if not bool((x >= 0).all()):
            raise NotNow
        loss = (x @ self.w - y).square().mean()
        (gradient,) = torch.autograd.grad(loss, [self.w])
        return [loss.detach(), gradient], [(self.w, self.w.detach() - rate * gradient), (self.seen, self.seen + len(x))]


def batch(seed: int) -> list[Tensor]:
    numbers = torch.Generator().manual_seed(seed)
    return [torch.rand(4, 3, generator=numbers), torch.randn(4, generator=numbers), torch.tensor(0.1)]


@pytest.mark.usefixtures("compiler")
def test_a_graph_is_its_function_and_changes_what_it_says() -> None:
    step = Descent()
    graph = graph_of(step, batch(0))
    assert step.w.tolist() == [1.0, -2.0, 0.5], "tracing changes nothing"
    plain = torch.tensor([1.0, -2.0, 0.5])
    for seed in range(1, 4):
        x, y, _ = batch(seed)
        error = x @ plain - y
        agreed, (loss, gradient) = graph(batch(seed))
        assert agreed
        torch.testing.assert_close(loss, error.square().mean())
        torch.testing.assert_close(gradient, 2 * x.T @ error / 4)
        plain = plain - 0.1 * gradient
        torch.testing.assert_close(step.w.detach(), plain)
    assert float(step.seen) == 12
    with torch.no_grad():
        step.w.zero_()
    assert float(graph(batch(5))[1][0]) == pytest.approx(float(batch(5)[1].square().mean())), "weights are read anew"


@pytest.mark.usefixtures("compiler")
def test_another_decision_changes_nothing() -> None:
    step = Descent()
    graph = graph_of(step, batch(0))
    x, y, rate = batch(1)
    agreed, _ = graph([x - 1.0, y, rate])
    assert not agreed
    assert step.w.tolist() == [1.0, -2.0, 0.5]
    assert float(step.seen) == 0


def test_data_that_is_not_for_tracing_says_so() -> None:
    x, y, rate = batch(1)
    with pytest.raises(NotNow):
        graph_of(Descent(), [x - 1.0, y, rate])


def test_numbers_that_are_read_cannot_be_compiled() -> None:
    with pytest.raises(Unsuited, match="reads numbers"):
        graph_of(lambda given: ([given[0] * float(given[0].sum())], []), [torch.ones(3)])


def test_what_fails_in_tracing_is_unsuited_with_its_reason() -> None:
    def fails(given: Sequence[Tensor]) -> tuple[list[Tensor], Changes]:
        raise ValueError("no such thing")

    with pytest.raises(Unsuited, match="ValueError: no such thing"):
        graph_of(fails, [torch.ones(3)])
