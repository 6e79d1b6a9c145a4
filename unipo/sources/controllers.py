"""Controllers turn the knobs of a recipe: state in, setting out, metrics back.

A controller is a frozen record (its configuration); its state is a plain dict of numbers that the run keeps, checkpoints
and resumes. `setting` must be a function of (state, step) alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from unipo.functional import merged_moments
from unipo.objectives import Knob, number

State = dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Controller:
    """Sets the knob called `knob`. This one holds it at `value`.

    `every_update`: it observes the means of the signals after each update, and not the metrics after each step.
    """

    every_update: ClassVar[bool] = False
    knob: str
    value: float = 0.0

    def sized(self, actions: int, discrete: bool) -> Controller:
        """The same for an action space of so many dimensions, or choices where it is `discrete`."""
        return self

    def lasting(self, steps: int) -> Controller:
        """The same for a run of so many steps."""
        return self

    def start(self) -> State:
        return {}

    def setting(self, state: State, step: int) -> float:
        """The knob at `step` (0-based), the same for every row of the batch."""
        return self.value

    def observe(self, state: State, metrics: Mapping[str, float]) -> State:
        """The next state, given the metrics of the step just made."""
        return state


@dataclass(frozen=True, kw_only=True)
class WarmupCosine(Controller):
    """Linear 0 -> peak over `warmup` steps, cosine peak -> valley over `decay` steps, then constant (CHORD's mu)."""

    peak: float = 0.9
    valley: float = 0.05
    warmup: int = 0
    decay: int = 200

    def setting(self, state: State, step: int) -> float:
        if step < self.warmup:
            return self.peak * step / self.warmup
        done = min(step - self.warmup, self.decay) / max(self.decay, 1)
        return self.valley + 0.5 * (self.peak - self.valley) * (1.0 + math.cos(math.pi * done))


@dataclass(frozen=True, kw_only=True)
class RunningMean(Controller):
    """Exponential mean of a metric, such as a reward baseline: m <- decay * m + (1 - decay) * x, debiased."""

    metric: str = "reward"
    decay: float = 0.9

    def start(self) -> State:
        return {"sum": 0.0, "weight": 0.0}

    def setting(self, state: State, step: int) -> float:
        return state["sum"] / state["weight"] if state["weight"] > 0 else self.value

    def observe(self, state: State, metrics: Mapping[str, float]) -> State:
        x = metrics.get(self.metric, math.nan)
        if not math.isfinite(x):
            return state
        keep = self.decay
        return {"sum": keep * state["sum"] + (1 - keep) * x, "weight": keep * state["weight"] + (1 - keep)}


@dataclass(frozen=True, kw_only=True)
class MovingMean(Controller):
    """Exponential mean of a signal, m <- (1 - rate) * m + rate * x at every update, m = x after the first; `value` before."""

    every_update: ClassVar[bool] = True
    metric: str
    rate: float = 0.005

    def start(self) -> State:
        return {}

    def setting(self, state: State, step: int) -> float:
        return state.get("mean", self.value)

    def observe(self, state: State, metrics: Mapping[str, float]) -> State:
        x = metrics.get(self.metric, math.nan)
        if not math.isfinite(x):
            return state
        return {"mean": (1 - self.rate) * state["mean"] + self.rate * x if state else x}


@dataclass(frozen=True, kw_only=True)
class AdaptiveKL(Controller):
    """Multiplies a coefficient so that a measured divergence stays near `target` (Ziegler et al., arXiv 1909.08593).

    error = clip(kl / target - 1, -0.2, 0.2);  coefficient <- coefficient * (1 + gain * error).
    """

    target: float = 0.05
    gain: float = 0.1
    metric: str = "kl_reference"

    def start(self) -> State:
        return {"coefficient": self.value}

    def setting(self, state: State, step: int) -> float:
        return state["coefficient"]

    def observe(self, state: State, metrics: Mapping[str, float]) -> State:
        kl = metrics.get(self.metric, math.nan)
        if not math.isfinite(kl):
            return state
        error = max(-0.2, min(0.2, kl / self.target - 1.0))
        return {"coefficient": state["coefficient"] * (1.0 + self.gain * error)}


@dataclass(frozen=True, kw_only=True)
class Ramp(Controller):
    """Linear from `value` at step 0 to `final` at step `steps`, then constant."""

    final: float
    steps: int

    def setting(self, state: State, step: int) -> float:
        return self.value + (self.final - self.value) * min(1.0, step / max(self.steps, 1))


@dataclass(frozen=True, kw_only=True)
class RunRamp(Ramp):
    """Linear from `value` at the start to `final` at the end of the run, however long it is."""

    steps: int = 1

    def lasting(self, steps: int) -> Controller:
        return replace(self, steps=steps)


@dataclass(frozen=True, kw_only=True)
class SoFar(Controller):
    """A moment of the rewards that all earlier steps sampled: `of` is count, mean or std (population)."""

    of: str = "mean"

    def start(self) -> State:
        return {"count": 0.0, "mean": 0.0, "std": 0.0}

    def setting(self, state: State, step: int) -> float:
        return state[self.of]

    def observe(self, state: State, metrics: Mapping[str, float]) -> State:
        now = tuple(metrics.get(name, math.nan) for name in ("rollouts", "reward", "reward_std"))
        if not all(map(math.isfinite, now)):
            return state
        past = (state["count"], state["mean"], state["std"] ** 2)
        count, mean, variance = merged_moments(past, (now[0], now[1], now[2] ** 2))
        return {"count": count, "mean": mean, "std": math.sqrt(variance)}


@dataclass(frozen=True, kw_only=True)
class Switch(Controller):
    """`value` before step `at`, `after` from it on."""

    after: float
    at: int

    def setting(self, state: State, step: int) -> float:
        return self.value if step < self.at else self.after


@dataclass(frozen=True, kw_only=True)
class Staircase(Controller):
    """`value` up to step `level`, then `drop` less for every `every` steps begun, never below `floor`."""

    drop: float
    every: int
    level: int = 0
    floor: float = -math.inf

    def setting(self, state: State, step: int) -> float:
        stairs = math.ceil(max(step - self.level, 0) / self.every)
        return max(self.value - self.drop * stairs, self.floor)


@dataclass(frozen=True, kw_only=True)
class InverseDecay(Controller):
    """value / t_k with t_k = max(1 - k/K, 1/K) at step k of a run of K: from `value` up to K times as much."""

    value: float = 1.0
    steps: int = 1

    def lasting(self, steps: int) -> Controller:
        return replace(self, steps=steps)

    def setting(self, state: State, step: int) -> float:
        return self.value / max(1.0 - step / self.steps, 1.0 / self.steps)


@dataclass(frozen=True, kw_only=True)
class SignalShare(Controller):
    """value * SNR / (1 + SNR): how much of a measured gradient is signal, which is what a step should be scaled by.

        SNR / (1 + SNR) = max( |g|^2 - V, 0 ) / |g|^2           V: variance of the whole gradient g (`gradient_noise`)

    Numerator and denominator are exponential means (`decay`; 0: of the last step alone); `value` before any is known.
    """  # fmt: skip

    value: float = 1.0
    decay: float = 0.9

    def start(self) -> State:
        return {"square": 0.0, "noise": 0.0}

    def setting(self, state: State, step: int) -> float:
        square = state["square"]
        return self.value * (max(square - state["noise"], 0.0) / square if square > 0 else 1.0)

    def observe(self, state: State, metrics: Mapping[str, float]) -> State:
        square, noise = metrics.get("grad_norm", math.nan) ** 2, metrics.get("gradient_noise", math.nan)
        if not (math.isfinite(square) and math.isfinite(noise)):
            return state
        keep, new = self.decay, 1 - self.decay
        return {"square": keep * state["square"] + new * square, "noise": keep * state["noise"] + new * noise}


@dataclass(frozen=True, kw_only=True)
class DualAscent(Controller):
    """A positive multiplier exp(x) that rises while the mean of a signal is above a limit, by Adam on x at every update.

    With metric="pathwise_logp" it is SAC's temperature (arXiv 1812.05905, eq. 18): the gradient of x is
    exp(x) * (limit - metric). `value`: where the multiplier starts. `limit`: per action dimension, so that 1 is the entropy
    target -dim(A); of discrete actions it is -0.98 log(choices) (arXiv 1910.07207).
    """

    every_update: ClassVar[bool] = True
    value: float = 1.0
    metric: str = "pathwise_logp"
    limit: float = 1.0
    learning_rate: float = 3e-4

    def sized(self, actions: int, discrete: bool) -> Controller:
        return replace(self, limit=-0.98 * math.log(actions) if discrete else self.limit * actions)

    def start(self) -> State:
        return {"log": math.log(self.value), "mean": 0.0, "square": 0.0, "count": 0.0}

    def setting(self, state: State, step: int) -> float:
        return math.exp(state["log"])

    def observe(self, state: State, metrics: Mapping[str, float]) -> State:
        x = metrics.get(self.metric, math.nan)
        if not math.isfinite(x):
            return state
        gradient = math.exp(state["log"]) * (self.limit - x)
        count = state["count"] + 1
        mean = 0.9 * state["mean"] + 0.1 * gradient
        square = 0.999 * state["square"] + 0.001 * gradient * gradient
        moved = (mean / (1 - 0.9**count)) / (math.sqrt(square / (1 - 0.999**count)) + 1e-8)
        return {"log": state["log"] - self.learning_rate * moved, "mean": mean, "square": square, "count": count}


@dataclass(frozen=True, kw_only=True)
class Doubling(Controller):
    """A penalty that is off until a metric first fails to improve, is then `value`, and doubles while a divergence is too large.

    OSPO's (arXiv 2507.15351): `metric` is compared with its best so far, `divergence` with `limit`.
    """

    value: float = 0.5
    metric: str = "reward"
    divergence: str = "kl_reference"
    limit: float = 0.01

    def start(self) -> State:
        return {"coefficient": 0.0, "best": -math.inf}

    def setting(self, state: State, step: int) -> float:
        return state["coefficient"]

    def observe(self, state: State, metrics: Mapping[str, float]) -> State:
        coefficient, best = state["coefficient"], state["best"]
        x, kl = metrics.get(self.metric, math.nan), metrics.get(self.divergence, math.nan)
        if coefficient == 0.0 and x <= best:
            coefficient = self.value
        elif coefficient > 0.0 and kl > self.limit:
            coefficient = 2.0 * coefficient
        return {"coefficient": coefficient, "best": max(best, x) if math.isfinite(x) else best}


@dataclass(frozen=True, kw_only=True)
class Lagrangian(Controller):
    """The multiplier s(x) of a constraint metric >= target, by gradient descent with momentum on s(x) (metric - target).

        v <- momentum v + clip( s'(x) (J - target) ),   x <- x - learning_rate v         after each step; J the metric

    `squash`, s: "sigmoid" stays in (0, 1), so that the metric may lie above its target; "tanh" in (-1, 1), which also pushes it
    down: an equality; "positive" is x, never below 0; "none" is x. `value`: x at the start. `clip`: largest gradient. `decay`:
    J is the exponential mean of the metric (0: of the last step alone). `proportional` > 0: s(x + proportional (target - J)),
    which damps what the integral alone lets swing (PI of arXiv 2007.03964).
    """  # fmt: skip

    metric: str = "reward"
    target: float | Knob = 0.0
    squash: str = "sigmoid"
    learning_rate: float = 0.1
    momentum: float = 0.1
    clip: float = 0.5
    decay: float = 0.0
    proportional: float = 0.0

    def __post_init__(self) -> None:
        if self.squash not in SQUASHES:
            raise ValueError(f"squash is {self.squash!r}: expected one of {', '.join(SQUASHES)}")

    def start(self) -> State:
        return {"x": self.value, "velocity": 0.0, "gap": 0.0, "sum": 0.0, "weight": 0.0}

    def setting(self, state: State, step: int) -> float:
        return SQUASHES[self.squash](state["x"] + self.proportional * state["gap"])[0]

    def observe(self, state: State, metrics: Mapping[str, float]) -> State:
        found = metrics.get(self.metric, math.nan)
        if not math.isfinite(found):
            return state
        total = self.decay * state["sum"] + (1 - self.decay) * found
        weight = self.decay * state["weight"] + (1 - self.decay)
        gap = number(self.target) - total / weight
        slope = -gap * SQUASHES[self.squash](state["x"])[1]
        velocity = self.momentum * state["velocity"] + max(-self.clip, min(self.clip, slope))
        x = state["x"] - self.learning_rate * velocity
        if self.squash == "positive":
            x = max(x, 0.0)
        return {"x": x, "velocity": velocity, "gap": gap, "sum": total, "weight": weight}


def _sigmoid(x: float) -> float:
    return 1.0 / (1.0 + math.exp(-x)) if x > -700 else 0.0


SQUASHES: Mapping[str, Callable[[float], tuple[float, float]]] = {
    "sigmoid": lambda x: (_sigmoid(x), _sigmoid(x) * _sigmoid(-x)),
    "tanh": lambda x: (math.tanh(x), 1.0 - math.tanh(x) ** 2),
    "positive": lambda x: (max(x, 0.0), 1.0),
    "none": lambda x: (x, 1.0),
}
"""x -> (s(x), s'(x))."""


@dataclass(frozen=True, kw_only=True)
class Below(Controller):
    """1 while a metric is below `target`, 0 where it has reached it; `value` before it is known."""

    value: float = 1.0
    metric: str = "reward"
    target: float | Knob = 0.0

    def start(self) -> State:
        return {"setting": self.value}

    def setting(self, state: State, step: int) -> float:
        return state["setting"]

    def observe(self, state: State, metrics: Mapping[str, float]) -> State:
        found = metrics.get(self.metric, math.nan)
        return {"setting": float(found < number(self.target))} if math.isfinite(found) else state
