"""Environments as the data of a run: a policy acts, what happened is trained on at once or remembered and drawn again."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from unipo.critics import Target
from unipo.critics.greedy import GreedyPolicy
from unipo.episodes import Episodes
from unipo.learner import Update
from unipo.objectives import Needs
from unipo.policies.acting import Acting
from unipo.policies.networks import Normaliser
from unipo.sources.acting.behaviour import Recent
from unipo.sources.acting.collector import Act, Collector
from unipo.sources.acting.remembering import Remembering
from unipo.sources.acting.segment_pairs import SegmentPairs
from unipo.sources.acting.transitions import TransitionReplay
from unipo.sources.spec import ControlSpec, EpsilonGreedy, RolloutSpec
from unipo.statistics import bootstrap_interval
from unipo.training.adapted import Adapted
from unipo.training.config import ControlConfig

WARM_UP = 512
"""Random steps that observation statistics start from."""
Evaluate = Callable[[int], Sequence[tuple[float, int]]]
"""(number of episodes) -> (return, length) of each, with the policy as it is now."""


@dataclass
class Best:
    """A copy of the policy that earned the best mean return of a batch so far."""

    module: nn.Module
    score: float = -math.inf

    def offer(self, policy: nn.Module, finished: Sequence[tuple[float, int]]) -> None:
        """`finished`: (return, length) of the episodes that ended while `policy` acted; none: nothing is known of it."""
        score = sum(r for r, _ in finished) / len(finished) if finished else -math.inf
        if score > self.score:
            self.score = score
            self.module.load_state_dict(policy.state_dict())


@dataclass
class EnvironmentData:
    """On-policy: a step is one rollout of every copy. Off-policy: it is as many transitions, with updates between them."""

    config: ControlConfig
    spec: ControlSpec
    policy: Any
    collector: Collector | None
    replay: TransitionReplay | SegmentPairs | None
    targets: tuple[Target, ...]
    normaliser: Normaliser | None
    run_episodes: Evaluate
    needs: Needs = Needs()
    unit: str = "step"
    recent: Recent = field(default_factory=Recent)
    behaviour: Adapted | None = None
    best: Best | None = None
    memory: Remembering | None = None
    _acting: Acting | None = field(default=None, repr=False)
    _begun: Callable[[], dict[str, Any]] | None = field(default=None, repr=False)

    # ---- batches -----------------------------------------------------------------------------------------------------
    def remember(self, recorded: Episodes) -> None:
        """Fill the replay with recorded episodes."""
        assert self.replay is not None
        self.replay.add(recorded)
        self._standardise(recorded["observation"])

    def _standardise(self, observations: Tensor) -> None:
        """Observation statistics, those of slow copies too, for good: where transitions are remembered they cannot move."""
        if self.normaliser is not None:
            self.normaliser.update(observations)
            for target in self.targets:
                replace(target, tau=1.0).move()

    def batches(self, step: int, version: int) -> Iterator[Episodes]:
        if self.collector is None:
            yield from self._drawn(step)
        elif self.replay is None:
            self._warm_up()
            yield self._fresh(self.collector, version)
        else:
            assert isinstance(self.replay, TransitionReplay), "pairs of segments are recorded, not collected"
            yield from self._remembered(self.collector, self.replay, step, version)

    def _fresh(self, collector: Collector, version: int) -> Episodes:
        """A rollout of whoever acts, and the batches before it that are remembered."""
        act = self.act
        if self.behaviour is not None:
            self.behaviour.begin(self.recent.batches, version)
            act = self.behaviour.act
        fresh = self._collected(collector, self.config.rollout, act, version)
        if self.best is not None:
            self.best.offer(self.policy, collector.finished)
        return self.recent.add(collector.environments.arranged(fresh, self.spec.gamma))

    @property
    def act(self) -> Act:
        """How the policy that is trained acts while data are collected."""
        if self.memory is not None:
            return self.memory
        acting = Acting.of(self.policy, self._acting)
        self._acting = acting or self._acting
        act: Act = acting or self.policy.act
        return act

    def another(self) -> Episodes:
        """One rollout more, of the policy as it is now."""
        assert self.collector is not None
        return self._collected(self.collector, self.config.rollout, self.act, 0)

    def _collected(self, collector: Collector, steps: int, act: Act, version: int) -> Episodes:
        """Where an environment fails, the state that is saved is that before the batch, of which nothing was trained on."""
        self._begun = self._standing(collector)
        before = None if self.memory is None else self.memory.before()
        fragments = collector.collect(steps, act, version)
        self._begun = None
        return fragments if before is None else Remembering.marked(fragments, before)

    def _drawn(self, step: int) -> Iterator[Episodes]:
        """Offline: as many batches as the step would have environment steps."""
        assert self.replay is not None
        yield from self.replay.samples(self.config.batch_size, step, self.batches_per_step)

    def _remembered(
        self, collector: Collector, replay: TransitionReplay, step: int, version: int
    ) -> Iterator[Episodes]:
        """A run whose environment failed goes on in the middle of the step."""
        while collector.steps < (step + 1) * self.config.rollout:
            started = collector.env_steps >= self.config.learning_starts
            replay.add_rows(collector.step(self._actor(collector, started), version))
            if started and collector.steps % self.config.train_every == 0:
                if self.normaliser is not None and float(self.normaliser.count) == 0:
                    self._standardise(replay.remembered("observation"))
                yield from replay.samples(self.config.batch_size, collector.steps, self.config.updates)

    def _actor(self, collector: Collector, started: bool) -> Act:
        if not started:
            return collector.random_act
        if isinstance(self.policy, GreedyPolicy) and isinstance(self.spec.explore, EpsilonGreedy):
            self.policy.epsilon = self.spec.explore.epsilon(collector.env_steps / self.config.total_timesteps)
        return self.act

    def _warm_up(self) -> None:
        """Observation statistics before the policy first acts: of a few random steps."""
        assert self.collector is not None
        if self.normaliser is not None and float(self.normaliser.count) == 0:
            steps = max(1, min(self.config.rollout, WARM_UP // self.config.num_envs))
            drawn = self._collected(self.collector, steps, self.collector.random_act, 0)
            self.normaliser.update(drawn["observation"])
            self.collector.take_finished()

    def turn(self, rollouts: RolloutSpec) -> None:
        return None

    @property
    def batches_per_step(self) -> int:
        if self.replay is None:
            return 1
        return self.config.rollout * self.config.updates // self.config.train_every

    def minibatches(self, batch: Episodes, asked: int) -> int:
        if self.replay is not None or not self.config.batch_size:
            return 1
        return -(-batch.count("step") // self.config.batch_size)

    def learned(self, batch: Episodes, step: int) -> None:
        """Observation statistics move between batches only: while one is trained on, signals stay what they were. Off-policy
        they are those of what was remembered before the first update."""
        if self.normaliser is not None and self.replay is None:
            newest = self.recent.newest if self.recent.batches else batch
            self.normaliser.update(newest["observation"])

    def updated(self, update: Update) -> None:
        if self.replay is not None and self.replay.prioritised is not None:
            errors = [t.facts["value_error"] for t in update.coefficients.terms if "value_error" in t.facts]
            self.replay.update_priorities(update.episodes["replay_index"], errors[0].sqrt())

    # ---- measuring ---------------------------------------------------------------------------------------------------
    def metrics(self) -> dict[str, float]:
        """`reward` and `length`: means over the episodes that ended in this step (raw rewards)."""
        if self.collector is None:
            return {}
        ended = self.collector.take_finished()
        found = {"env_steps": float(self.collector.env_steps), "episodes": float(len(ended))}
        if ended:
            found["reward"] = sum(r for r, _ in ended) / len(ended)
            found["length"] = sum(n for _, n in ended) / len(ended)
        return found

    def samples(self, batch: Episodes, step: int, n: int = 4) -> Iterator[dict[str, Any]]:
        """The first fragments: how long, what they paid, how they ended."""
        reward = batch.reduce("raw_reward" if "raw_reward" in batch else "reward")
        for i in range(min(n, len(batch))):
            ended = "terminated" if bool(batch["terminated"][i]) else "cut"
            yield {
                "step": step,
                "prompt": f"environment {int(batch['env'][i])}, episode {int(batch['episode_number'][i])}"
                if "env" in batch
                else "replayed",
                "completion": f"{int(batch.lengths()[i])} steps, {ended}",
                "reward": float(reward[i]),
                "source": "fresh" if self.replay is None else "replay",
                "truncated": not bool(batch["terminated"][i]),
            }

    def evaluate(self, step: int) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """Mean return of whole episodes with the policy's mode, its 95 % bootstrap interval over them, and each of them."""
        if not self.config.evaluations:
            return {}, []
        found = self.run_episodes(self.config.eval_episodes)
        mean, low, high = bootstrap_interval([r for r, _ in found], resamples=2000)
        length = sum(n for _, n in found) / len(found)
        measured = {"eval_return": mean, "eval_return_low": low, "eval_return_high": high, "eval_length": length}
        shown = [{"prompt": f"episode {i}", "completion": f"{n} steps", "reward": r} for i, (r, n) in enumerate(found)]
        return measured, shown

    # ---- saving ------------------------------------------------------------------------------------------------------
    def state_dict(self) -> dict[str, Any]:
        if self.collector is None:
            return {}
        best = {} if self.best is None else {"best": self.best.score}
        return {**(self._begun or self._standing(self.collector))(), **best}

    def _standing(self, collector: Collector) -> Callable[[], dict[str, Any]]:
        """Where the environments stand, and what is remembered of them."""
        memory = {} if self.memory is None else {"memory": self.memory.state_dict()}
        collected = collector.standing()
        return lambda: {"collector": collected(), **memory}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if self.collector is not None:
            self.collector.load_state_dict(state["collector"])
        if self.memory is not None:
            self.memory.load_state_dict(state["memory"])
        if self.best is not None:
            self.best.score = state["best"]

    def save(self, folder: Path) -> None:
        if self.replay is not None and self.collector is not None:
            self.replay.save(folder)
        if self._remembers:
            self.recent.save(folder)

    def load(self, folder: Path) -> None:
        if self.replay is not None and self.collector is not None:
            self.replay.load(folder)
        if self._remembers:
            self.recent.load(folder)

    @property
    def _remembers(self) -> bool:
        """Whether the batches of earlier steps matter to later ones."""
        return self.recent.size > 1 or self.behaviour is not None

    def describe(self) -> Iterator[str]:
        c = self.config
        if self.collector is None:
            of = "pairs of segments" if self.spec.compared else "recorded transitions"
            yield f"{self.batches_per_step} batches of {c.batch_size} {of}"
            return
        yield f"{c.rollout} steps of {c.num_envs} environment(s) = {c.rollout * c.num_envs} steps of the policy"
        if self.replay is not None:
            yield f"a batch of {c.batch_size} replayed transitions {c.updates} time(s) every {c.train_every} step(s)"
        else:
            whole = ", in whole stretches of episodes" if c.recurrent else ""
            yield f"minibatches of {c.batch_size or 'all'} steps{whole}"

    def close(self) -> None:
        if self.collector is not None:
            self.collector.environments.close()


class Joined:
    """Several players as one: what the annotator calls `old` when policy and critic are two networks."""

    def __init__(self, *players: Any) -> None:
        self.players = players
        self.emits: frozenset[str] = frozenset().union(*(p.emits for p in players))

    def signals(self, episodes: Episodes, names: Sequence[str]) -> dict[str, Tensor]:
        made: dict[str, Tensor] = {}
        for player in self.players:
            own = [n for n in names if n in player.emits]
            if own:
                made.update(player.signals(episodes, own))
        return made

    def total_lengths(self, episodes: Episodes) -> Tensor:
        return episodes.lengths()

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        return iter(())
