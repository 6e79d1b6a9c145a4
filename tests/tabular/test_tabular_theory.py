"""The catalog records and claims of the three rows: they agree with the list of works, and their yardsticks are right."""

import ast
import csv
import json
from pathlib import Path

import pytest
import torch

from unipo.methods.tabular_theory import STUDIES
from unipo.reproduce.run import VERDICTS
from unipo.reproduce.tabular_theory import CLAIMS, similarity, until_solved

ROOT = Path(__file__).parents[2]


def test_records_agree_with_the_list_of_works():
    with (ROOT / "unipo" / "methods" / "rows.csv").open(encoding="utf-8") as file:
        works = {r["slug"]: r for r in csv.DictReader(file)}
    for study in STUDIES:
        work = works[study.slug]
        assert (str(study.row), study.title, study.family) == (work["row"], work["title"], work["family"])
        assert study.summary


def test_identity_tests_exist():
    for study in STUDIES:
        for node in study.identity_tests:
            path, _, name = node.partition("::")
            functions = {f.name for f in ast.parse((ROOT / path).read_text()).body if isinstance(f, ast.FunctionDef)}
            assert name in functions, node


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.slug)
def test_expectations_are_of_what_is_measured(claim):
    """Every arm runs in a form of three steps, a trial is a function of its seed, and the verdict has the same arms."""
    first = {arm: claim.trial(settings, 0.0, 0, 3) for arm, settings in claim.arms.items()}
    for expected in claim.expectations:
        assert expected.metric in first[expected.arm]
        assert not expected.than or expected.metric in first[expected.than]
    arm = next(iter(claim.arms))
    assert claim.trial(claim.arms[arm], 0.0, 0, 3) == first[arm]
    verdict = json.loads((VERDICTS / f"{claim.slug}.json").read_text(encoding="utf-8"))
    assert list(verdict["numbers"]) == list(claim.arms)
    assert [part["expected"] for part in verdict["expectations"]] == [str(e) for e in claim.expectations]
    assert verdict["note"].startswith(claim.note)


def test_solved_is_the_first_window_of_nine_in_ten():
    """60 failures, then successes: a window of 50 may hold 5 failures, so it starts at 55."""
    success = torch.arange(200) >= 60
    assert until_solved(success) == 55.0
    assert until_solved(success[:100]) == 100.0
    assert until_solved(success[:10]) == 10.0
    assert until_solved(torch.ones(50)) == 0.0


def test_similarity_of_levels():
    assert [similarity(g, 0.1).reward for g in (1, 5, 10, 100, 200)] == [1.0, 1.0, 0.1, 0.1, 0.0]
