"""Held-out evaluation: pass@1 and pass@k with intervals."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from unipo.sources.prompts import Prompt
from unipo.sources.text.encode import encode_prompt
from unipo.sources.text.rollouts import Reward
from unipo.sources.text.sampler import Sampler
from unipo.statistics import mean_interval, pass_at_k, wilson_interval

EVALUATION = 1 << 40
"""Takes the place of the step in the sampling key, so that every evaluation of a run draws the same numbers."""
SUCCESS = 1.0 - 1e-6


@dataclass(frozen=True)
class Evaluation:
    """Accuracy over held-out prompts (share of completions with reward 1), its 95 % interval, mean reward, samples."""

    accuracy: float
    low: float
    high: float
    reward: float
    prompts: int
    samples: int
    pass_k: dict[int, float]
    examples: list[dict[str, Any]]

    def metrics(self) -> dict[str, float]:
        found = {
            "accuracy": self.accuracy,
            "accuracy_low": self.low,
            "accuracy_high": self.high,
            "eval_reward": self.reward,
        }
        return found | {f"pass_at_{k}": v for k, v in self.pass_k.items()}


def evaluate(prompts: Sequence[Prompt], sampler: Sampler, tokenizer: Any, reward: Reward, seed: int, samples: int = 1,
             batch: int = 256) -> Evaluation:  # fmt: skip
    """Sample every prompt `samples` times and score. The interval is Wilson's for one sample a prompt, else Student's t over
    the prompts' own success rates. A row that a reward drops counts as a failure here."""
    right: list[float] = []
    rewards: list[float] = []
    examples: list[dict[str, Any]] = []
    for part, texts in sampled(prompts, sampler, tokenizer, seed, samples, batch):
        values = valued(reward, part, texts)
        right += [float(v >= SUCCESS) for v in values]
        rewards += values
        if len(examples) < 8:
            examples += [
                {"prompt": p.text, "completion": t, "reward": v} for p, t, v in zip(part, texts, values, strict=True)
            ]
    return _summary(right, rewards, samples, examples[:8])


def sampled(prompts: Sequence[Prompt], sampler: Sampler, tokenizer: Any, seed: int, samples: int, batch: int = 256
            ) -> Iterator[tuple[list[Prompt], list[str]]]:  # fmt: skip
    """(prompts, answers) of equal length, batch by batch: each prompt `samples` times in a row. The same draws every time."""
    for start in range(0, len(prompts), max(1, batch // samples)):
        part = [p for p in prompts[start : start + max(1, batch // samples)] for _ in range(samples)]
        keys = torch.tensor([[seed, EVALUATION, p.id, i % samples] for i, p in enumerate(part)])
        done = sampler.sample([encode_prompt(tokenizer, p.text) for p in part], keys)
        yield part, [tokenizer.decode(list(c.tokens), skip_special_tokens=True) for c in done]


def valued(reward: Reward, prompts: Sequence[Prompt], texts: Sequence[str]) -> list[float]:
    """What a reward says of answers to prompts; 0 for a row that it drops."""
    names = dict.fromkeys(n for p in prompts for n in p.columns)
    scored = reward([p.text for p in prompts], texts, {n: [p.columns.get(n) for p in prompts] for n in names})
    found: list[float] = torch.where(scored.kept, scored.reward, torch.zeros_like(scored.reward)).tolist()
    return found


def _summary(right: list[float], rewards: list[float], samples: int, examples: list[dict[str, Any]]) -> Evaluation:
    n = len(right) // samples
    if not n:
        nan = float("nan")
        return Evaluation(nan, nan, nan, nan, 0, samples, {}, [])
    table = torch.tensor(right).reshape(n, samples)
    if samples == 1:
        low, high = wilson_interval(int(table.sum()), n)
    else:
        _, low, high = mean_interval(table.mean(1).tolist())
    ks = [k for k in (2, 4, 8, 16, 32, 64) if k <= samples]
    passed = {k: sum(pass_at_k(samples, int(c), k) for c in table.sum(1)) / n for k in ks}
    return Evaluation(float(table.mean()), low, high, sum(rewards) / len(rewards), n, samples, passed, examples)
