"""Embedded tasks: random access, disjoint splits, experts that are right, mistakes that are wrong."""

import json
import subprocess
import sys
from random import Random

import pytest

from unipo.tasks import STYLES, TASKS, TaskError, get_task
from unipo.tasks.base import split_of
from unipo.tasks.countdown import evaluate, solves

EVERY = [f"{name}:{level}" for name, task in TASKS.items() for level in task.all_levels]
N = 150


def rows(task, problems):
    columns = {name: [p.columns[name] for p in problems] for name in problems[0].columns}
    return {**columns, "answer": [p.answer for p in problems], "level": [p.level for p in problems]}


def rewarded(task, problems, completions):
    return task.reward([p.prompt for p in problems], completions, **rows(task, problems))


@pytest.mark.parametrize("name", EVERY)
def test_experts_are_right_mistakes_are_wrong_and_both_fit(name):
    task = get_task(name)
    problems = [task.problem(i) for i in range(N)]
    for style in STYLES:
        written = [task.demonstration(p, style) for p in problems]
        assert rewarded(task, problems, written) == [1.0] * N
        assert max(map(len, written)) + 1 <= task.max_completion_tokens
        wrong = [task.wrong(p, i, style) for i, p in enumerate(problems)]
        assert rewarded(task, problems, wrong) == [0.0] * N
    pairs = [task.pair(p, 3) for p in problems]
    assert [c for c, _ in pairs] == [p.answer for p in problems]
    assert rewarded(task, problems, [r for _, r in pairs]) == [0.0] * N
    assert {p.level for p in problems} == set(task.levels)
    json.dumps([dict(p.columns) for p in problems])


@pytest.mark.parametrize("name", [*TASKS, "arithmetic:1", "countdown:1", "sort:1"])
def test_splits_are_disjoint_and_held_out_problems_distinct(name):
    task = get_task(name)
    train = {task.problem(i).prompt for i in range(2000)}
    held_out = [task.problem(i, "held_out") for i in range(50)]
    assert not train & {p.prompt for p in held_out}
    distinct = len({p.id for p in held_out})
    assert distinct == 50 or [task.problem(i + distinct, "held_out") for i in range(9)] == held_out[:9]


def test_a_held_out_problem_is_not_given_away_by_a_rearranged_train_problem():
    arithmetic, countdown, sort = get_task("arithmetic"), get_task("countdown:2"), get_task("sort:1")
    held_out = [arithmetic.problem(i, "held_out") for i in range(300)]
    added = {frozenset(p.columns["numbers"]) for p in held_out if p.columns["operator"] == "+"}
    train = [arithmetic.problem(i) for i in range(3000)]
    assert not added & {frozenset(p.columns["numbers"]) for p in train if p.columns["operator"] == "+"}
    for task, shape in ((countdown, lambda p: (p.columns["target"], *sorted(p.columns["numbers"]))),
                        (sort, lambda p: p.answer)):  # fmt: skip
        known = {shape(task.problem(i, "held_out")) for i in range(60)}
        assert not known & {shape(task.problem(i)) for i in range(2000)}


def test_the_hash_holds_out_a_tenth():
    share = sum(split_of("arithmetic", str(i)) == "held_out" for i in range(20_000)) / 20_000
    assert abs(share - 0.1) < 4 * (0.1 * 0.9 / 20_000) ** 0.5


@pytest.mark.parametrize("name", TASKS)
def test_access_is_random_repeatable_and_independent_of_history(name):
    task = get_task(name)
    late = task.problem(10**9)
    forward = [task.problem(i, split) for split in ("train", "held_out") for i in range(5)]
    backward = [task.problem(i, split) for split in ("held_out", "train") for i in reversed(range(5))]
    assert forward == backward[::-1]
    assert task.problem(10**9) == late != task.problem(10**9 + 1)
    assert task.wrong(late, 7) == task.wrong(late, 7)
    assert len({task.wrong(late, i) for i in range(40)}) > 1


def test_problems_do_not_depend_on_the_process():
    script = "from unipo.tasks import get_task; print([get_task('countdown').problem(i).prompt for i in range(5)])"
    other = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert other.strip() == str([get_task("countdown").problem(i).prompt for i in range(5)])


def test_levels_are_chosen_by_suffix_or_argument():
    assert get_task("arithmetic:1-3").levels == (1, 2, 3)
    assert get_task("arithmetic:3,1").levels == (3, 1)
    assert get_task("arithmetic").problem(4, levels=[3]) == get_task("arithmetic:3").problem(4)
    assert all(10 <= min(get_task("arithmetic:2").problem(i).columns["numbers"]) <= 99 for i in range(50))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("arithmetc", "did you mean 'arithmetic'"),
        ("nothing", "There are: arithmetic, countdown"),
        ("arithmetic:9", "no level 9: it has the levels 1 to 6"),
        ("arithmetic:two", "is not a level: write arithmetic:2"),
        ("arithmetic:3-1", "no level"),
        ("arithmetic:", "is not a level"),
    ],
)
def test_bad_names_say_what_there_is(name, message):
    with pytest.raises(TaskError, match=message):
        get_task(name)


def test_bad_arguments_are_named():
    task = get_task("arithmetic")
    with pytest.raises(TaskError, match="did you mean 'held_out'"):
        task.problem(0, "heldout")
    with pytest.raises(TaskError, match="did you mean 'worked'"):
        task.demonstration(task.problem(0), "work")
    with pytest.raises(IndexError, match="count from 0"):
        task.problem(-1)
    with pytest.raises(ValueError, match="needs the column 'answer'"):
        task.reward(["1+1="], ["2"])


# ---- what the answers mean, by an independent route --------------------------------------------------------------------
@pytest.mark.parametrize("level", [1, 2, 4])
def test_arithmetic_answers_and_written_steps(level):
    for i in range(100):
        problem = get_task(f"arithmetic:{level}").problem(i)
        value, _ = evaluate(problem.prompt.rstrip("="))
        assert value == int(problem.answer) >= 0
        digits = []
        for step in get_task("arithmetic").demonstration(problem, "worked").partition("#")[0].split(","):
            left, _, right = step.partition("=")
            assert evaluate(left)[0] == int(right)
            digits.append(int(right) % 10 if len(digits) < level - 1 else int(right))
        assert sum(digit * 10**place for place, digit in enumerate(digits)) == int(problem.answer)


def test_arithmetic_worked_by_hand():
    task = get_task("arithmetic")
    problem = next(p for p in map(task.problem, range(5000)) if p.columns["operator"] == "+" and p.prompt[1] == "7")
    assert rewarded(task, [problem] * 4, [problem.answer, f" {problem.answer}\n", f"x#{problem.answer}", "x"]) == [
        1,
        1,
        1,
        0,
    ]
    assert rewarded(task, [problem] * 2, [f"{problem.answer}#0", f"0{problem.answer}"]) == [0, 0]


@pytest.mark.parametrize("level", [1, 2, 4])
def test_modular_chain_prompts_mean_what_they_say(level):
    task = get_task(f"modular_chain:{level}")
    for i in range(100):
        problem = task.problem(i)
        text, _, modulus = problem.prompt.rstrip("=").rpartition("%")
        assert evaluate(text)[0] % int(modulus) == int(problem.answer)
        for step in task.demonstration(problem, "worked").partition("#")[0].split(","):
            operation, reduction, remainder = step.split("=")
            assert reduction == f"{evaluate(operation)[0]}%{modulus}"
            assert evaluate(operation)[0] % int(modulus) == int(remainder)


def test_reverse_and_sort_by_hand():
    for i in range(50):
        word = get_task("reverse").problem(i)
        assert word.prompt == f"reverse {''.join(reversed(word.answer))}="
        digits = get_task("sort:3").problem(i)
        assert sorted(digits.prompt[5:-1]) == list(digits.answer)
    counts = get_task("sort:3").demonstration(digits, "worked").partition("#")[0].split()
    assert "".join(d * int(n) for d, _, n in (c.partition("x") for c in counts)) == digits.answer


# ---- the countdown verifier --------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("expression", "value"), [("3*5+7", 22), ("3*(5+7)", 36), ("8/4-1", 1), ("1/3*3", 1), (" 2 - 3 ", -1), ("7", 7)]
)
def test_expressions_are_evaluated_exactly(expression, value):
    assert evaluate(expression)[0] == value


@pytest.mark.parametrize(
    "text",
    ["", "3+", "3**9", "9**9**9**9", "__import__('os')", "a+1", "1.5+2", "True+1", "-3+4", "3//2", "[1][0]", "1/0", "1/(2-2)",
     "(" * 150 + "1" + ")" * 150, "1+" * 99 + "1", "1+" * 500 + "1", "3*5+7=22", "\x00", "1 if 1 else 2", "(lambda: 1)()"],
)  # fmt: skip
def test_what_is_not_an_expression_is_wrong_and_never_runs(text):
    if text != "1+" * 99 + "1":
        with pytest.raises(ValueError):
            evaluate(text)
    assert not solves(text, {"numbers": [3, 5, 7], "target": 22})


def test_countdown_uses_each_number_once():
    columns = {"numbers": [3, 5, 7], "target": 22}
    right = ["3*5+7", "7+5*3", "(7)+3*5"]
    wrong = ["22", "15+7", "3*5+7+0", "3*5+7*1", "7+3*5+3-3", "3+5+7", "5*3"]
    assert all(solves(a, columns) for a in right)
    assert not any(solves(a, columns) for a in wrong)
    assert solves("8/4", {"numbers": [4, 8], "target": 2})


def test_countdown_numbers_without_another_target_still_have_a_mistake():
    task = get_task("countdown:1")
    twos = next(p for p in map(task.problem, range(5000)) if p.columns["numbers"] == [2, 2])
    assert rewarded(task, [twos], [task.wrong(twos)]) == [0.0]


def test_rows_of_a_mixed_batch_keep_their_own_columns():
    task = get_task("countdown")
    problems = [task.problem(i) for i in range(20)]
    order = Random(0).sample(range(20), 20)
    completions = [problems[j].answer for j in order]
    expected = [float(solves(c, problems[i].columns)) for i, c in enumerate(completions)]
    assert rewarded(task, problems, completions) == expected
    assert 0 < sum(expected) < 20 or sum(expected) == 0
