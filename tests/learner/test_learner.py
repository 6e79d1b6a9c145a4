"""The learner and its ledger: numbers by hand."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from tests.toys import ToyPolicy, toy_batch
from unipo.episodes import Episodes
from unipo.learner import Learner, LearnerSettings, annotate, coefficients, ledger, summary
from unipo.learner.learner import Update
from unipo.methods.catalog import build
from unipo.objectives import (
    Bonus,
    ClipMask,
    Likelihood,
    PolicyGradient,
    TokenRatio,
    ValueRegression,
    ValueTarget,
    everything,
    rollouts,
)
from unipo.objectives.advantages import Plain


def test_a_sum_of_losses_has_the_gradient_of_plain_autograd() -> None:
    """The chain rule through coefficients, against one graph over everything, for a sum of four kinds of terms."""
    episodes = toy_batch()
    objective = build("ppo+0.3*sft+0.2*dpo", {}).objective + 0.1 * Bonus()
    policy, plain = ToyPolicy(), ToyPolicy()
    Learner({"policy": policy}, LearnerSettings(token_budget=11)).gradient(episodes, objective)
    objective(episodes, plain.signals(episodes, ["logp", "entropy", "value"])).backward()
    for p, q in zip(policy.parameters(), plain.parameters(), strict=True):
        assert p.grad is not None
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-10, atol=1e-14)


def test_two_players_share_an_update() -> None:
    """A policy and a critic of their own: each gets the gradient of what it emits."""

    class Critic(ToyPolicy):
        emits = frozenset({"value"})

    class Actor(ToyPolicy):
        emits = frozenset({"logp", "entropy"})

    episodes, objective = toy_batch(), build("ppo", {}).objective
    actor, critic, both = Actor(), Critic(), ToyPolicy()
    Learner({"actor": actor, "critic": critic}, LearnerSettings(token_budget=15)).gradient(episodes, objective)
    Learner({"policy": both}, LearnerSettings(token_budget=15)).gradient(episodes, objective)
    assert actor.embedding.grad is not None
    assert critic.embedding.grad is not None
    torch.testing.assert_close(actor.embedding.grad + critic.embedding.grad, both.embedding.grad)
    assert actor.value_head.grad is None
    with pytest.raises(KeyError, match="no player emits the signal 'value'"):
        Learner({"actor": actor}).gradient(episodes, objective)


def test_episodes_without_coefficient_are_not_computed_again() -> None:
    episodes = toy_batch(rewards=[1.0, 1.0, 1.0, 1.0])
    update = Learner({"policy": ToyPolicy()}, LearnerSettings(token_budget=20)).gradient(
        episodes, build("grpo", {}).objective
    )
    assert update.tokens_computed == int(ToyPolicy().total_lengths(episodes).sum()), "only pass 1"


def test_gradient_norm_is_clipped_and_schedules_run() -> None:
    settings = LearnerSettings(
        learning_rate=0.1, clip_norm=1e-3, warmup=2, schedule="linear", total_updates=6, betas=(0.0, 0.0)
    )
    learner = Learner({"policy": ToyPolicy()}, settings)
    rates = [learner.update(toy_batch(), build("sft", {}).objective).learning_rate for _ in range(6)]
    assert rates == pytest.approx([0.05, 0.1, 0.1, 0.075, 0.05, 0.025])
    norm = math.sqrt(sum(float((p.grad**2).sum()) for p in learner.parameters() if p.grad is not None))
    assert norm == pytest.approx(1e-3, rel=1e-3)
    assert LearnerSettings(schedule="cosine", total_updates=4).rate(2) == pytest.approx(0.5)
    with pytest.raises(ValueError, match="constant, linear, cosine"):
        LearnerSettings(schedule="square")


def test_parameter_groups() -> None:
    """Matrices decay, vectors do not; value heads have their own learning rate."""
    learner = Learner(
        {"policy": ToyPolicy()}, LearnerSettings(learning_rate=1.0, value_learning_rate=2.0, weight_decay=0.5)
    )
    groups = {(g["lr"], g["weight_decay"]): len(g["params"]) for g in learner.optimizer.param_groups}
    assert groups == {(1.0, 0.5): 3, (2.0, 0.0): 1}


def test_a_critic_of_its_own_has_the_value_learning_rate() -> None:
    class Critic(ToyPolicy):
        emits = frozenset({"value"})

    learner = Learner({"critic": Critic()}, LearnerSettings(learning_rate=1.0, value_learning_rate=2.0))
    assert {group["lr"] for group in learner.optimizer.param_groups} == {2.0}


@pytest.mark.parametrize("budget", [10_000, 20])
def test_a_batch_without_signal_leaves_the_weights_alone(budget: int) -> None:
    """Momentum and weight decay included, so that the split into micro-batches cannot matter."""
    settings = LearnerSettings(learning_rate=0.1, weight_decay=0.1, token_budget=budget)
    learner, objective = Learner({"policy": ToyPolicy()}, settings), build("grpo", {}).objective
    learner.update(toy_batch(), objective)
    before = copy.deepcopy(list(learner.parameters()))
    made = learner.update(toy_batch(rewards=[0.3] * 4), objective)
    assert made.grad_norm == 0.0
    assert all(torch.equal(a, b) for a, b in zip(before, learner.parameters(), strict=True))
    learner.update(toy_batch(), objective)
    assert not any(torch.equal(a, b) for a, b in zip(before[:3], list(learner.parameters())[:3], strict=True))


def test_terms_of_one_name_are_kept_apart() -> None:
    """Half and half the same policy gradient: two titles, half of the mass each; every axis of the ledger sums to 1."""
    gradient = PolicyGradient(advantage=Plain())
    objective = 0.5 * gradient + 0.5 * gradient + build("sft", {}).objective
    policy, episodes = ToyPolicy(), toy_batch()
    update = Learner({"policy": policy}).gradient(episodes, objective)
    columns = ledger(update, version=6)
    shares = {k: v for k, v in columns.items() if k.startswith("ledger/term/") and k.endswith("gradient_share")}
    assert [k.split("/")[2] for k in shares] == ["PolicyGradient", "PolicyGradient 2", "Likelihood"]
    first, second, likelihood = shares.values()
    assert first == pytest.approx(second)
    for axis in ("term", "source", "kind", "sign", "staleness"):
        total = sum(v for k, v in columns.items() if k.startswith(f"ledger/{axis}/") and k.endswith("gradient_share"))
        known = 1.0 if axis != "staleness" else 1.0 - likelihood
        assert total == pytest.approx(known), axis


def test_a_bad_number_is_named_and_nothing_is_changed() -> None:
    episodes = toy_batch()
    reward = episodes["reward"].clone()
    reward[1] = math.nan
    learner = Learner({"policy": ToyPolicy()})
    before = copy.deepcopy(list(learner.parameters()))
    with pytest.raises(FloatingPointError, match=r"term 'PolicyGradient'.*source 'fresh'.*nothing was updated"):
        learner.update(episodes.with_columns("episode", reward=reward), build("grpo", {}).objective)
    assert all(torch.equal(a, b) for a, b in zip(before, learner.parameters(), strict=True))
    assert learner.updates == 0


def test_state_round_trip_is_exact() -> None:
    one = Learner({"policy": ToyPolicy()}, LearnerSettings(learning_rate=0.01))
    objective = build("grpo", {}).objective
    one.update(toy_batch(), objective)
    two = Learner({"policy": copy.deepcopy(one.players["policy"])}, LearnerSettings(learning_rate=0.01))
    two.load_state_dict(copy.deepcopy(one.state_dict()))
    for learner in (one, two):
        learner.update(toy_batch(1), objective)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


def test_annotation_fills_only_what_is_missing() -> None:
    episodes = toy_batch()
    reference = episodes["reference_logp"].clone()
    reference[:3] = math.nan
    objective = build("dpo+copg", {}).objective
    policies = {"reference": ToyPolicy(5)}
    filled = annotate(episodes.with_columns("step", reference_logp=reference), objective.needs, policies, 20)[
        "reference_logp"
    ]
    known = ToyPolicy(5).signals(episodes, ["logp"])["logp"].detach()
    torch.testing.assert_close(filled[:3], known[:3])
    assert torch.equal(filled[3:], episodes["reference_logp"][3:]), "logged numbers stand in for the reference"
    whole = annotate(episodes.without("reference_logp"), objective.needs, policies, 20)["reference_logp"]
    assert whole.dtype == torch.float64, "in the policy's own precision"
    torch.testing.assert_close(whole, known, rtol=1e-12, atol=0)


def test_the_ledger_by_hand() -> None:
    """Three episodes of one token, p = 1/2, 1/2, 3/4, rewards 1, 2, -4: masses 1/2 * 1/3, 1/2 * 2/3, 1/4 * 4/3."""
    episodes = Episodes.build([[0], [1], [2]], [[0]] * 3, kind=["rollout"] * 3, source=["fresh", "fresh", "replay"],
                              policy_version=[7, 6, 4])  # fmt: skip
    logp = torch.tensor([0.5, 0.5, 0.75], dtype=torch.float64).log()
    episodes = episodes.with_columns("episode", reward=torch.tensor([1.0, 2.0, -4.0], dtype=torch.float64))
    episodes = episodes.with_columns("step", behavior_logp=logp - math.log(2.0))
    found = coefficients(PolicyGradient(advantage=Plain()), episodes, {"logp": logp})
    update = Update(episodes, found, {"logp": logp}, 3)
    columns = ledger(update, version=7)
    total = 1 / 6 + 1 / 3 + 1 / 3
    assert columns["ledger/source/fresh/gradient_share"] == pytest.approx(0.5 / total)
    assert columns["ledger/source/replay/gradient_share"] == pytest.approx(1 / 3 / total)
    assert columns["ledger/sign/raised/gradient_share"] == pytest.approx(0.5 / total)
    assert columns["ledger/sign/lowered/gradient_share"] == pytest.approx(1 / 3 / total)
    assert columns["ledger/staleness/0/gradient_share"] == pytest.approx(1 / 6 / total)
    assert columns["ledger/staleness/1-2/gradient_share"] == pytest.approx(1 / 3 / total)
    assert columns["ledger/staleness/3-8/rows"] == 1
    assert columns["ledger/source/fresh/tokens"] == 2
    assert columns["ledger/term/PolicyGradient/gradient_share"] == pytest.approx(1.0)
    assert columns["ledger/source/fresh/kl"] == pytest.approx(2 - 1 - math.log(2.0)), "k3 of the ratio 2"
    assert summary(update)["loss"] == pytest.approx(float(-(torch.tensor([1.0, 2.0, -4.0]) * logp).sum() / 3))


def test_the_ledger_counts_weights_and_clipped_steps() -> None:
    """Ratios 1, 2 and 0.5 of one positive and two negative steps: (1 + 2 + .5)^2 / (3 * 5.25), and one of three is clipped."""
    episodes = Episodes.build([[0], [1], [2]], [[0]] * 3, kind=["rollout"] * 3, source=["fresh"] * 3)
    episodes = episodes.with_columns("episode", reward=torch.tensor([1.0, -1.0, -1.0], dtype=torch.float64))
    logp = torch.tensor([0.2, 0.4, 0.2], dtype=torch.float64).log()
    episodes = episodes.with_columns("step", behavior_logp=torch.tensor([0.2, 0.2, 0.4], dtype=torch.float64).log())
    objective = PolicyGradient(advantage=Plain(), weight=TokenRatio(), mask=ClipMask(0.2, 0.2))
    update = Update(episodes, coefficients(objective, episodes, {"logp": logp}), {"logp": logp}, 3)
    for found in (ledger(update, version=0), {f"ledger/source/fresh/{k}": v for k, v in summary(update).items()}):
        assert found["ledger/source/fresh/ess"] == pytest.approx(3.5**2 / (3 * 5.25))
        assert found["ledger/source/fresh/clipped_share"] == pytest.approx(1 / 3)


def test_value_regression_is_clipped_around_the_old_value() -> None:
    """One step, reward 1 (return 1), old value 0, value 0.5: unclipped error .25; clipped to .2: .64, the larger counts."""
    episodes = Episodes.build([[0]], [[0]], kind=["rollout"]).with_columns("episode", reward=torch.ones(1))
    episodes = episodes.with_columns("step", old_value=torch.zeros(1))
    term = ValueRegression(target=ValueTarget(1.0, 1.0), clip=0.2, rows=rollouts)
    assert float(term(episodes, {"value": torch.tensor([0.5])})) == pytest.approx(0.32)
    assert float(term.but(clip=None)(episodes, {"value": torch.tensor([0.5])})) == pytest.approx(0.125)


def test_entropy_bonus_raises_entropy() -> None:
    policy, episodes = ToyPolicy(), toy_batch()
    learner = Learner({"policy": policy}, LearnerSettings(learning_rate=0.02))
    before = float(policy.signals(episodes, ["entropy"])["entropy"].mean().detach())
    for _ in range(5):
        learner.update(episodes, Bonus(rows=everything))
    assert float(policy.signals(episodes, ["entropy"])["entropy"].mean().detach()) > before
    assert Likelihood().linear
    assert Bonus().linear
