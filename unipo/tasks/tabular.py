"""A language task small enough to enumerate: exact distributions, success rates and gradients, for tests of everything else.

task = TabularTask(prompts=2, vocabulary=3, length=3, reward=lambda prompt, tokens: float(sum(tokens) % 2 == prompt))
policy = TabularPolicy.random(2, 3, 3)
task.success(policy)          # exact expected reward per prompt [P], differentiable
task.gradient(policy)         # exact policy gradient, shaped like policy.logits
task.sample(policy, 8, seed)  # Episodes: 2 groups of 8, with reward and behavior_logp
task.episodes()               # Episodes: every sequence of every prompt
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from unipo.episodes import Episodes
from unipo.policies.tabular import TabularPolicy

LARGEST = 8**6
"""Sequences that are enumerated at most."""


@dataclass(frozen=True)
class TabularTask:
    """`reward(prompt, tokens)` of token sequences over range(vocabulary), for prompts in range(prompts).

    A sequence has `length` tokens, or fewer when it ends with the token `end` (None: no token ends it). Shapes below:
    P prompts, S sequences, L length.
    """

    prompts: int
    vocabulary: int
    length: int
    reward: Callable[[int, tuple[int, ...]], float]
    end: int | None = None

    def __post_init__(self) -> None:
        if self.vocabulary**self.length > LARGEST:
            raise ValueError(
                f"{self.vocabulary}^{self.length} sequences cannot be enumerated: at most {LARGEST:,}, that is a vocabulary of "
                "8 and a length of 6"
            )

    @cached_property
    def sequences(self) -> list[tuple[int, ...]]:
        """[S] all sequences, each once."""
        return list(self._behind(()))

    def _behind(self, prefix: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
        """All sequences that go on behind a prefix, in lexicographic order."""
        for token in range(self.vocabulary):
            tokens = (*prefix, token)
            if token == self.end or len(tokens) == self.length:
                yield tokens
            else:
                yield from self._behind(tokens)

    @cached_property
    def rewards(self) -> Tensor:
        """[P, S] float64: the reward of every sequence for every prompt."""
        table = [[self.reward(prompt, tokens) for tokens in self.sequences] for prompt in range(self.prompts)]
        return torch.tensor(table, dtype=torch.float64)

    def log_probability(self, policy: TabularPolicy) -> Tensor:
        """[P, S] log pi(sequence | prompt), differentiable; each row's probabilities sum to 1."""
        tokens_SL, live_SL = self._padded
        start_S1 = torch.full_like(tokens_SL[:, :1], self.vocabulary)
        previous_SL = torch.cat([start_S1, tokens_SL[:, :-1]], 1)
        position_SL = torch.arange(self.length).expand_as(tokens_SL)
        logp_PSL = policy.logits.log_softmax(-1)[:, position_SL, previous_SL, tokens_SL]
        return torch.where(live_SL, logp_PSL, 0.0).sum(-1)

    def success(self, policy: TabularPolicy) -> Tensor:
        """[P] expected reward: sum over sequences of pi(sequence | prompt) * reward. Differentiable."""
        probability_PS = self.log_probability(policy).exp()
        return (probability_PS * self.rewards.to(probability_PS.dtype)).sum(1)

    def gradient(self, policy: TabularPolicy) -> Tensor:
        """[P, L, V + 1, V] the exact gradient of the expected reward, averaged over prompts, with respect to the logits."""
        return torch.autograd.grad(self.success(policy).mean(), policy.logits)[0]

    def episodes(self) -> Episodes:
        """Every sequence of every prompt, a group per prompt, with `reward` and `prompt_id`."""
        every = torch.arange(len(self.sequences)).repeat(self.prompts, 1)
        return self._episodes(every)

    def sample(self, policy: TabularPolicy, n: int, seed: int) -> Episodes:
        """`n` independent draws per prompt from the policy's exact distribution, as `episodes`, with `behavior_logp`."""
        with torch.no_grad():
            probability_PS = self.log_probability(policy).exp()
            generator = torch.Generator().manual_seed(seed)
            drawn = self._episodes(torch.multinomial(probability_PS, n, replacement=True, generator=generator))
            return drawn.with_columns("step", behavior_logp=policy.signals(drawn, ["logp"])["logp"])

    def _episodes(self, chosen: Tensor) -> Episodes:
        """Episodes of the sequences `chosen` [P, n], a group per prompt."""
        prompt = torch.arange(self.prompts).repeat_interleave(chosen.shape[1])
        tokens = [self.sequences[i] for i in chosen.flatten().tolist()]
        made = Episodes.build(tokens, prompt[:, None].tolist(), group=prompt.tolist(), prompt_id=prompt.tolist())
        reward = self.rewards.gather(1, chosen).flatten()
        return made.with_columns(
            "episode", reward=reward, kind="rollout", truncated=torch.zeros(len(made), dtype=torch.bool)
        )

    @cached_property
    def _padded(self) -> tuple[Tensor, Tensor]:
        """Tokens [S, L] filled up with 0, and where they are real [S, L]."""
        tokens = torch.tensor([s + (0,) * (self.length - len(s)) for s in self.sequences])
        lengths = torch.tensor([len(s) for s in self.sequences])
        return tokens, torch.arange(self.length) < lengths[:, None]
