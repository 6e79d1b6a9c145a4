"""Several rewards: what constrained RLHF and directions equal where they reduce to something known."""

from __future__ import annotations

import math

import pytest
import torch

from tests.toys import gradient, rollouts_of
from unipo.episodes import Episodes
from unipo.methods.constrained import VARIANTS, constrained_rlhf, levels_of
from unipo.objectives import (
    BatchStd,
    ClipMask,
    GroupMean,
    LogRatioToGo,
    Normalised,
    Outcome,
    Plus,
    PolicyGradient,
    Times,
    TokenMean,
    TokenRatio,
    Whitened,
    with_settings,
)
from unipo.reproduce.constrained import Proxies, learned
from unipo.sources.controllers import Below, Lagrangian

TWO = {"first": 0.5, "second": 0.4}
A, B = "multiplier/first", "multiplier/second"


def batch() -> tuple[Episodes, torch.Tensor]:
    """Three groups of rollouts with two rewards, away from behaviour and reference."""
    rewards = [[1.0, 0.0, 0.0, 1.0], [0.2, 0.9, 0.4, 0.1], [0.0, 0.0, 1.0, 0.0]]
    e, logp = rollouts_of(rewards, [[2, 3, 1, 4], [1, 2, 2, 3], [3, 1, 1, 2]], drift=0.2)
    second = torch.rand(len(e), generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    away = 0.3 * torch.randn(len(logp), generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    e = e.with_columns("episode", **{"reward.first": e["reward"], "reward.second": second})
    return e.with_columns("step", reference_logp=logp + away), logp


def stream(name: str) -> Whitened:
    return Whitened(Normalised(center=GroupMean(), outcome=Outcome(name)))


KL = Whitened(LogRatioToGo(1.0), BatchStd(1e-3))


def ppo(*advantages: object) -> PolicyGradient:
    return PolicyGradient(
        advantage=Plus(advantages), weight=TokenRatio(), mask=ClipMask(0.2, 0.2), aggregate=TokenMean()
    )  # type: ignore[arg-type]


def test_multipliers_of_zero_leave_the_kl_alone_and_of_one_the_rewards() -> None:
    """mu -> -inf under a sigmoid: A = N A_KL; mu -> +inf: A = sum A_i, and the KL weighs nothing. N = 1 with s = 0: A_KL."""
    e, logp = batch()
    objective = constrained_rlhf(thresholds=TWO, variant="inequality").objective
    shut = Lagrangian(knob=A, value=-1000.0)
    assert shut.setting(shut.start(), 0) == 0.0
    wide = Lagrangian(knob=A, value=1000.0)
    assert wide.setting(wide.start(), 0) == 1.0
    assert torch.equal(gradient(objective, e, logp, {A: 0.0, B: 0.0}), gradient(ppo(Times(2.0, KL)), e, logp))
    rewards = ppo(stream("reward.first"), stream("reward.second"))
    assert torch.allclose(
        gradient(objective, e, logp, {A: 1.0, B: 1.0}), gradient(rewards, e, logp), rtol=0, atol=1e-15
    )
    one = constrained_rlhf(thresholds={"first": 0.5}).objective
    assert torch.equal(gradient(one, e, logp, {A: 0.0}), gradient(ppo(KL), e, logp))
    assert float(gradient(one, e, logp, {A: 0.0}).norm()) > 0


def test_frozen_multipliers_are_fixed_weights() -> None:
    """(N - s1 - s2) A_KL + s1 A1 + s2 A2 with numbers, and the fixed variant: A_KL + w A1 + w A2."""
    e, logp = batch()
    mixed = ppo(Times(2.0 - 0.3 + 0.6, KL), Times(0.3, stream("reward.first")), Times(-0.6, stream("reward.second")))
    found = gradient(constrained_rlhf(thresholds=TWO).objective, e, logp, {A: 0.3, B: -0.6})
    assert torch.allclose(found, gradient(mixed, e, logp), rtol=0, atol=1e-15)
    fixed = constrained_rlhf(thresholds=TWO, variant="fixed", weight=0.7)
    assert not fixed.controllers
    added = ppo(KL, Times(0.7, stream("reward.first")), Times(0.7, stream("reward.second")))
    assert torch.allclose(gradient(fixed.objective, e, logp), gradient(added, e, logp), rtol=0, atol=1e-15)
    saturated = constrained_rlhf(thresholds=TWO, variant="saturated", weight=0.7)
    assert torch.allclose(
        gradient(saturated.objective, e, logp, {A: 1.0, B: 1.0}), gradient(added, e, logp), rtol=0, atol=1e-15
    )
    only = gradient(saturated.objective, e, logp, {A: 1.0, B: 0.0})
    assert torch.allclose(only, gradient(ppo(KL, Times(0.7, stream("reward.first"))), e, logp), rtol=0, atol=1e-15)


def test_streams_are_standardised_before_they_are_mixed() -> None:
    """A reward in other units changes nothing; a constant for a prompt changes nothing."""
    e, logp = batch()
    objective = with_settings(constrained_rlhf(thresholds=TWO).objective, {A: 0.4, B: 0.3})
    own = gradient(objective, e, logp)
    shift = torch.tensor([5.0, -2.0, 0.3]).double()[e.index("group", "episode")]
    other = e.with_columns("episode", **{"reward.second": 100.0 * e["reward.second"] + shift})
    assert torch.allclose(gradient(objective, other, logp), own, rtol=0, atol=1e-5 * float(own.abs().max()))


def test_the_multiplier_is_sgd_with_momentum_on_its_loss() -> None:
    """torch's SGD on s(mu) (J - theta), step by step."""
    squashes = {"sigmoid": torch.sigmoid, "tanh": torch.tanh, "none": lambda x: x}
    readings = [0.1, 0.9, 0.7, 0.2, 0.5, 0.9, 0.9]
    for name, squash in squashes.items():
        mu = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
        sgd = torch.optim.SGD([mu], lr=0.3, momentum=0.1)
        controller = Lagrangian(knob="s", value=0.2, target=0.5, squash=name, learning_rate=0.3, clip=math.inf)
        state = controller.start()
        for x in readings:
            assert controller.setting(state, 0) == pytest.approx(float(squash(mu.detach())), abs=1e-12)
            sgd.zero_grad()
            (squash(mu) * (x - 0.5)).backward()
            sgd.step()
            state = controller.observe(state, {"reward": x})
        assert controller.setting(state, 0) == pytest.approx(float(squash(mu.detach())), abs=1e-12)


def test_the_multiplier_rises_while_the_reward_is_below() -> None:
    for squash, low, high in (("sigmoid", 0.0, 1.0), ("tanh", -1.0, 1.0), ("positive", 0.0, math.inf)):
        controller = Lagrangian(knob="s", target=0.5, squash=squash, momentum=0.0)
        start = controller.start()
        up, down = (controller.setting(controller.observe(start, {"reward": x}), 0) for x in (0.1, 0.9))
        assert up > controller.setting(start, 0) >= down
        assert low <= down <= up <= high
        assert controller.observe(start, {"reward": math.nan}) == start
    assert controller.setting(controller.observe(start, {"reward": 50.0}), 0) == 0.0, "never below 0"
    clipped = Lagrangian(knob="s", target=100.0, squash="none", clip=0.5, momentum=0.0)
    assert clipped.setting(clipped.observe(clipped.start(), {"reward": 0.0}), 0) == pytest.approx(0.05)
    damped = Lagrangian(knob="s", target=0.5, squash="none", learning_rate=0.0, proportional=4.0)
    assert damped.setting(damped.observe(damped.start(), {"reward": 0.25}), 0) == pytest.approx(1.0)
    slow = Lagrangian(knob="s", target=0.0, squash="none", learning_rate=1.0, momentum=0.0, clip=9.0, decay=0.5)
    state = slow.observe(slow.observe(slow.start(), {"reward": 1.0}), {"reward": 4.0})
    assert slow.setting(state, 0) == pytest.approx(-1.0 - (0.25 * 1.0 + 0.5 * 4.0) / 0.75), "the mean is debiased"
    with pytest.raises(ValueError, match="expected one of sigmoid, tanh"):
        Lagrangian(knob="s", squash="softmax")


def test_a_gate_is_open_below_its_target() -> None:
    gate = Below(knob="g", target=0.5)
    assert gate.setting(gate.start(), 0) == 1.0
    settings = [gate.setting(gate.observe(gate.start(), {"reward": x}), 0) for x in (0.4, 0.5, 0.6)]
    assert settings == [1.0, 0.0, 0.0]
    assert gate.observe({"setting": 0.0}, {}) == {"setting": 0.0}


def test_constraints_hold_at_the_end() -> None:
    """At the end of a run the mean rewards are the thresholds, which lie above where it started."""
    problem = Proxies(5)
    first, second, _ = problem.means(problem.reference)
    points = {"first": first + 0.12, "second": second + 0.08}
    seen = learned(constrained_rlhf(thresholds=points, group=16, rate=0.3), problem, 0.2, 0, 80)
    last = torch.tensor(seen[-15:]).mean(0)
    assert last[:2].tolist() == pytest.approx(list(points.values()), abs=0.03)


def test_thresholds_are_read_by_name() -> None:
    assert levels_of(0.8) == {"reward": 0.8}
    assert levels_of("math=0.8, brief=0.5") == {"math": 0.8, "brief": 0.5} == levels_of({"math": 0.8, "brief": 0.5})
    with pytest.raises(ValueError, match="NAME=NUMBER"):
        levels_of("math:0.8")
    with pytest.raises(ValueError, match="expected one of equality"):
        constrained_rlhf(variant="xi")
    needs = constrained_rlhf(thresholds=TWO).needs
    assert {"reward.first", "reward.second", "reference_logp"} <= needs.columns
    assert needs.group_size == 2
    assert all(constrained_rlhf(variant=v).for_text for v in VARIANTS)


def test_searched_thresholds_are_knobs_of_their_constraints() -> None:
    recipe = constrained_rlhf(thresholds=TWO, search="gold", highest=0.9)
    assert {"threshold/first", "threshold/second"} <= set(recipe.knobs)
    constraint = with_settings(recipe.controllers[0], {"threshold/first": 0.33})
    assert isinstance(constraint, Lagrangian)
    assert constraint.target == 0.33
    assert [c.knob for c in recipe.controllers] == [A, B, "threshold/first", "threshold/second"]
