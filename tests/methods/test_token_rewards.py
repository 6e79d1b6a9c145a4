"""RLFR's flow and OREAL's token reward model: closed forms, enumerated bandits, hand-computed numbers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.toys import gradient, rollouts_of
from unipo import functional as F
from unipo.episodes import Episodes
from unipo.methods.policy_gradients import grpo, rloo
from unipo.methods.token_rewards import oreal, rlfr
from unipo.objectives import AffineOutcome, GroupStd, KLPenalty, LeaveOneOut, Normalised, PolicyGradient
from unipo.reproduce.network import NetworkPolicy
from unipo.reproduce.online import scattered
from unipo.sources.companions.companion import seeded, torch_generator
from unipo.sources.companions.flow import FlowNet, FlowReward
from unipo.sources.companions.token_rewards import TokenCredit
from unipo.sources.text.filters import OneOfEach, RepeatedByDifficulty
from unipo.sources.text.tabular import tabular_rollouts

BARE: dict[str, Any] = {"kl": 0.0, "credit": "one", "kept": "all", "negative": 1.0}


def drawn(seed: int = 0, group: int = 8) -> tuple[NetworkPolicy, Episodes]:
    """A policy and groups of its rollouts, with both outcomes among them."""
    task = scattered(seed)
    policy = NetworkPolicy(task, seed)
    batch = tabular_rollouts(task, policy, grpo(group=group).rollouts, seed).draw(0, 0)
    reward = (torch.arange(len(batch)) % 3 == 0).double()
    return policy, batch.with_columns("episode", reward=reward)


# ---- the flow --------------------------------------------------------------------------------------------------------
def best_velocity(x: Tensor, time: Tensor) -> Tensor:
    return (2 * time - 1) * x / (time**2 + (1 - time) ** 2)


def normal_grid(n: int = 4001) -> tuple[Tensor, Tensor]:
    """Points [n, 1] and the weights of a standard normal."""
    x = torch.linspace(-9, 9, n, dtype=torch.float64)
    density = torch.exp(-x.square() / 2)
    return x[:, None], density / density.sum()


def test_the_best_flow_of_a_normal_scores_outliers() -> None:
    """E_e (v* - (h - e))^2 = (c t - 1)^2 h^2 + (c (1 - t) + 1)^2: increasing in |h|, 1.4706 in the mean at t = 0.8."""
    noise, weight = normal_grid()
    for t in (0.3, 0.8):
        time = torch.full_like(noise, t)
        c = (2 * t - 1) / (t**2 + (1 - t) ** 2)
        found = []
        for h in (0.0, 0.7, -1.5, 2.5):
            data = torch.full_like(noise, h)
            error = F.flow_error(best_velocity(F.noised(data, noise, time), time), data, noise)
            found.append(float((weight * error).sum()))
            assert found[-1] == pytest.approx((c * t - 1) ** 2 * h**2 + (c * (1 - t) + 1) ** 2, abs=1e-9)
        assert found == sorted(found)
        mean = (c * t - 1) ** 2 + (c * (1 - t) + 1) ** 2
        assert mean == pytest.approx(2 - (2 * t - 1) ** 2 / (t**2 + (1 - t) ** 2), abs=1e-12)
    assert mean == pytest.approx(1.4706, abs=5e-5)


def test_a_fitted_flow_has_the_error_of_the_best_one() -> None:
    """Eight independent standard normal features, nothing to condition on: nearly v* (0 would have error 2), and outliers."""
    with seeded(0, "test"):
        net = FlowNet(8, 1, 1, torch.float64)
    draw, size = torch_generator(0, "data"), (256, 1, 8)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    nowhere = torch.zeros(size, dtype=torch.float64)
    assert not net(normal(*size), normal(256, 1, 1).sigmoid(), nowhere).any(), "0 at first"
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, 450)
    for _ in range(450):
        data, noise, time = normal(*size), normal(*size), normal(256, 1, 1).sigmoid()
        loss = F.flow_error(net(F.noised(data, noise, time), time, nowhere), data, noise).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()
    data, noise, time = normal(4000, 1, 8), normal(4000, 1, 8), torch.full((4000, 1, 1), 0.8, dtype=torch.float64)

    def error(h: Tensor) -> float:
        with torch.no_grad():
            return float(F.flow_error(net(F.noised(h, noise, time), time, torch.zeros_like(h)), h, noise).mean())

    assert error(data) == pytest.approx(1.4706, rel=0.12)
    assert error(data) < error(2.0 * data) < error(3.0 * data)


def test_standouts_by_hand() -> None:
    """Scaled 0, .5, 1, .75 | all equal | one unknown: only known scores make the scale, and they are kept above a threshold."""
    score = torch.tensor([1.0, 3.0, 5.0, 4.0, 2.0, 2.0, 9.0, 0.0, 8.0, 8.0])
    index = torch.tensor([0, 0, 0, 0, 1, 1, 2, 2, 2, 2])
    known = torch.tensor([True] * 6 + [False] + [True] * 3)
    found = F.standouts(score, index, 3, known, 0.6, 15)
    assert found.tolist() == [0, 0, 1, 0.75, 0, 0, 0, 0, 1, 1]
    assert F.standouts(score, index, 3, known, 0.6, 1).tolist() == [0, 0, 1, 0, 0, 0, 0, 0, 1, 0], "ties: the earlier"
    assert not F.standouts(score, index, 3, known, 1.0, 15).any(), "above is strict"


def test_reward_to_go_of_tokens() -> None:
    episodes, _ = rollouts_of([[1.0, 0.0, 0.0]], [[3, 2, 4]])
    generator = torch.Generator().manual_seed(0)
    r = -torch.rand(9, generator=generator, dtype=torch.float64)
    episodes = episodes.with_columns("step", token_reward=r)
    ((_, term),) = rlfr().objective.terms()
    assert isinstance(term, PolicyGradient)
    advantage = term.advantage(episodes, {})
    z = Normalised(scale=GroupStd(1e-6))(episodes, {})
    last = torch.tensor([2, 4, 8])
    assert torch.allclose(advantage[last], z[last] + r[last], atol=1e-12)
    inside = torch.tensor([0, 1, 3, 5, 6, 7])
    assert torch.allclose(advantage[inside] - advantage[inside + 1], r[inside], atol=1e-12)


def test_without_coefficient_or_threshold_rlfr_is_grpo() -> None:
    assert rlfr(flow=0.0) == grpo()
    policy, batch = drawn()
    logp = policy.signals(batch, ["logp"])["logp"].detach()
    plain = gradient(grpo().objective, batch, logp)
    for spec, equal in ((FlowReward(threshold=1.0), True), (FlowReward(coefficient=1.0), False)):
        shaped = spec.build(policy, 0).annotate(batch, 0)
        assert bool(shaped["token_reward"].any()) is not equal
        assert torch.equal(gradient(rlfr().objective, shaped, logp), plain) is equal
        assert bool((shaped["token_reward"] <= 0).all())


def test_the_first_token_has_no_previous_one() -> None:
    policy, batch = drawn()
    first = batch.position() == 0
    last = torch.cat([first[1:], torch.ones(1, dtype=torch.bool)])
    for context, alone in (("previous", first), ("next", last)):
        companion = FlowReward(context=context, coefficient=1.0).build(policy, 0)
        marked = companion.annotate(batch, 0)
        assert torch.equal(companion.scores(batch, 0)[1], ~alone)
        assert not marked["token_reward"][alone].any()


def test_both_contexts_are_averaged() -> None:
    """A new flow has velocity 0: its error is |h - e|^2, one draw of noise for each context; at the ends there is one."""
    policy, batch = drawn()
    first = batch.position() == 0
    last = torch.cat([first[1:], torch.ones(1, dtype=torch.bool)])
    companion = FlowReward(context="both", layers=(0.5,)).build(policy, 0)
    companion.annotate(batch, 0)
    score, known = companion.scores(batch, 3)
    hidden = companion._states(batch)
    noise = torch.randn(
        (len(hidden), 2, hidden.shape[2]), generator=torch_generator(0, "flow score", 3), dtype=hidden.dtype
    )
    before, after = (4 * (hidden - noise).square().mean(-1)).unbind(1)
    mean = torch.where(first, after, torch.where(last, before, (before + after) / 2))
    torch.testing.assert_close(score[known], mean[known])
    assert torch.equal(known, ~(first & last))
    assert "flow/loss" in companion.learn(batch, 0)


def test_a_flow_is_fitted_to_demonstrations_and_then_to_right_rollouts() -> None:
    policy, batch = drawn()
    shown = batch.with_columns("episode", kind=["demo"] * len(batch))
    wrong = batch.with_columns("episode", reward=torch.zeros(len(batch)).double())
    for rows, step, learns in (
        (batch, 0, False),
        (shown, 0, True),
        (shown, 5, False),
        (batch, 5, True),
        (wrong, 5, False),
    ):
        companion = FlowReward(offline=5).build(policy, 0)
        companion.annotate(rows, step)
        assert ("flow/loss" in companion.learn(rows, step)) is learns
    again = [FlowReward(offline=5).build(policy, 0) for _ in range(2)]
    for companion in again:
        companion.annotate(batch, 7)
        companion.learn(batch, 7)
    weights = [list(c.module.state_dict().values()) for c in again]
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True)), "a function of state, batch and step"


def test_hidden_states_are_read_after_the_token() -> None:
    """The state of token n is the one that produces token n + 1."""
    policy, batch = drawn()
    hidden = policy.features(batch, (0.25, 0.5))
    assert hidden.shape == (batch.count("step"), 2, policy.width)
    inputs = policy.get_buffer("states").reshape(*policy.value.shape, -1)
    states = torch.tanh(inputs[policy._states(batch)] @ policy.inward)
    follows = (batch.position() > 0).nonzero().squeeze(1)
    assert torch.allclose(hidden[follows - 1, 0], states[follows], atol=1e-12)


# ---- OREAL -----------------------------------------------------------------------------------------------------------
def test_advantages_of_signs() -> None:
    """A+ = 2 (1 - p) K / (K - 1), A- = -2 p K / (K - 1)."""
    k, right = 16, 5
    episodes, _ = rollouts_of([[1.0] * right + [0.0] * (k - right)], [[1] * k])
    advantage = Normalised(center=LeaveOneOut(), outcome=AffineOutcome())(episodes, {})
    p = right / k
    assert advantage[:right].tolist() == pytest.approx([2 * (1 - p) * k / (k - 1)] * right, abs=1e-12)
    assert advantage[right:].tolist() == pytest.approx([-2 * p * k / (k - 1)] * (k - right), abs=1e-12)


def test_with_a_common_denominator_oreal_is_rloo() -> None:
    episodes, logp = rollouts_of([[1.0, 0.0, 0.0, 1.0], [0.0, 1.0, 0.0, 0.0]], [[1, 2, 3, 4], [2, 2, 5, 1]])
    signed = episodes.with_columns("episode", reward=2 * episodes["reward"] - 1)
    won = episodes.expand(episodes["reward"] > 0.5)
    mine = gradient(oreal(**BARE).objective, episodes, logp)
    counts = torch.where(won, float(won.sum()), float((~won).sum()))
    assert torch.allclose(mine * counts, gradient(rloo().objective, signed, logp) * len(episodes), atol=1e-12)
    half = gradient(oreal(**{**BARE, "negative": 0.5}).objective, episodes, logp)
    assert torch.allclose(half, torch.where(won, mine, 0.5 * mine), atol=1e-15)


def bandit(p: Tensor, right: Tensor, scale: int) -> tuple[Episodes, Tensor, Tensor]:
    """One group in which every arm is as often as it is likely: episodes, their arms, and log-probs by arm."""
    arm = torch.arange(len(p)).repeat_interleave((p * scale).round().long())
    episodes, _ = rollouts_of([right[arm].tolist()], [[1] * len(arm)])
    return episodes, arm, p.log()


def of_logits(coefficient: Tensor, arm: Tensor, p: Tensor) -> Tensor:
    """sum of coefficient * grad log pi(arm) over the rollouts."""
    return (coefficient[:, None] * (torch.eye(len(p), dtype=p.dtype)[arm] - p)).sum(0)


def test_one_pair_of_a_prompt_has_the_direction_of_its_policy_gradient() -> None:
    """In expectation 2 (p^2 + (1 - p)^2) / (p (1 - p)) grad p, up to K / (K - 1).

    A pair is one draw of the right answers and one of the wrong; their means over a whole group are its expectation.
    """
    p = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    right = torch.tensor([1.0, 0.0, 1.0, 0.0], dtype=torch.float64)
    episodes, arm, logp = bandit(p, right, 1000)
    loss = of_logits(gradient(oreal(**BARE).objective, episodes, logp[arm]), arm, p)
    success = float((p * right).sum())
    ascent = p * (right - success)
    factor = 2 * (success**2 + (1 - success) ** 2) / (success * (1 - success)) * len(arm) / (len(arm) - 1)
    assert torch.allclose(-loss, factor * ascent, atol=1e-12)


def test_hard_groups_are_repeated_as_groups_of_their_own() -> None:
    """Mean rewards 0.1, 0.5, 0.75, 0.9 of four groups: 6, 4, 2 and no copies, in order."""
    rewards = [1.0] + [0.0] * 9 + [1.0, 0.0] + [1.0, 1.0, 1.0, 0.0] + [1.0] * 9 + [0.0]
    group = [0] * 10 + [1] * 2 + [2] * 4 + [3] * 10
    rows = Episodes.build([[0]] * 26, [[g] for g in group], group, kind=["rollout"] * 26, prompt_id=group)
    made = RepeatedByDifficulty()(rows.with_columns("episode", reward=torch.tensor(rewards)), 8)
    assert made.lengths("group", "episode").tolist() == [10] * 6 + [2] * 4 + [4] * 2
    assert made.reduce("reward", to="group", how="mean").tolist() == pytest.approx([0.1] * 6 + [0.5] * 4 + [0.75] * 2)
    assert oreal(repeats="paper").rollouts.relabel[0] == RepeatedByDifficulty()
    assert not len(RepeatedByDifficulty(())(made, 8))


def test_one_of_each_outcome_is_kept_and_all_are_counted() -> None:
    rewards = [[0.0, 0.0, 1.0, 1.0], [1.0, 0.0, 1.0, 0.0], [1.0, 1.0, 1.0, 1.0]]
    episodes, logp = rollouts_of(rewards, [[1, 2, 1, 2], [2, 1, 1, 1], [1, 1, 1, 1]])
    kept = OneOfEach()(episodes, 8)
    assert kept.reduce(kept["mask"], how="all").nonzero().squeeze(1).tolist() == [0, 2, 4, 5, 8]
    masked = OneOfEach()(episodes.with_columns("step", mask=torch.zeros(episodes.count("step"), dtype=torch.bool)), 8)
    assert not masked["mask"].any()
    found, whole = (gradient(oreal(**BARE).objective, e, logp) for e in (kept, episodes))
    right = torch.tensor([False, True, True, False]).repeat_interleave(torch.tensor([1, 1, 2, 1]))
    steps = kept["mask"].nonzero().squeeze(1)[:5]
    advantage = torch.where(right, 1.0, -1.0).double() * 2 * 0.5 * 4 / 3
    assert torch.allclose(found[steps], -advantage / torch.where(right, 3.0, 2.0), atol=1e-12), (
        "the third group has A = 0"
    )
    assert not torch.allclose(found[steps], whole[steps])
    assert not found[~kept["mask"]].any()


def test_the_ratio_form_has_the_same_gradient() -> None:
    """exp(lp - sg(lp)) is 1 and has the gradient of lp."""
    episodes, logp = rollouts_of([[1.0, 0.0, 0.0, 1.0]], [[1, 2, 3, 4]])
    leaf = logp.clone().requires_grad_()
    ratio = torch.exp(leaf - leaf.detach())
    assert torch.equal(ratio, torch.ones_like(ratio))
    advantage = Normalised(center=LeaveOneOut(), outcome=AffineOutcome())(episodes, {})
    won = advantage > 0
    loss = -(leaf * advantage)[won].sum() / won.sum() - (ratio * advantage)[~won].sum() / (~won).sum()
    loss.backward()
    assert leaf.grad is not None
    assert torch.allclose(gradient(oreal(**BARE).objective, episodes, logp), leaf.grad, atol=1e-15)


def test_a_blind_reward_model_leaves_the_divergence_alone() -> None:
    """s = 0: both weights are 0, and what is left is the KL on the kept rollouts."""
    policy, batch = drawn(group=16)
    batch = OneOfEach()(batch, 8)
    companion = TokenCredit().build(policy, 0)
    marked = companion.annotate(batch, 0)
    assert not marked["token_weight"].any()
    logp = policy.signals(batch, ["logp"])["logp"].detach()
    marked = marked.with_columns("step", reference_logp=logp + 0.1)
    found = gradient(oreal(kl=0.3).objective, marked, logp)
    assert torch.equal(found, gradient(0.3 * KLPenalty(), marked, logp))
    assert bool(found.any())


def test_cloning_right_answers_conditions_the_policy() -> None:
    """Cloning the right answers of pi_0 converges to pi_0( . | right), in the ratios it had."""
    p = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    right = torch.tensor([1.0, 0.0, 1.0, 0.0], dtype=torch.float64)
    episodes, arm, logp = bandit(p, right, 100)
    logits = logp.clone()
    objective = oreal(**{**BARE, "negative": 0.0}).objective
    for _ in range(600):
        now = logits.log_softmax(0)
        logits = logits - 2.0 * of_logits(gradient(objective, episodes, now[arm]), arm, now.exp())
    found = logits.softmax(0)
    assert float(found[0] / found[2]) == pytest.approx(1 / 3, rel=2e-3)
    assert float(found[[0, 2]].sum()) == pytest.approx(1.0, abs=5e-3)


def test_running_certainty_by_hand() -> None:
    """c_t of the mean of the scores so far; masked steps and demonstrations are not read."""
    policy, batch = drawn()
    mask = torch.arange(batch.count("step")) % 5 != 1
    kinds = ["demo" if i == 3 else "rollout" for i in range(len(batch))]
    batch = batch.with_columns("step", mask=mask).with_columns("episode", kind=kinds)
    companion = TokenCredit().build(policy, 0)
    companion.head.weight.data.normal_(generator=torch.Generator().manual_seed(0))
    hidden = policy.features(batch, (1.0,))[:, 0]
    score = companion.head(hidden).squeeze(-1).tolist()
    weights, step = companion.annotate(batch, 0)["token_weight"].tolist(), 0
    for i, length in enumerate(batch.lengths().tolist()):
        read: list[float] = []
        for _ in range(length):
            expected = 0.0
            if mask[step] and i != 3:
                read.append(score[step])
                sure = 1 / (1 + math.exp(-sum(read) / len(read)))
                expected = max(2 * sure - 1 if batch["reward"][i] > 0.5 else 1 - 2 * sure, 0.0)
            assert weights[step] == pytest.approx(expected, abs=1e-12)
            step += 1
    assert max(weights) > 0.1


def test_the_reward_model_learns_outcomes_and_leaves_the_policy_alone() -> None:
    policy, batch = drawn()
    batch = batch.with_columns("episode", reward=(batch["token"][batch.position() == 0] < 3).double())
    before = policy.inward.detach().clone()
    companion = TokenCredit(learning_rate=0.02).build(policy, 0)
    losses = [companion.learn(batch, step)["token_credit/loss"] for step in range(60)]
    assert losses[0] == pytest.approx(math.log(2))
    assert losses[-1] < 0.2
    assert companion.learn(batch, 60)["token_credit/accuracy"] > 0.95
    assert torch.equal(policy.inward, before)
    marked = companion.annotate(batch, 61)["token_weight"]
    assert float(marked.mean()) > 0.3, "both are weighted: it is sure of right and of wrong"


def test_the_policy_stands_still_while_companions_learn() -> None:
    for recipe, start in ((oreal(), 10), (rlfr(), 20)):
        (switch,) = recipe.controllers
        assert [switch.setting({}, step) for step in (0, start - 1, start)] == [0.0, 0.0, 1.0]
    assert not oreal(credit="one").controllers
    assert not rlfr(offline=0).rollouts.augment
