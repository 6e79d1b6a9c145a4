"""`arithmetic`: a+b and a-b (never negative), d digits at level d. Prompt `37+58=`, answer `95`."""

from __future__ import annotations

from random import Random

from unipo.tasks.base import Draft, GeneratedTask, Problem, same_text


def _draw(random: Random, level: int) -> Draft:
    low, high = (10 ** (level - 1), 10**level - 1) if level > 1 else (0, 9)
    a, b, operator = random.randint(low, high), random.randint(low, high), random.choice("+-")
    if operator == "-":
        a, b = max(a, b), min(a, b)
    answer = a + b if operator == "+" else a - b
    canonical = f"{max(a, b)}{operator}{min(a, b)}"
    columns = {"numbers": [a, b], "operator": operator}
    return Draft(prompt=f"{a}{operator}{b}=", answer=str(answer), canonical=canonical, columns=columns)


def _steps(problem: Problem) -> str:
    """Digit by digit from the right, with the carry or borrow of 1: `7+8=15,3+5+1=9`."""
    (a, b), operator = problem.columns["numbers"], problem.columns["operator"]
    width, carry, lines = len(str(max(a, b))), 0, []
    for x, y in zip(reversed(str(a).zfill(width)), reversed(str(b).zfill(width)), strict=True):
        value = int(x) + int(y) + carry if operator == "+" else int(x) - int(y) - carry
        lines.append(f"{x}{operator}{y}{f'{operator}1' if carry else ''}={value}")
        carry = int(value > 9 or value < 0)
    return ",".join(lines)


def _mistake(problem: Problem, random: Random) -> str:
    """A forgotten carry (or one too many), off by one, or two digits swapped."""
    answer, (a, b) = int(problem.answer), problem.columns["numbers"]
    kind = random.random()
    if kind < 0.5:
        carries = problem.columns["operator"] == "+" and a % 10 + b % 10 > 9
        return str(abs(answer - 10 if carries else answer + 10))
    if kind < 0.8:
        return str(abs(answer + random.choice((-1, 1))))
    digits = list(str(answer))
    place = random.randrange(max(1, len(digits) - 1))
    digits[place : place + 2] = reversed(digits[place : place + 2])
    return str(int("".join(digits)))


ARITHMETIC = GeneratedTask(
    name="arithmetic",
    description="Add or subtract two numbers of as many digits as the level says: 37+58=",
    all_levels=(1, 2, 3, 4, 5, 6),
    levels=(2,),
    draw=_draw,
    steps=_steps,
    mistake=_mistake,
    verify=same_text,
    budget=lambda level: 10 * level + 3,
)
