"""Rows that a run does not sample: rollouts of before, demonstrations and preference pairs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from unipo.episodes import Episodes
from unipo.policies import TokenPolicy
from unipo.policies.token import context_limit
from unipo.recipe import Given, Recipe
from unipo.sources.data.comparisons import check_given, comparison_episodes, labelled_episodes
from unipo.sources.data.datasets import LabelRow, PairRow, load_rows
from unipo.sources.data.label_noise import flipped
from unipo.sources.data.pair_filters import PairFilter, kept_by, read_filters, spelled
from unipo.sources.data.problems import Where
from unipo.sources.prompts import prompt_identity
from unipo.sources.replay import Replay
from unipo.sources.rows import Rows, demonstration_episodes
from unipo.sources.stages.rated import as_lists
from unipo.sources.text.encode import encode_completion, encode_prompt
from unipo.tasks import STYLES, Task
from unipo.training.config import ConfigError, RunConfig, UnusableData
from unipo.training.problems import Problems, is_task
from unipo.training.text import replayed_groups


def replay_of(config: RunConfig, recipe: Recipe, policy: TokenPolicy) -> Replay | None:
    """Groups of older steps, as the configuration or the recipe asks for them; filled from `--replay-from`."""
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
        _check_logged(config, recipe, part)
        replay.add(part)
    return replay


def _check_logged(config: RunConfig, recipe: Recipe, rows: Episodes) -> None:
    """Logged rollouts must have the log-probs that ratios divide by, and enough answers to a prompt to compare."""
    given = Given(kinds=frozenset({"rollout"}), group=int(rows.lengths("group", "episode").min()), logged=True)
    unknown = int(rows.reduce(rows["behavior_logp"].isnan(), how="any").sum())
    if unknown and "behavior_logp" in recipe.needs.columns:
        raise UnusableData(
            f"{config.method!r} divides by the probability with which an answer was sampled, and {unknown} of {len(rows)} "
            f"rollouts of {config.replay_from} have no log-probs of their tokens (column logprobs): log them, or take a "
            "method without ratio",
            given.but_unlogged(),
        )
    size = recipe.needs.group_size
    small = int((rows.lengths("group", "episode") < size).sum())
    if small:
        raise UnusableData(
            f"{config.method!r} compares at least {size} answers to a prompt, and {small} of {rows.count('group')} prompts in "
            f"{config.replay_from} have fewer (answers to one prompt are neighbouring rows)",
            given,
        )


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


def with_own_rows(config: RunConfig, recipe: Recipe) -> RunConfig:
    """A TASK that is a file of comparisons or labels is trained on, where a method asks for such rows and no other are given."""
    asked = recipe.given_kinds - {stage.provides for stage in recipe.rollouts.augment}
    if is_task(config.task) or not asked & {"pair", "label"}:
        return config
    kinds = load_rows(config.task).kinds
    if "pair" in asked and not config.pairs and {"pairs", "ratings"} & set(kinds):
        config = dataclasses.replace(config, pairs=config.task)
    if "label" in asked and not config.labels and "labels" in kinds:
        config = dataclasses.replace(config, labels=config.task)
    return config


def fixed_rows(config: RunConfig, policy: TokenPolicy, problems: Problems) -> dict[str, Rows]:
    """Demonstrations, comparisons and labelled answers, as sources by name. DataError for rows that cannot be right."""
    tokenizer, found = policy.tokenizer, dict[str, Rows]()
    if config.demos:
        shown = _demonstrations(config, problems)
        made = demonstration_episodes(tokenizer, [p for p, _ in shown], [c for _, c in shown])
        found["demos"] = Rows(made, config.demos_per_step, config.seed)
    lists = rated_rollouts(config.pairs)
    if lists is not None:
        found["pairs"] = _checked(config, policy, (), lists, config.pairs_per_step)
    elif config.pairs:
        pairs = _pairs(config, problems)
        found["pairs"] = _checked(config, policy, pairs, comparison_episodes(tokenizer, pairs), config.pairs_per_step)
    elif config.keep_pairs:
        raise ConfigError(f"--keep-pairs {config.keep_pairs} is given, but there are no comparisons: give --pairs FILE")
    if config.labels:
        judged = _labels(config, problems)
        found["labels"] = _checked(config, policy, judged, labelled_episodes(tokenizer, judged), config.labels_per_step)
    return found


def rated_rollouts(path: str) -> Episodes | None:
    """The finished rollouts of a run (its folder) as lists, rated by their reward; None where `path` is no run with episodes.

    Raises ConfigError where no two answers to a prompt were rewarded differently.
    """
    files = sorted((Path(path) / "episodes").glob("step_*.parquet")) if path else []
    if not files:
        return None
    rows = Episodes.cat([Episodes.load(f) for f in files])
    rows = rows.select(rows.category("kind", "rollout") & ~rows["truncated"] & rows["reward"].isfinite())
    high, low = (rows.reduce("reward", to="group", how=how) for how in ("max", "min"))
    lists = as_lists(rows.select(high > low, "group"))
    if not len(lists):
        raise ConfigError(
            f"--pairs {path}: in no step of this run had two finished answers to a prompt different rewards"
        )
    own = [
        name
        for name in lists.columns
        if name.partition(".")[0] in ("reward", "behavior_logp", "win_rate", "confidence")
    ]
    return lists.without(*own).with_columns("episode", policy_version=torch.full((len(lists),), -1))


def _checked(
    config: RunConfig, policy: TokenPolicy, given: Sequence[PairRow | LabelRow], rows: Episodes, per_step: int
) -> Rows:
    """A source of judged answers, with noise and filters as the configuration asks for them. Noise comes first."""
    notes, kind = [], "comparisons" if bool(rows.category("kind", "pair").any()) else "labels"
    if config.flip_labels:
        rows, turned = flipped(rows, config.flip_labels, config.seed)
        notes.append(
            f"{turned:,} of {rows.count('group'):,} {kind} were turned round (--flip-labels {config.flip_labels:g})"
        )
    if config.keep_pairs and kind == "comparisons":
        rows, said = kept_by(rows, _filters(config.keep_pairs))
        notes += [f"{spelled(one)} left {after:,} of {before:,} comparisons" for one, before, after in said]
    if given:
        check_given(given, rows, context_limit(policy.model), config.rating_range)
    return Rows(rows.without("given"), per_step, config.seed, notes=notes)


def _filters(text: str) -> tuple[PairFilter, ...]:
    try:
        return read_filters(text)
    except ValueError as error:
        raise ConfigError(f"--keep-pairs: {error}") from error


def _demonstrations(config: RunConfig, problems: Problems) -> list[tuple[Any, str]]:
    if config.demos.partition(":")[0] != "task":
        return [(r.prompt, r.completion) for r in load_rows(config.demos).demonstrations()]
    task, style = _task_of(problems, "--demos"), config.demos.partition(":")[2] or "direct"
    rows = [task.problem(i + _AWAY) for i in range(config.dataset_rows)]
    return [(p.prompt, task.demonstration(p, style)) for p in rows]


def _pairs(config: RunConfig, problems: Problems) -> list[PairRow]:
    """Comparisons of a file; of a task a pair to a problem, or with "task:groups" the answer in every style and two mistakes.
    A task rates right answers 1 and mistakes 0."""
    name, _, form = config.pairs.partition(":")
    if name != "task":
        return list(load_rows(config.pairs).comparisons())
    if form not in ("", "groups"):
        raise ConfigError(
            f"--pairs {config.pairs}: expected a dataset, task (pairs) or task:groups (groups of answers)"
        )
    task, made = _task_of(problems, "--pairs"), []
    for i in range(config.dataset_rows):
        p = task.problem(i + 2 * _AWAY)
        (won, lost), again = task.pair(p, i), task.pair(p, i + config.dataset_rows)
        right = [task.demonstration(p, style) for style in STYLES] if form else [won]
        wrong = sorted({lost, again[1]}) if form else [lost]
        made.append(PairRow(prompt=p.prompt, chosen=right[0], also_chosen=tuple(right[1:]), rejected=wrong[0],
                            also_rejected=tuple(wrong[1:]), ratings=(1.0,) * len(right) + (0.0,) * len(wrong),
                            columns={"rationale": f"{{chosen}} {task.demonstration(p, 'worked')}"},
                            where=Where(config.task, i + 1)))  # fmt: skip
    return made


def _labels(config: RunConfig, problems: Problems) -> list[LabelRow]:
    """Labelled answers of a file; of a task its expert's answers and mistakes, in turn."""
    if config.labels != "task":
        return list(load_rows(config.labels).labels())
    task = _task_of(problems, "--labels")
    rows = [task.problem(i + 3 * _AWAY) for i in range(config.dataset_rows)]
    return [LabelRow(prompt=p.prompt, completion=task.pair(p, i)[i % 2], label=i % 2 == 0, columns={},
                     where=Where(config.task, i + 1)) for i, p in enumerate(rows)]  # fmt: skip


_AWAY = 1 << 30
"""Demonstrations and pairs of an embedded task come from far along its stream, not from the prompts that are sampled."""


def _task_of(problems: Problems, flag: str) -> Task:
    if problems.task is None:
        raise ConfigError(f"{flag} task works for embedded tasks only; give {flag} a dataset file for this one")
    return problems.task
