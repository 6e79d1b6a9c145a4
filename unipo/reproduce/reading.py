"""A text of sums with mistakes, and questions about them: RLPT before RL with verifiable rewards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from unipo.methods.catalog import build
from unipo.reproduce.seeing import GROUP, PROMPTS_PER_STEP, Listed, SeeingPolicy, probabilities, rolled, shown
from unipo.reproduce.training import train
from unipo.rewards.graded import Prefix
from unipo.sources.keyed import keyed_generator
from unipo.sources.prompts import Prompt
from unipo.sources.rows import Rows
from unipo.tasks.tabular import TabularTask

GRPO, SFT = build("grpo", {}), build("sft", {})
BASE, OPERANDS = 3, 6
"""Results are written as two digits of base 3; operands are below 6."""
LABELLED_SUMS, COLD, COLD_STEPS, WRONG = 36, 0.25, 60, 0.2
Sum = tuple[int, int, int]


def result(case: Sum) -> int:
    """(operation, a, b): a + b, or a + 2 b + 4, modulo 9."""
    operation, a, b = case
    return (a + b if operation == 0 else a + 2 * b + 4) % BASE**2


def digits(value: int) -> str:
    return f"{value // BASE} {value % BASE}"


CASES: tuple[Sum, ...] = tuple((o, a, b) for o in range(2) for a in range(OPERANDS) for b in range(OPERANDS))


@dataclass(frozen=True)
class Text:
    """What is written: segments of sums, each of which occurs `COPIES` times, `WRONG` of them with a wrong result."""

    occurrences: tuple[tuple[Sum, int], ...]

    @classmethod
    def drawn(cls, seed: int, copies: int = 4) -> Text:
        random = keyed_generator(seed, "text")
        made = []
        for case in CASES * copies:
            wrong = int(random.integers(1, BASE**2)) if random.random() < WRONG else 0
            made.append((case, (result(case) + wrong) % BASE**2))
        return cls(tuple(made))


def reading_seen() -> Tensor:
    """[2 C + 9 C, F]: prompts by (reading, case, what is shown behind it); the last only of MSR."""
    rows = [(r, c, after) for r in (0, 2, 1) for c in range(len(CASES)) for after in range(BASE**2 if r == 1 else 1)]
    reading, case, after = torch.tensor(rows).unbind(1)
    parts = torch.tensor(CASES)[case]
    sizes = ((parts[:, 0], 2), (parts[:, 1], OPERANDS), (parts[:, 2], OPERANDS))
    behind = nn.functional.one_hot(after, BASE**2) * (reading == 1)[:, None]
    asked = 0.3 * nn.functional.one_hot(reading, 3)
    return torch.cat([asked, *(nn.functional.one_hot(x, n) for x, n in sizes), behind], 1).double()


SUMS = TabularTask(1, BASE, 2, lambda prompt, tokens: 0.0)


def row_of(reading: str, case: int, after: int = 0) -> int:
    first = {"asr": 0, "question": len(CASES), "msr": 2 * len(CASES)}[reading]
    return first + (case * BASE**2 + after if reading == "msr" else case)


def reading_trial(phases: Sequence[str], rate: float, seed: int, steps: int) -> Mapping[str, float]:
    """`phases`, an equal share of the steps each: rlpt and next token read the text, rlvr has `LABELLED_SUMS` questions."""
    order = keyed_generator(seed, "labelled").permutation(len(CASES)).tolist()
    labelled, held_out = order[:LABELLED_SUMS], order[LABELLED_SUMS:]
    questions = [Prompt(id=row_of("question", c), text=str(row_of("question", c)),
                        columns={"task": "question", "reference": digits(result(CASES[c]))}) for c in labelled]  # fmt: skip
    text = Text.drawn(seed).occurrences
    hidden = {r: [Prompt(id=len(CASES) * 100 + 2 * i + (r == "msr"), text=str(row_of(r, i % len(CASES), written)),
                         columns={"task": r, "reference": digits(written)}) for i, (_, written) in enumerate(text)]
              for r in ("asr", "msr")}  # fmt: skip
    policy = SeeingPolicy(reading_seen(), 2, BASE, seed)
    _cold_start(policy, questions, hidden["asr"], held_out, seed, min(COLD_STEPS, 3 * steps))
    draws = {
        "rlvr": rolled(SUMS, policy, Listed([questions], seed), judged_text, seed, 2 * PROMPTS_PER_STEP).draw,
        "rlpt": rolled(SUMS, policy, Listed(list(hidden.values()), seed), judged_text, seed, 2 * PROMPTS_PER_STEP).draw,
        "next token": Rows(shown(hidden["asr"], [str(p.columns["reference"]) for p in hidden["asr"]]),
                           2 * PROMPTS_PER_STEP * GROUP, seed).draw,
    }  # fmt: skip
    recipes = {"rlvr": GRPO, "rlpt": build("rlpt", {}), "next token": SFT}
    share = -(-steps // len(phases))
    train(tuple(recipes[p] for p in phases), policy, lambda step: draws[phases[step // share]](step, step), steps=steps,
          rate=rate)  # fmt: skip
    return reading_quality(policy, held_out)


def judged_text(answer: str, columns: Mapping[str, Any]) -> float:
    return Prefix(share=1.0).value(answer, columns["reference"], columns["reference"])


def _cold_start(policy: SeeingPolicy, questions: Sequence[Prompt], text: Sequence[Prompt], held_out: Sequence[int], seed: int,
                steps: int) -> None:  # fmt: skip
    """Supervised on the labelled questions, and the same number of segments, until `COLD` of other answers are right."""
    prompts = [*questions, *text[: len(questions)]]
    rows = Rows(shown(prompts, [str(p.columns["reference"]) for p in prompts]), len(prompts), seed)
    for _ in range(0, steps, 3):
        if reading_quality(policy, held_out)["pass@1"] >= COLD:
            return
        train((SFT,), policy, lambda step: rows.draw(step, step), steps=3, rate=0.01)


def reading_quality(policy: SeeingPolicy, held_out: Sequence[int]) -> dict[str, float]:
    """Exact, over questions without a label: pass@1 and pass@8."""
    p = probabilities(policy.at(reading_seen()[[row_of("question", c) for c in held_out]]), SUMS)
    right = torch.tensor([SUMS.sequences.index((result(CASES[c]) // BASE, result(CASES[c]) % BASE)) for c in held_out])
    solved = p.gather(1, right[:, None])
    return {"pass@1": float(solved.mean()), "pass@8": float((1 - (1 - solved) ** 8).mean())}
