"""Controllers that are turned at every update, against the recursions that they stand for."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch

from unipo.methods.actor_critic import sac
from unipo.sources.controllers import Controller, DualAscent, InverseDecay, MovingMean, Ramp


def turned(controller: Controller, readings: Sequence[float], metric: str = "pathwise_logp") -> list[float]:
    """The setting before the first reading, and after each."""
    state = controller.start()
    made = [controller.setting(state, 0)]
    for x in readings:
        state = controller.observe(state, {metric: x})
        made.append(controller.setting(state, 0))
    return made


def test_a_ramp_is_linear_and_then_constant() -> None:
    ramp = Ramp(knob="x", value=1.0, final=0.2, steps=4)
    assert [ramp.setting({}, s) for s in range(7)] == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2, 0.2, 0.2])
    assert Ramp(knob="x", value=1.0, final=3.0, steps=2).setting({}, 1) == 2.0
    assert Ramp(knob="x", value=1.0, final=3.0, steps=0).setting({}, 1) == 3.0


def test_the_dual_variable_is_adam_on_its_logarithm() -> None:
    """torch's Adam on log alpha with the loss alpha * (limit - log pi), reading by reading."""
    readings = [3.0, 2.0, -4.0, 1.0, 0.0, -1.0, 5.0, 5.0]
    limit, rate = 1.5, 0.02
    log = torch.tensor(math.log(0.3), dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([log], lr=rate)
    expected = [0.3]
    for x in readings:
        adam.zero_grad()
        (log.exp() * (limit - x)).backward()
        adam.step()
        expected.append(math.exp(log.item()))
    dual = DualAscent(knob="alpha", value=0.3, limit=limit, learning_rate=rate)
    assert turned(dual, readings) == pytest.approx(expected, rel=1e-12)


def test_the_dual_variable_rises_above_the_limit_and_falls_below() -> None:
    """log pi above the limit is an entropy below its target: the temperature rises, by the learning rate at first."""
    dual = DualAscent(knob="alpha", value=1.0, limit=2.0, learning_rate=0.01)
    assert turned(dual, [2.5])[1] == pytest.approx(math.exp(0.01))
    assert turned(dual, [1.5])[1] == pytest.approx(math.exp(-0.01))
    assert turned(dual, [2.0, 2.0, 2.0]) == [1.0] * 4, "at the limit it stays"
    assert turned(dual, [math.nan, math.inf]) == [1.0] * 3
    assert dual.observe(dual.start(), {"other": 9.0}) == dual.start()


def test_dual_ascent_finds_the_temperature_with_the_entropy_asked_for() -> None:
    """The best normal policy of Q = -a^2 / 2 at temperature t has variance t: E log pi = -log(2 pi e t) / 2."""
    limit = -0.7
    dual = DualAscent(knob="alpha", value=1.0, limit=limit, learning_rate=0.02)
    state = dual.start()
    for _ in range(600):
        t = dual.setting(state, 0)
        state = dual.observe(state, {"pathwise_logp": -0.5 * math.log(2 * math.pi * math.e * t)})
    assert dual.setting(state, 0) == pytest.approx(math.exp(-2 * limit) / (2 * math.pi * math.e), rel=1e-3)


def test_limits_are_sized_by_the_action_space() -> None:
    """Of boxes per dimension (SAC's -dim A), of choices 98 % of the largest entropy: log pi is minus the entropy."""
    dual = DualAscent(knob="alpha", limit=1.0)
    assert dual.sized(6, discrete=False).setting({"log": 0.0}, 0) == 1.0
    assert turned(dual.sized(6, discrete=False), [6.0, 6.0]) == [1.0] * 3
    assert turned(dual.sized(6, discrete=False), [6.1])[1] > 1 > turned(dual.sized(6, discrete=False), [5.9])[1]
    discrete, uniform = dual.sized(4, discrete=True), -math.log(4)
    assert turned(discrete, [uniform])[1] < 1, "a uniform policy has entropy to spare"
    assert turned(discrete, [0.97 * uniform])[1] > 1
    assert Ramp(knob="x", final=1.0, steps=3).sized(6, discrete=False) == Ramp(knob="x", final=1.0, steps=3)


def test_sac_asks_for_minus_one_nat_per_dimension() -> None:
    (dual,) = sac(entropy_target=-1.0).controllers
    assert isinstance(dual, DualAscent)
    assert dual.every_update
    sized = dual.sized(3, discrete=False)
    assert turned(sized, [3.0]) == [1.0, 1.0]
    assert turned(sized, [3.5])[1] > 1


def test_state_is_plain_numbers_and_settings_are_functions_of_it() -> None:
    """As a checkpoint needs: going on from a copy gives the same."""
    dual = DualAscent(knob="alpha", learning_rate=0.1)
    state = dual.observe(dual.start(), {"pathwise_logp": 3.0})
    assert all(type(v) is float for v in state.values())
    before = dict(state)
    one, other = dual.observe(state, {"pathwise_logp": 0.0}), dual.observe(dict(state), {"pathwise_logp": 0.0})
    assert one == other
    assert state == before, "observing changes nothing in place"


def test_the_inverse_decay_ends_at_its_largest() -> None:
    controller = InverseDecay(knob="x", value=2.0).lasting(4)
    assert [controller.setting({}, s) for s in range(5)] == pytest.approx([2, 2 / 0.75, 4, 8, 8])


def test_a_moving_mean_starts_at_the_first_reading() -> None:
    mean = MovingMean(knob="x", value=9.0, metric="q", rate=0.25)
    assert turned(mean, [4.0, 8.0, math.nan, 0.0], "q") == pytest.approx([9, 4, 5, 5, 3.75])
