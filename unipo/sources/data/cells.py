"""The cells of a row of user data: text, chat messages and lists of numbers, with what is wrong in them told to a `Fault`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from unipo.sources.data.problems import FAMILY, a_

Message = dict[str, Any]
Prompt = str | list[Message]
Fault = Callable[[str, str, str], None]  # column, found, remedy
ROLES = ("system", "developer", "user", "assistant", "tool")
ROUNDING = 1e-5
"""A log-prob may exceed 0 by this much: float32 rounding of log_softmax."""


def describe(value: Any) -> str:
    """What a value is, in words: "a number (3)"."""
    if value is None:
        return "missing"
    family = "bytes" if isinstance(value, bytes) else FAMILY.get(type(value), type(value).__name__)
    shown = repr(value)
    return f"{a_(family)} ({shown if len(shown) <= 30 else shown[:27] + '...'})"


def text_cell(column: str, value: Any, fault: Fault) -> str | None:
    if isinstance(value, str) and value.strip():
        return value
    if value is None or isinstance(value, str):
        fault(column, "empty" if isinstance(value, str) else "missing", "fill it in, or remove the row")
    else:
        fault(column, f"{describe(value)} where text was expected", "write it as text, in quotes")
    return None


def messages_cell(column: str, value: Any, fault: Fault) -> list[Message] | None:
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


def asking(column: str, messages: list[Message], fault: Fault) -> list[Message] | None:
    """`messages` when the next word is the assistant's."""
    if messages and messages[-1]["role"] in ("user", "tool"):
        return messages
    found = (
        f"the messages end with the role {messages[-1]['role']!r}" if messages else "nothing comes before the answer"
    )
    fault(column, found, "end a prompt with a user (or tool) message, and put the answer in column 'completion'")
    return None


def prompt_cell(row: Mapping[str, Any], fault: Fault) -> Prompt | None:
    """Column `prompt` (text or messages), else `messages` up to a last assistant turn."""
    if "prompt" in row:
        if not isinstance(row["prompt"], list):
            return text_cell("prompt", row["prompt"], fault)
        messages = messages_cell("prompt", row["prompt"], fault)
        return None if messages is None else asking("prompt", messages, fault)
    messages = messages_cell("messages", row.get("messages"), fault)
    if messages is None:
        return None
    return asking("messages", messages[:-1] if messages[-1]["role"] == "assistant" else messages, fault)


def completion_cell(column: str, value: Any, fault: Fault) -> str | None:
    """Text, or the one assistant message that holds it."""
    if not isinstance(value, list):
        return text_cell(column, value, fault)
    messages = messages_cell(column, value, fault)
    if messages is None:
        return None
    if len(messages) == 1 and messages[0]["role"] == "assistant":
        return text_cell(column, messages[0]["content"], fault)
    found = f"{len(messages)} messages with the roles {', '.join(m['role'] for m in messages)}"
    fault(column, found, "a completion is text or one assistant message: put what comes before it in the prompt")
    return None


def numbers_cell(row: Mapping[str, Any], column: str, dtype: type[np.generic], fault: Fault) -> np.ndarray | None:
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


def rest_of(row: Mapping[str, Any], *used: str) -> dict[str, Any]:
    return {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in row.items() if k not in used}


def prefixed(fault: Fault, prefix: str) -> Fault:
    return lambda column, found, remedy: fault(column, prefix + found, remedy)
