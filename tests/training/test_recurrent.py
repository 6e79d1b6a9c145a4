"""Runs with memory: what was stored reproduces what was done; whole fragments; exact resume; what memory is good for."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces

from tests.training.test_control_resume import killed_at_update, measured, same, weights
from unipo import api
from unipo.critics.recurrent import RecurrentValue
from unipo.episodes import Column, Episodes, offsets_of
from unipo.methods.catalog import build
from unipo.policies.recurrent import RecurrentPolicy
from unipo.sources.acting.evaluation import evaluate
from unipo.sources.acting.remembering import mode
from unipo.training.config import ConfigError, ControlConfig
from unipo.training.control import EnvironmentData
from unipo.training.loop import Run
from unipo.training.revisit import evaluate_control, load_actor, load_trained

SMALL: dict[str, Any] = {
    "task": "unipo/CartPoleHidden-v0", "total_timesteps": 480, "num_envs": 3, "rollout": 16, "batch_size": 16, "epochs": 2,
    "hidden": (8, 6), "recurrent": True, "eval_episodes": 3, "evaluations": 2, "tensorboard": False, "seed": 3,
    "normalize_observations": True, "checkpoints": 2,
}  # fmt: skip


def begun(out: Path, method: str = "ppo", **settings: Any) -> Run:
    config = ControlConfig(method=method, out=str(out), **{**SMALL, **settings})
    return api.start(config, build(method, {}, environment=True))


def drawn(run: Run) -> Episodes:
    """A batch in which episodes go on from the batch before, begin and end."""
    for _ in range(3):
        run.advance()
    return run.draw()


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    made = begun(tmp_path / "run")
    yield made
    made.data.close()


# ---- memory in the data ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("task", ["unipo/CartPoleHidden-v0", "Pendulum-v1"])
def test_fragments_are_scored_as_they_were_acted(task: str, tmp_path: Path) -> None:
    """The policy has been trained in the middle of these episodes: what it remembers is of its older self, and stored."""
    run = begun(tmp_path, task=task)
    batch = drawn(run)
    again = run.policy.signals(batch, ["logp"])["logp"].detach()
    assert torch.allclose(again, batch["behavior_logp"], atol=1e-5)
    ongoing = batch["memory"].abs().sum(1) > 0
    assert bool(ongoing.any())
    forgotten = run.policy.signals(batch.without("memory"), ["logp"])["logp"].detach()
    late = ongoing[torch.repeat_interleave(batch.lengths())]
    assert not torch.allclose(forgotten[late], batch["behavior_logp"][late], atol=1e-5)
    assert torch.equal(forgotten[~late], again[~late])
    run.data.close()


def test_an_episode_that_begins_remembers_nothing(run: Run) -> None:
    batch = drawn(run)
    env, number = batch["env"], batch["episode_number"]
    first = torch.cat([torch.ones(1, dtype=torch.bool), env[1:] != env[:-1]])
    assert int((~first).sum()) > 0
    assert not batch["memory"][~first].any()
    assert not batch["value_memory"][~first].any()
    following = run.draw()
    starts = {(int(e), int(n)) for e, n in zip(env, number, strict=True)}
    for i, pair in enumerate(zip(following["env"].tolist(), following["episode_number"].tolist(), strict=True)):
        assert bool(following["memory"][i].any()) == (pair in starts)


def test_the_critic_has_a_memory_too() -> None:
    """Values of states one by one are those of fragments; what follows a fragment's last step is its final state."""
    torch.manual_seed(0)
    critic, lengths = RecurrentValue(2, (8, 5)), [3, 1, 2]
    observation, final, start = torch.randn(6, 2), torch.randn(3, 2), torch.randn(3, 5)
    one = torch.arange(4)
    columns = {"observation": Column(observation, "step"), "final_observation": Column(final, "episode"),
               "value_memory": Column(start, "episode")}  # fmt: skip
    episodes = Episodes({"turn": offsets_of(torch.tensor(lengths)), "episode": one, "group": one}, columns)
    value, following = [], []
    for states, last, memory in zip(observation.split(lengths), final, start, strict=True):
        seen = []
        for state in (*states, last):
            memory = critic.remember(state[None], memory[None])[0]
            seen.append(critic.head(memory))
        value += seen[:-1]
        following += seen[1:]
    found = critic.signals(episodes, ["value", "next_value"])
    assert torch.allclose(found["value"], torch.cat(value), atol=1e-6)
    assert torch.allclose(found["next_value"], torch.cat(following), atol=1e-6)
    assert torch.allclose(critic.signals(episodes, ["value"])["value"], found["value"], atol=1e-6)
    with pytest.raises(KeyError):
        critic.signals(episodes, ["q"])


def test_minibatches_are_whole_fragments(run: Run) -> None:
    batch = run.draw()
    parts = [part for _, part in run._minibatches(batch, run.objective())]
    fragments = {(int(e), int(n)): int(k) for e, n, k in
                 zip(batch["env"], batch["episode_number"], batch.lengths(), strict=True)}  # fmt: skip
    found = [(int(e), int(n)) for part in parts for e, n in zip(part["env"], part["episode_number"], strict=True)]
    assert sorted(found) == sorted([*fragments] * 2)
    assert len(parts) == 2 * 3  # 3 environments x 16 steps in minibatches of about 16, twice
    for part in parts:
        assert part.lengths().tolist() == [fragments[int(e), int(n)] for e, n in
                                           zip(part["env"], part["episode_number"], strict=True)]  # fmt: skip


# ---- coming back -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("asynchronous", [False, True])
def test_stopped_and_resumed_is_as_uninterrupted(
    asynchronous: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of episodes, which are remembered with weights that no longer exist."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    finished = api.finish(begun(whole, asynchronous=asynchronous))
    run = begun(broken, asynchronous=asynchronous)
    killed_at_update(monkeypatch, run, finished.learner.updates * 3 // 4)
    run.data.close()
    again = api.resume(broken)
    for one in (finished, again):
        one.data.close()
    assert 0 < run.step < again.step == finished.step
    assert same(weights(whole), weights(broken))
    assert all(same(finished.modules[m].state_dict(), again.modules[m].state_dict()) for m in finished.modules)
    assert measured(whole) == measured(broken)


def test_what_is_saved_acts_as_what_was_evaluated(tmp_path: Path) -> None:
    run = api.finish(begun(tmp_path))
    last = run.records.metrics[-1]
    policy = load_trained(tmp_path)
    assert isinstance(policy, RecurrentPolicy)
    assert evaluate_control(tmp_path, 3).metrics()["return"] == last["eval_return"]
    actor, env = load_actor(tmp_path, gym.make(SMALL["task"])), gym.make(SMALL["task"])
    found = []
    for seed in (5, 6):
        observation, _ = env.reset(seed=seed)
        actor.reset()
        actions = []
        for _ in range(8):
            actions.append(int(actor(observation)))
            observation, *_ = env.step(actions[-1])
        found.append(actions)
    memory, expected = policy.start(1), []
    observation, _ = env.reset(seed=6)
    for _ in range(8):
        action, _, memory = policy.act(torch.from_numpy(observation)[None], torch.zeros(1, 0), memory, True)
        expected.append(int(action[0]))
        observation, *_ = env.step(expected[-1])
    assert found[1] == expected
    run.data.close()


# ---- which methods ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("method", ["a2c", "reinforce", "trpo", "npg", "mdpo", "npg-igt-harpg"])
def test_methods_that_can_remember(method: str, tmp_path: Path) -> None:
    run = begun(tmp_path, method)
    before = [p.detach().clone() for p in run.policy.parameters()]
    run.advance()
    row = run.advance()
    moved = [bool((a != b).any()) for a, b in zip(before, run.policy.parameters(), strict=True)]
    assert sum(moved) >= len(moved) - 1
    assert np.isfinite(row["loss"])
    run.data.close()


REFUSED = {
    "sac": "learns from single transitions",
    "dqn": "learns from single transitions",
    "iql": "learns from single transitions",
    "props": "lets a second policy act",
}


@pytest.mark.parametrize("method", REFUSED)
def test_methods_that_cannot_are_told(method: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"{REFUSED[method]}.*leave out --recurrent"):
        begun(tmp_path, method, task="Pendulum-v1" if method in ("sac", "iql") else "CartPole-v1")


def test_a_schedule_must_know_how_many_updates_there_will_be(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--batch-size of at least 16, or --schedule constant"):
        begun(tmp_path, schedule="linear", batch_size=15)
    run = begun(tmp_path, schedule="linear")
    run.train()
    assert run.learner.updates == run.learner.settings.total_updates
    run.data.close()


# ---- what memory is good for -----------------------------------------------------------------------------------------
class Recall(gym.Env[Any, Any]):
    """The action that the third step pays for was shown at the first; a coin decides it."""

    observation_space, action_space = spaces.Box(-1, 1, (2,), np.float32), spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.cue, self.time = int(self.np_random.integers(2)), 0
        return np.array([2 * self.cue - 1, 0], np.float32), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.time += 1
        paid = float(self.time == 3 and int(action) == self.cue)
        return np.array([0, self.time / 3], np.float32), paid, self.time == 3, False, {}


@pytest.mark.parametrize(("recurrent", "low", "high"), [(True, 0.99, 1.0), (False, 0.3, 0.7)])
def test_memory_earns_what_the_last_observation_cannot(
    recurrent: bool, low: float, high: float, tmp_path: Path
) -> None:
    gym.register("Recall-v0", lambda **_: Recall())
    try:
        run = begun(tmp_path, task="Recall-v0", recurrent=recurrent, total_timesteps=4000, num_envs=16, rollout=18,
                    batch_size=72, epochs=4, learning_rate=5e-3, evaluations=0, hidden=(16,),
                    normalize_observations=False)  # fmt: skip
        run.train()
        assert isinstance(run.data, EnvironmentData)
        found = evaluate(mode(run.policy), Recall, 64, seed=1)
        assert low <= float(found.returns.mean()) <= high
        run.data.close()
    finally:
        del gym.registry["Recall-v0"]
