"""Several rewards: what constrained RLHF and directions equal where they reduce to something known."""

from __future__ import annotations

import math

import pytest
import torch

from tests.toys import gradient, rollouts_of
from unipo.episodes import Episodes
from unipo.methods.constrained import VARIANTS, constrained_rlhf, dpa, levels_of
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
from unipo.policies.tabular import TabularPolicy
from unipo.reproduce.constrained import ANGLES, Numbered, Proxies, hypervolume, learned
from unipo.sources.controllers import Below, Lagrangian
from unipo.sources.directions import Along, Directed, weights_at
from unipo.sources.prompts import Prompt
from unipo.sources.stages.augment import Drawn
from unipo.sources.text.tabular import tabular_rollouts
from unipo.tasks.tabular import TabularTask

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


def test_value_heads_that_know_nothing_leave_the_rewards() -> None:
    """Values 0: with the last step's reward discounted by (gamma lambda)^steps to go, GAE of each stream by hand."""
    e, logp = batch()
    objective = constrained_rlhf(thresholds=TWO, critic="heads").objective
    names = ("value.first", "value.second", "value.kl")
    assert {f"old_{n}" for n in names} <= objective.needs.columns
    assert set(names) <= objective.needs.signals
    assert constrained_rlhf(thresholds=TWO, critic="heads").for_text
    blank = torch.zeros_like(logp)
    e = e.with_columns("step", **{f"old_{n}": blank for n in names})
    signals = {"logp": logp.clone().requires_grad_(), **{n: blank.clone().requires_grad_() for n in names}}
    loss = with_settings(objective, {A: 1.0, B: 0.0}).loss(e, signals).value
    found = torch.autograd.grad(loss, [signals[n] for n in ("logp", *names)])
    left = e.expand(e.lengths()) - 1 - e.position()
    returns = {
        "value.first": 0.9405**left * e.expand("reward.first"),
        "value.second": 0.9405**left * e.expand("reward.second"),
    }
    cost = torch.zeros_like(logp)
    for i in reversed(range(len(logp))):
        paid = e["reference_logp"][i] - e["behavior_logp"][i]
        cost[i] = paid + (0.9405 * cost[i + 1] if int(left[i]) else 0.0)
    n = len(logp)
    for k, (name, target, weight) in enumerate(
        (("first", returns["value.first"], 1.0), ("second", returns["value.second"], 1.0), ("kl", cost, 0.4)), 1
    ):
        assert torch.allclose(found[k], -weight * target / n), name
    streams = ((returns["value.first"], 1e-8), (cost, 1e-3))
    mixed = sum((x - x.mean()) / (x.std() + eps) for x, eps in streams)
    assert isinstance(mixed, torch.Tensor)
    ratio = (logp - e["behavior_logp"]).exp()
    kept = torch.where(mixed > 0, ratio <= 1.2, ratio >= 0.8)
    assert torch.allclose(found[0], -kept.double() * ratio * mixed / n)


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


# ---- directions --------------------------------------------------------------------------------------------------------
def test_the_first_direction_is_best_of_n() -> None:
    """v = e1: the coefficients are those of likelihood on the best answer by the first reward, the first of equal ones."""
    e, logp = batch()
    e = e.with_columns("episode", **{"reward.length": torch.rand(len(e)).double()})
    found = gradient(dpa().objective, directions(e, 0.0, names=("first", "length")), logp)
    best = torch.tensor([True, False, False, False, False, True, False, False, False, False, True, False])
    steps = e.expand(best)
    assert torch.equal(found != 0, steps)
    assert found[steps].tolist() == pytest.approx([-1.0 / int(steps.sum())] * int(steps.sum()))


def directions(e: Episodes, angle: float, names: tuple[str, str], scales: tuple[float, float] = (1.0, 1.0)) -> Episodes:
    """The groups after `Along`, all with one direction."""
    prompts = {int(i): Directed().at(Prompt(id=int(i), text="?"), angle) for i in e["prompt_id"].unique()}
    return Along(names, scales)(e, Drawn(prompts, None, 0, 0, 0))  # type: ignore[arg-type]


def test_one_answer_has_no_drift() -> None:
    """Groups of one: the expected gradient of its likelihood is 0, by enumeration."""
    task = TabularTask(2, 3, 2, lambda prompt, words: float(words[0]))
    policy = TabularPolicy.random(2, 2, 3, seed=1)
    every = task.episodes()
    alone = every.grouped(torch.arange(len(every)))
    probability = task.log_probability(policy).exp().detach().flatten()
    signals = policy.signals(alone, ["logp"])
    loss = dpa().objective.loss(alone, signals).value
    each = alone.reduce(-signals["logp"])
    assert float(loss.detach()) == pytest.approx(float(each.detach().mean() / 2.0)), (
        "every answer is the best of its group"
    )
    drift = torch.autograd.grad((probability * each).sum(), policy.logits)[0]
    assert float(drift.abs().max()) < 1e-15


def test_scales_and_constants_of_directions() -> None:
    e, logp = batch()
    two = ("first", "second")
    own = gradient(dpa().objective, directions(e, -30.0, two), logp)
    longer = gradient(dpa().objective, directions(e, -30.0, two, (7.0, 7.0)), logp)
    moved = e.with_columns("episode", **{"reward.second": e["reward.second"] + 3.0})
    assert torch.equal(own, longer)
    assert torch.equal(own, gradient(dpa().objective, directions(moved, -30.0, two), logp))
    assert not torch.equal(own, gradient(dpa().objective, directions(e, -30.0, two, (1.0, 40.0)), logp))
    by_hand = math.floor(0.5 + 100 * math.cos(math.pi / 6)) / 100 * e["reward.first"] - 0.5 * e["reward.second"]
    assert torch.allclose(directions(e, -30.0, two)["reward"], by_hand)


def test_directions_are_read_back_from_their_integers() -> None:
    for angle in torch.linspace(-45, 0, 181).tolist():
        first, second = weights_at(angle)
        assert math.degrees(math.atan2(second, first)) == pytest.approx(angle, abs=0.5)
        assert first >= 71
        assert second <= 0
    asked = Directed(("near", "length"))
    prompt = Prompt(id=7, text="3+4=")
    assert asked.held_out(prompt).text == "[100,0] 3+4="
    drawn = [asked(prompt, 0, step) for step in range(200)]
    angles = [math.degrees(math.atan2(*reversed(p.columns["direction"]))) for p in drawn]
    assert min(angles) == pytest.approx(-45, abs=2)
    assert max(angles) == pytest.approx(0, abs=2)
    assert asked(prompt, 0, 3) == asked(prompt, 0, 3) != asked(prompt, 1, 3)
    chat = asked.at(Prompt(id=1, text=[{"role": "user", "content": "hi"}]), -30.0).text
    assert isinstance(chat, list)
    assert "near*87 + length*-50" in chat[0]["content"]
    assert chat[1:] == [{"role": "user", "content": "hi"}]
    assert {Directed(angles=(-10.0, -20.0))(prompt, 0, s).text for s in range(20)} == {"[98,-17] 3+4=", "[94,-34] 3+4="}


def test_best_of_n_stays_near() -> None:
    """KL(best of n || pi) <= log n - (n - 1) / n, by enumeration."""
    logp = torch.randn(6, generator=torch.Generator().manual_seed(2), dtype=torch.float64).log_softmax(0)
    for n in (1, 2, 5, 16):
        top = logp.exp().cumsum(0) ** n
        best = torch.cat([top[:1], top.diff()])
        kl = float((best * (best.log() - logp)).sum())
        assert kl <= math.log(n) - (n - 1) / n + 1e-12
        assert (kl == pytest.approx(0.0)) == (n == 1)


def test_directions_in_a_run_of_rollouts() -> None:
    """Two prompts and two directions: each group is rewarded along the direction that its context shows."""
    task = TabularTask(2, 3, 1, lambda prompt, words: 0.0)
    policy = TabularPolicy.random(2 * len(ANGLES), 1, 3)
    parts = {"help": lambda prompt, words: float(words[0]), "length": lambda prompt, words: 1.0 + prompt}
    recipe = dpa(rewards="help=1,length=2", group=4).but(ask=Numbered(("help", "length"), angles=ANGLES[:2]))
    drawn = tabular_rollouts(task, policy, recipe.rollouts, 0, parts=parts).draw(0, 0)
    context = drawn.context().values.tolist()
    for i in range(len(drawn)):
        prompt, direction = divmod(context[i], len(ANGLES))
        v = [w / 100 for w in weights_at(ANGLES[direction])]
        assert int(drawn["prompt_id"][i]) == prompt
        expected = v[0] * float(drawn["reward.help"][i]) + v[1] * 2.0 * (1.0 + prompt)
        assert float(drawn["reward"][i]) == pytest.approx(expected)
    pairs = tabular_rollouts(task, policy, dpa(rewards="help=1,length=2", group=8, learner="dpo").but(
        ask=Numbered(("help", "length"), angles=ANGLES[:2])).rollouts, 0, parts=parts).draw(0, 0)  # fmt: skip
    better, worse = pairs["reward"][pairs["chosen"]], pairs["reward"][~pairs["chosen"]]
    assert bool((better > worse).all())
    assert dpa(learner="dpo").kinds == ("pair",)


def test_two_rewards_are_named() -> None:
    assert dpa(rewards="near=1,length=0.1").rewards == {"near", "length"}
    with pytest.raises(ValueError, match="expected two"):
        dpa(rewards="near=1")
    with pytest.raises(ValueError, match="expected one of sft, dpo"):
        dpa(learner="ppo")


def test_a_hypervolume_by_hand() -> None:
    """Points (help, length): 0.5 (1 - 0.2) + (0.8 - 0.5) (1 - 0.6); a point that is worse in both adds nothing."""
    assert hypervolume([(0.8, 0.6), (0.5, 0.2)]) == pytest.approx(0.4 + 0.12)
    assert hypervolume([(0.8, 0.6), (0.5, 0.2), (0.4, 0.3), (0.7, 0.9)]) == pytest.approx(0.4 + 0.12)
    assert hypervolume([]) == 0.0
