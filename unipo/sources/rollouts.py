"""Fresh rollouts: prompts -> groups of completions of the current policy, rewarded, filtered and labelled."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from unipo.episodes import Episodes
from unipo.sources.encode import encode_completion, encode_prompt
from unipo.sources.prompts import Curriculum, Prompt, Prompts
from unipo.sources.sampler import Completion, Sampler
from unipo.sources.spec import RolloutSpec

Reward = Callable[[Sequence[Any], Sequence[str], Mapping[str, Sequence[Any]]], "Scored"]


@dataclass(frozen=True)
class Scored:
    """Rewards [n] of completions; `kept` [n] False where the row is dropped; `parts`: each reward function's own [n]."""

    reward: torch.Tensor
    kept: torch.Tensor
    parts: Mapping[str, torch.Tensor] = field(default_factory=dict)


@dataclass
class Rollouts:
    """Samples `prompts_per_step` groups a step, keyed by (seed, step, prompt, sample)."""

    prompts: Prompts | Curriculum
    sampler: Sampler
    tokenizer: Any
    reward: Reward
    spec: RolloutSpec
    prompts_per_step: int
    seed: int
    position: int = 0
    tokens_sampled: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    metrics: dict[str, float] = field(default_factory=dict)

    def draw(self, step: int, version: int) -> Episodes:
        """One batch of groups that the recipe's filter keeps; `dropped` counts the others by reason.

        The filter judges the task's rewards, before any relabelling (DAPO's length penalty must not make a group of wrong
        answers look mixed). Where it drops groups, up to `spec.refill` further rounds are sampled; if nothing at all was
        kept the last round is returned unfiltered, so that a step never has an empty batch.
        """
        kept: list[Episodes] = []
        self._seen: list[tuple[float, int, bool]] = []
        for _ in range(1 + self.spec.refill):
            wanted = self.prompts_per_step - sum(e.count("group") for e in kept)
            prompts = self._next(wanted, step)
            fresh = self._sampled(prompts, step, version)
            keep = self.spec.keep(fresh)
            self.dropped[self.spec.keep.reason] += int((~keep).sum())
            if bool(keep.any()):
                kept.append(self._labelled(fresh.select(keep, "group"), prompts))
            if sum(e.count("group") for e in kept) >= self.prompts_per_step:
                break
        self._measure()
        return Episodes.cat(kept) if kept else self._labelled(fresh, prompts)

    def _measure(self) -> None:
        """Means over everything that was sampled in this step, before any filter or relabelling."""
        n = max(len(self._seen), 1)
        reward, length, truncated = (sum(float(row[i]) for row in self._seen) / n for i in range(3))
        self.metrics = {
            "reward": reward,
            "length": length,
            "truncated_share": truncated,
            "rollouts": float(len(self._seen)),
        }

    def _next(self, n: int, step: int) -> list[Prompt]:
        prompts = self.prompts.at(step) if isinstance(self.prompts, Curriculum) else self.prompts
        chosen = [prompts[self.position + i] for i in range(n)]
        self.position += n
        return chosen

    def _sampled(self, prompts: list[Prompt], step: int, version: int) -> Episodes:
        n = self.spec.group
        tokens = [encode_prompt(self.tokenizer, p.text) for p in prompts]
        keys = torch.tensor([[self.seed, step, p.id, i] for p in prompts for i in range(n)], dtype=torch.long)
        repeated = [t for t in tokens for _ in range(n)]
        completions = self.sampler.sample(repeated, keys)
        self.tokens_sampled += sum(len(c.tokens) for c in completions)
        scored = self._scored([p for p in prompts for _ in range(n)], completions)
        facts = zip(scored.reward.tolist(), scored.kept.tolist(), completions, strict=True)
        self._seen += [(r, len(c.tokens), c.truncated) for r, kept, c in facts if kept]
        self.dropped["no reward"] += int((~scored.kept).sum())
        made = rollout_episodes(repeated, completions, [p.id for p in prompts for _ in range(n)], scored, version)
        return made.select(scored.kept)

    def _labelled(self, made: Episodes, prompts: list[Prompt]) -> Episodes:
        for relabel in self.spec.relabel:
            made = relabel(made, self.sampler.settings.max_tokens)
        return self._with_demonstrations(made, prompts) if self.spec.demonstration else made

    def _scored(self, prompts: list[Prompt], completions: Sequence[Completion]) -> Scored:
        texts = [self.tokenizer.decode(list(c.tokens), skip_special_tokens=True) for c in completions]
        names = dict.fromkeys(name for p in prompts for name in p.columns)
        columns = {name: [p.columns.get(name) for p in prompts] for name in names}
        return self.reward([p.text for p in prompts], texts, columns)

    def _with_demonstrations(self, made: Episodes, prompts: list[Prompt]) -> Episodes:
        """Each prompt's demonstration joins its group as one more episode of kind "demo"."""
        known = {p.id: p for p in prompts}
        groups = []
        for g in range(made.count("group")):
            group = made.select(torch.tensor([g]), "group")
            prompt = known[int(group["prompt_id"][0])]
            if prompt.demonstration is None:
                raise ValueError(
                    f"this method puts a demonstration into each group, but prompt {prompt.id} has none: give a dataset "
                    "with a 'completion' (or 'demonstration') column beside 'prompt' and 'answer', or another method"
                )
            actions = encode_completion(self.tokenizer, prompt.demonstration)
            demo = Episodes.build(
                [actions], [encode_prompt(self.tokenizer, prompt.text)], kind=["demo"], prompt_id=[prompt.id],
                policy_version=[-1], truncated=[False],
            )  # fmt: skip
            groups.append(Episodes.cat([group, demo]).as_one_group())
        return Episodes.cat(groups)

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position, "tokens_sampled": self.tokens_sampled, "dropped": dict(self.dropped)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.position, self.tokens_sampled = int(state["position"]), int(state["tokens_sampled"])
        self.dropped = Counter(state["dropped"])


def rollout_episodes(
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Completion],
    prompt_ids: Sequence[int],
    scored: Scored,
    version: int,
) -> Episodes:
    """Episodes of kind "rollout" from completions; equal neighbouring prompt ids form a group."""
    group = torch.unique_consecutive(torch.tensor(prompt_ids), return_inverse=True)[1]
    made = Episodes.build(
        [c.tokens for c in completions], prompts, group.tolist(),
        behavior_logp=[c.logp for c in completions],
        kind=["rollout"] * len(completions),
        truncated=[c.truncated for c in completions],
        prompt_id=list(prompt_ids),
        policy_version=[version] * len(completions),
    )  # fmt: skip
    parts = {f"reward.{name}": value for name, value in scored.parts.items()}
    return made.with_columns("episode", reward=scored.reward, **parts)
