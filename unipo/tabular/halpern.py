"""Halpern iteration with variance reduction: the last iterate of anchored steps on a finite sum of operators.

F(u) = 1/n sum_i F_i(u), monotone; a zero of F is an equilibrium. Costs are counted in evaluations of single F_i.
Source: Cai, Alacaoglu & Diakonikolas, "Variance Reduced Halpern Iteration for Finite-Sum Monotone Inclusions" (ICLR 2024,
arXiv 2310.02987). d dimensions, n components.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

Resolvent = Callable[[Tensor], Tensor]
"""J of the part of the problem that is not in the sum: a projection onto constraints, say."""


@dataclass(frozen=True)
class AffineSum:
    """F_i(u) = matrix_i u + offset_i: `matrices` [n, d, d], `offsets` [n, d]."""

    matrices: Tensor
    offsets: Tensor

    @classmethod
    def random_cocoercive(cls, components: int, dimensions: int, generator: np.random.Generator) -> AffineSum:
        """Gradients of random least squares: F_i = a_i (a_i^T u - b_i) with normal a_i, scaled to a largest constant of 1."""
        rows = torch.from_numpy(generator.normal(size=(components, dimensions)))
        rows = rows / rows.norm(dim=1).max()
        target = torch.from_numpy(generator.normal(size=components))
        return cls(rows[:, :, None] * rows[:, None, :], -rows * target[:, None])

    @classmethod
    def random_bilinear(cls, components: int, dimensions: int, generator: np.random.Generator) -> AffineSum:
        """min_x max_y of means of x^T B_i y + b_i^T x + c_i^T y: skew, monotone and not cocoercive; u = (x, y)."""
        half = dimensions // 2
        B = torch.from_numpy(generator.normal(size=(components, half, half))) / math.sqrt(half)
        blank = torch.zeros_like(B)
        skew = torch.cat([torch.cat([blank, B], 2), torch.cat([-B.mT, blank], 2)], 1)
        return cls(skew, torch.from_numpy(generator.normal(size=(components, 2 * half))))

    @property
    def components(self) -> int:
        return len(self.matrices)

    def __call__(self, u: Tensor) -> Tensor:
        """F(u) [d]: n evaluations."""
        return self.matrices.mean(0) @ u + self.offsets.mean(0)

    def part(self, u: Tensor, chosen: Tensor) -> Tensor:
        """Mean of F_i(u) over `chosen` [b]: b evaluations."""
        return (self.matrices[chosen] @ u + self.offsets[chosen]).mean(0)

    @property
    def zero(self) -> Tensor:
        """[d]: the zero of least norm."""
        return torch.linalg.lstsq(self.matrices.mean(0), -self.offsets.mean(0)[:, None], driver="gelsd").solution[:, 0]

    @property
    def cocoercivity(self) -> float:
        """L with  mean_i |F_i(u) - F_i(v)|^2 <= L <F(u) - F(v), u - v>  (symmetric positive matrices)."""
        mean = self.matrices.mean(0)
        square = (self.matrices @ self.matrices).mean(0)
        values, vectors = torch.linalg.eigh(mean)
        half = vectors[:, values > 1e-12] / values[values > 1e-12].sqrt()
        return float(torch.linalg.eigvalsh(half.T @ square @ half).max())

    @property
    def lipschitz(self) -> float:
        """L with  mean_i |F_i(u) - F_i(v)|^2 <= L^2 |u - v|^2."""
        return math.sqrt(float(torch.linalg.eigvalsh((self.matrices.mT @ self.matrices).mean(0)).max()))


@dataclass(frozen=True, slots=True, kw_only=True)
class HalpernRun:
    """`path` [K + 1, d] from the start on, `estimates` [K, d] of F that the steps used, `calls` [K] evaluations so far."""

    path: Tensor
    estimates: Tensor
    calls: Tensor

    def residuals(self, operator: AffineSum) -> Tensor:
        """[K]: |F(u_k)| of the iterates that F was estimated at."""
        return torch.stack([operator(u).norm() for u in self.path[:-1]])


def anchor_paper(k: int) -> float:
    """lambda_k = 2 / (k + 4)."""
    return 2.0 / (k + 4)


def anchor_plain(k: int) -> float:
    """lambda_k = 1 / (k + 2), Halpern's own."""
    return 1.0 / (k + 2)


def refresh_paper(components: int) -> Callable[[int], float]:
    """p_k = max( 4 / (k + 5), 4 / (sqrt(n) + 5) ), at most 1."""
    return lambda k: min(1.0, max(4.0 / (k + 5), 4.0 / (math.sqrt(components) + 5)))


def always(k: int) -> float:
    """F is computed anew in every step: the deterministic iteration."""
    return 1.0


def halpern(operator: AffineSum, start: Tensor, calls: int, generator: np.random.Generator, *, constant: float,
            batch: int = 0, refresh: Callable[[int], float] = always, anchor: Callable[[int], float] = anchor_paper,
            resolvent: Resolvent = lambda u: u) -> HalpernRun:  # fmt: skip
    """u_{k+1} = J( lambda_k u_0 + (1 - lambda_k) u_k - eta F~_k ),   eta = 1 / (4 L), until `calls` evaluations.

    PAGE: F~_k is F(u_k) with probability p_k, else F~_{k-1} + mean over S of F_i(u_k) - F_i(u_{k-1}), S of `batch` (0:
    ceil(sqrt n)) components drawn without replacement. For `constant`-cocoercive sums E |F(u_k)| <= 16 L |u_0 - u*| / (k + 4).
    """
    n, eta = operator.components, 1.0 / (4.0 * constant)
    size = batch or math.ceil(math.sqrt(n))
    path, estimates, spent, done = [start], [operator(start)], [n], n
    while done < calls:
        k, u = len(path) - 1, path[-1]
        path.append(resolvent(anchor(k) * start + (1.0 - anchor(k)) * u - eta * estimates[-1]))
        if generator.random() < refresh(k + 1):
            estimates.append(operator(path[-1]))
            done += n
        else:
            chosen = torch.from_numpy(generator.choice(n, size, replace=False))
            estimates.append(estimates[-1] + operator.part(path[-1], chosen) - operator.part(u, chosen))
            done += 2 * size
        spent.append(done)
    path.append(
        resolvent(anchor(len(path) - 1) * start + (1.0 - anchor(len(path) - 1)) * path[-1] - eta * estimates[-1])
    )
    return HalpernRun(path=torch.stack(path), estimates=torch.stack(estimates), calls=torch.tensor(spent))


def resolvent_halpern(resolvent: Callable[[Tensor, int], Tensor], start: Tensor, steps: int) -> Tensor:
    """u_{k+1} = lambda_k u_0 + (1 - lambda_k) J(u_k),  lambda_k = 1 / (k + 2): path [K + 1, d].

    For a merely monotone F, J(u) = the solution z of z + eta F(z) = u. With the exact J |u_k - J(u_k)| is at most
    2 |u_0 - u*| / (k + 1).
    """
    path = [start]
    for k in range(steps):
        weight = anchor_plain(k)
        path.append(weight * start + (1.0 - weight) * resolvent(path[-1], k))
    return torch.stack(path)


def exact_resolvent(operator: AffineSum, eta: float, u: Tensor) -> Tensor:
    """z with z + eta F(z) = u."""
    eye = torch.eye(len(u), dtype=u.dtype)
    return torch.linalg.solve(eye + eta * operator.matrices.mean(0), u - eta * operator.offsets.mean(0))


def sampled_resolvent(operator: AffineSum, eta: float, u: Tensor, steps: int, generator: np.random.Generator) -> Tensor:
    """The same by loopless variance-reduced extragradient from u: 2 evaluations a step and n whenever w is renewed (p = 2 / n).

        zb = (1 - p) z + p w;   h = prox(zb - tau F(w));   z = prox(zb - tau (F(w) + F_i(h) - F_i(w)));   w = z with prob. p
        prox(v) = (v + tau / eta u) / (1 + tau / eta),   tau = .99 sqrt(p) / L
    """  # fmt: skip
    n = operator.components
    p = 2.0 / n
    tau = 0.99 * math.sqrt(p) / operator.lipschitz
    z = w = u
    full = operator(w)

    def prox(v: Tensor) -> Tensor:
        return (v + tau / eta * u) / (1.0 + tau / eta)

    for _ in range(steps):
        between = (1.0 - p) * z + p * w
        half = prox(between - tau * full)
        one = torch.tensor([int(generator.integers(n))])
        z = prox(between - tau * (full + operator.part(half, one) - operator.part(w, one)))
        if generator.random() < p:
            w, full = z, operator(z)
    return z


def anchored_extragradient(operator: Callable[[Tensor], Tensor], start: Tensor, steps: int, eta: float) -> Tensor:
    """v = u + lambda (u_0 - u) - eta F(u);  u' = u + lambda (u_0 - u) - eta F(v),  lambda_k = 1 / (k + 2): path [K + 1, d].

    The full-batch alternative for monotone L-Lipschitz F, eta <= 1 / (8 L); two whole F per step.
    """
    path = [start]
    for k in range(steps):
        u = path[-1]
        pulled = u + anchor_plain(k) * (start - u)
        path.append(pulled - eta * operator(pulled - eta * operator(u)))
    return torch.stack(path)
