"""The catalog: every work is in it, states follow from evidence, and names are forgiving in their errors."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest

from unipo.methods.catalog import (
    BY_SLUG,
    METHODS,
    STUDIES,
    MethodError,
    build,
    catalog,
    describe,
    find,
    parse,
    verdict_of,
)

ROOT = Path(__file__).parents[2]


def test_all_works_are_listed_once() -> None:
    rows = [e.row for e in catalog() if e.row is not None]
    assert rows == list(range(1, 192))
    assert len({e.slug for e in catalog()}) == len(catalog())


def test_identity_tests_exist() -> None:
    """Every test that the catalog names as evidence is a function in that file."""
    for method in METHODS:
        assert method.identity_tests, method.slug
        for node in method.identity_tests:
            path, _, name = node.partition("::")
            functions = {f.name for f in ast.parse((ROOT / path).read_text()).body if isinstance(f, ast.FunctionDef)}
            assert name in functions, node


def test_states_follow_from_evidence() -> None:
    for entry in catalog():
        if entry.slug not in BY_SLUG and entry.slug not in STUDIES:
            assert entry.state == "planned"
        elif entry.row is not None:
            assert (entry.state == "works") == bool(verdict_of(entry.slug))
    for path in (ROOT / "unipo" / "reproduce" / "verdicts").glob("*.json"):
        found = json.loads(path.read_text())
        assert found["slug"] == path.stem
        assert found["verdict"] in ("reproduced", "not reproduced", "inconclusive")
        assert {"claim", "command", "commit", "seeds", "numbers", "seconds"} <= set(found)


def test_sums_are_parsed_and_built() -> None:
    assert [(c, m.slug) for c, m in parse("grpo + 0.2*sft+1e-1*dpo")] == [(1.0, "grpo"), (0.2, "sft"), (0.1, "dpo")]
    recipe = build("grpo+0.2*sft+0.1*dpo", {"dpo": {"beta": 0.5}})
    assert [(c, t.title) for c, t in recipe.objective.terms()] == [(1.0, "grpo"), (0.2, "sft"), (0.1, "dpo")]
    assert recipe.kinds == ("rollout", "demo", "pair")
    assert "beta=0.5" in repr(recipe)


def test_errors_name_the_nearest() -> None:
    with pytest.raises(MethodError, match="did you mean grpo"):
        find("grp0")
    planned = next(entry for entry in catalog() if entry.state == "planned")
    with pytest.raises(MethodError, match=rf"row {planned.row}.*not built yet"):
        find(planned.slug)
    with pytest.raises(MethodError, match=r"dapo-direct-advantage does not accept .*'neither'"):
        build("dapo-direct-advantage", {"dapo-direct-advantage": {"constant": "neither"}})
    with pytest.raises(MethodError, match=r"--grpo\.clip"):
        build("grpo", {"grpo": {"klip": 0.1}})
    with pytest.raises(MethodError, match="not in 'grpo'"):
        build("grpo", {"dpo": {"beta": 0.1}})
    with pytest.raises(MethodError, match=r"NUMBER\*METHOD"):
        parse("grpo+*sft")


@pytest.mark.parametrize("slug", sorted(BY_SLUG))
def test_show_prints_every_part(slug: str) -> None:
    text = describe(slug)
    for word in ("paper", "equation", "needs", "defaults", "claim", "tests", "result"):
        assert word in text


def test_kin_are_the_general_method_with_other_parts() -> None:
    changed = build("grpo", {}).but(group=3)
    assert changed.rollouts.group == 3
    with pytest.raises(TypeError, match="no part has"):
        build("grpo", {}).but(nonsense=1)


def test_a_method_says_what_it_is_for() -> None:
    for_text = {m.slug for m in METHODS if m.build().for_text}
    assert {"grpo", "dpo", "sft", "ppo", "reinforce", "a2c"} <= for_text
    assert not for_text & {
        "sac",
        "dqn",
        "iql",
        "trpo",
        "props",
        "ospo",
        "fleet-ppo",
        "grpo-ride",
        "pdppo",
        "esg-portfolio",
    }
