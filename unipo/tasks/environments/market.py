"""A synthetic stock market: prices from factors whose drift and volatility change with a hidden regime.

    z_t            regime, a Markov chain: 0 calm and rising, 1 nervous and falling
    f_t  [K]       ~ Normal(drift[z_t], volatility[z_t]^2) / day     factors: the market, and green against brown
    x_t  [n]       = alpha + loading f_t + specific * Normal(0, 1)   daily log returns
    close_t        = close_{t-1} exp(x_t)

A day's high and low are those of a Brownian path from close to close, exact one by one. Sizes: n assets, K = 2 factors,
R = 2 regimes, D days. Numbers are per year (a year has 252 days) where nothing else is said. The trends are stronger than
those of a real market, so that what can be learnt shows in a small budget.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Real = NDArray[np.float64]
YEAR = 252
FIRST_PRICE = 100.0
DRIFT = np.array([[0.45, 0.0], [-0.60, 0.0]])
"""[R, K] mean of the factors."""
VOLATILITY = np.array([[0.10, 0.05], [0.22, 0.09]])
"""[R, K] standard deviation of the factors."""
CHANGE = np.array([1 / 120, 1 / 60])
"""[R] probability per day of leaving the regime."""


class Prices(NamedTuple):
    """One path of the market, in money per share."""

    high: Real
    """[D, n]"""
    low: Real
    """[D, n]"""
    close: Real
    """[D, n]"""
    regime: NDArray[np.int64]
    """[D] hidden from the agent."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Market:
    """The assets: what stays the same from episode to episode."""

    esg: Real
    """[n] ESG scores, 0 (worst) to 100."""
    alpha: Real
    """[n] drift of each asset beyond the factors."""
    loading: Real
    """[n, K] exposure to each factor."""
    specific: Real
    """[n] volatility of each asset's own noise."""

    @classmethod
    def drawn(cls, assets: int, seed: int) -> Market:
        """A market of n assets. Scores and alphas are evenly spread and shuffled apart; greener assets load on green."""
        rng = np.random.default_rng(seed)
        esg = rng.permutation(np.linspace(20.0, 90.0, assets))
        green = (esg - esg.mean()) / max(float(esg.std()), 1e-9)
        return cls(
            esg=esg,
            alpha=rng.permutation(np.linspace(-0.08, 0.16, assets)),
            loading=np.stack([rng.uniform(0.8, 1.2, assets), green], axis=1),
            specific=rng.uniform(0.10, 0.18, assets),
        )

    def sample(self, days: int, rng: np.random.Generator) -> Prices:
        """A path of D days, from closes of 100. A stationary regime before the first day."""
        regime = np.empty(days, dtype=np.int64)
        now = int(rng.random() < CHANGE[0] / CHANGE.sum())
        for t, u in enumerate(rng.random(days)):
            now = 1 - now if u < CHANGE[now] else now
            regime[t] = now
        factor = (DRIFT[regime] + VOLATILITY[regime] * np.sqrt(YEAR) * rng.standard_normal((days, 2))) / YEAR
        noise = self.specific / np.sqrt(YEAR) * rng.standard_normal((days, len(self.esg)))
        x = self.alpha / YEAR + factor @ self.loading.T + noise
        variance = ((VOLATILITY[regime] ** 2) @ (self.loading**2).T + self.specific**2) / YEAR
        close = FIRST_PRICE * np.exp(x.cumsum(0))
        before = close / np.exp(x)
        reach = np.sqrt(x**2 - 2 * variance * np.log1p(-rng.random((2, *x.shape))))
        return Prices(before * np.exp((x + reach[0]) / 2), before * np.exp((x - reach[1]) / 2), close, regime)


def turbulence(close: Real, day: int) -> float:
    """(x - m)' C^+ (x - m) of the day's simple returns x [n], with mean m and covariance C of the year before: no look-ahead.

    A year is what there is of 252 days. Source: Kritzman and Li (2010), as FinRL uses it.
    """
    returns = np.diff(close[max(day - YEAR - 1, 0) : day + 1], axis=0) / close[max(day - YEAR - 1, 0) : day]
    apart = returns[-1] - returns[:-1].mean(0)
    return float(apart @ np.linalg.pinv(np.atleast_2d(np.cov(returns[:-1].T))) @ apart)
