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

from unipo.sources.data_problems import FAMILY, Where, a_

Message = dict[str, Any]
Prompt = str | list[Message]
Fault = Callable[[str, str, str], None]  # column, found, remedy
ROLES = ("system", "developer", "user", "assistant", "tool")
LIST_COLUMNS = ("logprobs", "token_ids", "completion_ids", "prompt_ids")
GROUP_COLUMNS = ("group", "group_id", "prompt_id")
ROUNDING = 1e-5  # a log-prob may exceed 0 by this much: float32 rounding of log_softmax


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptRow:
    """A prompt to sample from. `columns`: every other column, as reward functions receive them."""

    prompt: Prompt
    columns: Mapping[str, Any]
    where: Where

    @property
    def answer(self) -> Any:
        """The reference answer: column `answer`, else `label`, else None."""
        answer = self.columns.get("answer")
        return self.columns.get("label") if answer is None else answer


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


@dataclass(frozen=True, slots=True, kw_only=True)
class PairRow:
    """Completions of one prompt, `chosen` preferred to `rejected`; never equal.

    Most often one of either side; `also_chosen` and `also_rejected` hold the others of a row that lists several.
    """

    prompt: Prompt
    chosen: str
    rejected: str
    columns: Mapping[str, Any]
    where: Where
    also_chosen: tuple[str, ...] = ()
    also_rejected: tuple[str, ...] = ()

    @property
    def all_chosen(self) -> tuple[str, ...]:
        return (self.chosen, *self.also_chosen)

    @property
    def all_rejected(self) -> tuple[str, ...]:
        return (self.rejected, *self.also_rejected)


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelRow:
    """A completion that was judged on its own: `label` True is good."""

    prompt: Prompt
    completion: str
    label: bool
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


# ---- cells ---------------------------------------------------------------------------------------------------------
def describe(value: Any) -> str:
    """What a value is, in words: "a number (3)"."""
    if value is None:
        return "missing"
    family = "bytes" if isinstance(value, bytes) else FAMILY.get(type(value), type(value).__name__)
    shown = repr(value)
    return f"{a_(family)} ({shown if len(shown) <= 30 else shown[:27] + '...'})"


def _text(column: str, value: Any, fault: Fault) -> str | None:
    if isinstance(value, str) and value.strip():
        return value
    if value is None or isinstance(value, str):
        fault(column, "empty" if isinstance(value, str) else "missing", "fill it in, or remove the row")
    else:
        fault(column, f"{describe(value)} where text was expected", "write it as text, in quotes")
    return None


def _messages(column: str, value: Any, fault: Fault) -> list[Message] | None:
    """Chat messages without their empty fields, when every role and content is in order."""
    if not isinstance(value, list) or not value:
        found = "an empty list of messages" if value == [] else f"{describe(value)} where chat messages were expected"
        fault(column, found, 'write a list like [{"role": "user", "content": "..."}]')
        return None
    for i, message in enumerate(value, 1):
        wrong = _message_fault(i, message)
        if wrong is not None:
            fault(column, *wrong)
            return None
    return [{"role": m["role"], "content": None} | {k: v for k, v in m.items() if v is not None} for m in value]


def _message_fault(i: int, message: Any) -> tuple[str, str] | None:
    """(found, remedy) for the message in place `i` (from 1), None when it is in order."""
    if not isinstance(message, dict) or "role" not in message:
        keys = f"an object with {', '.join(map(repr, message))}" if isinstance(message, dict) else describe(message)
        remedy = "give each message a role and a content (ShareGPT: from -> role, value -> content, human -> user)"
        return f"message {i} is {keys}, without a role", remedy
    role, content = message["role"], message.get("content")
    if role not in ROLES:
        return f"message {i} has the role {role!r}", f"use one of {', '.join(ROLES)}"
    if role in ("system", "developer") and i > 1:
        return f"message {i} is a {role} message", "put it first, or give its text to a user message"
    if content is None and role == "assistant" and message.get("tool_calls"):
        return None
    if not isinstance(content, str):
        return f"message {i} ({role}) has a content that is {describe(content)}", "write the content as text"
    if not content.strip() and role == "user":
        return f"message {i} ({role}) has an empty content", "fill it in, or remove the row"
    return None


def _asks(column: str, messages: list[Message], fault: Fault) -> list[Message] | None:
    """`messages` when the next word is the assistant's."""
    if messages and messages[-1]["role"] in ("user", "tool"):
        return messages
    found = (
        f"the messages end with the role {messages[-1]['role']!r}" if messages else "nothing comes before the answer"
    )
    fault(column, found, "end a prompt with a user (or tool) message, and put the answer in column 'completion'")
    return None


def _prompt(row: Mapping[str, Any], fault: Fault) -> Prompt | None:
    """Column `prompt` (text or messages), else `messages` up to a last assistant turn."""
    if "prompt" in row:
        if not isinstance(row["prompt"], list):
            return _text("prompt", row["prompt"], fault)
        messages = _messages("prompt", row["prompt"], fault)
        return None if messages is None else _asks("prompt", messages, fault)
    messages = _messages("messages", row.get("messages"), fault)
    if messages is None:
        return None
    return _asks("messages", messages[:-1] if messages[-1]["role"] == "assistant" else messages, fault)


def _completion(column: str, value: Any, fault: Fault) -> str | None:
    """Text, or the one assistant message that holds it."""
    if not isinstance(value, list):
        return _text(column, value, fault)
    messages = _messages(column, value, fault)
    if messages is None:
        return None
    if len(messages) == 1 and messages[0]["role"] == "assistant":
        return _text(column, messages[0]["content"], fault)
    found = f"{len(messages)} messages with the roles {', '.join(m['role'] for m in messages)}"
    fault(column, found, "a completion is text or one assistant message: put what comes before it in the prompt")
    return None


def _numbers(row: Mapping[str, Any], column: str, dtype: type[np.generic], fault: Fault) -> np.ndarray | None:
    """A list of numbers as an array [T] of `dtype`; whole numbers may be written as 3.0 (Arrow widens mixed columns)."""
    value = row.get(column)
    if value is None:
        return None
    if isinstance(value, np.ndarray | list) and not len(value):
        return np.zeros(0, dtype)
    listed = isinstance(value, list) and all(type(v) in (int, float) for v in value)
    array = np.asarray(value if listed or isinstance(value, np.ndarray) else [None])
    if array.dtype.kind in "iuf" and (dtype is np.float64 or (array % 1 == 0).all()):
        return array.astype(dtype)
    what = "numbers" if dtype is np.float64 else "whole numbers"
    fault(column, f"not a list of {what}", f"write one of the {what} per token, as a list without gaps")
    return None


# ---- rows ----------------------------------------------------------------------------------------------------------
def _rest(row: Mapping[str, Any], *used: str) -> dict[str, Any]:
    return {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in row.items() if k not in used}


def read_prompt(row: Mapping[str, Any], where: Where, fault: Fault) -> PromptRow | None:
    prompt = _prompt(row, fault)
    if prompt is None:
        return None
    return PromptRow(prompt=prompt, columns=_rest(row, "prompt", "messages"), where=where)


def read_document(row: Mapping[str, Any], where: Where, fault: Fault) -> DocumentRow | None:
    text = _text("text", row["text"], fault)
    return None if text is None else DocumentRow(text=text, columns=_rest(row, "text"), where=where)


def read_demonstration(row: Mapping[str, Any], where: Where, fault: Fault) -> DemonstrationRow | None:
    """`prompt` + `completion`, or `messages` that end with an assistant turn (the part that is imitated)."""
    if "prompt" in row and "completion" in row:
        prompt, completion = _prompt(row, fault), _completion("completion", row["completion"], fault)
    else:
        messages = _messages("messages", row.get("messages"), fault)
        if messages is None:
            return None
        if messages[-1]["role"] != "assistant":
            found = f"the messages end with the role {messages[-1]['role']!r}"
            fault("messages", found, "end a demonstration with the assistant's message")
            return None
        prompt = _asks("messages", messages[:-1], fault)
        completion = _text("messages", messages[-1]["content"], _prefixed(fault, "the last assistant message is "))
    if prompt is None or completion is None:
        return None
    columns = _rest(row, "prompt", "completion", "messages")
    return DemonstrationRow(prompt=prompt, completion=completion, columns=columns, where=where)


def _prefixed(fault: Fault, prefix: str) -> Fault:
    return lambda column, found, remedy: fault(column, prefix + found, remedy)


def read_pair(row: Mapping[str, Any], where: Where, fault: Fault) -> PairRow | None:
    """`chosen` and `rejected` as completions of `prompt`, or as whole conversations that differ in the last message; where
    either is a list of texts, a group of equivalent answers."""
    if any(_texts(row[side]) for side in CONVERSATIONS):
        return _read_group(row, where, fault)
    if isinstance(row["chosen"], list) and isinstance(row["rejected"], list):
        prompt, chosen, rejected = _split_pair(row, fault)
    else:
        prompt = _prompt(row, fault)
        chosen, rejected = (_completion(side, row[side], fault) for side in ("chosen", "rejected"))
    if prompt is None or chosen is None or rejected is None:
        return None
    if chosen == rejected:
        fault("rejected", "the same as 'chosen'", "remove the row: it states no preference")
        return None
    columns = _rest(row, "prompt", "messages", "chosen", "rejected")
    return PairRow(prompt=prompt, chosen=chosen, rejected=rejected, columns=columns, where=where)


def _texts(value: Any) -> bool:
    return isinstance(value, list) and len(value) > 0 and isinstance(value[0], str)


def _read_group(row: Mapping[str, Any], where: Where, fault: Fault) -> PairRow | None:
    prompt, sides = _prompt(row, fault), []
    for side in CONVERSATIONS:
        answers = row[side] if isinstance(row[side], list) else [row[side]]
        sides.append(
            [
                _text(side, answer, _prefixed(fault, f"answer {i} of the list is "))
                for i, answer in enumerate(answers, 1)
            ]
        )
        if not answers:
            fault(side, "an empty list", "list at least one answer, or remove the row")
    chosen, rejected = ([a for a in side if a is not None] for side in sides)
    if prompt is None or not chosen or not rejected or None in [*sides[0], *sides[1]]:
        return None
    if set(chosen) & set(rejected):
        fault("rejected", "an answer that is also in 'chosen'", "remove it from one side: it states no preference")
        return None
    columns = _rest(row, "prompt", "messages", "chosen", "rejected")
    return PairRow(prompt=prompt, chosen=chosen[0], rejected=rejected[0], columns=columns, where=where,
                   also_chosen=tuple(chosen[1:]), also_rejected=tuple(rejected[1:]))  # fmt: skip


def _split_pair(row: Mapping[str, Any], fault: Fault) -> tuple[Prompt | None, str | None, str | None]:
    """Shared messages are the prompt, the last message of either side its completion."""
    chosen, rejected = (_messages(side, row[side], fault) for side in ("chosen", "rejected"))
    if chosen is None or rejected is None:
        return None, None, None
    shared = chosen[:-1]
    if shared != rejected[:-1]:
        differ = next((i for i, (a, b) in enumerate(zip(shared, rejected[:-1], strict=False)) if a != b),
                      min(len(chosen), len(rejected)) - 1)  # fmt: skip
        found = f"the conversation leaves that of 'chosen' at message {differ + 1}, before the last"
        fault("rejected", found, "the two sides may differ in their last message only: cut or split the row")
        return None, None, None
    given = row.get("prompt")
    if isinstance(given, str) and shared and all(given.strip() not in (m["content"] or "") for m in shared):
        fault("prompt", "not part of the messages that 'chosen' starts with", "drop the column, or correct it")
        return None, None, None
    prompt = _asks("chosen", shared, fault) if shared else _prompt(row, fault)
    return prompt, _completion("chosen", chosen[-1:], fault), _completion("rejected", rejected[-1:], fault)


def read_label(row: Mapping[str, Any], where: Where, fault: Fault) -> LabelRow | None:
    prompt, completion = _prompt(row, fault), _completion("completion", row["completion"], fault)
    label = row["label"]
    if not isinstance(label, bool):
        fault("label", f"{describe(label)} where true or false was expected", "write true (good) or false (bad)")
        return None
    if prompt is None or completion is None:
        return None
    columns = _rest(row, "prompt", "messages", "completion", "label")
    return LabelRow(prompt=prompt, completion=completion, label=label, columns=columns, where=where)


def read_rollout(row: Mapping[str, Any], where: Where, fault: Fault) -> RolloutRow | None:
    prompt, reward = _prompt(row, fault), _reward(row["reward"], fault)
    logprobs, tokens, prompt_ids = _token_columns(row, fault)
    completion: str | None = row["completion"]
    if completion != "" or tokens is None or not len(tokens):  # a policy may stop at once: its tokens say so
        completion = _completion("completion", completion, fault)
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
                      columns=_rest(row, *used, *LIST_COLUMNS, *GROUP_COLUMNS), where=where)  # fmt: skip


def _reward(value: Any, fault: Fault) -> float | None:
    if isinstance(value, int | float) and math.isfinite(value):
        return float(value)
    found = str(value) if isinstance(value, float) else describe(value)
    fault("reward", f"{found} where a finite number was expected", "score the row again, or remove it")
    return None


def _token_columns(row: Mapping[str, Any], fault: Fault) -> tuple[np.ndarray | None, ...]:
    """(logprobs, token_ids, prompt_ids), each checked."""
    logprobs = _numbers(row, "logprobs", np.float64, fault)
    ids = "token_ids" if row.get("token_ids") is not None else "completion_ids"
    tokens, prompt_ids = (_numbers(row, name, np.int64, fault) for name in (ids, "prompt_ids"))
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
T = TypeVar("T", bound="PromptRow | DocumentRow | DemonstrationRow | PairRow | LabelRow | RolloutRow")


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


CONVERSATIONS = ("chosen", "rejected")  # without a prompt column only where both are whole message lists
PROMPTS = Kind("prompts", (("prompt",), ("messages",)), read_prompt)
DOCUMENTS = Kind("documents", (("text",),), read_document)
DEMONSTRATIONS = Kind("demonstrations", (("prompt", "completion"), ("messages",)), read_demonstration)
PAIRS = Kind("pairs", (("prompt", *CONVERSATIONS), ("messages", *CONVERSATIONS), CONVERSATIONS), read_pair)
LABELS = Kind("labels", (("prompt", "completion", "label"),), read_label)
ROLLOUTS = Kind("rollouts", (("prompt", "completion", "reward"),), read_rollout)
KINDS: dict[str, Kind[Any]] = {k.name: k for k in (PROMPTS, DEMONSTRATIONS, PAIRS, LABELS, ROLLOUTS, DOCUMENTS)}

_ALSO_CALLED = {
    "prompt": ("question", "problem", "instruction", "query", "input", "context"),
    "completion": ("response", "output", "answer", "solution", "generation"),
    "messages": ("conversations", "conversation", "chat", "dialogue"),
    "chosen": ("preferred", "winner", "better", "response_chosen"),
    "rejected": ("dispreferred", "loser", "worse", "response_rejected"),
    "reward": ("score", "rewards", "return"),
    "label": ("labels", "is_correct", "good"),
}


def nearest(wanted: str, columns: Mapping[str, str]) -> str:
    """The column that was probably meant by `wanted`: a near spelling, else a usual synonym, else ""."""
    folded = {c.lower(): c for c in columns}
    close = difflib.get_close_matches(wanted, folded, n=1, cutoff=0.7)
    names = [*close, *(c for c in _ALSO_CALLED.get(wanted, ()) if c in folded)]
    return next((folded[n] for n in names if folded[n] not in _ALSO_CALLED), "")
