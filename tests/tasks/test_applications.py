"""Tasks with several question types: what their answers mean, by another route."""

from random import Random

import pytest

from unipo.rewards import RewardSet
from unipo.tasks import get_task
from unipo.tasks.corpus import Hidden, document, hidden_segments, segments
from unipo.tasks.describe import reason
from unipo.tasks.rating import DROP


def totals(task, problems, completions):
    names = dict.fromkeys(n for p in problems for n in p.columns)
    columns = {n: [p.columns.get(n) for p in problems] for n in names} | {"answer": [p.answer for p in problems]}
    return RewardSet(task.rewards)([p.prompt for p in problems], completions, columns)


@pytest.mark.parametrize("name", ["rating:3", "derivations:2", "describe", "arithmetic"])
def test_what_runs_are_rewarded_with_is_one_for_experts_alone(name):
    task = get_task(name)
    problems = [task.problem(i) for i in range(200)]
    assert totals(task, problems, [task.demonstration(p, "worked") for p in problems])[0] == [1.0] * 200
    assert max(totals(task, problems, [task.wrong(p) for p in problems])[0]) < 1.0


def test_a_rating_is_five_less_what_the_damage_takes():
    problems = [get_task("rating:3").problem(i) for i in range(300)]
    assert {p.columns["task"] for p in problems} == {"score", "damage"}
    for problem in problems:
        kind, severity = problem.columns["damage"].split()
        signal = problem.prompt.split()[1].rstrip("=")
        changed = sum(a != b for a, b in zip(signal, problem.columns["clean"], strict=True))
        if kind in ("noise", "gaps"):
            assert changed == int(severity) + 1
        if kind == "gaps":
            assert signal.count("0") == changed
        expected = (
            f"{5 - DROP[kind] * int(severity):.1f}" if problem.columns["task"] == "score" else problem.columns["damage"]
        )
        assert problem.answer == expected


def test_parts_of_a_rating():
    task = get_task("rating")
    score = next(p for p in map(task.problem, range(99)) if p.columns["task"] == "score" and p.answer == "4.1")
    assert totals(task, [score] * 4, ["4.4", "4.5", "4", "bad"])[0] == [
        1.0,
        0.5,
        0.5,
        0.0,
    ]  # |4 - 4.1| < 0.35, bad form
    damage = next(p for p in map(task.problem, range(99)) if p.answer == "noise 1")
    assert totals(task, [damage] * 3, ["noise 1", "noise 2", "gaps 1"])[0] == [1.0, 0.625, 0.5]


def test_segments_of_sentences_and_lines():
    assert segments("One is one. Two; three!\nFour? five") == ["One is one.", "Two;", "three!", "Four?", "five"]
    assert segments(" \n\n") == []


def test_hidden_segments_by_hand():
    found = list(hidden_segments(["a.", "b.", "c.", "d.", "e."]))
    assert found[:2] == [Hidden("asr", "a.", "", "b.", "b. c. d."), Hidden("msr", "a.", "c.", "b.", "b. c. d.")]
    assert [h.target for h in found] == ["b.", "b.", "c.", "c.", "d.", "d."]
    assert all(h.target not in h.before for h in found)
    assert [h.target for h in hidden_segments(["a.", "b.", "long.", "d."], shortest=3)] == ["long."] * 2
    assert not list(hidden_segments(["a.", "b."]))


def test_an_asr_prompt_does_not_leak_what_comes_after():
    for problem in map(get_task("derivations:2").problem, range(200)):
        before = problem.columns["before"]
        assert problem.prompt.startswith(before)
        rest = problem.prompt.removeprefix(before)
        assert rest == ">" if problem.columns["task"] == "asr" else rest.startswith("_")
        assert problem.columns["reference"].startswith(problem.answer)


def test_documents_follow_their_rule_but_for_a_tenth_of_the_results():
    random, wrong = Random(0), 0
    for _ in range(400):
        parts = document(random, [("+", 7), ("*", 2)], 3, 5)
        value = "3"
        for i, part in enumerate(parts):
            left, _, result = part.rstrip(";").partition("=")
            operator, operand = [("+", 7), ("*", 2)][i % 2]
            assert left == f"{value}{operator}{operand}"
            true = (int(value) + operand if operator == "+" else int(value) * operand) % 100
            wrong += int(result) != true
            value = result
    assert abs(wrong / 2000 - 0.1) < 4 * (0.09 / 2000) ** 0.5


def test_the_embedded_reasoner_sees_its_prompt_alone():
    said = [reason("137+258=", Random(i)) for i in range(400)]
    right = [s.rpartition("#")[2] == "395" for s in said]
    assert abs(sum(right) / 400 - 0.9) < 4 * (0.09 / 400) ** 0.5
    assert {s for s in said if "#" in s} <= {"137+258#395", "137+258#394", "137+258#396"}
    assert reason("x+258=", Random(0)) == "?"
    task = get_task("describe")
    assert task.reason is reason
    problem = task.problem(0)
    description = problem.columns["reason_prompt"].replace("{description}", problem.columns["description"])
    assert description == task.demonstration(problem, "worked").partition("#")[0] + "="
