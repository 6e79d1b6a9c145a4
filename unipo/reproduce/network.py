"""A table of logits that a small network fills: prompts share parameters, so that learning on one moves the others."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from unipo.episodes import Episodes
from unipo.policies.tabular import TabularPolicy
from unipo.tasks.tabular import TabularTask


class NetworkPolicy(TabularPolicy):
    """logits[prompt, position, previous] = network(onehots of the three); success rates stay exact.

    Everything else is as in `TabularPolicy`. One hidden layer of `width` tanh units, float64, drawn from `seed`.
    """

    def __init__(self, task: TabularTask, seed: int, width: int = 32) -> None:
        nn.Module.__init__(self)
        shape = (task.prompts, task.length, task.vocabulary + 1)
        states = torch.cartesian_prod(*(torch.arange(n) for n in shape))
        onehots = [nn.functional.one_hot(states[:, i], n) for i, n in enumerate(shape)]
        self.register_buffer("states", torch.cat(onehots, 1).double())
        generator = torch.Generator().manual_seed(seed)

        def normal(*size: int, scale: float) -> nn.Parameter:
            return nn.Parameter(scale * torch.randn(size, generator=generator, dtype=torch.float64))

        self.inward = normal(sum(shape), width, scale=0.5)
        self.outward = normal(width, task.vocabulary, scale=0.5 * width**-0.5)
        self.bias = normal(task.vocabulary, scale=0.0)
        self.value = normal(*shape, scale=0.0)

    @property
    def logits(self) -> Tensor:  # type: ignore[override]
        """[P, L, V + 1, V]"""
        hidden = torch.tanh(self.get_buffer("states") @ self.inward)
        return (hidden @ self.outward + self.bias).reshape(*self.value.shape, -1)

    @property
    def length(self) -> int:
        return int(self.value.shape[1])

    @property
    def vocabulary(self) -> int:
        return int(self.value.shape[2]) - 1

    @property
    def width(self) -> int:
        return self.inward.shape[1]

    def features(self, episodes: Episodes, layers: Sequence[float]) -> Tensor:
        """[N, K, width]: the hidden layer, the only one there is, when each token has been read; differentiable."""
        prompt, position, _ = self._states(episodes)
        prompts, length = self.value.shape[0], self.length
        after = torch.where(
            (position + 1 < length)[:, None], self.inward[prompts + (position + 1).clamp(max=length - 1)], 0.0
        )
        hidden = torch.tanh(self.inward[prompt] + after + self.inward[prompts + length + episodes["token"]])
        return hidden[:, None].expand(-1, len(layers), -1)
