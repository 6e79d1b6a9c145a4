"""Comparisons and labels of users: every form they are written in, every fault by row, their report, and noise on purpose."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.policies.models import trained_tokenizer
from unipo.sources.data.comparisons import check_given, comparison_episodes, labelled_episodes
from unipo.sources.data.datasets import DataError, PairRow, load_rows
from unipo.sources.data.label_noise import flipped
from unipo.sources.data.pair_report import pair_report
from unipo.sources.data.report import check
from unipo.sources.rows import pair_episodes, with_reference
from unipo.statistics import wilson_interval


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return path


def read(folder: Path, *rows: dict[str, Any]) -> list[PairRow]:
    return list(load_rows(write(folder / "a.jsonl", list(rows))).comparisons())


# ---- forms -----------------------------------------------------------------------------------------------------------
LIST = {"prompt": "q", "completions": ["c", "a", "b", "d"]}


@pytest.mark.parametrize(
    "row", [{**LIST, "ratings": [2, 5.0, 4, 2]}, {**LIST, "ranking": [3, 1, 2, 3]}], ids=["ratings", "ranking"]
)
def test_lists_are_read_best_first(tmp_path: Path, row: dict[str, Any]) -> None:
    (found,) = read(tmp_path, row)
    assert found.answers == ("a", "b", "c", "d")
    assert (found.all_chosen, found.all_rejected) == (("a",), ("b", "c", "d"))
    assert sorted(found.ratings, reverse=True) == list(found.ratings)
    assert found.ratings[2] == found.ratings[3] < found.ratings[1]


def test_ties_at_the_top_are_all_chosen(tmp_path: Path) -> None:
    (found,) = read(tmp_path, {**LIST, "ratings": [2, 5, 5, 1]})
    assert (found.all_chosen, found.all_rejected, found.ratings) == (("a", "b"), ("c", "d"), (5, 5, 2, 1))


def test_chat_messages_make_lists(tmp_path: Path) -> None:
    said = [[{"role": "assistant", "content": text}] for text in ("a", "b")]
    row = {"prompt": [{"role": "user", "content": "q"}], "completions": said, "ratings": [1, 2]}
    assert read(tmp_path, row)[0].answers == ("b", "a")


@pytest.mark.parametrize("names", [("chosen_rating", "rejected_rating"), ("score_chosen", "score_rejected")])
def test_pairs_have_ratings_under_their_common_names(tmp_path: Path, names: tuple[str, str]) -> None:
    (found,) = read(tmp_path, {"prompt": "q", "chosen": "a", "rejected": "b", names[0]: 4, names[1]: 1.5, "note": "x"})
    assert found.ratings == (4.0, 1.5)
    assert found.columns == {"note": "x"}


def test_equivalent_answers_have_a_rating_each(tmp_path: Path) -> None:
    row = {"prompt": "q", "chosen": ["a", "b"], "rejected": "c", "chosen_rating": [4, 5], "rejected_rating": 1}
    assert read(tmp_path, row)[0].ratings == (4, 5, 1)


def test_answers_that_are_rated_one_by_one_make_lists(tmp_path: Path) -> None:
    """A rollouts file that a human rated: groups by `group`, without one by the prompt."""
    rated = [("p", "a", 1, 7), ("p", "b", 3, 7), ("q", "a", 2, 8), ("p", "c", 2, 7), ("q", "b", 1, 8)]
    rows = [{"prompt": p, "completion": c, "rating": r, "group": g, "reward": 0.0} for p, c, r, g in rated]
    for given in (rows, [{k: v for k, v in row.items() if k != "group"} for row in rows]):
        first, second = read(tmp_path, *given)
        assert (first.answers, first.ratings) == (("b", "c", "a"), (3, 2, 1))
        assert (second.prompt, second.answers) == ("q", ("a", "b"))
    assert {"ratings", "rollouts", "prompts"} <= set(load_rows(tmp_path / "a.jsonl").kinds)


def test_csv_and_a_folder_of_lists(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('prompt,completions,ratings\nq,"[""a"", ""b""]","[1, 2]"\n')
    (row,) = load_rows(tmp_path / "a.csv").comparisons()
    assert (row.answers, row.ratings) == (("b", "a"), (2, 1))
    (tmp_path / "b.csv").write_text("prompt,chosen,rejected,chosen_rating,rejected_rating\nq,a,b,3,1.5\n")
    assert load_rows(tmp_path / "b.csv").comparisons()[0].ratings == (3, 1.5)


# ---- faults ----------------------------------------------------------------------------------------------------------
PAIR = {"prompt": "q", "chosen": "a", "rejected": "b"}


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({**PAIR, "rejected": "a"}, "column 'rejected': the same as 'chosen' -> remove the row"),
        ({**PAIR, "chosen": " "}, "column 'chosen': empty"),
        ({**PAIR, "chosen_rating": 1}, "'rejected_rating': missing, where the other"),
        ({**PAIR, "chosen_rating": "5", "rejected_rating": 1}, "'chosen_rating': text"),
        ({**PAIR, "chosen": ["a", "c"], "chosen_rating": 1, "rejected_rating": 1}, "for 2 answers -> give one per answer"),
        ({**PAIR, "ref_chosen_logps": 2.0, "ref_rejected_logps": -1}, "'ref_chosen_logps': a number (2.0) where a log-prob"),
        ({**LIST, "ratings": [1, 2, 3]}, "column 'ratings': 3 of them for 4 answers"),
        ({**LIST, "ratings": [1, 2, 3, math.inf]}, "'ratings': answer 4 is rated inf where a finite rating"),
        ({**LIST, "ratings": [1, 2, True, 3]}, "answer 3 is rated a boolean"),
        ({**LIST, "ratings": [2, 2, 2, 2]}, "all 4 answers are rated 2 -> remove the row: it states no preference"),
        ({**LIST, "ranking": [0, 1, 2, 3]}, "'ranking': a number (0) where a place from 1 (best) to 4"),
        ({**LIST, "ranking": [1, 2, 3, 5]}, "a number (5) where a place"),
        ({**LIST, "ratings": [1, 2, 3, 4], "ref_logps": [-1.0]}, "column 'ref_logps': 1 of them for 4 answers"),
        ({"prompt": "q", "completions": ["a"], "ratings": [1]}, "a list of one answer -> a comparison needs two"),
        ({"prompt": "q", "completions": ["a", "a"], "ratings": [1, 2]}, "answer 2 is answer 1 again, and rated 2 instead of 1"),
        ({"prompt": "q", "completions": ["a", " "], "ratings": [1, 2]}, "answer 2 of the list is empty"),
    ],
)  # fmt: skip
def test_faults_by_row_and_column(tmp_path: Path, row: dict[str, Any], told: str) -> None:
    good = (
        {**LIST, "ratings": [1, 2, 3, 4]}
        if "completions" in row
        else {**PAIR, "chosen": ["x"] if "c" in row["chosen"] else "x"}
    )
    with pytest.raises(DataError) as caught:
        read(tmp_path, good, row)
    assert "a.jsonl line 2" in str(caught.value)
    assert told in str(caught.value)


def test_faults_of_groups_over_several_rows(tmp_path: Path) -> None:
    rows = [{"prompt": p, "completion": c, "rating": 1, "group": g} for p, c, g in
            (("p", "a", 1), ("q", "b", 1), ("p", "a", 2), ("p", "x", 3), ("p", "y", 3))]  # fmt: skip
    with pytest.raises(DataError) as caught:
        read(tmp_path, *rows)
    first, second, third = caught.value.problems
    assert (first.row, first.column) == (2, "prompt")
    assert "another prompt than that of its group" in first.found
    assert (second.row, second.found) == (3, "the group that starts here: a list of one answer")
    assert (third.row, third.found) == (4, "the group that starts here: all 2 answers are rated 1")


def test_missing_columns_name_what_is_near(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no column 'ratings' \(is 'scores' meant\?\)"):
        read(tmp_path, {"prompt": "q", "completions": ["a", "b"], "scores": [1, 2]})


# ---- episodes --------------------------------------------------------------------------------------------------------
def test_sums_are_spread_and_lists_of_log_probs_are_kept(tmp_path: Path) -> None:
    tokenizer = trained_tokenizer()
    size = len(tokenizer("bad", add_special_tokens=False)["input_ids"]) + 1
    each = [-0.5 * (i + 1) for i in range(size)]
    rows = read(
        tmp_path, {**PAIR, "chosen": "good", "rejected": "bad", "ref_chosen_logps": -6, "ref_rejected_logps": each}
    )
    made = comparison_episodes(tokenizer, rows)
    assert made.reduce("reference_logp").tolist() == pytest.approx([-6.0, sum(each)])
    assert made["reference_logp"][-size:].tolist() == pytest.approx(each)
    first = made["reference_logp"][: int(made.lengths()[0])]
    assert first.unique().numel() == 1
    rows = read(tmp_path, {**PAIR, "ref_chosen_logps": [-1.0] * 9, "ref_rejected_logps": -1})
    with pytest.raises(DataError, match="9 log-probs of a reference, and this model's tokenizer makes"):
        comparison_episodes(tokenizer, rows)


def test_rows_without_log_probs_stay_unknown_and_labels_have_theirs(tmp_path: Path) -> None:
    tokenizer = trained_tokenizer()
    made = comparison_episodes(
        tokenizer, read(tmp_path, PAIR, {**PAIR, "ref_chosen_logps": -1, "ref_rejected_logps": -2})
    )
    assert made.reduce("reference_logp").isnan().tolist() == [True, True, False, False]
    assert made["rating"].isnan().all()
    path = write(
        tmp_path / "l.jsonl", [{"prompt": "q", "completion": c, "label": c == "a", "ref_logps": -3} for c in "ab"]
    )
    labels = labelled_episodes(tokenizer, list(load_rows(path).labels()))
    assert labels["chosen"].tolist() == [True, False]
    assert labels.reduce("reference_logp").tolist() == pytest.approx([-3, -3])
    assert "reference_logp" not in comparison_episodes(tokenizer, read(tmp_path, PAIR))
    with pytest.raises(ValueError, match="3 log-probs of a reference for an answer of"):
        with_reference(labels, [(-1.0, -1.0, -1.0), None])


def test_numbers_of_prompts_reach_filters(tmp_path: Path) -> None:
    tokenizer = trained_tokenizer()
    made = comparison_episodes(tokenizer, read(tmp_path, {**PAIR, "quality": 3, "embedding": [1, 2.5]}, {**PAIR, "quality": 4,
                                               "embedding": [0, 1]}))  # fmt: skip
    assert made["quality"].tolist() == [3, 3, 4, 4]
    assert made["embedding"].tolist() == [[1, 2.5]] * 2 + [[0, 1]] * 2
    with pytest.raises(DataError, match="line 2, column 'quality': missing -> give every row a number"):
        comparison_episodes(tokenizer, read(tmp_path, {**PAIR, "quality": 3}, {**PAIR, "quality": None}))


def test_what_would_be_trained_on_is_whole_short_and_in_range(tmp_path: Path) -> None:
    tokenizer = trained_tokenizer()
    rows = read(tmp_path, PAIR, {**PAIR, "chosen": "long " * 40}, {**PAIR, "truncated": True},
                {**PAIR, "chosen_rating": 11, "rejected_rating": 3})  # fmt: skip
    made = comparison_episodes(tokenizer, rows)
    with pytest.raises(DataError) as caught:
        check_given(rows, made, 20, (1, 10))
    assert [p.row for p in caught.value.problems] == [2, 3, 4]
    for part in (
        "more than the model's context of 20",
        "an answer that a limit cut",
        "a rating of 11, outside 1 to 10",
    ):
        assert part in str(caught.value)
    check_given(rows, made.select(torch.tensor([0]), "group"), 20, (1, 10))  # what was filtered out is not looked at
    check_given(rows[:2], made.select(torch.tensor([0, 1]), "group"), None, ())


# ---- reports ---------------------------------------------------------------------------------------------------------
def test_signs_of_wrong_labels_are_counted(tmp_path: Path) -> None:
    pairs = [("p", "a", "b"), ("p", "b", "a"), ("p", "a", "b"), ("q", "a", "b"), ("q", "b", "c"), ("q", "c", "a"),
             ("q", "c", "d"), ("r", "a", "b"), ("r", "b", "c"), ("r", "a", "c")]  # fmt: skip
    rows = read(tmp_path, *({"prompt": p, "chosen": a, "rejected": b} for p, a, b in pairs))
    found = pair_report(rows)
    assert found is not None
    assert (found.count, found.lists, found.logged) == (10, 0, 0)
    assert (found.repeats.count, found.repeats.first) == (1, str(rows[2].where))
    assert (found.contradictions.count, found.contradictions.of) == (1, 8)
    assert found.contradictions.first == f"{rows[0].where} and {rows[1].where}"
    assert (found.cycles.count, found.cycles.of) == (1, 3)
    assert found.cycles.first in {str(r.where) for r in rows[3:6]}
    assert found.longer.of == 0
    assert any("contradict each other" in w for w in found.warnings)


def test_lists_speak_of_all_their_pairs(tmp_path: Path) -> None:
    """a > b > c and, in another row, c > b: said both ways; and ratings that deny the choice."""
    rows = read(tmp_path, {**LIST, "completions": ["a", "b", "c"], "ratings": [3, 2, 1]},
                {**LIST, "completions": ["c", "b"], "ratings": [2, 1]})  # fmt: skip
    found = pair_report(rows)
    assert found is not None
    assert (found.contradictions.count, found.contradictions.of, found.lists) == (1, 3, 1)
    rated = read(
        tmp_path, {**PAIR, "chosen_rating": 1, "rejected_rating": 4}, {**PAIR, "chosen_rating": 4, "rejected_rating": 4}
    )
    against = pair_report(rated)
    assert against is not None
    assert (against.against.count, against.against.of) == (1, 2)


def test_a_length_bias_is_told_where_its_interval_says_so(tmp_path: Path) -> None:
    rows = [{"prompt": str(i), "chosen": "yes indeed" if i < 18 else "no", "rejected": "perhaps"} for i in range(20)]
    found = pair_report(read(tmp_path, *rows))
    assert found is not None
    assert (found.longer.count, found.longer.of) == (18, 20)
    assert found.difference[0] == pytest.approx((18 * 3 - 2 * 5) / 20)
    low, high = wilson_interval(18, 20)
    assert f"(95 % interval {low:.1%} to {high:.1%})" in str(found)
    assert any("longer than chance" in w for w in found.warnings)
    balanced = pair_report(read(tmp_path, rows[0], rows[19]))
    assert balanced is not None
    assert not balanced.warnings


def test_the_check_of_a_file_has_the_report_and_the_range(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.jsonl",
        [{**LIST, "ratings": [1, 2, 3, 40]}, {**LIST, "ratings": [1, 2, 3, 4], "truncated": [False, True]}],
    )
    found = check(path, rating_range=(1, 10))
    assert found.pairs is not None
    assert found.pairs.lists == 2
    assert [p.row for p in found.problems] == [1, 2]
    assert "2 comparisons, 2 of them lists" in str(found)
    rated = write(tmp_path / "b.jsonl", [{"prompt": "p", "completion": c, "rating": i} for i, c in enumerate("ab")])
    again = check(rated)
    assert again.pairs is not None
    assert (again.pairs.count, again.ok, again.warnings) == (1, True, ())


# ---- noise -----------------------------------------------------------------------------------------------------------
def noisy(n: int = 400) -> Any:
    return pair_episodes(trained_tokenizer(), [f"p{i % 50}" for i in range(n)], [f"good {i}" for i in range(n)],
                         [f"bad {i}" for i in range(n)], [(3.0, 1.0)] * n)  # fmt: skip


def test_a_share_of_pairs_is_turned_round() -> None:
    data = noisy()
    turned, count = flipped(data, 0.3, 5)
    low, high = wilson_interval(count, 400)
    assert low < 0.3 < high
    tokens = [part.tolist() for part in data["token"].split(data.lengths().tolist())]
    after = [part.tolist() for part in turned["token"].split(turned.lengths().tolist())]
    swapped = [after[2 * i] == tokens[2 * i + 1] and after[2 * i + 1] == tokens[2 * i] for i in range(400)]
    assert sum(swapped) == count
    assert all(s or after[2 * i : 2 * i + 2] == tokens[2 * i : 2 * i + 2] for i, s in enumerate(swapped))
    assert turned["chosen"].tolist() == data["chosen"].tolist()
    assert turned["rating"].tolist() == data["rating"].tolist(), "the one that is preferred now has the higher rating"
    assert flipped(data, 0.0, 5)[1] == 0
    assert flipped(data, 1.0, 5)[1] == 400


def test_which_are_turned_depends_on_seed_and_content_alone() -> None:
    data, order = noisy(), torch.randperm(400, generator=torch.Generator().manual_seed(0))

    def losers(made: Any) -> set[tuple[int, ...]]:
        return {tuple(t.tolist()) for t in made["token"].split(made.lengths().tolist())[0::2]}

    assert losers(flipped(data, 0.3, 5)[0]) == losers(flipped(data.select(order, "group"), 0.3, 5)[0])
    assert losers(flipped(data, 0.3, 5)[0]) != losers(flipped(data, 0.3, 6)[0])
    few = data.select(torch.arange(40), "group")
    assert losers(flipped(few, 0.3, 5)[0]) <= losers(flipped(data, 0.3, 5)[0])


def test_equal_pairs_are_turned_apart() -> None:
    same = pair_episodes(trained_tokenizer(), ["p"] * 400, ["a"] * 400, ["b"] * 400)
    assert 80 < flipped(same, 0.3, 0)[1] < 160


def test_a_list_is_turned_end_to_end_and_labels_change_sides() -> None:
    made = pair_episodes(trained_tokenizer(), ["p"], [["best"]], [["mid", "low", "low too"]], [(5.0, 4.0, 1.0, 1.0)])
    made = made.with_columns("episode", place=torch.arange(4))
    turned, _ = flipped(made, 1.0, 0)
    assert turned["place"].tolist() == [2, 3, 1, 0]
    assert turned["rating"].tolist() == [5, 5, 2, 1]
    assert turned["chosen"].tolist() == [True, True, False, False]
    several, _ = flipped(pair_episodes(trained_tokenizer(), ["p"], [["a", "b"]], [["c"]]), 1.0, 0)
    assert several["chosen"].tolist() == [True, False, False]
