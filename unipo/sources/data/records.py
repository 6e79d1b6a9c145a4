"""What a row of user data can be used for: typed records, and the reading of them from plain rows.

Each reader takes a plain row and a `Fault` to report what is wrong, and returns the record, or None after a fault.
Checking a data set and iterating over it are the same code: what passes the check is what a run receives.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np

from unipo.sources.data.cells import (
    ROUNDING,
    Fault,
    Prompt,
    asking,
    completion_cell,
    describe,
    messages_cell,
    numbers_cell,
    prefixed,
    prompt_cell,
    rest_of,
    text_cell,
)
from unipo.sources.data.preferences import (
    CONVERSATIONS,
    GROUP_COLUMNS,
    LabelRow,
    PairRow,
    RatedRow,
    read_label,
    read_pair,
    read_rated,
)
from unipo.sources.data.problems import Where, a_

LIST_COLUMNS = ("logprobs", "token_ids", "completion_ids", "prompt_ids")


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptRow:
    """A prompt to sample from. `columns`: every other column, as reward functions receive them."""

    prompt: Prompt
    columns: Mapping[str, Any]
    where: Where

    @property
    def answer(self) -> Any:
        """The reference answer: column `answer`, else `label` (unless that judges another answer: true or false), else None."""
        answer, label = self.columns.get("answer"), self.columns.get("label")
        return (None if isinstance(label, bool) else label) if answer is None else answer


@dataclass(frozen=True, slots=True, kw_only=True)
class DocumentRow:
    """Plain text, to be read on."""

    text: str
    columns: Mapping[str, Any]
    where: Where


@dataclass(frozen=True, slots=True, kw_only=True)
class DemonstrationRow:
    """A prompt and the completion to imitate (of chat `messages`: the last assistant turn)."""

    prompt: Prompt
    completion: str
    columns: Mapping[str, Any]
    where: Where


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RolloutRow:
    """A completion that some policy sampled, and its reward (finite).

    `token_ids` [T] and `prompt_ids` [P] int64, `logprobs` [T] float64, natural logarithms under the distribution that
    was sampled: None where the data has none. `policy_version`: -1 where unknown. `group`: identity of the prompt that
    samples share, None where unknown. `source`: "" where unknown.
    """

    prompt: Prompt
    completion: str
    reward: float
    logprobs: np.ndarray | None
    token_ids: np.ndarray | None
    prompt_ids: np.ndarray | None
    policy_version: int
    source: str
    group: str | int | None
    truncated: bool
    columns: Mapping[str, Any]
    where: Where


# ---- rows ----------------------------------------------------------------------------------------------------------
def read_prompt(row: Mapping[str, Any], where: Where, fault: Fault) -> PromptRow | None:
    prompt = prompt_cell(row, fault)
    if prompt is None:
        return None
    return PromptRow(prompt=prompt, columns=rest_of(row, "prompt", "messages"), where=where)


def read_document(row: Mapping[str, Any], where: Where, fault: Fault) -> DocumentRow | None:
    text = text_cell("text", row["text"], fault)
    return None if text is None else DocumentRow(text=text, columns=rest_of(row, "text"), where=where)


def read_demonstration(row: Mapping[str, Any], where: Where, fault: Fault) -> DemonstrationRow | None:
    """`prompt` + `completion`, or `messages` that end with an assistant turn (the part that is imitated)."""
    if "prompt" in row and "completion" in row:
        prompt, completion = prompt_cell(row, fault), completion_cell("completion", row["completion"], fault)
    else:
        messages = messages_cell("messages", row.get("messages"), fault)
        if messages is None:
            return None
        if messages[-1]["role"] != "assistant":
            found = f"the messages end with the role {messages[-1]['role']!r}"
            fault("messages", found, "end a demonstration with the assistant's message")
            return None
        prompt = asking("messages", messages[:-1], fault)
        completion = text_cell("messages", messages[-1]["content"], prefixed(fault, "the last assistant message is "))
    if prompt is None or completion is None:
        return None
    columns = rest_of(row, "prompt", "completion", "messages")
    return DemonstrationRow(prompt=prompt, completion=completion, columns=columns, where=where)


def read_rollout(row: Mapping[str, Any], where: Where, fault: Fault) -> RolloutRow | None:
    prompt, reward = prompt_cell(row, fault), _reward(row["reward"], fault)
    logprobs, tokens, prompt_ids = _token_columns(row, fault)
    completion: str | None = row["completion"]
    if completion != "" or tokens is None or not len(tokens):  # a policy may stop at once: its tokens say so
        completion = completion_cell("completion", completion, fault)
    version, truncated = row.get("policy_version"), row.get("truncated")
    if version is not None and not (type(version) in (int, float) and version % 1 == 0 and version >= -1):
        fault("policy_version", describe(version), "write the optimiser step as a whole number, -1 where unknown")
        return None
    if not isinstance(truncated, bool | None):
        fault("truncated", f"{describe(truncated)} where true or false was expected", "write true or false")
        return None
    column = next((name for name in GROUP_COLUMNS if row.get(name) is not None), None)
    group = None if column is None else row[column]
    if column is not None and not isinstance(group, str | int):
        fault(column, f"{describe(group)} where text or a whole number was expected", "name the group, or number it")
        return None
    if prompt is None or completion is None or reward is None:
        return None
    used = ("prompt", "messages", "completion", "reward", "policy_version", "source", "truncated")
    return RolloutRow(prompt=prompt, completion=completion, reward=reward, logprobs=logprobs, token_ids=tokens,
                      prompt_ids=prompt_ids, policy_version=-1 if version is None else int(version),
                      source=str(row.get("source") or ""), group=group, truncated=bool(truncated),
                      columns=rest_of(row, *used, *LIST_COLUMNS, *GROUP_COLUMNS), where=where)  # fmt: skip


def _reward(value: Any, fault: Fault) -> float | None:
    if isinstance(value, int | float) and math.isfinite(value):
        return float(value)
    found = str(value) if isinstance(value, float) else describe(value)
    fault("reward", f"{found} where a finite number was expected", "score the row again, or remove it")
    return None


def _token_columns(row: Mapping[str, Any], fault: Fault) -> tuple[np.ndarray | None, ...]:
    """(logprobs, token_ids, prompt_ids), each checked."""
    logprobs = numbers_cell(row, "logprobs", np.float64, fault)
    ids = "token_ids" if row.get("token_ids") is not None else "completion_ids"
    tokens, prompt_ids = (numbers_cell(row, name, np.int64, fault) for name in (ids, "prompt_ids"))
    for column, values in ((ids, tokens), ("prompt_ids", prompt_ids)):
        if values is not None and (values < 0).any():
            fault(column, f"a negative token id ({values.min()})", "write the ids that the tokenizer gave")
    if logprobs is None:
        return None, tokens, prompt_ids
    if tokens is not None and len(logprobs) != len(tokens):
        found = f"{len(logprobs)} log-probs for {len(tokens)} token ids"
        fault("logprobs", found, "give one log-prob per sampled token, the end token included in both or neither")
    bad = np.flatnonzero(~(np.isfinite(logprobs) & (logprobs <= ROUNDING)))
    if len(bad):
        found = f"token {bad[0] + 1} has log-prob {logprobs[bad[0]]:g}" + (
            f" ({len(bad)} such)" if len(bad) > 1 else ""
        )
        fault("logprobs", found, "log-probs are finite and at most 0: were probabilities, or a mask value, saved?")
    return logprobs, tokens, prompt_ids


# ---- kinds ---------------------------------------------------------------------------------------------------------
T = TypeVar("T", bound="PromptRow | DocumentRow | DemonstrationRow | PairRow | RatedRow | LabelRow | RolloutRow")


@dataclass(frozen=True, slots=True)
class Kind(Generic[T]):
    """A use of data: the sets of columns that allow it (any one set), and the reader of its rows."""

    name: str
    needs: tuple[tuple[str, ...], ...]
    read: Callable[[Mapping[str, Any], Where, Fault], T | None]

    def missing(self, columns: Mapping[str, str]) -> str:
        """What these columns (name -> family) lack for this use; "" when nothing."""
        if self.name == "labels" and columns.get("label", "boolean") != "boolean":
            return f"column 'label' is {a_(columns['label'])}, it should be true or false"
        sets = [s for s in self.needs if s != CONVERSATIONS or {columns.get(c) for c in s} <= {"list", None}]
        absent = min(([c for c in s if c not in columns] for s in sets), key=len)
        if not absent:
            return ""
        hints = [f"column {c!r}" + (f" (is {near!r} meant?)" if (near := nearest(c, columns)) else "") for c in absent]
        return "no " + ", no ".join(hints)


PROMPTS = Kind("prompts", (("prompt",), ("messages",)), read_prompt)
DOCUMENTS = Kind("documents", (("text",),), read_document)
DEMONSTRATIONS = Kind("demonstrations", (("prompt", "completion"), ("messages",)), read_demonstration)
PAIRS = Kind("pairs", (("prompt", *CONVERSATIONS), ("messages", *CONVERSATIONS), CONVERSATIONS,
                       ("prompt", "completions", "ratings"), ("prompt", "completions", "ranking")), read_pair)  # fmt: skip
RATINGS = Kind("ratings", (("prompt", "completion", "rating"),), read_rated)
LABELS = Kind("labels", (("prompt", "completion", "label"),), read_label)
ROLLOUTS = Kind("rollouts", (("prompt", "completion", "reward"),), read_rollout)
KINDS: dict[str, Kind[Any]] = {
    k.name: k for k in (PROMPTS, DEMONSTRATIONS, PAIRS, RATINGS, LABELS, ROLLOUTS, DOCUMENTS)
}

_ALSO_CALLED = {
    "prompt": ("question", "problem", "instruction", "query", "input", "context"),
    "completion": ("response", "output", "answer", "solution", "generation"),
    "messages": ("conversations", "conversation", "chat", "dialogue"),
    "chosen": ("preferred", "winner", "better", "response_chosen"),
    "rejected": ("dispreferred", "loser", "worse", "response_rejected"),
    "reward": ("score", "rewards", "return"),
    "label": ("labels", "is_correct", "good"),
    "completions": ("responses", "answers", "generations", "candidates"),
    "ratings": ("scores", "rewards", "overall_scores"),
    "ranking": ("ranks", "rank", "order"),
}


def nearest(wanted: str, columns: Mapping[str, str]) -> str:
    """The column that was probably meant by `wanted`: a near spelling, else a usual synonym, else ""."""
    folded = {c.lower(): c for c in columns}
    close = difflib.get_close_matches(wanted, folded, n=1, cutoff=0.7)
    names = [*close, *(c for c in _ALSO_CALLED.get(wanted, ()) if c in folded)]
    return next((folded[n] for n in names if folded[n] not in _ALSO_CALLED), "")
