"""SEC's bandit over categories, OBLR-PO's baseline and its learning rate, against numbers worked out by hand or enumerated."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.toys import ToyPolicy, gradient, rollouts_of, toy_batch
from unipo import functional as F
from unipo.episodes import Episodes
from unipo.learner import Learner, LearnerSettings
from unipo.methods.self_tuning import oblr_po, sec_curriculum
from unipo.objectives import GroupStd, LeaveOneOut, Normalised, NormWeighted
from unipo.sources.controllers import SignalShare
from unipo.sources.prompts import Prompt, RowPrompts
from unipo.sources.text.arms import ArmChoice, Arms, boltzmann, by_columns, epsilon_greedy, proportional

P = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64)
R = torch.tensor([1.0, -0.4, 2.5, 0.3], dtype=torch.float64)


# ---- the best baseline -----------------------------------------------------------------------------------------------
def norms(p: Tensor) -> Tensor:
    return F.score_square(p.log(), p.square().sum().expand_as(p))


def best_baseline(p: Tensor, reward: Tensor) -> Tensor:
    return (p * norms(p) * reward).sum() / (p * norms(p)).sum()


def estimates(p: Tensor, reward: Tensor, baseline: Tensor | float) -> Tensor:
    """[K, K]: the one-sample gradient of the logits for each arm."""
    return (reward - baseline)[:, None] * (torch.eye(len(p), dtype=p.dtype) - p)


def variance(p: Tensor, reward: Tensor, baseline: Tensor | float) -> float:
    found = estimates(p, reward, baseline)
    return float((p * (found - p @ found).square().sum(1)).sum())


def test_two_arms_with_the_best_baseline_have_no_variance() -> None:
    p, reward = torch.tensor([0.3, 0.7], dtype=torch.float64), torch.tensor([2.0, -1.0], dtype=torch.float64)
    b = best_baseline(p, reward)
    assert float(b) == pytest.approx(0.7 * 2.0 + 0.3 * -1.0, abs=1e-14)
    expected = 0.3 * 0.7 * 3.0 * torch.tensor([1.0, -1.0], dtype=torch.float64)
    for found in estimates(p, reward, b):
        assert torch.allclose(found, expected, atol=1e-14)
    assert variance(p, reward, b) == pytest.approx(0.0, abs=1e-14)


def test_the_best_baseline_minimises_the_variance() -> None:
    exact = (torch.eye(4, dtype=torch.float64) - P).square().sum(1)
    assert torch.allclose(norms(P), exact, atol=1e-14), "1 - 2 pi(a) + sum pi^2 is the norm of e_a - pi"
    b = float(best_baseline(P, R))
    grid = np.linspace(-2, 3, 501)
    assert b == pytest.approx(grid[int(np.argmin([variance(P, R, x) for x in grid]))], abs=0.01)
    assert variance(P, R, b) < min(variance(P, R, float((P * R).sum())), variance(P, R, 0.0))


def test_the_group_estimates_the_best_baseline() -> None:
    """A group in which every arm is as often as it is likely; leaving one of many out does not matter."""
    arm = torch.arange(4).repeat_interleave((P * 20_000).long())
    found = F.weighted_leave_one_out_mean(R[arm], norms(P)[arm], torch.zeros_like(arm), 1)
    assert torch.allclose(found, best_baseline(P, R).expand_as(found), atol=2e-3)
    assert not torch.allclose(found, (P * R).sum().expand_as(found), atol=2e-2)


def test_the_estimator_is_unbiased() -> None:
    """Over all groups of 3 the expected gradient is the exact one; with i in its own baseline it is not."""
    exact = P @ estimates(P, R, 0.0)
    total, inside = torch.zeros(4, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
    for arms in itertools.product(range(4), repeat=3):
        a, w = torch.tensor(arms), norms(P)
        b = F.weighted_leave_one_out_mean(R[a], w[a], torch.zeros(3, dtype=torch.long), 1)
        own = (w[a] * R[a]).sum() / w[a].sum()
        score = torch.eye(4, dtype=torch.float64)[a] - P
        total += P[a].prod() * ((R[a] - b)[:, None] * score).mean(0)
        inside += P[a].prod() * ((R[a] - own)[:, None] * score).mean(0)
    assert torch.allclose(total, exact, atol=1e-14)
    assert not torch.allclose(inside, exact, atol=1e-2)


def with_norms(episodes: Episodes, seed: int = 0) -> Episodes:
    generator = torch.Generator().manual_seed(seed)
    return episodes.with_columns(
        "step", old_collision=torch.rand(episodes.count("step"), generator=generator, dtype=torch.float64)
    )


def test_equal_norms_give_leave_one_out() -> None:
    episodes, logp = rollouts_of([[1.0, 0.0, 0.0, 1.0], [0.2, 0.5, 0.9]], [[2, 2, 2, 2], [3, 3, 3]])
    n = episodes.count("step")
    flat = {"old_logp": torch.full((n,), -0.7).double(), "old_collision": torch.full((n,), 0.4).double()}
    same = episodes.with_columns("step", **flat)
    assert torch.allclose(NormWeighted().of(same["reward"], same), LeaveOneOut().of(same["reward"], same), atol=1e-15)
    other = with_norms(episodes)
    assert not torch.allclose(NormWeighted().of(other["reward"], other), LeaveOneOut().of(other["reward"], other))
    none = episodes.with_columns("step", old_logp=torch.zeros(n).double(), old_collision=torch.ones(n).double())
    assert torch.equal(NormWeighted().of(none["reward"], none), LeaveOneOut().of(none["reward"], none)), (
        "no norm at all"
    )
    mine, rloo = (
        gradient(oblr_po().objective.but(advantage=Normalised(center=c)), same, logp)
        for c in (NormWeighted(), LeaveOneOut())
    )
    assert torch.allclose(mine, rloo, atol=1e-15)


def test_a_constant_added_to_rewards_moves_the_baseline_alone() -> None:
    episodes, logp = rollouts_of([[1.0, 0.0, 0.3]], [[2, 3, 1]])
    episodes = with_norms(episodes)
    moved = episodes.with_columns("episode", reward=episodes["reward"] + 5.0)
    before, after = (NormWeighted().of(e["reward"], e) for e in (episodes, moved))
    assert torch.allclose(after, before + 5.0, atol=1e-14)
    assert torch.allclose(gradient(oblr_po().objective, moved, logp), gradient(oblr_po().objective, episodes, logp))


def test_constant_rewards_move_nothing() -> None:
    episodes, logp = rollouts_of([[0.3, 0.3, 0.3]], [[2, 3, 1]])
    assert not gradient(oblr_po().objective, with_norms(episodes), logp).any()


def test_the_baseline_by_hand() -> None:
    """Weights 1, 2, 3 and rewards 6, 0, 3: the others' means are 9/5, 15/4 and 6/3."""
    values, weight = (torch.tensor(x, dtype=torch.float64) for x in ([6.0, 0.0, 3.0], [1.0, 2.0, 3.0]))
    found = F.weighted_leave_one_out_mean(values, weight, torch.zeros(3, dtype=torch.long), 1)
    assert torch.allclose(found, torch.tensor([1.8, 3.75, 2.0], dtype=torch.float64))
    alone = F.weighted_leave_one_out_mean(values[:1], weight[:1], torch.zeros(1, dtype=torch.long), 1)
    assert alone.tolist() == [6.0]


# ---- the learning rate -----------------------------------------------------------------------------------------------
def test_the_rate_follows_the_share_of_signal() -> None:
    share = SignalShare(knob="learning_rate", decay=0.0)
    assert share.setting(share.start(), 0) == 1.0

    def after(**metrics: float) -> float:
        return share.setting(share.observe(share.start(), metrics), 1)

    assert after(grad_norm=2.0, gradient_noise=0.0) == 1.0
    assert after(grad_norm=2.0, gradient_noise=1.0) == pytest.approx(0.75)  # SNR 3: 3 / 4
    assert after(grad_norm=2.0, gradient_noise=4.0) == 0.0
    assert after(grad_norm=1.0, gradient_noise=9.0) == 0.0
    assert after(grad_norm=math.nan, gradient_noise=1.0) == 1.0
    smooth = SignalShare(knob="learning_rate", decay=0.5)
    state = smooth.start()
    for norm, noise in ((2.0, 4.0), (4.0, 0.0)):
        state = smooth.observe(state, {"grad_norm": norm, "gradient_noise": noise})
    assert smooth.setting(state, 2) == pytest.approx((0.25 * 4 + 0.5 * 16 - 0.25 * 4) / (0.25 * 4 + 0.5 * 16))


def test_noise_is_the_variance_of_the_gradient() -> None:
    """Against the gradients of the parts, each computed alone; and the gradient itself is what it is without the parts."""
    batch = toy_batch(groups=6, demos=False)
    batch = batch.select(batch.category("kind", "rollout"))
    objective = oblr_po().objective
    parts = 3

    def flat(learner: Learner) -> Tensor:
        return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in learner.parameters()])

    plain = Learner({"policy": ToyPolicy()}, LearnerSettings(token_budget=1000))
    measured = Learner({"policy": ToyPolicy()}, LearnerSettings(token_budget=20), gradient_parts=parts)
    plain.gradient(batch, objective)
    found = measured.gradient(batch, objective)
    assert torch.allclose(flat(measured), flat(plain), atol=1e-12)
    alone = []
    for groups in torch.arange(6).tensor_split(parts):
        learner = Learner({"policy": ToyPolicy()})
        learner.gradient(batch.select(groups, "group"), objective)
        alone.append(flat(learner))
    g = torch.stack(alone)
    variance = float((g - g.mean(0)).square().sum()) / (parts - 1) / parts
    assert torch.allclose(g.mean(0), flat(plain), atol=1e-12), "equal parts: SUM is a mean over episodes"
    assert found.gradient_noise == pytest.approx(variance, rel=1e-9)
    assert math.isnan(plain.gradient(batch, objective).gradient_noise)


# ---- arms ------------------------------------------------------------------------------------------------------------
def arms(**settings: object) -> Arms:
    rows = {
        name: RowPrompts([Prompt(id=10 * k + i, text=f"{name}{i}") for i in range(3)]) for k, name in enumerate("abc")
    }
    return Arms(rows, ArmChoice(**settings), 0)  # type: ignore[arg-type]


def batch_of(names: list[str], rewards: list[float], group: int = 2) -> tuple[Episodes, Tensor]:
    """Groups of two rollouts of two tokens, each of the named arm, and their z-scores [N]."""
    grouped = [rewards[i : i + group] for i in range(0, len(rewards), group)]
    episodes, _ = rollouts_of(grouped, [[2] * group] * len(grouped))
    episodes = episodes.with_columns("episode", arm=[n for n in names for _ in range(group)])
    return episodes, Normalised(scale=GroupStd(0.0, ddof=0))(episodes, {})


def test_without_values_or_sharpness_arms_are_uniform() -> None:
    third = np.full(3, 1 / 3)
    assert np.allclose(arms().probabilities, third)
    assert np.allclose(boltzmann(np.array([1.0, 0.0, -2.0]), math.inf), third)
    still = arms(rate=0.0)
    still.observe(*batch_of(["a"], [1.0, 0.0]))
    still.settle()
    assert np.allclose(still.probabilities, third)


def test_a_constant_added_to_all_values_changes_nothing() -> None:
    values = np.array([0.2, 1.0, -0.3])
    assert np.allclose(boltzmann(values + 700.0, 0.4), boltzmann(values, 0.4), atol=1e-14)
    ratio = boltzmann(values, 0.4)[1] / boltzmann(values, 0.4)[0]
    assert ratio == pytest.approx(math.exp(0.8 / 0.4))


def test_other_rules() -> None:
    assert proportional(np.array([3.0, 1.0, -2.0])).tolist() == [0.75, 0.25, 0.0]
    assert proportional(np.zeros(4)).tolist() == [0.25] * 4
    assert np.allclose(epsilon_greedy(np.array([1.0, 1.0, 0.0]), 0.3), [0.45, 0.45, 0.1])


@pytest.mark.parametrize("right", range(9))
def test_mean_absolute_advantage_of_binary_rewards(right: int) -> None:
    """E|A| = 2 sqrt(p (1 - p)) with the population's std, 2 p (1 - p) without: largest where half is right."""
    n, p = 8, right / 8
    rewards = [1.0] * right + [0.0] * (n - right)
    episodes, z = batch_of(["a"], rewards, group=n)
    for signal, expected in (("advantage", 2 * math.sqrt(p * (1 - p))), ("unnormalised", 2 * p * (1 - p))):
        made = arms(signal=signal, rate=1.0)
        made.observe(episodes, z)
        made.settle()
        assert made.values[0] == pytest.approx(expected, abs=1e-14)


def test_a_constant_payment_is_approached_geometrically() -> None:
    made, (episodes, z) = arms(rate=0.3), batch_of(["a"], [1.0, 0.0])
    for step in range(1, 6):
        made.observe(episodes, z)
        made.settle()
        assert made.values[0] == pytest.approx(1.0 - 0.7**step, abs=1e-14)


def test_arms_that_were_not_sampled() -> None:
    for unsampled, expected in (("decay", 0.4), ("keep", 0.8)):
        made, (episodes, z) = arms(unsampled=unsampled), batch_of(["a"], [1.0, 0.0])
        made.values[1] = 0.8
        made.observe(episodes, z)
        made.settle()
        assert made.values.tolist() == pytest.approx([0.5, expected, 0.0])
        made.settle()
        assert made.values.tolist() == pytest.approx([0.5, expected, 0.0]), "nothing was observed since"


def test_signals_of_arms() -> None:
    """Payment is the mean over the rollouts of an arm; progress is the change since its last step."""
    made = arms(rate=1.0)
    made.observe(*batch_of(["a", "b"], [1.0, 0.0, 1.0, 1.0]))
    made.observe(*batch_of(["a"], [0.0, 0.0]))
    made.settle()
    assert made.values.tolist() == [0.5, 0.0, 0.0]
    made = arms(rate=1.0, signal="progress")
    for rewards, expected in (([1.0, 0.0], 0.0), ([1.0, 1.0], 0.5), ([0.0, 0.0], -1.0)):
        made.observe(*batch_of(["a"], rewards))
        made.settle()
        assert made.values[0] == expected
    with pytest.raises(ValueError, match="expected one of advantage, unnormalised, progress"):
        ArmChoice(signal="loss")


def test_demonstrations_and_other_rows_are_not_paid() -> None:
    made, (episodes, z) = arms(rate=1.0), batch_of(["a"], [1.0, 0.0])
    made.observe(episodes.with_columns("episode", kind=["rollout", "demo"]), z * torch.tensor([1.0, 1.0, 9.0, 9.0]))
    made.settle()
    assert made.values[0] == 1.0
    made.observe(episodes.without("arm"), z)
    made.settle()
    assert made.values[0] == 1.0


def test_prompts_of_an_arm_come_in_turn() -> None:
    """Without replacement: each pass over an arm has each of its prompts once; draws depend on (seed, position) alone."""
    made, again = arms(), arms()
    found = made.take(20, 0) + made.take(7, 20)
    assert [p.id for p in found] == [p.id for p in again.take(20, 0) + again.take(7, 20)]
    assert {p.columns["arm"] for p in found} == {"a", "b", "c"}
    for k, name in enumerate("abc"):
        own = [p.id for p in found if p.columns["arm"] == name]
        for i in range(0, len(own) - 2, 3):
            assert sorted(own[i : i + 3]) == [10 * k, 10 * k + 1, 10 * k + 2]
    made.values[2] = 50.0
    assert {p.columns["arm"] for p in made.take(20, 27)} == {"c"}


def test_the_state_of_arms_goes_on() -> None:
    made = arms(signal="progress")
    made.take(9, 0)
    made.observe(*batch_of(["b"], [1.0, 0.0]))
    made.settle()
    other = arms(signal="progress")
    other.load_state_dict(made.state_dict())
    for one in (made, other):
        one.observe(*batch_of(["b"], [1.0, 1.0]))
        one.settle()
    assert other.values.tolist() == made.values.tolist() == [0.0, 0.25, 0.0]
    assert [p.id for p in other.take(5, 9)] == [p.id for p in made.take(5, 9)]
    with pytest.raises(ValueError, match="the data changed"):
        Arms({"a": RowPrompts([Prompt(id=0, text="")])}, ArmChoice(), 0).load_state_dict(made.state_dict())


def test_rows_by_joint_columns() -> None:
    rows = [Prompt(id=i, text="q", columns={"level": i % 2, "type": "xy"[i // 2]}) for i in range(4)]
    assert {name: [p.id for p in own] for name, own in by_columns(rows, "type,level").items()} == {
        "x 0": [0], "x 1": [1], "y 0": [2], "y 1": [3]}  # fmt: skip
    with pytest.raises(ValueError, match=r"'topic'.*it has level, type"):
        by_columns(rows, "topic")


def test_the_curriculum_is_in_the_rollouts_alone() -> None:
    recipe = sec_curriculum(temperature=0.4)
    assert recipe.rollouts.arms == ArmChoice(temperature=0.4)
    assert recipe.but(arms=None) == sec_curriculum().but(arms=None)
