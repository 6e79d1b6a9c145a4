"""Columns that are computed and not logged: `reference_logp`, `old_value`, `next_q`, ..."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from unipo.episodes import Episodes
from unipo.learner.coefficients import per_step
from unipo.learner.player import Player
from unipo.objectives import Needs

OLD = "old"
MISMATCHED = "mismatched_"
COMPARED = ("label", "pair")


def annotate(episodes: Episodes, needs: Needs, policies: Mapping[str, Player], token_budget: int) -> Episodes:
    """Fill the columns `<who>_<signal>` that `needs` names, `who` being a key of `policies`, without a graph.

    Rows that already carry the number keep it (logged log-probs stand in for a reference model); only rows where it is
    absent or NaN are computed. All that is asked of one of `policies` is asked in one call. `<who>_mismatched_<signal>` is
    asked of labelled and compared answers behind the prompt of the group before theirs; NaN for other rows.
    """
    asked: dict[str, list[str]] = {}
    for column in sorted(needs.columns):
        who, _, signal = column.partition("_")
        if who in policies and signal:
            asked.setdefault(who, []).append(signal)
    for who, signals in asked.items():
        own = [name for name in signals if not name.startswith(MISMATCHED)]
        episodes = _filled(episodes, who, own, policies[who], token_budget) if own else episodes
        rest = [n for n in signals if n.startswith(MISMATCHED) and f"{who}_{n}" not in episodes]
        episodes = _mismatched(episodes, who, rest, policies[who], token_budget) if rest else episodes
    return episodes


def _mismatched(episodes: Episodes, who: str, names: list[str], policy: Player, token_budget: int) -> Episodes:
    """Signals of answers that do not fit: each is read behind the prompt of the group before its own, of the same kind."""
    signals = [name.removeprefix(MISMATCHED) for name in names]
    blank = episodes["token"].new_full((episodes.count("step"),), torch.nan, dtype=torch.get_default_dtype())
    found = dict.fromkeys(signals, blank)
    for kind in COMPARED:
        rows = episodes.category("kind", kind).nonzero().squeeze(1)
        if not len(rows):
            continue
        steps, values = (
            episodes.step_index(rows),
            emitted(elsewhere(episodes.select(rows)), signals, policy, token_budget),
        )
        found = {name: found[name].to(value).index_put((steps,), value) for name, value in values.items()}
    return episodes.with_columns("step", **{f"{who}_{MISMATCHED}{name}": value for name, value in found.items()})


def elsewhere(episodes: Episodes) -> Episodes:
    """The same answers, each behind the prompt of the group before its own (the first: of the last). One turn per episode."""
    context, group = episodes.context("score"), episodes.index("group", "episode")
    assert context.offsets is not None
    first = torch.searchsorted(group, torch.arange(episodes.count("group"), device=group.device))
    written = context.values.split(context.offsets.diff().tolist())
    return episodes.with_context("score", [written[i] for i in first.roll(1)[group].tolist()])


def _filled(episodes: Episodes, who: str, signals: list[str], policy: Player, token_budget: int) -> Episodes:
    if not any(f"{who}_{name}" in episodes for name in signals):
        values = emitted(episodes, signals, policy, token_budget)
        return episodes.with_columns("step", **{f"{who}_{name}": value for name, value in values.items()})
    missing = {name: _unknown(episodes, f"{who}_{name}") for name in signals}
    signals = [name for name, unknown in missing.items() if bool(unknown.any())]
    if not signals:
        return episodes
    rows = episodes.reduce(torch.stack([missing[n] for n in signals]).any(0), how="any").nonzero().squeeze(1)
    whole = len(rows) == len(episodes)
    part = episodes if whole else episodes.select(rows)
    steps: Tensor | slice = slice(None) if whole else episodes.step_index(rows)
    values, filled = emitted(part, signals, policy, token_budget), {}
    for name, value in values.items():
        column = f"{who}_{name}"
        if column not in episodes:
            have = value.new_full((episodes.count("step"), *value.shape[1:]), torch.nan)
        else:
            have = episodes[column].clone()
        unknown = missing[name][steps].reshape(-1, *[1] * (value.ndim - 1))
        have[steps] = torch.where(unknown, value.to(have.dtype), have[steps])
        filled[column] = have
    return episodes.with_columns("step", **filled)


def _unknown(episodes: Episodes, column: str) -> Tensor:
    """bool [N]: where a column has no number."""
    if column not in episodes:
        return torch.ones(episodes.count("step"), dtype=torch.bool, device=episodes.device)
    return per_step(episodes[column].isnan()).any(-1)


def emitted(episodes: Episodes, names: list[str], policy: Player, token_budget: int) -> dict[str, Tensor]:
    """Signals [N, ...] of all steps, micro-batch by micro-batch, without a graph."""
    values: dict[str, Tensor] = {}
    with torch.no_grad():
        split = episodes.split(token_budget, policy.total_lengths(episodes))
        if len(split) == 1:
            return policy.signals(episodes, names)
        for rows in split:
            part = policy.signals(episodes.select(rows), names)
            steps = episodes.step_index(rows)
            for name, value in part.items():
                full = values.setdefault(name, value.new_zeros((episodes.count("step"), *value.shape[1:])))
                full[steps] = value
    return values or {name: torch.zeros(0) for name in names}
