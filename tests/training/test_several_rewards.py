"""Runs with several rewards: multipliers and searches resume, gold is measured and not trained on, directions, win rates."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from unipo import api
from unipo.cli import main
from unipo.training import ConfigError
from unipo.training.loop import Run

SETTINGS: dict[str, Any] = {"steps": 4, "prompts": 2, "rollouts": 4, "eval_prompts": 4, "eval_every": 0, "checkpoint_every": 2,
                            "tensorboard": False, "threads": 1}  # fmt: skip


def started(out: Path, method: str = "grpo", options: dict[str, Any] | None = None, **settings: Any) -> Run:
    given = {**SETTINGS, "out": str(out), **settings}
    return api.start(*api.configure(method, "arithmetic", {method: options} if options else {}, **given))


def weights(run: Run) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for _, p in run.policy.named_parameters()])


def printed(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    """The JSON among what was printed."""
    return [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]


def test_multipliers_and_searches_go_on_where_they_were(tmp_path: Path) -> None:
    options = {"thresholds": {"near": 0.4, "length": 2.0}, "search": "gold", "highest": {"near": 0.9, "length": 3.0}}
    more = {"reward": "near,length*0.1", "gold": "math"}
    whole = started(tmp_path / "whole", "constrained-rlhf", options, **more).train()
    broken = started(tmp_path / "broken", "constrained-rlhf", options, **more)
    broken.save()
    for _ in range(2):
        broken.advance()
    broken.save()
    assert broken.controllers["multiplier/near"]["x"] != 0.0
    again = api.resume(tmp_path / "broken", changed_code=True)
    assert again.controllers == whole.controllers
    assert torch.equal(weights(again), weights(whole))
    assert again.settings() == whole.settings()
    assert set(whole.settings()) == {
        f"{kind}/{name}" for kind in ("multiplier", "threshold") for name in ("near", "length")
    }


def test_gold_is_measured_and_never_trained_on(tmp_path: Path) -> None:
    plain = started(tmp_path / "plain").train()
    measured = started(tmp_path / "gold", gold="length").train()
    assert torch.equal(weights(plain), weights(measured))
    row = measured.records.metrics[-1]
    assert row["gold"] == pytest.approx(row["length"] - 1.0, abs=1.0), "characters, and tokens with the end"
    assert "gold" not in plain.records.metrics[-1]
    assert measured.records.metrics[1]["kl_answer"] == pytest.approx(0.0, abs=1e-5), "the first batch is of the start"
    assert measured.records.metrics[0]["eval_reward"] > 1.0, "held-out answers are judged by it"
    assert "reward/near" not in plain.records.metrics[-1]


def test_rewards_that_are_read_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"reads the reward nea by name, and the run has near, length.*--reward nea"):
        started(tmp_path / "a", "constrained-rlhf", {"thresholds": "nea=0.5"}, reward="near,length")
    with pytest.raises(ConfigError, match="reads the rewards length and near by name, and the run has arithmetic"):
        started(tmp_path / "b", "dpa")
    alone = started(tmp_path / "c", "constrained-rlhf", {"thresholds": "near=0.5"}, reward="near", steps=1).train()
    assert "reward/near" in alone.records.metrics[-1], "a single reward has a column of its own where it is read"


def test_a_policy_is_told_directions_and_asked_for_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "dpa"
    run = started(out, "dpa", {"rewards": "near=1,length=0.1"}, reward="near,length*0.1").train()
    run.policy.save(out / "final")
    rows = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    shown = {source: [r["prompt"] for r in rows if r["source"] == source] for source in ("fresh", "held_out")}
    assert all(p.startswith("[100,0] ") for p in shown["held_out"])
    assert shown["fresh"]
    assert all("," in p.split("]")[0] for p in shown["fresh"])
    assert main(["evaluate", str(out), "--prompts", "8", "--angle", "-30", "--json"]) == 0
    assert main(["evaluate", str(out), "--prompts", "4", "--against", "reference", "--angle", "-30", "--json"]) == 0
    found = printed(capsys)
    assert 0.0 <= found[0]["accuracy"] <= 1.0
    assert found[1]["against"] == "reference"


def test_one_run_against_another(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [tmp_path / "first", tmp_path / "second"]
    for seed, out in enumerate(folders):
        run = started(out, seed=seed, steps=1).train()
        run.policy.save(out / "final")
    judge = tmp_path / "judge.py"
    judge.write_text("def first(prompts, answers, others, **columns):\n    return [1.0] * len(answers)\n"
                     "def longer(prompts, answers, others, **columns):\n"
                     "    return [(len(a) > len(b)) + 0.5 * (len(a) == len(b)) for a, b in zip(answers, others)]\n")  # fmt: skip
    first, second = map(str, folders)
    assert main(["evaluate", first, "--against", second, "--prompts", "16", "--samples", "2", "--json"]) == 0
    assert main(["evaluate", second, "--against", first, "--prompts", "4", "--judge", f"{judge}:first", "--json"]) == 0
    assert (
        main(["evaluate", first, "--against", second, "--prompts", "32", "--judge", f"{judge}:longer", "--json"]) == 0
    )
    found, biased, longer = printed(capsys)
    assert found["prompts"] == 16
    assert found["samples"] == 2
    assert found["win_rate_low"] <= found["win_rate"] <= found["win_rate_high"]
    assert biased["win_rate"] == 0.5, "asked in both orders, a judge that likes what comes first likes nobody"
    assert longer["length_controlled"] == pytest.approx(0.5, abs=0.05), "nothing but length"
    assert longer["length_slope"] > 1.0
    assert main(["evaluate", first, "--against", second, "--prompts", "8"]) == 0
    assert "at equal length" in capsys.readouterr().out
    for wrong, told in ((["--judge", "nobody"], "expected reward"), (["--angle", "3"], "told a direction")):
        assert main(["evaluate", first, "--against", second, "--prompts", "4", *wrong]) == 1
        assert told in capsys.readouterr().err.replace("\n", " ")
    assert main(["evaluate", first, "--against", str(tmp_path / "nobody")]) == 1
