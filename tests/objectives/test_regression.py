"""Critics' regressions: targets, penalties and their slopes, ensembles, weights, and terms that take turns."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from unipo.episodes import Episodes
from unipo.learner import coefficients
from unipo.objectives import (
    ActionAdvantage,
    AdvantageWeight,
    Bellman,
    Bonus,
    Expectile,
    Huber,
    Knob,
    Likelihood,
    Objective,
    PolicyGradient,
    Regression,
    SmallestOf,
    Squared,
    nothing,
    rollouts,
    with_settings,
)
from unipo.objectives.hoisting import Stored
from unipo.sources.acting.transitions import TransitionReplay

REWARD = [1.0, 2.0, 3.0, 4.0]
ENDED = [False, True, False, False]
DISCOUNT = [0.9, 0.9, 0.81, 0.729]
NEXT = [10.0, 20.0, 30.0, 40.0]
LOGP = [-1.0, -2.0, 1.0, 0.5]


def transitions(**more: Tensor) -> Episodes:
    """Four replayed transitions: the second terminated, the third hit a time limit."""
    step = {"reward": torch.tensor(REWARD), "next_q": torch.tensor(NEXT), "next_logp": torch.tensor(LOGP), **more}
    episode = {"terminated": torch.tensor(ENDED), "truncated": torch.tensor([False, False, True, False]),
               "discount": torch.tensor(DISCOUNT)}  # fmt: skip
    return Episodes.flat(step, episode, kind="rollout")


def slope(objective: Objective, episodes: Episodes, signal: str, value: Tensor) -> Tensor:
    return coefficients(objective, episodes, {signal: value}).total[signal]


# ---- targets ---------------------------------------------------------------------------------------------------------
def test_the_bellman_target_stops_where_the_step_terminated_and_only_there() -> None:
    expected = [1 + 0.9 * 10, 2.0, 3 + 0.81 * 30, 4 + 0.729 * 40]
    assert Bellman()(transitions(), {}).tolist() == pytest.approx(expected)


def test_the_soft_target_pays_for_surprise() -> None:
    """- temperature * log pi(a'|s') is the entropy of the next action: an unlikely one (logp < 0) is worth more."""
    expected = [1 + 0.9 * (10 + 0.5), 2.0, 3 + 0.81 * (30 - 0.5), 4 + 0.729 * (40 - 0.25)]
    assert Bellman(temperature=0.5)(transitions(), {}).tolist() == pytest.approx(expected)
    knob = with_settings(Bellman(temperature=Knob("alpha", 7.0)), {"alpha": 0.5})
    assert knob(transitions(), {}).tolist() == pytest.approx(expected)
    assert Bellman().needs.columns == {"reward", "discount", "terminated", "next_q"}
    assert Bellman(temperature=0.5).needs.columns == Bellman().needs.columns | {"next_logp"}


def test_other_columns_are_backed_up_too() -> None:
    values = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0], [7.0, 8.0]])
    e = transitions(next_quantiles=values, old_next_value=values[:, 0])
    found = Bellman(temperature=0.5, value="next_quantiles")(e, {})
    rows = zip(REWARD, ENDED, DISCOUNT, values.tolist(), LOGP, strict=True)
    expected = [[r + d * (1 - over) * (q - 0.5 * lp) for q in row] for r, over, d, row, lp in rows]
    torch.testing.assert_close(found, torch.tensor(expected))
    assert Bellman(value="old_next_value")(e, {}).tolist() == pytest.approx([1.9, 2.0, 3 + 0.81 * 5, 4 + 0.729 * 7])


def test_n_step_transitions_are_discounted_once_per_step() -> None:
    """Five steps, the last terminated, three summed: y_t = sum_{k<3} gamma^k r_{t+k} + gamma^3 q(s_{t+3}), less at the end."""
    gamma, n = 0.9, 5
    replay = TransitionReplay(100, 0, gamma, n_step=3)
    zeros = np.zeros(n, dtype=bool)
    number = np.arange(n, dtype=np.float32)[:, None]
    replay.add_rows({"observation": number, "next_observation": number + 1, "reward": 2 ** number[:, 0],
                     "terminated": np.arange(n) == n - 1, "truncated": zeros, "env": np.zeros(n, dtype=np.int64),
                     "policy_version": np.zeros(n, dtype=np.int64)})  # fmt: skip
    e = replay.sample(64, 0)
    e = e.with_columns("step", next_q=100 * e["final_observation"][:, 0])
    wanted = {
        0: 1 + gamma * 2 + gamma**2 * 4 + gamma**3 * 300,
        1: 2 + gamma * 4 + gamma**2 * 8 + gamma**3 * 400,
        2: 4 + gamma * 8 + gamma**2 * 16,
        3: 8 + gamma * 16,
        4: 16.0,
    }
    found = dict(zip(e["observation"][:, 0].long().tolist(), Bellman()(e, {}).tolist(), strict=True))
    assert found == pytest.approx(wanted, rel=1e-6)


def test_the_worst_member_and_the_advantage_over_the_state() -> None:
    q = torch.tensor([[1.0, 3.0], [5.0, 2.0], [0.0, 0.0], [-4.0, -3.0]])
    e = transitions(target_q=q, old_value=torch.tensor([2.0, 1.0, 0.0, -6.0]))
    assert SmallestOf()(e, {}).tolist() == [1, 2, 0, -4]
    assert ActionAdvantage()(e, {}).tolist() == [-1, 1, 0, 2]
    weights = AdvantageWeight(scale=3.0, cap=100.0)(e, {})
    torch.testing.assert_close(weights, torch.tensor([-3.0, 3.0, 0.0, 6.0]).exp().clamp(max=100))
    assert weights[3] == 100
    assert AdvantageWeight().needs.columns == {"target_q", "old_value"}


# ---- penalties -------------------------------------------------------------------------------------------------------
ERRORS = [-3.0, -1.0, -0.25, 0.0, 0.25, 2.0]


@pytest.mark.parametrize(
    ("penalty", "values", "slopes"),
    [
        (Squared(), [4.5, 0.5, 0.03125, 0, 0.03125, 2], ERRORS),
        (Huber(), [2.5, 0.5, 0.03125, 0, 0.03125, 1.5], [-1, -1, -0.25, 0, 0.25, 1]),
        (Huber(delta=2.0), [4, 0.5, 0.03125, 0, 0.03125, 2], [-2, -1, -0.25, 0, 0.25, 2]),
        (Expectile(tau=0.9), [8.1, 0.9, 0.05625, 0, 0.00625, 0.4], [-5.4, -1.8, -0.45, 0, 0.05, 0.4]),
    ],
)
def test_penalties_and_their_slopes(penalty: Squared, values: list[float], slopes: list[float]) -> None:
    error = torch.tensor(ERRORS, requires_grad=True)
    found = penalty.of(error)
    assert found.tolist() == pytest.approx(values)
    (gradient,) = torch.autograd.grad(found.sum(), error)
    assert gradient.tolist() == pytest.approx(slopes)


@pytest.mark.parametrize("tau", [0.1, 0.5, 0.9])
def test_the_expectile_regression_has_the_expectile_as_its_minimum(tau: float) -> None:
    """Where tau E[(x - m)+] = (1 - tau) E[(m - x)+]; of 0 and 1 in equal numbers that is m = tau."""
    term = Regression(signal="value", target=Stored("x"), penalty=Expectile(tau), rows=rollouts)
    e = transitions(x=torch.tensor([0.0, 1.0, 1.0, 0.0]))
    assert slope(term, e, "value", torch.full((4,), tau)).sum().item() == pytest.approx(0, abs=1e-6)
    assert slope(term, e, "value", torch.full((4,), tau + 0.05)).sum() > 0
    assert slope(term, e, "value", torch.full((4,), tau - 0.05)).sum() < 0


# ---- the term --------------------------------------------------------------------------------------------------------
def test_a_regression_sums_over_the_ensemble_and_averages_over_steps() -> None:
    q = torch.tensor([[1.0, 3.0], [5.0, 2.0], [0.0, 0.0], [-4.0, -3.0]])
    e = transitions(replay_weight=torch.tensor([1.0, 0.5, 0.25, 2.0]))
    y = torch.tensor([1 + 0.9 * 10, 2.0, 3 + 0.81 * 30, 4 + 0.729 * 40])
    torch.testing.assert_close(Regression()(e, {"q": q}), ((q - y[:, None]) ** 2 / 2).sum() / 4)
    torch.testing.assert_close(slope(Regression(), e, "q", q), (q - y[:, None]) / 4)
    weighted = Regression(weight="replay_weight")
    torch.testing.assert_close(slope(weighted, e, "q", q), e["replay_weight"][:, None] * (q - y[:, None]) / 4)
    assert weighted.needs.columns == Regression().needs.columns | {"replay_weight"}
    facts = Regression().loss(e, {"q": q}).facts
    torch.testing.assert_close(facts["value_error"], ((q - y[:, None]) ** 2).mean(1))
    torch.testing.assert_close(slope(Regression(), e, "q", q[:, 0]), (q[:, 0] - y) / 4)


def test_quantile_shaped_targets_broadcast_over_their_own_dimensions() -> None:
    q = torch.zeros(4, 2, 3)
    term = Regression(signal="quantiles", target=Stored("x"))
    x = torch.arange(4.0)
    torch.testing.assert_close(slope(term, transitions(x=x), "quantiles", q), (q - x[:, None, None]) / 4)


def test_a_target_is_constant() -> None:
    """No gradient through what the column was made of, even where it still has a graph."""
    base = torch.tensor(NEXT, requires_grad=True)
    e = transitions().with_columns("step", next_q=2 * base)
    q = torch.zeros(4, 1, requires_grad=True)
    torch.autograd.backward(Regression()(e, {"q": q}))
    assert base.grad is None
    assert q.grad is not None
    assert (q.grad < 0).all()


# ---- terms that take turns -------------------------------------------------------------------------------------------
def test_a_delayed_term_is_in_every_kth_update() -> None:
    critic, actor = Regression(name="critic"), Bonus(signal="pathwise_q", every=3, name="actor")
    total = critic + 0.5 * actor
    titles = [[t.title for _, t in total.at(u).terms()] for u in range(7)]
    assert titles == [["critic"], ["critic"], ["critic", "actor"]] * 2 + [["critic"]]
    assert total.at(2) is total
    assert "pathwise_q" not in total.at(1).needs.signals
    assert total.at(5).terms()[1][0] == 0.5
    assert [actor.at(u) is actor for u in range(4)] == [False, False, True, False]
    assert actor.at(1) is nothing


def test_needs_belong_to_the_record_that_they_were_derived_from() -> None:
    """They are kept once derived: a changed copy derives its own."""
    soft = Regression(target=Bellman(temperature=0.2))
    assert "next_logp" in soft.needs.columns
    hard = soft.but(temperature=None)
    assert "next_logp" not in hard.needs.columns
    assert "next_logp" in soft.needs.columns
    total = soft + Likelihood()
    assert total.needs.signals == {"q", "logp"}
    assert total.at(0).needs is total.needs
    later = (soft + Likelihood(every=2)).at(0)
    assert later.needs.signals == {"q"}
    assert soft == Regression(target=Bellman(temperature=0.2)), "what was derived is no part of what it is"
    assert with_settings(PolicyGradient(advantage=Bellman(temperature=Knob("a", 1.0))), {}).needs.signals == {"logp"}
