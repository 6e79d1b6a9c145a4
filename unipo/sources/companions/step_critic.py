"""A critic of prefixes that is fitted to success rates: one number per state that was completed, read at states that were not."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from unipo.episodes import Episodes
from unipo.functional.chunked import wide
from unipo.sources.companions.companion import features_of, seeded

LAST = (1.0,)
"""The layer that is read, as a share of the depth."""
Prefix = tuple[int, tuple[int, ...], tuple[int, ...]]
"""(prompt id, its tokens, tokens of the answer)"""


@dataclass(frozen=True)
class FittedCritic:
    """V of prefixes by a copy of the policy with a scalar head, read at the prefix's last token (arXiv 2412.18279, B).

        fitted to m(s), the share of completions behind s that were right:  - m log V(s) - (1 - m) log(1 - V(s))

    by `updates` steps of AdamW over all states at once, anew for every batch of states, so that nothing is kept over steps. A
    state without a token of the answer cannot be read, and is not fitted to.
    """

    updates: int = 100
    learning_rate: float = 1e-3

    def __call__(self, states: Sequence[Prefix], rates: Tensor, asked: Sequence[Prefix], policy: Any) -> Tensor:
        """[Q] float64 in (0, 1) of the prefixes `asked` [Q], fitted to `rates` [B] of `states` [B]; NaN if none can be read."""
        shown = [i for i, (_, _, written) in enumerate(states) if written]
        if not shown or not asked:
            return torch.full((len(asked),), torch.nan, dtype=torch.float64)
        rows, judge = read([states[i] for i in shown]), copy.deepcopy(policy)
        first = next(p for _, p in policy.named_parameters())
        with seeded("step critic"):
            head = nn.Linear(policy.width, 1, dtype=wide(first[:0]).dtype).to(first.device)
        body = judge if isinstance(judge, nn.Module) else judge.model
        optimizer = torch.optim.AdamW([*body.parameters(), *head.parameters()], lr=self.learning_rate)
        target = rates[torch.tensor(shown)].to(head.weight)
        with torch.enable_grad():
            for _ in range(self.updates):
                loss = nn.functional.binary_cross_entropy_with_logits(logits(judge, head, rows), target)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
        with torch.no_grad():
            return logits(judge, head, read(asked)).sigmoid().double().cpu()


def read(prefixes: Sequence[Prefix]) -> Episodes:
    """An episode per prefix, behind its prompt."""
    return Episodes.build([list(w) for _, _, w in prefixes], [list(c) for _, c, _ in prefixes])


def logits(judge: Any, head: nn.Linear, rows: Episodes) -> Tensor:
    """[E]: the head at the last step of each episode; differentiable."""
    hidden = wide(features_of(judge, rows, LAST))[:, 0].to(head.weight)
    return head(hidden[rows.lengths().cumsum(0) - 1]).squeeze(-1)
