"""The dry run: what a configuration would do, in plain words and numbers, before anything trains."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from rich.console import Console, RenderableType
from rich.table import Table

from unipo.learner.learner import Update
from unipo.learner.ledger import ledger, summary
from unipo.recipe import Recipe
from unipo.training.build import build_run
from unipo.training.config import BaseConfig, ControlConfig
from unipo.training.loop import Run

Made = TypeVar("Made")
SAID = {"target": "a slow copy of the critic", "next": "a backup of what comes next"}
"""What annotators are, where their name does not say it."""


def explain_run(config: BaseConfig, recipe: Recipe) -> Iterator[RenderableType]:
    """Draw one real batch, compute its coefficients and gradient without an update, and say what was found."""
    with tempfile.TemporaryDirectory() as folder:
        quiet = Console(quiet=True)
        run = build_run(config.dry(folder), recipe, quiet)
        yield from _plan(config, run)
        yield from _batch(run)
        run.data.close()


def _plan(config: BaseConfig, run: Run) -> Iterator[str]:
    needs, recipe = run.recipe.needs, run.recipe
    yield f"[bold]{config.method}[/] on [bold]{config.task}[/]"
    yield f"  needs    columns {', '.join(sorted(needs.columns))}; signals {', '.join(sorted(needs.signals))}"
    policies = ", ".join(
        ["the policy", *(SAID.get(name, f"a frozen {name}") for name in run.annotators if name != "old")]
    )
    yield f"  computes {policies}; {'one pass' if recipe.objective.linear else 'two passes where the batch is split'}"
    yield f"  a step   {', '.join(run.data.describe())}"
    size = sum(p.numel() for p in run.learner.parameters())
    optimiser = 4 * 4 * size / 1e6
    yield f"  memory   {size:,} trained parameters: about {optimiser:,.1f} MB of weights, gradients and optimiser state"


def _batch(run: Run) -> Iterator[RenderableType]:
    objective = run.objective()
    batch, sampled = _timed(run.draw)
    update, once = _timed(lambda: run.learner.gradient(batch, objective))
    learned = once * run.recipe.passes
    updates = run.recipe.passes * run.data.minibatches(batch, run.recipe.minibatches) + (run.policy_step is not None)
    unit = "steps" if isinstance(run.config, ControlConfig) else "tokens"
    table = Table("term", "weight", "rows it can use", unit, f"{unit} with gradient", title="one real batch")
    for (_, term), share in zip(objective.terms(), update.coefficients.terms, strict=True):
        rows = term.rows(batch)
        live = torch.stack([(g != 0).reshape(len(g), -1).any(1) for g in share.gradient.values()]).any(0)
        cells = (str(int(rows.sum())), str(int(batch.lengths()[rows].sum())), str(int(live.sum())))
        table.add_row(term.title, f"{share.coefficient:g}", *cells)
    yield table
    if "source" in batch:
        yield _sources(update)
    found = summary(update)
    n = run.data.batches_per_step
    yield f"  {n * updates:,} optimiser update(s) a step" + (f", {updates} a batch" if n > 1 else "")
    yield f"  step time about {n * (sampled + learned):.2f} s ({n * sampled:.2f} s sampling, {n * learned:.2f} s learning)"
    minutes = run.config.steps * n * (sampled + learned) / 60
    yield f"  {run.config.steps} steps: about {minutes:.1f} min; loss now {found['loss']:.4f}"


def _timed(call: Callable[[], Made]) -> tuple[Made, float]:
    """What the last of two calls gave, and its seconds: the first pays for what every run pays once."""
    call()
    begun = time.perf_counter()
    return call(), time.perf_counter() - begun


def _sources(update: Update) -> Table:
    columns = ledger(update, 0)
    quantities = ("rows", "tokens", "gradient_share", "ess", "clipped_share")
    table = Table("source", *(q.replace("_", " ") for q in quantities), title="by source")
    for name in sorted({k.split("/")[2] for k in columns if k.startswith("ledger/source/")}):
        cells = [columns.get(f"ledger/source/{name}/{q}", float("nan")) for q in quantities]
        table.add_row(name, *(f"{c:.0f}" for c in cells[:2]), *(f"{c:.2f}" for c in cells[2:]))
    return table
