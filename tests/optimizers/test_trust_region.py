"""Natural and trust-region steps against closed forms."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from unipo.optimizers import TrustRegion, conjugate_gradient, hessian_vector_product


def spd(n: int, seed: int) -> Tensor:
    drawn = torch.randn(n, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return drawn @ drawn.T + 0.1 * torch.eye(n, dtype=torch.float64)


class Bandit:
    """Softmax over arms in a few contexts; the loss is minus the expected reward, everything exact."""

    def __init__(self, rewards: Tensor, logits: Tensor) -> None:
        self.rewards, self.logits = rewards, logits.clone().requires_grad_()
        self.old = self.logits.detach().log_softmax(-1)

    def loss(self) -> Tensor:
        return -(self.logits.softmax(-1) * self.rewards).sum(-1).mean()

    def kl(self) -> Tensor:
        return (self.old.exp() * (self.old - self.logits.log_softmax(-1))).sum(-1).mean()

    def gradient(self) -> list[Tensor]:
        return list(torch.autograd.grad(self.loss(), [self.logits]))


def bandit(seed: int, contexts: int = 1, scale: float = 1.0) -> Bandit:
    generator = torch.Generator().manual_seed(seed)
    rewards, logits = torch.randn(2, contexts, 5, dtype=torch.float64, generator=generator)
    return Bandit(scale * rewards, logits)


def test_conjugate_gradients_solve_in_as_many_iterations_as_unknowns() -> None:
    a, b = spd(6, 0), torch.arange(1.0, 7.0, dtype=torch.float64)
    torch.testing.assert_close(conjugate_gradient(lambda x: a @ x, b, iterations=6), torch.linalg.solve(a, b))
    assert not torch.allclose(conjugate_gradient(lambda x: a @ x, b, iterations=3), torch.linalg.solve(a, b))


def test_conjugate_gradients_stop_at_the_tolerance_and_at_no_curvature() -> None:
    calls = []

    def identity(x: Tensor) -> Tensor:
        calls.append(x)
        return x

    b = torch.tensor([3.0, 4.0], dtype=torch.float64)
    assert conjugate_gradient(identity, b, iterations=50).tolist() == [3.0, 4.0]
    assert len(calls) == 2
    assert conjugate_gradient(lambda x: -x, b).tolist() == [0.0, 0.0]
    assert conjugate_gradient(identity, torch.zeros(2)).tolist() == [0.0, 0.0]


def test_conjugate_gradients_find_the_least_norm_of_a_singular_system() -> None:
    a = torch.diag(torch.tensor([2.0, 4.0, 0.0], dtype=torch.float64))
    found = conjugate_gradient(lambda x: a @ x, torch.tensor([2.0, 2.0, 0.0], dtype=torch.float64))
    torch.testing.assert_close(found, torch.tensor([1.0, 0.5, 0.0], dtype=torch.float64))


def test_the_hessian_of_kl_is_the_fisher_matrix() -> None:
    problem = bandit(3)
    p = problem.old.exp()[0]
    product = hessian_vector_product(problem.kl(), [problem.logits])
    found = torch.stack([product(e) for e in torch.eye(5, dtype=torch.float64)])
    torch.testing.assert_close(found, torch.diag(p) - torch.outer(p, p))


@pytest.mark.parametrize("contexts", [1, 3])
def test_the_natural_gradient_of_a_softmax_is_the_advantage(contexts: int) -> None:
    """F^+ grad J = A up to a constant per context: the Fisher matrix cancels the probabilities."""
    problem = bandit(1, contexts)
    before = problem.logits.detach().clone()
    advantage = problem.rewards - (before.softmax(-1) * problem.rewards).sum(-1, keepdim=True)
    natural = TrustRegion(line_search=False, damping=0.0, max_kl=0.02, cg_iterations=60)
    facts = natural.step([problem.logits], problem.gradient(), problem.kl, problem.loss)
    step = problem.logits.detach() - before
    expected = advantage - advantage.mean(-1, keepdim=True)
    torch.testing.assert_close(step / step.norm(), expected / expected.norm(), atol=1e-6, rtol=1e-6)
    p = before.softmax(-1)
    squares = (p * step.square()).sum(-1) - (p * step).sum(-1).square()
    assert 0.5 * float(squares.mean()) == pytest.approx(0.02, rel=1e-6)
    assert facts["step_norm"] == pytest.approx(float(step.norm()))
    assert (facts["backtracks"], facts["improved"]) == (0.0, 1.0)
    assert facts["kl"] == pytest.approx(float(problem.kl().detach())) == pytest.approx(0.02, rel=0.5)


def quadratic(fisher: Tensor, hessian: Tensor, start: Tensor) -> tuple[list[Tensor], Callable[[], Tensor], ...]:  # type: ignore[misc]
    """theta in two tensors, KL = 1/2 s^T F s exactly, loss = 1/2 theta^T H theta."""
    parameters = [start[:2].clone().requires_grad_(), start[2:].clone().reshape(1, -1).requires_grad_()]

    def theta() -> Tensor:
        return torch.cat([p.reshape(-1) for p in parameters])

    def kl() -> Tensor:
        return 0.5 * (theta() - start) @ fisher @ (theta() - start)

    return parameters, theta, kl, lambda: 0.5 * theta() @ hessian @ theta()  # type: ignore[return-value]


def test_a_quadratic_step_is_known_in_closed_form() -> None:
    fisher, hessian = spd(4, 1), torch.eye(4, dtype=torch.float64)
    start = 10 * torch.tensor([1.0, -2.0, 3.0, 4.0], dtype=torch.float64)
    parameters, theta, kl, loss = quadratic(fisher, hessian, start)
    gradient = torch.autograd.grad(loss(), parameters)
    TrustRegion(line_search=False, damping=0.3, max_kl=0.05).step(parameters, gradient, kl, loss)
    damped = fisher + 0.3 * torch.eye(4, dtype=torch.float64)
    x = torch.linalg.solve(damped, -start)
    expected = (2 * 0.05 / (x @ damped @ x)).sqrt() * x
    torch.testing.assert_close(theta().detach() - start, expected)
    assert 0.5 * float(expected @ damped @ expected) == pytest.approx(0.05)


def test_the_line_search_halves_until_the_loss_falls() -> None:
    """Loss theta^2/2 at 1, step -8 -> losses at -7, -3, -1 are no better, at 0 it is: three halvings."""
    one = torch.ones(1, dtype=torch.float64)
    parameter = one.clone().requires_grad_()
    facts = TrustRegion(damping=0.0, max_kl=32.0).step(
        [parameter], [one], lambda: 0.5 * (parameter - 1).square().sum(), lambda: 0.5 * parameter.square().sum()
    )
    assert float(parameter.detach()) == pytest.approx(0.0, abs=1e-12)
    assert facts == pytest.approx({"kl": 0.5, "step_norm": 1.0, "backtracks": 3.0, "improved": 1.0})


@pytest.mark.parametrize("max_kl", [1e-4, 0.03, 1.0, 20.0])
@pytest.mark.parametrize("noise", [0.0, 3.0])
def test_the_line_search_never_breaks_its_promises(max_kl: float, noise: float) -> None:
    """KL <= max_kl and no rise of the loss, with good and with misleading gradients, step after step."""
    generator = torch.Generator().manual_seed(0)
    problem, region, moved = bandit(5, 2, scale=5.0), TrustRegion(max_kl=max_kl, damping=1e-3), 0.0
    for _ in range(15):
        problem = Bandit(problem.rewards, problem.logits.detach())
        before = float(problem.loss().detach())
        gradient = problem.gradient()[0]
        gradient = gradient + noise * torch.randn(gradient.shape, dtype=torch.float64, generator=generator)
        facts = region.step([problem.logits], [gradient], problem.kl, problem.loss)
        assert facts["kl"] == pytest.approx(float(problem.kl().detach()), abs=1e-12)
        assert facts["kl"] <= max_kl
        assert float(problem.loss().detach()) <= before
        assert (float(problem.loss().detach()) < before) == bool(facts["improved"])
        moved += facts["step_norm"]
    assert moved > 0


def test_where_no_step_helps_the_parameters_stay() -> None:
    problem = bandit(2)
    before = problem.logits.detach().clone()
    uphill = [-g for g in problem.gradient()]
    facts = TrustRegion(backtracks=4).step([problem.logits], uphill, problem.kl, problem.loss)
    assert facts == {"kl": 0.0, "step_norm": 0.0, "backtracks": 4.0, "improved": 0.0}
    assert torch.equal(problem.logits, before)
    zero = TrustRegion(line_search=False).step([problem.logits], [0 * uphill[0]], problem.kl, problem.loss)
    assert zero["step_norm"] == 0.0
    assert torch.equal(problem.logits, before)


def test_bad_input_is_told() -> None:
    problem = bandit(2)
    with pytest.raises(ValueError, match="one tensor per parameter"):
        TrustRegion().step([problem.logits], [torch.zeros(3)], problem.kl, problem.loss)
    with pytest.raises(ValueError, match="finite gradient"):
        TrustRegion().step([problem.logits], [problem.logits * torch.nan], problem.kl, problem.loss)
    with pytest.raises(ValueError, match="shrink"):
        TrustRegion(shrink=1.0)
