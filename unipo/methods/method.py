"""What the catalog knows of a method besides the function that builds it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from unipo.recipe import Recipe

T = TypeVar("T")


def choice(options: Mapping[str, T], setting: str, value: str) -> T:
    """`options[value]`. ValueError, with what there is, for another value of the `setting`."""
    if value not in options:
        raise ValueError(f"{setting} is {value!r}: expected one of {', '.join(options)}")
    return options[value]


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """A published method: `build(**settings)` returns its `Recipe`; its keyword arguments are its whole configuration.

    `slug`: its name on the command line; of a catalog row exactly as in `rows.csv`.
    `row`: the row of the catalog, None for a baseline that is not one of its works.
    `equation`: a few lines of plain text, in parts (advantage, weight, mask, aggregate, terms, controller).
    `claim`: the paper's headline in one sentence, as `unipo reproduce` measures it ("" for a baseline).
    `identity_tests`: pytest node ids (`tests/methods/test_x.py::test_y`) of what it provably equals.
    `environments`: what builds it for environments, where that is not `build`: most often the same with other defaults.
    """

    slug: str
    build: Callable[..., Recipe]
    row: int | None = None
    family: str
    title: str
    paper: str
    equation: str
    claim: str = ""
    identity_tests: tuple[str, ...] = ()
    environments: Callable[..., Recipe] | None = None

    def builder(self, environment: bool = False) -> Callable[..., Recipe]:
        """The function that builds its recipe: for environments another, where it has one."""
        return self.environments if environment and self.environments is not None else self.build

    def defaults_of(self, environment: bool = False) -> Mapping[str, Any]:
        """Every setting with its default, in the order of the signature."""
        return {name: p.default for name, p in inspect.signature(self.builder(environment)).parameters.items()}

    @property
    def defaults(self) -> Mapping[str, Any]:
        """The settings of `build`."""
        return self.defaults_of()

    @property
    def summary(self) -> str:
        """The first line of the function's docstring."""
        return (inspect.getdoc(self.build) or "").partition("\n")[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class Study:
    """A published result that is checked by numbers on problems small enough to enumerate, rather than trained with.

    `function`: the heart of it, a public function of `unipo.tabular` or `unipo.functional`. The other fields are those of
    a `Method`; `unipo reproduce SLUG` runs its experiment.
    """

    slug: str
    function: Callable[..., Any]
    row: int
    family: str
    title: str
    paper: str
    equation: str
    claim: str
    identity_tests: tuple[str, ...] = ()

    @property
    def summary(self) -> str:
        """The first line of the function's docstring."""
        return (inspect.getdoc(self.function) or "").partition("\n")[0]
