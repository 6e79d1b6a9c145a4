"""Preference games over enumerable answers: who beats whom, exact equilibria, and how far a policy is from them.

game = PreferenceGame.rock_paper_scissors(0.9)            # P(y > y') = .9 around a cycle of three
game.exploitability(p)                                    # what the best opponent wins beyond 1/2 against p
soft = RegularisedGame(game, reference, tau=0.1)          # ... less tau KL(p || reference)
soft.equilibrium()                                        # the one policy with  pi = reference exp(P(. > pi) / tau) / Z

Shapes: A answers; policies of the regularised game are log-probabilities [A] in float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from scipy.optimize import linprog
from torch import Tensor

SOLVED = 1e-13
"""Largest residual of a fixed point that counts as solved."""


@dataclass(frozen=True)
class PreferenceGame:
    """`preference` [A, A] float64 in [0, 1]: P(y > y'), with P(y > y') + P(y' > y) = 1.

    ValueError where it is not square, out of range, or does not sum to 1 with its transpose.
    """

    preference: Tensor

    def __post_init__(self) -> None:
        P = self.preference
        square = P.ndim == 2 and P.shape[0] == P.shape[1]
        if not square or not bool(((P >= 0) & (P <= 1)).all()) or not torch.allclose(P + P.T, torch.ones_like(P)):
            raise ValueError(
                f"a preference of shape {list(P.shape)}: expected a square of probabilities with P(y > y') + P(y' > y) = 1, and "
                "so 1/2 on the diagonal; symmetrise a model by (f(y, y') + 1 - f(y', y)) / 2"
            )

    @classmethod
    def bradley_terry(cls, score: Tensor) -> PreferenceGame:
        """P(y > y') = sigmoid(score(y) - score(y')): transitive, its equilibrium is the best answer."""
        return cls(torch.sigmoid(score[:, None] - score[None, :]))

    @classmethod
    def rock_paper_scissors(cls, win: float = 0.9) -> PreferenceGame:
        """Three answers around a cycle: 0 beats 1, 1 beats 2, 2 beats 0, with probability `win`."""
        return cls(torch.tensor([[0.5, win, 1 - win], [1 - win, 0.5, win], [win, 1 - win, 0.5]], dtype=torch.float64))

    @classmethod
    def random(cls, answers: int, generator: np.random.Generator, spread: float = 2.0) -> PreferenceGame:
        """sigmoid of an antisymmetric normal table with standard deviation `spread`: intransitive from three answers on."""
        logits = torch.from_numpy(generator.normal(size=(answers, answers))).triu(1) * spread
        return cls(torch.sigmoid(logits - logits.T))

    def beside(self, win: float) -> PreferenceGame:
        """The same game with one answer more, which loses to every other with probability `win`."""
        n = self.answers
        P = torch.full((n + 1, n + 1), win, dtype=torch.float64)
        P[:n, :n], P[n, :n], P[n, n] = self.preference, 1 - win, 0.5
        return PreferenceGame(P)

    @property
    def answers(self) -> int:
        return len(self.preference)

    def against(self, opponent: Tensor) -> Tensor:
        """[A]: P(y > q) = E_{y' ~ q} P(y > y') of every answer against probabilities `opponent` [A]."""
        return self.preference @ opponent

    def win_rate(self, policy: Tensor, opponent: Tensor) -> float:
        """P(p > q) of two mixed policies [A]."""
        return float(policy @ self.preference @ opponent)

    def exploitability(self, policy: Tensor) -> float:
        """max_y P(y > p) - 1/2: 0 at an equilibrium and nowhere else."""
        return float(self.against(policy).max()) - 0.5

    def nash(self) -> Tensor:
        """[A]: an equilibrium, by the linear program  max v  with  P(p > y') >= v for all y'."""
        n, P = self.answers, self.preference.numpy()
        found = linprog(
            np.append(np.zeros(n), -1.0), A_ub=np.column_stack([-P.T, np.ones(n)]), b_ub=np.zeros(n),
            A_eq=np.append(np.ones(n), 0.0)[None], b_eq=[1.0], bounds=[(0.0, 1.0)] * n + [(None, None)], method="highs",
        )  # fmt: skip
        policy = torch.from_numpy(found.x[:n]).clamp(min=0.0)
        return policy / policy.sum()


@dataclass(frozen=True)
class RegularisedGame:
    """J(p, q) = P(p > q) - tau KL(p || reference) + tau KL(q || reference), with one equilibrium, which is symmetric.

    `reference` [A]: log-probabilities; `tau` > 0.
    """

    game: PreferenceGame
    reference: Tensor
    tau: float

    def payoff(self, policy: Tensor, opponent: Tensor) -> float:
        """J of two policies, log-probabilities [A]."""
        won = self.game.win_rate(policy.exp(), opponent.exp())
        return won - self.tau * (kl(policy, self.reference) - kl(opponent, self.reference))

    def best_response(self, opponent: Tensor) -> Tensor:
        """argmax_p J(p, q) = reference exp(P(. > q) / tau) / Z."""
        return mirror_step(self.game.against(opponent.exp()), ((self.tau, self.reference),))

    def gap(self, policy: Tensor) -> float:
        """max_p J(p, policy) - 1/2: 0 at the equilibrium and nowhere else."""
        return self.payoff(self.best_response(policy), policy) - 0.5

    def distance(self, policy: Tensor) -> float:
        """KL(pi* || policy), in which the rates of the solvers are proven."""
        return kl(self.solution, policy)

    @cached_property
    def solution(self) -> Tensor:
        """The equilibrium, log-probabilities [A]."""
        return self.equilibrium()

    def equilibrium(self) -> Tensor:
        """Newton on  l = log reference + P softmax(l) / tau, whose step is halved until the residual falls.

        Raises RuntimeError where it does not get below `SOLVED` (tau / A of 1e-4 or less).
        """
        P, level = self.game.preference, self.reference.clone()
        residual = self._residual(level)
        for _ in range(200):
            if float(residual.abs().max()) <= SOLVED * max(1.0, float(level.abs().max())):
                return level.log_softmax(0)
            p = level.softmax(0)
            slope = torch.eye(len(p), dtype=p.dtype) - P @ (torch.diag(p) - torch.outer(p, p)) / self.tau
            step, size = torch.linalg.solve(slope, residual), 1.0
            while size > 1e-12 and self._residual(level - size * step).norm() >= (1 - size / 4) * residual.norm():
                size /= 2
            if size <= 1e-12:
                break
            level = level - size * step
            residual = self._residual(level)
        if float(residual.abs().max()) <= 1e-10 * max(1.0, float(level.abs().max())):
            return level.log_softmax(0)
        raise RuntimeError(
            f"no equilibrium found at tau {self.tau}: the residual stays at {float(residual.abs().max()):.1e}"
        )

    def _residual(self, level: Tensor) -> Tensor:
        return level - self.reference - self.game.against(level.softmax(0)) / self.tau


def kl(policy: Tensor, other: Tensor) -> float:
    """KL(policy || other) in nats, of log-probabilities [A]."""
    return float((policy.exp() * (policy - other)).sum())


def mirror_step(gain: Tensor, anchors: Sequence[tuple[float, Tensor]]) -> Tensor:
    """argmax_pi <gain, pi> - sum_k w_k KL(pi || p_k)  for anchors (w_k, log p_k): log-probabilities [A].

    log pi = ( gain + sum_k w_k log p_k ) / sum_k w_k - log Z. Every solver of `game_solvers` is made of this step.
    """
    total = sum(weight for weight, _ in anchors)
    pulled = gain + sum((weight * logp for weight, logp in anchors), torch.zeros_like(gain))
    return (pulled / total).log_softmax(0)


def fitted_scores(game: PreferenceGame, policy: Tensor) -> Tensor:
    """[A]: the Bradley-Terry scores that maximum likelihood finds in comparisons of pairs drawn from `policy` [A].

    With P itself as labels (infinitely many comparisons); the mean under `policy` is 0. Newton on
    E_{y, y' ~ p}[ P(y > y') log sigmoid(s - s') ].
    """
    P, pair = game.preference, policy[:, None] * policy[None, :]
    score = torch.zeros_like(policy)
    for _ in range(100):
        won = torch.sigmoid(score[:, None] - score[None, :])
        slope = (pair * (P - won)).sum(1)
        weight = pair * won * (1 - won)
        curvature = torch.diag(weight.sum(1)) - weight + torch.outer(policy, policy) * 1e-3
        step = torch.linalg.lstsq(curvature, slope).solution
        score = score + step.clamp(-2.0, 2.0)
        if float(slope.abs().max()) < 1e-15 or float(step.abs().max()) < 1e-12:
            break
    return score - policy @ score
