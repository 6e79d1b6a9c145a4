"""Enumerable tasks behind the same doors as models: a sampler, prompts and a reward, so that `Rollouts` draws from them.

rollouts = tabular_rollouts(task, policy, grpo().rollouts, seed=0)
batch = rollouts.draw(step=0, version=0)          # what a run on text would draw, augmented, filtered and labelled
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from unipo.policies.tabular import TabularPolicy
from unipo.sources.prompts import Prompt, Prompts
from unipo.sources.spec import RolloutSpec
from unipo.sources.text.drawing import mix, uniform
from unipo.sources.text.rollouts import Rollouts, Scored
from unipo.sources.text.sampler import Completion, SamplerSettings
from unipo.tasks.tabular import TabularTask


class NumberTokenizer:
    """Texts are numbers with spaces between them; no special tokens."""

    eos_token_id, eos_token = None, ""

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [int(word) for word in text.split()]}

    def decode(self, tokens: Sequence[int], skip_special_tokens: bool = True) -> str:
        return " ".join(map(str, tokens))


@dataclass
class TabularSampler:
    """Draws answers of `task` from `policy`, a function of (key, position) as with a model.

    A context is [prompt id, tokens written already, ...]; `sample` completes the answer behind it.
    """

    task: TabularTask
    policy: TabularPolicy
    settings: SamplerSettings = field(init=False)

    def __post_init__(self) -> None:
        self.settings = SamplerSettings(max_tokens=self.task.length)

    @torch.no_grad()
    def sample(
        self, prompts: Sequence[Sequence[int]], keys: Tensor, limits: Sequence[int] | None = None
    ) -> list[Completion]:
        """One completion per context, of at most `limits` [n] tokens; `keys` [n, k] int64.

        Truncated: cut before the task's own end.
        """
        logp = self.policy.logits.log_softmax(-1)
        written = torch.tensor([len(p) - 1 for p in prompts])
        previous = torch.tensor([p[-1] if len(p) > 1 else self.task.vocabulary for p in prompts])
        prompt, noise = torch.tensor([p[0] for p in prompts]), mix(keys)
        limit = torch.tensor([self.task.length] * len(prompts) if limits is None else limits)
        limit = torch.minimum(limit, self.task.length - written)
        made: list[list[tuple[int, float]]] = [[] for _ in prompts]
        live, position = torch.arange(len(prompts)), -1
        while len(live := live[limit[live] > (position := position + 1)]):
            rows = logp[prompt[live], written[live] + position, previous[live]]
            u = uniform(noise[live], position).to(rows.dtype)
            token = torch.searchsorted(rows.exp().cumsum(1), u[:, None])[:, 0].clamp(max=self.task.vocabulary - 1)
            previous[live] = token
            for i, t, x in zip(
                live.tolist(), token.tolist(), rows.gather(1, token[:, None])[:, 0].tolist(), strict=True
            ):
                made[i].append((t, x))
            live = live[token != self.task.end] if self.task.end is not None else live
        return [self._completion(len(p) - 1, steps) for p, steps in zip(prompts, made, strict=True)]

    def mixed(self, other: TabularSampler, share: float) -> TabularSampler:
        """Draws from the geometric mixture, token by token."""
        own, theirs = (s.policy.logits.detach().log_softmax(-1) for s in (self, other))
        return replace(self, policy=TabularPolicy((1.0 - share) * own + share * theirs))

    def _completion(self, written: int, steps: list[tuple[int, float]]) -> Completion:
        tokens = tuple(t for t, _ in steps)
        ended = written + len(tokens) == self.task.length or (
            self.task.end is not None and tokens[-1:] == (self.task.end,)
        )
        return Completion(tokens, tuple(x for _, x in steps), not ended, "eos" if ended else "length")


@dataclass(frozen=True)
class TabularPrompts:
    """The prompts of a task in turn: every pass over them has each once. `demonstrations`: an answer by prompt id."""

    task: TabularTask
    demonstrations: Mapping[int, Sequence[int]] = field(default_factory=dict)
    columns: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)

    def __getitem__(self, index: int) -> Prompt:
        own = index % self.task.prompts
        shown = self.demonstrations.get(own)
        text = " ".join(map(str, shown)) if shown is not None else None
        columns = {"prompt_id": own, **self.columns.get(own, {})}
        return Prompt(id=own, text=str(own), columns=columns, demonstration=text)


def tabular_rollouts(task: TabularTask, policy: TabularPolicy, spec: RolloutSpec, seed: int,
                     prompts: Prompts | None = None, prompts_per_step: int = 0,
                     parts: Mapping[str, Answered] | None = None) -> Rollouts:  # fmt: skip
    """What a run draws its rollouts with, over an enumerable task: by default every prompt once a step."""
    return Rollouts(prompts if prompts is not None else TabularPrompts(task), TabularSampler(task, policy),
                    NumberTokenizer(), tabular_reward(task, parts or {}), spec, prompts_per_step or task.prompts, seed,
                    policy=policy)  # fmt: skip


Answered = Callable[[int, tuple[int, ...]], float]
"""(prompt id, tokens) -> a reward."""


def tabular_reward(task: TabularTask, parts: Mapping[str, Answered] | None = None) -> Any:
    """The task's reward of answers written as numbers; the prompt's number is in the column `prompt_id`.

    `parts`: other rewards by name, as those of a run; the one called "gold" is measured alone.
    """
    others = dict(parts or {})
    gold = others.pop("gold", None)

    def score(prompts: Sequence[Any], completions: Sequence[str], columns: Mapping[str, Sequence[Any]]) -> Scored:
        rows = [
            (int(q), tuple(int(word) for word in text.split()))
            for q, text in zip(columns["prompt_id"], completions, strict=True)
        ]

        def values(reward: Answered) -> Tensor:
            return torch.tensor([reward(*row) for row in rows], dtype=torch.float64)

        return Scored(values(task.reward), torch.ones(len(rows), dtype=torch.bool),
                      {name: values(reward) for name, reward in others.items()},
                      None if gold is None else values(gold))  # fmt: skip

    return score
