"""Environments computed together give Gymnasium's own numbers, and are left alone where they could not."""

from __future__ import annotations

import json
from functools import partial
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.envs.classic_control.cartpole import CartPoleEnv

from unipo.sources.acting import vectorised
from unipo.sources.acting.collector import Collector
from unipo.sources.acting.computations import COMPUTATIONS, CartPoles
from unipo.sources.acting.environments import Environments, make_environment
from unipo.sources.acting.histories import Histories
from unipo.sources.acting.stepping import Maker, Together
from unipo.sources.acting.vectorised import Vectorised, agree, together

OPTIONS: list[tuple[str, dict[str, Any]]] = [
    ("CartPole-v1", {}),
    ("CartPole-v0", {"sutton_barto_reward": True, "max_episode_steps": 9}),
    ("HalfCheetah-v5", {}),
    ("HalfCheetah-v5", {"exclude_current_positions_from_observation": False, "ctrl_cost_weight": 0.3, "frame_skip": 2}),
    ("Hopper-v5", {}),
    ("Swimmer-v5", {"forward_reward_weight": 2.0}),
    ("Walker2d-v5", {"terminate_when_unhealthy": False, "max_episode_steps": 40}),
    ("Walker2d-v5", {}),
]
named = pytest.mark.parametrize(
    ("name", "options"), OPTIONS, ids=lambda x: x if isinstance(x, str) else ",".join(x) or "-"
)
pytestmark = pytest.mark.filterwarnings("ignore:.*out of date.*")


def made(name: str, options: dict[str, Any], num: int = 3) -> tuple[Environments, Environments]:
    """(computed together, stepped one by one by Gymnasium): the same seeds."""
    make = partial(make_environment, name, **options)
    fast, slow = (Environments(make, num, seed=3) for _ in range(2))
    slow._stepper = Together([Maker(make, i, ())() for i in range(num)])
    slow.load_state_dict(slow.state_dict())
    assert isinstance(fast._stepper, Vectorised)
    return fast, slow


def drawn(environments: Environments, rng: np.random.Generator) -> Any:
    spec, n = environments.action_spec, environments.num
    return rng.integers(0, spec.size, n) if spec.kind == "categorical" else rng.uniform(-1.2, 1.2, (n, spec.size))


@named
def test_every_number_is_gymnasiums(name: str, options: dict[str, Any]) -> None:
    fast, slow = made(name, options)
    rng, ended = np.random.default_rng(0), 0
    for _ in range(150):
        action = drawn(fast, rng).astype(np.int64 if fast.action_spec.kind == "categorical" else np.float32)
        ours, theirs = fast.step(action), slow.step(action)
        for a, b in zip(ours[:4], theirs[:4], strict=True):
            np.testing.assert_array_equal(a, b)
        assert ours.observation.dtype == np.float32
        ended += int((ours.terminated | ours.truncated).sum())
        np.testing.assert_array_equal(fast.observation, slow.observation)
    np.testing.assert_array_equal(fast.episode_number, slow.episode_number)
    assert ended or name in ("HalfCheetah-v5", "Swimmer-v5")


@named
def test_states_are_exchanged_with_gymnasium(name: str, options: dict[str, Any]) -> None:
    """In the middle of episodes, through JSON, in both directions."""
    fast, slow = made(name, options)
    rng = np.random.default_rng(1)
    for _ in range(20):
        fast.step(drawn(fast, rng).astype(np.int64 if fast.action_spec.kind == "categorical" else np.float32))
    for _ in range(2):
        slow.load_state_dict(json.loads(json.dumps(fast.state_dict())))
        assert slow.state_dict() == fast.state_dict()
        for _ in range(30):
            action = drawn(fast, rng).astype(np.int64 if fast.action_spec.kind == "categorical" else np.float32)
            for a, b in zip(fast.step(action)[:4], slow.step(action)[:4], strict=True):
                np.testing.assert_array_equal(a, b)
        fast, slow = slow, fast


# ---- which environments --------------------------------------------------------------------------------------------
class Heavier(CartPoleEnv):
    """Somebody's own."""


def implicit() -> gym.Env[Any, Any]:
    env = make_environment("CartPole-v1")
    env.unwrapped.kinematics_integrator = "semi-implicit euler"
    return env


def overridden() -> gym.Env[Any, Any]:
    env = make_environment("CartPole-v1")
    step = env.unwrapped.step
    env.unwrapped.step = lambda action: step(1 - action)
    return env


@pytest.mark.parametrize(
    "make",
    [
        Heavier,
        implicit,
        overridden,
        partial(make_environment, "CartPole-v1", render_mode="rgb_array"),
        lambda: gym.wrappers.TransformReward(make_environment("CartPole-v1"), lambda r: 2 * r),
        partial(make_environment, "Pendulum-v1"),
    ],
    ids=["subclass", "integrator", "own step", "watched", "wrapped", "unknown"],
)
def test_what_is_not_known_is_stepped_by_itself(make: Any) -> None:
    assert type(together([Maker(make, 0, ())])) is Together


def test_info_columns_need_the_environment() -> None:
    assert type(together([Maker(partial(make_environment, "HalfCheetah-v5"), 0, ("x_velocity",))])) is Together


def test_another_mass_is_computed_with() -> None:
    def heavy() -> gym.Env[Any, Any]:
        env = make_environment("CartPole-v1")
        env.unwrapped.total_mass *= 2
        return env

    stepper = together([Maker(heavy, i, ()) for i in range(2)])
    assert type(stepper) is Vectorised


def test_what_disagrees_is_said_and_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def lighter(envs: Any) -> CartPoles:
        computed = CartPoles(envs)
        computed._force = computed._force * (1 + 1e-12)
        return computed

    name = "gymnasium.envs.classic_control.cartpole:CartPoleEnv"
    monkeypatch.setitem(vectorised.COMPUTATIONS, name, lighter)
    with pytest.warns(UserWarning, match="CartPoleEnv.*one by one"):
        environments = Environments(partial(make_environment, "CartPole-v1"), 2, 0)
    assert type(environments._stepper) is Together
    assert name in COMPUTATIONS
    envs = [Maker(partial(make_environment, "CartPole-v1"), i, ())() for i in range(2)]
    assert agree(envs, CartPoles([env.inner for env in envs]))


# ---- what a step costs ---------------------------------------------------------------------------------------------
def test_a_vector_step_calls_no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of single environments: those of the comparison, before the first reset, and none afterwards."""
    calls: list[int] = []
    step = CartPoleEnv.step
    monkeypatch.setattr(CartPoleEnv, "step", lambda self, action: (calls.append(1), step(self, action))[1])
    environments = Environments(partial(make_environment, "CartPole-v1"), 8, 0)
    compared = len(calls)
    collector = Collector(environments, 0)
    collector.collect(50, collector.random_act, 0)
    assert (compared, len(calls)) == (vectorised.PROBE, compared)


def test_wrappers_are_passed_by_and_time_limits_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: Any) -> None:
        raise AssertionError("a wrapper's step")

    for wrapper in (gym.wrappers.TimeLimit, gym.wrappers.OrderEnforcing):
        monkeypatch.setattr(wrapper, "step", never)
    environments = Environments(partial(make_environment, "Pendulum-v1", max_episode_steps=7), 2, 0)
    collector = Collector(environments, 0)
    lengths = collector.collect(15, collector.random_act, 0).lengths().tolist()
    assert lengths == [7, 7, 1] * 2


# ---- histories -----------------------------------------------------------------------------------------------------
def test_histories_keep_what_runs_and_forget_the_rest() -> None:
    """Beside lists; environment 1 runs for ever, the others begin anew at random."""
    rng, num = np.random.default_rng(0), 3
    histories, lists = Histories(num, (2,), np.dtype(np.float32)), [[] for _ in range(num)]
    for t in range(1000):
        action = rng.normal(size=(num, 2)).astype(np.float32)
        histories.append(action)
        ended = (rng.random(num) < 0.05) & (np.arange(num) != 1)
        for i in range(num):
            lists[i].append(action[i])
        if ended.any():
            histories.begin(ended)
            lists = [[] if ended[i] else lists[i] for i in range(num)]
        if t % 100 == 99:
            for i in range(num):
                assert histories.length(i) == len(lists[i])
                np.testing.assert_array_equal(histories.of(i), np.reshape(lists[i], (-1, 2)))
        if t == 500:
            again = Histories(num, (2,), np.dtype(np.float32))
            again.load([histories.of(i).tolist() for i in range(num)])
            histories = again
    short = Histories(1, (), np.dtype(np.int64))
    for t in range(10_000):
        short.append(np.array([t]))
        short.begin(np.array([t % 10 == 0]))
    assert len(short._rows) == 64  # what is over needs no room
