"""The dry run: what a configuration would do, in plain words and numbers, before anything trains."""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Iterator

import torch
from rich.console import Console, RenderableType
from rich.table import Table

from unipo.learner.learner import Update
from unipo.learner.ledger import ledger, summary
from unipo.recipe import Recipe
from unipo.training.build import build_run
from unipo.training.config import RunConfig
from unipo.training.loop import Run


def explain_run(config: RunConfig, recipe: Recipe) -> Iterator[RenderableType]:
    """Draw one real batch, compute its coefficients and gradient without an update, and say what was found."""
    with tempfile.TemporaryDirectory() as folder:
        quiet = Console(quiet=True)
        run = build_run(dataclasses.replace(config, out=folder, save_episodes=False), recipe, quiet)
        yield from _plan(config, run)
        yield from _batch(run)


def _plan(config: RunConfig, run: Run) -> Iterator[str]:
    needs, recipe = run.recipe.needs, run.recipe
    yield f"[bold]{config.method}[/] on [bold]{config.task}[/]"
    yield f"  needs    columns {', '.join(sorted(needs.columns))}; signals {', '.join(sorted(needs.signals))}"
    policies = ", ".join(["the policy", *(f"a frozen {name}" for name in run.annotators if name != "old")])
    yield f"  computes {policies}; {'one pass' if recipe.objective.linear else 'two passes where the batch is split'}"
    yield f"  a step   {', '.join(run.data.describe())}; {recipe.epochs * recipe.minibatches} optimiser update(s)"
    size = sum(p.numel() for p in run.learner.parameters())
    optimiser = 4 * 4 * size / 1e6
    yield f"  memory   {size:,} trained parameters: about {optimiser:,.0f} MB of weights, gradients and optimiser state"


def _batch(run: Run) -> Iterator[RenderableType]:
    run.draw()  # the first call pays for what every run pays once
    begun = time.perf_counter()
    batch = run.draw()
    sampled = time.perf_counter() - begun
    objective = run.objective()
    begun = time.perf_counter()
    update = run.learner.gradient(batch, objective)
    learned = (time.perf_counter() - begun) * run.recipe.epochs
    table = Table("term", "weight", "rows it can use", "tokens", "tokens with gradient", title="one real batch")
    for (_, term), share in zip(objective.terms(), update.coefficients.terms, strict=True):
        rows = term.rows(batch)
        live = torch.stack([g != 0 for g in share.gradient.values()]).any(0)
        cells = (str(int(rows.sum())), str(int(batch.lengths()[rows].sum())), str(int(live.sum())))
        table.add_row(term.title, f"{share.coefficient:g}", *cells)
    yield table
    yield _sources(update)
    found = summary(update)
    yield f"  step time about {sampled + learned:.2f} s ({sampled:.2f} s sampling, {learned:.2f} s learning)"
    yield f"  {run.config.steps} steps: about {run.config.steps * (sampled + learned) / 60:.1f} min; loss now {found['loss']:.4f}"


def _sources(update: Update) -> Table:
    columns = ledger(update, 0)
    quantities = ("rows", "tokens", "gradient_share", "ess", "clipped_share")
    table = Table("source", *(q.replace("_", " ") for q in quantities), title="by source")
    for name in sorted({k.split("/")[2] for k in columns if k.startswith("ledger/source/")}):
        cells = [columns.get(f"ledger/source/{name}/{q}", float("nan")) for q in quantities]
        table.add_row(name, *(f"{c:.0f}" for c in cells[:2]), *(f"{c:.2f}" for c in cells[2:]))
    return table
