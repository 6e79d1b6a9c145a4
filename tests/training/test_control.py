"""Runs in environments: whole steps of PPO and A2C against plain PyTorch, written out here."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.training.control_runs import (
    CLIP,
    ENTROPY,
    GAMMA,
    LAM,
    PPO,
    ROLLOUT,
    VALUE,
    VALUE_CLIP,
    built,
    close,
    moved,
    watched,
)
from unipo.episodes import Episodes
from unipo.methods.on_policy_control import a2c
from unipo.methods.policy_gradients import ppo
from unipo.objectives import ClipMask, PolicyGradient, TokenRatio
from unipo.policies.networks import Normaliser
from unipo.sources.keyed import keyed_generator

# ---- PPO -------------------------------------------------------------------------------------------------------------


def normalised(run: Any, observation: Tensor) -> Tensor:
    n = run.data.normaliser
    return torch.clamp((observation - n.mean) / torch.sqrt(n.var + 1e-8), -10, 10)


def plain_gae(run: Any, batch: Episodes, critic: Any) -> tuple[Tensor, Tensor, Tensor]:
    """(old values, advantages, returns) [N], going backwards through each fragment."""
    with torch.no_grad():
        value = critic.network(normalised(run, batch["observation"])).squeeze(1)
        final = critic.network(normalised(run, batch["final_observation"])).squeeze(1)
    advantage, stop = torch.zeros_like(value), int(batch.count("step"))
    for i in reversed(range(len(batch))):
        running, after = 0.0, 0.0 if batch["terminated"][i] else float(final[i])
        for t in reversed(range(stop - int(batch.lengths()[i]), stop)):
            delta = float(batch["reward"][t]) + GAMMA * after - float(value[t])
            running = delta + GAMMA * LAM * running
            advantage[t], after = running, float(value[t])
        stop -= int(batch.lengths()[i])
    assert stop == 0
    return value, advantage, advantage + value


def plain_ppo(run: Any, policy: Any, critic: Any, rows: Tensor, batch: Episodes, old: tuple[Tensor, ...]) -> Tensor:
    """The loss of the steps `rows`, as in its paper, a minimum of two surrogates and a maximum of two errors."""
    value_old, advantage, target = (x[rows] for x in old)
    whole = old[1]
    advantage = (advantage - whole.mean()) / (whole.std() + 1e-6)
    x = normalised(run, batch["observation"][rows])
    log_p = torch.log_softmax(policy.network(x), 1)
    ratio = (log_p.gather(1, batch["action"][rows, None]).squeeze(1) - batch["behavior_logp"][rows]).exp()
    surrogate = torch.min(ratio * advantage, ratio.clamp(1 - CLIP, 1 + CLIP) * advantage).mean()
    value = critic.network(x).squeeze(1)
    clipped = value_old + (value - value_old).clamp(-VALUE_CLIP, VALUE_CLIP)
    error = torch.max((value - target) ** 2, (clipped - target) ** 2).mean() / 2
    entropy = -(log_p.exp() * log_p).sum(1).mean()
    return -surrogate + VALUE * error - ENTROPY * entropy


def test_the_first_minibatch_of_ppo_has_the_gradient_of_plain_pytorch(tmp_path: Path) -> None:
    with built(tmp_path, ppo(**PPO), **ROLLOUT) as run:
        batch = run.draw()
        assert batch["terminated"].any()
        assert (batch["truncated"] & ~batch["unfinished"]).any()
        assert batch["unfinished"].any()
        policy, critic = run.policy, run.learner.players["value"]
        old = plain_gae(run, batch, critic)
        moved(policy, critic)
        numbered = batch.with_columns("step", row=torch.arange(batch.count("step")))
        objective, part = next(run._minibatches(numbered, run.objective()))
        assert part.count("step") == 30
        assert not torch.equal(part["row"].sort().values, part["row"]), "shuffled"
        update = run.learner.gradient(part, objective)
        twins = copy.deepcopy((policy, critic))
        for twin in twins:
            twin.zero_grad()
        plain_ppo(run, *twins, part["row"], batch, old).backward()
        for twin, player in zip(twins, (policy, critic), strict=True):
            for p, q in zip(twin.parameters(), player.parameters(), strict=True):
                assert q.grad is not None
                torch.testing.assert_close(q.grad, p.grad, rtol=1e-4, atol=1e-6)
        clipped = update.coefficients.terms[0].facts["clipped"].mean()
        assert 0 < clipped < 1, "both sides of the clip are in the batch"


def test_a_step_of_ppo_is_adam_on_shuffled_minibatches(tmp_path: Path) -> None:
    """All eight minibatches of two epochs: their order, the clipped norm, Adam's constants and the schedule."""
    with built(tmp_path, ppo(**PPO), **ROLLOUT, seed=3) as run:
        seen = watched(run)
        batch = run.draw()
        policy, critic = copy.deepcopy((run.policy, run.learner.players["value"]))
        old, statistics = plain_gae(run, batch, critic), copy.deepcopy(run.data.normaliser)
        updates = list(run._updates(batch))
        assert len(updates) == len(seen) == run.learner.updates == 8
        weights = [*policy.parameters(), *critic.parameters()]
        adam = torch.optim.Adam(weights, lr=3e-3, betas=(0.9, 0.999), eps=1e-5)
        done, norms = 0, []
        for epoch in range(2):
            order = torch.from_numpy(keyed_generator(3, "minibatch", 0, epoch).permutation(120))
            for rows in order.split(30):
                adam.param_groups[0]["lr"] = 3e-3 * (1 - done / (4 * 8))
                adam.zero_grad()
                plain_ppo(run, policy, critic, rows, batch, old).backward()
                norms.append(float(nn.utils.clip_grad_norm_(weights, 0.5)))
                adam.step()
                done += 1
        assert [u.grad_norm for u in seen] == pytest.approx(norms, rel=1e-3)
        assert max(norms) > 0.5, "the norm is clipped somewhere"
        close(run.policy, policy)
        close(run.learner.players["value"], critic)
        assert torch.equal(statistics.mean, run.data.normaliser.mean)


def test_a2c_is_plain_and_ppo_at_ratio_one(tmp_path: Path) -> None:
    """Fresh data has ratio 1: weight and clip change nothing, until the policy has moved."""
    recipe = a2c(gamma=GAMMA, lam=LAM, value=0.5, entropy=0.03)
    settings = {"num_envs": 4, "rollout": 8, "batch_size": 0, "total_timesteps": 64, "normalize_observations": True}
    with built(tmp_path, recipe, **settings) as run:
        batch = run.draw()
        policy, critic = run.policy, run.learner.players["value"]
        _, advantage, target = plain_gae(run, batch, critic)
        ((objective, whole),) = run._minibatches(batch, run.objective())
        assert whole is batch, "one update on the whole batch, as it was drawn"
        x = normalised(run, batch["observation"])

        def gradient(of: Any) -> list[Tensor]:
            parameters = run.learner.parameters()
            run.learner.optimizer.zero_grad()
            of()
            return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in parameters]

        def plain() -> None:
            log_p = torch.log_softmax(policy.network(x), 1)
            error = (critic.network(x).squeeze(1) - target).square().mean() / 2
            chosen = log_p.gather(1, batch["action"][:, None]).squeeze(1)
            loss = -(advantage * chosen).mean() + 0.5 * error + 0.03 * (log_p.exp() * log_p).sum(1).mean()
            loss.backward()

        terms = objective.terms()
        as_ppo = terms[0][1].but(weight=TokenRatio(), mask=ClipMask(0.2, 0.2)) * terms[0][0]
        for c, term in terms[1:]:
            as_ppo = as_ppo + c * term
        assert isinstance(terms[0][1], PolicyGradient)

        ours, theirs = gradient(lambda: run.learner.gradient(batch, objective)), gradient(plain)
        clipped = gradient(lambda: run.learner.gradient(batch, as_ppo))
        assert any(g.abs().max() > 1e-3 for g in ours)
        for a, b, c in zip(ours, theirs, clipped, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(a, c, rtol=1e-4, atol=1e-6)
        moved(policy)
        pairs = zip(gradient(lambda: run.learner.gradient(batch, objective)),
                    gradient(lambda: run.learner.gradient(batch, as_ppo)), strict=True)  # fmt: skip
        assert not all(torch.allclose(a, b, rtol=1e-3) for a, b in pairs)


def test_observation_statistics_stand_still_while_a_batch_is_trained_on(tmp_path: Path) -> None:
    """They are of all that was seen, random steps of the warm-up too; the first ratios of every batch are 1."""
    with built(tmp_path, ppo(**{**PPO, "epochs": 3}), **{**ROLLOUT, "learning_rate": 0.02}) as run:
        normaliser: Normaliser = run.data.normaliser
        seen, during, rows = watched(run), [], []
        update_statistics = normaliser.update

        def keep(x: Tensor) -> None:
            rows.append(x.clone())
            update_statistics(x)

        normaliser.update = keep  # type: ignore[method-assign]
        updated = run.data.updated

        def watch(*arguments: Any) -> None:
            during.append(normaliser.mean.clone())
            updated(*arguments)

        run.data.updated = watch
        means = []
        for _ in range(3):
            seen.clear()
            during.clear()
            run.advance()
            assert len(during) == 12
            assert all(torch.equal(m, during[0]) for m in during)
            ratio = (seen[0].signals["logp"] - seen[0].episodes["behavior_logp"]).exp()
            torch.testing.assert_close(ratio, torch.ones_like(ratio), rtol=0, atol=2e-5)
            later = (seen[-1].signals["logp"] - seen[-1].episodes["behavior_logp"]).exp()
            assert (later - 1).abs().max() > 1e-2
            means.append(during[0])
        assert not torch.equal(means[0], means[1])
        everything = torch.cat(rows)
        assert len(everything) == 4 * 120
        torch.testing.assert_close(normaliser.mean, everything.mean(0), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(normaliser.var, everything.var(0, correction=0), rtol=1e-4, atol=1e-6)


def test_the_ratio_of_a_fresh_continuous_action_is_one(tmp_path: Path) -> None:
    """The log-prob that the collector wrote down is that of the action it wrote down, though the environment clips it."""
    settings = {**ROLLOUT, "task": "Pendulum-v1", "env_options": {}, "log_std_init": 1.0, "normalize_rewards": True}
    with built(tmp_path, ppo(**PPO), **settings) as run:
        seen = watched(run)
        run.advance()
        assert (seen[0].episodes["action"].abs() > 1).any(), "beyond the bounds of the torque"
        ratio = (seen[0].signals["logp"] - seen[0].episodes["behavior_logp"]).exp()
        torch.testing.assert_close(ratio, torch.ones_like(ratio), rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("batch_size", "epochs", "expected"), [(0, 1, 1), (0, 3, 3), (120, 1, 1), (50, 2, 6), (119, 1, 2)]
)
def test_the_number_of_updates_on_a_rollout(tmp_path: Path, batch_size: int, epochs: int, expected: int) -> None:
    with built(tmp_path, ppo(gamma=GAMMA), **{**ROLLOUT, "batch_size": batch_size, "epochs": epochs}) as run:
        seen = watched(run)
        run.advance()
        assert run.learner.updates == len(seen) == expected
        assert sum(u.episodes.count("step") for u in seen) == run.tokens_trained == 120 * epochs


def test_other_minibatch_orders_for_other_steps_and_epochs(tmp_path: Path) -> None:
    with built(tmp_path, ppo(**PPO), **ROLLOUT) as run:
        batch = run.draw().with_columns("step", row=torch.arange(120))
        orders = []
        for step in range(2):
            run.step = step
            parts = [p["row"] for _, p in run._minibatches(batch, run.objective())]
            for epoch in (parts[:4], parts[4:]):
                orders.append(torch.cat(epoch))
                assert orders[-1].sort().values.tolist() == list(range(120)), "every step once an epoch"
        assert not any(torch.equal(a, b) for i, a in enumerate(orders) for b in orders[:i])


def test_a_policy_that_reads_scaled_rewards_is_told_raw_ones(tmp_path: Path) -> None:
    with built(tmp_path, ppo(**PPO), **{**ROLLOUT, "normalize_rewards": True}) as run:
        batch = run.draw()
        assert (batch["raw_reward"] == 1).all()
        assert not (batch["reward"] == 1).all()
        run.advance()
        metrics = run.advance()
        assert metrics["reward"] == pytest.approx(metrics["length"]), "CartPole pays 1 per step"
        assert metrics["env_steps"] == run.data.collector.env_steps
