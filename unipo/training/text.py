"""Text as the data of a run: prompts that are sampled, replayed groups, demonstrations and pairs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from unipo.episodes import Episodes
from unipo.learner import Update
from unipo.objectives import Needs, number
from unipo.policies import TokenPolicy
from unipo.sources.companions.companion import Companion
from unipo.sources.mixer import Mixer
from unipo.sources.replay import Replay
from unipo.sources.rows import Rows
from unipo.sources.spec import RolloutSpec
from unipo.sources.text.ahead import Ahead
from unipo.sources.text.rollouts import Rollouts
from unipo.training.config import RunConfig
from unipo.training.evaluate import Evaluation, evaluate


class Found(Protocol):
    """What was measured, and a few readable rows of it."""

    @property
    def examples(self) -> list[dict[str, Any]]: ...

    def metrics(self) -> dict[str, float]: ...


class HeldOut(Protocol):
    """What is kept apart, and measures a policy on it; nothing is measured where `prompts` are empty."""

    @property
    def prompts(self) -> Sequence[Any]: ...

    def __call__(self, policy: TokenPolicy) -> Found: ...


@dataclass
class Evaluator:
    """Held-out prompts with the sampler and reward that score them."""

    prompts: list[Any]
    sampler: Any
    reward: Any
    seed: int
    samples: int

    def __call__(self, policy: TokenPolicy) -> Evaluation:
        return evaluate(self.prompts, self.sampler, policy.tokenizer, self.reward, self.seed, self.samples)


@dataclass
class TextData:
    """One batch a step, mixed from sources; groups stay whole in minibatches."""

    config: RunConfig
    folder: Path
    policy: TokenPolicy
    mixer: Mixer
    rollouts: Rollouts | Ahead | None
    replay: Replay | None
    held_out: HeldOut
    companions: tuple[Companion, ...] = ()
    needs: Needs = Needs()
    unit: str = "group"

    def __post_init__(self) -> None:
        self._said: dict[str, float] = {}

    def turn(self, rollouts: RolloutSpec) -> None:
        if self.rollouts is not None:
            self.rollouts.spec = rollouts
        if self.replay is not None and not self.config.replay:
            self.replay.groups_per_step = replayed_groups(rollouts, self.config.prompts)

    def batches(self, step: int, version: int) -> Iterator[Episodes]:
        batch = self.mixer.draw(step, version)
        for companion in self.companions:
            batch = companion.annotate(batch, step)
        yield batch

    @property
    def batches_per_step(self) -> int:
        return 1

    def minibatches(self, batch: Episodes, asked: int) -> int:
        return asked

    def learned(self, batch: Episodes, step: int) -> None:
        """Fresh rollouts go to the replay, and to `episodes/`; companions learn from the batch."""
        for companion in self.companions:
            self._said |= companion.learn(batch, step - 1)
        if self.rollouts is None:
            return
        if self.rollouts.arms is not None:
            self.rollouts.arms.settle()
        fresh = batch.select(batch.category("source", "fresh"))
        self._said |= divergence_of(fresh)
        if self.replay is not None:
            self.replay.add(_logged(fresh))
        if self.config.save_episodes and len(fresh):
            _logged(fresh).save(self.folder / "episodes" / f"step_{step:06d}.parquet")

    def updated(self, update: Update) -> None:
        """Prompts that are drawn by what they teach are told."""
        if self.rollouts is not None and self.rollouts.arms is not None:
            self.rollouts.arms.observe(update.episodes, update.fact("advantage"))

    def metrics(self) -> dict[str, float]:
        if self.rollouts is None:
            return {**self._said, "tokens_sampled": 0.0}
        dropped = {f"dropped/{k}": float(v) for k, v in self.rollouts.dropped.items() if v}
        sampled = float(self.rollouts.tokens_sampled)
        return {**self._said, **self.rollouts.metrics, **dropped, "tokens_sampled": sampled}

    def samples(self, batch: Episodes, step: int, n: int = 4) -> Iterator[dict[str, Any]]:
        """The first rows of each source: prompt and completion text, reward, source, truncated."""
        source, context = batch.column("source"), batch.context("score")
        for name in source.names:
            for i in batch.category("source", name).nonzero().squeeze(1)[:n].tolist():
                steps, turn = batch.step_index(torch.tensor([i])), context.take(torch.tensor([i]))
                reward = float(batch["reward"][i]) if "reward" in batch else float("nan")
                yield {
                    "step": step,
                    "prompt": self.policy.tokenizer.decode(turn.values.tolist()),
                    "completion": self.policy.tokenizer.decode(batch["token"][steps].tolist()),
                    "reward": None if reward != reward else reward,
                    "source": name,
                    "truncated": bool(batch["truncated"][i]) if "truncated" in batch else False,
                }

    def evaluate(self, step: int) -> tuple[dict[str, float], list[dict[str, Any]]]:
        if not self.held_out.prompts:
            return {}, []
        found = self.held_out(self.policy)
        return found.metrics(), found.examples

    def state_dict(self) -> dict[str, Any]:
        return self.mixer.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.mixer.load_state_dict(state)

    def save(self, folder: Path) -> None:
        for source in (self.replay, self.rollouts, *self.companions):
            if source is not None:
                source.save(folder)

    def load(self, folder: Path) -> None:
        for source in (self.replay, self.rollouts, *self.companions):
            if source is not None:
                source.load(folder)

    def describe(self) -> Iterator[str]:
        if self.rollouts is not None:
            prompts, group = self.config.prompts, self.rollouts.spec.group
            early = f", sampled {self.config.ahead} steps ahead" if self.config.ahead else ""
            yield f"{prompts} prompts x {group} rollouts = {prompts * group} completions of the policy{early}"
        if self.replay is not None:
            yield f"{self.replay.groups_per_step} groups replayed"
        if self.config.demos:
            yield f"{self.config.demos_per_step} demonstrations"
        if self.config.pairs:
            yield f"{self.config.pairs_per_step} pairs"
        if self.config.labels:
            yield f"{self.config.labels_per_step} labelled answers"
        for source in self.mixer.sources.values():
            yield from source.notes if isinstance(source, Rows) else ()

    def close(self) -> None:
        if isinstance(self.rollouts, Ahead):
            self.rollouts.close()


def divergence_of(rollouts: Episodes) -> dict[str, float]:
    """`kl_answer`: log(pi / reference) of whole answers, in nats, mean over fresh rollouts; empty where it is not known."""
    if not len(rollouts) or not {"behavior_logp", "reference_logp"} <= set(rollouts.columns):
        return {}
    apart = rollouts.reduce(rollouts["behavior_logp"] - rollouts["reference_logp"])
    return {"kl_answer": float(apart.nanmean())}


def replayed_groups(rollouts: RolloutSpec, prompts: int) -> int:
    """How many replayed groups beside so many fresh ones make the share that a recipe asks for."""
    share = number(rollouts.replay)
    if not 0.0 <= share < 1.0:
        raise ValueError(f"the share of replayed groups is {share}: expected 0 or more, and below 1")
    return round(share / (1.0 - share) * prompts)


def _logged(episodes: Episodes) -> Episodes:
    """What is kept of fresh rollouts: facts, without the mix they were drawn into or numbers computed for one update."""
    derived = [
        n
        for n in episodes.columns
        if n.split("_")[0] in ("old", "reference", "teacher") and (n.endswith(("logp", "value")) or "_value." in n)
    ]
    return episodes.without("source", "sampling_weight", "draw", *derived)
