"""`modular_chain`: a chain of sums and products modulo m, worked from the inside out. Prompt `((5+3)*2-4)%7=`, answer `5`."""

from __future__ import annotations

from random import Random

from unipo.tasks.base import Draft, GeneratedTask, Problem, same_text


def _apply(operator: str, x: int, y: int) -> int:
    return {"+": x + y, "-": x - y, "*": x * y}[operator]


def _draw(random: Random, level: int) -> Draft:
    modulus, start = random.randint(3, 9), random.randint(1, 9)
    operations = [(random.choice("+-*"), random.randint(2, 9)) for _ in range(level)]
    text, value, before = str(start), start, "*"
    for operator, operand in operations:
        text = f"({text})" if operator == "*" and before != "*" else text
        text, value, before = f"{text}{operator}{operand}", _apply(operator, value, operand), operator
    columns = {"modulus": modulus, "start": start, "operations": operations}
    prompt = f"({text})%{modulus}="
    return Draft(prompt=prompt, answer=str(value % modulus), canonical=prompt, columns=columns)


def _steps(problem: Problem) -> str:
    """Each operation on the running remainder, then the new one: `5+3=8%7=1,1*2=2%7=2,2-4=-2%7=5`."""
    modulus, value, lines = problem.columns["modulus"], problem.columns["start"], []
    for operator, operand in problem.columns["operations"]:
        result = _apply(operator, value, operand)
        lines.append(f"{value}{operator}{operand}={result}%{modulus}={result % modulus}")
        value = result % modulus
    return ",".join(lines)


def _mistake(problem: Problem, random: Random) -> str:
    return str((int(problem.answer) + random.choice((1, 1, -1, 2))) % problem.columns["modulus"])


MODULAR_CHAIN = GeneratedTask(
    name="modular_chain",
    description="Work out a chain of level operations modulo a number from 3 to 9: ((5+3)*2-4)%7=",
    all_levels=tuple(range(1, 9)),
    levels=(2,),
    draw=_draw,
    steps=_steps,
    mistake=_mistake,
    verify=same_text,
    budget=lambda level: 11 * level + 3,
)
