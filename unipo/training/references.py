"""Policies beside the trained one: the reference and other snapshots, and what of theirs need not be computed again.

A reference that never moves says of a given row the same in every epoch. Where rows come back, its log-probs are computed once,
before the first step, and kept in the run's folder (`references/`); where the data bring them, it is not even loaded.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

import torch

from unipo.episodes import Episodes
from unipo.learner import annotate
from unipo.objectives import Needs, Objective
from unipo.policies import TokenPolicy, load_policy
from unipo.recipe import Recipe
from unipo.sources.rows import Rows
from unipo.training.config import ConfigError, RunConfig
from unipo.training.fingerprint import ROOT
from unipo.training.ranking import check_same_tokenizer

TINY = ROOT / "tasks" / "tiny"


def model_folder(name: str) -> str:
    """Where a model is: "tiny" is the shipped one."""
    return str(TINY) if name == "tiny" else name


def load_references(
    config: RunConfig, recipe: Recipe, policy: TokenPolicy, fixed: Mapping[str, Rows], device: str
) -> dict[str, TokenPolicy]:
    """What `recipe` asks for beside the policy: a frozen reference (the adapter switched off for LoRA, `--reference` where one is
    given), and its other snapshots. Not those of whom the given rows say all that is asked, where there are no others."""
    references: dict[str, TokenPolicy] = {}
    asked = recipe.others | ({"reference"} if config.gold else set())
    if config.reference and "reference" not in asked:
        raise ConfigError(
            f"--reference {config.reference} is given, but {config.method!r} asks for no reference: leave it out"
        )
    for who in sorted(asked):
        moves = who in recipe.snapshots and recipe.snapshots[who].moves
        if known(who, config, recipe, fixed):
            continue
        if config.lora_rank and (moves or who in recipe.rollouts.players):
            raise ConfigError(
                f"{config.method!r} {'renews' if moves else 'samples'} a copy of the policy ({who}), which --lora-rank does not "
                "keep: train all weights"
            )
        other = config.reference if who == "reference" else ""
        if config.lora_rank and not other:
            references[who] = TokenPolicy(policy.model, policy.tokenizer, config.temperature, adapter=False)
            continue
        name = model_folder(other or config.model)
        references[who] = load_policy(name, config.dtype, None, device, config.temperature)
        references[who].value_head = None
        if other:
            check_same_tokenizer(policy, references[who], other)
    return references


def known(who: str, config: RunConfig, recipe: Recipe, fixed: Mapping[str, Rows]) -> bool:
    """Whether all that is asked of a policy that stays as it is, is said by the rows that are given, and there are no others."""
    moves = who in recipe.snapshots and (recipe.snapshots[who].moves or recipe.snapshots[who].beyond)
    others = recipe.samples or config.replay or recipe.round is not None or config.gold
    columns = [c for c in recipe.needs.columns if c.partition("_")[0] == who]
    if moves or others or not columns or not fixed:
        return False
    return all(
        c in rows.episodes and not bool(rows.episodes[c].isnan().any()) for rows in fixed.values() for c in columns
    )


def store_references(
    config: RunConfig, recipe: Recipe, fixed: Mapping[str, Rows], references: Mapping[str, TokenPolicy]
) -> dict[str, TokenPolicy]:
    """Give the rows that a run meets more than once the log-probs of the references that stay as they are; returns the references
    that are still asked. Raises ConfigError where a method needs of tokens what the data say of answers."""
    check_logged(config, recipe, fixed)
    still = {who: p for who, p in references.items() if not (who in recipe.snapshots and recipe.snapshots[who].moves)}
    columns = frozenset(f"{who}_logp" for who in still) & recipe.needs.columns
    for name, rows in fixed.items():
        groups = rows.episodes.count("group")
        if columns and config.steps * rows.groups_per_step > groups:
            begun, path = time.perf_counter(), config.folder / "references" / f"{name}.parquet"
            rows.episodes = _stored(path, rows.episodes, columns, still, config.token_budget)
            rows.notes.append(f"log-probs of the {' and '.join(sorted(still))} for {groups:,} {name}: computed once, "
                              f"{time.perf_counter() - begun:.1f} s")  # fmt: skip
    return {who: p for who, p in references.items() if not known(who, config, recipe, fixed)}


def _stored(
    path: Path, rows: Episodes, columns: frozenset[str], policies: Mapping[str, TokenPolicy], budget: int
) -> Episodes:
    """`rows` with the columns that are in the file; they are computed, and the file written, where it is not of these rows."""
    if path.exists():
        kept = Episodes.load(path)
        same = len(kept["token"]) == len(rows["token"]) and torch.equal(kept["token"], rows["token"].cpu())
        if same and torch.equal(kept.context().values, rows.context().values.cpu()) and columns <= set(kept.columns):
            return rows.with_columns("step", **{c: kept[c].to(rows.device) for c in columns})
    made = annotate(rows, Needs(columns), policies, budget)
    made.without(*(c for c in made.columns if c not in columns | {"token", "prompt", "score_prompt"})).save(path)
    return made


# ---- log-probs that come with the data ---------------------------------------------------------------------------------
def check_logged(config: RunConfig, recipe: Recipe, fixed: Mapping[str, Rows]) -> None:
    """A method that needs `reference_logp` of single tokens cannot take sums that were spread over them: ConfigError."""
    for name, rows in fixed.items():
        if not spread_evenly(rows.episodes):
            continue
        for _, term in recipe.objective.terms():
            if "reference_logp" in term.needs.columns and not reads_sums(term, rows.episodes):
                raise ConfigError(
                    f"{config.method!r} needs the reference's log-prob of every token, and the {name} say the sum of each "
                    "answer: log them per token (a list in place of the sum), or drop the columns, and a reference is run"
                )


def spread_evenly(rows: Episodes) -> bool:
    """Whether `reference_logp` is the same at all steps of every answer that has it."""
    if "reference_logp" not in rows:
        return False
    x = rows["reference_logp"]
    high, low = (rows.reduce(x.nan_to_num(), how=how) for how in ("max", "min"))
    return bool(x.isfinite().any()) and torch.equal(high, low)


def reads_sums(term: Objective, rows: Episodes) -> bool:
    """Whether a term is the same however the reference's log-prob of an answer is divided among its tokens; measured on a few.

    A term that cannot be evaluated on these rows alone is taken at its word.
    """
    few = rows.select(torch.arange(min(8, rows.count("group"))), "group")
    generator, n = torch.Generator().manual_seed(0), few.count("step")
    reference, logp, noise = -torch.rand((3, n), generator=generator, dtype=torch.float64)
    noise = noise - few.expand(few.reduce(noise, how="mean"))
    signals = {name: logp.clone().requires_grad_() for name in term.needs.signals}
    found = []
    for column in (reference, reference + noise):
        try:
            value = term(few.with_columns("step", reference_logp=column), signals)
            slopes = torch.autograd.grad(value, list(signals.values()), allow_unused=True)
        except (KeyError, RuntimeError):
            return True
        found.append(torch.cat([value.detach()[None], *(s for s in slopes if s is not None)]))
    return torch.allclose(found[0], found[1], rtol=1e-9, atol=1e-12)
