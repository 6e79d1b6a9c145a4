"""Columns that are computed and not logged: `reference_logp`, `teacher_logp`, `old_logp`, `old_value`."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from unipo.episodes import Episodes
from unipo.learner.player import Player
from unipo.objectives import Needs

OLD = "old"


def annotate(episodes: Episodes, needs: Needs, policies: Mapping[str, Player], token_budget: int) -> Episodes:
    """Fill the columns `<who>_<signal>` that `needs` names, `who` being a key of `policies`, without a graph.

    Rows that already carry the number keep it (logged log-probs stand in for a reference model); only rows where it is
    absent or NaN are computed.
    """
    for column in sorted(needs.columns):
        who, _, signal = column.partition("_")
        if who in policies and signal:
            episodes = _filled(episodes, column, signal, policies[who], token_budget)
    return episodes


def _filled(episodes: Episodes, column: str, signal: str, policy: Player, token_budget: int) -> Episodes:
    absent = torch.ones(episodes.count("step"), dtype=torch.bool, device=episodes.device)
    unknown = episodes[column].isnan() if column in episodes else absent
    missing = episodes.reduce(unknown, how="any").nonzero().squeeze(1)
    if not len(missing):
        return episodes
    values = emitted(episodes.select(missing), [signal], policy, token_budget)[signal]
    steps = episodes.step_index(missing)
    have = episodes[column] if column in episodes else values.new_full((len(absent),), torch.nan)
    fresh = torch.where(have[steps].isnan(), values.to(have.dtype), have[steps])
    return episodes.with_columns("step", **{column: have.index_put((steps,), fresh)})


def emitted(episodes: Episodes, names: list[str], policy: Player, token_budget: int) -> dict[str, Tensor]:
    """Signals [N] of all steps, micro-batch by micro-batch, without a graph."""
    values: dict[str, Tensor] = {}
    with torch.no_grad():
        for rows in episodes.split(token_budget, policy.total_lengths(episodes)):
            part = policy.signals(episodes.select(rows), names)
            steps = episodes.step_index(rows)
            for name, value in part.items():
                full = values.setdefault(name, value.new_zeros(episodes.count("step")))
                full[steps] = value
    return values or {name: torch.zeros(0) for name in names}
