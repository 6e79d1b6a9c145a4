"""Data that a method cannot use: told before training, with methods that can."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from unipo.api import configure, start
from unipo.methods.catalog import build, usable
from unipo.recipe import Given
from unipo.training import ConfigError

ROWS = [
    {"prompt": "1+1=", "completion": "2", "reward": 1},
    {"prompt": "1+1=", "completion": "3", "reward": 0},
]


def logged(tmp_path: Path, rows: list[dict[str, Any]]) -> str:
    path = tmp_path / "logged.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def refused(method: str, tmp_path: Path, **settings: Any) -> str:
    config, recipe = configure(method, "arithmetic", {}, out=str(tmp_path / "run"), steps=1, **settings)
    with pytest.raises(ConfigError) as told:
        start(config, recipe)
    assert not (tmp_path / "run" / "config.yaml").exists()
    return str(told.value)


def test_groups_of_one_for_a_group_relative_method(tmp_path: Path) -> None:
    said = refused("grpo", tmp_path, rollouts=1)
    assert "needs at least 2" in said
    assert "reinforce" in said.partition("can use what there is")[2]
    assert "rloo" not in said.partition("can use what there is")[2]


def test_no_demonstrations(tmp_path: Path) -> None:
    said = refused("chord", tmp_path)
    assert "--demos" in said
    assert "grpo" in said.partition("can use what there is")[2]


def test_rollouts_without_log_probs_for_a_method_with_a_ratio(tmp_path: Path) -> None:
    path = logged(tmp_path, ROWS)
    said = refused("grpo", tmp_path, replay=2, replay_from=path)
    assert "2 of 2 rollouts" in said
    assert "logprobs" in said
    others = said.partition("can use what there is")[2]
    assert "rloo" in others
    assert "cispo" not in others


def test_single_answers_for_a_method_that_compares(tmp_path: Path) -> None:
    path = logged(tmp_path, [*ROWS, {"prompt": "2+1=", "completion": "3", "reward": 1}])
    said = refused("rloo", tmp_path, replay=2, replay_from=path)
    assert "1 of 2 prompts" in said


def test_what_suits() -> None:
    everything = Given(kinds=frozenset({"rollout", "demo", "pair"}), group=8)
    assert build("grpo+0.2*sft+0.1*dpo", {}).suits(everything)
    assert not build("grpo", {}).suits(everything.but_unlogged())
    assert build("rloo", {}).suits(everything.but_unlogged())
    assert not build("dpo", {}).suits(Given(kinds=frozenset({"rollout"}), group=8))
    assert not build("td3", {}).suits(everything), "of environments"
    assert {"sft", "grpo", "dpo", "upge-hpt"} <= set(usable(everything))
