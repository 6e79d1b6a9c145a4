"""Plain text as tasks: a segment is hidden, the policy writes it, what really stands there is the reference.

    asr   s_1 ... s_{i-1}                 -> s_i        next segment (autoregressive)
    msr   s_1 ... s_{i-1} _ s_{i+1}       -> s_i        the masked segment in the middle

`derivations` is an embedded corpus: documents of sums that follow a rule, such as `3+7=10;10*2=20;20+7=27;`, a tenth of whose
results are wrong.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from unipo.rewards.graded import Prefix
from unipo.tasks.base import Draft, GeneratedTask, Problem

TASKS_OF_A_CORPUS = ("asr", "msr")
SEGMENT_END = re.compile(r"(?<=[.!?;])\s+|\n+")
REFERENCE_SEGMENTS = 3
"""A prediction may run over the end of its segment: it is judged against so many."""


@dataclass(frozen=True, slots=True)
class Hidden:
    """A segment to be written: its `task`, what stands before it and (msr) after it, the `target`, and the text that begins
    with it, `reference`."""

    task: str
    before: str
    after: str
    target: str
    reference: str


def segments(text: str, end: re.Pattern[str] = SEGMENT_END) -> list[str]:
    """The sentences (or other pieces, which stop at `end`) of a document."""
    return [part.strip() for part in end.split(text) if part and part.strip()]


def hidden_segments(
    parts: Sequence[str], shortest: int = 1, glue: str = " ", window: int = 1 << 30
) -> Iterator[Hidden]:
    """Both tasks about every segment that has one before and one after it and at least `shortest` characters.

    At most `window` segments stand before it.
    """
    for i in range(1, len(parts) - 1):
        if len(parts[i]) < shortest:
            continue
        before, reference = glue.join(parts[max(0, i - window) : i]), glue.join(parts[i : i + REFERENCE_SEGMENTS])
        yield Hidden("asr", before, "", parts[i], reference)
        yield Hidden("msr", before, parts[i + 1], parts[i], reference)


# ---- the embedded corpus ---------------------------------------------------------------------------------------------
NOISE = 0.1
"""Share of results in a document that are wrong; it goes on from them."""
MODULUS = 100


def document(random: Random, rule: Sequence[tuple[str, int]], start: int, length: int) -> list[str]:
    """`length` segments `a+b=c;` from `start`, their operations in turn from the `rule`."""
    value, written = start, []
    for i in range(length):
        operator, operand = rule[i % len(rule)]
        result = (value + operand if operator == "+" else value * operand) % MODULUS
        result = (result + 1) % MODULUS if random.random() < NOISE else result
        written.append(f"{value}{operator}{operand}={result};")
        value = result
    return written


def _draw(random: Random, level: int) -> Draft:
    """A segment is hidden where the whole rule stands before it."""
    rule, start = [(random.choice("+*"), random.randint(2, 9)) for _ in range(level)], random.randint(1, 30)
    written = document(random, rule, start, level + 4)
    hidden = random.choice([h for h in hidden_segments(written, glue="") if h.before.count(";") >= level])
    columns = {"task": hidden.task, "reference": hidden.reference, "before": hidden.before}
    gap = f"_{hidden.after}" if hidden.task == "msr" else ""
    return Draft(prompt=f"{hidden.before}{gap}>", answer=hidden.target, canonical=f"{start} {rule}", columns=columns)


def _steps(problem: Problem) -> str:
    """The segment before, whose result is the start of the next."""
    return str(problem.columns["before"]).rstrip(";").rpartition(";")[2]


def _mistake(problem: Problem, random: Random) -> str:
    """Off by one, or the segment before copied."""
    left, _, right = problem.answer.rstrip(";").partition("=")
    return f"{left}={int(right) + random.choice((-1, 1))};" if random.random() < 0.7 else f"{_steps(problem)};"


JUDGE = Prefix(share=1.0)
"""The whole segment is asked for: its left side alone is a prefix too, and needs no arithmetic."""


def _verify(answer: str, columns: Mapping[str, Any]) -> bool:
    return JUDGE.value(answer, columns["reference"], columns["answer"]) == 1.0


DERIVATIONS = GeneratedTask(
    name="derivations",
    description="Write the next or the masked segment of a chain of sums, of a rule of level operations: 3+7=10;10+7=17;>",
    all_levels=(1, 2, 3),
    levels=(1,),
    draw=_draw,
    steps=_steps,
    mistake=_mistake,
    verify=_verify,
    budget=lambda level: 20,
)
