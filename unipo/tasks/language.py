"""Small verifiable language tasks, short enough for a character-level model."""

from __future__ import annotations

import ast
import itertools
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from unipo.tasks.base import Problem, Task

LETTERS = "abcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True)
class Arithmetic(Task):
    """`37+58=` -> `95`, `58-37=` -> `21`. Level: the number of digits of the operands."""

    name: ClassVar[str] = "arithmetic"
    description: ClassVar[str] = "add or subtract two numbers; level = digits"
    all_levels: ClassVar[tuple[int, ...]] = (1, 2, 3, 4)
    default_levels: ClassVar[tuple[int, ...]] = (2,)
    max_completion_tokens: ClassVar[int] = 8
    styles: ClassVar[tuple[str, ...]] = ("direct", "worked")

    def draw(self, rng: np.random.Generator, level: int) -> tuple[str, str, dict[str, Any]]:
        a, b = (int(x) for x in rng.integers(10 ** (level - 1) if level > 1 else 0, 10**level, 2))
        if rng.random() < 0.5:
            return f"{a}+{b}=", str(a + b), {}
        high, low = max(a, b), min(a, b)
        return f"{high}-{low}=", str(high - low), {}

    def demonstration(self, problem: Problem, style: str = "direct") -> str:
        """direct: `95`. worked: the answer's digits from the right in brackets first, `[59]95`."""
        self._check_style(style)
        return problem.answer if style == "direct" else f"[{problem.answer[::-1]}]{problem.answer}"

    def score(self, completion: str, problem: Mapping[str, Any]) -> float:
        """The last number counts, so a worked solution may come before it."""
        return float(completion.strip().rpartition("]")[2] == problem["answer"])


OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}


@dataclass(frozen=True)
class Countdown(Task):
    """`3 5 2>13=` -> `3+5*2`: an expression of + - * that uses each number once and reaches the target."""

    name: ClassVar[str] = "countdown"
    description: ClassVar[str] = "reach a target with each number once, by + - *; level = numbers - 1"
    all_levels: ClassVar[tuple[int, ...]] = (1, 2, 3)
    default_levels: ClassVar[tuple[int, ...]] = (1, 2)
    max_completion_tokens: ClassVar[int] = 12

    def draw(self, rng: np.random.Generator, level: int) -> tuple[str, str, dict[str, Any]]:
        numbers = [int(x) for x in rng.integers(1, 10, level + 1)]
        symbols = ["+-*"[int(i)] for i in rng.integers(0, 3, level)]
        expression = str(numbers[0]) + "".join(s + str(n) for s, n in zip(symbols, numbers[1:], strict=True))
        given = [numbers[int(i)] for i in rng.permutation(len(numbers))]
        target = evaluated(expression)
        return f"{' '.join(map(str, given))}>{target}=", expression, {"numbers": given, "target": target}

    def score(self, completion: str, problem: Mapping[str, Any]) -> float:
        try:
            tree = ast.parse(completion.strip(), mode="eval")
            used = sorted(n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, int))
            return float(used == sorted(problem["numbers"]) and evaluated(completion.strip()) == problem["target"])
        except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
            return 0.0

    def corrupted(self, problem: Problem, rng: np.random.Generator) -> str:
        numbers, symbols = problem.columns["numbers"], itertools.cycle("+-*")
        order = [numbers[int(i)] for i in rng.permutation(len(numbers))]
        for _ in range(int(rng.integers(3))):
            next(symbols)
        return str(order[0]) + "".join(next(symbols) + str(n) for n in order[1:])


def evaluated(expression: str) -> int:
    """The value of an expression of whole numbers, + - * and brackets; ValueError for anything else. No `eval`."""

    def value(node: ast.AST) -> int:
        if isinstance(node, ast.Constant) and type(node.value) is int:
            return node.value
        if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
            return int(OPERATORS[type(node.op)](value(node.left), value(node.right)))
        raise ValueError(f"only whole numbers, + - * and brackets are allowed, found {ast.dump(node)[:40]}")

    return value(ast.parse(expression, mode="eval").body)


@dataclass(frozen=True)
class Reverse(Task):
    """`rev abc=` -> `cba`. Level: the number of letters, plus two."""

    name: ClassVar[str] = "reverse"
    description: ClassVar[str] = "reverse a string; level = letters - 2"
    all_levels: ClassVar[tuple[int, ...]] = (1, 2, 3, 4, 5, 6)
    default_levels: ClassVar[tuple[int, ...]] = (1, 2, 3)

    def draw(self, rng: np.random.Generator, level: int) -> tuple[str, str, dict[str, Any]]:
        text = "".join(LETTERS[int(i)] for i in rng.integers(0, 26, level + 2))
        return f"rev {text}=", text[::-1], {}


@dataclass(frozen=True)
class Sort(Task):
    """`sort 3142=` -> `1234`. Level: the number of digits, plus two."""

    name: ClassVar[str] = "sort"
    description: ClassVar[str] = "sort digits; level = digits - 2"
    all_levels: ClassVar[tuple[int, ...]] = (1, 2, 3, 4, 5, 6)
    default_levels: ClassVar[tuple[int, ...]] = (2, 3, 4)

    def draw(self, rng: np.random.Generator, level: int) -> tuple[str, str, dict[str, Any]]:
        digits = "".join(str(int(i)) for i in rng.integers(0, 10, level + 2))
        return f"sort {digits}=", "".join(sorted(digits)), {}


@dataclass(frozen=True)
class ModularChain(Task):
    """`mod 7 3+5*2=` -> `1;2`: left to right modulo a number, every intermediate result written, the last one counts."""

    name: ClassVar[str] = "modular_chain"
    description: ClassVar[str] = "a chain of + and * modulo a number, with written steps; level = operations"
    all_levels: ClassVar[tuple[int, ...]] = (1, 2, 3, 4)
    default_levels: ClassVar[tuple[int, ...]] = (1, 2)
    styles: ClassVar[tuple[str, ...]] = ("direct", "worked")

    def draw(self, rng: np.random.Generator, level: int) -> tuple[str, str, dict[str, Any]]:
        modulus = int(rng.integers(3, 10))
        total = int(rng.integers(0, modulus))
        text, steps = f"mod {modulus} {total}", []
        for _ in range(level):
            symbol, n = "+*"[int(rng.integers(2))], int(rng.integers(0, 10))
            total = (total + n if symbol == "+" else total * n) % modulus
            text += f"{symbol}{n}"
            steps.append(total)
        return f"{text}=", str(total), {"steps": steps}

    def demonstration(self, problem: Problem, style: str = "direct") -> str:
        self._check_style(style)
        return problem.answer if style == "direct" else ";".join(map(str, problem.columns["steps"]))

    def score(self, completion: str, problem: Mapping[str, Any]) -> float:
        return float(completion.strip().rpartition(";")[2] == problem["answer"])
