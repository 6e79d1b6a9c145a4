"""Runs on several tasks, on plain text, and on what two models make; and what is refused before anything trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

import unipo
from unipo.api import configure, resume, start
from unipo.episodes import Episodes
from unipo.tasks import TINY_MODEL
from unipo.training import ConfigError, RunConfig
from unipo.training.problems import dataset_prompts, divided

SMALL: dict[str, Any] = {"steps": 1, "prompts": 2, "eval_prompts": 2, "eval_every": 0, "tensorboard": False}
TEXT = "\n\n".join(
    " ".join(f"Number {n} plus {k} is {n + k}." for k in range(1, 6)) for n in range(1, 11)
)  # ten documents of five sentences


def trained(method: str, task: str, out: Path, **settings: Any) -> Any:
    return unipo.train(method, task, out=str(out), **{**SMALL, **settings})


def test_the_parts_of_a_reward_are_metrics_and_episodes_know_their_task(tmp_path: Path) -> None:
    run = trained("q-insight", "rating", tmp_path / "run", prompts=8)
    row = run.records.metrics[-1]
    fresh = Episodes.load(tmp_path / "run" / "episodes" / "step_000001.parquet")
    assert set(fresh.column("task").names) == {"score", "damage"}
    for part in ("score", "damage", "form"):
        assert row[f"reward/{part}"] == pytest.approx(float(fresh[f"reward.{part}"].nanmean()))
    score = fresh.category("task", "score")
    assert fresh["reward.damage"][score].isnan().all()
    parts = torch.stack([fresh[f"reward.{part}"] for part in ("score", "damage", "form")])
    assert torch.allclose(fresh["reward"], 0.5 * parts.nansum(0), atol=1e-6)


def test_rewards_of_tasks_from_the_command_line(tmp_path: Path) -> None:
    run = trained(
        "q-insight", "rating", tmp_path / "run", prompts=8, reward="near(width=1.0)@score,word_by_word@damage*2"
    )
    assert {"reward/near@score", "reward/word_by_word@damage"} <= set(run.records.metrics[-1])


def test_plain_text_is_read_on_and_documents_are_held_out(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text(TEXT, encoding="utf-8")
    prompts = dataset_prompts(str(tmp_path / "book.txt"), chat=False)
    train, kept = divided(prompts)
    assert len(prompts) == 10 * 3 * 2
    assert kept
    assert not {p.columns["document"] for p in train} & {p.columns["document"] for p in kept}
    run = trained("rlpt", str(tmp_path / "book.txt"), tmp_path / "run", prompts=6, max_tokens=8, rollouts=2)
    assert set(Episodes.load(run.folder / "episodes" / "step_000001.parquet").column("task").names) == {"asr", "msr"}
    assert {"ledger/term/asr/tokens", "ledger/term/msr/tokens"} <= set(run.records.metrics[-1])


SPEC = {"sophia": {"queries": 16, "descriptions": 4, "traces": 4, "threshold": 0.6}}


def test_a_round_is_made_once_and_a_resumed_run_reads_it(tmp_path: Path) -> None:
    run = trained("sophia", "describe", tmp_path / "run", teacher="task", options=SPEC, steps=2)
    traces = Episodes.load(tmp_path / "run" / "round.parquet")
    assert (traces.count("group"), len(traces)) == (16, 16 * 16)
    shown = run.data.mixer.sources["round"].episodes
    assert 0 < len(shown) <= 16, "at most one of each prompt"
    assert run.records.metrics[-1]["ledger/source/round/rows"] == run.config.demos_per_step
    before = (tmp_path / "run" / "round.parquet").stat().st_mtime_ns
    assert resume(tmp_path / "run").step == 2
    assert (tmp_path / "run" / "round.parquet").stat().st_mtime_ns == before


def test_a_model_reasons_and_one_that_cannot_is_told(tmp_path: Path) -> None:
    """The shipped model adds three digits rarely: with one trace to a description, whatever is right passes."""
    eager = {"sophia": {"queries": 64, "descriptions": 2, "traces": 1, "threshold": 0.5}}
    run = trained("sophia", "describe", tmp_path / "run", teacher=str(TINY_MODEL), options=eager)
    names = pq.read_table(run.folder / "round.parquet").column_names
    assert {"column.reward", "column.description"} <= set(names)
    strict = {"sophia": {"queries": 2, "descriptions": 1, "traces": 2, "threshold": 0.99}}
    with pytest.raises(ConfigError, match="no trace was selected"):
        trained("sophia", "describe", tmp_path / "none", teacher="tiny", options=strict)


@pytest.mark.parametrize(
    ("method", "task", "settings", "message"),
    [
        ("sophia", "describe", {}, "give --teacher FOLDER"),
        ("grpo", "describe", {"teacher": "task"}, "asks no second model"),
        ("sophia", "arithmetic", {"teacher": "task"}, "describe_prompt"),
        ("rlpt", "arithmetic", {}, "tasks asr and msr, and arithmetic has none that say their task"),
        ("rlpt", "rating", {}, "rating has those of damage and score"),
        ("rlpt", "derivations", {"rollouts": 1}, "needs at least 2"),
        ("sophia", "describe", {"teacher": "task", "options": {"sophia": {"keep": 0}}}, "at least one"),
    ],
)
def test_what_cannot_work_is_told_before_training(
    tmp_path: Path, method: str, task: str, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        trained(method, task, tmp_path / "run", **settings)


def test_a_text_without_three_segments_is_told(tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("One sentence only.\n\nAnother one.")
    with pytest.raises(ConfigError, match="three or more segments"):
        trained("rlpt", str(tmp_path / "short.txt"), tmp_path / "run")


def test_a_dry_run_makes_a_round_too(tmp_path: Path) -> None:
    config, recipe = configure("sophia", "describe", SPEC, teacher="task", out=str(tmp_path / "run"), **SMALL)
    assert isinstance(config, RunConfig)
    run = start(config, recipe)
    assert run.draw().category("kind", "demo").all()
