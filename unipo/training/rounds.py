"""The offline round of a method that learns from descriptions and a reasoner, before the first step of a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from unipo.episodes import Episodes
from unipo.policies import load_policy
from unipo.sources.prompts import Prompt
from unipo.sources.text.rollouts import Reward
from unipo.sources.text.sampler import Sampler, SamplerSettings
from unipo.sources.text.two_stage import (
    COLUMNS,
    DescribeThenReason,
    EmbeddedReasoner,
    Reasoner,
    SampledText,
    chosen,
    describe_then_reason,
)
from unipo.tasks import Task
from unipo.tasks.describe import DESCRIPTION
from unipo.training.config import ConfigError, RunConfig

FILE = "round.parquet"
SEARCHED = 8
"""Prompts that are looked through for each that is asked for."""


def offline_round(config: RunConfig, spec: DescribeThenReason, policy: Any, prompts: Any, task: Task | None, reward: Reward,
                  settings: SamplerSettings, folder: Path, model: str) -> Episodes:  # fmt: skip
    """The selected traces, as demonstrations. Every trace of the round is kept in `round.parquet`: a resumed run reads it.

    `model`: the folder or hub name of the reasoner, "task" for the embedded one. Raises ConfigError where the prompts do not
    say how they are described, or no trace was selected.
    """
    path = folder / FILE
    if path.exists():
        return chosen(Episodes.load(path), spec)
    asked = two_stage_prompts(prompts, spec.prompts, config.task)
    reason = _reasoner(config, task, settings, policy, model)
    describe = SampledText(Sampler(policy.model, policy.tokenizer, settings), policy.tokenizer)
    traces = describe_then_reason(asked, spec, describe, reason, reward, policy.tokenizer, config.seed)
    kept = chosen(traces, spec)
    if not len(kept):
        rate = float((traces["reward"] >= 1 - 1e-6).double().mean())
        raise ConfigError(
            f"no trace was selected: {rate:.1%} of {len(traces):,} traces are right, and no description of {len(asked)} prompts "
            f"was worth more than {spec.threshold:g} ({spec.traces} traces each). Take a reasoner that is more often right, a "
            "policy that describes better (train it on descriptions first), or a lower --sophia.threshold"
        )
    temporary = path.with_name(f".{FILE}.tmp")
    traces.save(temporary)
    temporary.replace(path)
    return kept


def two_stage_prompts(prompts: Any, n: int, name: str) -> Sequence[Prompt]:
    """The first `n` different prompts that say how they are described and asked about. Raises ConfigError without any."""
    found: dict[int, Prompt] = {}
    for i in range(min(SEARCHED * n, len(prompts) if hasattr(prompts, "__len__") else SEARCHED * n)):
        prompt = prompts[i]
        if all(prompt.columns.get(c) for c in COLUMNS) and DESCRIPTION in str(prompt.columns["reason_prompt"]):
            found.setdefault(prompt.id, prompt)
        if len(found) == n:
            break
    if not found:
        raise ConfigError(
            f"prompts of {name} do not say how to describe them: this method needs the columns describe_prompt (what is seen, "
            f"without the question) and reason_prompt (the question, with {DESCRIPTION} in it). The embedded task `describe` "
            "has them"
        )
    return list(found.values())


def _reasoner(config: RunConfig, task: Task | None, settings: SamplerSettings, policy: Any, model: str) -> Reasoner:
    if config.teacher == "task":
        own = getattr(task, "reason", None)
        if own is None:
            raise ConfigError(
                f"--teacher task: {config.task} has no reasoner of its own (the embedded task `describe` has one); give the "
                "folder or hub name of a model"
            )
        return EmbeddedReasoner(own)
    device = next(policy.model.parameters()).device
    teacher = load_policy(model, config.dtype, None, str(device), config.temperature)
    torch.manual_seed(config.seed)
    return SampledText(Sampler(teacher.model, teacher.tokenizer, settings), teacher.tokenizer)
