"""Runs in environments: what is remembered and drawn again. SAC against plain PyTorch; targets, counts and seeds."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.training.control_runs import (
    MEMORY,
    PPO,
    ROLLOUT,
    built,
    close,
    copies,
    noting,
    same,
    watched,
    weights,
)
from unipo.episodes import Episodes
from unipo.methods.actor_critic import OFF_POLICY, dqn, sac, td3
from unipo.methods.policy_gradients import ppo
from unipo.recipe import Recipe

# ---- SAC -------------------------------------------------------------------------------------------------------------


def plain_sample(policy: Any, observation: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """a = tanh(mu + sigma z) and log pi(a), its density by the change of variables."""
    mean, log_std = policy.network(observation).chunk(2, 1)
    normal = torch.distributions.Normal(mean, log_std.clamp(-20, 2).exp())
    u = mean + log_std.clamp(-20, 2).exp() * noise
    return u.tanh(), (normal.log_prob(u) - torch.log(1 - u.tanh() ** 2)).sum(1)


def plain_sac(b: Episodes, policy: Any, critic: Any, slow: Any, alpha: float) -> tuple[Tensor, Tensor, Tensor]:
    """The losses of critic and actor, and the mean of log pi."""
    with torch.no_grad():
        after, after_logp = plain_sample(policy, b["final_observation"], b["next_noise"])
        q = slow.network(torch.cat([b["final_observation"], after], 1)).squeeze(-1).min(1).values
        y = b["reward"] + 0.95 * (1 - b["terminated"].float()) * (q - alpha * after_logp)
    q = critic.network(torch.cat([b["observation"], b["action"]], 1)).squeeze(-1)
    critic_loss = ((q[:, 0] - y) ** 2 / 2).mean() + ((q[:, 1] - y) ** 2 / 2).mean()
    action, logp = plain_sample(policy, b["observation"], b["noise"])
    worst = critic.network(torch.cat([b["observation"], action], 1)).squeeze(-1).min(1).values
    return critic_loss, (alpha * logp - worst).mean(), logp.mean().detach()


def test_updates_of_sac_are_plain_pytorch(tmp_path: Path) -> None:
    """Critics, actor, temperature and slow critics over five updates, each on the batch that the run drew."""
    tau, rate = 0.05, 0.02
    with built(tmp_path, sac(gamma=0.95, tau=tau, temperature=0.5, temperature_rate=rate), **MEMORY) as run:
        seen = watched(run)
        for _ in range(20):
            run.advance()
        assert not seen
        critic, slow = run.learner.players["critic"], run.annotators["target"]
        policy_, critic_, slow_ = copy.deepcopy((run.policy, critic, slow))
        log_alpha = torch.tensor(0.5).log().requires_grad_()
        of_policy = torch.optim.Adam(policy_.parameters(), lr=3e-3)
        of_critic = torch.optim.Adam(critic_.parameters(), lr=3e-3)
        of_alpha = torch.optim.Adam([log_alpha], lr=rate)
        for k in range(1, 6):
            run.advance()
            assert len(seen) == k
            alpha = log_alpha.exp().item()
            critic_loss, actor_loss, logp = plain_sac(seen[-1].episodes, policy_, critic_, slow_, alpha)
            for optimizer in (of_policy, of_critic, of_alpha):
                optimizer.zero_grad()
            of_critic_gradient = torch.autograd.grad(critic_loss, list(critic_.parameters()))
            actor_loss.backward()
            for p, g in zip(critic_.parameters(), of_critic_gradient, strict=True):
                p.grad = g
            (log_alpha.exp() * (1.0 - logp)).backward()
            for optimizer in (of_policy, of_critic, of_alpha):
                optimizer.step()
            with torch.no_grad():
                for p, q in zip(slow_.parameters(), critic_.parameters(), strict=True):
                    p.copy_((1 - tau) * p + tau * q)
            close(run.policy, policy_)
            close(critic, critic_)
            close(slow, slow_)
            assert run.settings()["temperature"] == pytest.approx(log_alpha.exp().item(), rel=1e-4)
        assert run.settings()["temperature"] != pytest.approx(0.5, rel=1e-2)


def test_a_batch_from_the_replay_is_what_happened(tmp_path: Path) -> None:
    """Pendulum never terminates: what follows a step is the next state, also where the episode was cut at 200 steps."""
    with built(
        tmp_path, sac(gamma=0.95), **{**MEMORY, "rollout": 230, "learning_starts": 229, "total_timesteps": 230}
    ) as run:
        seen = watched(run)
        run.advance()
        (update,) = seen
        batch = update.episodes
        assert not batch["terminated"].any()
        torch.testing.assert_close(batch["discount"], torch.full((16,), 0.95))
        angle, speed = torch.atan2(batch["observation"][:, 1], batch["observation"][:, 0]), batch["observation"][:, 2]
        torque = 2 * batch["action"][:, 0]
        speed = (speed + 0.05 * (15 * torch.sin(angle) + 3 * torque)).clamp(-8, 8)
        angle = angle + 0.05 * speed
        expected = torch.stack([angle.cos(), angle.sin(), speed], 1)
        torch.testing.assert_close(batch["final_observation"], expected, rtol=1e-4, atol=1e-4)


# ---- slow copies -----------------------------------------------------------------------------------------------------
def test_targets_move_by_tau_towards_the_updated_weights(tmp_path: Path) -> None:
    tau = 0.25
    with built(tmp_path, sac(tau=tau), **{**MEMORY, "learning_starts": 1}) as run:
        slow, online = run.annotators["target"], run.learner.players["critic"]
        assert same(*copies(slow, online)), "they start as copies"
        assert not any(p.requires_grad for _, p in slow.named_parameters())
        for step in range(4):
            (before,) = copies(slow)
            run.advance()
            after, now = copies(slow, online)
            if step == 0:
                assert same(before, after), "no update yet"
                continue
            for x, y, z in zip(before, after, now, strict=True):
                torch.testing.assert_close(y, x + tau * (z - x), rtol=1e-6, atol=1e-8)


def test_hard_targets_are_copied_every_so_many_updates(tmp_path: Path) -> None:
    settings = {
        **OFF_POLICY,
        "hidden": (8,),
        "rollout": 1,
        "batch_size": 8,
        "learning_starts": 4,
        "total_timesteps": 50,
    }
    with built(tmp_path, dqn(target_every=3), **settings) as run:
        slow, online = run.annotators["target"], run.learner.players["critic"]
        while run.learner.updates < 7:
            (before,) = copies(slow)
            updates = run.learner.updates
            run.advance()
            after, now = copies(slow, online)
            if run.learner.updates > updates and run.learner.updates % 3 == 0:
                assert same(after, now)
                assert not same(after, before)
            else:
                assert same(after, before)


def test_the_actor_of_td3_and_the_slow_copies_move_in_every_second_update(tmp_path: Path) -> None:
    with built(tmp_path, td3(), **{**MEMORY, "learning_starts": 1}) as run:
        critic = run.learner.players["critic"]
        moves = []
        for _ in range(7):
            before = copies(run.policy, critic, run.annotators["target"])
            run.advance()
            after = copies(run.policy, critic, run.annotators["target"])
            moves.append([not same(a, b) for a, b in zip(before, after, strict=True)])
        assert moves[0] == [False, False, False]
        assert [m[1] for m in moves[1:]] == [True] * 6
        assert [m[0] for m in moves[1:]] == [False, True] * 3
        assert [m[2] for m in moves[1:]] == [False, True] * 3, "together with the actor"


# ---- how much, and when ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("num_envs", "rollout", "learning_starts", "train_every", "updates"),
    [
        (1, 12, 5, 1, 1),
        (1, 12, 5, 2, 1),
        (1, 12, 5, 4, 3),
        (3, 7, 10, 1, 1),
        (2, 7, 9, 4, 2),
        (2, 6, 0, 5, 1),
        (1, 4, 24, 1, 1),
    ],
)
def test_off_policy_updates_are_counted_and_start_on_time(
    tmp_path: Path, num_envs: int, rollout: int, learning_starts: int, train_every: int, updates: int
) -> None:
    """Uniformly random until `learning_starts` environment steps; then `updates` after every `train_every` of each copy."""
    settings = {**OFF_POLICY, "hidden": (8,), "batch_size": 4, "num_envs": num_envs, "rollout": rollout,
                "learning_starts": learning_starts, "train_every": train_every, "updates": updates,
                "total_timesteps": 2 * num_envs * rollout}  # fmt: skip
    with built(tmp_path, dqn(), **settings) as run:
        acted: list[int] = []
        act = run.policy.act
        run.policy.act = noting(acted, lambda: run.data.collector.steps, act)
        seen = watched(run)
        run.train()
        steps = range(1, 2 * rollout + 1)
        started = [s for s in steps if (s - 1) * num_envs >= learning_starts]
        due = [s for s in started if s % train_every == 0]
        assert acted == [s - 1 for s in started]
        assert len(seen) == run.learner.updates == updates * len(due)
        assert all(len(u.episodes) == 4 for u in seen)
        assert run.data.collector.env_steps == 2 * rollout * num_envs
        assert len(run.data.replay) == 2 * rollout * num_envs
        assert run.records.metrics[-1]["env_steps"] == 2 * rollout * num_envs


def test_epsilon_falls_over_its_share_of_the_run(tmp_path: Path) -> None:
    settings = {
        **OFF_POLICY,
        "hidden": (8,),
        "batch_size": 4,
        "rollout": 10,
        "learning_starts": 0,
        "total_timesteps": 40,
    }
    with built(tmp_path, dqn(epsilon=0.2, exploration=0.5), **settings) as run:
        found: list[float] = []
        act = run.policy.act
        run.policy.act = noting(found, lambda: run.policy.epsilon, act)
        run.train()
        assert found == pytest.approx([max(0.2, 1 - 0.8 * s / 20) for s in range(40)])


@pytest.mark.parametrize("build", [lambda: ppo(**PPO), lambda: sac(), lambda: dqn()], ids=["ppo", "sac", "dqn"])
def test_a_run_is_a_function_of_its_seed(tmp_path: Path, build: Callable[[], Recipe]) -> None:
    recipe = build()
    assert recipe.control is not None
    settings = {**MEMORY, "rollout": 20, "learning_starts": 10} if recipe.control.off_policy else ROLLOUT
    settings = settings if recipe.control.actor == "squashed" else {k: v for k, v in settings.items() if k != "task"}
    torch.manual_seed(1)
    one = weights(tmp_path / "a", recipe, **settings, seed=0)
    torch.manual_seed(2)
    torch.randn(7)
    two = weights(tmp_path / "b", recipe, **settings, seed=0)
    three = weights(tmp_path / "c", recipe, **settings, seed=1)
    assert same(one, two)
    assert not any(torch.equal(a, b) for a, b in zip(one, three, strict=True) if a.ndim > 1)


def test_micro_batches_change_no_weight(tmp_path: Path) -> None:
    """`token_budget` is memory: a step of PPO in minibatches of shuffled steps, cut further."""
    whole = weights(tmp_path / "a", ppo(**PPO), **ROLLOUT)
    cut = weights(tmp_path / "b", ppo(**PPO), **{**ROLLOUT, "token_budget": 7})
    for a, b in zip(whole, cut, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    off = {**MEMORY, "rollout": 10, "learning_starts": 10}
    for a, b in zip(weights(tmp_path / "c", sac(), **off), weights(tmp_path / "d", sac(), **off, token_budget=5),
                    strict=True):  # fmt: skip
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_turned_knobs_reach_the_next_update(tmp_path: Path) -> None:
    """The temperature of an update is that from before it, in the actor and in the target."""
    with built(tmp_path, sac(temperature=0.3, temperature_rate=0.1), **{**MEMORY, "learning_starts": 1}) as run:
        seen = watched(run)
        knobs = []
        for _ in range(4):
            knobs.append(run.settings()["temperature"])
            run.advance()
        found = [next(t.coefficient for t in u.coefficients.terms if t.title == "entropy") for u in seen]
        assert found == pytest.approx([-k for k in knobs[1:]])
        assert len(set(found)) == 3
        fixed = replace(sac(automatic=False, temperature=0.3))
    with built(tmp_path / "fixed", fixed, **{**MEMORY, "learning_starts": 1}) as run:
        assert run.settings() == {}


def test_priorities_are_the_errors_of_the_update_that_drew_the_rows(tmp_path: Path) -> None:
    """P(i) ~ (|Q - y| + eps)^alpha; the regression is weighted by the correction (arXiv 1511.05952)."""
    settings = {**OFF_POLICY, "hidden": (8,), "batch_size": 6, "rollout": 1, "learning_starts": 60, "prioritized": 0.6,
                "total_timesteps": 100}  # fmt: skip
    with built(tmp_path, dqn(huber=1e9), **settings) as run:
        seen = watched(run)
        while not seen:
            run.advance()
        b, coefficient = seen[0].episodes, seen[0].coefficients.total["q"][:, 0]
        y = b["reward"] + b["discount"] * (1 - b["terminated"].float()) * b["next_q"]
        error = seen[0].signals["q"][:, 0] - y
        torch.testing.assert_close(coefficient, b["replay_weight"] * error / 6)
        tree = run.data.replay._tree
        found = torch.tensor([tree[int(i)] for i in b["replay_index"]])
        torch.testing.assert_close(found.float(), (error.abs() + 1e-6) ** 0.6, rtol=1e-4, atol=1e-6)
