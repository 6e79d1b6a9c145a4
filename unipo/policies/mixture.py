"""A mixture of diagonal Gaussians, squashed or not: the policy of PMOE (arXiv:2104.09122)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from unipo.policies.densities import inside, inverse_cdf, log_slope, normal_logp


@dataclass(frozen=True, slots=True)
class GaussianMixture:
    """sum_k w_k N(mean_k, std_k), through tanh where `squashed`; raw = [logits w, means, log-stds] [N, K + 2KA].

    Noise [N, KA + 1]: one sample of every component, then the choice among them. `sample` is differentiable in the chosen
    component, not in the weights. `spread`: std of the components' initial means, apart from each other.
    `mode` is that of the heaviest component. Entropy and KL have no closed form.
    """

    size: int
    experts: int = 4
    squashed: bool = True
    log_std_low: float = -20.0
    log_std_high: float = 2.0
    spread: float = 0.0
    discrete: ClassVar[bool] = False

    @property
    def parameters(self) -> int:
        return self.experts * (1 + 2 * self.size)

    @property
    def free(self) -> int:
        return self.experts * self.size

    @property
    def noise(self) -> int:
        return self.experts * self.size + 1

    @property
    def action_shape(self) -> tuple[int, ...]:
        return (self.size,)

    def initial(self, log_std: float) -> Tensor:
        means = self.spread * torch.randn(self.free)
        return torch.cat([torch.zeros(self.experts), means, torch.full((self.free,), log_std)])

    # ---- components ------------------------------------------------------------------------------------------------
    def weights(self, raw: Tensor) -> Tensor:
        """w [N, K]."""
        return raw[..., : self.experts].softmax(-1)

    def components(self, raw: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """A sample of every component [N, K, A], and its log-density under its own component [N, K]."""
        u, z, log_std = self._components(raw, noise)
        return self._squash(u), normal_logp(z, log_std) - self._log_slope(u)

    def component_sample(self, raw: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """(action [N, A], its log-density under the component that it was drawn from [N])."""
        u, z, log_std = self._components(raw, noise)
        chosen = self._choice(raw, noise)
        u, z, log_std = (_pick(x, chosen) for x in (u, z, log_std))
        return self._squash(u), normal_logp(z, log_std) - self._log_slope(u)

    def _split(self, raw: Tensor) -> tuple[Tensor, Tensor]:
        """(means, log-stds), each [N, K, A]."""
        _, mean, log_std = raw.split([self.experts, self.free, self.free], -1)
        shape = (self.experts, self.size)
        return mean.unflatten(-1, shape), log_std.clamp(self.log_std_low, self.log_std_high).unflatten(-1, shape)

    def _components(self, raw: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(sample before squashing, its noise, log-std), each [N, K, A]."""
        mean, log_std = self._split(raw)
        z = noise[..., :-1].unflatten(-1, (self.experts, self.size))
        return torch.addcmul(mean, log_std.exp(), z), z, log_std

    def _choice(self, raw: Tensor, noise: Tensor) -> Tensor:
        return inverse_cdf(self.weights(raw), noise[..., -1])

    def _squash(self, u: Tensor) -> Tensor:
        return torch.tanh(u) if self.squashed else u

    def _log_slope(self, u: Tensor) -> Tensor:
        return log_slope(u) if self.squashed else u.new_zeros(u.shape[:-1])

    def _density(self, raw: Tensor, u: Tensor) -> Tensor:
        """log-density [N] of the mixture at `u` [N, A] before squashing."""
        mean, log_std = self._split(raw)
        each_NK = normal_logp((u[..., None, :] - mean) * (-log_std).exp(), log_std)
        return (raw[..., : self.experts].log_softmax(-1) + each_NK).logsumexp(-1)

    # ---- the distribution ------------------------------------------------------------------------------------------
    def sample(self, raw: Tensor, noise: Tensor) -> Tensor:
        return self._squash(_pick(self._components(raw, noise)[0], self._choice(raw, noise)))

    def logp(self, raw: Tensor, action: Tensor) -> Tensor:
        u = inside(action).atanh() if self.squashed else action
        return self._density(raw, u) - self._log_slope(u)

    def sample_with_logp(self, raw: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        u = _pick(self._components(raw, noise)[0], self._choice(raw, noise))
        return self._squash(u), self._density(raw, u) - self._log_slope(u)

    def entropy(self, raw: Tensor) -> Tensor:
        raise NotImplementedError(
            "the entropy of a mixture has no closed form: use minus the log-density of a sample, "
            "sample_with_logp(raw, noise)[1]"
        )

    def mode(self, raw: Tensor) -> Tensor:
        return self._squash(_pick(self._split(raw)[0], raw[..., : self.experts].argmax(-1)))

    def kl(self, raw_p: Tensor, raw_q: Tensor) -> Tensor:
        raise NotImplementedError(
            "the KL divergence of mixtures has no closed form: estimate it from logp at sampled actions (the k1, k2 and k3 "
            "of unipo.functional)"
        )


def _pick(x_NKA: Tensor, chosen_N: Tensor) -> Tensor:
    """[N, A]: the row of each step's chosen component."""
    index = chosen_N[..., None, None].expand(*chosen_N.shape, 1, x_NKA.shape[-1])
    return x_NKA.gather(-2, index).squeeze(-2)
