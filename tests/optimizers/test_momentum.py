"""The identities of normalised momentum, implicit gradient transport and Hessian-aided recursion (arXiv 2302.01734)."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from unipo.optimizers import (
    Decay,
    HessianAidedRecursive,
    ImplicitGradientTransport,
    NormalisedMomentum,
    StochasticGradient,
    gradient_difference,
)

H = torch.tensor([[2.0, 0.5, 0.0], [0.5, 1.0, -0.3], [0.0, -0.3, 0.7]], dtype=torch.float64)
START = torch.tensor([3.0, -2.0, 1.0], dtype=torch.float64)
NOT_NORMALISED = HessianAidedRecursive(rate=Decay(0.1, 1 / 2), normalise=False)


def two_tensors(theta: Tensor) -> list[Tensor]:
    """The vector as parameters of two shapes."""
    return [theta[:1].clone().reshape(1, 1), theta[1:].clone()]


def joined(tensors: list[Tensor]) -> Tensor:
    return torch.cat([t.detach().reshape(-1) for t in tensors])


def quadratic_gradient(parameters: list[Tensor]) -> list[Tensor]:
    """Of the loss 1/2 theta^T H theta."""
    return two_tensors(H @ joined(parameters))


def exact_difference(parameters: list[Tensor], direction: list[Tensor]) -> list[Tensor]:
    return two_tensors(H @ joined(direction))


def noisy_gradients(seed: int = 0) -> Iterator[list[Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield two_tensors(torch.randn(3, dtype=torch.float64, generator=generator))


def test_the_schedules_have_the_values_of_the_paper() -> None:
    transport, hessian = ImplicitGradientTransport(), HessianAidedRecursive()
    for optimiser in (NormalisedMomentum(), transport, hessian, NOT_NORMALISED):
        assert optimiser.average(0) == 1.0
        assert optimiser.rate(0) == pytest.approx(0.1)
    assert transport.average(2) == pytest.approx(0.5743491774985175)  # 2^(-4/5)
    assert hessian.average(2) == pytest.approx(0.5)
    assert NormalisedMomentum().average(6) == pytest.approx(0.25 ** (2 / 3))
    assert NormalisedMomentum().rate(2) == transport.rate(2) == hessian.rate(2) == pytest.approx(0.05)
    assert NOT_NORMALISED.rate(6) == pytest.approx(0.05)
    assert StochasticGradient().rate(6) == pytest.approx(0.1 * 0.25 ** (2 / 3))


def test_momentum_by_hand() -> None:
    """d_0 = (3, 4); eta_1 = (2/3)^(2/3), d_1 = (1 - eta_1)(3, 4) + eta_1 (0, -1)."""
    optimiser, parameters = NormalisedMomentum(rate=Decay(0.5)), [torch.zeros(2, dtype=torch.float64)]
    state = optimiser.init(parameters)
    state, facts = optimiser.step(parameters, [torch.tensor([3.0, 4.0], dtype=torch.float64)], state)
    assert parameters[0].tolist() == pytest.approx([-0.3, -0.4])
    assert facts == pytest.approx({"rate": 0.5, "average": 1.0, "gradient_norm": 5.0, "momentum_norm": 5.0})
    state, _ = optimiser.step(parameters, [torch.tensor([0.0, -1.0], dtype=torch.float64)], state)
    eta = (2 / 3) ** (2 / 3)
    d = np.array([3 * (1 - eta), 4 * (1 - eta) - eta])
    assert parameters[0].tolist() == pytest.approx(np.array([-0.3, -0.4]) - d / np.linalg.norm(d) / 3)
    assert int(state["step"]) == 2


def test_transport_carries_the_exact_gradient_of_a_quadratic() -> None:
    """(i) With exact gradients, d_t is the gradient at theta_t, not at theta~_t, for every t and any eta."""
    for average in (Decay(1.0, 4 / 5), Decay(0.2, 0.0)):
        optimiser, parameters = ImplicitGradientTransport(rate=Decay(0.7), average=average), two_tensors(START)
        state = optimiser.init(parameters)
        for _ in range(30):
            theta = joined(optimiser.deployed(parameters, state))
            state, _ = optimiser.step(parameters, quadratic_gradient(parameters), state)
            torch.testing.assert_close(state["momentum"], H @ theta)


def test_plain_momentum_lags_on_the_same_quadratic() -> None:
    optimiser, parameters = NormalisedMomentum(rate=Decay(0.7)), two_tensors(START)
    state, theta = optimiser.init(parameters), START
    for _ in range(10):
        theta = joined(parameters)
        state, _ = optimiser.step(parameters, quadratic_gradient(parameters), state)
    assert float((state["momentum"] - H @ theta).norm()) > 0.1


def test_the_hessian_carries_the_exact_gradient_of_a_quadratic() -> None:
    for optimiser in (HessianAidedRecursive(rate=Decay(0.7)), NOT_NORMALISED):
        parameters = two_tensors(START)
        state = optimiser.init(parameters)
        for _ in range(30):
            theta = joined(parameters)
            state, _ = optimiser.step(parameters, quadratic_gradient(parameters), state, exact_difference)
            torch.testing.assert_close(state["momentum"], H @ theta)


def test_without_memory_all_are_reinforce() -> None:
    """(ii) eta = 1: every normalised one steps along the last gradient; HARPG is then stochastic gradient descent."""
    now, rate = Decay(1.0, 0.0), Decay(0.3, 0.5)
    normalised = (
        NormalisedMomentum(rate=rate, average=now),
        ImplicitGradientTransport(rate=rate, average=now),
        HessianAidedRecursive(rate=rate, average=now),
    )
    plain = (StochasticGradient(rate=rate), HessianAidedRecursive(rate=rate, average=now, normalise=False))
    for optimiser in (*normalised, *plain):
        more = (exact_difference,) if isinstance(optimiser, HessianAidedRecursive) else ()
        parameters, expected = two_tensors(START), START
        state = optimiser.init(parameters)
        for t, gradient in enumerate(itertools.islice(noisy_gradients(), 6)):
            state, _ = optimiser.step(parameters, gradient, state, *more)
            length = joined(gradient).norm() if optimiser in normalised else 1.0
            expected = expected - rate(t) * joined(gradient) / length
            torch.testing.assert_close(joined(parameters), expected)
            torch.testing.assert_close(joined(optimiser.deployed(parameters, state)), expected)


@pytest.mark.parametrize("kind", [NormalisedMomentum, ImplicitGradientTransport, HessianAidedRecursive])
def test_the_length_of_a_step_is_its_rate(kind: type) -> None:
    """(iv) |theta_{t+1} - theta_t| = gamma_t whatever the gradients."""
    optimiser, parameters = kind(rate=Decay(0.4)), two_tensors(START)
    more = (exact_difference,) if kind is HessianAidedRecursive else ()
    state, theta = optimiser.init(parameters), START
    for t, gradient in enumerate(itertools.islice(noisy_gradients(), 20)):
        state, facts = optimiser.step(parameters, gradient, state, *more)
        after = joined(optimiser.deployed(parameters, state))
        assert float((after - theta).norm()) == pytest.approx(0.4 * 2 / (t + 2)) == pytest.approx(facts["rate"])
        theta = after


def test_the_parameters_are_left_at_the_extrapolation() -> None:
    """theta~_{t+1} - theta_{t+1} = (1 - eta_{t+1})/eta_{t+1} (theta_{t+1} - theta_t): the eta that will average."""
    optimiser, parameters = ImplicitGradientTransport(rate=Decay(0.4)), two_tensors(START)
    state, theta = optimiser.init(parameters), START
    for t, gradient in enumerate(itertools.islice(noisy_gradients(), 8)):
        state, facts = optimiser.step(parameters, gradient, state)
        after, eta = joined(optimiser.deployed(parameters, state)), (2 / (t + 3)) ** (4 / 5)
        torch.testing.assert_close(joined(parameters), after + (1 - eta) / eta * (after - theta))
        assert facts["reach"] == pytest.approx((1 - eta) / eta * 0.4 * 2 / (t + 2))
        assert [p.shape for p in optimiser.deployed(parameters, state)] == [p.shape for p in parameters]
        theta = after


def test_the_schedules_keep_the_extrapolation_below_the_first_rate() -> None:
    transport = ImplicitGradientTransport(rate=Decay(1.0))
    reaches = [(1 / transport.average(t + 1) - 1) * transport.rate(t) for t in range(100_000)]
    assert max(reaches) < 1.0


def test_the_extrapolation_is_capped() -> None:
    capped, free = ImplicitGradientTransport(rate=Decay(0.4), reach=0.1), ImplicitGradientTransport(rate=Decay(0.4))
    reaches: dict[float, list[float]] = {}
    for optimiser in (capped, free):
        parameters = two_tensors(START)
        state = optimiser.init(parameters)
        for gradient in itertools.islice(noisy_gradients(), 6):
            state, facts = optimiser.step(parameters, gradient, state)
            distance = float((joined(parameters) - joined(optimiser.deployed(parameters, state))).norm())
            assert distance == pytest.approx(facts["reach"])
            reaches.setdefault(optimiser.reach, []).append(distance)
    assert reaches[0.1] == pytest.approx([min(x, 0.1) for x in reaches[float("inf")]])
    assert max(reaches[0.1]) == pytest.approx(0.1)


def test_the_hessian_is_taken_between_the_last_two_points() -> None:
    """Called from the second step on, at q theta_t + (1-q) theta_{t-1}, with w; the parameters are put back."""
    optimiser, parameters = HessianAidedRecursive(rate=Decay(0.4), seed=3), two_tensors(START)
    seen: list[tuple[Tensor, Tensor]] = []

    def difference(at: list[Tensor], direction: list[Tensor]) -> list[Tensor]:
        assert torch.is_grad_enabled()
        seen.append((joined(at), joined(direction)))
        return exact_difference(at, direction)

    state, thetas = optimiser.init(parameters), [START]
    for gradient in itertools.islice(noisy_gradients(), 5):
        state, _ = optimiser.step(parameters, gradient, state, difference)
        thetas.append(joined(parameters))
    assert len(seen) == 4
    shares = []
    for (at, direction), before, after in zip(seen, thetas, thetas[1:], strict=False):
        torch.testing.assert_close(direction, after - before)
        share = (at - before) @ direction / direction.square().sum()
        torch.testing.assert_close(at, before + share * direction)
        shares.append(round(float(share), 6))
    assert all(0 < share < 1 for share in shares)
    assert len(set(shares)) == 4


def test_an_error_of_the_caller_leaves_the_parameters_where_they_were() -> None:
    optimiser, parameters = HessianAidedRecursive(), two_tensors(START)
    state, _ = optimiser.step(parameters, quadratic_gradient(parameters), optimiser.init(parameters), exact_difference)
    before = joined(parameters)
    with pytest.raises(ValueError, match="one tensor per parameter"):
        optimiser.step(parameters, quadratic_gradient(parameters), state, lambda at, w: [torch.zeros(1)])
    assert torch.equal(joined(parameters), before)


# (iii): two decisions under one logit table, rewards at both steps and the second depending on the first.
ARMS, GAMMA = 3, 0.9
FIRST = torch.tensor([0.3, -1.0, 2.0], dtype=torch.float64)
SECOND = torch.tensor([[1.0, 0.0, -2.0], [0.5, 3.0, 0.0], [-1.0, 0.2, 0.7]], dtype=torch.float64)
TRAJECTORIES = torch.tensor(list(itertools.product(range(ARMS), range(ARMS))))


def decisions(parameters: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Log-probabilities [9, 2] of the decisions of all trajectories, and the GPOMDP weights of the loss [9, 2]."""
    shared, table = parameters
    a, b = TRAJECTORIES.T
    first, second = shared.log_softmax(0)[a], (table[a] + shared).log_softmax(1)[torch.arange(len(b)), b]
    later = GAMMA * SECOND[a, b]
    return torch.stack([first, second], 1), -torch.stack([FIRST[a] + later, later], 1)


def loss(parameters: list[Tensor]) -> Tensor:
    log_prob, weight = decisions(parameters)
    return (log_prob.sum(1).exp() * weight[:, 0]).sum()


def points() -> tuple[list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    tables = [torch.randn(s, dtype=torch.float64, generator=generator) for s in [(3,), (3, 3), (3,), (3, 3)]]
    return tables[:2], tables[2:]


def expected_difference(parameters: list[Tensor], direction: list[Tensor]) -> Tensor:
    """E over trajectories of v, by enumeration, at one interpolated point."""
    log_prob, weight = decisions(parameters)
    total = torch.zeros(12, dtype=torch.float64)
    for e in range(len(TRAJECTORIES)):
        one = slice(e, e + 1)
        v = gradient_difference(parameters, direction, log_prob[one].sum(1), (log_prob[one] * weight[one]).sum(1))
        total += float(log_prob[e].sum().detach().exp()) * joined(v)
    return total


def test_the_expected_difference_is_the_hessian_times_the_move() -> None:
    here, other = points()
    parameters, direction = (
        [p.requires_grad_() for p in here],
        [b - a.detach() for a, b in zip(here, other, strict=True)],
    )
    slope = torch.autograd.grad(loss(parameters), parameters, create_graph=True)
    product = torch.autograd.grad(sum((g * w).sum() for g, w in zip(slope, direction, strict=True)), parameters)  # type: ignore[arg-type]
    torch.testing.assert_close(expected_difference(parameters, direction), joined(list(product)))


def test_the_expected_difference_over_q_is_the_change_of_the_gradient() -> None:
    """(iii) E over q (Gauss-Legendre, 24 nodes) and trajectories (enumerated) of v = grad L(theta_t) - grad L(theta_{t-1})."""
    before, after = points()
    direction = [b - a for a, b in zip(before, after, strict=True)]
    nodes, weights = np.polynomial.legendre.leggauss(24)
    total = torch.zeros(12, dtype=torch.float64)
    for q, weight in zip((nodes + 1) / 2, weights / 2, strict=True):
        between = [(q * b + (1 - q) * a).requires_grad_() for a, b in zip(before, after, strict=True)]
        total += weight * expected_difference(between, direction)

    def gradient(point: list[Tensor]) -> Tensor:
        leaves = [p.clone().requires_grad_() for p in point]
        return joined(list(torch.autograd.grad(loss(leaves), leaves)))

    torch.testing.assert_close(total, gradient(after) - gradient(before), atol=1e-8, rtol=1e-6)


def test_a_batch_is_the_mean_of_its_trajectories() -> None:
    """Not a product of batch means: v of a batch is the mean of the single v."""
    here, other = points()
    parameters, direction = [p.requires_grad_() for p in here], other
    log_prob, weight = decisions(parameters)
    score, surrogate = log_prob.sum(1), (log_prob * weight).sum(1)
    singles = [
        joined(gradient_difference(parameters, direction, score[e : e + 1], surrogate[e : e + 1])) for e in range(9)
    ]
    together = gradient_difference(parameters, direction, score, surrogate)
    torch.testing.assert_close(joined(together), torch.stack(singles).mean(0))
    assert [v.shape for v in together] == [p.shape for p in parameters]


def test_a_gaussian_arm_by_hand() -> None:
    """Mean m, std s, action a, loss c: v = w (-1/s^2 + (a-m)^2/s^4) c, for one parameter."""
    mean = torch.tensor([0.5], dtype=torch.float64, requires_grad=True)
    log_prob = -((2.0 - mean) ** 2) / (2 * 0.8**2)
    (v,) = gradient_difference([mean], [torch.tensor([0.3], dtype=torch.float64)], log_prob, 1.7 * log_prob)
    assert float(v) == pytest.approx(0.3 * 1.7 * (-1 / 0.64 + 1.5**2 / 0.64**2))


@pytest.mark.parametrize(
    "optimiser", [StochasticGradient(), NormalisedMomentum(), ImplicitGradientTransport(), HessianAidedRecursive()]
)
def test_a_saved_state_goes_on_as_if_never_stopped(optimiser: HessianAidedRecursive, tmp_path: Path) -> None:
    more = (exact_difference,) if isinstance(optimiser, HessianAidedRecursive) else ()
    gradients = list(itertools.islice(noisy_gradients(), 8))
    parameters = two_tensors(START)
    state = optimiser.init(parameters)
    for t, gradient in enumerate(gradients):
        if t == 4:
            save_file({**state, "a": parameters[0], "b": parameters[1]}, tmp_path / "state.safetensors")
        state, _ = optimiser.step(parameters, gradient, state, *more)
    loaded = load_file(tmp_path / "state.safetensors")
    again = [loaded.pop("a"), loaded.pop("b")]
    for gradient in gradients[4:]:
        loaded, _ = optimiser.step(again, gradient, loaded, *more)
    assert torch.equal(joined(again), joined(parameters))
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[name], state[name]) for name in state)


def test_a_step_does_not_touch_the_old_state_nor_record_a_graph() -> None:
    optimiser, parameters = ImplicitGradientTransport(), [START.clone().requires_grad_()]
    first = optimiser.init(parameters)
    kept = {name: value.clone() for name, value in first.items()}
    second, _ = optimiser.step(parameters, [H @ START], first)
    assert all(torch.equal(first[name], kept[name]) for name in kept)
    assert parameters[0].is_leaf
    assert parameters[0].requires_grad
    assert not any(value.requires_grad for value in second.values())


def test_no_gradient_no_step() -> None:
    for optimiser in (NormalisedMomentum(), ImplicitGradientTransport()):
        parameters = [START.clone()]
        optimiser.step(parameters, [torch.zeros_like(START)], optimiser.init(parameters))
        assert torch.equal(parameters[0], START)


def test_bad_input_is_told() -> None:
    optimiser, parameters = NormalisedMomentum(), two_tensors(START)
    state = optimiser.init(parameters)
    with pytest.raises(ValueError, match="one tensor per parameter"):
        optimiser.step(parameters, [START], state)
    with pytest.raises(ValueError, match="1 entries"):
        optimiser.step(parameters, [parameters[0] * torch.inf, parameters[1]], state)
    with pytest.raises(ValueError, match="one dtype"):
        optimiser.step([parameters[0].float(), parameters[1]], parameters, state)
    with pytest.raises(ValueError, match="start > 0"):
        Decay(0.0)
    with pytest.raises(ValueError, match="reach"):
        ImplicitGradientTransport(reach=-1.0)
    with pytest.raises(ValueError, match=r"one shape \[E\]"):
        gradient_difference([START], [START], torch.zeros(3, 2), torch.zeros(3))
