"""Companions, arms and the controller of the learning rate in real runs: killed and resumed, from data sets, on bad input."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.training.test_resume import finished, killed_after_step, same_weights, small
from unipo import api
from unipo.methods.catalog import build
from unipo.training import ConfigError
from unipo.training.checkpoint import existing

RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "sec-curriculum": ("arithmetic:1-3", {}),
    "oblr-po": ("arithmetic:1", {}),
    "rlfr": ("arithmetic:1", {"offline": 2, "updates": 1}),
    "oreal": ("arithmetic:1", {"warmup": 2}),
}
SAID = {"sec-curriculum": "arm/level 2/probability", "oblr-po": "gradient_noise", "rlfr": "flow/loss",
        "oreal": "token_credit/loss"}  # fmt: skip
WATCHED = ("arm/", "knob/", "flow/", "token_credit/", "gradient_noise", "reward")


def metrics_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def watched(folder: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k.startswith(WATCHED)} for row in metrics_of(folder)]


@pytest.mark.parametrize("method", RUNS)
def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(method: str, tmp_path: Path) -> None:
    """Bit for bit, and with the same numbers of companions, arms and controllers, from the checkpoint before the last."""
    task, settings = RUNS[method]
    config = small(tmp_path / "whole", steps=5, prompts=6, task=task, method=method, method_options={method: settings})
    whole = api.finish(api.start(config, build(method, {method: settings})))
    broken = tmp_path / "broken"
    shutil.copytree(whole.folder, broken)
    shutil.rmtree(broken / "final")
    shutil.rmtree(existing(broken / "checkpoints")[-1])
    again = api.resume(broken)
    assert same_weights(whole.folder, again.folder)
    found = watched(whole.folder)
    assert str(watched(broken)) == str(found)
    assert SAID[method] in found[-1] or SAID[method] in {k for row in found for k in row}
    if method == "oblr-po":
        assert 0.0 <= found[-1]["knob/learning_rate"] < 1.0
    if method in ("rlfr", "oreal"):
        assert [row["knob/learning_rate"] for row in found[1:4]] == [0.0, 0.0, 1.0], "the setting of the step itself"


def test_kill_and_resume_gives_the_same_weights(tmp_path: Path) -> None:
    """A companion and a controller in a run that is killed."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    command = ["run", "oreal", "arithmetic:1", "--oreal.warmup", "1", "--prompts", "6", "--rollouts", "4", "--eval-prompts", "0",
               "--checkpoint-every", "1", "--steps", "6"]  # fmt: skip
    finished([*command, "--out", str(whole)])
    assert killed_after_step([*command, "--out", str(broken)], broken, 2)
    assert not (broken / "final").exists()
    finished(["resume", str(broken)])
    assert same_weights(whole, broken)
    assert str(watched(whole)) == str(watched(broken))


def test_categories_of_a_dataset_are_arms(tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    rows = [{"prompt": f"{a}+{a}=", "answer": str(2 * a), "kind": "even" if a % 2 == 0 else "odd"} for a in range(9)]
    data.write_text("\n".join(map(json.dumps, rows)))
    recipe = build("sec-curriculum", {"sec-curriculum": {"by": "kind"}})
    run = api.finish(api.start(small(tmp_path / "a", task=str(data), method="sec-curriculum", max_tokens=4), recipe))
    assert {k for k in metrics_of(run.folder)[-1] if k.startswith("arm/")} == {
        f"arm/{name}/{what}" for name in ("even", "odd") for what in ("value", "probability")}  # fmt: skip
    with pytest.raises(ConfigError, match=r"column 'category'.*it has answer, kind"):
        api.start(small(tmp_path / "b", task=str(data), method="sec-curriculum"), build("sec-curriculum", {}))


@pytest.mark.parametrize(("settings", "says"), [
    ({"task": "arithmetic:2"}, "has one, 'level 2'"),
    ({"task": "arithmetic:1-2", "curriculum": "5=arithmetic:3"}, "leave out --curriculum"),
    ({"task": "arithmetic:1-2", "ahead": 1}, "leave out --ahead"),
])  # fmt: skip
def test_what_arms_cannot_work_with_is_told(settings: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=says):
        api.start(small(tmp_path / "a", method="sec-curriculum", **settings), build("sec-curriculum", {}))


def test_a_flow_without_demonstrations_is_told(tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(json.dumps({"prompt": f"{a}+1=", "answer": str(a + 1)}) for a in range(4)))
    with pytest.raises(ConfigError, match="demonstration"):
        api.start(small(tmp_path / "a", task=str(data), method="rlfr"), build("rlfr", {}))


def test_all_levels_are_arms_where_none_is_named(tmp_path: Path) -> None:
    run = api.start(small(tmp_path / "a", method="sec-curriculum", task="sort"), build("sec-curriculum", {}))
    assert run.data.rollouts.arms.names[0] == "level 1"  # type: ignore[attr-defined]
    assert len(run.data.rollouts.arms.names) > 1  # type: ignore[attr-defined]
