"""Preference games: exact equilibria, and what is proven of the solvers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from unipo.reproduce.game_rates import draw, rates
from unipo.sources.keyed import keyed_generator
from unipo.tabular.game_solvers import (
    accelerated,
    geometric_mixture,
    inpo,
    iterate,
    iterative_dpo,
    multiplicative_weights,
    nash_md,
    nash_mp,
    proximal_point,
)
from unipo.tabular.games import PreferenceGame, RegularisedGame, fitted_scores, kl, mirror_step

CYCLE = PreferenceGame.rock_paper_scissors(0.9)
BIASED = torch.tensor([0.8, 0.15, 0.05], dtype=torch.float64).log()


def random_soft(seed: int, tau: float | None = None) -> RegularisedGame:
    generator = keyed_generator(seed, "game")
    answers = 3 + seed % 8
    game = PreferenceGame.random(answers, generator, spread=3.0)
    return RegularisedGame(game, normal_policy(generator, answers), tau or 10 ** generator.uniform(-1.5, -0.31))


def normal_policy(generator: np.random.Generator, answers: int) -> Tensor:
    return torch.from_numpy(generator.normal(size=answers)).log_softmax(0)


# ---- games -----------------------------------------------------------------------------------------------------------
def test_nash_by_hand() -> None:
    """A symmetric cycle: a third each, and a dominated answer is not played. A Bradley-Terry game: the best answer."""
    third = torch.full((3,), 1 / 3, dtype=torch.float64)
    torch.testing.assert_close(CYCLE.nash(), third, atol=1e-12, rtol=0)
    torch.testing.assert_close(CYCLE.beside(0.6).nash(), torch.cat([third, third.new_zeros(1)]), atol=1e-12, rtol=0)
    best = PreferenceGame.bradley_terry(torch.tensor([0.1, 2.0, -1.0], dtype=torch.float64)).nash()
    assert best.tolist() == pytest.approx([0.0, 1.0, 0.0])
    corner = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
    assert CYCLE.exploitability(corner) == pytest.approx(0.4)
    assert CYCLE.win_rate(corner, torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64)) == pytest.approx(0.9)


def test_nash_of_random_games_is_not_exploitable() -> None:
    for seed in range(40):
        game = random_soft(seed).game
        assert abs(game.exploitability(game.nash())) < 1e-9


def test_a_wrong_table_is_told() -> None:
    with pytest.raises(ValueError, match="1/2 on the diagonal"):
        PreferenceGame(torch.full((2, 2), 0.6))
    with pytest.raises(ValueError, match="shape"):
        PreferenceGame(torch.full((2, 3), 0.5))


def test_the_regularised_equilibrium_is_the_fixed_point() -> None:
    """pi* = ref exp(P(. > pi*) / tau) / Z, whose duality gap is 0; every other policy's is above."""
    for seed in range(40):
        soft = random_soft(seed)
        torch.testing.assert_close(soft.best_response(soft.solution), soft.solution, atol=1e-11, rtol=0)
        assert abs(soft.gap(soft.solution)) < 1e-12
        assert soft.gap(soft.reference) > 1e-6
        response, other = (
            soft.best_response(soft.reference),
            normal_policy(keyed_generator(seed, "o"), soft.game.answers),
        )
        assert soft.payoff(response, soft.reference) > soft.payoff(other, soft.reference)


def test_a_small_tau_is_the_game_without_one() -> None:
    soft = RegularisedGame(CYCLE.beside(0.6), torch.full((4,), 0.25, dtype=torch.float64).log(), 0.01)
    assert CYCLE.beside(0.6).exploitability(soft.solution.exp()) < 1e-3


def test_the_mirror_step_is_a_maximum() -> None:
    generator = keyed_generator(0, "mirror")
    gain = torch.from_numpy(generator.normal(size=5))
    anchors = ((0.3, normal_policy(generator, 5)), (0.9, normal_policy(generator, 5)))

    def objective(level: Tensor) -> Tensor:
        p = level.log_softmax(0)
        return gain @ p.exp() - sum(w * (p.exp() * (p - q)).sum() for w, q in anchors)

    found = mirror_step(gain, anchors).requires_grad_()
    slope = torch.autograd.grad(objective(found), found)[0]
    torch.testing.assert_close(slope, torch.zeros_like(slope), atol=1e-12, rtol=0)
    assert objective(found) > objective(found + 0.1 * torch.arange(5))


# ---- solvers: what they are ---------------------------------------------------------------------------------------------
def test_halving_nash_mp_gives_inpo() -> None:
    """One prox step in place of two is INPO with tau / eta_inpo = eta / (1 + eta)."""
    for seed in range(10):
        soft, policy = random_soft(seed), random_soft(seed).reference.flip(0)
        eta = 0.3
        once = mirror_step(soft.game.against(policy.exp()), ((soft.tau, soft.reference), (soft.tau / eta, policy)))
        torch.testing.assert_close(once, inpo(soft, policy, soft.tau * (1 + eta) / eta))


def test_nash_md_differs_from_inpo_by_its_opponent_alone() -> None:
    for seed in range(10):
        soft, policy, eta = random_soft(seed), random_soft(seed).reference.flip(0), 0.7
        mixed = geometric_mixture(policy, soft.reference, eta * soft.tau)
        anchors = ((soft.tau, soft.reference), (1 / eta - soft.tau, policy))
        torch.testing.assert_close(nash_md(soft, policy, eta), mirror_step(soft.game.against(mixed.exp()), anchors))
        torch.testing.assert_close(inpo(soft, policy, 1 / eta), mirror_step(soft.game.against(policy.exp()), anchors))


def test_without_regularisation_all_are_multiplicative_weights() -> None:
    for seed in range(10):
        soft, policy = random_soft(seed, tau=1e-14), random_soft(seed).reference.flip(0)
        plain = multiplicative_weights(soft.game, policy, 0.7)
        torch.testing.assert_close(nash_md(soft, policy, 0.7), plain, atol=1e-10, rtol=0)
        torch.testing.assert_close(inpo(soft, policy, 1 / 0.7), plain, atol=1e-10, rtol=0)


def test_the_equilibrium_stays_where_it_is() -> None:
    for seed in range(10):
        soft = random_soft(seed)
        for step in (
            inpo(soft, soft.solution, 2.0),
            nash_mp(soft, soft.solution, 0.4),
            proximal_point(soft, soft.solution, 3.0),
        ):
            torch.testing.assert_close(step, soft.solution, atol=1e-10, rtol=0)


def test_in_a_linear_game_the_half_steps_coincide() -> None:
    """P(y > y') = 1/2 + (u - u') / 2: the win rate does not depend on the opponent beyond a constant."""
    u = torch.tensor([0.3, -0.1, 0.4, 0.0], dtype=torch.float64)
    game = PreferenceGame(0.5 + (u[:, None] - u[None, :]) / 2)
    soft = RegularisedGame(game, normal_policy(keyed_generator(1, "x"), 4), 0.2)
    half = inpo(soft, soft.reference, 0.2 * 1.4 / 0.4)
    torch.testing.assert_close(nash_mp(soft, soft.reference, 0.4), half)
    torch.testing.assert_close(proximal_point(soft, soft.reference, 0.4), half, atol=1e-11, rtol=0)


# ---- solvers: what is proven of them -------------------------------------------------------------------------------------
def test_nash_mp_contracts_by_1_over_1_plus_2_tau() -> None:
    for seed in range(60):
        soft = random_soft(seed)
        policy = normal_policy(keyed_generator(seed, "from"), soft.game.answers)
        for _ in range(5):
            new = nash_mp(soft, policy, 2 * soft.tau)
            assert soft.distance(new) <= soft.distance(policy) / (1 + 2 * soft.tau) + 1e-15
            policy = new


def test_the_proximal_point_equality() -> None:
    """(1 + eta) KL(pi* || new) = KL(pi* || pi) - KL(new || pi) - eta KL(new || pi*), for small and large eta."""
    for seed in range(30):
        soft, eta = random_soft(seed), (0.1, 1.0, 10.0)[seed % 3]
        policy = normal_policy(keyed_generator(seed, "from"), soft.game.answers)
        new = proximal_point(soft, policy, eta)
        left = (1 + eta) * soft.distance(new)
        right = soft.distance(policy) - kl(new, policy) - eta * kl(new, soft.solution)
        assert left == pytest.approx(right, rel=1e-7, abs=1e-9)


def test_nash_md_one_step_bound_and_schedule() -> None:
    """KL(pi* || pi') <= (1 - eta tau) KL(pi* || pi) + 2 eta^2, and 8 / (tau^2 (T + 1)) with eta_t = 2 / (tau (t + 2))."""
    for seed in range(20):
        soft = random_soft(seed)
        policy = soft.reference
        for t in range(60):
            eta = 2 / (soft.tau * (t + 2))
            new = nash_md(soft, policy, eta)
            assert soft.distance(new) <= (1 - eta * soft.tau) * soft.distance(policy) + 2 * eta**2 + 1e-12
            policy = new
            assert soft.distance(policy) <= 8 / (soft.tau**2 * (t + 2))


def test_inpo_one_step_bound() -> None:
    for seed in range(20):
        soft = random_soft(seed)
        policy = normal_policy(keyed_generator(seed, "from"), soft.game.answers)
        for eta in (soft.tau, 3 * soft.tau, 30 * soft.tau):
            new = inpo(soft, policy, eta)
            ratio = max(float((p - soft.reference).abs().max()) for p in (policy, new, soft.solution))
            bound = (1 - soft.tau / eta) * soft.distance(policy) + 8 * max(ratio * soft.tau, 1.0) ** 2 / eta**2
            assert soft.distance(new) <= bound


def test_exploitability_of_the_average_is_the_average_regret() -> None:
    """max_pi P(pi > mean p_t) - 1/2 = ( max_y sum_t P(y > p_t) - T / 2 ) / T, for whatever was played."""
    for seed in range(10):
        game = random_soft(seed).game
        path = torch.stack([normal_policy(keyed_generator(seed, t), game.answers).exp() for t in range(30)])
        regret = float((path @ game.preference.T).sum(0).max()) - sum(game.win_rate(p, p) for p in path)
        assert game.exploitability(path.mean(0)) == pytest.approx(regret / 30, abs=1e-14)


def test_the_average_converges_and_the_last_iterate_circles() -> None:
    start = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64).log()
    path = iterate(lambda p, t: multiplicative_weights(CYCLE, p, 0.1), start, 2000).exp()
    assert CYCLE.exploitability(path.mean(0)) < 0.005
    assert min(CYCLE.exploitability(p) for p in path[-500:]) > 0.05


def test_bradley_terry_scores_are_recovered_whatever_the_pairs() -> None:
    score = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64)
    for weight in ([0.25] * 4, [0.97, 0.01, 0.01, 0.01]):
        found = fitted_scores(PreferenceGame.bradley_terry(score), torch.tensor(weight, dtype=torch.float64))
        torch.testing.assert_close(found - found[0], score - score[0], atol=1e-8, rtol=0)


def test_a_fit_to_skewed_comparisons_of_a_cycle_is_no_equilibrium() -> None:
    """Scores of a cycle under skewed pairs have one best answer: its exploitability is that of a corner, .4."""
    scores = fitted_scores(CYCLE, BIASED.exp())
    corner = torch.nn.functional.one_hot(scores.argmax(), 3).double()
    assert float(scores.max() - scores.median()) > 0.1
    assert CYCLE.exploitability(corner) == pytest.approx(0.4)


def test_iterative_dpo_solves_bradley_terry_games_and_not_cycles() -> None:
    score = torch.tensor([0.1, 0.6, -1.0], dtype=torch.float64)
    start = torch.full((3,), 1 / 3, dtype=torch.float64).log()
    transitive = PreferenceGame.bradley_terry(score)
    last = iterate(lambda p, t: iterative_dpo(transitive, p, 1.0), start, 40)[-1].exp()
    assert transitive.exploitability(last) < 1e-6
    path = iterate(lambda p, t: iterative_dpo(CYCLE, p, 5.0), BIASED, 200).exp()
    assert CYCLE.exploitability(path[-1]) > 0.2


# ---- extrapolation -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.8])
def test_extrapolated_exact_steps_have_a_closed_form(alpha: float) -> None:
    """log made_T = log ref + (r / beta) sum_{k < T} (1 - alpha^{k+1}) / (1 - alpha) + const, for a fixed reward r."""
    reward, beta, steps = torch.tensor([0.3, -0.2, 1.0, 0.0], dtype=torch.float64), 2.0, 12
    reference = normal_policy(keyed_generator(0, "apo"), 4)
    path, made = accelerated(lambda p, t: mirror_step(reward, ((beta, p),)), reference, alpha, steps)
    times = sum((1 - alpha ** (k + 1)) / (1 - alpha) for k in range(steps))
    torch.testing.assert_close(made[-1], (reference + reward / beta * times).log_softmax(0))
    if alpha == 0:
        torch.testing.assert_close(path, made)


def test_extrapolation_rests_at_a_fixed_point() -> None:
    path, _ = accelerated(lambda p, t: p, BIASED, 0.7, 5)
    torch.testing.assert_close(path, BIASED.expand(6, 3))


def test_measured_rates_stay_below_their_bounds(tmp_path: Path) -> None:
    """And of two the power is seen: the average of exponential weights, and Nash-MP, which is linear."""
    found = {rate.title: rate for rate in rates(steps=60)}
    assert len(found) == 5
    for rate in found.values():
        assert bool((rate.measured <= rate.bound * (1 + 1e-9)).all()), rate.title
    prox = found["Nash-MP"].measured
    assert float(prox[-1] / prox[0]) < (1 + 2 * 0.02) ** -60
    draw(tmp_path / "games.png", list(found.values()))
    assert (tmp_path / "games.png").stat().st_size > 1000
