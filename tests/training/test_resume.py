"""Exact resume: a run that is killed and resumed ends with the weights of one that was not, bit for bit."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from unipo import api
from unipo.training import ConfigError, RunConfig
from unipo.training.checkpoint import existing, load_latest, save_checkpoint

MIXED = ["grpo+0.2*sft+0.1*dpo", "arithmetic", "--replay", "2", "--demos", "task", "--pairs", "task", "--dataset-rows", "32",
         "--prompts", "2", "--rollouts", "4", "--demos-per-step", "2", "--pairs-per-step", "2", "--steps", "8",
         "--checkpoint-every", "2", "--eval-every", "4", "--eval-prompts", "4", "--minibatches", "2"]  # fmt: skip


def command(arguments: list[str]) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-m", "unipo.cli", *arguments], env=environment, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip


def finished(arguments: list[str]) -> str:
    process = command(arguments)
    output = process.communicate(timeout=180)[0]
    assert process.returncode == 0, output
    return output


def killed_after_step(arguments: list[str], folder: Path, step: int) -> bool:
    """Start, wait until `step` is in the metrics, kill -9. False when it ended before."""
    process = command(arguments)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        path = folder / "metrics.jsonl"
        if path.exists() and len(path.read_text().splitlines()) > step:
            process.send_signal(signal.SIGKILL)
            process.wait()
            return True
        time.sleep(0.005)
    process.kill()
    process.communicate()
    return False


def same_weights(a: Path, b: Path) -> bool:
    x, y = (load_file(f / "final" / "model.safetensors") for f in (a, b))
    return x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x)


def test_kill_and_resume_gives_the_same_weights(tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    finished(["run", *MIXED, "--out", str(whole)])
    assert killed_after_step(["run", *MIXED, "--out", str(broken)], broken, 3)
    assert not (broken / "final").exists()
    killed_after_step(["resume", str(broken)], broken, 6)
    finished(["resume", str(broken)])
    assert same_weights(whole, broken)
    steps = [json.loads(line)["step"] for line in (broken / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(9))
    rewards = [
        [json.loads(line).get("reward") for line in (f / "metrics.jsonl").read_text().splitlines()]
        for f in (whole, broken)
    ]
    assert str(rewards[0]) == str(rewards[1])


def small(out: Path, **changes: object) -> RunConfig:
    settings = {"steps": 2, "prompts": 2, "rollouts": 4, "eval_prompts": 0, "checkpoint_every": 1, "eval_every": 0}
    return RunConfig(out=str(out), **{**settings, **changes})  # type: ignore[arg-type]


def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path) -> None:
    """The newest checkpoint is cut short: the one before it is used, and the result is the same."""
    from unipo.methods.catalog import build

    whole = api.finish(api.start(small(tmp_path / "a", steps=3), build("grpo", {})))
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    shutil.rmtree(tmp_path / "b" / "final")
    newest = existing(tmp_path / "b" / "checkpoints")[-1] / "tensors.safetensors"
    newest.write_bytes(newest.read_bytes()[:-100])
    again = api.resume(tmp_path / "b")
    assert same_weights(whole.folder, again.folder)
    assert "damaged" in (tmp_path / "b" / "events.jsonl").read_text()


def test_changed_configuration_is_told(tmp_path: Path) -> None:
    from unipo.methods.catalog import build

    api.finish(api.start(small(tmp_path / "a"), build("grpo", {})))
    path = tmp_path / "a" / "config.yaml"
    path.write_text(
        path.read_text().replace("learning_rate: 0.0005", "learning_rate: 0.01").replace("steps: 2", "steps: 3")
    )
    with pytest.raises(ConfigError, match="other code, another configuration"):
        api.resume(tmp_path / "a")
    assert api.resume(tmp_path / "a", changed_code=True).step == 3


def test_an_existing_run_is_not_overwritten(tmp_path: Path) -> None:
    from unipo.methods.catalog import build

    api.finish(api.start(small(tmp_path / "a", steps=1), build("grpo", {})))
    with pytest.raises(ConfigError, match="already holds a run"):
        api.start(small(tmp_path / "a"), build("grpo", {}))
    with pytest.raises(ConfigError, match="is not a run"):
        api.resume(tmp_path / "nowhere")


def test_a_checkpoint_is_whole_or_absent(tmp_path: Path) -> None:
    def full(folder: Path) -> None:
        raise OSError(28, "No space left on device")

    save_checkpoint(tmp_path, 1, {"x": 1}, {"w": torch.ones(3)}, lambda folder: None, 2)
    with pytest.raises(OSError, match="Earlier checkpoints are intact"):
        save_checkpoint(tmp_path, 2, {"x": 2}, {"w": torch.ones(3)}, full, 2)
    found = load_latest(tmp_path, lambda message: None)
    assert found is not None
    assert found.state["step"] == 1
    assert torch.equal(found.tensors["w"], torch.ones(3))
    assert [p.name for p in tmp_path.iterdir()] == ["step-000001"]


def test_interrupt_saves_and_says_how_to_go_on(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    process = command(["run", *MIXED, "--steps", "2000", "--out", str(folder)])
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (folder / "metrics.jsonl").exists():
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 130, output
    assert "unipo resume" in output
    assert existing(folder / "checkpoints")
