"""Verifiers that come with the library, and how rewards are found by name."""

import threading
import time

import pytest

from unipo.rewards import REWARDS, RewardError, RewardSet, RewardWarning, exact_match, length, math, resolve_reward
from unipo.rewards.mathematics import Worker


def test_exact_match_ignores_blanks_around_and_nothing_else():
    found = exact_match(["p"] * 5, [" 95\n", "95.0", "x", "95", "Ab"], answer=["95", "95", None, 95, "ab"])
    assert found == [1.0, 0.0, None, 1.0, 0.0]
    assert exact_match(["p"], ["95"]) == [None]


def test_length_counts_characters():
    assert length(["p"] * 2, ["", "abc"], answer=[1, 2]) == [0.0, 3.0]


@pytest.mark.parametrize(
    ("answer", "completion", "right"),
    [
        ("42", "The answer is 42.", 1.0),
        ("42", "The answer is 24.", 0.0),
        (42, r"so \boxed{42}", 1.0),
        ("1/2", r"\boxed{\frac{1}{2}}", 1.0),
        (r"\frac{1}{2}", "0.5", 1.0),
        (r"$\frac{1}{2}$", "$0.5$", 1.0),
        ("x^2+1", "$1+x^2$", 1.0),
        ("x^2+1", "1", 0.0),
        ("1,234", "1234", 1.0),
        ("#### 72", "72", 1.0),
        ("5", r"I thought 7, but \boxed{5}", 1.0),
        ("5", r"\boxed{5}? No: \boxed{7}", 0.0),
        ("5", "", 0.0),
        ("5", "no idea", 0.0),
        ("Paris", "Paris", 1.0),
        (r"\{1,2\}", r"\boxed{\{2,1\}}", 1.0),
    ],
)
def test_math_compares_values(answer, completion, right):
    assert math(["p"], [completion], answer=[answer]) == [right]


def test_math_does_not_apply_without_an_answer_and_says_what_is_no_mathematics():
    assert math(["p"] * 2, ["1", "2"], answer=[None, "2"]) == [None, 1.0]
    assert math(["p"], ["1"]) == [None]
    rewards = RewardSet((("math", math, 1.0),))
    with pytest.raises(
        RewardError, match=r"reference answer '' is not mathematics.*exact_match for row 1 \(prompt 'b'"
    ):
        rewards(["a", "b"], ["1", "2"], {"answer": ["1", ""]})


def test_math_works_beside_the_main_thread():
    found = []
    thread = threading.Thread(target=lambda: found.extend(math(["p"], ["0.5"], answer=["1/2"])))
    thread.start()
    thread.join(60)
    assert found == [1.0]


def test_a_completion_that_cannot_be_worked_out_is_stopped_and_told(monkeypatch):
    """9^(9^9) is computed in C code, where neither signals nor threads help; the next row is verified as usual."""
    monkeypatch.setattr("unipo.rewards.mathematics.WORKER", worker := Worker(seconds=1.0))
    worker.seconds = 60.0
    assert math(["p"], ["1"], answer=["1"]) == [1.0]
    assert math(["p"], [r"$\frac{2}{4}$"], answer=["0.5"]) == [1.0]
    worker.seconds = 1.0
    started = time.monotonic()
    with pytest.warns(RewardWarning, match=r"took too long .* and counts as wrong: '\$9\^"):
        assert math(["p"] * 2, ["$9^{9^{9}}$", "the answer is 5"], answer=["5", "5"])[0] == 0.0
    assert time.monotonic() - started < 30
    worker.seconds = 60.0
    assert math(["p"], ["the answer is 5"], answer=["5.0"]) == [1.0]


def test_an_interrupted_exchange_is_not_taken_for_the_next_one():
    """The limit of the whole batch strikes while the worker computes; its late reply must not answer another question."""
    rewards = RewardSet((("math", math, 1.0),), "drop", 0.3)
    math(["p"], [r"$\frac{3}{4}$"], answer=["0.75"])
    with pytest.warns(RewardWarning):
        assert rewards(["p"], ["$9^{9^{9}}$"], {"answer": ["5"]})[1] == [False]
    assert math(["p"] * 2, ["the answer is 6", "it is 8"], answer=["5", "8.0"]) == [0.0, 1.0]


# ---- by name -----------------------------------------------------------------------------------------------------------
def test_known_names_and_weights():
    assert resolve_reward("math") == ("math", math, 1.0)
    assert resolve_reward(" length*-0.001 ") == ("length", length, -0.001)
    graded = {"form", "near", "overlap", "prefix", "within", "word_by_word"}
    assert set(REWARDS) == {"exact_match", "length", "math"} | graded


def test_functions_of_modules_and_files(tmp_path):
    assert resolve_reward("unipo.rewards.verifiers:exact_match*2") == ("exact_match", exact_match, 2.0)
    (tmp_path / "constants_for_reward.py").write_text("ONE = 1.0\n")
    (tmp_path / "mine.py").write_text(
        "from dataclasses import dataclass\nfrom constants_for_reward import ONE\n\n\n@dataclass\nclass Score:\n"
        "    value: float\n\n\ndef score(prompts, completions, **columns):\n    return [Score(ONE).value] * len(prompts)\n"
    )
    name, function, _ = resolve_reward(f"{tmp_path / 'mine.py'}:score")
    assert (name, function(["a", "b"], ["c", "d"])) == ("score", [1.0, 1.0])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mth", "did you mean 'math'"),
        ("zzz", "There are: density_ratio, exact_match, form, length, math, model, near.*; or give file.py:function"),
        ("math*x", "not a number: write NAME"),
        ("nowhere/at/all.py:f", "there is no file nowhere/at/all.py"),
        ("no_such_module_here:f", r"ModuleNotFoundError.*write file.py:function"),
        ("unipo.rewards.verifiers:exact_mach", "did you mean 'exact_match'"),
        ("unipo.rewards.verifiers:REWARDS", "is dict, not a function"),
    ],
)
def test_what_cannot_be_found_is_named(text, message):
    with pytest.raises(RewardError, match=message):
        resolve_reward(text)


def test_a_file_that_does_not_load_says_why(tmp_path):
    (tmp_path / "broken.py").write_text("def f(:\n")
    with pytest.raises(RewardError, match="SyntaxError"):
        resolve_reward(f"{tmp_path / 'broken.py'}:f")
