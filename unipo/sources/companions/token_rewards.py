"""A reward of every token, learned beside the policy from outcomes alone (OREAL's token-level reward model)."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from unipo import functional as F
from unipo.episodes import Episodes, segment_reduce
from unipo.functional.chunked import wide
from unipo.sources.companions.companion import Companion, CompanionSpec, features_of, seeded

LAST = (1.0,)
"""The layer that is read, as a share of the depth."""


@dataclass(frozen=True, kw_only=True)
class TokenCredit(CompanionSpec):
    """Column `token_weight` [N]: how sure a copy of the policy with a scalar head is of the outcome when it has read so far.

    s_t of each token; the mean of a sequence is the logit of its outcome (binary cross-entropy, a reward above `threshold`
    is right). With c_t = sigmoid((1 / t) sum_{i <= t} s_i):

        weight = max(2 c_t - 1, 0) in right answers, max(1 - 2 c_t, 0) in wrong ones

    Steps under `mask` False are not read and have weight 0, and so have rows that are no rollouts.
    """

    columns: ClassVar[frozenset[str]] = frozenset({"token_weight"})
    learning_rate: float = 1e-4
    weight_decay: float = 0.01
    threshold: float = 0.5

    def build(self, policy: Any, seed: int) -> TokenCreditCompanion:
        return TokenCreditCompanion(self, policy, seed)


class TokenCreditCompanion(Companion):
    """The reward model of a `TokenCredit`: it starts as the policy that it is built for, its head at 0."""

    def __init__(self, spec: TokenCredit, policy: Any, seed: int) -> None:
        self.spec, self.judge = spec, copy.deepcopy(policy)
        first = next(p for _, p in policy.named_parameters())
        with seeded(seed, "token credit"):
            self.head = nn.Linear(policy.width, 1, dtype=wide(first[:0]).dtype).to(first.device)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        body = self.judge if isinstance(self.judge, nn.Module) else self.judge.model
        module = nn.ModuleDict({"body": body, "head": self.head})
        super().__init__("token_credit", module, spec.learning_rate, spec.weight_decay)

    def scores(self, batch: Episodes) -> Tensor:
        """s [N], differentiable in the reward model."""
        hidden = wide(features_of(self.judge, batch, LAST))
        return self.head(hidden[:, 0].to(self.head.weight.dtype)).squeeze(-1)

    def annotate(self, batch: Episodes, step: int) -> Episodes:
        rows, steps, counted = _read(batch)
        with torch.no_grad():
            score, index = self.scores(rows)[counted], rows.index("episode")[counted]
        sure = torch.sigmoid(F.running_mean(score, index))
        right = (rows["reward"] > self.spec.threshold)[index]
        weight = torch.where(right, 2 * sure - 1, 1 - 2 * sure).clamp(min=0.0)
        blank = torch.zeros(batch.count("step"), dtype=weight.dtype, device=batch.device)
        return batch.with_columns("step", token_weight=blank.index_put((steps[counted],), weight))

    def learn(self, batch: Episodes, step: int) -> Mapping[str, float]:
        rows, _, counted = _read(batch)
        if not len(rows):
            return {}
        logit = segment_reduce(self.scores(rows)[counted], rows.index("episode")[counted], len(rows), "mean")
        right = (rows["reward"] > self.spec.threshold).to(logit)
        loss = nn.functional.binary_cross_entropy_with_logits(logit, right)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        agreed = ((logit > 0) == (right > 0.5)).double().mean()
        return {"token_credit/loss": float(loss.detach()), "token_credit/accuracy": float(agreed)}


def _read(batch: Episodes) -> tuple[Episodes, Tensor, Tensor]:
    """Rollouts of which any step counts, where their steps are in the batch, and which of these count."""
    counted = batch.expand(batch.category("kind", "rollout"))
    counted = counted & batch["mask"] if "mask" in batch else counted
    rows = batch.reduce(counted, how="any").nonzero().squeeze(1)
    steps = batch.step_index(rows)
    return batch.select(rows), steps, counted[steps]
