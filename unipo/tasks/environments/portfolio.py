"""`unipo/Portfolio-v0`: buy and sell n stocks of a synthetic market; gains may be granted and taxed by the portfolio's ESG score.

FinRL's stock environment with the regulation of arXiv 2307.09631 (row 79). One day:

    orders   = rule(action)                              whole shares; `Shares` (FinRL) or `Weights` (a target portfolio)
    trade at today's close: sells first, then buys, the largest first, as far as the cash goes; `cost` each way
    E_p      = sum_i w_i ESG_i                           after the trade, without the cash; E_index without holdings
    r        = (assets tomorrow - assets before the trade) * 1e-4
    r'       = r + kappa max(E_p - E_index, 0) / 100 * max(r, 0) - kappa max(E_index - E_p, 0) / 100 * |r|

E_index is the plain mean of the scores. The form of grant and tax is ours: the paper says it in words.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from unipo.tasks.environments.indicators import NAMES, indicators
from unipo.tasks.environments.market import YEAR, Market, turbulence

Real = NDArray[np.float64]
REWARD_SCALE = 1e-4
"""Reward per unit of money: 1% of the first million is 1."""
LIMIT = 10.0
"""Observations are clipped to +-LIMIT."""


class Account(NamedTuple):
    """What the investor has."""

    cash: float
    holdings: Real
    """[n] whole shares."""

    def value(self, price: Real) -> float:
        return float(self.cash + self.holdings @ price)


class Orders(Protocol):
    """From an action in [-1, 1] to orders. Must be deterministic."""

    def size(self, assets: int) -> int:
        """Length of the action."""
        ...

    def __call__(self, action: Real, account: Account, price: Real) -> Real:
        """[n] whole shares to buy (positive) or sell."""
        ...


@dataclass(frozen=True, slots=True)
class Shares:
    """FinRL: action [n], orders = int(action * hmax). With hmax = 100, less than .01 trades nothing."""

    hmax: int = 100

    def size(self, assets: int) -> int:
        return assets

    def __call__(self, action: Real, account: Account, price: Real) -> Real:
        return np.trunc(action * self.hmax)


@dataclass(frozen=True, slots=True)
class Weights:
    """A target portfolio: w = softmax(scale * action) of n + 1 numbers, cash last; orders lead to floor(w_i assets / price_i).

    Action 0 is the same weight for each asset and cash. One at 1 and the rest at -1 is a weight of nearly 1.
    """

    scale: float = 5.0

    def size(self, assets: int) -> int:
        return assets + 1

    def __call__(self, action: Real, account: Account, price: Real) -> Real:
        w = np.exp(self.scale * (action - action.max()))
        return np.floor(w[:-1] / w.sum() * account.value(price) / price) - account.holdings


def trade(account: Account, price: Real, orders: Real, cost: float) -> tuple[Account, float]:
    """The account after the orders [n], and the costs paid. Sales are capped by holdings, purchases by what the cash pays."""
    sold = np.minimum(np.maximum(-orders, 0), account.holdings)
    cash, holdings = account.cash + (1 - cost) * float(sold @ price), account.holdings - sold
    for i in np.argsort(-orders, kind="stable")[: int((orders > 0).sum())]:
        bought = min(orders[i], np.floor(max(cash, 0.0) / (price[i] * (1 + cost))))
        cash, holdings[i] = cash - float(bought * price[i] * (1 + cost)), holdings[i] + bought
    after = Account(cash, holdings)
    return after, account.value(price) - after.value(price)


def portfolio_esg(account: Account, price: Real, esg: Real) -> float:
    """E_p: the scores weighted by what is held at these prices; their plain mean when nothing is held."""
    held = account.holdings * price
    return float(held @ esg / held.sum()) if held.any() else float(esg.mean())


def regulated(reward: float, score: float, index: float, kappa: float) -> float:
    """r': a grant on gains above the index's score, a tax on gains and losses below it. Never more than r when r < 0."""
    grant = max(score - index, 0.0) / 100 * max(reward, 0.0)
    tax = max(index - score, 0.0) / 100 * abs(reward)
    return reward + kappa * (grant - tax)


class Portfolio(gym.Env[NDArray[np.float32], NDArray[np.float32]]):
    """The market as a Gymnasium environment. Every reset draws a new path; the assets stay.

    Observation, `Box(-10, 10, [1 + 11 n])`, in this order: cash / first cash; log(price / price on the first day) [n];
    value held / first cash [n]; the eight indicators [8 n] (all assets of one, then the next); ESG score / 100 [n].
    Action, `Box(-1, 1, [n])`, or [n + 1] under `Weights`: see there. `days` steps, then truncated: the market goes on.

    `info` of reset and step: `wealth` (money), `esg` E_p, `index_esg`; of a step also `base_reward` r, `cost` (money),
    `turbulence` (when `liquidate_above` is finite). Compare r, not r': regulation raises r' by itself.

    Args:
        assets: n. market: seed of the assets (alphas, loadings, scores). days: trading days of an episode.
        orders: how an action becomes orders. kappa: strength of grants and taxes, 0 for none. cost: share of each trade.
        cash: money at the start. liquidate_above: turbulence from which everything is sold and nothing bought.

    Raises:
        ValueError: for sizes below 1, a cost outside [0, 1), negative kappa, cash that is not positive, a wrong action.
    """

    metadata: dict[str, Any] = {"render_modes": []}

    def __init__(
        self,
        *,
        assets: int = 5,
        market: int = 0,
        days: int = 250,
        orders: Orders = Shares(),
        kappa: float = 0.0,
        cost: float = 0.001,
        cash: float = 1e6,
        liquidate_above: float = np.inf,
    ) -> None:
        if assets < 1 or days < 1:
            raise ValueError(f"expected 1 asset and 1 day or more, found {assets} and {days}")
        if not 0 <= cost < 1:
            raise ValueError(f"cost: expected a share of each trade in [0, 1), such as 0.001, found {cost}")
        if not kappa >= 0 or not cash > 0:
            raise ValueError(f"expected kappa >= 0 and cash > 0, found {kappa} and {cash}")
        self.market, self.days, self.orders = Market.drawn(assets, market), days, orders
        self.kappa, self.cost, self.cash, self.liquidate_above = kappa, cost, cash, liquidate_above
        size = 1 + assets * (3 + len(NAMES))
        self.observation_space = gym.spaces.Box(-LIMIT, LIMIT, (size,), np.float32)
        self.action_space = gym.spaces.Box(-1.0, 1.0, (orders.size(assets),), np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.prices = self.market.sample(YEAR + self.days + 1, self.np_random)
        self.indicators = indicators(self.prices.high, self.prices.low, self.prices.close)
        self.day = YEAR
        self.account = Account(self.cash, np.zeros(len(self.market.esg)))
        return self._observation(), self._info()

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        chosen = np.asarray(action, dtype=np.float64)
        if chosen.shape != self.action_space.shape or not (np.abs(chosen) <= 1).all():
            raise ValueError(
                f"expected {self.action_space.shape} numbers in [-1, 1], found {action}: clip or squash them"
            )
        price, before = self.price, self.account.value(self.price)
        orders = self.orders(chosen, self.account, price)
        calm = {}
        if np.isfinite(self.liquidate_above):
            calm = {"turbulence": turbulence(self.prices.close, self.day)}
            orders = -self.account.holdings if calm["turbulence"] >= self.liquidate_above else orders
        self.account, paid = trade(self.account, price, orders, self.cost)
        score, index = portfolio_esg(self.account, price, self.market.esg), float(self.market.esg.mean())
        self.day += 1
        base = (self.account.value(self.price) - before) * REWARD_SCALE
        info = self._info() | {"esg": score, "base_reward": base, "cost": paid} | calm
        ended = self.day >= YEAR + self.days
        return self._observation(), regulated(base, score, index, self.kappa), False, ended, info

    @property
    def price(self) -> Real:
        """[n] today's closes, at which trades are made."""
        return self.prices.close[self.day]

    def _observation(self) -> NDArray[np.float32]:
        blocks = [
            np.array([self.account.cash / self.cash]),
            np.log(self.price / self.prices.close[YEAR]),
            self.account.holdings * self.price / self.cash,
            self.indicators[self.day].ravel(),
            self.market.esg / 100,
        ]
        return np.clip(np.concatenate(blocks), -LIMIT, LIMIT).astype(np.float32)

    def _info(self) -> dict[str, Any]:
        esg = portfolio_esg(self.account, self.price, self.market.esg)
        return {
            "wealth": self.account.value(self.price),
            "esg": esg,
            "index_esg": float(self.market.esg.mean()),
        }


class Performance(NamedTuple):
    """An episode told as investors tell it."""

    cumulative_return: float
    sharpe: float
    """sqrt(252) mean / standard deviation of the daily returns, no risk-free rate; 0 when nothing moved."""
    max_drawdown: float
    """The largest fall from an earlier top, as a share of that top."""
    mean_esg: float


def performance(wealth: Real, esg: Real) -> Performance:
    """Of the wealth [T + 1] at reset and after each step, and E_p [T] of each step."""
    daily = wealth[1:] / wealth[:-1] - 1
    spread = float(daily.std())
    sharpe = float(np.sqrt(YEAR) * daily.mean() / spread) if spread > 0 else 0.0
    fallen = 1 - wealth / np.maximum.accumulate(wealth)
    return Performance(float(wealth[-1] / wealth[0] - 1), sharpe, float(fallen.max()), float(esg.mean()))
