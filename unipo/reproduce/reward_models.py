"""Density ratios of checkpoints as rewards: how well they order answers as the gap grows, and what they annotate."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from scipy.stats import spearmanr
from torch import Tensor

from unipo.methods.policy_gradients import rloo
from unipo.methods.reward_models import METHODS, dr_sow
from unipo.reproduce.claim import Claim, Expectation
from unipo.reproduce.network import NetworkPolicy
from unipo.reproduce.training import success, train
from unipo.sources.keyed import keyed_generator
from unipo.sources.text.tabular import tabular_rollouts
from unipo.tasks.tabular import TabularTask

STATEMENTS = {method.slug: method.claim for method in METHODS}
PROMPTS, WORDS, LONGEST, END = 3, 5, 4, 4
RUNGS = (0.0, 1 / 60, 0.05, 0.15, 0.4, 1.0)
"""Checkpoints, by the share of the run's steps: each about three times as far as the one before."""
RATE, BETA = 0.006, 0.3
"""Of the run that makes the ladder: its learning rate and the weight of its KL to the start."""


def words(seed: int) -> TabularTask:
    """Answers of up to four words; each word at each place is worth something, the end nothing, more words nothing as such."""
    worth = torch.from_numpy(keyed_generator(seed, "worth").normal(size=(PROMPTS, LONGEST, WORDS)))
    worth[:, :, END] = 0.0
    return TabularTask(
        PROMPTS, WORDS, LONGEST, lambda p, tokens: float(sum(worth[p, i, t] for i, t in enumerate(tokens))), END
    )


@dataclass(frozen=True, eq=False)
class Ladder:
    """Checkpoints of one run of RL with a KL penalty: `policies` from its start on, log-probabilities `logp` [R, P, S]."""

    task: TabularTask
    policies: tuple[NetworkPolicy, ...]
    logp: Tensor

    @cached_property
    def rewards(self) -> list[float]:
        """The true reward of each rung, exactly."""
        return [success(self.task, policy) for policy in self.policies]

    def said(self, annotator: str, strong: int, weak: int) -> Tensor:
        """What an annotator made of two rungs says of every answer [P, S]."""
        ratio = self.logp[strong] - self.logp[weak]
        lengths = torch.tensor([len(s) for s in self.task.sequences])
        return {
            "sum": ratio,
            "average": ratio / lengths,
            "strong alone": self.logp[strong],
            "true reward": self.task.rewards,
        }[annotator]

    def accuracy(self, score: Tensor) -> float:
        """P( the answer of higher score has the higher true reward ), of two different answers of the start; ties half."""
        signed = self._signed
        told = (score[:, :, None] - score[:, None, :]).sign().float()
        return float((signed * told).sum() / signed.abs().sum() + 1.0) / 2.0

    @cached_property
    def _signed(self) -> Tensor:
        """[P, S, S]: the probability of two answers of the start, with the sign of their difference in true reward."""
        chance, true = self.logp[0].exp(), self.task.rewards
        return (chance[:, :, None] * chance[:, None, :] * (true[:, :, None] - true[:, None, :]).sign()).float()


@lru_cache(maxsize=64)
def ladder(seed: int, steps: int) -> Ladder:
    """Checkpoints over `steps` steps of RLOO."""
    task = words(seed)
    policy = NetworkPolicy(task, seed)
    recipe, found = rloo(group=2, kl=BETA), [copy.deepcopy(policy)]
    rollouts = tabular_rollouts(task, policy, recipe.rollouts, seed)
    kept = [max(i, round(share * steps)) for i, share in enumerate(RUNGS)]

    def keep(step: int) -> None:
        if step in kept:
            found.append(copy.deepcopy(policy))

    train((recipe,), policy, lambda step: rollouts.draw(step, step), steps=kept[-1], rate=RATE,
          reference=copy.deepcopy(policy), watch=keep)  # fmt: skip
    with torch.no_grad():
        return Ladder(task, tuple(found), torch.stack([task.log_probability(p) for p in found]))


@lru_cache(maxsize=256)
def correlation(steps: Ladder, annotator: str) -> float:
    """Spearman's rank correlation, over all pairs of rungs, of the gap in true reward with the accuracy of their ratio."""
    if annotator == "true reward":
        return 1.0
    rungs = [(i, j) for j in range(len(RUNGS)) for i in range(j)]
    gap = [steps.rewards[j] - steps.rewards[i] for i, j in rungs]
    found = [steps.accuracy(steps.said(annotator, j, i)) for i, j in rungs]
    return float(spearmanr(gap, found).statistic)


def annotated(made: Ladder, annotator: str, rate: float, seed: int, steps: int) -> float:
    """True reward gained by the start of the ladder from what the last rung over the first annotates of its own answers."""
    score = made.said(annotator, -1, 0)
    place = {tokens: i for i, tokens in enumerate(made.task.sequences)}
    task = TabularTask(PROMPTS, WORDS, LONGEST, lambda p, tokens: float(score[p, place[tokens]]), END)
    policy, recipe = copy.deepcopy(made.policies[0]), dr_sow(group=8)
    rollouts = tabular_rollouts(task, policy, recipe.rollouts, seed)
    train((recipe,), policy, lambda step: rollouts.draw(step, step), steps=steps, rate=rate)
    return success(made.task, policy) - made.rewards[0]


def trial(annotator: str, rate: float, seed: int, steps: int) -> Mapping[str, float]:
    made = ladder(seed, 2 * steps)
    best = made.rewards[-1] - made.rewards[0]
    return {
        "rank correlation": correlation(made, annotator),
        "accuracy": made.accuracy(made.said(annotator, -1, 0)),
        "accuracy, one rung": made.accuracy(made.said(annotator, 1, 0)),
        "reward gained": annotated(made, annotator, rate, seed, steps),
        "gained by the strong": best,
    }


DR_SOW = Claim(
    slug="cdr-dr-sow",
    statement=STATEMENTS["cdr-dr-sow"],
    arms={name: name for name in ("sum", "average", "strong alone", "true reward")},
    trial=trial,
    steps=60,
    tune="reward gained",
    grid=(0.005, 0.02),
    expectations=(
        Expectation(arm="sum", metric="rank correlation", least=0.8),
        Expectation(arm="sum", metric="accuracy", than="strong alone", least=0.0),
        Expectation(arm="sum", metric="reward gained", least=0.0),
        Expectation(arm="sum", metric="reward gained", than="strong alone", least=0.0),
    ),
    note="Answers of up to four words to three prompts, whose words are worth something at each place; a small network. The "
    "ladder: six checkpoints of 120 steps of RLOO with KL 0.3 to its start and two answers a prompt, each about three times as "
    "far as the one before. Accuracy is exact, over pairs of answers of the start; its rank correlation with the gap in true "
    "reward is over the 15 pairs of rungs. Then the start is trained for 60 steps of SimPO on the best and the worst of 8 own "
    "answers by the last rung over the first: the sum, the average over tokens (what the released scorer returns), the strong "
    "model's log-probability alone, and the true reward itself. Ladder and rates were chosen on seeds from 1000 on. Small models "
    "trained from scratch in place of released pairs of language models; no criterion in the context. "
    "Seen: the strong model's log-probability alone also orders answers better the further it was trained, but less well than "
    "the ratio; the average over tokens orders answers worse than the sum and teaches as much.",
)
CLAIMS = (DR_SOW,)
