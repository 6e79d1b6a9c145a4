"""From a configuration and a recipe to a run on text: everything is made and checked here, before anything trains."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from unipo.episodes import Episodes
from unipo.functional.quantities import parametric
from unipo.learner import Learner, LearnerSettings
from unipo.policies import TokenPolicy, ValueHead, load_policy
from unipo.policies.loading import LoraSettings
from unipo.recipe import Recipe
from unipo.rewards import Prefix, RewardSet, resolve_reward, split_rewards
from unipo.sources.ahead import Ahead
from unipo.sources.arms import ArmChoice, Arms
from unipo.sources.corpus import corpus_prompts
from unipo.sources.datasets import load_rows
from unipo.sources.encode import encode_completion, encode_prompt, plain_text
from unipo.sources.mixer import Mixer, Source
from unipo.sources.prompts import Curriculum, Prompt, Prompts, RowPrompts, TaskPrompts, prompt_identity
from unipo.sources.replay import Replay
from unipo.sources.rollouts import Reward, Rollouts, Scored
from unipo.sources.rows import Rows, demonstration_episodes, pair_episodes
from unipo.sources.sampler import Sampler, SamplerSettings
from unipo.tasks import STYLES, TASKS, Task, get_task
from unipo.training.arms import arms_of, with_arms
from unipo.training.config import ConfigError, RunConfig
from unipo.training.fingerprint import ROOT, fingerprint
from unipo.training.loop import Run
from unipo.training.progress import Progress
from unipo.training.records import Records
from unipo.training.rounds import offline_round
from unipo.training.text import Evaluator, TextData, replayed_groups
from unipo.training.threads import use_threads

TINY = ROOT / "tasks" / "tiny"
HELD_OUT_SHARE = 0.1
DATASET_MAX_TOKENS = 256
CORPUS_JUDGE = Prefix(share=0.5)
"""Of documents: the beginning of what stands there, at least half of the segment that was asked for."""


@dataclass(frozen=True)
class Problems:
    """What is trained on: prompts, held-out prompts, the reward, and the embedded task if it is one."""

    train: Prompts | Curriculum | Arms
    held_out: list[Prompt]
    reward: RewardSet
    task: Task | None
    max_tokens: int


def build_text(config: RunConfig, recipe: Recipe, console: Console | None = None) -> Run:
    """A run at step 0. Raises ConfigError, DataError, ModelError, TaskError or RewardError for what cannot work."""
    recipe = _resized(recipe, config)
    check_sources(config, recipe)
    use_threads(config.threads)
    torch.manual_seed(config.seed)
    device = ("cuda" if torch.cuda.is_available() else "cpu") if config.device == "auto" else config.device
    problems = load_problems(config, recipe.rollouts.arms)
    policy, references = load_players(config, recipe, device)
    check_tasks(config, recipe, problems)
    check_guidance(config, recipe, problems)
    reward = scorer(problems.reward)
    settings = SamplerSettings(
        temperature=config.temperature,
        top_p=config.top_p,
        top_k=config.top_k,
        max_tokens=problems.max_tokens,
        stop=config.stop,
        weights=config.sampling_weights,
    )
    _check_prompts(policy, problems, config)
    rollouts: Rollouts | Ahead | None = None
    sources: dict[str, Source] = {}
    if "rollout" in recipe.kinds:
        actor = copy.deepcopy(policy) if config.ahead else policy
        rollouts = Rollouts(problems.train, Sampler(actor.model, actor.tokenizer, settings), policy.tokenizer, reward,
                            recipe.rollouts, config.prompts, config.seed, policy=actor)  # fmt: skip
        rollouts = Ahead(rollouts, actor, policy, config.ahead, config.steps) if config.ahead else rollouts
        sources["fresh"] = rollouts
    replay = _replay(config, recipe, policy, reward)
    if replay is not None:
        sources["replay"] = replay
    sources.update(_fixed_rows(config, policy, problems))
    if recipe.round is not None:
        config.folder.mkdir(parents=True, exist_ok=True)
        made = offline_round(config, recipe.round, policy, problems.train, problems.task, reward, settings, config.folder,
                             model_folder(config.teacher))  # fmt: skip
        sources["round"] = Rows(made, config.demos_per_step, config.seed)
    greedy = SamplerSettings(temperature=config.eval_temperature, max_tokens=problems.max_tokens, stop=config.stop)
    held_out = Evaluator(problems.held_out, Sampler(policy.model, policy.tokenizer, greedy), reward, config.seed,
                         config.eval_samples)  # fmt: skip
    updates = config.steps * recipe.passes * recipe.minibatches
    learner = Learner({"policy": policy}, learner_settings(config, updates), monitor=("logp", "entropy"),
                      gradient_parts=recipe.gradient_parts)  # fmt: skip
    folder = config.folder
    folder.mkdir(parents=True, exist_ok=True)
    companions = tuple(spec.build(policy, config.seed) for spec in recipe.companions)
    data = TextData(config, folder, policy, Mixer(sources), rollouts, replay, held_out, companions)
    moving = {name: references[name].model for name, s in recipe.snapshots.items() if s.moves and name in references}
    return Run(config, folder, recipe, policy, {**references, "old": policy}, learner, data, Records(folder),
               Progress(config.steps, console), fingerprint(config), modules=moving)  # fmt: skip


def learner_settings(config: RunConfig, updates: int) -> LearnerSettings:
    return LearnerSettings(
        learning_rate=config.learning_rate, value_learning_rate=config.value_learning_rate, weight_decay=config.weight_decay,
        clip_norm=config.clip_norm, warmup=config.warmup, schedule=config.schedule, total_updates=updates,
        token_budget=config.token_budget, autocast=config.autocast,
    )  # fmt: skip


def _resized(recipe: Recipe, config: RunConfig) -> Recipe:
    changes: dict[str, Any] = {}
    if config.epochs:
        changes["epochs"] = config.epochs
    if config.minibatches:
        changes["minibatches"] = config.minibatches
    if config.rollouts:
        changes["group"] = config.rollouts
    return recipe.but(controllers=tuple(c.lasting(config.steps) for c in recipe.controllers), **changes)


def check_sources(config: RunConfig, recipe: Recipe) -> None:
    """Every term must find rows of the kind it claims, and groups large enough: told before anything is loaded."""
    if not recipe.for_text:
        raise ConfigError(
            f"{config.method!r} is for environments, not for text such as {config.task}: give the id of an environment "
            "(Pendulum-v1), or take a method whose `unipo show` says text"
        )
    added = {stage.provides for stage in recipe.rollouts.augment}
    given = {
        "rollout": True,
        "demo": bool(config.demos) or "demo" in added or recipe.round is not None,
        "pair": bool(config.pairs),
    }
    remedy = {"demo": "--demos FILE (or --demos task for an embedded task)", "pair": "--pairs FILE (or --pairs task)"}
    for kind in recipe.kinds:
        if not given[kind]:
            terms = [t.title for _, t in recipe.objective.terms() if f"kind={kind}" in repr(t.rows)]
            raise ConfigError(
                f"{', '.join(terms)} trains on rows of kind {kind!r}, and the run has none: give {remedy[kind]}"
            )
    rolled = (t for _, t in recipe.objective.terms() if "kind=rollout" in repr(t.rows))
    size = max((t.needs.group_size for t in rolled), default=1)
    if "rollout" in recipe.kinds and recipe.rollouts.group < size:
        raise ConfigError(
            f"this method compares the rollouts of a prompt and needs at least {size}; it has groups of "
            f"{recipe.rollouts.group}. Use --rollouts {size} or more, or a method with another baseline (reinforce, ppo)"
        )
    if recipe.round is not None and not config.teacher:
        raise ConfigError(
            f"{config.method!r} asks a second model to reason, and the run has none: give --teacher FOLDER (or --teacher task "
            "for the embedded task `describe`)"
        )
    if config.teacher and recipe.round is None:
        raise ConfigError(
            f"--teacher {config.teacher} is given, but {config.method!r} asks no second model (sophia does)"
        )
    for flag, value, kind in (("--demos", config.demos, "demo"), ("--pairs", config.pairs, "pair")):
        if value and kind not in recipe.kinds:
            raise ConfigError(
                f"{flag} {value} is given, but no term of {config.method!r} uses such rows: add one, for example "
                f"{config.method}+0.1*{'sft' if kind == 'demo' else 'dpo'}"
            )


def check_tasks(config: RunConfig, recipe: Recipe, problems: Problems) -> None:
    """A term over the rows of one task must find prompts of it."""
    if not recipe.tasks:
        return
    train = parts_of(problems.train)[0]
    shown = train.rows if isinstance(train, RowPrompts) else [train[i] for i in range(256)]
    there = {str(p.columns["task"]) for p in shown if p.columns.get("task") is not None}
    if recipe.tasks - there:
        raise ConfigError(
            f"{config.method!r} trains on prompts of the tasks {' and '.join(sorted(recipe.tasks))}, and {config.task} has "
            f"{'those of ' + ' and '.join(sorted(there)) if there else 'none that say their task'}: take a file of plain text "
            "(.txt), the embedded task `derivations`, or prompts with a column 'task'"
        )


def check_guidance(config: RunConfig, recipe: Recipe, problems: Problems) -> None:
    """Stages that add rows to groups must find in every prompt what they make them of: told with the first that lacks it."""
    shown: list[Prompt] = []
    for prompts in parts_of(problems.train):
        shown += prompts.rows if isinstance(prompts, RowPrompts) else [prompts[i] for i in range(8)]
    lacking = [what for p in shown for stage in recipe.rollouts.augment if (what := stage.lacks(p))]
    if lacking:
        first = next(p for p in shown if any(stage.lacks(p) for stage in recipe.rollouts.augment))
        raise ConfigError(
            f"{config.method!r} needs of every prompt {lacking[0]}; {len(lacking)} of {len(shown)} have none, the first of them "
            f"{plain_text(first.text)[:50]!r} (its columns: {', '.join(first.columns) or 'none'}). Add the column, or take a "
            "method that asks for prompts alone: grpo, or arpo-replay, which learns from its own successes"
        )


# ---- problems and rewards --------------------------------------------------------------------------------------------
def load_problems(config: RunConfig, arms: ArmChoice | None = None) -> Problems:
    """Prompts (in `arms`, where the method asks for them), held-out prompts and rewards of an embedded task, or of a
    dataset."""
    rewards = [resolve_reward(r) for r in split_rewards(config.reward)]
    if is_task(config.task):
        task = with_arms(get_task(config.task), config, arms)
        held_out = [TaskPrompts(task, "held_out")[i] for i in range(config.eval_prompts)]
        rewards = rewards or list(task.rewards)
        limit = config.max_tokens or task.max_completion_tokens
        return Problems(_staged(config, TaskPrompts(task), arms), held_out, _rewards(rewards, config), task, limit)
    rows = dataset_prompts(config.task, config.chat)
    if config.held_out:
        train, kept = rows, dataset_prompts(config.held_out, config.chat)
    else:
        train, kept = divided(rows)
    rewards = rewards or [("prefix", CORPUS_JUDGE, 1.0) if "document" in rows[0].columns else resolve_reward("math")]
    limit = config.max_tokens or DATASET_MAX_TOKENS
    prompts = _staged(config, RowPrompts(train, config.seed), arms)
    return Problems(prompts, kept[: config.eval_prompts], _rewards(rewards, config), None, limit)


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


def scorer(rewards: RewardSet) -> Reward:
    """A `RewardSet` as what sources call."""

    def score(prompts: Sequence[Any], completions: Sequence[str], columns: Mapping[str, Sequence[Any]]) -> Scored:
        total, kept, parts = rewards(prompts, completions, columns)
        several = parts if len(parts) > 1 else {}
        return Scored(
            torch.tensor(total), torch.tensor(kept, dtype=torch.bool), {k: torch.tensor(v) for k, v in several.items()}
        )

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
        columns = dict(row.columns)
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


def _check_prompts(policy: TokenPolicy, problems: Problems, config: RunConfig) -> None:
    """Every prompt of a dataset must fit: told with its row before training."""
    context = getattr(policy.model.config, "max_position_embeddings", None) or 1 << 30
    limit = min(config.max_prompt_tokens or context, context - problems.max_tokens)
    rows = [
        row
        for p in parts_of(problems.train)
        for row in (p.rows if isinstance(p, RowPrompts) else [p[i] for i in range(8)])
    ]
    for number, prompt in enumerate([*rows, *problems.held_out], 1):
        length = len(encode_prompt(policy.tokenizer, prompt.text))
        if not 0 < length <= limit:
            raise ConfigError(
                f"prompt {number} ({str(prompt.text)[:50]!r}) has {length} tokens; allowed are 1 to {limit} (a context of "
                f"{context} less --max-tokens {problems.max_tokens}). Shorten or drop it, or lower --max-tokens"
            )


# ---- players -----------------------------------------------------------------------------------------------------------
def load_players(config: RunConfig, recipe: Recipe, device: str) -> tuple[TokenPolicy, dict[str, TokenPolicy]]:
    """The policy, and what `recipe.needs` says beside it: a value head, a frozen reference (the adapter switched off
    for LoRA), and the recipe's other snapshots."""
    lora = LoraSettings(rank=config.lora_rank, alpha=config.lora_alpha) if config.lora_rank else None
    name = model_folder(config.model)
    policy = load_policy(name, config.dtype, lora, device, config.temperature)
    if "value" in recipe.needs.signals:
        width = policy.model.get_input_embeddings().weight.shape[1]
        policy.value_head = ValueHead(width, getattr(torch, config.dtype)).to(device)
    policy.parametric = parametric(recipe.needs.signals)
    references: dict[str, TokenPolicy] = {}
    asked = {column.partition("_")[0] for column in recipe.needs.columns}
    for who in sorted(asked & {"reference", *recipe.snapshots}):
        moves = who in recipe.snapshots and recipe.snapshots[who].moves
        if lora is not None and moves:
            raise ConfigError(
                f"{config.method!r} renews a copy of the policy ({who}), which --lora-rank does not keep: train all weights"
            )
        if lora is not None:
            references[who] = TokenPolicy(policy.model, policy.tokenizer, config.temperature, adapter=False)
        else:
            references[who] = load_policy(name, config.dtype, None, device, config.temperature)
    return policy, references


def model_folder(name: str) -> str:
    """Where a model is: "tiny" is the shipped one."""
    return str(TINY) if name == "tiny" else name


# ---- sources -----------------------------------------------------------------------------------------------------------
def _replay(config: RunConfig, recipe: Recipe, policy: TokenPolicy, reward: Reward) -> Replay | None:
    spec = recipe.rollouts
    if not config.replay and spec.replay:
        return Replay(replayed_groups(spec, config.prompts), config.seed, spec.replay_steps * config.prompts)
    if not config.replay:
        if config.replay_from:
            raise ConfigError(
                "--replay-from is given, but --replay is 0: say how many groups a batch takes, --replay 16"
            )
        return None
    replay = Replay(config.replay, config.seed, config.replay_capacity, config.max_staleness)
    for part in logged_rollouts(config.replay_from, policy) if config.replay_from else []:
        replay.add(part)
    return replay


def logged_rollouts(path: str, policy: TokenPolicy) -> list[Episodes]:
    """Rollouts of an earlier run (its folder), or of a dataset; versions of another run count as unknown (-1)."""
    folder = Path(path)
    files = sorted((folder / "episodes").glob("step_*.parquet"))
    if files:
        parts = [Episodes.load(f) for f in files]
        return [e.with_columns("episode", policy_version=torch.full((len(e),), -1)) for e in parts]
    rows = list(load_rows(path).rollouts())
    tokenizer = policy.tokenizer
    tokens, logps = [], []
    for row in rows:
        ids = (
            list(map(int, row.token_ids)) if row.token_ids is not None else encode_completion(tokenizer, row.completion)
        )
        known = row.logprobs is not None and len(row.logprobs) == len(ids)
        tokens.append(ids)
        logps.append(
            [float(x) for x in row.logprobs] if known and row.logprobs is not None else [float("nan")] * len(ids)
        )
    made = Episodes.build(
        tokens, [encode_prompt(tokenizer, r.prompt) for r in rows], _runs([prompt_identity(r.prompt) for r in rows]),
        behavior_logp=logps, kind=["rollout"] * len(rows), prompt_id=[prompt_identity(r.prompt) for r in rows],
        policy_version=[-1] * len(rows), truncated=[False] * len(rows), reward=[float(r.reward) for r in rows],
    )  # fmt: skip
    return [made]


def _runs(identities: list[int]) -> list[int]:
    """Group numbers: equal neighbours share one."""
    numbers: list[int] = []
    last = None
    for identity in identities:
        numbers.append((numbers[-1] + (identity != last)) if numbers else 0)
        last = identity
    return numbers


def _fixed_rows(config: RunConfig, policy: TokenPolicy, problems: Problems) -> dict[str, Source]:
    tokenizer, found = policy.tokenizer, {}
    if config.demos:
        shown = _demonstrations(config, problems)
        made = demonstration_episodes(tokenizer, [p for p, _ in shown], [c for _, c in shown])
        found["demos"] = Rows(made, config.demos_per_step, config.seed)
    if config.pairs:
        triples = _pairs(config, problems)
        columns: Any = [list(c) for c in zip(*triples, strict=True)]
        found["pairs"] = Rows(pair_episodes(tokenizer, *columns), config.pairs_per_step, config.seed)
    return dict(found)


def _demonstrations(config: RunConfig, problems: Problems) -> list[tuple[Any, str]]:
    if config.demos.partition(":")[0] != "task":
        return [(r.prompt, r.completion) for r in load_rows(config.demos).demonstrations()]
    task, style = _task_of(problems, "--demos"), config.demos.partition(":")[2] or "direct"
    rows = [task.problem(i + _AWAY) for i in range(config.dataset_rows)]
    return [(p.prompt, task.demonstration(p, style)) for p in rows]


def _pairs(config: RunConfig, problems: Problems) -> list[tuple[Any, Sequence[str], Sequence[str]]]:
    """(prompt, chosen answers, rejected answers); of a task a pair, or with "task:groups" the answer in every style
    and two mistakes."""
    name, _, form = config.pairs.partition(":")
    if name != "task":
        return [(r.prompt, r.all_chosen, r.all_rejected) for r in load_rows(config.pairs).pairs()]
    if form not in ("", "groups"):
        raise ConfigError(
            f"--pairs {config.pairs}: expected a dataset, task (pairs) or task:groups (groups of answers)"
        )
    task = _task_of(problems, "--pairs")
    rows = [task.problem(i + 2 * _AWAY) for i in range(config.dataset_rows)]
    made: list[tuple[Any, Sequence[str], Sequence[str]]] = []
    for i, p in enumerate(rows):
        (won, lost), again = task.pair(p, i), task.pair(p, i + len(rows))
        several = ([task.demonstration(p, style) for style in STYLES], sorted({lost, again[1]}))
        made.append((p.prompt, *(several if form else ([won], [lost]))))
    return made


_AWAY = 1 << 30
"""Demonstrations and pairs of an embedded task come from far along its stream, not from the prompts that are sampled."""


def _task_of(problems: Problems, flag: str) -> Task:
    if problems.task is None:
        raise ConfigError(f"{flag} task works for embedded tasks only; give {flag} a dataset file for this one")
    return problems.task
