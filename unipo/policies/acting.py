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
from unipo.policies.distributions import Categorical, Deterministic, Gaussian, SquashedGaussian

Array = NDArray[Any]
TOLERANCE = 1e-5


class Acting:
    """How `policy` acts, one vector of environments after the other; its weights stay as they are from `begin` on.

    `policy` is a plain `ControlPolicy`: see `suits`. Used as a function it is `policy.act`: the slow twin, which is also what
    `begin` compares with on first use.
    """

    def __init__(self, policy: ControlPolicy) -> None:
        self.policy = policy
        self._chooser = _CHOOSERS[type(policy.distribution)](policy)
        self._layers: list[tuple[Array, Array]] = []
        self._activate = _ACTIVATIONS[str(policy.config["activation"])]
        self._spaces: list[Array] = []
        self._given, self._time = np.zeros((0, 0, 0), np.float32), 0
        self._scale: tuple[Array, Array, float] | None = None
        self._trusted: bool | None = None

    @staticmethod
    def suits(policy: Any) -> bool:
        """Whether numpy knows this policy: an unmasked `ControlPolicy` whose methods are its own, with a usual distribution."""
        return (
            type(policy) is ControlPolicy
            and not {"act", "raw"} & vars(policy).keys()
            and type(policy.distribution) in _CHOOSERS
            and str(policy.config["activation"]) in _ACTIVATIONS
            and not policy.config["masked"]
            and all(p.dtype == torch.float32 and p.device.type == "cpu" for p in policy.parameters())
        )

    def __call__(self, observation: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        return self.policy.act(observation, noise)

    def begin(self, observation: Array, noise: Array) -> Array | None:
        """The weights are those of now. What `choose` is given, from `noise` [T, n, k]; None: use the slow twin.

        `observation` [n, d]: the first one, on which numpy and the policy are compared once.
        """
        self._read(len(observation))
        given = self._chooser.given(noise)
        self._given, self._time = np.empty((*noise.shape[:2], self.policy.network.head.out_features), np.float32), 0
        if self._trusted is None:
            self._trusted = self._agrees(observation, noise[0], given[0])
            if not self._trusted:
                warnings.warn(
                    "acting in numpy differs from the policy: it acts in torch, which is slower", stacklevel=2
                )
        return given if self._trusted else None

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
        network, normaliser = self.policy.network, self.policy.normaliser
        linear = [layer for layer in (*network.trunk, network.head) if isinstance(layer, nn.Linear)]
        self._layers = [(np.ascontiguousarray(_numpy(m.weight).T), np.tile(_numpy(m.bias), (n, 1))) for m in linear]
        if not self._spaces or len(self._spaces[0]) != n:
            self._spaces = [np.empty((n, m.out_features), np.float32) for m in linear[:-1]]
        self._chooser.read()
        self._scale = None
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
        self.std: Array | None = None

    def read(self) -> None:
        if self.policy.log_std is not None:
            self.std = self._std(_numpy(self.policy.log_std))

    def _std(self, log_std: Array) -> Array:
        low, high = self.limits
        std: Array = np.exp(_clip(log_std.copy(), low, high) if self.squashed else log_std)
        return std

    def given(self, noise: Array) -> Array:
        return noise if self.std is None else self.std * noise

    def __call__(self, raw: Array, given: Array) -> Array:
        if self.std is not None:
            u = raw + given
        else:
            size = given.shape[-1]
            u = self._std(raw[:, size:])
            np.add(np.multiply(u, given, u), raw[:, :size], u)
        return np.tanh(u, u) if self.squashed else u


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


def _categorical(policy: ControlPolicy) -> _Choice:
    return (_Either if policy.distribution.parameters == 2 else _Choice)(policy)


_CHOOSERS: dict[type, Callable[[ControlPolicy], _Choice]] = {
    Categorical: _categorical,
    Gaussian: _LocationScale,
    SquashedGaussian: _LocationScale,
    Deterministic: _Point,
}
