"""The command line, typed as a user types it: real commands, real files, bad input."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.policies.models import saved
from unipo.cli import main

SMALL = ["--steps", "2", "--prompts", "2", "--rollouts", "4", "--eval-prompts", "4", "--eval-every", "0"]


def unipo(*arguments: str) -> int:
    return main(list(arguments))


def test_a_run_leaves_what_scripts_rely_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert unipo("run", "grpo", "arithmetic", *SMALL, "--seed", "3", "--out", str(out), "--grpo.clip", "0.3") == 0
    table = pq.read_table(out / "metrics.parquet")
    assert {"step", "seconds", "reward", "tokens_sampled", "tokens_trained", "accuracy"} <= set(table.column_names)
    assert table.column("step").to_pylist() == [0, 1, 2]
    assert (out / "final" / "model.safetensors").exists()
    page = (out / "report.html").read_text()
    assert "<html" in page
    assert not re.search(r"(src|href)=.https?://", page), "self-contained"
    assert "clip: 0.3" in (out / "config.yaml").read_text()
    assert len(list((out / "episodes").iterdir())) == 2
    assert str(out / "report.html") in capsys.readouterr().out.replace("\n", "")
    assert unipo("evaluate", str(out), "--prompts", "8", "--samples", "2", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert {"accuracy", "accuracy_low", "accuracy_high", "pass_at_2"} <= set(found)
    assert unipo("report", str(out)) == 0
    assert unipo("run", "grpo", "arithmetic", *SMALL, "--out", str(out)) == 1
    assert "unipo resume" in capsys.readouterr().err.replace("\n", " ")


def test_four_kinds_of_rows_in_one_batch(tmp_path: Path) -> None:
    """Fresh rollouts, replayed ones, demonstrations and pairs: every term and source has gradient in the ledger."""
    out = tmp_path / "run"
    assert unipo("run", "grpo+0.2*sft+0.1*dpo", "arithmetic", *SMALL, "--steps", "4", "--replay", "2", "--demos", "task",
                 "--pairs", "task", "--dataset-rows", "16", "--out", str(out)) == 0  # fmt: skip
    last = pq.read_table(out / "metrics.parquet").to_pylist()[-1]
    for source in ("fresh", "replay", "demos", "pairs"):
        assert last[f"ledger/source/{source}/rows"] > 0, source
    shares = [last[f"ledger/source/{s}/gradient_share"] for s in ("fresh", "replay", "demos", "pairs")]
    assert sum(shares) == pytest.approx(1.0)
    assert last["ledger/term/sft/gradient_share"] > 0
    assert last["ledger/term/dpo/gradient_share"] > 0
    again = tmp_path / "again"
    assert (
        unipo("run", "rec", "arithmetic", *SMALL, "--replay", "2", "--replay-from", str(out), "--out", str(again)) == 0
    )
    assert pq.read_table(again / "metrics.parquet").to_pylist()[1]["ledger/source/replay/rows"] > 0


def problems(path: Path, chat: bool = False) -> Path:
    rows = [{"prompt": f"{i} + {i} =", "answer": str(2 * i)} for i in range(24)]
    if chat:
        rows = [{"messages": [{"role": "user", "content": r["prompt"]}], "answer": r["answer"]} for r in rows]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


@pytest.mark.parametrize("name", ["qwen3", "llama", "gemma", "mixtral", "mamba"])
def test_own_data_and_own_model(name: str, tmp_path: Path) -> None:
    """A user's JSONL and a checkpoint folder in the real format; the result loads with from_pretrained."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, data, out = (
        saved(name, tmp_path / "model"),
        problems(tmp_path / "p.jsonl", name == "qwen3"),
        tmp_path / "run",
    )
    assert unipo("run", "grpo", str(data), *SMALL, "--model", str(model), "--reward", "math,length*-0.01", "--max-tokens", "6",
                 "--learning-rate", "1e-3", "--out", str(out)) == 0  # fmt: skip
    trained = AutoModelForCausalLM.from_pretrained(out / "final")
    tokenizer = AutoTokenizer.from_pretrained(out / "final")
    assert trained.generate(**tokenizer("1 +", return_tensors="pt"), max_new_tokens=2, do_sample=False).shape[0] == 1


def test_lora_run_and_user_reward(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model, data, out = saved("llama", tmp_path / "model"), problems(tmp_path / "p.jsonl"), tmp_path / "run"
    (tmp_path / "mine.py").write_text(
        "def short(prompts, completions, **columns):\n    return [-len(c) for c in completions]\n"
    )
    assert unipo("run", "grpo", str(data), *SMALL, "--model", str(model), "--reward", f"{tmp_path / 'mine.py'}:short",
                 "--max-tokens", "6", "--lora-rank", "2", "--grpo.kl", "0.1", "--out", str(out)) == 0  # fmt: skip
    AutoModelForCausalLM.from_pretrained(out / "final")
    assert pq.read_table(out / "metrics.parquet").to_pylist()[-1]["kl_reference"] >= 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["rnu"], "did you mean 'run'"),
        (["run", "grpoo", "arithmetic"], "did you mean grpo"),
        (["run", "grpo", "arithmetik"], "arithmetic"),
        (["run", "grpo", "arithmetic:99"], "level"),
        (["run", "grpo"], "METHOD and TASK"),
        (["run", "seppo", "arithmetic"], "not built yet"),
        (["run", "grpo", "arithmetic", "--grpo.clyp", "1"], "--grpo.clip"),
        (["run", "sft", "arithmetic"], "--demos"),
        (["run", "grpo", "arithmetic", "--demos", "task"], "sft"),
        (["run", "grpo", "arithmetic", "--rollouts", "1"], "at least 2"),
        (["run", "grpo", "arithmetic", "--steps", "0"], "--steps is 0"),
        (["run", "grpo", "arithmetic", "--reward", "mth"], "math"),
        (["run", "grpo", "arithmetic", "--model", "/nowhere/at/all"], "could not load the model"),
        (["run", "grpo", "/nowhere/data.jsonl"], "data.jsonl"),
        (["resume", "/nowhere"], "is not a run"),
        (["evaluate", "/nowhere"], "is not a run"),
        (["report", "/nowhere"], "is not a run"),
        (["show", "grpoo"], "grpo"),
        (["data", "chekc", "x"], "unipo data check"),
        (["methods", "--famly"], "--family"),
    ],
)
def test_bad_input_is_told(arguments: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if arguments[0] == "run":
        arguments = [*arguments, "--out", str(tmp_path / "x")]
    try:
        code = main(arguments)
    except SystemExit as stop:
        code = int(stop.code or 0)
    assert code != 0
    message = capsys.readouterr().err.replace("\n", " ")
    assert said in " ".join(message.split())
    assert "Traceback" not in message
    assert not (tmp_path / "x" / "config.yaml").exists()


def test_an_unknown_flag_names_the_nearest(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-m", "unipo.cli", "run", "grpo", "arithmetic", "--lerning-rate", "1"],
                          capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, cwd=tmp_path)  # fmt: skip
    assert done.returncode != 0
    assert "--learning-rate" in done.stdout + done.stderr


def test_a_failing_reward_names_its_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bad.py").write_text(
        "def bad(prompts, completions, **columns):\n    return [float('nan')] * len(completions)\n"
    )
    assert (
        unipo(
            "run", "grpo", "arithmetic", *SMALL, "--reward", f"{tmp_path / 'bad.py'}:bad", "--out", str(tmp_path / "r")
        )
        == 1
    )
    assert "nan" in capsys.readouterr().err


def test_looking_around(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert unipo("methods", "--json") == 0
    listed = json.loads(capsys.readouterr().out)
    assert len([m for m in listed if m["row"] is not None]) == 191
    assert {"row", "slug", "family", "state", "verdict"} <= set(listed[0])
    assert unipo("methods", "--family", "llm-rl") == 0
    assert unipo("show", "chord") == 0
    assert "phi" in capsys.readouterr().out
    assert (
        unipo("explain", "grpo+0.2*sft", "arithmetic", "--demos", "task", "--dataset-rows", "16", "--prompts", "4") == 0
    )
    text = capsys.readouterr().out
    assert "rows it can use" in text
    assert "completions of the policy" in text
    assert unipo("data", "check", str(problems(tmp_path / "p.jsonl"))) == 0
    text = capsys.readouterr().out
    assert "grpo" in text
    assert "methods that fit" in text
    assert unipo() == 0


def test_compare_prints_a_table_and_keeps_finished_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["compare", "grpo,rloo", "arithmetic", "--seeds", "2", *SMALL, "--out", str(tmp_path / "c")]
    assert unipo(*arguments) == 0
    assert {p.name for p in (tmp_path / "c").iterdir() if p.is_dir()} >= {"grpo-s0", "grpo-s1", "rloo-s0", "rloo-s1"}
    text = capsys.readouterr().out
    assert "rloo" in text
    assert (tmp_path / "c" / "report.html").exists()
    assert unipo(*arguments) == 0
