"""Rewards between right and wrong, by hand; routing by task; settings on the command line."""

import math

import pytest

from unipo.rewards import (
    Formatted,
    ForTask,
    Near,
    Overlap,
    Prefix,
    RewardError,
    RewardSet,
    Within,
    WordByWord,
    exact_match,
    resolve_reward,
    split_rewards,
)


def judged(reward, said, **columns):
    return reward(["p"] * len(said), said, **columns)


def test_within_is_strict_and_counts_what_is_no_number_as_wrong():
    said = ["3.0", "3.34", "x 2#2.7", "3.5", "2.5", "", "nan", "inf", "three"]
    assert judged(Within(0.5), said, answer=["3.0"] * 9) == [1, 1, 1, 0, 0, 0, 0, 0, 0]
    assert judged(Within(), ["3.0"], answer=["3.34"]) == [1.0]
    assert judged(Within(math.inf), ["3", "-9", "x"], answer=[1, 2, 3]) == [1.0, 1.0, 0.0]
    assert judged(Within(), ["1"], answer=[None]) == [None]
    assert judged(Within(), ["1"]) == [None]


def test_near_falls_with_the_error_of_either_sign():
    errors = judged(Near(0.5), ["3.0", "3.5", "2.5", "4.0", "x"], answer=["3"] * 5)
    assert errors == pytest.approx([1.0, math.exp(-0.5), math.exp(-0.5), math.exp(-2.0), 0.0])


def test_overlap_of_intervals_by_hand():
    said = ["2 6", "x#4, 8", "0 4", "7 9", "6 4", "5", "1 x", "4 8 9"]
    assert judged(Overlap(), said, answer=["4 8"] * 8) == pytest.approx([2 / 6, 1, 0, 1 / 5, 0, 0, 0, 0])
    apart = judged(Overlap(least=-1.0), ["0 1", "8 9", "9 8"], answer=["4 8"] * 3)
    assert apart == pytest.approx([-3 / 8, 0, -1]), "as printed it is negative where the intervals are apart"
    name, function, _ = resolve_reward("overlap(least=-1)")
    assert (name, judged(function, ["0 1"], answer=["4 8"])) == ("overlap", [-3 / 8])


def test_word_by_word_counts_the_level_only_after_the_class():
    said = ["noise 2", "noise 3", "noise", "blur 2", "2 noise", "", "noise 2 2"]
    assert judged(WordByWord(), said, answer=["noise 2"] * 7) == [1.0, 0.25, 0.25, 0.0, 0.0, 0.0, 0.25]


def test_the_form_is_that_of_the_whole_answer():
    assert judged(Formatted(), ["3.5", "a#3.5", "3.55", "x"], form=[r"\d\.\d"] * 4) == [1.0, 1.0, 0.0, 0.0]
    assert judged(Formatted(), ["3.5", "3"], form=[None, r"\d"]) == [None, 1.0]


def test_the_prefix_judge_of_the_card():
    """A segment, two segments, and a beginning are right; a later segment alone, an empty and a longer text are not."""
    reference, first = "12+7=19; 19*2=38; 38-5=33;", "12+7=19;"
    said = ["12+7=19;", "12+7=19;  19*2=38;", "12+7", "19*2=38;", "", "12+7=18;", reference + "x"]
    assert judged(Prefix(), said, reference=[reference] * 7) == [1, 1, 1, 0, 0, 0, 0]
    assert judged(Prefix(minimum=6), said, reference=[reference] * 7) == [1, 1, 0, 0, 0, 0, 0]
    assert judged(Prefix(share=1.0), said, reference=[reference] * 7, answer=[first] * 7) == [1, 1, 0, 0, 0, 0, 0]
    assert judged(Prefix(share=0.5), ["12+7", "12+"], reference=[reference] * 2, answer=[first] * 2) == [1, 0]
    assert judged(Prefix(), ["thought#12+7=19;", "x"], reference=[reference, None]) == [1, None]


def test_a_router_calls_each_reward_with_the_rows_of_its_task_alone():
    seen = []

    def spy(prompts, completions, **columns):
        seen.append((prompts, completions, columns))
        return [0.5] * len(prompts)

    routed = ForTask("score", spy)
    assert routed(["a", "b", "c"], ["1", "2", "3"], task=["score", "x", "score"], answer=[7, 8, 9]) == [0.5, None, 0.5]
    assert seen == [(["a", "c"], ["1", "3"], {"answer": [7, 9]})]
    assert routed(["a"], ["1"], task=["x"]) == [None]
    assert routed(["a"], ["1"]) == [None]
    assert len(seen) == 1


def test_the_parts_of_a_routed_sum_are_kept_apart():
    rewards = RewardSet((
        ("score", ForTask("score", Within(0.5)), 0.5), ("damage", ForTask("damage", WordByWord()), 0.5),
        ("form", Formatted(), 0.5)))  # fmt: skip
    columns = {
        "task": ["score", "damage", "score"],
        "answer": ["3.0", "noise 2", "1.0"],
        "form": [r"\d\.\d", r"\w+ \d", r"\d\.\d"],
    }
    total, kept, parts = rewards(["p"] * 3, ["3.2", "noise 3", "x"], columns)
    assert total == [1.0, 0.625, 0.0]
    assert all(kept)
    assert parts["score"][0] == 1.0
    assert math.isnan(parts["score"][1])
    assert parts["damage"][1] == 0.25
    assert parts["form"] == [1.0, 1.0, 0.0]


def test_settings_tasks_and_weights_are_written_on_the_command_line():
    assert resolve_reward("within(width=0.5)@score*0.25") == ("within@score", ForTask("score", Within(0.5)), 0.25)
    assert resolve_reward("prefix(minimum=4, share=1.0)") == ("prefix", Prefix(4, 1.0), 1.0)
    assert resolve_reward("exact_match@damage") == ("exact_match@damage", ForTask("damage", exact_match), 1.0)
    assert split_rewards("prefix(minimum=4,share=1.0)*2, math") == ["prefix(minimum=4,share=1.0)*2", " math"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("within(wdth=0.5)", "no setting 'wdth'; its settings: width"),
        ("math(width=1)", "no setting 'width'; its settings: none: it is a plain function"),
        ("within(width=big)", "are not all numbers"),
        ("within(0.5)", "no setting '0.5'"),
        ("within(width=0.5", "cannot read the reward"),
    ],
)
def test_settings_that_do_not_exist_are_named(text, message):
    with pytest.raises(RewardError, match=message):
        resolve_reward(text)
