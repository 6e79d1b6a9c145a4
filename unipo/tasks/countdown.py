"""`countdown`: reach a target with given numbers, each used once. Prompt `22 from 3,5,7=`, an answer `3*5+7`."""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from random import Random
from typing import Any

from unipo.tasks.base import Draft, GeneratedTask, Problem

LONGEST = 200
"""Characters of an expression that are looked at: nesting stays far below the parser's own limits."""
_OPERATIONS: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: lambda x, y: x + y,
    ast.Sub: lambda x, y: x - y,
    ast.Mult: lambda x, y: x * y,
    ast.Div: lambda x, y: x / y,
}


def evaluate(expression: str) -> tuple[Fraction, list[int]]:
    """The exact value of an expression of whole numbers, + - * / and parentheses, and the numbers that it uses.

    Parses, never evals. Raises ValueError for anything else, division by zero and texts beyond 200 characters included.
    """
    if len(expression) > LONGEST:
        raise ValueError(f"the expression has {len(expression)} characters, at most {LONGEST} are read")
    try:
        return _value(ast.parse(expression.strip(), mode="eval").body)
    except (SyntaxError, ZeroDivisionError, RecursionError, MemoryError) as error:
        raise ValueError(f"not an arithmetic expression: {expression!r} ({error})") from error


def _value(node: ast.expr) -> tuple[Fraction, list[int]]:
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return Fraction(node.value), [node.value]
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATIONS:
        (x, left), (y, right) = _value(node.left), _value(node.right)
        return _OPERATIONS[type(node.op)](x, y), left + right
    raise ValueError(f"only whole numbers, + - * / and parentheses count, found {type(node).__name__}")


def solves(answer: str, columns: Mapping[str, Any]) -> bool:
    """Whether an expression uses each of `columns["numbers"]` once and equals `columns["target"]`."""
    try:
        value, used = evaluate(answer)
    except ValueError:
        return False
    return value == columns["target"] and sorted(used) == sorted(columns["numbers"])


@dataclass(frozen=True, slots=True)
class _Piece:
    """A part of an expression: `binding` 0 for a sum, 1 for a product, 2 for a number."""

    value: int
    text: str
    binding: int = 2
    steps: tuple[str, ...] = ()


def _join(operator: str, x: _Piece, y: _Piece) -> _Piece:
    value = {"+": x.value + y.value, "-": x.value - y.value, "*": x.value * y.value}[operator]
    binding = int(operator == "*")
    left = f"({x.text})" if x.binding < binding else x.text
    right = f"({y.text})" if y.binding < binding or (operator == "-" and y.binding == 0) else y.text
    steps = (*x.steps, *y.steps, f"{x.value}{operator}{y.value}={value}")
    return _Piece(value, f"{left}{operator}{right}", binding, steps)


def _expression(random: Random, numbers: list[int]) -> _Piece:
    """A random expression that uses every number, all its parts between 1 and 99."""
    while True:
        pieces = [_Piece(n, str(n)) for n in numbers]
        while len(pieces) > 1:
            random.shuffle(pieces)
            x, y = pieces.pop(), pieces.pop()
            pieces.append(_join(random.choice("+-*"), x, y))
        if all(0 < int(step.partition("=")[2]) < 100 for step in pieces[0].steps):
            return pieces[0]


def _draw(random: Random, level: int) -> Draft:
    numbers = [random.randint(1, 9) for _ in range(level + 1)]
    solution = _expression(random, numbers)
    columns = {"numbers": numbers, "target": solution.value, "steps": ",".join(solution.steps)}
    canonical = f"{solution.value} from {sorted(numbers)}"
    prompt = f"{solution.value} from {','.join(map(str, numbers))}="
    return Draft(prompt=prompt, answer=solution.text, canonical=canonical, columns=columns)


def _mistake(problem: Problem, random: Random) -> str:
    """The right numbers to another target, or one number left out."""
    numbers = list(problem.columns["numbers"])
    if random.random() < 0.3:
        numbers.pop(random.randrange(len(numbers)))
    return _expression(random, numbers).text


COUNTDOWN = GeneratedTask(
    name="countdown",
    description="Reach a target with level + 1 numbers from 1 to 9, each used once, by + - * /: 22 from 3,5,7=",
    all_levels=(1, 2, 3, 4),
    levels=(1, 2),
    draw=_draw,
    steps=lambda problem: str(problem.columns["steps"]),
    mistake=_mistake,
    verify=solves,
    budget=lambda level: 13 * level + 6,
)
