"""Normalised momentum with less bias: implicit gradient transport and Hessian-aided recursive policy gradients.

All follow Fatkhullin, Barakat, Kireeva and He (ICML 2023, arXiv 2302.01734), with the schedules of their code. They
*minimise*: g estimates the gradient of a loss L = -J, so steps go down; the paper's letters are otherwise kept:
theta_t the parameters, d_t the averaged gradient, eta_t its averaging weight, gamma_t the step size; t = 0, 1, ...

An optimiser is a frozen configuration. What changes is a plain dictionary of tensors, made by `init` and replaced by
`step`, ready for safetensors. Parameters are moved in place; they share one dtype and device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from unipo.optimizers.vectors import assign, flat, flat_gradient, matched, unflat

State = dict[str, Tensor]
"""Name -> tensor: vectors [P] over all parameters, and `step` t, a 0-d integer."""

Parameters = Sequence[Tensor]
Difference = Callable[[list[Tensor], list[Tensor]], Sequence[Tensor]]
"""(parameters, direction w) -> an estimate of H(parameters) w, H the Hessian of the loss; one tensor per parameter."""


@dataclass(frozen=True, slots=True)
class Decay:
    """start * (2 / (t + 2))^power: `start` at t = 0, constant for power 0."""

    start: float
    power: float = 1.0

    def __post_init__(self) -> None:
        if not (self.start > 0 and self.power >= 0):
            raise ValueError(f"expected start > 0 and power >= 0, found {self}: power 0 is a constant")

    def __call__(self, t: int) -> float:
        return self.start * (2 / (t + 2)) ** self.power


def unit(d: Tensor) -> Tensor:
    """d / |d|, and 0 for d = 0."""
    return d / d.norm().clamp(min=torch.finfo(d.dtype).tiny)


def averaging_weight(average: Decay, t: int) -> float:
    """eta_t; the first average is the first gradient, so eta_0 = 1 whatever the schedule."""
    return min(average(t), 1.0) if t else 1.0


def initial(parameters: Parameters, *names: str) -> State:
    """t = 0 and a vector of zeros [P] for each name."""
    return {"step": torch.tensor(0), **{name: torch.zeros_like(flat(parameters)) for name in names}}


@dataclass(frozen=True, slots=True, kw_only=True)
class StochasticGradient:
    """theta_{t+1} = theta_t - gamma_t g_t, gamma_t = g0 (2/(t+2))^{2/3}: the paper's plain baseline."""

    rate: Decay = Decay(0.1, 2 / 3)

    def init(self, parameters: Parameters) -> State:
        return initial(parameters)

    def step(self, parameters: Parameters, gradient: Sequence[Tensor], state: State) -> tuple[State, dict[str, float]]:
        """As of `NormalisedMomentum`, without its average."""
        t, g = int(state["step"]), matched(parameters, gradient)
        gamma = self.rate(t)
        assign(parameters, flat(parameters) - gamma * g)
        return {"step": torch.tensor(t + 1)}, {"rate": gamma, "gradient_norm": float(g.norm())}

    def deployed(self, parameters: Parameters, state: State) -> list[Tensor]:
        return [p.detach().clone() for p in parameters]


@dataclass(frozen=True, slots=True, kw_only=True)
class NormalisedMomentum:
    """Steps of length gamma_t along an average of gradients (Cutkosky and Mehta, 2020, arXiv 2002.03305).

        d_t = (1 - eta_t) d_{t-1} + eta_t g(theta_t),   theta_{t+1} = theta_t - gamma_t d_t / |d_t|

    eta_t = (2/(t+2))^{2/3}, gamma_t = 2 g0/(t+2).
    """

    rate: Decay = Decay(0.1)
    average: Decay = Decay(1.0, 2 / 3)

    def init(self, parameters: Parameters) -> State:
        return initial(parameters, "momentum")

    def step(self, parameters: Parameters, gradient: Sequence[Tensor], state: State) -> tuple[State, dict[str, float]]:
        """Move the parameters in place, by `gradient`: of the loss to be minimised, estimated where they are now.

        Returns the next state and facts: `rate` gamma_t, `average` eta_t, and the norms of g and d.
        Raises ValueError for a gradient that does not fit the parameters or is not finite.
        """
        t, g = int(state["step"]), matched(parameters, gradient)
        eta, gamma = averaging_weight(self.average, t), self.rate(t)
        d = (1 - eta) * state["momentum"] + eta * g
        assign(parameters, flat(parameters) - gamma * unit(d))
        facts = {"rate": gamma, "average": eta, "gradient_norm": float(g.norm()), "momentum_norm": float(d.norm())}
        return {"step": torch.tensor(t + 1), "momentum": d}, facts

    def deployed(self, parameters: Parameters, state: State) -> list[Tensor]:
        """theta_t: what to evaluate and to keep."""
        return [p.detach().clone() for p in parameters]


@dataclass(frozen=True, slots=True, kw_only=True)
class ImplicitGradientTransport:
    """N-PG-IGT: normalised momentum with gradients taken at an extrapolation, which cancels its first-order bias.

        theta~_t = theta_t + (1 - eta_t)/eta_t (theta_t - theta_{t-1}),   theta_{-1} = theta_0
        d_t = (1 - eta_t) d_{t-1} + eta_t g(theta~_t),   theta_{t+1} = theta_t - gamma_t d_t / |d_t|

    eta_t = (2/(t+2))^{4/5}, gamma_t = 2 g0/(t+2). On a quadratic with exact gradients d_t is the gradient at theta_t.

    Between steps the parameters are at theta~, where the next trajectories are to be sampled; theta is in the state, see
    `deployed`. |theta~ - theta| is at most `reach` (the schedules by themselves keep it below g0). The authors' code
    extrapolates with the eta of the step before; here it is the one that averages.
    """

    rate: Decay = Decay(0.1)
    average: Decay = Decay(1.0, 4 / 5)
    reach: float = math.inf

    def __post_init__(self) -> None:
        if not self.reach >= 0:
            raise ValueError(f"expected reach >= 0, found {self.reach}: inf for no cap, 0 for normalised momentum")

    def init(self, parameters: Parameters) -> State:
        return initial(parameters, "momentum") | {"theta": flat(parameters)}

    def step(self, parameters: Parameters, gradient: Sequence[Tensor], state: State) -> tuple[State, dict[str, float]]:
        """Move the parameters in place from theta~_t to theta~_{t+1}; `gradient` was estimated at theta~_t.

        Returns the next state and the facts of `NormalisedMomentum` with `reach`, |theta~_{t+1} - theta_{t+1}|.
        Raises ValueError for a gradient that does not fit the parameters or is not finite.
        """
        t, g = int(state["step"]), matched(parameters, gradient)
        eta, gamma = averaging_weight(self.average, t), self.rate(t)
        d = (1 - eta) * state["momentum"] + eta * g
        theta = state["theta"] - gamma * unit(d)
        ahead = self._ahead(theta - state["theta"], averaging_weight(self.average, t + 1))
        assign(parameters, theta + ahead)
        facts = {"rate": gamma, "average": eta, "gradient_norm": float(g.norm()), "momentum_norm": float(d.norm())}
        return {"step": torch.tensor(t + 1), "momentum": d, "theta": theta}, facts | {"reach": float(ahead.norm())}

    def _ahead(self, move: Tensor, eta: float) -> Tensor:
        """(1 - eta)/eta * move, no longer than `reach`."""
        distance = (1 - eta) / eta * float(move.norm())
        return min(distance, self.reach) * unit(move)

    def deployed(self, parameters: Parameters, state: State) -> list[Tensor]:
        """theta_t: what to evaluate and to keep, in the shapes of the parameters."""
        return [part.clone() for part in unflat(state["theta"], parameters)]


@dataclass(frozen=True, slots=True, kw_only=True)
class HessianAidedRecursive:
    """N-HARPG: momentum whose old average is carried to the new point by a Hessian-vector product.

        theta^ = q theta_t + (1 - q) theta_{t-1},  q ~ U[0, 1],   v estimates H(theta^) w,   w = theta_t - theta_{t-1}
        d_t = (1 - eta_t)(d_{t-1} + v) + eta_t g(theta_t),        theta_{t+1} = theta_t - gamma_t d_t / |d_t|

    Over q, E v is the exact change of the gradient from theta_{t-1} to theta_t. eta_t = 2/(t+2), gamma_t = 2 g0/(t+2).
    HARPG, `HessianAidedRecursive(normalise=False, rate=Decay(g0, 1/2))`, takes d_t as it is. q is a function of `seed`
    and t. We follow the paper: the authors' code multiplies batch means and opposes the signs of the two parts of v.
    """

    rate: Decay = Decay(0.1)
    average: Decay = Decay(1.0)
    normalise: bool = True
    seed: int = 0

    def init(self, parameters: Parameters) -> State:
        return initial(parameters, "momentum") | {"previous": flat(parameters)}

    def step(
        self, parameters: Parameters, gradient: Sequence[Tensor], state: State, difference: Difference
    ) -> tuple[State, dict[str, float]]:
        """Move the parameters in place; `gradient` was estimated at them.

        difference: (parameters, w) -> v. It is called once, from the second step on, while the parameters are at theta^:
        it samples trajectories there and differentiates, see `gradient_difference`.

        Returns the next state and the facts of `NormalisedMomentum` with `difference_norm`, |v|.
        Raises ValueError for a gradient or v that does not fit the parameters or is not finite.
        """
        t, g, theta = int(state["step"]), matched(parameters, gradient), flat(parameters)
        eta, gamma = averaging_weight(self.average, t), self.rate(t)
        v = self._difference(parameters, state["previous"], t, difference) if t else torch.zeros_like(g)
        d = (1 - eta) * (state["momentum"] + v) + eta * g
        assign(parameters, theta - gamma * (unit(d) if self.normalise else d))
        facts = {"rate": gamma, "average": eta, "gradient_norm": float(g.norm()), "momentum_norm": float(d.norm())}
        return (
            {"step": torch.tensor(t + 1), "momentum": d, "previous": theta},
            facts | {"difference_norm": float(v.norm())},
        )

    def _difference(self, parameters: Parameters, previous: Tensor, t: int, difference: Difference) -> Tensor:
        """v [P] at theta^; the parameters are back at theta_t afterwards."""
        theta, q = flat(parameters), float(np.random.default_rng((self.seed, t)).random())
        try:
            assign(parameters, q * theta + (1 - q) * previous)
            with torch.enable_grad():
                return matched(parameters, difference(list(parameters), unflat(theta - previous, parameters)))
        finally:
            assign(parameters, theta)

    def deployed(self, parameters: Parameters, state: State) -> list[Tensor]:
        """theta_t: what to evaluate and to keep."""
        return [p.detach().clone() for p in parameters]


def gradient_difference(
    parameters: Parameters, direction: Sequence[Tensor], log_prob: Tensor, surrogate: Tensor
) -> list[Tensor]:
    """v = mean over trajectories of  grad <g, w> + <grad log p, w> g,   g = grad surrogate  (arXiv 2302.01734).

    log_prob: [E] log p(tau) of whole trajectories that were sampled at the parameters, sums over their steps.
    surrogate: [E] scalars whose gradients are the estimates g(tau), for GPOMDP of a loss
    -sum_h log pi(a_h|s_h) sum_{t>=h} gamma^t r_t. Both carry their graphs. direction: w, one tensor per parameter.

    Returns v, detached, one tensor per parameter: unbiased for H w, H the Hessian of the expected loss. The product is
    taken per trajectory: the mean of products is not the product of means. Raises ValueError for unequal shapes.
    """
    if log_prob.ndim != 1 or log_prob.shape != surrogate.shape:
        raise ValueError(
            f"expected log_prob and surrogate of one shape [E], found {tuple(log_prob.shape)} and "
            f"{tuple(surrogate.shape)}: sum each over the steps of a trajectory, with no mean over trajectories"
        )
    w = matched(parameters, direction)
    slope = _directional(log_prob, parameters, w)
    g = flat_gradient(surrogate.mean(), parameters, create_graph=True)
    v = flat_gradient(g @ w + (slope * surrogate).mean(), parameters)
    return unflat(v, parameters)


def _directional(values: Tensor, parameters: Parameters, w: Tensor) -> Tensor:
    """[E] derivatives of the values [E] along w, detached: <grad (u . values), w> is linear in u, its slope is wanted."""
    u = torch.ones_like(values, requires_grad=True)
    along = flat_gradient(u @ values, parameters, create_graph=True) @ w
    return torch.autograd.grad(along, u, retain_graph=True)[0]
