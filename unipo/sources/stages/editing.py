"""Answers of the policy that somebody corrects: an answer and what was made of it are a preference.

    editor      file.py:function, called with (prompts, answers, **columns of the data); it returns for each answer None where
                there is nothing to correct, the corrected text, or {"completion": text, "severity": 2, "misread": True}
    Corrected   a stage for `RolloutSpec.augment`: pairs of an answer of the policy and its correction (column `made`: edited),
                and of the answer and the prompt's demonstration (given)
    EditViews   what the losses on such pairs read besides: how much each token counts, and the pairs read behind a masked prompt

Severity is 1 (worst) to 4 (slight): one number, or one for each stretch that was changed, in order. A changed token counts
1 + (4 - severity) / 2, others 1 (OPA-DPO, arXiv 2501.09695). Misread: the mistake is about what the prompt says.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import SequenceMatcher
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from unipo.episodes import Episodes
from unipo.rewards import RewardError, resolve_reward
from unipo.sources.companions.companion import Companion, CompanionSpec, torch_generator
from unipo.sources.prompts import Prompt
from unipo.sources.stages.augment import Augment, Drawn
from unipo.sources.stages.preferences import Answers
from unipo.sources.text.encode import encode_completion, encode_prompt

Editor = Callable[..., Any]
EDITED, GIVEN = "edited", "given"
NOBODY = "demonstration"
"""In the place of an editor: answers are compared with the prompts' demonstrations alone."""
WEIGHTS = ("edit_weight", "context_weight")
SLIGHT = 4.0
"""The severity at which a changed token counts as much as any other."""


# ---- what was changed --------------------------------------------------------------------------------------------------
def stretches(before: Sequence[int], after: Sequence[int]) -> tuple[list[int], list[int], int]:
    """For each token of two texts the number of the changed stretch that it is in, -1 where it was kept; how many there are."""
    first, second, count = [-1] * len(before), [-1] * len(after), 0
    for kind, a, b, c, d in SequenceMatcher(None, before, after, autojunk=False).get_opcodes():
        if kind != "equal":
            first[a:b], second[c:d] = [count] * (b - a), [count] * (d - c)
            count += 1
    return first, second, count


def counted(stretch: Sequence[int], weight: Sequence[float]) -> list[float]:
    """What each token counts: 1 where it was kept, else the weight of its stretch."""
    return [1.0 if i < 0 else weight[i] for i in stretch]


@dataclass(frozen=True, slots=True)
class Edit:
    """What an editor made of an answer: tokens, severities (one, or one for each changed stretch), whether it was misread."""

    tokens: Sequence[int]
    severity: tuple[float, ...] = (SLIGHT,)
    misread: bool = False

    def weights(self, before: Sequence[int], focus: float) -> tuple[list[list[float]], list[list[float]]]:
        """Of the corrected text and of the one before: what each token counts among answers, and behind a masked prompt.

        Raises RewardError where there are several severities, and another number of changed stretches.
        """
        first, second, n = stretches(before, self.tokens)
        if len(self.severity) not in (1, n):
            raise RewardError(
                f"the editor gave {len(self.severity)} severities for {n} changed stretches: give one number, or one for each"
            )
        severity = self.severity * n if len(self.severity) == 1 else self.severity
        weight = [1.0 + (SLIGHT - s) / 2.0 for s in severity]
        read = [focus if self.misread else 1.0] * n
        return [counted(s, weight) for s in (second, first)], [counted(s, read) for s in (second, first)]


def edit_of(found: Any, tokenizer: Any, answer: str) -> Edit | None:
    """What an editor returned for an answer; None where it left it as it is. Raises RewardError for anything else."""
    record = {"completion": found} if isinstance(found, str) else found
    if record is None:
        return None
    if not isinstance(record, Mapping) or not isinstance(record.get("completion"), str):
        raise RewardError(
            f"the editor returned {found!r} for the answer {answer[:60]!r}: expected None, the corrected text, or a mapping with "
            "'completion', and if wanted 'severity' and 'misread'"
        )
    raw = record.get("severity", SLIGHT)
    severity = tuple(float(s) for s in raw) if isinstance(raw, Sequence) else (float(raw),)
    if not severity or any(not 1.0 <= s <= SLIGHT for s in severity):
        raise RewardError(
            f"the editor gave the severity {raw!r} for {answer[:60]!r}: expected numbers from 1 (worst) to 4"
        )
    if record["completion"].strip() == answer.strip():
        return None
    return Edit(encode_completion(tokenizer, record["completion"]), severity, bool(record.get("misread", False)))


# ---- pairs of answers and their corrections ----------------------------------------------------------------------------
@dataclass(frozen=True)
class Corrected(Augment):
    """Groups of two, of kind "pair": a correction or the prompt's demonstration, and the answer.

    They take the place of the groups, or with `keep` join them. An answer that the editor leaves alone has no correction; one
    that is the demonstration itself is not paired with it. If nothing is left, the first group stays as it is. `focus`: what
    a changed token of a misread answer counts behind a masked prompt. Corrections are rewarded as answers are.
    """

    filtered: ClassVar[bool] = True
    single: ClassVar[bool] = True
    provides: ClassVar[str] = "pair"
    columns: ClassVar[frozenset[str]] = frozenset({"made", "edit_weight", "context_weight"})

    editor: str | Editor
    focus: float = 3.0
    keep: bool = False

    def beside(self) -> Corrected:
        return replace(self, keep=True)

    def lacks(self, prompt: Prompt) -> str:
        missing = self.editor == NOBODY and prompt.demonstration is None
        return "a column 'demonstration' (or 'completion') with a right answer" if missing else ""

    def __call__(self, groups: Episodes, drawn: Drawn) -> Episodes:
        answers = Answers.of(groups, drawn)
        texts = answers.texts(drawn)
        rows, names, edits = list[int](), list[str](), list[Edit]()
        for i, found in enumerate(self.edited(answers.prompts, texts)):
            given = answers.prompts[i].demonstration
            for name, text in ((EDITED, found), (GIVEN, given)):
                edit = edit_of(text, drawn.source.tokenizer, texts[i])
                if edit is not None:
                    rows, names, edits = [*rows, i], [*names, name], [*edits, edit]
        if not rows:
            blank = torch.zeros(len(groups), dtype=torch.bool)
            return (
                groups if self.keep else groups.with_columns("episode", chosen=blank).select(torch.tensor([0]), "group")
            )
        before = groups.select(torch.tensor(rows))
        after = self.rows([answers.prompts[i] for i in rows], edits, drawn)
        weights = [e.weights(answers.tokens[i], self.focus) for i, e in zip(rows, edits, strict=True)]
        flat = [[torch.tensor([x for w in weights for x in w[kind][side]]) for side in (0, 1)] for kind in (0, 1)]
        sides = [
            part.with_columns("step", edit_weight=flat[0][side], context_weight=flat[1][side]).with_columns(
                "episode", kind="pair", made=names, chosen=torch.full((len(rows),), side == 0)
            )
            for side, part in enumerate((after, before))
        ]
        made = Episodes.cat(sides).grouped(torch.arange(len(rows)).repeat(2))
        return Episodes.cat([groups, made]) if self.keep else made

    def edited(self, prompts: Sequence[Prompt], texts: Sequence[str]) -> Sequence[Any]:
        """What the editor says of answers [n]. Raises RewardError where it does not say something of each."""
        if self.editor == NOBODY:
            return [None] * len(texts)
        edit = _imported(self.editor) if isinstance(self.editor, str) else self.editor
        names = dict.fromkeys(name for p in prompts for name in p.columns)
        columns = {name: [p.columns.get(name) for p in prompts] for name in names}
        found = list(edit([p.text for p in prompts], list(texts), **columns))
        if len(found) != len(texts):
            raise RewardError(
                f"the editor returned {len(found)} values for {len(texts)} answers: expected one for each"
            )
        return found

    def rows(self, prompts: Sequence[Prompt], edits: Sequence[Edit], drawn: Drawn) -> Episodes:
        """Corrections [n] as episodes that no policy wrote, rewarded (NaN where that could not be computed)."""
        scored = drawn.source.scored(prompts, [e.tokens for e in edits])
        made = Episodes.build(
            [e.tokens for e in edits], [encode_prompt(drawn.source.tokenizer, p.text) for p in prompts],
            prompt_id=[p.id for p in prompts], policy_version=[-1] * len(edits), truncated=[False] * len(edits),
        )  # fmt: skip
        return made.with_columns("episode", reward=torch.where(scored.kept, scored.reward, torch.nan))


@lru_cache(maxsize=16)
def _imported(name: str) -> Editor:
    return resolve_reward(name)[1]


# ---- what the losses read besides --------------------------------------------------------------------------------------
@dataclass(frozen=True, kw_only=True)
class EditViews(CompanionSpec):
    """Token weights for pairs that came without them, and the chosen answers again behind a masked prompt.

    `severity`: of what differs between the two sides of a pair of the data. `masked`: this share of the prompt's tokens is
    replaced by tokens of the batch's prompts; those pairs (prompt, masked prompt) have kind "context". 0: the same prompt;
    negative: no such pairs.
    """

    columns: ClassVar[frozenset[str]] = frozenset({"made", "edit_weight", "context_weight"})

    severity: float = SLIGHT
    masked: float = 0.3

    def build(self, policy: Any, seed: int) -> Companion:
        return _Views(self, seed)


class _Views(Companion):
    """A companion without parameters."""

    def __init__(self, spec: EditViews, seed: int) -> None:
        self.name, self.module = "edit_views", nn.Identity()
        self.spec, self.seed = spec, seed

    def annotate(self, batch: Episodes, step: int) -> Episodes:
        batch = weighted_edits(batch, self.spec.severity)
        if self.spec.masked < 0:
            return batch
        shown = masked_pairs(batch, self.spec.masked, torch_generator(self.seed, "masked", step))
        return batch if shown is None else Episodes.cat([batch, shown])

    def save(self, folder: Path) -> None:
        return None

    def load(self, folder: Path) -> None:
        return None


def weighted_edits(batch: Episodes, severity: float) -> Episodes:
    """`made`, `edit_weight` and `context_weight` for the rows that have none: pairs of the data count as edited, with the
    column `severity` of the data where it is known."""
    if all(name in batch for name in (*WEIGHTS, "made")) and "" not in batch.column("made").names:
        known = {name: batch[name].nan_to_num(1.0) for name in WEIGHTS}
        return batch.with_columns("step", **known)
    blank = batch.with_columns(
        "step", **{n: torch.full((batch.count("step"),), torch.nan) for n in WEIGHTS if n not in batch}
    )
    weight, reading = (blank[name].clone() for name in WEIGHTS)
    unknown = batch.category("kind", "pair") & batch.reduce(weight.isnan(), how="any")
    first = torch.cumsum(batch.lengths("group", "episode"), 0) - batch.lengths("group", "episode")
    for after in first[(batch.lengths("group", "episode") == 2) & unknown[first]].tolist():
        own = float(batch["severity"][after]) if "severity" in batch else math.nan
        sides = [batch.step_index(torch.tensor([i])) for i in (after, after + 1)]
        edit = Edit(batch["token"][sides[0]].tolist(), (severity if math.isnan(own) else own,))
        for steps, found in zip(sides, edit.weights(batch["token"][sides[1]].tolist(), 1.0)[0], strict=True):
            weight[steps] = torch.tensor(found, dtype=weight.dtype)
    batch = batch.with_columns("step", edit_weight=weight.nan_to_num(1.0), context_weight=reading.nan_to_num(1.0))
    names = batch.column("made") if "made" in batch else None
    made = [names.names[i] or EDITED for i in names.values.tolist()] if names is not None else EDITED
    return batch.with_columns("episode", made=made)


def masked_pairs(batch: Episodes, share: float, generator: torch.Generator) -> Episodes | None:
    """The chosen answers of pairs twice, behind their prompt (chosen) and behind it with a `share` of its tokens replaced."""
    pair = batch.category("kind", "pair")
    chosen = (pair & batch["chosen"]).nonzero().squeeze(1) if "chosen" in batch else pair.nonzero().squeeze(1)[:0]
    if not len(chosen):
        return None
    known = {name for name, c in batch.columns.items() if c.level == "step" and c.values.is_floating_point()}
    shown = batch.select(chosen).without(*(known - {*WEIGHTS}))
    hidden = shown.with_context("score", replaced(shown, share, generator))
    sides = [
        part.with_columns("episode", kind="context", source="masked", chosen=torch.full((len(chosen),), first))
        for first, part in ((True, shown), (False, hidden))
    ]
    return Episodes.cat(sides).grouped(torch.arange(len(chosen)).repeat(2))


def replaced(episodes: Episodes, share: float, generator: torch.Generator) -> list[Tensor]:
    """Contexts of which each token is replaced with probability `share` by one of all contexts' tokens, drawn at random."""
    context = episodes.context("score")
    assert context.offsets is not None
    n = len(context.values)
    other = context.values[torch.randint(n, (n,), generator=generator)]
    tokens = torch.where(torch.rand(n, generator=generator) < share, other, context.values)
    return list(tokens.split(context.offsets.diff().tolist()))
