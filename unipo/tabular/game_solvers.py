"""Solvers of preference games: one step each, log-probabilities [A] -> log-probabilities [A].

All are `mirror_step`: maximise the win rate against an opponent, less divergences to anchors. They differ in who that is:

                            opponent                anchors, with their weights                         step size
    multiplicative_weights  pi_t                    pi_t: 1 / rate                                      rate
    inpo                    pi_t                    ref: tau,  pi_t: eta - tau                          1 / eta
    nash_md                 pi_t^(1-c) ref^c        ref: tau,  pi_t: 1 / eta - tau       c = eta tau    eta
    nash_mp                 pi_{k+1/2}              ref: tau,  pi_k: tau / eta                          eta
    proximal_point          pi_{k+1} itself         ref: tau,  pi_k: tau / eta                          eta
    iterative_dpo           a Bradley-Terry fit     pi_t: beta                                          1 / beta

SPPO, DNO (its soft policy iteration) and SPO with exponential weights all are `multiplicative_weights`.
"""  # fmt: skip

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from unipo.tabular.games import PreferenceGame, RegularisedGame, fitted_scores, mirror_step

Step = Callable[[Tensor, int], Tensor]
"""(log policy, step from 0) -> next log policy."""


def iterate(step: Step, start: Tensor, steps: int) -> Tensor:
    """[T + 1, A]: the start and what T steps make of it."""
    path = [start]
    for t in range(steps):
        path.append(step(path[-1], t))
    return torch.stack(path)


def multiplicative_weights(game: PreferenceGame, policy: Tensor, rate: float) -> Tensor:
    """pi exp( rate P(. > pi) ) / Z: SPPO's and DNO's exact step, and SPO's with exponential weights.

    The average of the iterates has exploitability Regret_T / T (SPO, arXiv 2401.04056), with rate ~ sqrt(log A / T) of order
    1 / sqrt(T); the last iterate circles where preferences do.
    """
    return mirror_step(game.against(policy.exp()), ((1.0 / rate, policy),))


def inpo(soft: RegularisedGame, policy: Tensor, eta: float) -> Tensor:
    """pi' prop. to exp( P(. > pi) / eta ) ref^{tau/eta} pi^{1 - tau/eta}, tau <= eta (INPO, arXiv 2407.00617).

    KL(pi* || pi') <= (1 - tau/eta) KL(pi* || pi) + 8 C^2 / eta^2 with C = max(B tau, 1), |log pi/ref| <= B.
    """
    gain = soft.game.against(policy.exp())
    return mirror_step(gain, ((soft.tau, soft.reference), (eta - soft.tau, policy)))


def nash_md(soft: RegularisedGame, policy: Tensor, eta: float) -> Tensor:
    """pi' prop. to mix exp( eta P(. > mix) ),  mix prop. to pi^{1 - eta tau} ref^{eta tau} (Nash-MD, arXiv 2312.00886).

    KL(pi* || pi') <= (1 - eta tau) KL(pi* || pi) + 2 eta^2; with eta_t = 2 / (tau (t + 2)) from ref, 8 / (tau^2 (T + 1)).
    """
    mixed = geometric_mixture(policy, soft.reference, eta * soft.tau)
    return mirror_step(soft.game.against(mixed.exp()), ((1.0 / eta, mixed),))


def nash_mp(soft: RegularisedGame, policy: Tensor, eta: float) -> Tensor:
    """Two prox steps from one anchor, the second against what the first made (Nash-MP, arXiv 2505.19731).

    With eta = 2 tau and tau <= 1/2: KL(pi* || pi_k) <= (1 + 2 tau)^-k KL(pi* || ref), two win rates per step.
    """
    return _prox(soft, policy, _prox(soft, policy, policy, eta), eta)


def _prox(soft: RegularisedGame, anchor: Tensor, opponent: Tensor, eta: float) -> Tensor:
    """argmax P(pi > opponent) - tau KL(pi || ref) - (tau / eta) KL(pi || anchor)."""
    gain = soft.game.against(opponent.exp())
    return mirror_step(gain, ((soft.tau, soft.reference), (soft.tau / eta, anchor)))


def proximal_point(soft: RegularisedGame, policy: Tensor, eta: float) -> Tensor:
    """The equilibrium of the game that is regularised to ref and to pi at once: the implicit form of `nash_mp`, any eta > 0.

        (1 + eta) KL(pi* || pi') = KL(pi* || pi) - KL(pi' || pi) - eta KL(pi' || pi*)
    """  # fmt: skip
    both = geometric_mixture(policy, soft.reference, eta / (1.0 + eta))
    return RegularisedGame(soft.game, both, soft.tau * (1.0 + 1.0 / eta)).equilibrium()


def iterative_dpo(game: PreferenceGame, policy: Tensor, beta: float) -> Tensor:
    """pi exp(s / beta) / Z with the Bradley-Terry scores s of comparisons drawn from pi: DPO on its own pairs, to the end."""
    return mirror_step(fitted_scores(game, policy.exp()), ((beta, policy),))


def geometric_mixture(policy: Tensor, other: Tensor, share: float) -> Tensor:
    """pi^{1 - share} other^share / Z."""
    return ((1.0 - share) * policy + share * other).log_softmax(0)


def accelerated(step: Step, start: Tensor, alpha: float, steps: int) -> tuple[Tensor, Tensor]:
    """Extrapolation behind every step (APO, arXiv 2410.06293): (pi [T + 1, A], what the steps made of it [T + 1, A]).

        made_{t+1} = step(pi_t),    pi_{t+1} prop. to made_{t+1} ( made_{t+1} / made_t )^alpha
    """  # fmt: skip
    path, made = [start], [start]
    for t in range(steps):
        made.append(step(path[-1], t))
        path.append(geometric_mixture(made[-1], made[-2], -alpha))
    return torch.stack(path), torch.stack(made)
