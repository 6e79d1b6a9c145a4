"""Training a table of logits with a real recipe, where every success rate is exact. Sources are functions of a step."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch

from unipo import functional as F
from unipo.episodes import Episodes
from unipo.functional.quantities import parametric
from unipo.learner import Learner, LearnerSettings, Update, annotate, summary
from unipo.objectives import number, with_settings
from unipo.policies.tabular import TabularPolicy
from unipo.recipe import Recipe
from unipo.reproduce.claim import Phases
from unipo.sources.keyed import keyed_generator
from unipo.sources.replay import Replay
from unipo.sources.spec import RolloutSpec
from unipo.sources.text.rollouts import Rollouts
from unipo.tasks.tabular import TabularTask
from unipo.training.loop import renew
from unipo.training.text import replayed_groups

Draw = Callable[[int], Episodes]
"""step -> the batch of that step."""
Watch = Callable[[int], None]
"""Called after each step, 1-based."""
Told = Callable[[Update], None]
"""Called after each update."""

WHOLE = 1 << 30


@dataclass
class FreshAndReplayed:
    """A `Draw`: fresh groups of all prompts, and beside them the share of replayed ones that the recipe asks for."""

    rollouts: Rollouts
    seed: int

    def __post_init__(self) -> None:
        spec, prompts = self.rollouts.spec, self.rollouts.prompts_per_step
        self.replay = Replay(replayed_groups(spec, prompts), self.seed, spec.replay_steps * prompts)

    def meet(self, players: Mapping[str, TabularPolicy]) -> None:
        """The policies that stages may sample, by name."""
        self.rollouts.players = {name: replace(self.rollouts.sampler, policy=p) for name, p in players.items()}  # type: ignore[type-var]

    def turn(self, spec: RolloutSpec) -> None:
        self.rollouts.spec = spec
        self.replay.groups_per_step = replayed_groups(spec, self.rollouts.prompts_per_step)

    def __call__(self, step: int) -> Episodes:
        new, old = self.rollouts.draw(step, step), self.replay.draw(step, step)
        self.replay.add(new)
        return new if old is None or not len(old) else Episodes.cat([new, old])


def learner_of(policy: TabularPolicy, rate: float, parts: int = 0) -> Learner:
    return Learner({"policy": policy}, LearnerSettings(learning_rate=rate, token_budget=WHOLE), gradient_parts=parts)


def train(phases: Phases, policy: TabularPolicy, draw: Draw, *, steps: int, rate: float,
          reference: TabularPolicy | None = None, watch: Watch = lambda step: None,
          told: Told = lambda update: None) -> None:  # fmt: skip
    """`steps` steps in all, each an update per epoch of the recipe; each phase starts with a fresh optimiser.

    `reference` fills `reference_*` columns; the recipe's snapshots start as copies of the policy (of `reference`, if it is
    one of them). Companions are built by `build`, as in a run. The batch is what `draw` gives, or a `Rollouts`' draw; `told`
    is called after each update.
    """
    share = -(-steps // len(phases))
    for phase, recipe in enumerate(phases):
        first, last = phase * share, min(steps, (phase + 1) * share)
        trained = _Phase(recipe, policy, rate, last - first, reference, told)
        for step in range(first, last):
            trained.step(step - first, draw, step)
            watch(step + 1)


class _Phase:
    """One recipe on the policy, as the loop of a run would train it."""

    def __init__(self, recipe: Recipe, policy: TabularPolicy, rate: float, steps: int,
                 reference: TabularPolicy | None, told: Told) -> None:  # fmt: skip
        self.recipe = recipe.but(controllers=tuple(c.lasting(steps) for c in recipe.controllers))
        policy.parametric = policy.parametric | parametric(recipe.needs.signals)
        self.policy, self.learner, self.told = policy, learner_of(policy, rate, recipe.gradient_parts), told
        self.states = {c.knob: c.start() for c in self.recipe.controllers}
        self.players: dict[str, TabularPolicy] = {"old": policy, **({"reference": reference} if reference else {})}
        for name, snapshot in recipe.snapshots.items():
            if snapshot.moves or name not in self.players:
                self.players[name] = copy.deepcopy(self.players.get(name, policy))
        self.companions = [spec.build(policy, 0) for spec in recipe.companions]

    def step(self, step: int, draw: Draw, drawn: int) -> None:
        recipe, settings = self.recipe, {c.knob: c.setting(self.states[c.knob], step) for c in self.recipe.controllers}
        epochs, scale = with_settings((recipe.epochs, recipe.learning_rate), settings)
        if isinstance(draw, FreshAndReplayed):
            draw.turn(with_settings(recipe.rollouts, settings))
            draw.meet(self.players)
        self._renew(step, lag=0)
        batch, said = kept(recipe, draw(drawn)), dict[str, float]()
        if len(batch):
            for companion in self.companions:
                batch = companion.annotate(batch, step)
            batch = annotate(batch, recipe.needs, self.players, WHOLE)
            self._renew(step, lag=1)
            self.learner.rate_scale = number(scale)
            for _ in range(round(number(epochs))):
                update = self.learner.update(batch, recipe.objective, settings)
                self.told(update)
                said = summary(update) if recipe.controllers else {}
            for companion in self.companions:
                companion.learn(batch, step)
        for c in recipe.controllers:
            self.states[c.knob] = with_settings(c, settings).observe(self.states[c.knob], said | _metrics(batch))

    def _renew(self, step: int, lag: int) -> None:
        for name, snapshot in self.recipe.snapshots.items():
            if snapshot.lag == lag and snapshot.due(step):
                renew(self.players[name], self.policy, snapshot.tau, snapshot.beyond)


def _metrics(batch: Episodes) -> dict[str, float]:
    """What a run says of its rollouts."""
    if "reward" not in batch:
        return {}
    reward = batch["reward"][batch["reward"].isfinite()]
    count, mean, variance = F.moments_of(reward)
    parts = {
        n.replace(".", "/", 1): float(batch[n].nanmean()) for n in batch.columns if n.startswith(("reward.", "gold"))
    }
    return {"rollouts": count, "reward": mean, "reward_std": variance**0.5, **parts}


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
