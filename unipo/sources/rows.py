"""Fixed rows: demonstrations, comparisons and labelled answers, as endless keyed streams of groups."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from unipo.episodes import Episodes
from unipo.sources.data.preferences import Logp
from unipo.sources.keyed import shuffled
from unipo.sources.prompts import prompt_identity
from unipo.sources.text.encode import Message, encode_completion, encode_prompt

Text = str | Sequence[Message]


@dataclass
class Rows:
    """Draws `groups_per_step` groups a step from a fixed set, in a new keyed order every epoch.

    The column `draw` [E] counts the groups drawn so far: another number for the same row in every epoch. `notes`: what was
    done to the rows before the first draw, in words.
    """

    episodes: Episodes
    groups_per_step: int
    seed: int
    position: int = 0
    notes: list[str] = field(default_factory=list)

    def draw(self, step: int, version: int) -> Episodes:
        n = self.episodes.count("group")
        chosen = torch.tensor([shuffled(self.position + i, n, self.seed, "rows") for i in range(self.groups_per_step)])
        count = torch.repeat_interleave(self.episodes.lengths("group", "episode")[chosen])
        made = self.episodes.select(chosen, "group").grouped(count)  # one that comes twice in a row stays two groups
        made = made.with_columns("episode", draw=count + self.position)
        self.position += self.groups_per_step
        return made

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.position = int(state["position"])


def demonstration_episodes(tokenizer: Any, prompts: Sequence[Text], completions: Sequence[str]) -> Episodes:
    """Episodes of kind "demo": no behavior log-probs, no policy version."""
    return Episodes.build(
        [encode_completion(tokenizer, c) for c in completions],
        [encode_prompt(tokenizer, p) for p in prompts],
        kind=["demo"] * len(prompts), prompt_id=[prompt_identity(p) for p in prompts],
        policy_version=[-1] * len(prompts), truncated=[False] * len(prompts),
    )  # fmt: skip


def label_episodes(tokenizer: Any, prompts: Sequence[Text], completions: Sequence[str], labels: Sequence[bool],
                   reference_logps: Sequence[Logp | None] = ()) -> Episodes:  # fmt: skip
    """Episodes of kind "label", each a group of its own: `chosen` says whether the answer was judged good.

    `reference_logps` as for `pair_episodes`, one per answer.
    """
    made = demonstration_episodes(tokenizer, prompts, completions).with_columns(
        "episode", kind=["label"] * len(prompts), chosen=torch.tensor(list(labels), dtype=torch.bool)
    )
    return with_reference(made, reference_logps)


def pair_episodes(tokenizer: Any, prompts: Sequence[Text], chosen: Sequence[str | Sequence[str]],
                  rejected: Sequence[str | Sequence[str]], ratings: Sequence[Sequence[float]] = (),
                  reference_logps: Sequence[Sequence[Logp]] = (), **columns: Sequence[Any]) -> Episodes:  # fmt: skip
    """Episodes of kind "pair": a group per prompt, its chosen answers (one, or several equivalent ones) first.

    `ratings`, `reference_logps`: of each group's answers in that order, empty where unknown (`rating` [E] is then NaN, and
    `reference_logp` computed when it is asked for). `columns`: further numbers, one for each group.
    """
    sides = [[[a] if isinstance(a, str) else list(a) for a in side] for side in (chosen, rejected)]
    groups = [(*won, *lost) for won, lost in zip(*sides, strict=True)]
    owner = [i for i, group in enumerate(groups) for _ in group]
    contexts, n = [encode_prompt(tokenizer, p) for p in prompts], len(owner)
    identity = [prompt_identity(p) for p in prompts]
    known = [list(r) or [math.nan] * len(g) for r, g in zip(ratings or [()] * len(groups), groups, strict=True)]
    made = Episodes.build(
        [encode_completion(tokenizer, answer) for group in groups for answer in group], [contexts[i] for i in owner], owner,
        kind=["pair"] * n, chosen=[j < len(sides[0][i]) for i, group in enumerate(groups) for j in range(len(group))],
        prompt_id=[identity[i] for i in owner], policy_version=[-1] * n, truncated=[False] * n,
    )  # fmt: skip
    made = made.with_columns("episode", rating=torch.tensor([r for rs in known for r in rs], dtype=torch.float64))
    made = made.with_columns("episode", **{k: torch.as_tensor(v)[torch.tensor(owner)] for k, v in columns.items()})
    given = reference_logps or [()] * len(groups)
    logged: list[list[Logp | None]] = [[*r] if r else [None] * len(g) for r, g in zip(given, groups, strict=True)]
    return with_reference(made, [logp for logps in logged for logp in logps])


def with_reference(rows: Episodes, logps: Sequence[Logp | None]) -> Episodes:
    """`reference_logp` of every step: as it is given, a sum spread evenly over the steps, NaN for None.

    What depends on the sum alone, as nearly all losses on whole answers do, gets what it would get from the tokens' own.
    Raises ValueError where there is another number of them than of steps.
    """
    if all(logp is None for logp in logps):
        return rows
    spread: list[float] = []
    for logp, length in zip(logps, rows.lengths().tolist(), strict=True):
        if isinstance(logp, tuple) and len(logp) != length:
            raise ValueError(f"{len(logp)} log-probs of a reference for an answer of {length} tokens")
        spread += logp if isinstance(logp, tuple) else [math.nan if logp is None else logp / length] * length
    return rows.with_columns("step", reference_logp=torch.tensor(spread, dtype=torch.float32))
