"""The eight technical indicators of FinRL's stock environment, without units. Every one looks back only.

`indicators(high, low, close)` of prices [D, n] gives [D, 8, n] in the order of `NAMES`. Prices are told relative to the close
(in tenths), oscillators are divided by 100. The first days use what there is: start reading after 60 days.
"""

from __future__ import annotations

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from scipy.signal import lfilter

Real = NDArray[np.float64]
NAMES = ("macd", "boll_ub", "boll_lb", "rsi_30", "cci_30", "dx_30", "close_30_sma", "close_60_sma")


def indicators(high: Real, low: Real, close: Real) -> Real:
    """[D, 8, n] of prices [D, n]."""
    middle, spread = _windows(close, 20).mean(-1), _windows(close, 20).std(-1, ddof=1)
    relative = [smoothed(close, 2 / 13) - smoothed(close, 2 / 27)]
    relative += [middle + 2 * spread - close, middle - 2 * spread - close]
    averages = [_windows(close, days).mean(-1) - close for days in (30, 60)]
    oscillators = [rsi(close, 30), cci(high, low, close, 30), dx(high, low, close, 30)]
    scaled = [10 * x / close for x in relative] + [x / 100 for x in oscillators] + [10 * x / close for x in averages]
    return np.stack(scaled, axis=1)


def smoothed(x: Real, weight: float) -> Real:
    """Exponential average: y_t = (1 - weight) y_{t-1} + weight x_t, from y_0 = x_0."""
    y: Real = lfilter([weight], [1.0, weight - 1.0], x, axis=0, zi=(1 - weight) * x[:1])[0]
    return y


def rsi(close: Real, days: int) -> Real:
    """Relative strength index, 0..100: rises / (rises + falls), smoothed over `days`. 50 where nothing moved."""
    change = np.diff(close, axis=0, prepend=close[:1])
    up, down = smoothed(np.maximum(change, 0), 1 / days), smoothed(np.maximum(-change, 0), 1 / days)
    return 100 * np.divide(up, up + down, out=np.full_like(up, 0.5), where=up + down > 0)


def cci(high: Real, low: Real, close: Real, days: int) -> Real:
    """Commodity channel index: how far the typical price is from its mean, in 0.015 mean absolute deviations."""
    typical = (high + low + close) / 3
    window = _windows(typical, days)
    mean = window.mean(-1)
    deviation = 0.015 * np.abs(window - mean[..., None]).mean(-1)
    return np.divide(typical - mean, deviation, out=np.zeros_like(mean), where=deviation > 0)


def dx(high: Real, low: Real, close: Real, days: int) -> Real:
    """Directional index, 0..100: |up - down| / (up + down) of the smoothed directional moves (the true range cancels)."""
    up, down = np.diff(high, axis=0, prepend=high[:1]), -np.diff(low, axis=0, prepend=low[:1])
    plus = smoothed(np.where((up > down) & (up > 0), up, 0.0), 1 / days)
    minus = smoothed(np.where((down > up) & (down > 0), down, 0.0), 1 / days)
    return 100 * np.divide(np.abs(plus - minus), plus + minus, out=np.zeros_like(plus), where=plus + minus > 0)


def _windows(x: Real, days: int) -> Real:
    """[D, n, days]: the last `days` rows at each row; the first row stands for the rows before it."""
    return sliding_window_view(np.concatenate([np.repeat(x[:1], days - 1, axis=0), x]), days, axis=0)
