"""A flow over hidden states of the policy that says which tokens are unlike those of right answers (RLFR)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from unipo import functional as F
from unipo.episodes import Episodes
from unipo.functional.chunked import chunks, wide
from unipo.sources.companions.companion import Companion, CompanionSpec, features_of, seeded, torch_generator

CONTEXTS = {"previous": (-1,), "next": (1,), "both": (-1, 1)}
"""Where the condition of a token is: the hidden state of the token before it, that of the one after, or each in turn."""
ROWS = 4096
"""Tokens that go through the flow at once."""
FREQUENCIES = 8


class Block(nn.Module):
    """x + gate * MLP((1 + scale) * norm(x) + shift), all three read from the condition; the identity at first (AdaLN)."""

    def __init__(self, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False, dtype=dtype)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width, dtype=dtype), nn.GELU(), nn.Linear(2 * width, width, dtype=dtype)
        )
        self.modulation = zeroed(nn.Linear(width, 3 * width, dtype=dtype))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        gate, scale, shift = self.modulation(condition).chunk(3, -1)
        return x + gate * self.mlp((1 + scale) * self.norm(x) + shift)


class FlowNet(nn.Module):
    """v(x_t, t, c, layer): [n, K, d] from x and c [n, K, d] and t [n, K, 1], for hidden states of K layers; 0 at first."""

    def __init__(self, size: int, layers: int, depth: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.inward = nn.Linear(size, size, dtype=dtype)
        self.condition = nn.Linear(size + 2 * FREQUENCIES, size, dtype=dtype)
        self.layer = nn.Parameter(torch.zeros(layers, size, dtype=dtype))
        self.blocks = nn.ModuleList(Block(size, dtype) for _ in range(depth))
        self.last = zeroed(nn.Linear(size, 2 * size, dtype=dtype))
        self.outward = zeroed(nn.Linear(size, size, dtype=dtype))

    def forward(self, x: Tensor, time: Tensor, context: Tensor) -> Tensor:
        angle = time * torch.exp2(torch.arange(FREQUENCIES, dtype=x.dtype, device=x.device) / 2)
        waves = torch.cat([angle.sin(), angle.cos()], -1)
        condition = nn.functional.silu(self.condition(torch.cat([context, waves], -1)) + self.layer)
        x = self.inward(x)
        for block in self.blocks:
            x = block(x, condition)
        scale, shift = self.last(condition).chunk(2, -1)
        return self.outward((1 + scale) * x + shift)


def zeroed(linear: nn.Linear) -> nn.Linear:
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


@dataclass(frozen=True, kw_only=True)
class FlowReward(CompanionSpec):
    """Column `token_reward` [N] = -coefficient * what stands out of the flow's error at a token's hidden state.

    `layers`: as shares of the policy's depth. `time`: t* of the score. `threshold`, `top`: see `functional.standouts`.
    `context`: previous, next, or both: the mean of what is known from either. Fitted on the demonstrations of the batch in the
    first `offline` steps, then on rollouts with a reward of at least 1, by `updates` updates a step.
    """

    columns: ClassVar[frozenset[str]] = frozenset({"token_reward"})
    coefficient: float = 0.01
    layers: tuple[float, ...] = (0.25, 0.5, 0.75)
    time: float = 0.8
    threshold: float = 0.6
    top: int = 15
    context: str = "previous"
    offline: int = 0
    updates: int = 4
    depth: int = 6
    learning_rate: float = 1e-4

    def __post_init__(self) -> None:
        if self.context not in CONTEXTS or not 0.0 < self.time < 1.0:
            raise ValueError(
                f"context is {self.context!r}, time {self.time}: expected {', '.join(CONTEXTS)}, and within (0, 1)"
            )

    def build(self, policy: Any, seed: int) -> FlowCompanion:
        return FlowCompanion(self, policy, seed)


class FlowCompanion(Companion):
    """The flow of a `FlowReward`. Hidden states are detached: nothing of it reaches the policy but the column."""

    def __init__(self, spec: FlowReward, policy: Any, seed: int) -> None:
        self.spec, self.policy, self.seed = spec, policy, seed
        first = next(p for _, p in policy.named_parameters())
        with seeded(seed, "flow"):
            views = len(spec.layers) * len(CONTEXTS[spec.context])
            net = FlowNet(policy.width, views, spec.depth, wide(first[:0]).dtype).to(first.device)
        super().__init__("flow", net, spec.learning_rate)
        self.net = net
        self._said: dict[str, float] = {}

    # ---- what the policy is told -------------------------------------------------------------------------------------------
    @torch.no_grad()
    def annotate(self, batch: Episodes, step: int) -> Episodes:
        self._hidden = self._states(batch)
        score, known = self.scores(batch, step)
        shaped = F.standouts(score, batch.index("episode"), len(batch), known, self.spec.threshold, self.spec.top)
        self._said = _by_outcome(batch, score, known)
        return batch.with_columns("step", token_reward=-self.spec.coefficient * shaped)

    @torch.no_grad()
    def scores(self, batch: Episodes, step: int) -> tuple[Tensor, Tensor]:
        """d_n = t* / (1 - t*) * error of the velocity [N], mean over layers and contexts, with noise of this step; and where
        it is known: from one context at least."""
        hidden, context, known = self._conditioned(batch)
        draw = torch_generator(self.seed, "flow score", step)
        t = self.spec.time
        parts = []
        for rows in chunks(len(hidden), ROWS):
            h = hidden[rows]
            noise = torch.randn(h.shape, generator=draw, dtype=h.dtype).to(h.device)
            time = torch.full_like(h[..., :1], t)
            error = F.flow_error(self.net(F.noised(h, noise, time), time, context[rows]), h, noise)
            parts.append(error.reshape(len(h), known.shape[1], -1).mean(-1))
        error_NC = torch.cat(parts) if parts else hidden.new_zeros(known.shape)
        seen = torch.where(known, error_NC, 0.0).sum(1) / known.sum(1).clamp(min=1)
        return t / (1 - t) * seen, known.any(1)

    def _states(self, batch: Episodes) -> Tensor:
        """[N, K, d], each of root mean square 1, so that data and noise are of a size."""
        found = wide(features_of(self.policy, batch, self.spec.layers))
        return found / found.square().mean(-1, keepdim=True).sqrt().clamp(min=1e-12)

    def _conditioned(self, batch: Episodes) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden states and those of their neighbours [N, C K, d], context by context; and which steps have that neighbour and
        count [N, C]."""
        index, beside, known = batch.index("episode"), list[Tensor](), list[Tensor]()
        steps = torch.arange(len(index), device=index.device)
        for shift in CONTEXTS[self.spec.context]:
            other = (steps + shift).clamp(0, max(len(index) - 1, 0))
            beside.append(self._hidden[other])
            known.append((other != steps) & (index[other] == index))
        known_NC = torch.stack(known, 1) & batch["mask"][:, None] if "mask" in batch else torch.stack(known, 1)
        return torch.cat([self._hidden] * len(beside), 1), torch.cat(beside, 1), known_NC

    # ---- learning ------------------------------------------------------------------------------------------------------------
    def learn(self, batch: Episodes, step: int) -> Mapping[str, float]:
        """Of the hidden states that `annotate` has seen: those of demonstrations at first, then of right rollouts."""
        hidden, context, known = self._conditioned(batch)
        rows = batch.category("kind", "demo")
        if step >= self.spec.offline:
            rows = batch.category("kind", "rollout") & (batch["reward"] >= 1)
        steps = (batch.expand(rows) & known.any(1)).nonzero().squeeze(1)
        losses = [
            self._fitted(hidden[steps], context[steps], known[steps], step, i)
            for i in range(self.spec.updates if len(steps) else 0)
        ]
        return {**self._said, **({"flow/loss": sum(losses) / len(losses)} if losses else {})}

    def _fitted(self, hidden: Tensor, context: Tensor, known: Tensor, step: int, update: int) -> float:
        """One update on the mean error at t = sigmoid(N(0, 1)) of the views that are `known` [n, C]; returns that."""
        counted = known.repeat_interleave(hidden.shape[1] // known.shape[1], 1)
        draw, total = torch_generator(self.seed, "flow fit", step, update), 0.0
        self.optimizer.zero_grad(set_to_none=True)
        for rows in chunks(len(hidden), ROWS):
            h = hidden[rows]
            noise, normal = (
                torch.randn((*h.shape[:-1], n), generator=draw, dtype=h.dtype).to(h.device) for n in (h.shape[-1], 1)
            )
            time = torch.sigmoid(normal)
            error = F.flow_error(self.net(F.noised(h, noise, time), time, context[rows]), h, noise)
            loss = error[counted[rows]].sum() / counted.sum()
            loss.backward()
            total += float(loss.detach())
        self.optimizer.step()
        return total


def _by_outcome(batch: Episodes, score: Tensor, known: Tensor) -> dict[str, float]:
    """Mean scores of right and of wrong rollouts, where there are any."""
    acted, said = batch.category("kind", "rollout"), {}
    for name, rows in (("right", acted & (batch["reward"] >= 1)), ("wrong", acted & (batch["reward"] < 1))):
        steps = batch.expand(rows) & known
        if bool(steps.any()):
            said[f"flow/score_{name}"] = float(score[steps].mean())
    return said
