"""Calling rewards: sums over what applies, and no failure that could pass for a 0."""

import asyncio
import contextlib
import math
import signal
import threading
import time
import warnings

import numpy as np
import pytest
import torch

from unipo.rewards import RewardError, RewardSet, RewardWarning

PROMPTS, COMPLETIONS = ["1+1=", "2+2=", "3+3="], ["2", "4", "7"]


def scored(*functions, on_error="raise", timeout=20.0, weights=None, **columns):
    named = tuple((f"f{i}", f, (weights or [1.0] * 9)[i]) for i, f in enumerate(functions))
    return RewardSet(named, on_error, timeout)(PROMPTS, COMPLETIONS, columns)


def gives(*values):
    """A reward of fixed values for the three rows, also when it is asked for one of them alone."""
    return lambda prompts, completions, **columns: [values[COMPLETIONS.index(c)] for c in completions]


def test_the_sum_is_weighted_and_over_the_functions_that_apply():
    total, kept, parts = scored(gives(1.0, None, 1), gives(2.0, 3.0, None), weights=[0.5, -2.0])
    assert total == [0.5 - 4.0, -6.0, 0.5]
    assert kept == [True] * 3
    assert parts["f0"][0] == 1.0
    assert math.isnan(parts["f0"][1])
    assert math.isnan(parts["f1"][2])


def test_a_row_without_any_reward_is_dropped_and_not_zero():
    total, kept, _ = scored(gives(1.0, None, 0.0))
    assert kept == [True, False, True]
    assert math.isnan(total[1])
    with pytest.raises(RewardError, match=r"no reward function applies to any row: f0.*It has: answer"):
        scored(gives(None, None, None), answer=[1, 2, 3])


def test_functions_get_prompts_completions_and_columns():
    def check(prompts, completions, answer, **columns):
        assert (prompts, completions, answer, columns) == (PROMPTS, COMPLETIONS, [2, 4, 6], {"level": [1, 1, 2]})
        return [float(c == str(a)) for c, a in zip(completions, answer, strict=True)]

    assert scored(check, answer=[2, 4, 6], level=[1, 1, 2])[0] == [1.0, 1.0, 0.0]


def test_asynchronous_functions_are_awaited_also_inside_a_running_loop():
    async def later(prompts, completions, **columns):
        await asyncio.sleep(0.01)
        return [1.0, 2.0, 3.0]

    async def main():
        return scored(later)[0]

    assert scored(later)[0] == [1.0, 2.0, 3.0]
    assert asyncio.run(main()) == [1.0, 2.0, 3.0]


@pytest.mark.parametrize("values", [torch.tensor([1.0, 0.0, 2.0]), np.array([1, 0, 2]), (True, False, np.float32(2)),
                                    [torch.tensor(1.0), 0, 2.0]])  # fmt: skip
def test_numbers_of_any_make_count(values):
    assert scored(lambda prompts, completions: values)[0] == [1.0, 0.0, 2.0]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, "1.0", [1.0], 1j, object()])
def test_what_is_not_a_number_names_function_row_and_remedy(bad):
    with pytest.raises(
        RewardError, match=r"reward 'f0' returned .* for row 1 \(prompt '2\+2='.*'4'\): expected a finite"
    ):
        scored(gives(1.0, bad, 0.0))
    with pytest.warns(RewardWarning, match="1 of 3 rows were dropped"):
        total, kept, _ = scored(gives(1.0, bad, 0.0), on_error="drop")
    assert kept == [True, False, True]
    assert [total[0], total[2]] == [1.0, 0.0]
    assert math.isnan(total[1])


@pytest.mark.parametrize(
    ("values", "found"), [([1.0, 2.0], "2 values"), (None, "NoneType"), ("abc", "3 values"), (1.0, "float")]
)
def test_a_result_of_another_length_is_an_error(values, found):
    with pytest.raises(RewardError, match=f"returned {found} for 3 completions"):
        scored(lambda prompts, completions: values)


def test_a_function_that_raises_is_blamed_with_its_row():
    def divides(prompts, completions, **columns):
        return [1 / (4 - int(c)) for c in completions]

    with pytest.raises(
        RewardError, match=r"raised ZeroDivisionError: division by zero for row 1.*on-reward-error drop"
    ) as e:
        scored(divides)
    assert isinstance(e.value.__cause__, ZeroDivisionError)
    with pytest.warns(RewardWarning, match="1 of 3 rows were dropped: reward 'f0' raised ZeroDivisionError"):
        total, kept, _ = scored(divides, on_error="drop")
    assert kept == [True, False, True]
    assert [total[0], total[2]] == [0.5, pytest.approx(-1 / 3)]


def test_a_failing_function_drops_the_row_even_where_another_one_applies():
    def divides(prompts, completions, **columns):
        return [1 / (4 - int(c)) for c in completions]

    with pytest.warns(RewardWarning):
        _, kept, parts = scored(gives(1.0, 1.0, 1.0), divides, on_error="drop")
    assert kept == [True, False, True]
    assert parts["f0"] == [1.0, 1.0, 1.0]


def test_an_error_that_no_single_row_causes_is_told():
    def alone(prompts, completions, **columns):
        if len(completions) > 1:
            raise ValueError("one at a time")
        return [1.0]

    with pytest.raises(RewardError, match="one at a time on a batch of 3, though not for any row alone"):
        scored(alone)
    assert scored(alone, on_error="drop")[0] == [1.0] * 3


def hangs(prompts, completions, **columns):
    while "4" in completions:
        time.sleep(0.01)
    return [1.0] * len(completions)


async def hangs_async(prompts, completions, **columns):
    while "4" in completions:
        await asyncio.sleep(0.01)
    return [1.0] * len(completions)


def swallows(prompts, completions, **columns):
    while "4" in completions:
        with contextlib.suppress(Exception):
            time.sleep(0.01)
    return [1.0] * len(completions)


@pytest.mark.parametrize("function", [hangs, hangs_async, swallows])
def test_a_function_that_hangs_is_stopped_and_its_row_named(function):
    started = time.monotonic()
    with pytest.raises(RewardError, match=r"reward 'f0' hung \(no answer after 0.2 s.*reward-timeout.*for row 1"):
        scored(function, timeout=0.2)
    with pytest.warns(RewardWarning, match="1 of 3 rows"):
        assert scored(function, timeout=0.2, on_error="drop")[1] == [True, False, True]
    assert time.monotonic() - started < 5


def test_a_function_that_hangs_beside_the_main_thread_is_left_behind():
    found = []

    def work():
        try:
            scored(hangs, timeout=0.2)
        except RewardError as error:
            found.append(str(error))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(10)
    assert "hung (no answer after 0.2 s" in found[0]


def test_when_every_row_hangs_the_rest_is_given_up():
    def never(prompts, completions, **columns):
        time.sleep(60)

    started = time.monotonic()
    reward = RewardSet((("never", never, 1.0),), "drop", 0.1)
    with pytest.warns(RewardWarning, match="50 of 50 rows"):
        _, kept, _ = reward(["p"] * 50, ["c"] * 50, {})
    assert kept == [False] * 50
    assert time.monotonic() - started < 3


@pytest.mark.skipif(not hasattr(signal, "SIGALRM"), reason="no alarms on this system")
def test_functions_may_use_alarms_and_find_their_handlers_again():
    def alarmed(prompts, completions, **columns):
        before = signal.signal(signal.SIGALRM, lambda *_: None)
        signal.alarm(1)
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        return [1.0] * len(completions)

    handlers = [signal.getsignal(s) for s in (signal.SIGALRM, signal.SIGUSR2)]
    assert scored(alarmed)[0] == [1.0] * 3
    with pytest.raises(RewardError):
        scored(hangs, timeout=0.1)
    assert [signal.getsignal(s) for s in (signal.SIGALRM, signal.SIGUSR2)] == handlers


def test_a_time_limit_that_passes_just_as_the_call_returns_is_harmless():
    reward = RewardSet((("f", lambda prompts, completions: time.sleep(0.002) or [1.0], 1.0),), "drop", 0.002)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RewardWarning)
        results = [reward(["p"], ["c"], {})[1] for _ in range(200)]
    assert all(isinstance(kept, bool) for (kept,) in results)


def test_columns_and_settings_are_checked_at_the_door():
    with pytest.raises(ValueError, match="'answer' has 2 entries for 3 completions"):
        scored(gives(1.0, 1.0, 1.0), answer=[1, 2])
    with pytest.raises(ValueError, match="expected raise or drop"):
        RewardSet((("f", hangs, 1.0),), "ignore")
    with pytest.raises(ValueError, match="at least one function"):
        RewardSet(())
    with pytest.raises(ValueError, match="share a name"):
        RewardSet((("f", hangs, 1.0), ("f", hangs, 1.0)))
    assert RewardSet((("f", hangs, 1.0),))([], [], {}) == ([], [], {"f": []})
