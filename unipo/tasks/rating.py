"""`rating`: how damaged is a signal, and by what? Two tasks about the same row of digits, rewarded in parts.

    score 22822722=     3.2         task "score":   5 less the damage, right when nearer than 0.35
    damage 22822722=    noise 2     task "damage":  the kind of damage (0.25), and its severity from 1 to 3 (1)

A clean signal has eight digits: some of one low value, then one high value. Half of the reward is for the form of the answer.
"""

from __future__ import annotations

from collections.abc import Mapping
from random import Random
from typing import Any

from unipo.rewards.graded import Formatted, ForTask, Within, WordByWord
from unipo.tasks.base import Draft, GeneratedTask, Problem, same_text

WIDTH, TOLERANCE = 8, 0.35
DROP = {"noise": 0.9, "gaps": 1.2, "blur": 0.6, "stripes": 0.4}
"""What a step of severity takes off the score, by kind of damage."""
SEVERITIES = (1, 2, 3)
FORMS = {"score": r"\d\.\d", "damage": rf"({'|'.join(DROP)}) [1-3]"}


def damaged(random: Random, clean: list[int], kind: str, severity: int) -> list[int]:
    """The signal with one kind of damage; every severity hits one place more, or one step further."""
    found, places = list(clean), random.sample(range(WIDTH), severity + 1)
    edge = next(i for i in range(1, WIDTH) if clean[i] != clean[i - 1])
    if kind == "noise":
        for i in places:
            found[i] += random.choice((-1, 1))
    elif kind == "gaps":
        for i in places:
            found[i] = 0
    elif kind == "blur":
        low, high, reach = clean[0], clean[-1], severity + 1
        for i in range(max(0, edge - severity), min(WIDTH, edge + severity)):
            found[i] = round(low + (high - low) * (i - edge + reach) / (2 * reach))
    else:
        for i in range(random.randrange(2), 2 * severity + 1, 2):
            found[i] = 9 if clean[i] < 5 else 1
    return found


def _draw(random: Random, level: int) -> Draft:
    low, high, edge = random.randint(2, 3), random.randint(7, 8), random.randint(2, WIDTH - 2)
    clean = [low] * edge + [high] * (WIDTH - edge)
    kind, severity = random.choice(list(DROP)[: level + 1]), random.choice(SEVERITIES)
    task = random.choice(tuple(FORMS))
    signal = "".join(map(str, damaged(random, clean, kind, severity)))
    answer = f"{5 - DROP[kind] * severity:.1f}" if task == "score" else f"{kind} {severity}"
    columns = {"task": task, "form": FORMS[task], "clean": "".join(map(str, clean)), "damage": f"{kind} {severity}"}
    return Draft(prompt=f"{task} {signal}=", answer=answer, canonical=signal, columns=columns)


def _steps(problem: Problem) -> str:
    """For a score, what the damage is; for the damage, what the signal was."""
    return str(problem.columns["damage" if problem.columns["task"] == "score" else "clean"])


def _mistake(problem: Problem, random: Random) -> str:
    """A score one step away, another severity, or another kind."""
    if problem.columns["task"] == "score":
        return f"{float(problem.answer) + random.choice((-0.9, -0.4, 0.4, 0.9)):.1f}"
    kind, severity = problem.answer.split()
    if random.random() < 0.5:
        return f"{kind} {random.choice(SEVERITIES)}"
    return f"{random.choice(tuple(DROP))} {severity}"


def _verify(answer: str, columns: Mapping[str, Any]) -> bool:
    if columns["task"] == "damage":
        return same_text(answer, columns)
    return Within(TOLERANCE)([""], [answer], answer=[columns["answer"]]) == [1.0]


RATING = GeneratedTask(
    name="rating",
    description="Score a damaged signal, or name its damage, of level + 1 kinds: score 22822722=, damage 22822722=",
    all_levels=(1, 2, 3),
    levels=(1,),
    draw=_draw,
    steps=_steps,
    mistake=_mistake,
    verify=_verify,
    budget=lambda level: 22,
    graded=(
        ("score", ForTask("score", Within(TOLERANCE)), 0.5),
        ("damage", ForTask("damage", WordByWord()), 0.5),
        ("form", Formatted(), 0.5),
    ),
)
