"""Action distributions: stateless functions of raw parameters [N, P], of noise [N, noise] and of actions.

    Categorical, MultiCategorical      discrete: sampled by the inverse distribution function at Phi(noise)
    Gaussian, SquashedGaussian, Beta   continuous: sample(raw, noise) is differentiable in raw
    GaussianMixture                    the component is drawn (no gradient), its sample is differentiable
    Deterministic                      a point; exploration adds noise, so that no density is known

Noise is standard normal and comes from outside: a signal is then a function of its batch. Bounded actions are in [-1, 1].
Legend: N steps, A action components, K experts, P parameters.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad, softplus

from unipo.policies.densities import (
    HALF_LOG_2PI,
    beta_entropy,
    beta_kl,
    beta_logp,
    beta_quantile,
    inside,
    inverse_cdf,
    normal_kl,
    normal_logp,
    squashed_logp,
)
from unipo.policies.mixture import GaussianMixture

__all__ = [
    "KINDS",
    "Beta",
    "Categorical",
    "Deterministic",
    "Distribution",
    "Gaussian",
    "GaussianMixture",
    "MultiCategorical",
    "SquashedGaussian",
]


ABSENT = -1e9
"""The logit of a category that does not exist: its probability is 0, and finite where it is multiplied by it."""


class Distribution(Protocol):
    """What a policy head and its action space have to agree on.

    Required: `sample` and `logp` describe the same law; `sample_with_logp` equals both, more cheaply or more exactly;
    `mode` maximises the density (before squashing, where there is squashing); `kl` is KL(p || q).
    `NotImplementedError` where there is no closed form, naming the remedy. Not verified: that noise is standard normal.
    """

    @property
    def parameters(self) -> int: ...  # P, the width of `raw`
    @property
    def free(self) -> int: ...  # trailing entries of `raw` that need not depend on the state: the log-std
    @property
    def noise(self) -> int: ...  # standard normals that one sample consumes
    @property
    def action_shape(self) -> tuple[int, ...]: ...
    @property
    def discrete(self) -> bool: ...

    def initial(self, log_std: float) -> Tensor: ...  # [P], the bias that `raw` starts from
    def sample(self, raw: Tensor, noise: Tensor) -> Tensor: ...
    def logp(self, raw: Tensor, action: Tensor) -> Tensor: ...
    def sample_with_logp(self, raw: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]: ...
    def entropy(self, raw: Tensor) -> Tensor: ...
    def mode(self, raw: Tensor) -> Tensor: ...
    def kl(self, raw_p: Tensor, raw_q: Tensor) -> Tensor: ...


# ---- discrete ------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Categorical:
    """One of `n` actions; raw = logits [N, n], action [N] int64."""

    n: int
    free: ClassVar[int] = 0
    noise: ClassVar[int] = 1
    action_shape: ClassVar[tuple[int, ...]] = ()
    discrete: ClassVar[bool] = True

    @property
    def parameters(self) -> int:
        return self.n

    def initial(self, log_std: float) -> Tensor:
        return torch.zeros(self.n)

    def sample(self, raw: Tensor, noise: Tensor) -> Tensor:
        return inverse_cdf(raw.softmax(-1), noise[..., 0])

    def logp(self, raw: Tensor, action: Tensor) -> Tensor:
        return raw.log_softmax(-1).gather(-1, action[..., None]).squeeze(-1)

    def sample_with_logp(self, raw: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        logp_NV = raw.log_softmax(-1)
        action = inverse_cdf(logp_NV.exp(), noise[..., 0])
        return action, logp_NV.gather(-1, action[..., None]).squeeze(-1)

    def entropy(self, raw: Tensor) -> Tensor:
        logp_NV = raw.log_softmax(-1)
        return -(logp_NV.exp() * logp_NV).sum(-1)

    def mode(self, raw: Tensor) -> Tensor:
        return raw.argmax(-1)

    def kl(self, raw_p: Tensor, raw_q: Tensor) -> Tensor:
        logp_NV = raw_p.log_softmax(-1)
        return (logp_NV.exp() * (logp_NV - raw_q.log_softmax(-1))).sum(-1)


@dataclass(frozen=True, slots=True)
class MultiCategorical:
    """Independent categories; raw = logits [N, sum sizes], action [N, len(sizes)] int64."""

    sizes: tuple[int, ...]
    free: ClassVar[int] = 0
    discrete: ClassVar[bool] = True

    @property
    def parameters(self) -> int:
        return sum(self.sizes)

    @property
    def noise(self) -> int:
        return len(self.sizes)

    @property
    def action_shape(self) -> tuple[int, ...]:
        return (len(self.sizes),)

    def initial(self, log_std: float) -> Tensor:
        return torch.zeros(self.parameters)

    def _each(self, raw: Tensor) -> tuple[Categorical, Tensor]:
        """(the distribution of a component, their logits [N, k, largest]): shorter ones are filled with `ABSENT`."""
        largest = max(self.sizes)
        parts = raw.split(list(self.sizes), -1)
        filled = [pad(part, (0, largest - n), value=ABSENT) for n, part in zip(self.sizes, parts, strict=True)]
        return Categorical(largest), torch.stack(filled, -2)

    def sample(self, raw: Tensor, noise: Tensor) -> Tensor:
        each, raw_NkV = self._each(raw)
        return each.sample(raw_NkV, noise[..., None])

    def logp(self, raw: Tensor, action: Tensor) -> Tensor:
        each, raw_NkV = self._each(raw)
        return each.logp(raw_NkV, action).sum(-1)

    def sample_with_logp(self, raw: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        each, raw_NkV = self._each(raw)
        action, logp = each.sample_with_logp(raw_NkV, noise[..., None])
        return action, logp.sum(-1)

    def entropy(self, raw: Tensor) -> Tensor:
        each, raw_NkV = self._each(raw)
        return each.entropy(raw_NkV).sum(-1)

    def mode(self, raw: Tensor) -> Tensor:
        return self._each(raw)[1].argmax(-1)

    def kl(self, raw_p: Tensor, raw_q: Tensor) -> Tensor:
        each, raw_NkV = self._each(raw_p)
        return each.kl(raw_NkV, self._each(raw_q)[1]).sum(-1)


# ---- Gaussian ------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class _LocationScale:
    """What Gaussians, squashed or not, have in common: raw = [mean, log_std] [N, 2A], a normal number per component."""

    size: int
    discrete: ClassVar[bool] = False

    @property
    def parameters(self) -> int:
        return 2 * self.size

    @property
    def free(self) -> int:
        return self.size

    @property
    def noise(self) -> int:
        return self.size

    @property
    def action_shape(self) -> tuple[int, ...]:
        return (self.size,)

    def initial(self, log_std: float) -> Tensor:
        return torch.cat([torch.zeros(self.size), torch.full((self.size,), log_std)])


@dataclass(frozen=True, slots=True)
class Gaussian(_LocationScale):
    """Diagonal Gaussian on all of R^A; raw = [mean, log_std] [N, 2A], action [N, A]."""

    def sample(self, raw: Tensor, noise: Tensor) -> Tensor:
        mean, log_std = raw.chunk(2, -1)
        return torch.addcmul(mean, log_std.exp(), noise)

    def logp(self, raw: Tensor, action: Tensor) -> Tensor:
        mean, log_std = raw.chunk(2, -1)
        return normal_logp((action - mean) * (-log_std).exp(), log_std)

    def sample_with_logp(self, raw: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_std = raw.chunk(2, -1)
        return torch.addcmul(mean, log_std.exp(), noise), normal_logp(noise, log_std)

    def entropy(self, raw: Tensor) -> Tensor:
        return (raw[..., self.size :] + (0.5 + HALF_LOG_2PI)).sum(-1)

    def mode(self, raw: Tensor) -> Tensor:
        return raw[..., : self.size]

    def kl(self, raw_p: Tensor, raw_q: Tensor) -> Tensor:
        return normal_kl(*raw_p.chunk(2, -1), *raw_q.chunk(2, -1))


@dataclass(frozen=True, slots=True)
class SquashedGaussian(_LocationScale):
    """tanh of a diagonal Gaussian, on (-1, 1)^A; raw = [mean, log_std] [N, 2A], the log-std clamped to its bounds.

    `logp` of an action inverts the tanh, as far as rounding left something to invert near the bounds;
    `sample_with_logp` is exact everywhere. The mode is tanh(mean). KL is that of the Gaussians: tanh is a bijection.
    """

    log_std_low: float = -20.0
    log_std_high: float = 2.0

    def _split(self, raw: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_std = raw.chunk(2, -1)
        return mean, log_std.clamp(self.log_std_low, self.log_std_high)

    def sample(self, raw: Tensor, noise: Tensor) -> Tensor:
        mean, log_std = self._split(raw)
        return torch.tanh(torch.addcmul(mean, log_std.exp(), noise))

    def logp(self, raw: Tensor, action: Tensor) -> Tensor:
        mean, log_std = self._split(raw)
        u = inside(action).atanh()
        return squashed_logp((u - mean) * (-log_std).exp(), log_std, u)

    def sample_with_logp(self, raw: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_std = self._split(raw)
        u = torch.addcmul(mean, log_std.exp(), noise)
        return torch.tanh(u), squashed_logp(noise, log_std, u)

    def logp_of_sample(self, raw: Tensor, noise: Tensor, other: Tensor) -> Tensor:
        """log-density [N] of sample(raw, noise) under the parameters `other`, exact everywhere: no tanh is inverted."""
        mean, log_std = self._split(raw)
        u = torch.addcmul(mean, log_std.exp(), noise)
        other_mean, other_log_std = self._split(other)
        return squashed_logp((u - other_mean) * (-other_log_std).exp(), other_log_std, u)

    def entropy(self, raw: Tensor) -> Tensor:
        raise NotImplementedError(
            "the entropy of a squashed Gaussian has no closed form: use minus the log-density of a sample, "
            "sample_with_logp(raw, noise)[1]"
        )

    def mode(self, raw: Tensor) -> Tensor:
        return torch.tanh(raw[..., : self.size])

    def kl(self, raw_p: Tensor, raw_q: Tensor) -> Tensor:
        return normal_kl(*self._split(raw_p), *self._split(raw_q))


# ---- bounded, without squashing ------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Beta:
    """Independent Beta(alpha, beta) stretched to [-1, 1]; raw gives alpha, beta = 1 + softplus(raw) [N, 2A]: one peak.

    Chou, Maturana and Scherer 2017. `sample` inverts the distribution function (scipy, on the host) and is differentiable
    (implicit reparameterisation, arXiv:1805.08498); actions at the bounds are valued as if just inside.
    """

    size: int
    free: ClassVar[int] = 0
    discrete: ClassVar[bool] = False

    @property
    def parameters(self) -> int:
        return 2 * self.size

    @property
    def noise(self) -> int:
        return self.size

    @property
    def action_shape(self) -> tuple[int, ...]:
        return (self.size,)

    def initial(self, log_std: float) -> Tensor:
        return torch.zeros(2 * self.size)

    def _split(self, raw: Tensor) -> tuple[Tensor, Tensor]:
        alpha, beta = (1 + softplus(raw)).chunk(2, -1)
        return alpha, beta

    def sample(self, raw: Tensor, noise: Tensor) -> Tensor:
        return 2 * beta_quantile(*self._split(raw), torch.special.ndtr(noise)) - 1

    def logp(self, raw: Tensor, action: Tensor) -> Tensor:
        x = inside(action).add(1).div(2)
        return beta_logp(*self._split(raw), x).sum(-1) - self.size * math.log(2)

    def sample_with_logp(self, raw: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        action = self.sample(raw, noise)
        return action, self.logp(raw, action)

    def entropy(self, raw: Tensor) -> Tensor:
        return beta_entropy(*self._split(raw)).sum(-1) + self.size * math.log(2)

    def mode(self, raw: Tensor) -> Tensor:
        alpha, beta = self._split(raw)
        return (alpha - beta) / (alpha + beta - 2)

    def kl(self, raw_p: Tensor, raw_q: Tensor) -> Tensor:
        return beta_kl(*self._split(raw_p), *self._split(raw_q)).sum(-1)


# ---- a point -------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Deterministic:
    """The action tanh(raw) [N, A]; `sample` adds `exploration` x noise and clips to [-1, 1] (DDPG, TD3).

    It has no density: `logp`, `entropy` and `kl` raise, `sample_with_logp` gives NaN, the mark of an unknown log-prob.
    """

    size: int
    exploration: float = 0.1
    free: ClassVar[int] = 0
    discrete: ClassVar[bool] = False

    @property
    def parameters(self) -> int:
        return self.size

    @property
    def noise(self) -> int:
        return self.size

    @property
    def action_shape(self) -> tuple[int, ...]:
        return (self.size,)

    def initial(self, log_std: float) -> Tensor:
        return torch.zeros(self.size)

    def sample(self, raw: Tensor, noise: Tensor) -> Tensor:
        return (torch.tanh(raw) + self.exploration * noise).clamp(-1, 1)

    def logp(self, raw: Tensor, action: Tensor) -> Tensor:
        raise NotImplementedError(_NO_DENSITY)

    def sample_with_logp(self, raw: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        return self.sample(raw, noise), raw.new_full(raw.shape[:-1], float("nan"))

    def entropy(self, raw: Tensor) -> Tensor:
        raise NotImplementedError(_NO_DENSITY)

    def mode(self, raw: Tensor) -> Tensor:
        return torch.tanh(raw)

    def kl(self, raw_p: Tensor, raw_q: Tensor) -> Tensor:
        raise NotImplementedError(_NO_DENSITY)


KINDS: dict[str, Callable[..., Distribution]] = {
    kind.__name__: kind
    for kind in (Beta, Categorical, Deterministic, Gaussian, GaussianMixture, MultiCategorical, SquashedGaussian)
}
"""Every distribution by name: what a saved policy refers to."""
_NO_DENSITY = (
    "a deterministic policy has no density: train it through a critic (Pathwise) or by the distance of its action "
    "to the data's, or choose SquashedGaussian"
)
