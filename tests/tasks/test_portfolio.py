"""The market: trades, rewards and costs by hand; moments of the prices; indicators that look back only."""

from __future__ import annotations

import math

import numpy as np
import pytest

from unipo.tasks.environments import Market, Portfolio, Shares, Weights, performance
from unipo.tasks.environments.indicators import NAMES, cci, dx, indicators, rsi, smoothed
from unipo.tasks.environments.market import turbulence
from unipo.tasks.environments.portfolio import Account, portfolio_esg, regulated, trade


def test_a_trade_by_hand():
    """Sell 4 of asset 0 at 10 (only 3 are held), then buy 100 of asset 2 before 5 of asset 1: the cash goes to asset 2."""
    price = np.array([10.0, 50.0, 20.0])
    account, orders = Account(100.0, np.array([3.0, 0.0, 1.0])), np.array([-4.0, 5.0, 100.0])
    after, paid = trade(account, price, orders, 0.01)
    # cash 100 + 30 * .99 = 129.7; 6 of asset 2 cost 20.2 each = 121.2; 8.5 is left, less than 50.5
    assert after.cash == pytest.approx(8.5)
    assert after.holdings.tolist() == [0.0, 0.0, 7.0]
    assert paid == pytest.approx(0.3 + 1.2)
    assert account.holdings.tolist() == [3.0, 0.0, 1.0]


def test_the_value_after_a_trade_is_the_value_before_less_the_costs():
    rng = np.random.default_rng(0)
    for _ in range(200):
        price, account = rng.uniform(1, 200, 4), Account(rng.uniform(0, 1e4), rng.integers(0, 50, 4).astype(float))
        orders = rng.integers(-60, 60, 4).astype(float)
        after, paid = trade(account, price, orders, 0.002)
        moved = np.abs(after.holdings - account.holdings) @ price
        assert paid == pytest.approx(0.002 * moved, abs=1e-8)
        assert after.cash >= -1e-9
        assert (after.holdings >= 0).all()


def test_a_day_by_hand():
    env = Portfolio(assets=2, kappa=0.5, cost=0.001)
    env.reset(seed=0)
    today, tomorrow = env.prices.close[env.day], env.prices.close[env.day + 1]
    _, reward, terminated, truncated, info = env.step(np.array([1.0, -1.0], dtype=np.float32))
    base = (100 * (tomorrow[0] - today[0]) - 0.001 * 100 * today[0]) * 1e-4
    over = (env.market.esg[0] - env.market.esg.mean()) / 100
    extra = 0.5 * (max(over, 0) * max(base, 0) - max(-over, 0) * abs(base))
    assert info["base_reward"] == pytest.approx(base)
    assert reward == pytest.approx(base + extra)
    assert abs(extra) > 0
    assert info["esg"] == pytest.approx(env.market.esg[0])
    assert info["cost"] == pytest.approx(0.1 * today[0])
    assert info["wealth"] == pytest.approx(1e6 + 1e4 * base)
    assert (terminated, truncated) == (False, False)


def test_small_actions_trade_nothing():
    env = Portfolio(assets=3)
    env.reset(seed=1)
    for action in (np.zeros(3), np.full(3, 0.0099), np.full(3, -1.0)):
        assert env.step(action)[1] == 0
    assert Shares(100)(np.array([0.019, -0.019, 0.5]), env.account, env.price).tolist() == [1, -1, 50]


def test_weights_lead_to_the_softmax():
    price, account = np.array([10.0, 21.0]), Account(900.0, np.array([0.0, 5.0]))
    orders = Weights(scale=1.0)(np.log([0.5, 0.3, 0.2]), account, price)
    assert orders.tolist() == [math.floor(0.5 * 1005 / 10), math.floor(0.3 * 1005 / 21) - 5] == [50, 9]


def test_regulation():
    assert regulated(2.0, 70.0, 50.0, kappa=0.5) == pytest.approx(2.0 + 0.5 * 0.2 * 2.0)
    assert regulated(2.0, 30.0, 50.0, kappa=0.5) == pytest.approx(2.0 - 0.5 * 0.2 * 2.0)
    assert regulated(-2.0, 30.0, 50.0, kappa=0.5) == pytest.approx(-2.0 - 0.5 * 0.2 * 2.0)
    assert regulated(-2.0, 70.0, 50.0, kappa=0.5) == -2.0
    assert regulated(1.3, 70.0, 50.0, kappa=0.0) == regulated(1.3, 50.0, 50.0, kappa=9.0) == 1.3
    account = Account(1e6, np.array([1.0, 3.0]))
    assert portfolio_esg(account, np.array([30.0, 10.0]), np.array([20.0, 80.0])) == pytest.approx(50.0)
    assert portfolio_esg(Account(5.0, np.zeros(2)), np.ones(2), np.array([20.0, 90.0])) == 55.0


def test_the_observation_is_what_it_says():
    env = Portfolio(assets=2)
    env.reset(seed=3)
    observation = env.step(np.array([1.0, 0.5]))[0]
    first, now, n = env.prices.close[252], env.prices.close[253], env.account.holdings
    assert n.tolist() == [100, 50]
    assert observation[0] == pytest.approx(1 - 1.001 * (n @ first) / 1e6)
    np.testing.assert_allclose(observation[1:5], [*np.log(now / first), *(n * now / 1e6)], rtol=1e-4)
    np.testing.assert_allclose(observation[5:21], env.indicators[253].ravel(), rtol=1e-5)
    np.testing.assert_allclose(observation[21:], env.market.esg / 100, rtol=1e-6)


def test_turbulence_liquidates():
    env = Portfolio(assets=2, liquidate_above=0.0)
    env.reset(seed=0)
    env.account = Account(10.0, np.array([5.0, 7.0]))
    info = env.step(np.ones(2))[4]
    assert env.account.holdings.tolist() == [0, 0]
    assert info["turbulence"] == turbulence(env.prices.close, 252) > 0
    close = np.cumprod([1.0, 1.1, 0.9, 1.1, 0.9, 1.3])[:, None]
    assert turbulence(close, 5) == pytest.approx(0.3**2 / np.var([0.1, -0.1, 0.1, -0.1], ddof=1))


def test_the_market_has_the_moments_that_it_says():
    market = Market.drawn(3, 0)
    paths = [market.sample(3000, np.random.default_rng(seed)) for seed in range(10)]
    x = np.concatenate([np.diff(np.log(p.close), axis=0) for p in paths])
    calm = np.concatenate([p.regime[1:] for p in paths]) == 0
    assert calm.mean() == pytest.approx(2 / 3, abs=0.05)
    mean = market.alpha + np.array([0.45, 0.0]) @ market.loading.T
    variance = np.array([0.10, 0.05]) ** 2 @ (market.loading**2).T + market.specific**2
    np.testing.assert_allclose(x[calm].var(0) * 252, variance, rtol=0.05)
    assert (np.abs(x[calm].mean(0) * 252 - mean) < 4 * np.sqrt(variance * 252 / calm.sum())).all()
    assert all((p.low <= p.close).all() and (p.close <= p.high).all() for p in paths)


def test_indicators_by_hand():
    x = np.array([[1.0], [2.0], [4.0]])
    assert smoothed(x, 0.5).ravel().tolist() == [1.0, 1.5, 2.75]
    assert rsi(np.array([[1.0], [3.0], [2.0]]), 2).ravel() == pytest.approx([50.0, 100.0, 100 * 0.5 / (0.5 + 0.5)])
    assert cci(x, x, x, 3).ravel()[2] == pytest.approx((4 - 7 / 3) / (0.015 * (4 / 3 + 1 / 3 + 5 / 3) / 3))
    # highs rise by 2 then fall, lows fall by 3 in the second step: plus 2 * .5 -> 1, .5; minus 0, 1.5
    assert dx(np.array([[5.0], [7.0], [6.0]]), np.array([[4.0], [4.0], [1.0]]), x, 2).ravel()[1:] == pytest.approx(
        [100, 50]
    )
    assert not indicators(*[np.full((70, 2), 5.0)] * 3)[:, [0, 1, 2, 4, 5, 6, 7]].any()


def test_indicators_do_not_look_ahead():
    prices = Market.drawn(2, 0).sample(300, np.random.default_rng(0))[:3]
    cut = [p[:200] for p in prices]
    assert indicators(*prices).shape == (300, len(NAMES), 2)
    np.testing.assert_array_equal(indicators(*prices)[:200], indicators(*cut))


def test_performance_by_hand():
    told = performance(np.array([100.0, 110.0, 99.0, 121.0]), np.array([40.0, 60.0, 50.0]))
    daily = np.array([0.1, -0.1, 121 / 99 - 1])
    assert told == pytest.approx((0.21, math.sqrt(252) * daily.mean() / daily.std(), 0.1, 50.0))
    assert performance(np.ones(4), np.ones(3)).sharpe == 0
