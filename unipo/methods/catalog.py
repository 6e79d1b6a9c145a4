"""The catalog: every work of the field with its state and evidence, and methods by name.

States: `works` (built, identity tests, and for a work of the field a verdict of `unipo reproduce`), `partial` (built,
evidence missing), `planned`.
"""

from __future__ import annotations

import csv
import difflib
import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from unipo.methods import (
    actor_critic,
    constrained,
    control_applications,
    control_preferences,
    edited_answers,
    estimation_theory,
    group_variants,
    guided,
    mixed_data,
    off_policy,
    offline_control,
    on_policy_control,
    policy_gradients,
    preference_data,
    preference_games,
    preference_lists,
    preferences,
    props,
    regressions,
    reward_models,
    segments,
    self_tuning,
    stale_data,
    supervised,
    tabular_theory,
    text_applications,
    token_rewards,
)
from unipo.methods.method import Method, Study
from unipo.objectives import Knob
from unipo.recipe import Given, Recipe

PAGES = (
    policy_gradients,
    preferences,
    preference_data,
    preference_games,
    preference_lists,
    reward_models,
    mixed_data,
    off_policy,
    stale_data,
    on_policy_control,
    actor_critic,
    offline_control,
    group_variants,
    guided,
    constrained,
    props,
    control_applications,
    control_preferences,
    edited_answers,
    regressions,
    text_applications,
    supervised,
    token_rewards,
    self_tuning,
    segments,
)
METHODS: tuple[Method, ...] = tuple(method for page in PAGES for method in page.METHODS)
BY_SLUG = {m.slug: m for m in METHODS}
STUDY_PAGES: tuple[Any, ...] = (tabular_theory, estimation_theory, preference_games, preference_data)
STUDIES: Mapping[str, Study] = {study.slug: study for page in STUDY_PAGES for study in page.STUDIES}


class MethodError(ValueError):
    """A method or setting that does not exist; the message names the nearest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CatalogEntry:
    """One line of the catalog. `row` is None for baselines; `tests` counts identity tests; `verdict` "" without one."""

    row: int | None
    slug: str
    family: str
    title: str
    state: str
    tests: int
    verdict: str

    def as_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__slots__}


def usable(given: Given) -> list[str]:
    """Slugs of the methods that can train on such data with their own settings, baselines first."""
    found = [m for m in METHODS if m.build().suits(given)]
    return [m.slug for m in sorted(found, key=lambda m: m.row is not None)]


def catalog() -> list[CatalogEntry]:
    """All works by row, then the baselines beside them."""
    text = (files("unipo.methods") / "rows.csv").read_text(encoding="utf-8")
    works = [_entry(int(r["row"]), r["slug"], r["family"], r["title"]) for r in csv.DictReader(text.splitlines())]
    baselines = [_entry(None, m.slug, m.family, m.title) for m in METHODS if m.row is None]
    return works + baselines


def _entry(row: int | None, slug: str, family: str, title: str) -> CatalogEntry:
    method, verdict = BY_SLUG.get(slug) or STUDIES.get(slug), verdict_of(slug).get("verdict", "")
    tests = len(method.identity_tests) if method else 0
    complete = tests > 0 and (row is None or bool(verdict))
    state = "planned" if method is None else "works" if complete else "partial"
    return CatalogEntry(row=row, slug=slug, family=family, title=title, state=state, tests=tests, verdict=verdict)


@cache
def verdict_of(slug: str) -> Mapping[str, Any]:
    """The verdict file that `unipo reproduce` wrote for a method, or an empty mapping."""
    path = files("unipo") / "reproduce" / "verdicts" / f"{slug}.json"
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}


def find(slug: str) -> Method:
    """The method called `slug`. Raises MethodError with the nearest names, or says that it is only planned."""
    if slug in BY_SLUG:
        return BY_SLUG[slug]
    if slug in STUDIES:
        raise MethodError(f"{slug!r} is a result that is checked by numbers, not trained with: unipo reproduce {slug}")
    planned = {e.slug: e for e in catalog()}
    if slug in planned:
        raise MethodError(f"{slug!r} (row {planned[slug].row}: {planned[slug].title}) is in the catalog but not built yet; "
                          f"built: {', '.join(sorted(BY_SLUG))}")  # fmt: skip
    near = difflib.get_close_matches(slug, BY_SLUG, 3, 0.4)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    raise MethodError(f"there is no method {slug!r}: {hint}Built: {', '.join(sorted(BY_SLUG))}")


TERM = re.compile(r"^(?:(?P<scale>[0-9]*\.?[0-9]+(?:e-?[0-9]+)?)\*)?(?P<slug>[a-zA-Z][\w-]*)$")


def parse(expression: str) -> list[tuple[float, Method]]:
    """`grpo+0.2*sft+0.1*dpo` as weighted methods."""
    terms = []
    for part in expression.replace(" ", "").split("+"):
        match = TERM.match(part)
        if match is None:
            raise MethodError(f"cannot read {part!r} in {expression!r}: write METHOD or NUMBER*METHOD, joined by +")
        terms.append((float(match["scale"] or 1.0), find(match["slug"])))
    return terms


def build(expression: str, options: Mapping[str, Mapping[str, Any]], environment: bool = False) -> Recipe:
    """The recipe of a method or weighted sum, with keyword arguments by method slug; for text, or for an `environment`."""
    terms = parse(expression)
    slugs = [m.slug for _, m in terms]
    for slug in options:
        if slug not in slugs:
            raise MethodError(f"settings are given for {slug!r}, which is not in {expression!r} ({', '.join(slugs)})")
    recipes = [
        _one(scale, method, options.get(method.slug, {}), len(terms) > 1, environment) for scale, method in terms
    ]
    total = recipes[0]
    try:
        for recipe in recipes[1:]:
            total = total + recipe
    except ValueError as error:
        raise MethodError(f"cannot train {expression!r}: {error}") from error
    return total


def _one(scale: float, method: Method, settings: Mapping[str, Any], named: bool, environment: bool) -> Recipe:
    known_settings = method.defaults_of(environment)
    for name in settings:
        if name not in known_settings:
            near = difflib.get_close_matches(name, known_settings, 1, 0.3)
            hint = f"; did you mean --{method.slug}.{near[0].replace('_', '-')}?" if near else ""
            known = ", ".join(known_settings) or "none"
            raise MethodError(f"{method.slug} has no setting {name!r}{hint} It has: {known}")
    try:
        recipe = method.builder(environment)(**settings)
    except (TypeError, ValueError, KeyError) as error:
        raise MethodError(f"{method.slug} does not accept {dict(settings)}: {error}") from error
    recipe = _titled(recipe, method.slug) if named else recipe
    return recipe if scale == 1.0 else scale * recipe


def _titled(recipe: Recipe, slug: str) -> Recipe:
    """Terms called by their method, so that the ledger of a sum says which is whose."""
    terms = recipe.objective.terms()
    names = [slug if len(terms) == 1 else f"{slug}:{t.title}" for _, t in terms]
    weighted = tuple((c, t.but(name=n)) for (c, t), n in zip(terms, names, strict=True))
    return recipe.but(objective=(recipe.objective * 1.0).but(weighted=weighted))


def fitting_transitions(kind: str) -> list[str]:
    """Methods that learn from recorded transitions with actions of this kind: categorical, multi_categorical or box."""
    specs = {m.slug: m.builder(environment=True)().control for m in METHODS}
    alone = {slug: spec for slug, spec in specs.items() if spec is not None and spec.off_policy and not spec.compared}
    return sorted(slug for slug, spec in alone.items() if kind in spec.action_kinds)


def fitting_text(kinds: Sequence[str]) -> list[str]:
    """Methods whose every term can be fed by text data of these uses: prompts (they give rollouts), rollouts,
    demonstrations, pairs, documents. Not those that ask for tasks, or for descriptions, that such data have not."""
    given = {
        "prompts": "rollout",
        "rollouts": "rollout",
        "documents": "rollout",
        "demonstrations": "demo",
        "pairs": "pair",
        "ratings": "pair",
        "labels": "label",
    }
    have = Given(kinds=frozenset(given[k] for k in kinds if k in given), group=sys.maxsize)
    recipes = {m.slug: m.build() for m in METHODS}
    fed = {slug: recipe for slug, recipe in recipes.items() if recipe.suits(have)}
    asking = {slug for slug, recipe in fed.items() if recipe.round or (recipe.tasks and "documents" not in kinds)}
    return sorted(fed.keys() - asking)


def describe(slug: str) -> str:
    """What `unipo show` prints."""
    if slug in STUDIES:
        return "\n".join([*_heading(STUDIES[slug]), "", *_evidence(STUDIES[slug])])
    method = find(slug)
    recipe = method.build()
    lines = [*_heading(method), "", "terms"]
    for coefficient, term in recipe.objective.terms():
        shown = repr(coefficient) if isinstance(coefficient, Knob) else f"{coefficient:g}"
        lines.append(f"  {shown} * {term!r}")
    lines += [f"  controllers: {c!r}" for c in recipe.controllers]
    lines += [f"  rows that are given: {stage!r}" for stage in recipe.arrange]
    needs = recipe.needs
    lines += ["", f"needs   rows {', '.join(recipe.kinds)}; columns {', '.join(sorted(needs.columns))}; signals "
              f"{', '.join(sorted(needs.signals))}; at least {needs.group_size} per group"]  # fmt: skip
    acting = method.builder(environment=True)().control
    kinds = [k for k, fits in (("text", recipe.for_text), ("environments", acting is not None)) if fits]
    lines += [f"for     {' and '.join(kinds)}"]
    lines += ["defaults", *(f"  --{slug}.{k.replace('_', '-')} {v}" for k, v in method.defaults.items())]
    other = {k: v for k, v in method.defaults_of(environment=True).items() if method.defaults.get(k, None) != v}
    if method.environments is not None and other:
        lines += ["in environments", *(f"  --{slug}.{k.replace('_', '-')} {v}" for k, v in other.items())]
    lines += [""]
    return "\n".join([*lines, *_evidence(method)])


def _heading(work: Method | Study) -> list[str]:
    row = f"row {work.row}" if work.row is not None else "baseline"
    lines = [f"{work.slug}  ({work.family}, {row})", work.title, f"paper   {work.paper}", ""]
    return [*lines, "equation", *(f"  {line}" for line in work.equation.strip("\n").splitlines())]


def _evidence(work: Method | Study) -> list[str]:
    found = verdict_of(work.slug)
    result = f"{found['verdict']}: {found.get('summary', '')} ({found.get('command', '')})" if found else "none yet"
    return [f"claim   {work.claim or 'none: a baseline'}", f"tests   {len(work.identity_tests)} identity tests",
            f"result  {result}"]  # fmt: skip
