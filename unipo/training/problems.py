"""What a run on text is trained on: prompts, held-out prompts, and the rewards that judge answers to them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from unipo.rewards import Prefix, RewardSet, learned, resolve_reward, split_rewards
from unipo.sources.data.corpus import corpus_prompts
from unipo.sources.data.datasets import load_rows
from unipo.sources.prompts import Curriculum, Prompt, Prompts, RowPrompts, TaskPrompts, prompt_identity
from unipo.sources.text.arms import ArmChoice, Arms
from unipo.sources.text.rollouts import Reward, Scored
from unipo.tasks import TASKS, Task, get_task
from unipo.training.arms import arms_of, with_arms
from unipo.training.config import ConfigError, RunConfig

HELD_OUT_SHARE = 0.1
DATASET_MAX_TOKENS = 256
CORPUS_JUDGE = Prefix(share=0.5)
"""Of documents: the beginning of what stands there, at least half of the segment that was asked for."""


@dataclass(frozen=True)
class Problems:
    """What is trained on: prompts, held-out prompts, the reward, and the embedded task if it is one.

    `gold`: what held-out answers are judged by, and rollouts measured by where it is not what they are trained on: --gold.
    Without it the reward itself, unless that is a model, which can be exploited: then the task's own, or "math" for a dataset
    with answers.
    """

    train: Prompts | Curriculum | Arms
    held_out: list[Prompt]
    reward: RewardSet
    gold: RewardSet
    task: Task | None
    max_tokens: int

    @property
    def measured(self) -> RewardSet | None:
        """What rollouts are measured by and not trained on, if there is such a thing."""
        return None if self.gold.functions == self.reward.functions else self.gold


def load_problems(config: RunConfig, arms: ArmChoice | None = None) -> Problems:
    """Prompts (in `arms`, where the method asks for them), held-out prompts and rewards of an embedded task, or of a
    dataset."""
    rewards = [resolve_reward(r) for r in split_rewards(config.reward)]
    measured = [resolve_reward(r) for r in split_rewards(config.gold)]
    if is_task(config.task):
        task = with_arms(get_task(config.task), config, arms)
        held_out = [TaskPrompts(task, "held_out")[i] for i in range(config.eval_prompts)]
        gold = measured or (list(task.rewards) if learned(rewards) else rewards or list(task.rewards))
        rewards = rewards or list(task.rewards)
        limit = config.max_tokens or task.max_completion_tokens
        return Problems(_staged(config, TaskPrompts(task), arms), held_out, _rewards(rewards, config), _rewards(gold, config),
                        task, limit)  # fmt: skip
    rows = dataset_prompts(config.task, config.chat)
    if config.held_out:
        train, kept = rows, dataset_prompts(config.held_out, config.chat)
    else:
        train, kept = divided(rows)
    if not (rewards or measured) and not any({"answer", "document"} & _filled(p) for p in [*train, *kept]):
        kept = []  # nothing says what a good answer is: comparisons may be held out in their place
    rewards = rewards or [("prefix", CORPUS_JUDGE, 1.0) if "document" in rows[0].columns else resolve_reward("math")]
    limit = config.max_tokens or DATASET_MAX_TOKENS
    prompts = _staged(config, RowPrompts(train, config.seed), arms)
    checked = learned(rewards) and any(p.columns.get("answer") is not None for p in rows)
    judge = _rewards(measured or ([resolve_reward("math")] if checked else rewards), config)
    return Problems(prompts, kept[: config.eval_prompts], _rewards(rewards, config), judge, None, limit)


def _filled(prompt: Prompt) -> set[str]:
    """The columns of a prompt that hold something."""
    return {name for name, value in prompt.columns.items() if value is not None}


def _staged(config: RunConfig, first: Prompts, arms: ArmChoice | None = None) -> Prompts | Curriculum | Arms:
    """The prompts themselves, in arms, or the stages of `--curriculum` after them."""
    if arms is not None:
        return arms_of(first, config, arms)
    if not config.curriculum:
        return first
    stages: list[tuple[int, Prompts]] = [(0, first)]
    for part in config.curriculum.split(","):
        step, _, name = part.partition("=")
        if not (step.strip().isdigit() and name):
            raise ConfigError(
                f"cannot read the stage {part!r} of --curriculum: write STEP=TASK, such as 50=arithmetic:3"
            )
        own = (
            TaskPrompts(get_task(name))
            if is_task(name)
            else RowPrompts(dataset_prompts(name, config.chat), config.seed)
        )
        stages.append((int(step), own))
    return Curriculum(stages=stages)


def is_task(name: str) -> bool:
    """Whether a TASK argument means an embedded task: any name that is not a path and not a hub name."""
    return name.partition(":")[0] in TASKS or not (Path(name).exists() or "/" in name or "." in name)


def _rewards(rewards: list[Any], config: RunConfig) -> RewardSet:
    return RewardSet(tuple(rewards), config.on_reward_error, config.reward_timeout)


def scorer(rewards: RewardSet, gold: RewardSet | None = None, apart: Collection[str] = ()) -> Reward:
    """A `RewardSet` as what sources call. `gold`: what is measured beside it. Several rewards are given by name as well; of one
    alone this is so where it is among those that a method reads `apart`."""

    def score(prompts: Sequence[Any], completions: Sequence[str], columns: Mapping[str, Sequence[Any]]) -> Scored:
        total, kept, parts = rewards(prompts, completions, columns)
        several = parts if len(parts) > 1 or apart else {}
        beside = None if gold is None else torch.tensor(gold(prompts, completions, columns)[0])
        each = {name: torch.tensor(values) for name, values in several.items()}
        return Scored(torch.tensor(total), torch.tensor(kept, dtype=torch.bool), each, beside)

    return score


def dataset_prompts(path: str, chat: bool) -> list[Prompt]:
    """Prompts of a dataset; a `completion` or `demonstration` column is each prompt's demonstration. Documents of plain text
    (a .txt file, or a column `text`) are prompts about their segments."""
    data, found = load_rows(path), []
    if "prompts" not in data.kinds and "documents" in data.kinds:
        found = corpus_prompts(row.text for row in data.documents())
        if not found:
            raise ConfigError(
                f"{path} has no document of three or more segments (sentences, or lines): nothing can be hidden"
            )
        return found
    for row in data.prompts():
        columns = {name: value for name, value in row.columns.items() if name not in ("prompts", "completions")}
        shown = columns.get("completion") or columns.get("demonstration")
        text: Any = [{"role": "user", "content": row.prompt}] if chat and isinstance(row.prompt, str) else row.prompt
        columns.setdefault("answer", row.answer)
        found.append(Prompt(id=prompt_identity(text), text=text, columns=columns, demonstration=shown))
    return found


def divided(rows: list[Prompt]) -> tuple[list[Prompt], list[Prompt]]:
    """A tenth is held out, by the hash of the prompt, so that equal prompts stay on one side (none below 20 rows); of
    documents, by that of the document, and at least one."""
    if len(rows) < 20:
        return rows, []
    whose = [r.columns.get("document", r.id) % 1000 for r in rows]
    bound = max(1000 * HELD_OUT_SHARE, min(whose) + 1 if "document" in rows[0].columns else 0)
    kept = [r for r, number in zip(rows, whose, strict=True) if number < bound]
    train = [r for r, number in zip(rows, whose, strict=True) if number >= bound]
    return (train, kept) if train else (rows, [])


def parts_of(prompts: Prompts | Curriculum | Arms) -> Sequence[Prompts]:
    """The stages of a curriculum, the arms of a choice, or the prompts themselves."""
    if isinstance(prompts, Curriculum):
        return [stage for _, stage in prompts.stages]
    return prompts.prompts if isinstance(prompts, Arms) else [prompts]
