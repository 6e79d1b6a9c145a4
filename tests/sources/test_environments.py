"""Environments and the collector: bounds of episodes, exact resume, and failures that say where."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import Tensor

from unipo.episodes import Episodes
from unipo.sources.acting.collector import Collector
from unipo.sources.acting.environment_errors import EnvironmentFailure, TaskEnvironmentError
from unipo.sources.acting.environments import ActionSpec, Environments, ObservationSpec, make_environment
from unipo.sources.acting.reward_scaling import RewardScaler
from unipo.sources.acting.transitions import TransitionReplay, rows_of


class Counting(gym.Env[Any, Any]):
    """Observes (time, how often it was reset); pays the time reached; ends after `length` steps, or is cut after `limit`.

    `trouble` at step 2 of the second episode: nan, inf reward, shape, crash or exit.
    """

    observation_space = spaces.Box(-np.inf, np.inf, (2,), np.float64)
    action_space = spaces.Discrete(3)

    def __init__(self, length: int = 3, limit: int = 99, trouble: str = "") -> None:
        self.length, self.limit, self.trouble = length, limit, trouble
        self.time, self.resets = 0, 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.time, self.resets = 0, self.resets + 1
        return np.array([0.0, self.resets]), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.time += 1
        observation, reward = np.array([self.time, self.resets], dtype=float), float(self.time)
        if self.trouble and self.resets == 2 and self.time == 2:
            if self.trouble == "crash":
                raise ZeroDivisionError("the physics exploded")
            if self.trouble == "exit":
                raise SystemExit(1)
            observation = {"nan": observation * np.nan, "shape": observation[:1]}.get(self.trouble, observation)
            reward = float("inf") if self.trouble == "inf reward" else reward
        info = {"half": self.time / 2, "pair": np.array([self.time, -self.time]), "unused": object}
        return observation, reward, self.time >= self.length, self.time >= self.limit, info


class Spaced(gym.Env[Any, Any]):
    """Any spaces; remembers the last action in `done`."""

    def __init__(self, observation: spaces.Space[Any], action: spaces.Space[Any]) -> None:
        self.observation_space, self.action_space, self.done = observation, action, None
        self.observation_space.seed(0)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        return self.observation_space.sample(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        assert self.action_space.contains(action), action
        self.done = action
        return self.observation_space.sample(), 0.0, False, False, {}


def zeros(observation: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    return torch.zeros(len(observation), dtype=torch.long), torch.full((len(observation),), -1.5)


def counting(num: int = 2, asynchronous: bool = False, info: tuple[str, ...] = (), **options: Any) -> Collector:
    return Collector(
        Environments(partial(Counting, **options), num, seed=5, asynchronous=asynchronous, info_columns=info), 7
    )


def same(a: Episodes, b: Episodes) -> bool:
    return a.columns.keys() == b.columns.keys() and all(a[name].equal(b[name]) for name in a.columns)


# ---- fragments -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("asynchronous", [False, True])
def test_fragments_are_cut_where_episodes_end(asynchronous: bool) -> None:
    """Episodes of 3 steps in batches of 5: 3 + 2 | 1 + 3 + 1."""
    collector = counting(asynchronous=asynchronous, info=("half", "pair"))
    first, second = collector.collect(5, zeros, version=4), collector.collect(5, zeros, version=5)
    collector.environments.close()
    assert first.lengths().tolist() == [3, 2, 3, 2]
    assert first["observation"][:, 0].tolist() == [0, 1, 2, 0, 1] * 2
    assert first["reward"].tolist() == [1, 2, 3, 1, 2] * 2
    assert first["behavior_logp"].tolist() == [-1.5] * 10
    assert first["half"].tolist() == [0.5, 1, 1.5, 0.5, 1] * 2
    assert first["pair"].tolist() == [[t, -t] for t in (1, 2, 3, 1, 2)] * 2
    assert first["terminated"].tolist() == [True, False] * 2
    assert first["truncated"].tolist() == [False, True] * 2
    assert first["unfinished"].tolist() == [False, True] * 2
    assert first["final_observation"].tolist() == [[3, 1], [2, 2]] * 2  # the state reached, never the reset one
    assert first["env"].tolist() == [0, 0, 1, 1]
    assert first["episode_number"].tolist() == [0, 1, 0, 1]
    assert first["policy_version"].tolist() == [4] * 4
    assert first.category("kind", "rollout").all()
    assert second.lengths().tolist() == [1, 3, 1] * 2
    assert second["observation"][:, 0].tolist() == [2, 0, 1, 2, 0] * 2
    assert second["terminated"].tolist() == [True, True, False] * 2
    assert second["episode_number"].tolist() == [1, 2, 3] * 2
    assert collector.take_finished() == [(6.0, 3)] * 6
    assert collector.take_finished() == []
    assert collector.env_steps == 20


def test_a_time_limit_is_not_an_end_and_an_end_wins() -> None:
    limited = counting(num=1, length=99, limit=2).collect(4, zeros, 0)
    assert limited["terminated"].tolist() == [False, False]
    assert limited["truncated"].tolist() == [True, True]
    assert limited["unfinished"].tolist() == [False, False]
    both = counting(num=1, length=2, limit=2).collect(4, zeros, 0)
    assert both["terminated"].tolist() == [True, True]
    assert both["truncated"].tolist() == [False, False]


def test_single_steps_and_batches_are_the_same_transitions() -> None:
    for collectors in ([counting(), counting()], [cartpole(), cartpole()]):
        stepped = [collectors[0].step(collectors[0].random_act, 3) for _ in range(30)]
        rows = rows_of(collectors[1].collect(30, collectors[1].random_act, 3))
        for name in rows:
            ours = np.stack([s[name] for s in stepped], axis=1)
            np.testing.assert_array_equal(ours.reshape(-1, *ours.shape[2:]), rows[name], err_msg=name)


def test_both_ways_into_the_replay_give_the_same_n_step_returns() -> None:
    one, other = cartpole(), cartpole()
    a, b = (TransitionReplay(500, 0, gamma=0.5, n_step=3) for _ in range(2))
    for _ in range(20):
        a.add_rows(one.step(one.random_act, 0))
    for _ in range(4):
        b.add(other.collect(5, other.random_act, 0))
    keys = ("observation", "reward", "discount", "final_observation", "terminated")
    drawn = [
        {tuple(map(float, torch.cat([s[k].float().reshape(-1) for k in keys]))) for s in _each(r.sample(1000, 0))}
        for r in (a, b)
    ]
    assert drawn[0] == drawn[1]
    assert len(drawn[0]) == 60


def _each(batch: Episodes) -> list[Episodes]:
    return [batch.select(torch.tensor([i])) for i in range(len(batch))]


# ---- determinism and resume ----------------------------------------------------------------------------------------
def collector_of(name: str, num: int = 3, scaled: bool = False, asynchronous: bool = False, seed: int = 1) -> Collector:
    environments = Environments(partial(make_environment, name), num, seed=seed, asynchronous=asynchronous)
    return Collector(environments, seed=2, noise_size=4, reward_scaler=RewardScaler(num) if scaled else None)


cartpole = partial(collector_of, "CartPole-v1")


def noisy_act(collector: Collector) -> Any:
    """Acts by observation and noise, so that any difference spreads."""

    def act(observation: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        signal = torch.tanh(observation.sum(1) + noise[:, 0])
        spec = collector.environments.action_spec
        action = (signal > 0).long() if spec.kind == "categorical" else signal[:, None].repeat(1, spec.size)
        return action, -signal

    return act


@pytest.mark.parametrize("name", ["CartPole-v1", "Pendulum-v1", "Hopper-v5"])
def test_resume_is_exact(name: str) -> None:
    """37 steps, save, 300 more == load elsewhere, 300 more: bit for bit, also through JSON."""
    first = collector_of(name, scaled=True)
    first.collect(37, noisy_act(first), 0)
    state = json.loads(json.dumps(first.state_dict()))
    resumed = collector_of(name, scaled=True)
    resumed.collect(5, noisy_act(resumed), 0)  # wherever it stands
    resumed.load_state_dict(state)
    assert same(first.collect(300, noisy_act(first), 1), resumed.collect(300, noisy_act(resumed), 1))
    assert first.take_finished() == resumed.take_finished()
    assert first.state_dict() == resumed.state_dict()


def test_where_it_stood_can_be_written_out_later() -> None:
    """Also after the episodes went on, and after the room for their actions was made anew."""
    for name in ("CartPole-v1", "Pendulum-v1"):
        collector = collector_of(name)
        collector.collect(37, noisy_act(collector), 0)
        then, later = collector.state_dict(), collector.standing()
        collector.collect(300, noisy_act(collector), 1)
        assert later() == then != collector.state_dict()


def test_processes_do_the_same_as_one_process() -> None:
    together, apart = cartpole(), cartpole(asynchronous=True)
    assert same(together.collect(50, noisy_act(together), 0), apart.collect(50, noisy_act(apart), 0))
    state = apart.state_dict()
    assert state == together.state_dict()
    again = cartpole(asynchronous=True)
    again.load_state_dict(state)
    assert same(together.collect(50, noisy_act(together), 0), again.collect(50, noisy_act(again), 0))
    apart.environments.close()
    again.environments.close()


def test_seeds_and_environments_differ() -> None:
    a, b = cartpole(seed=1).environments.observation, cartpole(seed=2).environments.observation
    assert len({tuple(x) for x in [*a.tolist(), *b.tolist()]}) == 6


def test_noise_is_the_same_however_the_steps_are_grouped() -> None:
    seen: list[list[list[float]]] = [[], []]

    def recorded(into: int) -> Any:
        def act(observation: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
            seen[into].append(noise.tolist())
            return zeros(observation, noise)

        return act

    a, b = (Collector(Environments(Counting, 2, 0), 0, noise_size=3) for _ in range(2))
    for _ in range(300):
        a.collect(1, recorded(0), 0)
    b.collect(300, recorded(1), 0)
    assert seen[0] == seen[1]
    assert len({x for step in seen[0] for x in step[0] + step[1]}) == 300 * 6
    assert np.std(seen[0]) == pytest.approx(1, abs=0.1)


def test_an_environment_that_does_not_repeat_itself_is_told() -> None:
    first = Environments(Counting, 1, 0)  # it counts its resets
    for _ in range(7):
        first.step(np.array([0]))
    with pytest.warns(UserWarning, match="not exact"):
        Environments(Counting, 1, 0).load_state_dict(first.state_dict())
    with pytest.raises(ValueError, match="1 environments, these are 2"):
        Environments(Counting, 2, 0).load_state_dict(first.state_dict())


# ---- rewards -------------------------------------------------------------------------------------------------------
def test_scaled_rewards() -> None:
    """Two environments, three steps; the discounted sums by hand."""
    scaler = RewardScaler(2, gamma=0.5, count=0.0)
    reward = np.array([[1.0, 2.0, 4.0], [2.0, 0.0, 100.0]])
    ended = np.array([[False, True, False], [False, False, False]])
    sums = np.array([[1.0, 2.5, 4.0], [2.0, 1.0, 100.5]])
    scaled = scaler.merge_and_scale(reward, ended)
    np.testing.assert_allclose(scaled, reward / np.sqrt(sums.var() + 1e-8), rtol=1e-6)
    more = np.array([[1.0], [1.0]])
    scaled = scaler.merge_and_scale(more, np.array([[False], [False]]))
    every = np.concatenate([sums, [[3.0], [51.25]]], axis=1)  # of both batches, as one
    np.testing.assert_allclose(scaled, more / np.sqrt(every.var() + 1e-8), rtol=1e-6)
    assert scaler.mean == pytest.approx(every.mean())
    assert RewardScaler(1, clip=2.0, var=1e-6, count=1e9).merge_and_scale(np.array([[-9.0]]), np.array([[True]])) == [
        [-2.0]
    ]


def test_raw_rewards_stay_beside_the_scaled() -> None:
    collector = counting()
    collector.reward_scaler = RewardScaler(2, gamma=1.0)
    batch = collector.collect(6, zeros, 0)
    assert batch["raw_reward"].tolist() == [1, 2, 3] * 4
    spread = np.std([1, 3, 6] * 4)
    assert batch["reward"].numpy() == pytest.approx(batch["raw_reward"].numpy() / spread, rel=1e-4)
    assert collector.take_finished()[0] == (6.0, 3)
    row = collector.step(zeros, 0)
    assert row["raw_reward"].tolist() == [1, 1]
    assert row["reward"].tolist() != [1, 1]


# ---- spaces --------------------------------------------------------------------------------------------------------
def test_box_actions_are_mapped_from_minus_one_to_one_and_clipped() -> None:
    spec = ActionSpec.of(spaces.Box(np.array([0, -4, -np.inf], np.float32), np.array([10, 4, 7], np.float32)))
    assert (spec.kind, spec.size, spec.bounded) == ("box", 3, False)
    native = spec.native(np.array([[-1, -1, -50], [0, 0.5, 3], [9, -9, 9]], dtype=np.float32))
    assert native.tolist() == [[0, -4, -50], [5, 2, 3], [10, -4, 7]]
    assert not ActionSpec.of(spaces.Box(np.finfo(np.float32).min, np.finfo(np.float32).max, (1,))).bounded
    assert ActionSpec.of(spaces.Box(-2, 2, (2, 2))).native(np.zeros((5, 4), np.float32)).shape == (5, 2, 2)
    whole = ActionSpec.of(spaces.Box(0, 255, (1,), np.uint8)).native(np.array([[1.0], [0.0]], np.float32))
    assert whole.dtype == np.uint8
    assert whole.tolist() == [[255], [128]]


def test_discrete_actions_begin_where_the_space_begins() -> None:
    assert ActionSpec.of(spaces.Discrete(3, start=-1)).native(np.array([0, 2])).tolist() == [-1, 1]
    several = ActionSpec.of(spaces.MultiDiscrete([2, 5], start=[1, 10]))
    assert several.sizes == (2, 5)
    assert several.native(np.array([[1, 4]])).tolist() == [[2, 14]]
    for bad in (3, -1):
        with pytest.raises(ValueError, match="expected integers from 0 to below"):
            ActionSpec.of(spaces.Discrete(3)).native(np.array([bad]))
    with pytest.raises(ValueError, match="NaN"):
        ActionSpec.of(spaces.Box(-1, 1, (1,))).native(np.array([[np.nan]], np.float32))


pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:gymnasium")

BOX = spaces.Box(-1, 1, (2,))
ACTIONS = [
    spaces.Discrete(4, start=2),
    spaces.MultiDiscrete([2, 3], start=[0, 5]),
    spaces.MultiDiscrete([[2, 3], [4, 5]]),
    spaces.MultiBinary(3),
    spaces.Box(-3, 5, (2, 2)),
    spaces.Box(0, 7, (3,), np.int32),
]
OBSERVATIONS = [
    (spaces.Box(0, 255, (4, 4, 3), np.uint8), 48),
    (spaces.Discrete(5, start=1), 5),
    (spaces.MultiDiscrete([2, 3]), 5),
    (spaces.Dict(b=BOX, a=spaces.Dict(c=spaces.Box(-9, 9, (1, 3)))), 5),
    (spaces.Tuple([BOX, spaces.Discrete(2)]), 4),
    (spaces.Box(-1, 1, ()), 1),
]


@pytest.mark.parametrize("space", ACTIONS, ids=str)
@pytest.mark.parametrize("asynchronous", [False, True])
def test_random_actions_are_in_every_space(space: spaces.Space[Any], asynchronous: bool) -> None:
    """The environment asserts it."""
    collector = Collector(Environments(partial(Spaced, BOX, space), 2, 0, asynchronous), 0)
    batch = collector.collect(20, collector.random_act, 0)
    kind = collector.environments.action_spec.kind
    assert batch["action"].dtype == (torch.float32 if kind == "box" else torch.int64)
    state = json.loads(json.dumps(collector.environments.state_dict()))
    with pytest.warns(UserWarning, match="not exact"):  # its observations do not depend on the seed
        collector.environments.load_state_dict(state)
    collector.environments.close()


def test_log_probs_of_random_actions_are_uniform() -> None:
    two = Collector(Environments(partial(Spaced, BOX, spaces.MultiDiscrete([2, 3])), 1, 0), 0)
    assert two.random_act(torch.zeros(1, 2), torch.zeros(1, 0))[1].exp().item() == pytest.approx(1 / 6)
    box = Collector(Environments(partial(Spaced, BOX, spaces.Box(0, 9, (3,))), 1, 0), 0)
    assert box.random_act(torch.zeros(1, 2), torch.zeros(1, 0))[1].exp().item() == pytest.approx(1 / 8)


@pytest.mark.parametrize(("space", "size"), OBSERVATIONS, ids=str)
def test_observations_become_vectors(space: spaces.Space[Any], size: int) -> None:
    environments = Environments(partial(Spaced, space, spaces.Discrete(2)), 2, 0)
    assert environments.observation_spec == ObservationSpec(size)
    outcome = environments.step(np.zeros(2, dtype=np.int64))
    assert outcome.observation.shape == (2, size)
    assert outcome.observation.dtype == np.float32


@pytest.mark.parametrize("space", [spaces.Text(5), spaces.Sequence(BOX), spaces.Dict(a=BOX, b=spaces.Text(5))], ids=str)
def test_unsupported_spaces_are_named(space: spaces.Space[Any]) -> None:
    part = "Sequence" if isinstance(space, spaces.Sequence) else "Text"
    with pytest.raises(TaskEnvironmentError, match=f"observation space .*{part}.*expected Box"):
        Environments(partial(Spaced, space, spaces.Discrete(2)), 1, 0)
    with pytest.raises(TaskEnvironmentError, match=f"action space .*{part}.*expected Box"):
        Environments(partial(Spaced, BOX, space), 1, 0)


# ---- bad input -----------------------------------------------------------------------------------------------------
def test_unknown_environments_get_near_names() -> None:
    with pytest.raises(TaskEnvironmentError, match=r"no environment 'CartPol-v1'; nearest: .*CartPole-v1"):
        make_environment("CartPol-v1")
    with pytest.raises(TaskEnvironmentError, match=r"nearest: .*Hopper-v5"):
        make_environment("Hopper-v9")
    with pytest.raises(TaskEnvironmentError, match=r"no environment 'nothing_like_it/x-v0'"):
        make_environment("nothing_like_it/x-v0")
    with pytest.raises(TaskEnvironmentError, match=r"nearest: .*unipo/LotSizing-v0"):
        make_environment("LotSizing-v0")


def test_our_own_environments_are_registered_on_demand() -> None:
    name = "unipo/PostDecisionFrozenLake-v0"
    environments = Environments(
        partial(make_environment, name), 2, 0, info_columns=("post_observation", "reward_decision")
    )
    batch = Collector(environments, 0).collect(5, zeros, 0)
    assert batch["post_observation"].shape == batch["observation"].shape
    assert batch["reward_decision"].shape == (10,)


def test_missing_extras_are_named(monkeypatch) -> None:
    def absent(*args: Any, **kwargs: Any) -> None:
        raise gym.error.DependencyNotInstalled(
            'Box2D is not installed, you can install it by run `pip install "gymnasium[box2d]"`'
        )

    monkeypatch.setattr(gym, "make", absent)
    with pytest.raises(TaskEnvironmentError, match=r"gymnasium\[box2d\]"):
        make_environment("LunarLander-v3")


TROUBLES = {
    "nan": "NaN or infinite observation",
    "inf reward": "NaN or infinite reward",
    "shape": r"observation of shape \(1,\), expected \(2,\)",
    "crash": "ZeroDivisionError: the physics exploded",
}


@pytest.mark.parametrize("trouble", TROUBLES)
@pytest.mark.parametrize("asynchronous", [False, True])
def test_failures_say_where(trouble: str, asynchronous: bool) -> None:
    collector = counting(num=1, asynchronous=asynchronous, trouble=trouble)
    collector.collect(4, zeros, 0)
    with pytest.raises(
        EnvironmentFailure, match=f"environment 0 .*{TROUBLES[trouble]}.*episode 1 at step 1, after action 0"
    ) as caught:
        collector.collect(1, zeros, 0)
    assert (caught.value.env, caught.value.episode, caught.value.step, int(caught.value.action)) == (0, 1, 1, 0)
    collector.environments.close()
    before = counting(num=1)
    before.collect(4, zeros, 0)
    assert collector.environments.state_dict() == before.environments.state_dict()  # what a run saves when it fails


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_missing_entry_of_info_is_named(asynchronous: bool) -> None:
    with pytest.raises(EnvironmentFailure, match="KeyError: 'elsewhere'"):
        counting(num=2, asynchronous=asynchronous, info=("half", "elsewhere")).collect(1, zeros, 0)


def test_a_process_that_dies_is_named() -> None:
    collector = counting(num=2, asynchronous=True, trouble="exit")
    with pytest.raises(EnvironmentFailure, match=r"environment 0.*process ended"):
        collector.collect(9, zeros, 0)


def test_mujoco_says_nothing_about_how_models_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    make_environment("HalfCheetah-v5").reset(seed=0)
    assert "WARNING" not in "".join(capfd.readouterr())
    assert not list(tmp_path.iterdir())
