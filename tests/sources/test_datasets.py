"""User data: every format, every use, and every fault with the exact place it is in."""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from unipo.sources.data.datasets import DataError, Problem, load_rows
from unipo.sources.data.problems import Findings
from unipo.sources.data.report import Spread, check, long_prompts

USER = {"role": "user", "content": "2 + 2?"}
SYSTEM = {"role": "system", "content": "Be brief."}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def write(path: Path, rows: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return path


def problems(path: Path, use: str | None = None) -> tuple[Problem, ...]:
    """What loading, and then asking for a use, raises."""
    with pytest.raises(DataError) as caught:
        getattr(load_rows(path), use or "prompts")()
    return caught.value.problems


def only(path: Path, use: str | None = None) -> Problem:
    (problem,) = problems(path, use)
    assert problem.remedy
    return problem


# ---- formats -------------------------------------------------------------------------------------------------------
ROWS = [
    {"prompt": "1+1", "answer": "2", "level": 3, "tags": ["a", "b"], "info": {"x": 1}},
    {"prompt": "2+é", "answer": None, "level": 4, "tags": [], "info": {}},
]


def save_jsonl(folder: Path) -> Path:
    return write(folder / "a.jsonl", ROWS)


def save_json_list(folder: Path) -> Path:
    (folder / "a.json").write_text(json.dumps(ROWS, indent=1))
    return folder / "a.json"


def save_json_object(folder: Path) -> Path:
    (folder / "a.json").write_text(json.dumps({"data": ROWS}))
    return folder / "a.json"


def save_json_lines(folder: Path) -> Path:
    return write(folder / "a.json", ROWS)


def save_gzip(folder: Path) -> Path:
    with gzip.open(folder / "a.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(r) + "\n" for r in ROWS)
    return folder / "a.jsonl.gz"


@pytest.mark.parametrize("save", [save_jsonl, save_json_list, save_json_object, save_json_lines, save_gzip])
def test_json_formats_give_back_the_same_rows(tmp_path: Path, save: Any) -> None:
    data = load_rows(save(tmp_path))
    assert list(data) == ROWS
    assert data[-1] == ROWS[1]
    assert data.kinds == ("prompts",)
    row = data.prompts()[1]
    assert (row.prompt, row.answer, row.columns) == ("2+é", None, {k: v for k, v in ROWS[1].items() if k != "prompt"})
    assert row.where.number == 2


def test_parquet_and_saved_datasets_keep_rows_and_row_numbers(tmp_path: Path) -> None:
    rows = [{"prompt": [SYSTEM, USER], "answer": "4", "level": 1}, {"prompt": [USER], "answer": "5", "level": 2}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "one")
    splits = {"train": datasets.Dataset.from_list(rows), "test": datasets.Dataset.from_list(rows).select([1])}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "two")
    for name in ("a.parquet", "one", "two"):
        data = load_rows(tmp_path / name)
        assert list(data) == rows
        assert data.prompts()[0].prompt == [SYSTEM, USER]
        assert str(data.where(1)) == f"{tmp_path / name} row 2"
    assert [r.answer for r in load_rows(tmp_path / "two", split="test").prompts()] == ["5"]
    with pytest.raises(DataError, match="no split 'dev'; there are: train, test"):
        load_rows(tmp_path / "two", split="dev")


def test_csv_types_the_known_columns_and_counts_lines_within_quotes(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text(
        'prompt,completion,reward,label,logprobs,answer\n"a\nb",x,0.5,true,"[-1.0, -2]",007\nc,y,1,False,,8\n'
    )
    data = load_rows(path)
    assert data[0] == {"prompt": "a\nb", "completion": "x", "reward": 0.5, "label": True, "logprobs": [-1.0, -2.0],
                       "answer": "007"}  # fmt: skip
    assert [data.where(i).number for i in range(2)] == [2, 4]
    assert set(data.kinds) == {"prompts", "demonstrations", "labels", "rollouts"}
    assert [r.label for r in data.labels()] == [True, False]


def test_csv_with_a_wrong_number_of_fields_or_twice_a_name(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("prompt,answer\na,1\nb,2,3\n")
    problem = only(tmp_path / "a.csv")
    assert (problem.row, problem.found) == (3, "3 fields, but the header has 2")
    (tmp_path / "b.csv").write_text("prompt,prompt\na,1\n")
    assert only(tmp_path / "b.csv").found == "the header names 'prompt' 2 times"


def test_a_folder_gives_the_files_of_the_split_in_order(tmp_path: Path) -> None:
    write(tmp_path / "train-00001.jsonl", [{"prompt": "c", "level": 1.5}])
    pq.write_table(pa.table({"prompt": ["a", "b"], "level": [1, 2]}), tmp_path / "train-00000.parquet")
    write(tmp_path / "test.jsonl", [{"prompt": "t"}])
    write(tmp_path / ".hidden.jsonl", [{"prompt": "h"}])
    data = load_rows(tmp_path)
    assert [r["prompt"] for r in data] == ["a", "b", "c"]
    assert [r["level"] for r in data] == [1, 2, 1.5]
    assert [(Path(data.where(i).file).name, data.where(i).number, data.where(i).unit) for i in range(3)] == [
        ("train-00000.parquet", 1, "row"), ("train-00000.parquet", 2, "row"), ("train-00001.jsonl", 1, "line")]  # fmt: skip
    assert [r["prompt"] for r in load_rows(tmp_path, split="test")] == ["t"]
    with pytest.raises(DataError, match="no file for the split 'validation'; the files are for: test, train"):
        load_rows(tmp_path, split="validation")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no data files"):
        load_rows(tmp_path / "empty")


def test_nested_columns_of_different_formats_and_shapes_join(tmp_path: Path) -> None:
    tool_call = {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}
    chat = [USER, tool_call, {"role": "tool", "content": "4"}]
    pq.write_table(pa.Table.from_pylist([{"messages": [USER]}]), tmp_path / "a.parquet")
    write(tmp_path / "b.jsonl", [{"messages": chat}])
    assert [r.prompt for r in load_rows(tmp_path).prompts()] == [[USER], chat]


def test_one_file_is_not_given_for_another_split(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", ROWS)
    with pytest.raises(DataError, match="one file holds one split"):
        load_rows(path, split="test")
    assert len(load_rows(write(tmp_path / "my_test.jsonl", ROWS), split="test")) == 2


def test_missing_paths_and_formats_name_what_is_near(tmp_path: Path) -> None:
    write(tmp_path / "problems.jsonl", ROWS)
    with pytest.raises(DataError, match=r"no such file or folder -> is .*problems\.jsonl meant\?"):
        load_rows(tmp_path / "problem.jsonl")
    (tmp_path / "a.pkl").write_bytes(b"")
    with pytest.raises(DataError, match=r"format '\.pkl' cannot be read -> convert it to one of \.jsonl"):
        load_rows(tmp_path / "a.pkl")
    (tmp_path / "a.parquet").write_bytes(b"PAR1 half")
    with pytest.raises(DataError, match="cannot be read as parquet"):
        load_rows(tmp_path / "a.parquet")


def test_hub_names_reach_the_hub_and_its_errors_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    def hub(name: str, config: str | None) -> dict[str, Any]:
        if config != "main":
            raise ConnectionError("offline")
        return {"train": datasets.Dataset.from_list([{"question": name, "answer": "1"}])}

    monkeypatch.setattr(datasets, "load_dataset", hub)
    data = load_rows("owner/name:main", rename={"question": "prompt"})
    assert data.prompts()[0].prompt == "owner/name"
    with pytest.raises(DataError, match="ConnectionError: offline"):
        load_rows("owner/name")
    with pytest.raises(DataError, match="there is no column 'questoin' -> is 'question' meant"):
        load_rows("owner/name:main", rename={"questoin": "prompt"})


def test_slices_and_takes_keep_provenance(tmp_path: Path) -> None:
    data = load_rows(write(tmp_path / "a.jsonl", [{"prompt": f"p{i}"} for i in range(5000)]))
    assert [r.where.number for r in data[4095:4098].prompts()] == [4096, 4097, 4098]
    assert [r["prompt"] for r in data.take([4999, 0])] == ["p4999", "p0"]
    assert [r.prompt for r in data.prompts()[10:30:10]] == ["p10", "p20"]
    assert sum(1 for _ in data.prompts()) == len(data.prompts()) == 5000
    with pytest.raises(IndexError):
        data[5000]


# ---- uses ----------------------------------------------------------------------------------------------------------
def test_messages_are_prompts_and_demonstrations(tmp_path: Path) -> None:
    data = load_rows(write(tmp_path / "a.jsonl", [{"messages": [SYSTEM, USER, assistant("4")], "level": 1}]))
    assert data.kinds == ("prompts", "demonstrations")
    assert data.prompts()[0].prompt == [SYSTEM, USER]
    row = data.demonstrations()[0]
    assert (row.prompt, row.completion, row.columns) == ([SYSTEM, USER], "4", {"level": 1})


def test_messages_that_wait_for_an_answer_are_prompts_only(tmp_path: Path) -> None:
    data = load_rows(write(tmp_path / "a.jsonl", [{"messages": [USER]}]))
    assert data.kinds == ("prompts",)
    with pytest.raises(DataError, match="cannot be used for demonstrations: no 'messages' that end with an assistant"):
        data.demonstrations()


@pytest.mark.parametrize("row", [
    {"prompt": [USER], "chosen": "4", "rejected": "5"},
    {"prompt": [USER], "chosen": [assistant("4")], "rejected": [assistant("5")]},
    {"chosen": [USER, assistant("4")], "rejected": [USER, assistant("5")]},
    {"prompt": "2 + 2?", "chosen": [USER, assistant("4")], "rejected": [USER, assistant("5")]},
])  # fmt: skip
def test_the_common_forms_of_pairs_are_one(tmp_path: Path, row: dict[str, Any]) -> None:
    pair = load_rows(write(tmp_path / "a.jsonl", [row | {"margin": 2}])).pairs()[0]
    assert (pair.prompt, pair.chosen, pair.rejected, pair.columns) == ([USER], "4", "5", {"margin": 2})


def test_a_row_may_list_equivalent_answers(tmp_path: Path) -> None:
    row = {"prompt": "2 + 2?", "chosen": ["4", "four"], "rejected": "5"}
    pair = load_rows(write(tmp_path / "a.jsonl", [row])).pairs()[0]
    assert (pair.all_chosen, pair.all_rejected) == (("4", "four"), ("5",))


@pytest.mark.parametrize(("row", "message"), [
    ({"chosen": ["4", ""], "rejected": "5"}, "answer 2 of the list is empty"),
    ({"chosen": ["4", "5"], "rejected": ["5"]}, "an answer that is also in 'chosen'"),
    ({"chosen": ["4"], "rejected": []}, "an empty list"),
])  # fmt: skip
def test_faults_in_lists_of_answers(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_rows(write(tmp_path / "a.jsonl", [{"prompt": "2 + 2?"} | row])).pairs()


def test_plain_text_is_documents_divided_by_empty_lines(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("\nOne is one.\nTwo.\n\n \nThree.\r\n\nFour", encoding="utf-8")
    data = load_rows(tmp_path / "book.txt")
    assert data.kinds == ("documents",)
    assert [(d.text, d.where.number) for d in data.documents()] == [
        ("One is one.\nTwo.", 2),
        ("Three.", 6),
        ("Four", 8),
    ]
    write(tmp_path / "more.jsonl", [{"text": "a b", "url": "u"}])
    assert [d.columns for d in load_rows(tmp_path / "more.jsonl").documents()] == [{"url": "u"}]
    assert load_rows(tmp_path).documents()[0].text == "a b", "beside data, a text file is about the data"
    write(tmp_path / "bad.jsonl", [{"text": "a"}, {"text": " "}])
    with pytest.raises(DataError, match="line 2"):
        load_rows(tmp_path / "bad.jsonl")


def test_rollouts_carry_what_off_policy_training_needs(tmp_path: Path) -> None:
    full = {"prompt": "p", "completion": "c", "reward": 1, "logprobs": [-0.5, 0.0], "token_ids": [7, 9], "source": "replay",
            "policy_version": 12, "prompt_ids": [1], "group": "g", "truncated": True, "answer": "4"}  # fmt: skip
    bare = {"prompt": "p", "completion": "", "reward": -2.5, "completion_ids": [3], "prompt_id": 5}
    first, second = load_rows(write(tmp_path / "a.jsonl", [full, bare])).rollouts()
    assert first.logprobs is not None
    assert first.token_ids is not None
    assert first.logprobs.tolist() == [-0.5, 0.0]
    assert first.logprobs.dtype == np.float64
    assert first.token_ids.tolist() == [7, 9]
    assert (first.reward, first.policy_version, first.source, first.group, first.truncated) == (
        1.0,
        12,
        "replay",
        "g",
        True,
    )
    assert first.columns["answer"] == "4"
    assert (second.logprobs, second.policy_version, second.source, second.group) == (None, -1, "", 5)
    assert second.token_ids is not None
    assert second.token_ids.tolist() == [3]


def test_parquet_rollouts_with_gaps_in_lists(tmp_path: Path) -> None:
    table = pa.table({"prompt": ["a", "b", "c"], "completion": ["x", "y", "z"], "reward": [1.0, 0.0, 0.5],
                      "logprobs": pa.array([[-1.0], None, [-2.0, -3.0]], pa.list_(pa.float32()))})  # fmt: skip
    pq.write_table(table, tmp_path / "a.parquet")
    found = [None if r.logprobs is None else r.logprobs.tolist() for r in load_rows(tmp_path / "a.parquet").rollouts()]
    assert found == [[-1.0], None, [-2.0, -3.0]]


# ---- faults, each in row 2 (or where stated) of three ---------------------------------------------------------------
GOOD = {"prompt": "p", "completion": "c", "chosen": "x", "rejected": "y", "reward": 0.5, "logprobs": [-1.0],
        "token_ids": [4], "label": True}  # fmt: skip


@pytest.mark.parametrize(("use", "change", "column", "found"), [
    ("prompts", {"prompt": " \n"}, "prompt", "empty"),
    ("prompts", {"prompt": None}, "prompt", "missing"),
    ("demonstrations", {"completion": ""}, "completion", "empty"),
    ("pairs", {"chosen": "y"}, "rejected", "the same as 'chosen'"),
    ("pairs", {"rejected": None}, "rejected", "missing"),
    ("rollouts", {"reward": math.nan}, "reward", "nan where a finite number was expected"),
    ("rollouts", {"reward": math.inf}, "reward", "inf where a finite number was expected"),
    ("rollouts", {"reward": None}, "reward", "missing where a finite number was expected"),
    ("rollouts", {"logprobs": [-1.0, -2.0]}, "logprobs", "2 log-probs for 1 token ids"),
    ("rollouts", {"logprobs": [0.25]}, "logprobs", "token 1 has log-prob 0.25"),
    ("rollouts", {"logprobs": [-math.inf]}, "logprobs", "token 1 has log-prob -inf"),
    ("rollouts", {"token_ids": [1.5]}, "token_ids", "not a list of whole numbers"),
    ("rollouts", {"token_ids": [1, [2]]}, "token_ids", "not a list of whole numbers"),
    ("rollouts", {"logprobs": [None]}, "logprobs", "not a list of numbers"),
    ("rollouts", {"token_ids": [-1]}, "token_ids", "a negative token id (-1)"),
    ("rollouts", {"policy_version": math.nan}, "policy_version", "a number (nan)"),
    ("rollouts", {"group": [1]}, "group", "a list ([1]) where text or a whole number was expected"),
    ("rollouts", {"policy_version": 1.5}, "policy_version", "a number (1.5)"),
    ("labels", {"label": None}, "label", "missing where true or false was expected"),
])  # fmt: skip
def test_a_fault_is_found_in_its_row_and_column(
    tmp_path: Path, use: str, change: dict[str, Any], column: str, found: str
) -> None:
    problem = only(write(tmp_path / "a.jsonl", [GOOD, GOOD | change, GOOD]), use)
    assert (problem.row, problem.column, problem.found, problem.unit) == (2, column, found, "line")
    assert problem.file == str(tmp_path / "a.jsonl")
    report = check(tmp_path / "a.jsonl")
    assert problem in report.problems
    assert {u.kind: u.rows for u in report.uses}[use] == 2


@pytest.mark.parametrize(("use", "messages", "found"), [
    ("prompts", [], "an empty list of messages"),
    ("prompts", [{"role": "human", "content": "x"}], "message 1 has the role 'human'"),
    ("prompts", [{"from": "human", "value": "x"}], "message 1 is an object with 'from', 'value', without a role"),
    ("prompts", [USER, SYSTEM, USER], "message 2 is a system message"),
    ("prompts", [{"role": "user", "content": 3}], "message 1 (user) has a content that is a number (3)"),
    ("prompts", [{"role": "user", "content": ""}], "message 1 (user) has an empty content"),
    ("prompts", [assistant("x")], "nothing comes before the answer"),
    ("prompts", [USER, assistant("x"), assistant("y")], "the messages end with the role 'assistant'"),
    ("demonstrations", [USER], "the messages end with the role 'user'"),
    ("demonstrations", [USER, {"role": "assistant", "tool_calls": [1]}], "the last assistant message is missing"),
    ("demonstrations", [USER, assistant("")], "the last assistant message is empty"),
])  # fmt: skip
def test_faults_in_messages(tmp_path: Path, use: str, messages: list[Any], found: str) -> None:
    good = {"messages": [USER, assistant("4")]}
    problem = only(write(tmp_path / "a.jsonl", [good, good, {"messages": messages}]), use)
    assert (problem.row, problem.column, problem.found) == (3, "messages", found)


@pytest.mark.parametrize(("row", "column", "found"), [
    ({"chosen": [USER, assistant("x")], "rejected": [SYSTEM, USER, assistant("y")]}, "rejected", "at message 1"),
    ({"chosen": [USER, assistant("x"), USER, assistant("z")], "rejected": [USER, assistant("y"), USER, assistant("z")]},
     "rejected", "at message 2"),
    ({"chosen": [USER, assistant("x")], "rejected": [USER, assistant("x"), USER, assistant("y")]}, "rejected", "message 2"),
    ({"chosen": [USER, assistant("x")], "rejected": [USER, USER]}, "rejected", "with the roles user"),
    ({"chosen": [USER, assistant("x")], "rejected": [USER, assistant("x")]}, "rejected", "the same as"),
    ({"prompt": "other", "chosen": [USER, assistant("x")], "rejected": [USER, assistant("y")]}, "prompt", "not part of"),
])  # fmt: skip
def test_conversations_that_make_no_pair(tmp_path: Path, row: dict[str, Any], column: str, found: str) -> None:
    problem = only(write(tmp_path / "a.jsonl", [row]), "pairs")
    assert (problem.row, problem.column) == (1, column)
    assert found in problem.found


def test_bytes_that_are_not_utf8_by_line_and_offset(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    first, second = b'{"prompt": "fine"}\n', b'{"prompt": "caf\xe9"}\n'
    path.write_bytes(first + second + first)
    problem = only(path)
    assert problem.row == 2
    assert f"byte 0xe9 is not UTF-8, at byte 15 of the line, {len(first) + 15} of the file" in problem.found
    path.write_text("prompt\nx\n", encoding="utf-16")
    assert only(path).found == "the file is UTF-16, not UTF-8"
    path.write_bytes(b"\xef\xbb\xbf" + first)
    assert list(load_rows(path)) == [{"prompt": "fine"}]


def test_parquet_text_that_is_not_utf8_by_row(tmp_path: Path) -> None:
    bad = pa.array([b"ok", b"caf\xe9", None]).view(pa.string())
    pq.write_table(pa.table({"prompt": ["a", "b", "c"], "answer": bad}), tmp_path / "a.parquet")
    problem = only(tmp_path / "a.parquet")
    assert (problem.row, problem.column, problem.unit) == (2, "answer", "row")
    assert "byte 0xe9 at byte 3" in problem.found


def test_half_a_surrogate_pair_is_no_text(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"prompt": "a"}, {"prompt": "\ud83d"}])
    problem = only(path)
    assert (problem.row, problem.column) == (2, "prompt")
    assert "surrogate" in problem.found


def test_invalid_json_by_line_blank_lines_counted(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "a"}\n\n{"prompt": "b"\n[1]\n{}\n')
    third, fourth, fifth = problems(tmp_path / "a.jsonl")
    assert (third.row, fourth.row, fifth.row) == (3, 4, 5)
    assert third.found.startswith("invalid JSON: Expecting ',' delimiter at character")
    assert fourth.found == "a list where a row was expected"
    assert fifth.found == "an empty object"
    (tmp_path / "deep.jsonl").write_text("[" * 200_000 + "\n")
    assert "invalid JSON" in only(tmp_path / "deep.jsonl").found
    (tmp_path / "b.json").write_text('[{"prompt": "a"},\n {"prompt" "b"}]')
    assert only(tmp_path / "b.json").row == 2


def test_mixed_types_name_each_row_of_the_minority(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"prompt": f"p{i}", "answer": i, "x": 1 + i / 2} for i in range(6)]
    rows[1]["answer"], rows[4]["answer"] = "one", None
    problem = only(write(tmp_path / "a.jsonl", rows))
    assert (problem.row, problem.column) == (2, "answer")
    assert problem.found == "text, but a number in 4 other rows"
    rows[3]["prompt"] = [USER]
    found = {(p.row, p.column) for p in problems(write(tmp_path / "a.jsonl", rows))}
    assert found == {(2, "answer"), (4, "prompt")}


def test_mixed_types_across_files(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", [{"prompt": "a", "answer": "1"}, {"prompt": "b", "answer": "2"}])
    pq.write_table(pa.table({"prompt": ["c"], "answer": [3]}), tmp_path / "b.parquet")
    problem = only(tmp_path)
    assert (Path(problem.file).name, problem.row, problem.found) == (
        "b.parquet",
        1,
        "a number, but text in 2 other rows",
    )


def test_text_columns_of_another_type(tmp_path: Path) -> None:
    found = only(write(tmp_path / "a.jsonl", [{"prompt": 3}])).found
    assert found == "a number (3) where text was expected"
    pq.write_table(pa.table({"prompt": [b"x"]}), tmp_path / "a.parquet")
    assert only(tmp_path / "a.parquet").found == "bytes (b'x') where text was expected"


def test_duplicated_ids_name_both_rows(tmp_path: Path) -> None:
    rows = [{"id": i, "prompt": "p"} for i in ("a", "b", None, "a", None)]
    problem = only(write(tmp_path / "a.jsonl", rows))
    assert (problem.row, problem.column) == (4, "id")
    assert problem.found == f"the id 'a' is taken by {tmp_path / 'a.jsonl'} line 1"
    pq.write_table(pa.table({"id": [5, 6, 6], "prompt": ["p", "q", "r"]}), tmp_path / "b.parquet")
    assert (only(tmp_path / "b.parquet").row, only(tmp_path / "b.parquet").column) == (3, "id")


def test_missing_columns_name_those_that_exist_and_the_nearest(tmp_path: Path) -> None:
    problem = only(write(tmp_path / "a.jsonl", [{"promt": "x", "answer": "1"}]))
    assert "no column 'prompt' (is 'promt' meant?)" in problem.found
    assert "columns: promt, answer" in problem.found
    assert "(is 'question' meant?)" in only(write(tmp_path / "b.jsonl", [{"question": "x"}])).found
    problem = only(write(tmp_path / "c.jsonl", [{"prompt": "x", "responce": "1"}]), "demonstrations")
    assert problem.found.startswith("cannot be used for demonstrations: no column 'completion'")
    label = write(tmp_path / "d.jsonl", [{"prompt": "x", "completion": "1", "label": "good"}])
    assert "column 'label' is text, it should be true or false" in only(label, "labels").found


def test_zero_rows(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("\n\n")
    assert only(tmp_path / "a.jsonl").found == "no rows"
    pq.write_table(pa.table({"prompt": pa.array([], pa.string())}), tmp_path / "a.parquet")
    assert only(tmp_path / "a.parquet").found == "no rows"


def test_twenty_problems_are_shown_and_the_rest_counted(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"prompt": "fine"}, *[{"prompt": ""}] * 33])
    with pytest.raises(DataError) as caught:
        load_rows(path)
    assert len(caught.value.problems) == 20
    assert [p.row for p in caught.value.problems] == list(range(2, 22))
    assert str(caught.value).splitlines()[-1] == "... and 13 more"
    mixed = write(tmp_path / "b.jsonl", [*[{"prompt": "p", "x": 1}] * 60, *[{"prompt": "p", "x": "1"}] * 50])
    with pytest.raises(DataError) as caught:
        load_rows(mixed)
    assert (len(caught.value.problems), caught.value.more) == (20, 30)


def test_a_use_that_is_not_asked_for_does_not_stand_in_the_way(tmp_path: Path) -> None:
    data = load_rows(write(tmp_path / "a.jsonl", [{"prompt": "p", "chosen": "x", "rejected": "x"}]))
    assert data.prompts()[0].prompt == "p"
    with pytest.raises(ValueError, match="unknown use 'pair'"):
        data.missing("pair")


# ---- report --------------------------------------------------------------------------------------------------------
class Words:
    """A tokenizer of words."""

    eos_token, eos_token_id, chat_template = "</s>", 0, None

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [len(word) for word in text.split()]}


def test_over_long_prompts_are_found_before_training(tmp_path: Path) -> None:
    data = load_rows(write(tmp_path / "a.jsonl", [{"prompt": "one two"}, {"prompt": "one two three four"}]))
    (problem,) = long_prompts(data, Words(), 3)
    assert (problem.row, problem.column) == (2, "prompt")
    assert problem.found == "4 tokens, more than the limit of 3"
    assert list(long_prompts(data, Words(), 4)) == []
    report = check(tmp_path / "a.jsonl", Words(), max_prompt_tokens=3)
    assert report.problems == (problem,)
    assert (report.tokens["prompt"].mean, report.tokens["prompt"].max) == (3, 4)
    chat = write(tmp_path / "b.jsonl", [{"messages": [USER]}] * 2)
    assert [p.found[:30] for p in check(chat, Words()).problems] == ["the prompts are chat messages,"]


def test_the_report_counts_what_is_there(tmp_path: Path) -> None:
    rows = [{"prompt": "aa", "completion": "c" * n, "reward": r, "source": s, "group": g, "note": note}
            for n, r, s, g, note in ((1, 0.0, "fresh", 1, None), (2, 1.0, "fresh", 1, "x"), (3, 4.0, "old", 2, None),
                                     (6, math.nan, "old", 2, None))]  # fmt: skip
    report = check(write(tmp_path / "a.jsonl", rows))
    assert (report.rows, report.more, report.ok) == (4, 0, False)
    assert {c.name: (c.family, c.missing) for c in report.columns}["note"] == ("text", 0.75)
    assert {u.kind: u.rows for u in report.uses} == {
        "prompts": 4,
        "demonstrations": 4,
        "pairs": 0,
        "ratings": 0,
        "labels": 0,
        "documents": 0,
        "rollouts": 3,
    }
    assert report.kinds == ("prompts", "demonstrations", "rollouts")
    assert next(u.missing for u in report.uses if u.kind == "labels") == "no column 'label'"
    assert (report.rewards["fresh"].mean, report.rewards["fresh"].std, report.rewards["old"].count) == (0.5, 0.5, 1)
    assert report.groups is not None
    assert (report.groups.count, report.groups.min, report.groups.max) == (2, 1, 2)
    assert (report.characters["completion"].mean, report.characters["completion"].median) == (3.0, 2.5)
    (problem,) = report.problems
    assert (problem.row, problem.column) == (4, "reward")
    text = str(report)
    for part in ("4 rows", "note        text, 75.0% missing", "no: no column 'chosen'", "reward of old", "1 problems"):
        assert part in text


def test_the_report_never_raises_for_data(tmp_path: Path) -> None:
    assert not check(tmp_path / "nothing.jsonl").ok
    (tmp_path / "a.jsonl").write_bytes(b'{"prompt": "a"}\n{"prompt": 3}\n\xff\n{"prompt": ["x"], "id": [1]}\n')
    report = check(tmp_path / "a.jsonl")
    assert {p.row for p in report.problems} == {2, 3, 4}
    assert check(write(tmp_path / "b.jsonl", [{"q": 1}])).problems[0].found.startswith("cannot be used for anything")
    assert "no problems" in str(check(write(tmp_path / "c.jsonl", [{"prompt": "a"}])))


def test_repeated_prompts_warn_but_do_not_stop(tmp_path: Path) -> None:
    report = check(write(tmp_path / "a.jsonl", [{"prompt": p} for p in "abaa"]))
    assert report.ok
    assert report.warnings == ("2 of 4 rows repeat the prompt of an earlier row",)
    samples = [{"prompt": "a", "completion": "c", "reward": 1.0}] * 4
    report = check(write(tmp_path / "b.jsonl", samples))
    assert report.warnings == ()
    assert report.groups == Spread.of([4])


def test_a_cell_has_one_problem_a_file_may_have_several() -> None:
    findings = Findings()
    for row, found in ((1, "empty"), (1, "late"), (2, "empty"), (None, "old"), (None, "old"), (None, "damaged")):
        findings.add(Problem("f", found, "fill", row, "prompt"))
    assert [(p.row, p.found) for p in findings.problems] == [
        (1, "empty"),
        (2, "empty"),
        (None, "old"),
        (None, "damaged"),
    ]
    assert str(findings.problems[0]) == "f row 1, column 'prompt': empty -> fill"


# ---- round trip ----------------------------------------------------------------------------------------------------
text = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
prompt_text = text.filter(lambda s: bool(s.strip()))
nested = st.recursive(st.none() | st.booleans() | st.integers() | text, lambda c: st.lists(c, max_size=3)
                      | st.dictionaries(text, c, max_size=3), max_leaves=6)  # fmt: skip
row = st.fixed_dictionaries(
    {"prompt": prompt_text},
    optional={"answer": text, "score": st.floats(allow_nan=False), "count": st.integers(), "flag": st.booleans(),
              "info": st.dictionaries(text, nested, max_size=3), "logprobs": st.lists(st.floats(-50, 0), max_size=4),
              "list": st.lists(nested, max_size=3)},
)  # fmt: skip


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(row, min_size=1, max_size=8))
def test_any_rows_come_back_as_they_were_written(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    data = load_rows(write(tmp_path / "a.jsonl", rows))
    assert [{k: v for k, v in r.items() if v is not None} for r in data] == rows
    for record, written in zip(data.prompts(), rows, strict=True):
        assert record.prompt == written["prompt"]
        assert {k: v for k, v in record.columns.items() if v is not None} == {
            k: v for k, v in written.items() if k != "prompt"
        }
