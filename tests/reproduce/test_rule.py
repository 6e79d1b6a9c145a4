"""The rule that turns numbers into a verdict, on numbers done by hand."""

from __future__ import annotations

import math

import pytest

from unipo.reproduce import Expectation, combined
from unipo.reproduce.claim import INCONCLUSIVE, NOT_REPRODUCED, REPRODUCED

BETTER = Expectation(arm="a", metric="success", than="b", least=0.0)
SAME = Expectation(arm="a", metric="success", than="b", least=-0.1, most=0.1)


@pytest.mark.parametrize(
    ("expected", "low", "high", "verdict"),
    [
        (BETTER, 0.1, 0.3, REPRODUCED),
        (BETTER, -0.3, -0.1, NOT_REPRODUCED),
        (BETTER, -0.1, 0.3, INCONCLUSIVE),
        (BETTER, 0.0, 0.0, NOT_REPRODUCED),  # equal in every seed is not better
        (BETTER, math.nan, math.nan, INCONCLUSIVE),
        (SAME, -0.05, 0.05, REPRODUCED),
        (SAME, -0.05, 0.15, INCONCLUSIVE),
        (SAME, -0.5, 0.5, INCONCLUSIVE),
        (SAME, 0.2, 0.3, NOT_REPRODUCED),
        (SAME, -0.3, -0.2, NOT_REPRODUCED),
    ],
)
def test_verdict_of_an_interval(expected: Expectation, low: float, high: float, verdict: str) -> None:
    assert expected.verdict(low, high) == verdict


def test_difference_is_method_minus_baseline_paired_by_seed() -> None:
    """a - b = 1 in both seeds although each varies by 10: paired, the interval has no width."""
    values = {"a": {"success": [1.0, 11.0]}, "b": {"success": [0.0, 10.0]}}
    assert BETTER.difference(values) == pytest.approx((1.0, 1.0, 1.0))
    reversed_ = Expectation(arm="b", metric="success", than="a", least=0.0)
    assert reversed_.verdict(*reversed_.difference(values)[1:]) == NOT_REPRODUCED


def test_a_metric_by_itself() -> None:
    """Mean 0.2, s = 0.1, n = 3: half width t(0.975, 2) * 0.1 / sqrt(3) = 4.302653 * 0.0577350 = 0.248414."""
    small = Expectation(arm="a", metric="kl", most=0.5)
    mean, low, high = small.difference({"a": {"kl": [0.1, 0.2, 0.3]}})
    assert (mean, low, high) == pytest.approx((0.2, -0.048414, 0.448414), abs=1e-6)
    assert small.verdict(low, high) == REPRODUCED


def test_one_seed_decides_nothing() -> None:
    values = {"a": {"success": [1.0]}, "b": {"success": [0.0]}}
    assert BETTER.verdict(*BETTER.difference(values)[1:]) == INCONCLUSIVE


@pytest.mark.parametrize(
    ("parts", "verdict"),
    [
        ([REPRODUCED, REPRODUCED], REPRODUCED),
        ([REPRODUCED, INCONCLUSIVE], INCONCLUSIVE),
        ([INCONCLUSIVE, NOT_REPRODUCED], NOT_REPRODUCED),
        ([], INCONCLUSIVE),
    ],
)
def test_a_claim_is_as_strong_as_its_weakest_part(parts: list[str], verdict: str) -> None:
    assert combined(parts) == verdict


def test_an_expectation_reads_as_a_formula() -> None:
    assert str(BETTER) == "0 < success: a - b"
    assert str(SAME) == "-0.1 < success: a - b < 0.1"
