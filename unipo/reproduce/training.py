"""Training a table of logits with a real recipe, where every success rate is exact. Sources are functions of a step."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from unipo.episodes import Episodes
from unipo.learner import Learner, LearnerSettings, annotate
from unipo.objectives import with_settings
from unipo.policies.tabular import TabularPolicy
from unipo.recipe import Recipe
from unipo.reproduce.claim import Phases
from unipo.sources.keyed import keyed_generator
from unipo.tasks.tabular import TabularTask

Draw = Callable[[int], Episodes]
"""step -> the batch of that step."""
Watch = Callable[[int], None]
"""Called after each step, 1-based."""

WHOLE = 1 << 30


def learner_of(policy: TabularPolicy, rate: float) -> Learner:
    return Learner({"policy": policy}, LearnerSettings(learning_rate=rate, token_budget=WHOLE))


def train(phases: Phases, policy: TabularPolicy, draw: Draw, *, steps: int, rate: float,
          reference: TabularPolicy | None = None, watch: Watch = lambda step: None) -> None:  # fmt: skip
    """`steps` updates in all; each phase starts with a fresh optimiser. `reference` fills `reference_*` columns."""
    share = -(-steps // len(phases))
    learners = [learner_of(policy, rate) for _ in phases]
    states = [{c.knob: c.start() for c in recipe.controllers} for recipe in phases]
    for step in range(steps):
        phase = step // share
        recipe = phases[phase]
        settings = {c.knob: c.setting(states[phase][c.knob], step % share) for c in recipe.controllers}
        batch = kept(recipe, draw(step))
        if len(batch):
            players: Mapping[str, TabularPolicy] = {"old": policy, **({"reference": reference} if reference else {})}
            batch = annotate(batch, recipe.needs, players, WHOLE)
            learners[phase].update(batch, with_settings(recipe.objective, settings))
        for c in recipe.controllers:
            metrics = {"reward": float(batch["reward"].nanmean())}
            states[phase][c.knob] = c.observe(states[phase][c.knob], metrics)
        watch(step + 1)


def kept(recipe: Recipe, batch: Episodes) -> Episodes:
    """The groups that the recipe uses."""
    return batch.select(recipe.rollouts.keep(batch), "group")


def copy_of(policy: TabularPolicy) -> TabularPolicy:
    return TabularPolicy(policy.logits, policy.value)


def near_uniform(task: TabularTask, seed: int, spread: float = 0.5) -> TabularPolicy:
    """A policy with normal logits of standard deviation `spread`, a function of the seed alone."""
    random = TabularPolicy.random(task.prompts, task.length, task.vocabulary, seed)
    return TabularPolicy(spread * random.logits)


def fresh(task: TabularTask, policy: TabularPolicy, group: int, seed: int, sync_every: int = 1) -> Draw:
    """`group` rollouts per prompt each step, from a copy of the policy that is renewed every `sync_every` steps."""
    behaviour = [copy_of(policy)]

    def draw(step: int) -> Episodes:
        if step % sync_every == 0:
            behaviour[0] = copy_of(policy)
        return task.sample(behaviour[0], group, key(seed, "rollouts", step))

    return draw


def key(*parts: int | str) -> int:
    """A seed for torch that is a function of `parts`."""
    return int(keyed_generator(*parts).integers(2**62))


def success(task: TabularTask, policy: TabularPolicy) -> float:
    """Exact mean over prompts of the probability of a right answer."""
    with torch.no_grad():
        return float(task.success(policy).mean())


def entropy(task: TabularTask, policy: TabularPolicy) -> float:
    """Exact entropy of whole answers, in nats, mean over prompts."""
    with torch.no_grad():
        logp = task.log_probability(policy)
        return float(-(logp.exp() * logp).sum(1).mean())


def divergence(task: TabularTask, policy: TabularPolicy, other: torch.Tensor) -> float:
    """Exact KL(policy || other) in nats, mean over prompts; `other` [P, S] log-probabilities of all answers."""
    with torch.no_grad():
        logp = task.log_probability(policy)
        return float((logp.exp() * (logp - other)).sum(1).mean())
