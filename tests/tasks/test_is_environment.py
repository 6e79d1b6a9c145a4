"""Which TASK arguments mean an environment, and which a data set, a file or an embedded task."""

from __future__ import annotations

from pathlib import Path

import gymnasium
import pytest

from unipo.tasks import TASKS
from unipo.tasks.table import is_environment


@pytest.mark.parametrize("name", [
    "CartPole-v1", "Pendulum-v1", "HalfCheetah-v5", "LunarLander-v3", "Not-There-v0", "CartPole-v12",
    "FrozenLake8x8-v1", "unipo/CartPole-v0", "unipo/anything-v3", "phys2d/CartPole-v1",
])  # fmt: skip
def test_names_with_a_version_are_environments(name: str) -> None:
    assert is_environment(name)


@pytest.mark.parametrize("name", [
    "arithmetic", "arithmetic:2", "countdown:1-3", "CartPole", "CartPole-v", "CartPole-1", "CartPole-v1a", "CartPole-v1.0",
    "cartpole-V1", "", "-v1", "CartPole-v1/", "/CartPole-v1", "openai/gsm8k", "somebody/data-v1", "a/b/CartPole-v1",
    "./CartPole-v1", "../x-v1", "data/train.jsonl", "rows-v1.parquet", "CartPole-v1 ", " CartPole-v1",
])  # fmt: skip
def test_other_names_are_not(name: str) -> None:
    assert not is_environment(name)


def test_no_embedded_task_is_taken_for_one() -> None:
    assert not any(is_environment(name) for name in TASKS)


def test_what_exists_on_disk_is_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert is_environment("CartPole-v1")
    (tmp_path / "CartPole-v1").mkdir()
    assert not is_environment("CartPole-v1")
    assert is_environment("Pendulum-v1")
    (tmp_path / "unipo").mkdir()
    assert is_environment("unipo/data-v1")
    (tmp_path / "unipo" / "data-v1").write_text("{}")
    assert not is_environment("unipo/data-v1")


def test_a_namespace_counts_once_it_is_registered() -> None:
    assert not is_environment("somewhere/Thing-v0")
    gymnasium.register("somewhere/Thing-v0", entry_point=lambda: None)  # type: ignore[arg-type]
    try:
        assert is_environment("somewhere/Thing-v0")
        assert is_environment("somewhere/Other-v3"), "so that the error can name what is near"
    finally:
        del gymnasium.registry["somewhere/Thing-v0"]


def test_what_gymnasium_ships_is_recognised() -> None:
    versioned = [name for name, spec in gymnasium.registry.items() if spec.version is not None]
    assert len(versioned) > 20
    assert all(is_environment(name) for name in versioned)
