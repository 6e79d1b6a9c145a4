"""From a configuration and a recipe to a run on text: everything is made and checked here, before anything trains."""

from __future__ import annotations

import copy
from typing import Any

import torch
from rich.console import Console

from unipo.functional.quantities import parametric
from unipo.learner import Learner, LearnerSettings
from unipo.objectives import Needs
from unipo.policies import TokenPolicy, ValueHead, load_policy
from unipo.policies.loading import LoraSettings
from unipo.recipe import Recipe
from unipo.sources.mixer import Mixer, Source
from unipo.sources.rows import Rows
from unipo.sources.text.ahead import Ahead
from unipo.sources.text.rollouts import Rollouts
from unipo.sources.text.sampler import Sampler, SamplerSettings
from unipo.training.config import ConfigError, RunConfig
from unipo.training.fingerprint import fingerprint
from unipo.training.judging import arranged, judged, ranked
from unipo.training.loop import Run
from unipo.training.problems import load_problems, scorer
from unipo.training.progress import Progress
from unipo.training.records import Records
from unipo.training.references import TINY, load_references, model_folder, store_references
from unipo.training.rounds import offline_round
from unipo.training.stored_rows import fixed_rows, replay_of, with_own_rows
from unipo.training.suitable import check_guidance, check_prompts, check_rewards, check_sources, check_tasks
from unipo.training.text import Evaluator, HeldOut, TextData
from unipo.training.threads import use_threads

__all__ = ["TINY", "build_text", "model_folder"]


def build_text(config: RunConfig, recipe: Recipe, console: Console | None = None) -> Run:
    """A run at step 0. Raises ConfigError, DataError, ModelError, TaskError or RewardError for what cannot work."""
    recipe = _resized(recipe, config)
    config = with_own_rows(config, recipe)
    check_sources(config, recipe)
    use_threads(config.threads)
    torch.manual_seed(config.seed)
    device = ("cuda" if torch.cuda.is_available() else "cpu") if config.device == "auto" else config.device
    problems = load_problems(config, recipe.rollouts.arms)
    policy = load_trained(config, recipe, device)
    check_tasks(config, recipe, problems)
    check_guidance(config, recipe, problems)
    check_rewards(config, recipe, problems)
    reward, gold = scorer(problems.reward, problems.measured, recipe.rewards), scorer(problems.gold)
    settings = SamplerSettings(
        temperature=config.temperature,
        top_p=config.top_p,
        top_k=config.top_k,
        max_tokens=problems.max_tokens,
        stop=config.stop,
        weights=config.sampling_weights,
    )
    check_prompts(policy, problems, config, recipe.rollouts.ask)
    if config.ahead and recipe.rollouts.players:
        raise ConfigError(
            f"{config.method!r} meets samples of {', '.join(sorted(recipe.rollouts.players))}, which may change while --ahead "
            "samples: leave out --ahead"
        )
    fixed = arranged(fixed_rows(config, policy, problems), recipe.arrange, policy.tokenizer)
    references = load_references(config, recipe, policy, fixed, device)
    rollouts: Rollouts | Ahead | None = None
    sources: dict[str, Source] = {}
    if recipe.samples:
        actor = copy.deepcopy(policy) if config.ahead else policy
        rollouts = Rollouts(problems.train, Sampler(actor.model, actor.tokenizer, settings), policy.tokenizer, reward,
                            recipe.rollouts, config.prompts, config.seed, policy=actor,
                            players={who: Sampler(references[who].model, policy.tokenizer, settings)
                                     for who in recipe.rollouts.players})  # fmt: skip
        rollouts = Ahead(rollouts, actor, policy, config.ahead, config.steps) if config.ahead else rollouts
        sources["fresh"] = rollouts
    replay = replay_of(config, recipe, policy)
    if replay is not None:
        sources["replay"] = replay
    sources.update(fixed)
    if recipe.round is not None:
        config.folder.mkdir(parents=True, exist_ok=True)
        made = offline_round(config, recipe.round, policy, problems.train, problems.task, reward, settings, config.folder,
                             model_folder(config.teacher))  # fmt: skip
        sources["round"] = Rows(made, config.demos_per_step, config.seed)
    greedy = SamplerSettings(temperature=config.eval_temperature, max_tokens=problems.max_tokens, stop=config.stop)
    held_out: HeldOut = Evaluator(
        [recipe.rollouts.ask.held_out(p) for p in problems.held_out], Sampler(policy.model, policy.tokenizer, greedy), gold,
        config.seed, config.eval_samples,
    )  # fmt: skip
    if recipe.judges and "pairs" in fixed:
        held_out = judged(fixed, config, recipe.arrange, policy, problems)
    elif "pairs" in fixed and not problems.held_out and config.eval_prompts and not recipe.samples:
        held_out = ranked(fixed, config, recipe, policy, problems, references)
    references = store_references(config, recipe, fixed, references)
    updates = config.steps * recipe.passes * recipe.minibatches
    learner = Learner({"policy": policy}, learner_settings(config, updates), monitor=("logp", "entropy"),
                      gradient_parts=recipe.gradient_parts)  # fmt: skip
    folder = config.folder
    folder.mkdir(parents=True, exist_ok=True)
    companions = tuple(spec.build(policy, config.seed) for spec in recipe.companions)
    data = TextData(config, folder, policy, Mixer(sources), rollouts, replay, held_out, companions,
                    needs=Needs.of(columns="reference_logp") if config.gold else Needs())  # fmt: skip
    moving = {name: references[name].model for name, s in recipe.snapshots.items() if s.moves and name in references}
    progress = Progress(config.steps, console)
    for note in (note for rows in fixed.values() for note in rows.notes):
        progress.note(note)
    return Run(config, folder, recipe, policy, {**references, "old": policy}, learner, data, Records(folder),
               progress, fingerprint(config), modules=moving)  # fmt: skip


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


# ---- players -----------------------------------------------------------------------------------------------------------
def load_trained(config: RunConfig, recipe: Recipe, device: str) -> TokenPolicy:
    """The policy that is trained, with a value head where `recipe` needs one."""
    lora = LoraSettings(rank=config.lora_rank, alpha=config.lora_alpha) if config.lora_rank else None
    name = model_folder(config.model)
    policy = load_policy(name, config.dtype, lora, device, config.temperature)
    valued = tuple(sorted(s for s in recipe.needs.signals if s.partition(".")[0] == "value"))
    if policy.values != valued:
        policy.value_head = ValueHead(policy.width, getattr(torch, config.dtype), valued).to(device) if valued else None
    policy.judges = recipe.judges
    policy.parametric = parametric(recipe.needs.signals)
    return policy
