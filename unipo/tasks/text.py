"""`reverse` (a word) and `sort` (digits): the answer is a rearrangement of what is in the prompt."""

from __future__ import annotations

from collections import Counter
from random import Random
from string import ascii_lowercase, digits

from unipo.tasks.base import Draft, GeneratedTask, Problem, same_text


def _draw_reverse(random: Random, level: int) -> Draft:
    word = "".join(random.choices(ascii_lowercase, k=level + 2))
    return Draft(prompt=f"reverse {word}=", answer=word[::-1], canonical=min(word, word[::-1]))


def _draw_sort(random: Random, level: int) -> Draft:
    found = "".join(random.choices(digits, k=level + 2))
    answer = "".join(sorted(found))
    return Draft(prompt=f"sort {found}=", answer=answer, canonical=answer)


def _letters(problem: Problem) -> str:
    """Letter by letter from the end: `c b a`."""
    return " ".join(problem.answer)


def _counts(problem: Problem) -> str:
    """How often each digit occurs, in order: `1x2 3x1`."""
    return " ".join(f"{digit}x{n}" for digit, n in sorted(Counter(problem.answer).items()))


def _mistake(problem: Problem, random: Random) -> str:
    """The prompt's own order, two neighbours swapped, one symbol missing, or one replaced by another."""
    answer, kind = problem.answer, random.randrange(4)
    place = random.randrange(len(answer) - 1)
    if kind == 0:
        return problem.prompt.split()[1].rstrip("=")
    if kind == 1:
        return answer[:place] + answer[place + 1] + answer[place] + answer[place + 2 :]
    if kind == 2:
        return answer[:place] + answer[place + 1 :]
    return answer[:place] + random.choice(digits if answer.isdigit() else ascii_lowercase) + answer[place + 1 :]


REVERSE = GeneratedTask(
    name="reverse",
    description="Write a word of level + 2 random letters backwards: reverse abcd=",
    all_levels=tuple(range(1, 9)),
    levels=(2,),
    draw=_draw_reverse,
    steps=_letters,
    mistake=_mistake,
    verify=same_text,
    budget=lambda level: 3 * (level + 2) + 1,
)

SORT = GeneratedTask(
    name="sort",
    description="Sort level + 2 digits in rising order: sort 3142=",
    all_levels=tuple(range(1, 9)),
    levels=(2,),
    draw=_draw_sort,
    steps=_counts,
    mistake=_mistake,
    verify=same_text,
    budget=lambda level: 5 * (level + 2) + 1,
)
