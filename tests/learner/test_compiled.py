"""The compiled update and its slow twin, over every method for environments."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from unipo import api
from unipo.episodes import Column
from unipo.learner import compiled, traced
from unipo.methods.catalog import METHODS, build
from unipo.training.build_control import build_control
from unipo.training.config import ControlConfig
from unipo.training.loop import Run

DISCRETE = {"dqn"}
WITH_POLICY_STEP = {"trpo", "npg", "npg-igt-harpg"}
OWN_TASKS = {"pdppo", "pdppo-q", "grpo-ride", "fleet-ppo", "esg-portfolio", "ospo"}
OFFLINE = {"td3-bc", "iql", "cpl"}
GENERAL = sorted({m.slug for m in METHODS if m.build().control is not None} - OWN_TASKS - OFFLINE - WITH_POLICY_STEP)


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs as they were traced, without a compiler: the same operations, in a moment."""
    monkeypatch.setattr(traced, "inductor", lambda graph, example: graph)


def run_of(folder: Path, slug: str, compile: str, **changes: Any) -> Run:
    task = "CartPole-v1" if slug in DISCRETE else "Pendulum-v1"
    recipe = build(slug, {}, environment=True)
    assert recipe.control is not None
    own = {**recipe.control.settings, "learning_starts": 20, "batch_size": 16, "train_every": 1, "hidden": (8,)}
    settings: dict[str, Any] = {**own, "method": slug, "task": task, "out": str(folder / compile), "total_timesteps": 128,
                                "rollout": 32, "evaluations": 0, "checkpoints": 1, "tensorboard": False, "epochs": 2,
                                "schedule": "linear", "learning_rate": 3e-3, "compile": compile, **changes}  # fmt: skip
    if recipe.control.off_policy:
        settings["epochs"] = 0
    return build_control(ControlConfig(**settings), recipe, Console(file=io.StringIO()))


def state(run: Run) -> dict[str, Tensor]:
    found = {f"policy/{n}": p.detach().clone() for n, p in run.policy.named_parameters()}
    for name, module in run.modules.items():
        found |= {f"{name}/{n}": t.clone() for n, t in module.state_dict().items()}
    return found


@pytest.mark.usefixtures("watched")
@pytest.mark.parametrize("slug", GENERAL)
@pytest.mark.filterwarnings("error:.*compiled")
def test_both_twins_train_alike(tmp_path: Path, slug: str) -> None:
    """Weights, slow copies, knobs and everything that is reported, after two steps; no batch was left to the slow twin."""
    plain, fast = run_of(tmp_path, slug, "off"), run_of(tmp_path, slug, "on")
    moves: list[int] = []
    assert fast.learner.compiled is not None
    move = fast.learner.move
    fast.learner.move = lambda *a: (moves.append(1), move(*a))[1]  # type: ignore[method-assign,func-returns-value]
    rows = [(plain.advance(), fast.advance()) for _ in range(2)]
    assert fast.learner.compiled.given_up == ""
    verified = compiled.VERIFIED * len(fast.learner.compiled._graphs)
    assert len(moves) == verified < fast.learner.updates, "the slow twin only verifies"
    known, fast.learner.compiled.taken = fast.learner.compiled.taken, None
    assert known in (None, fast.learner.compiled.steps()), "steps are counted as the optimiser counts them"
    slow, quick = state(plain), state(fast)
    for name, tensor in slow.items():
        torch.testing.assert_close(quick[name], tensor, rtol=2e-3, atol=2e-5, msg=name)
    for a, b in rows:
        assert a.keys() == b.keys()
        for name in a.keys() - {"seconds"}:
            assert b[name] == pytest.approx(a[name], rel=2e-2, abs=2e-4, nan_ok=True), name


@pytest.mark.usefixtures("watched")
@pytest.mark.parametrize("slug", ["td3", "sac"])
def test_mixed_precision_is_the_same_in_both_twins(tmp_path: Path, slug: str) -> None:
    """The graph rounds where the plain update rounds, the backup of the next state included; float32 differs from both."""
    runs = [run_of(tmp_path / str(i), slug, c, autocast=a, hidden=(8, 8))
            for i, (c, a) in enumerate((("off", "bfloat16"), ("on", "bfloat16"), ("off", "off")))]  # fmt: skip
    for run in runs:
        run.advance()
    plain, fast, exact = (state(run) for run in runs)
    assert runs[1].learner.compiled is not None
    assert runs[1].learner.compiled.given_up == ""
    for name, tensor in plain.items():
        torch.testing.assert_close(fast[name], tensor, rtol=2e-3, atol=2e-5, msg=name)
    assert any(not torch.allclose(exact[name], tensor, rtol=2e-3, atol=2e-5) for name, tensor in plain.items())


@pytest.mark.parametrize("slug", ["ppo", "sac"])
def test_native_code_trains_as_the_slow_twin(tmp_path: Path, slug: str) -> None:
    plain, fast = run_of(tmp_path, slug, "off"), run_of(tmp_path, slug, "on")
    for run in (plain, fast):
        run.advance()
    assert fast.learner.compiled is not None
    assert fast.learner.compiled.given_up == ""
    slow, quick = state(plain), state(fast)
    for name, tensor in slow.items():
        torch.testing.assert_close(quick[name], tensor, rtol=1e-3, atol=2e-5, msg=name)


@pytest.mark.usefixtures("watched")
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path) -> None:
    """To the last bit, with the moments of the optimiser read anew."""
    whole = run_of(tmp_path / "a", "sac", "on", checkpoints=4)
    whole.train()
    broken = run_of(tmp_path / "b", "sac", "on", checkpoints=4)
    for _ in range(2):
        broken.advance()
    broken.save()
    again = run_of(tmp_path / "b", "sac", "on", checkpoints=4)
    again.restore(check=False)
    again.train()
    expected, found = state(whole), state(again)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.usefixtures("watched")
def test_batches_that_go_another_way_are_the_slow_twins(tmp_path: Path) -> None:
    """A batch with rows that the term does not claim goes through other code than the one that was watched."""
    results = []
    for compile in ("off", "on"):
        run = run_of(tmp_path, "ppo", compile)
        objective, part = next(run._minibatches(run.draw(), run.objective()))
        claimed = torch.zeros(2, len(part), dtype=torch.long)
        claimed[1, :5] = 1
        for values in claimed[[0, 0, 1, 0]]:
            run.learner.update(
                part.with_columns("episode", kind=Column(values, "episode", None, ("rollout", "demo"))), objective
            )
        results.append(state(run))
        if run.learner.compiled is not None:
            (graph,) = run.learner.compiled._graphs.values()
            assert graph is not None
            assert graph.misses == 0, "the last was the graph's again"
    for name, tensor in results[0].items():
        torch.testing.assert_close(results[1][name], tensor, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.usefixtures("watched")
def test_code_whose_shapes_depend_on_the_data_is_not_compiled(tmp_path: Path) -> None:
    run = run_of(tmp_path, "ppo", "on")
    objective, part = next(run._minibatches(run.draw(), run.objective()))
    masked = part.with_columns("step", mask=torch.arange(len(part)) > 3)
    with pytest.warns(UserWarning, match="not compiled: aten.nonzero"):
        run.learner.update(masked, objective)
    run.learner.update(part, objective)
    assert run.learner.compiled is not None
    assert [g is None for g in run.learner.compiled._graphs.values()] == [True, False], "other batches are"


def test_a_machine_without_a_compiler_says_so_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(traced, "cpp_compiler", lambda: None)
    run = run_of(tmp_path, "ppo", "on")
    with pytest.warns(UserWarning, match="not compiled: there is no C.. compiler") as told:
        run.advance()
    assert sum("not compiled" in str(w.message) for w in told) == 1
    plain = run_of(tmp_path, "ppo", "off")
    plain.advance()
    assert all(torch.equal(a, b) for a, b in zip(state(run).values(), state(plain).values(), strict=True))


def test_the_command_line_says_it_in_one_line(tmp_path: Path) -> None:
    """With a path without compilers, as on a bare machine; the run ends well."""
    flags = [
        "--compile",
        "on",
        "--total-timesteps",
        "64",
        "--rollout",
        "32",
        "--no-preset",
        "--evaluations",
        "0",
        "--no-tensorboard",
    ]
    command = [sys.executable, "-m", "unipo.cli", "run", "ppo", "CartPole-v1", *flags, "--out", str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PATH": str(tmp_path)})
    assert done.returncode == 0, done.stderr
    told = [line for line in done.stderr.splitlines() if "not compiled" in line]
    assert len(told) == 1
    assert told[0].startswith("warning  updates are not compiled: there is no C++ compiler")


def test_a_graph_that_differs_from_its_twin_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(traced, "inductor", lambda graph, example: graph)
    formula = compiled.adamw
    monkeypatch.setattr(compiled, "adamw", lambda p, g, *rest: formula(p, -g, *rest))
    run = run_of(tmp_path, "ppo", "on")
    with pytest.warns(UserWarning, match="differs from the plain one"):
        run.advance()
    plain = run_of(tmp_path, "ppo", "off")
    plain.advance()
    assert all(torch.equal(a, b) for a, b in zip(state(run).values(), state(plain).values(), strict=True))


def test_long_runs_are_compiled_and_short_ones_are_not() -> None:
    for steps, expected in ((1000, False), (200_000, True)):
        config, _ = api.configure("sac", "Pendulum-v1", {}, total_timesteps=steps)
        assert isinstance(config, ControlConfig)
        assert config.compiles(steps) is expected


@pytest.mark.usefixtures("watched")
def test_what_a_graph_computes_is_counted(tmp_path: Path) -> None:
    """One matrix product per hidden layer, forward and backward twice (none for one output), and nothing computed twice."""
    run = run_of(tmp_path, "ppo", "on", hidden=(8, 8))
    run.advance()
    assert run.learner.compiled is not None
    (graph, *_) = run.learner.compiled._graphs.values()
    assert graph is not None
    products = [n for n in graph.graph.run.graph.nodes if str(n.target) in ("aten.mm.default", "aten.addmm.default")]
    layers, networks = 2, 2
    assert len(products) == networks * (layers + layers + (layers - 1)), (
        "forward, weights' gradients, inputs' gradients"
    )
