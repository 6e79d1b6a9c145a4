"""Coming back to a run: evaluate what it trained."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from unipo.policies import load_policy
from unipo.sources.sampler import Sampler, SamplerSettings
from unipo.training.build_text import load_problems, scorer
from unipo.training.config import ConfigError, RunConfig
from unipo.training.evaluate import Evaluation, evaluate


def evaluate_run(folder: str | Path, prompts: int, samples: int, temperature: float) -> Evaluation:
    """Sample held-out prompts with the policy in `folder/final`. Raises ConfigError when there is none yet."""
    folder = Path(folder)
    if not (folder / "config.yaml").exists():
        raise ConfigError(f"{folder} is not a run: it has no config.yaml")
    if not (folder / "final" / "config.json").exists():
        raise ConfigError(f"{folder} has no trained policy yet: finish it with `unipo resume {folder}`")
    config = dataclasses.replace(RunConfig.from_yaml((folder / "config.yaml").read_text()), eval_prompts=prompts)
    problems = load_problems(config)
    if not problems.held_out:
        raise ConfigError(f"{config.task} has no held-out prompts: give the run a --held-out dataset")
    policy = load_policy(str(folder / "final"), config.dtype)
    settings = SamplerSettings(temperature=temperature, max_tokens=problems.max_tokens, stop=config.stop)
    sampler = Sampler(policy.model, policy.tokenizer, settings)
    return evaluate(problems.held_out, sampler, policy.tokenizer, scorer(problems.reward), config.seed, samples)
