"""Our environments: rewards and costs by hand, what is conserved, what a seed determines, and what can be learnt."""

from __future__ import annotations

import math
import warnings

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env

from unipo.tasks.environments import (
    IDS,
    LotSizing,
    PlantState,
    Portfolio,
    PostDecisionFrozenLake,
    RideDispatch,
    Weights,
    register,
)
from unipo.tasks.environments.heuristics import base_stock, best_net_fare, equal_weight, trend_following
from unipo.tasks.environments.ride_dispatch import Orders

register()
SINGLE = [name for name in IDS if "RideDispatch" not in name]


def played(env, act, seed):
    """Observations, rewards and infos of an episode."""
    observation, info = env.reset(seed=seed)
    seen, rewards, infos = [observation], [], [info]
    while True:
        observation, reward, terminated, truncated, info = env.step(act(observation))
        seen.append(observation)
        rewards.append(reward)
        infos.append(info)
        if np.all(terminated) or np.all(truncated):
            return seen, rewards, infos


def returns(env, act, seeds=20):
    env.action_space.seed(0)
    return np.array([np.sum(played(env, act, seed)[1]) for seed in range(seeds)])


# ---- all -----------------------------------------------------------------------------------------------------------
def test_registering_twice_is_registering_once():
    before = dict(gym.registry)
    register()
    assert dict(gym.registry) == before
    assert set(IDS) <= set(before)


@pytest.mark.parametrize("name", SINGLE)
def test_gymnasium_has_nothing_to_say(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(gym.make(name).unwrapped)


@pytest.mark.parametrize("name", SINGLE)
def test_a_seed_is_an_episode(name):
    env = gym.make(name).unwrapped
    episodes = []
    for seed in (3, 3, 4):
        env.action_space.seed(seed)
        episodes.append(played(env, lambda _: env.action_space.sample(), seed))
    one, same, other = episodes
    assert all(np.array_equal(a, b) for a, b in zip(one[0], same[0], strict=True))
    assert one[1] == same[1]
    assert not all(np.array_equal(a, b) for a, b in zip(one[0], other[0], strict=False))
    assert all(env.observation_space.contains(observation) for observation in one[0])


@pytest.mark.parametrize("name", ["unipo/LotSizing-v0", "unipo/PostDecisionFrozenLake-v0"])
def test_the_halves_of_the_reward_sum_to_it(name):
    env = gym.make(name, **({"proximity": 0.7} if "Lake" in name else {})).unwrapped
    env.action_space.seed(0)
    _, rewards, infos = played(env, lambda _: env.action_space.sample(), 5)
    for reward, info in zip(rewards, infos[1:], strict=True):
        assert info["reward_decision"] + info["reward_outcome"] == pytest.approx(reward)
        assert env.observation_space.contains(info["post_observation"])


# ---- lot sizing ----------------------------------------------------------------------------------------------------
def test_a_period_by_hand():
    env = LotSizing(
        items=2, machines=1, production=[4, 3], setup_loss=1, setup_cost=[1.0, 1.5], holding_cost=[0.1, 0.2]
    )
    state = PlantState(np.array([2, 9]), np.array([1]))
    kept, nothing = env.plant.half_transition(state, [1])
    assert (kept.inventory.tolist(), kept.setup.tolist(), nothing) == ([6, 9], [1], 0.0)
    changed, cost = env.plant.half_transition(state, [2])
    assert (changed.inventory.tolist(), changed.setup.tolist(), cost) == ([2, 10], [2], -1.5)
    idle, free = env.plant.half_transition(state, [0])
    assert (idle.inventory.tolist(), idle.setup.tolist(), free) == ([2, 9], [0], 0.0)
    left, reward = env.plant.settle(changed, [5, 4])
    assert left.inventory.tolist() == [0, 6]
    assert reward == pytest.approx(-(0.2 * 6 + 2.0 * 3))


def test_two_machines_on_one_item_add_up():
    plant = LotSizing(items=2, machines=2, production=[[4, 4], [3, 3]], setup_cost=2.0).plant
    post, cost = plant.half_transition(PlantState(np.array([0, 0]), np.array([1, 2])), [1, 1])
    assert (post.inventory.tolist(), cost) == ([4 + 3 - 1, 0], -2.0)


def test_the_half_transition_is_pure():
    env = LotSizing()
    observation, _ = env.reset(seed=0)
    state, generator = env.state, env.np_random.bit_generator.state
    before = [x.copy() for x in state]
    posts = [env.plant.half_transition(state, [2]) for _ in range(3)]
    assert all(np.array_equal(x, y) for x, y in zip(state, before, strict=True))
    assert env.np_random.bit_generator.state == generator
    info = env.step([2])[4]
    for post, cost in posts:
        np.testing.assert_array_equal(info["post_observation"], env.encode(post))
        assert info["reward_decision"] == cost
    np.testing.assert_array_equal(observation, env.encode(state))


def test_the_tables_are_the_plant():
    """Mean reward and next states of many steps from one state, against `process`."""
    env = LotSizing(capacity=4, demand=[1.0, 1.7])
    tables, state = env.process(), PlantState(np.array([1, 3]), np.array([2]))
    torch.testing.assert_close(tables.outcome.sum(1), torch.ones(len(tables.post), dtype=torch.float64))
    row, n = env.number(state), 20_000
    rng = np.random.default_rng(0)
    post, decision = env.plant.half_transition(state, [1])
    settled = [env.plant.settle(post, d) for d in rng.poisson(env.demand, (n, 2))]
    assert int(tables.post[row, 1]) == env.number(post)
    assert float(tables.reward_decision[row, 1]) == decision == -1.0
    outcomes = np.array([reward for _, reward in settled])
    assert abs(outcomes.mean() - float(tables.reward_outcome[env.number(post)])) < 4 * outcomes.std() / math.sqrt(n)
    counted = np.bincount([env.number(s) for s, _ in settled], minlength=len(tables.post)) / n
    np.testing.assert_allclose(counted, tables.outcome[env.number(post)].numpy(), atol=0.012)


def test_values_before_and_after_the_decision_agree():
    """Q(s, a) = r^x + V_x(f(s, a)), solved as whole steps, by halves."""
    process = LotSizing(capacity=4).process()
    best = process.mdp(0.9).optimal()
    q = process.reward_decision + process.post_value(best.v, 0.9)[process.post]
    torch.testing.assert_close(q, best.q)
    greedy = torch.nn.functional.one_hot(q.argmax(1), q.shape[1]).double()
    assert process.expected_return(greedy, 1) <= process.best_return(1)


# ---- the lake ------------------------------------------------------------------------------------------------------
def test_a_lake_without_slip_is_walked_by_hand():
    env = PostDecisionFrozenLake(slip=0.0)
    env.reset(seed=0)
    steps = [env.step(a) for a in (0, 1, 1, 2, 2, 1, 2)]  # against the wall, then down, down, right, right, down, right
    assert [info["cell"] for *_, info in steps] == [0, 4, 8, 9, 10, 14, 15]
    assert [reward for _, reward, *_ in steps] == [0, 0, 0, 0, 0, 0, 1]
    assert [ended for _, _, ended, _, _ in steps] == [False] * 6 + [True]
    assert steps[-1][4]["reward_decision"] == 1


def test_proximity_pays_by_distance():
    env = PostDecisionFrozenLake(proximity=2.0)
    assert env.half_transition(14, 0) == (13, 2.0 / 3)
    assert env.half_transition(14, 2) == (15, 1.0)
    assert env.half_transition(4, 2) == (5, pytest.approx(2 * (1 / 5 - 1 / 8)))


def test_the_lakes_tables_are_the_lake():
    env = PostDecisionFrozenLake(proximity=0.3, slip=0.3)
    process, rng = env.process(), np.random.default_rng(0)
    policy = torch.from_numpy(rng.dirichlet(np.ones(4), 16))
    found = returns(env, lambda o: rng.choice(4, p=policy[o.argmax()].numpy()), 2000)
    assert abs(found.mean() - float(process.expected_return(policy, 100))) < 4 * found.std() / math.sqrt(2000)


# ---- ride dispatch -------------------------------------------------------------------------------------------------
def dispatch(place, orders, **settings):
    env = RideDispatch(len(place), rate=0.0, fuel=0.5, candidates=2, **settings)
    env.reset(seed=0)
    env.place = np.array(place)
    origin, destination, fare = (np.array(x) for x in zip(*orders, strict=True))
    env.orders, env.arrived = Orders(origin, destination, fare, np.zeros(len(fare), dtype=np.int64)), len(fare)
    return env


def test_a_dispatch_by_hand():
    """Both want the order at (0, 1); vehicle 0 is nearer. Vehicle 1 gets nothing, waits, then takes the other one."""
    env = dispatch([(0, 0), (2, 1)], [((0, 1), (0, 4), 6.0), ((4, 4), (4, 3), 2.0)])
    _, reward, ended, _, info = env.step(np.array([1, 1]))
    assert reward.tolist() == [6.0 - 0.5 * 1, 0.0]
    assert info["served"].tolist() == [True, False]
    assert info["duration"].tolist() == [1 + 3, 1]
    assert env.place.tolist() == [[0, 4], [2, 1]]
    assert info["action_mask"].tolist() == [[True, False, False], [True, True, False]]
    _, reward, ended, _, info = env.step(np.array([1, 1]))
    assert info["acted"].tolist() == [False, True]
    assert reward.tolist() == [0.0, 2.0 - 0.5 * (2 + 3)]
    assert info["duration"].tolist() == [0, 5 + 1]
    assert not ended.any()
    for _ in range(2):
        assert not env.step(np.array([0, 0]))[4]["acted"][0]
    assert env.step(np.array([0, 0]))[4]["acted"].tolist() == [True, False]


def test_what_a_vehicle_sees():
    env = dispatch([(0, 0), (2, 1)], [((4, 4), (4, 3), 2.0), ((0, 1), (0, 4), 6.0)])
    seen = env._observed()
    np.testing.assert_allclose(seen[1, :4], [2 / 4, 1 / 4, 0, 0])
    np.testing.assert_allclose(seen[1, 4:10], [1, -2 / 5, 0, 2 / 10, 3 / 10, 6 / (1.9 * 9)], rtol=1e-6)
    np.testing.assert_allclose(seen[1, 10:], [1, 2 / 5, 3 / 5, 5 / 10, 1 / 10, 2 / (1.9 * 9)], rtol=1e-6)


def test_equally_near_vehicles_are_drawn_fairly():
    wins = np.zeros(2)
    env = dispatch([(0, 0), (0, 2)], [((0, 1), (3, 3), 5.0)])
    for _ in range(400):
        wins += env.match(np.array([0, 0])) == 0
    assert wins.sum() == 400
    assert abs(wins[0] - 200) < 4 * 10


def test_orders_leave_when_they_waited_long_enough():
    env = dispatch([(0, 0)], [((4, 4), (4, 3), 2.0)], patience=2)
    env.step(np.array([0]))
    assert (len(env.orders.age), env.expired) == (1, 0)
    env.step(np.array([0]))
    assert (len(env.orders.age), env.expired) == (0, 1)


def test_orders_and_money_are_conserved():
    env = RideDispatch(12, rate=5.0)
    env.reset(seed=2)
    env.action_space.seed(0)
    for time in range(30):
        idle, open_fares = env.busy == 0, env.orders.fare.sum()
        _, reward, ended, truncated, info = env.step(env.action_space.sample())
        assert info["time"] == time
        assert env.arrived == env.served + env.expired + len(env.orders.age)
        assert ((reward == 0) | info["served"]).all()
        assert (info["served"] <= info["acted"]).all()
        np.testing.assert_array_equal(info["acted"], idle)
        assert reward.sum() <= open_fares
        assert (env.place >= 0).all()
        assert (env.place < env.side).all()
        assert ended.tolist() == [time == 29] * 12
        assert not truncated.any()


def test_the_step_after_the_end_resets():
    env = gym.make_vec("unipo/RideDispatch-v0", num_envs=4, horizon=2)
    first, _ = env.reset(seed=0)
    env.step(np.zeros(4, dtype=int))
    env.step(np.zeros(4, dtype=int))
    observation, reward, ended, _, info = env.step(np.ones(4, dtype=int))
    assert not reward.any()
    assert not ended.any()
    assert not info["acted"].any()
    assert (observation[:, 3] == 0).all()
    assert not np.array_equal(observation, first)
    assert info["action_mask"].shape == (4, 6)


def test_dispatch_repeats_itself():
    runs = []
    for seed in (1, 1, 2):
        env = RideDispatch(6)
        env.action_space.seed(0)
        runs.append(played(env, lambda _, env=env: env.action_space.sample(), seed))
    np.testing.assert_array_equal(runs[0][0], runs[1][0])
    np.testing.assert_array_equal(runs[0][1], runs[1][1])
    assert not np.array_equal(runs[0][0], runs[2][0])
    assert all(env.observation_space.contains(observation) for observation in runs[2][0])


def test_assignment_by_hand():
    """Greedy would give order 0 to vehicle 0 (.6) and leave .1 for vehicle 1; together .5 + .5 is more."""
    env = dispatch([(0, 0), (0, 0)], [((0, 1), (3, 3), 5.0), ((0, 2), (3, 3), 5.0)])
    score = np.array([[0.0, 0.6, 0.5], [0.4, 0.5, 0.1]])
    assert env.assign(score).tolist() == [2, 1]
    assert env.assign(np.array([[0.9, 0.6, 0.5], [0.4, 0.5, 0.1]])).tolist() == [0, 1]
    env.busy[1] = 3
    assert env.assign(score).tolist() == [1, 0]
    env.orders = env.orders.take(np.array([], dtype=int))
    assert env.assign(score).tolist() == [0, 0]


# ---- there is something to learn -----------------------------------------------------------------------------------
def test_sense_beats_chance():
    for env, act in (
        (LotSizing(), base_stock(LotSizing())),
        (RideDispatch(), best_net_fare(RideDispatch())),
        (Portfolio(), trend_following(Portfolio())),
        (Portfolio(orders=Weights()), equal_weight(Portfolio(orders=Weights()))),
    ):
        better = returns(env, act) - returns(env, lambda _, env=env: env.action_space.sample())
        assert better.mean() > 3 * better.std(ddof=1) / math.sqrt(len(better))
    lake = PostDecisionFrozenLake().process()
    assert lake.expected_return(torch.full((16, 4), 0.25), 100) < 0.03
    assert 0.8 < lake.best_return(100) < 1


def test_a_heuristic_is_below_the_optimum():
    env = LotSizing()
    found = returns(env, base_stock(env), 40)
    assert found.mean() < float(env.process().best_return(100)) + 3 * found.std() / math.sqrt(40)


# ---- bad input -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Portfolio(assets=0), "1 asset"),
        (lambda: Portfolio(cost=1.0), r"in \[0, 1\)"),
        (lambda: Portfolio(kappa=-1.0), "kappa >= 0"),
        (lambda: LotSizing(items=0), "items: expected 1 or more, found 0"),
        (lambda: LotSizing(demand=[1.0, 2.0, 3.0]), r"demand: .* shape \[2\], found shape \[3\]"),
        (lambda: LotSizing(holding_cost=-1), "holding_cost: expected finite numbers of 0 or more"),
        (lambda: LotSizing(production=2.5), "production: expected whole units"),
        (lambda: LotSizing(setup_loss=9), "setup_loss: expected at most"),
        (lambda: LotSizing(capacity=0), "capacity: expected 1 or more"),
        (lambda: LotSizing(items=4).process(), "cannot be enumerated"),
        (lambda: base_stock(LotSizing(machines=2)), "1 machine"),
        (lambda: PostDecisionFrozenLake(map_name="9x9"), "4x4, 8x8"),
        (lambda: PostDecisionFrozenLake(slip=1.5), "a probability"),
        (lambda: PostDecisionFrozenLake(proximity=-1), "proximity >= 0"),
        (lambda: RideDispatch(0), "num_envs"),
        (lambda: RideDispatch(side=1), "side"),
        (lambda: RideDispatch(rate=-1), "rate >= 0"),
        (lambda: RideDispatch(spread=2), "spread"),
    ],
)
def test_bad_settings_are_named(make, said):
    with pytest.raises(ValueError, match=said):
        make()


@pytest.mark.parametrize(
    ("env", "action"),
    [
        (Portfolio(), np.full(5, np.nan)),
        (Portfolio(), np.full(5, 1.5)),
        (Portfolio(), np.zeros(4)),
        (LotSizing(), [3]),
        (LotSizing(), [0, 0]),
        (PostDecisionFrozenLake(), 4),
        (PostDecisionFrozenLake(), -1),
        (RideDispatch(3), [0, 6, 0]),
        (RideDispatch(3), [0, 0]),
    ],
)
def test_bad_actions_are_named(env, action):
    env.reset(seed=0)
    with pytest.raises(ValueError, match="expected"):
        env.step(action)
