"""Times of the hot paths on this machine: `make bench`. Medians over repetitions, tokens per second where that is a rate."""

from __future__ import annotations

import argparse
import dataclasses
import io
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from unipo.episodes import Episodes, segment_reduce
from unipo.learner import Learner, annotate
from unipo.methods.catalog import build
from unipo.training import Run, RunConfig, build_run


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--task", default="arithmetic")
    arguments.add_argument("--model", default="tiny")
    arguments.add_argument("--prompts", type=int, default=64)
    arguments.add_argument("--repeat", type=int, default=5)
    chosen = arguments.parse_args()
    table = Table(
        "what", "median", "tokens/s", title=f"{chosen.model} on {chosen.task}: {machine()}", title_justify="left"
    )
    with tempfile.TemporaryDirectory() as folder:
        settings = {"task": chosen.task, "model": chosen.model, "prompts": chosen.prompts, "out": f"{folder}/run"}
        config = RunConfig(tensorboard=False, **settings)
        run = build_run(config, build("grpo", {}), Console(file=io.StringIO()))
        Path(folder, "run").mkdir(exist_ok=True)
        for name, tokens, work in paths(run):
            seconds = median(work, chosen.repeat)
            table.add_row(name, f"{1000 * seconds:,.1f} ms", f"{tokens / seconds:,.0f}" if tokens else "")
    Console().print(table)


def paths(run: Run) -> list[tuple[str, int, Callable[[], Any]]]:
    """(name, tokens that it works on, work)."""
    drawn = run.mixer.draw(0, 0)
    batch = annotate(drawn, run.recipe.needs, {**run.references, "old": run.policy}, run.config.token_budget)
    steps, computed = batch.count("step"), int(run.policy.total_lengths(batch).sum())
    index, values = torch.randint(0, 4096, (1_000_000,)).sort().values, torch.randn(1_000_000)
    saving = split(run)
    return [
        ("sample and score a batch", steps, lambda: run.mixer.draw(0, 0)),
        ("signals without gradient", computed, lambda: scored(run, batch)),
        ("one update", computed, lambda: run.learner.update(batch, run.recipe.objective)),
        ("one update, micro-batches of 1024 tokens", computed, lambda: saving.update(batch, run.recipe.objective)),
        ("segment sum of 1M steps into 4096", 1_000_000, lambda: segment_reduce(values, index, 4096, "sum")),
    ]


def scored(run: Run, batch: Episodes) -> Any:
    with torch.no_grad():
        return run.policy.signals(batch, ["logp", "entropy"])


def split(run: Run) -> Learner:
    """A learner with the same players and smaller micro-batches: what saving memory costs."""
    return Learner(
        run.learner.players, dataclasses.replace(run.learner.settings, token_budget=1024), run.learner.monitor
    )


def median(work: Callable[[], Any], repeat: int) -> float:
    """Seconds; the first call, which warms caches, is not counted."""
    work()
    found = []
    for _ in range(repeat):
        start = time.perf_counter()
        work()
        found.append(time.perf_counter() - start)
    return statistics.median(found)


def machine() -> str:
    threads = torch.get_num_threads()
    return f"{platform.machine()}, {os.cpu_count()} cores, {threads} threads, torch {torch.__version__}"


if __name__ == "__main__":
    main()
