"""Partial rollouts: slots whose answers are written a window of tokens a step, each window by the policy of its step.

A step no longer waits for its longest answer. An answer that is finished leaves its slot to the next prompt; one that is not
goes on in the next step, with a newer policy: every token remembers the log-prob under the policy that wrote it. A row of a
batch is a whole answer as far as it is written, with the columns

    current        step     bool   written in this step
    token_version  step     int64  optimiser step of the policy that wrote the token
    finished       episode  bool   at its end, or at the longest that is allowed; the reward of others is 0
    truncated      episode  bool   cut: by the window, or at the longest that is allowed

Worked example, windows of 2: a b | c d | e  is three rows in three steps: `a b` (not finished), `a b c d` with current
`0 0 1 1` (not finished), `a b c d e` with current `0 0 0 0 1` (finished, with its reward).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from unipo.episodes import Episodes
from unipo.sources.prompts import Prompt
from unipo.sources.text.encode import encode_prompt
from unipo.sources.text.sampler import Completion, Samples

COLUMNS = frozenset({"current", "finished", "token_version"})
KEPT = "unfinished"
"""The name under which a source remembers what goes on."""


class Scores(Protocol):
    """Rewards [n], rows [n] that have one, and the rewards' parts."""

    reward: Tensor
    kept: Tensor
    parts: Mapping[str, Tensor]


class Writes(Protocol):
    """What answers are written with: `Rollouts`."""

    sampler: Samples
    tokenizer: Any
    seed: int
    position: int
    tokens_sampled: int
    dropped: Counter[str]
    kept: dict[str, Episodes]

    def prompt_at(self, number: int, step: int) -> Prompt: ...

    def scored(self, prompts: Sequence[Prompt], tokens: Sequence[Sequence[int]]) -> Any: ...


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer as far as it is written: `number` is its place in the stream of answers, `begun` its first step."""

    number: int
    begun: int
    tokens: tuple[int, ...] = ()
    logp: tuple[float, ...] = ()
    version: tuple[int, ...] = ()

    def longer(self, made: Completion, version: int) -> Answer:
        versions = (*self.version, *[version] * len(made.tokens))
        return replace(self, tokens=(*self.tokens, *made.tokens), logp=(*self.logp, *made.logp), version=versions)


def next_windows(source: Writes, count: int, group: int, share: float, step: int, version: int
                 ) -> tuple[Episodes, dict[int, Prompt]]:  # fmt: skip
    """The next window, `share` of the longest answer, in each of `count` slots: their rows, and their prompts by id.

    Each prompt of the stream is answered `group` times. `source.position` counts answers that were begun. Answers whose
    reward could not be computed are left out, and their slots are free.
    """
    before = answers_of(source.kept.pop(KEPT, None))
    new = range(source.position, source.position + count - len(before))
    before, source.position = [*before, *(Answer(number, step) for number in new)], new.stop
    prompts = [source.prompt_at(a.number // group, a.begun) for a in before]
    longest = source.sampler.settings.max_tokens
    window = max(1, round(share * longest))
    made = source.sampler.sample(
        [[*encode_prompt(source.tokenizer, p.text), *a.tokens] for p, a in zip(prompts, before, strict=True)],
        _keys(prompts, source.seed, step), [min(window, longest - len(a.tokens)) for a in before],
    )  # fmt: skip
    source.tokens_sampled += sum(len(m.tokens) for m in made)
    answers = [a.longer(m, version) for a, m in zip(before, made, strict=True)]
    cut = torch.tensor([m.truncated for m in made], dtype=torch.bool)
    finished = ~cut | torch.tensor([len(a.tokens) >= longest for a in answers], dtype=torch.bool)
    _remember(source, [a for a, done in zip(answers, finished.tolist(), strict=True) if not done])
    rows = _rows(source, prompts, answers, finished, version)
    fresh = rows.expand(rows.lengths() - torch.tensor([len(m.tokens) for m in made]))
    rows = rows.with_columns("step", current=rows.position() >= fresh).with_columns("episode", truncated=cut)
    unscored = rows["reward"].isnan()
    source.dropped["no reward"] += int(unscored.sum())
    return rows.select(~unscored), {p.id: p for p in prompts}


def _keys(prompts: Sequence[Prompt], seed: int, step: int) -> Tensor:
    """[n, 4]: what the draw of each window depends on, as for whole answers: seed, step, prompt, and the how manieth of it."""
    seen, rows = Counter[int](), []
    for prompt in prompts:
        rows.append([seed, step, prompt.id, seen[prompt.id]])
        seen[prompt.id] += 1
    return torch.tensor(rows, dtype=torch.long).reshape(len(prompts), 4)


def _rows(
    source: Writes, prompts: Sequence[Prompt], answers: Sequence[Answer], finished: Tensor, version: int
) -> Episodes:
    """Answers as rollouts: the reward of a finished one (NaN where there is none), 0 of the others."""
    done = finished.nonzero().squeeze(1)
    reward, parts = torch.zeros(len(answers), dtype=torch.float64), dict[str, Tensor]()
    if len(done):
        scores: Scores = source.scored([prompts[i] for i in done], [answers[i].tokens for i in done])
        reward[done] = torch.where(scores.kept, scores.reward.double(), torch.nan)
        for name, part in scores.parts.items():
            parts[f"reward.{name}"] = torch.full_like(reward, torch.nan).index_put((done,), part.double())
    identity = [p.id for p in prompts]
    group = torch.unique_consecutive(torch.tensor(identity), return_inverse=True)[1]
    made = Episodes.build(
        [a.tokens for a in answers], [encode_prompt(source.tokenizer, p.text) for p in prompts], group.tolist(),
        behavior_logp=[a.logp for a in answers], token_version=[a.version for a in answers],
        kind=["rollout"] * len(answers), prompt_id=identity, policy_version=[version] * len(answers),
    )  # fmt: skip
    return made.with_columns("episode", reward=reward, finished=finished, **parts)


def _remember(source: Writes, answers: Sequence[Answer]) -> None:
    if answers:
        source.kept[KEPT] = Episodes.build(
            [a.tokens for a in answers], behavior_logp=[a.logp for a in answers],
            token_version=[a.version for a in answers], number=[a.number for a in answers],
            begun=[a.begun for a in answers],
        )  # fmt: skip


def answers_of(kept: Episodes | None) -> list[Answer]:
    """The answers that a source has remembered, in the order of their slots."""
    if kept is None:
        return []
    parts = (kept[name].split(kept.lengths().tolist()) for name in ("token", "behavior_logp", "token_version"))
    rows = zip(kept["number"].tolist(), kept["begun"].tolist(), *parts, strict=True)
    return [Answer(n, b, tuple(t.tolist()), tuple(x.tolist()), tuple(v.tolist())) for n, b, t, x, v in rows]
