"""The best of n of a finished run's answers: a reward picks, the task's own judges, and the distance is bounded."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from unipo.rewards import RewardSet, resolve_reward, split_rewards
from unipo.sources.prompts import Prompt
from unipo.sources.text.rollouts import Reward
from unipo.sources.text.sampler import Sampler
from unipo.statistics import mean_interval
from unipo.tabular.best_of import expected_best, most_kl
from unipo.training.config import ConfigError, RunConfig
from unipo.training.evaluate import sampled, valued
from unipo.training.problems import Problems


@dataclass(frozen=True)
class BestOf:
    """What the best of n of P prompts' N answers is worth: `gold` and `proxy` [P, N], by the judge and by who picks."""

    gold: Tensor
    proxy: Tensor

    @property
    def sizes(self) -> list[int]:
        """1, 2, 4, ... and N."""
        most = self.gold.shape[1]
        return sorted({*(2**i for i in range(most.bit_length()) if 2**i <= most), most})

    def rows(self) -> list[dict[str, float]]:
        """For each n: the gold and the proxy of the best of n (unbiased; interval: Student's t over prompts), `oracle`,
        its gold where the judge itself picks, and `kl`, the most that picking can move the policy, in nats."""
        found = []
        for n in self.sizes:
            gold, low, high = mean_interval(expected_best(self.proxy, self.gold, n).tolist())
            found.append({"n": float(n), "kl": most_kl(n), "gold": gold, "gold_low": low, "gold_high": high,
                          "proxy": float(expected_best(self.proxy, self.proxy, n).mean()),
                          "oracle": float(expected_best(self.gold, self.gold, n).mean())})  # fmt: skip
        return found

    def metrics(self) -> dict[str, Any]:
        prompts, samples = self.gold.shape
        return {"prompts": prompts, "samples": samples, "best_of": self.rows()}


def picker(config: RunConfig, problems: Problems, reward: str) -> RewardSet:
    """Who picks: `reward` as for --reward, or what the run was trained with. Raises ConfigError, RewardError."""
    if reward:
        picked = tuple(resolve_reward(text) for text in split_rewards(reward))
        return dataclasses.replace(problems.reward, functions=picked)
    if problems.reward == problems.gold:
        raise ConfigError(
            'who picks the best of n? The run was trained with the reward that judges: give another, --reward "model(FOLDER)"'
        )
    return problems.reward


def best_of(prompts: Sequence[Prompt], sampler: Sampler, tokenizer: Any, gold: Reward, picks: Reward, seed: int, n: int
            ) -> BestOf:  # fmt: skip
    """n answers to each prompt, judged by `gold` and by who picks; an answer without a reward is worth 0."""
    if n < 2:
        raise ConfigError(f"--best-of is {n}: expected at least 2 answers to pick from")
    values: tuple[list[float], list[float]] = ([], [])
    for part, texts in sampled(prompts, sampler, tokenizer, seed, n):
        for found, judge in zip(values, (gold, picks), strict=True):
            found += valued(judge, part, texts)
    judged, picked = (torch.tensor(v, dtype=torch.float64).reshape(-1, n) for v in values)
    return BestOf(judged, picked)
