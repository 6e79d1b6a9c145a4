"""Can this method use this data? Told before anything trains, with what to give it or what else could use the data."""

from __future__ import annotations

from unipo.policies import TokenPolicy
from unipo.recipe import Given, Recipe, kinds_of
from unipo.sources.directions import Asking
from unipo.sources.prompts import Prompt, RowPrompts
from unipo.sources.stages.augment import Augment
from unipo.sources.stages.beginnings import Beginning
from unipo.sources.text.encode import encode_prompt, plain_text
from unipo.training.config import ConfigError, RunConfig, UnusableData
from unipo.training.problems import Problems, parts_of


def check_sources(config: RunConfig, recipe: Recipe) -> None:
    """Every term must find rows of the kind it claims, and groups large enough: told before anything is loaded."""
    if not recipe.for_text and "+" in config.method:
        raise ConfigError(
            f"{config.method!r} asks text for {', '.join(sorted(recipe.unmade)) or 'what only environments have'}, which nothing "
            "in this sum makes. Rollouts are those of its first method: put first the one that asks for other rollouts than the "
            "policy's own, or leave out the one that is for environments"
        )
    if not recipe.for_text:
        raise ConfigError(
            f"{config.method!r} is for environments, not for text such as {config.task}: give the id of an environment "
            "(Pendulum-v1), or take a method whose `unipo show` says text"
        )
    added = {stage.provides for stage in recipe.rollouts.augment}
    given = {
        "rollout": True,
        "demo": bool(config.demos) or "demo" in added or recipe.round is not None,
        "pair": bool(config.pairs) or "pair" in added,
        "label": bool(config.labels),
    }
    remedy = {
        "demo": "--demos FILE (or --demos task for an embedded task)",
        "pair": "--pairs FILE (or --pairs task)",
        "label": "--labels FILE (or --labels task)",
    }
    for kind in recipe.kinds:
        if not given[kind]:
            terms = [t.title for _, t in recipe.objective.terms() if f"kind={kind}" in repr(t.rows)]
            raise UnusableData(
                f"{', '.join(terms)} trains on rows of kind {kind!r}, and the run has none: give {remedy[kind]}",
                Given(kinds=frozenset(k for k in given if given[k]), group=max(recipe.rollouts.group, 2)),
            )
    made = {"rollout", *(s.provides for s in recipe.rollouts.augment if not s.single and s.provides != "demo")}
    size = max((t.needs.group_size for _, t in recipe.objective.terms() if made & kinds_of(t.rows)), default=1)
    if recipe.samples and recipe.rollouts.group < size:
        raise UnusableData(
            f"this method compares the rollouts of a prompt and needs at least {size}; it has groups of "
            f"{recipe.rollouts.group}. Use --rollouts {size} or more, or a method with another baseline",
            Given(kinds=frozenset(k for k in given if given[k]), group=recipe.rollouts.group),
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
    users = {"demo": "sft", "pair": "dpo", "label": "kto"}
    for flag, value, kind in (
        ("demos", config.demos, "demo"),
        ("pairs", config.pairs, "pair"),
        ("labels", config.labels, "label"),
    ):
        if value and kind not in recipe.given_kinds:
            raise ConfigError(
                f"--{flag} {value} is given, but no term of {config.method!r} uses such rows: add one, for example "
                f"{config.method}+0.1*{users[kind]}"
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


def check_rewards(config: RunConfig, recipe: Recipe, problems: Problems) -> None:
    """Rewards that a method reads one by one must be among those of the run."""
    given = [name for name, _, _ in problems.reward.functions]
    lacking = sorted(recipe.rewards - set(given))
    if lacking:
        raise ConfigError(
            f"{config.method!r} reads the reward{'s' * (len(lacking) > 1)} {' and '.join(lacking)} by name, and the run has "
            f"{', '.join(given)}: name those of the run in the method's settings (unipo show {config.method}), or give --reward "
            f"{','.join(sorted(recipe.rewards))}"
        )


def check_guidance(config: RunConfig, recipe: Recipe, problems: Problems) -> None:
    """Stages that add rows to groups must find in every prompt what they make them of: told with the first that lacks it."""
    shown: list[Prompt] = []
    for prompts in parts_of(problems.train):
        shown += prompts.rows if isinstance(prompts, RowPrompts) else [prompts[i] for i in range(8)]
    stages: tuple[Augment | Beginning, ...] = (recipe.rollouts.begin, *recipe.rollouts.augment)
    lacking = [what for p in shown for stage in stages if (what := stage.lacks(p))]
    if lacking:
        first = next(p for p in shown if any(stage.lacks(p) for stage in stages))
        raise ConfigError(
            f"{config.method!r} needs of every prompt {lacking[0]}; {len(lacking)} of {len(shown)} have none, the first of them "
            f"{plain_text(first.text)[:50]!r} (its columns: {', '.join(first.columns) or 'none'}). Add the column, or take a "
            "method that asks for prompts alone: grpo, or arpo-replay, which learns from its own successes"
        )


def check_prompts(policy: TokenPolicy, problems: Problems, config: RunConfig, ask: Asking | None = None) -> None:
    """Every prompt of a dataset must fit, as what `ask` makes of it: told with its row before training."""
    ask = ask or Asking()
    context = getattr(policy.model.config, "max_position_embeddings", None) or 1 << 30
    limit = min(config.max_prompt_tokens or context, context - problems.max_tokens)
    rows = [
        row
        for p in parts_of(problems.train)
        for row in (p.rows if isinstance(p, RowPrompts) else [p[i] for i in range(8)])
    ]
    for number, prompt in enumerate([*rows, *problems.held_out], 1):
        length = len(encode_prompt(policy.tokenizer, ask.held_out(prompt).text))
        if not 0 < length <= limit:
            raise ConfigError(
                f"prompt {number} ({str(prompt.text)[:50]!r}) has {length} tokens; allowed are 1 to {limit} (a context of "
                f"{context} less --max-tokens {problems.max_tokens}). Shorten or drop it, or lower --max-tokens"
            )
