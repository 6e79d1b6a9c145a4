"""Natural policy gradient and trust-region policy optimisation: steps measured in KL, not in parameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from unipo.optimizers.vectors import Matvec, assign, flat, flat_gradient, matched


def conjugate_gradient(matvec: Matvec, b: Tensor, iterations: int = 10, tolerance: float = 1e-10) -> Tensor:
    """Solve A x = b for a symmetric positive A given by x -> A x, starting at 0 (Hestenes and Stiefel, 1952).

    b: [P]; returns x [P]. In exact arithmetic x is right after P iterations; if A is singular and b in its range, x is
    the solution of least norm. Stops early when |b - A x| <= tolerance * |b|, or when a direction has no positive
    curvature (A is not positive, or rounding has won): what was found until then is returned.
    """
    x, residual = torch.zeros_like(b), b.clone()
    direction, rr = residual, residual @ residual
    least = tolerance**2 * rr
    for _ in range(iterations):
        a_direction = matvec(direction)
        curvature = direction @ a_direction
        if rr <= least or not curvature > 0:
            break
        alpha = rr / curvature
        x = x + alpha * direction
        residual = residual - alpha * a_direction
        rr, rr_before = residual @ residual, rr
        direction = residual + rr / rr_before * direction
    return x


def hessian_vector_product(scalar: Tensor, parameters: Sequence[Tensor]) -> Matvec:
    """v [P] -> H v [P], H the Hessian of the scalar at the parameters, by differentiating <grad, v>.

    Of the mean KL(old || new) at new = old, H is the Fisher information matrix.
    """
    gradient = flat_gradient(scalar, parameters, create_graph=True)

    def product(v: Tensor) -> Tensor:
        return flat_gradient(gradient @ v, parameters)

    return product


@dataclass(frozen=True, slots=True, kw_only=True)
class TrustRegion:
    """Minimise the linearised loss in the ball 1/2 s^T F s <= max_kl (Schulman et al., 2015, arXiv 1502.05477).

        F = Fisher + damping I,   x = -F^-1 g by conjugate gradients,   s = sqrt(2 max_kl / x^T F x) x

    Then s, shrink s, shrink^2 s, ... are tried (1 + `backtracks` of them), and the first is taken that lowers the loss
    and has KL <= max_kl; if there is none, the parameters stay. Departures from the paper's code: the KL is checked
    without slack, and any decrease of the loss will do. `line_search=False` takes s as it is: the natural policy
    gradient with its step length set in KL (Kakade, 2001; Peters and Schaal, 2008).
    """

    max_kl: float = 0.01
    damping: float = 0.1
    cg_iterations: int = 10
    backtracks: int = 10
    shrink: float = 0.5
    line_search: bool = True

    def __post_init__(self) -> None:
        if not (self.max_kl > 0 and self.damping >= 0 and 0 < self.shrink < 1):
            raise ValueError(
                f"expected max_kl > 0, damping >= 0 and 0 < shrink < 1, found {self.max_kl}, {self.damping} and "
                f"{self.shrink}: the defaults 0.01, 0.1 and 0.5 are the paper's"
            )

    def direction(self, parameters: Sequence[Tensor], gradient: Tensor, kl: Tensor) -> Tensor:
        """The full step s [P] for a gradient [P]; 0 where the gradient is 0."""
        fisher = hessian_vector_product(kl, parameters)

        def damped(v: Tensor) -> Tensor:
            return fisher(v) + self.damping * v

        x = conjugate_gradient(damped, -gradient, self.cg_iterations)
        square = x @ damped(x)
        return (2 * self.max_kl / square).sqrt() * x if square > 0 else torch.zeros_like(x)

    def step(
        self,
        parameters: Sequence[Tensor],
        gradient: Sequence[Tensor],
        kl: Callable[[], Tensor],
        loss: Callable[[], Tensor | float],
    ) -> dict[str, float]:
        """Move the parameters in place. All four arguments speak of one batch.

        gradient: of the loss to be minimised, at the parameters. kl: mean KL(old || new) in nats with `new` at the
        current parameters, twice differentiable, `old` detached and equal to `new` now. loss: at the current parameters.

        Returns: `kl` and `improved` (1 if the loss fell) where the parameters are left, `step_norm`, `backtracks`.
        Raises ValueError for a gradient that does not fit the parameters or is not finite.
        """
        g, start = matched(parameters, gradient), flat(parameters)
        with torch.enable_grad():
            full = self.direction(parameters, g, kl())
        with torch.no_grad():
            before = float(loss())
            for backtracks in range(1 + self.backtracks * self.line_search):
                move = self.shrink**backtracks * full
                assign(parameters, start + move)
                reached, improved = float(kl()), float(loss()) < before
                if not self.line_search or (improved and reached <= self.max_kl):
                    break
            else:
                move, reached, improved = torch.zeros_like(full), 0.0, False
                assign(parameters, start)
        return {
            "kl": reached,
            "step_norm": float(move.norm()),
            "backtracks": float(backtracks),
            "improved": float(improved),
        }
