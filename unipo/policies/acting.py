"""Acting without autograd: a policy's own function in numpy, for the few observations that environments give at a time.

At 8 observations and 64x64 a layer in torch costs its call (10 us), not its arithmetic (1 us). Log-probs are not needed to
act: those of a whole rollout are computed after it, in one call, from what the network gave then.
Legend: T steps of a rollout, n environments, d observation, k noise, A action components.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import erf, log_ndtr
from torch import Tensor, nn

from unipo.policies.control import ControlPolicy
from unipo.policies.densities import HALF_LOG_2PI, LOG_4
from unipo.policies.distributions import Categorical, Deterministic, Gaussian, SquashedGaussian

Array = NDArray[Any]
TOLERANCE = 1e-5


class Acting:
    """How `policy` acts. Whole rollouts: `begin`, then `choose` once per vector of environments, then `logp`; weights are as
    they were at `begin`. As a function it is `policy.act`, for one observation in numpy, on views of the weights as they are.

    `policy` is a plain `ControlPolicy`: see `suits`. Both ways are compared with `policy.act`, the slow twin, on first use.
    """

    def __init__(self, policy: ControlPolicy) -> None:
        self.policy = policy
        self._chooser = _CHOOSERS[type(policy.distribution)](policy)
        self._linear = [layer for layer in (*policy.network.trunk, policy.network.head) if isinstance(layer, nn.Linear)]
        self._layers: list[tuple[Array, Array]] = []
        self._activate = _ACTIVATIONS[str(policy.config["activation"])]
        self._spaces: list[Array] = []
        self._given, self._time = np.zeros((0, 0, 0), np.float32), 0
        self._scale: tuple[Array, Array, float] | None = None
        self._viewed: list[int] = []
        self._trusted: dict[str, bool] = {}

    @staticmethod
    def suits(policy: Any) -> bool:
        """Whether numpy knows this policy: an unmasked `ControlPolicy` whose methods are its own, with a usual distribution."""
        return (
            type(policy) is ControlPolicy
            and type(policy.distribution) in _CHOOSERS
            and str(policy.config["activation"]) in _ACTIVATIONS
            and not policy.config["masked"]
            and not _changed(policy)
            and all(p.dtype == torch.float32 and p.device.type == "cpu" for p in policy.parameters())
        )

    @classmethod
    def of(cls, policy: Any, before: Acting | None = None) -> Acting | None:
        """`before`, where it is still how `policy` acts, or a new one; None for a policy that has to act itself."""
        if before is not None and before.policy is policy:
            return None if _changed(policy) else before
        return cls(policy) if cls.suits(policy) else None

    def __call__(self, observation: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        if len(observation) != 1 or not self._trusted.get("one", True):
            return self.policy.act(observation, noise)
        self._view()
        z = noise.numpy()
        raw = self._raw(observation.numpy(), np.empty((1, self.policy.network.head.out_features), np.float32))
        action = self._chooser(raw, self._chooser.given(z))
        found = torch.from_numpy(action), torch.from_numpy(self._chooser.logp(raw, z, action))
        if "one" not in self._trusted:  # what is compared is what is used: a resumed run compares elsewhere
            wanted = self.policy.act(observation, noise)
            self._judge("one", all(a.dtype == b.dtype and torch.allclose(a, b, TOLERANCE, TOLERANCE, equal_nan=True)
                                   for a, b in zip(found, wanted, strict=True)))  # fmt: skip
            return found if self._trusted["one"] else wanted
        return found

    def _judge(self, way: str, trusted: bool) -> None:
        self._trusted[way] = trusted
        if not trusted:
            warnings.warn("acting in numpy differs from the policy: it acts in torch, which is slower", stacklevel=4)

    def begin(self, observation: Array, noise: Array) -> Array | None:
        """The weights are those of now. What `choose` is given, from `noise` [T, n, k]; None: use the slow twin.

        `observation` [n, d]: the first one, on which numpy and the policy are compared once.
        """
        self._read(len(observation))
        given = self._chooser.given(noise)
        self._given, self._time = np.empty((*noise.shape[:2], self.policy.network.head.out_features), np.float32), 0
        if "many" not in self._trusted:
            self._judge("many", self._agrees(observation, noise[0], given[0]))
        return given if self._trusted["many"] else None

    def choose(self, observation: Array, given: Array) -> Array:
        """Actions [n, ...] in a new array. What the network gave is kept for `logp`."""
        raw = self._raw(observation, self._given[self._time])
        self._time += 1
        return self._chooser(raw, given)

    @torch.no_grad()
    def logp(self, noise: Array, action: Array) -> Tensor:
        """Log-probs [T, n] (NaN where none is known) of all that was chosen since `begin`, with the `noise` of then."""
        law, of = self.policy.distribution, action if self.policy.distribution.discrete else noise
        raw, flat = (torch.from_numpy(x).flatten(0, 1) for x in (self._given, of))
        if self.policy.log_std is not None:
            raw = torch.cat([raw, self.policy.log_std.expand(len(raw), -1)], -1)
        logp = law.logp(raw, flat) if law.discrete else law.sample_with_logp(raw, flat)[1]
        return logp.unflatten(0, noise.shape[:2])

    def _read(self, n: int) -> None:
        """Copies of the weights as [in, out] and of the biases as [n, out]: small products and sums are fastest so."""
        self._layers = [
            (np.ascontiguousarray(_numpy(m.weight).T), np.tile(_numpy(m.bias), (n, 1))) for m in self._linear
        ]
        self._viewed = []
        self._prepare(n)

    def _view(self) -> None:
        """The weights themselves, wherever they are now: nothing is copied."""
        here = [
            parameter.data_ptr() for m in self._linear for parameter in m._parameters.values() if parameter is not None
        ]
        if here != self._viewed:
            self._layers = [(_numpy(m.weight).T, _numpy(m.bias)[None]) for m in self._linear]
            self._viewed = here
        self._prepare(1)

    def _prepare(self, n: int) -> None:
        if not self._spaces or len(self._spaces[0]) != n:
            self._spaces = [np.empty((n, m.out_features), np.float32) for m in self._linear[:-1]]
        self._chooser.read()
        self._scale, normaliser = None, self.policy.normaliser
        if normaliser is not None and int(normaliser.count):
            mean, var = _numpy(normaliser.mean), _numpy(normaliser.var)
            self._scale = mean, 1 / np.sqrt(var + np.float32(1e-8)), normaliser.clip

    def _raw(self, x: Array, raw: Array) -> Array:
        """What the network gives, written to `raw` [n, outputs]."""
        if self._scale is not None:
            mean, scale, clip = self._scale
            x = x - mean
            np.multiply(x, scale, x)
            _clip(x, -clip, clip)
        for (weight, bias), out in zip(self._layers, self._spaces, strict=False):
            np.add(np.dot(x, weight, out), bias, out)
            x = self._activate(out)
        weight, bias = self._layers[-1]
        return np.add(np.dot(x, weight, raw), bias, raw)

    def _agrees(self, observation: Array, noise: Array, given: Array) -> bool:
        """Actions as the policy's; one of several choices may differ: where two are equally near, rounding decides."""
        wanted = self.policy.act(torch.from_numpy(observation), torch.from_numpy(noise))[0].numpy()
        raw = self._raw(observation, np.empty_like(self._given[0]))
        found = self._chooser(raw, given)
        if found.dtype != wanted.dtype or found.shape != wanted.shape:
            return False
        if self.policy.distribution.discrete:
            full = _numpy(self.policy.raw(torch.from_numpy(observation)))
            return np.allclose(raw, full, TOLERANCE, TOLERANCE) and int((found != wanted).sum()) <= 1
        return np.allclose(found, wanted, TOLERANCE, TOLERANCE)


def _changed(policy: ControlPolicy) -> bool:
    """Somebody gave this very policy methods of their own."""
    return "act" in vars(policy) or "raw" in vars(policy)


def _numpy(x: Tensor) -> Array:
    return x.detach().numpy()


def _clip(x: Array, low: float, high: float) -> Array:
    return np.minimum(np.maximum(x, low, out=x), high, out=x)


# ---- activations, in place -----------------------------------------------------------------------------------------
def _tanh(h: Array) -> Array:
    return np.tanh(h, h)


def _relu(h: Array) -> Array:
    return np.maximum(h, 0, out=h)


def _gelu(h: Array) -> Array:
    return np.multiply(h, 0.5 * (1 + erf(h * np.float32(0.5**0.5))), h)


_ACTIVATIONS: dict[str, Callable[[Array], Array]] = {"tanh": _tanh, "relu": _relu, "gelu": _gelu}


# ---- distributions -------------------------------------------------------------------------------------------------
class _Choice:
    """`Categorical`: the inverse distribution function at Phi(noise)."""

    def __init__(self, policy: ControlPolicy) -> None:
        self.policy = policy

    def read(self) -> None:
        """Parameters that are not the network's, as they are now."""

    def given(self, noise: Array) -> Array:
        level: Array = torch.special.ndtr(torch.from_numpy(noise)).numpy()
        return level

    def __call__(self, raw: Array, given: Array) -> Array:
        cdf = np.exp(raw - raw.max(1, keepdims=True)).cumsum(1)
        chosen: Array = (given * cdf[:, -1:] > cdf[:, :-1]).sum(1)
        return chosen

    def logp(self, raw: Array, noise: Array, action: Array) -> Array:
        """[n]: log-probs of `action`, which `noise` led to."""
        shifted = raw - raw.max(1, keepdims=True)
        found: Array = shifted[np.arange(len(raw)), action] - np.log(np.exp(shifted).sum(1))
        return found


class _Either(_Choice):
    """One of two: Phi(noise) > p_0 where the log-odds of Phi(noise) exceed raw_0 - raw_1."""

    def given(self, noise: Array) -> Array:
        x = noise[..., 0].astype(np.float64)
        odds: Array = (log_ndtr(x) - log_ndtr(-x)).astype(np.float32)
        return odds

    def __call__(self, raw: Array, given: Array) -> Array:
        return (given > raw[:, 0] - raw[:, 1]).astype(np.int64)


class _LocationScale(_Choice):
    """`Gaussian` and `SquashedGaussian`: mean + std x noise, the std a parameter or the network's."""

    def __init__(self, policy: ControlPolicy) -> None:
        super().__init__(policy)
        law = policy.distribution
        self.squashed = isinstance(law, SquashedGaussian)
        self.limits = (law.log_std_low, law.log_std_high) if isinstance(law, SquashedGaussian) else (-np.inf, np.inf)
        self.log_std: Array | None = None
        self.std: Array | None = None

    def read(self) -> None:
        if self.policy.log_std is not None:
            self.log_std = self._limited(_numpy(self.policy.log_std))
            self.std = np.exp(self.log_std)

    def _limited(self, log_std: Array) -> Array:
        return _clip(log_std.copy(), *self.limits) if self.squashed else log_std

    def given(self, noise: Array) -> Array:
        return noise if self.std is None else self.std * noise

    def __call__(self, raw: Array, given: Array) -> Array:
        if self.std is not None:
            u = raw + given
        else:
            size = given.shape[-1]
            u = np.exp(self._limited(raw[:, size:]))
            np.add(np.multiply(u, given, u), raw[:, :size], u)
        return np.tanh(u, u) if self.squashed else u

    def logp(self, raw: Array, noise: Array, action: Array) -> Array:
        """By the noise, which is exact where tanh is flat: see `squashed_logp`."""
        size = noise.shape[-1]
        log_std = self._limited(raw[:, size:]) if self.log_std is None else self.log_std
        cost, constant = log_std + 0.5 * noise * noise, HALF_LOG_2PI
        if self.squashed:
            u = raw[:, :size] + np.exp(log_std) * noise
            cost, constant = cost - 2 * (u + np.logaddexp(0, -2 * u)), HALF_LOG_2PI + LOG_4
        found: Array = -cost.sum(1) - np.float32(size * constant)
        return found


class _Point(_Choice):
    """`Deterministic`: tanh(raw) + exploration x noise, clipped."""

    def given(self, noise: Array) -> Array:
        law: Any = self.policy.distribution
        scaled: Array = np.float32(law.exploration) * noise
        return scaled

    def __call__(self, raw: Array, given: Array) -> Array:
        u = np.tanh(raw)
        np.add(u, given, u)
        return _clip(u, -1.0, 1.0)

    def logp(self, raw: Array, noise: Array, action: Array) -> Array:
        return np.full(len(raw), np.nan, np.float32)


def _categorical(policy: ControlPolicy) -> _Choice:
    return (_Either if policy.distribution.parameters == 2 else _Choice)(policy)


_CHOOSERS: dict[type, Callable[[ControlPolicy], _Choice]] = {
    Categorical: _categorical,
    Gaussian: _LocationScale,
    SquashedGaussian: _LocationScale,
    Deterministic: _Point,
}
