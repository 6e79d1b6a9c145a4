"""Two policies answer the same held-out prompts, and a judge says whose answers are better."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from unipo.policies import TokenPolicy
from unipo.sources.directions import Asking
from unipo.sources.prompts import Prompt
from unipo.sources.stages.augment import Drawn
from unipo.sources.stages.preferences import Answers, judge_of
from unipo.sources.text.encode import encode_prompt
from unipo.sources.text.rollouts import Reward
from unipo.sources.text.sampler import Sampler, SamplerSettings
from unipo.statistics import length_controlled, mean_interval
from unipo.training.config import ConfigError, RunConfig
from unipo.training.evaluate import EVALUATION
from unipo.training.problems import Problems, scorer

BATCH = 256


@dataclass(frozen=True)
class Versus:
    """What a judge says of n answers against n others to the same prompts: `wins` in [0, 1] and `longer`, by how many
    characters they are longer, [prompts, samples] each."""

    against: str
    judge: str
    wins: Tensor
    longer: Tensor
    examples: list[dict[str, Any]]

    def metrics(self) -> dict[str, Any]:
        """The win rate, ties half, with Student's t over prompts, and what it is at equal length (`length_controlled`)."""
        prompts, samples = self.wins.shape
        rate, low, high = mean_interval(self.wins.mean(1).tolist())
        group = [i for i in range(prompts) for _ in range(samples)]
        even = length_controlled(self.wins.flatten().tolist(), self.longer.flatten().tolist(), group)
        return {
            "against": self.against, "judge": self.judge, "prompts": prompts, "samples": samples,
            "win_rate": rate, "win_rate_low": max(low, 0.0), "win_rate_high": min(high, 1.0),
            "ties": float((self.wins == 0.5).double().mean()), "longer": float(self.longer.mean()),
            "length_controlled": even[0], "length_controlled_low": even[1], "length_controlled_high": even[2],
            "length_slope": even[3],
        }  # fmt: skip

    def __str__(self) -> str:
        m = self.metrics()
        span, even = (
            [m[f"{name}{side}"] for side in ("", "_low", "_high")] for name in ("win_rate", "length_controlled")
        )
        how = f"Student's t; {m['prompts']} prompts x {m['samples']}, judged by {self.judge}; {m['ties']:.0%} ties count half"
        more = f"{abs(m['longer']):.1f} characters {'longer' if m['longer'] >= 0 else 'shorter'}"
        return (
            f"win rate against {self.against} [bold]{span[0]:.1%}[/]  95 % interval {span[1]:.1%} to {span[2]:.1%} ({how})\n"
            f"at equal length [bold]{even[0]:.1%}[/]  95 % interval {even[1]:.1%} to {even[2]:.1%} "
            f"(logistic in the length; answers are {more} on average)"
        )


@dataclass
class _Texts:
    """Texts as what judges are shown: the tokens of a text are its number."""

    texts: Sequence[str]

    @property
    def tokenizer(self) -> _Texts:
        return self

    def decode(self, tokens: Sequence[int], skip_special_tokens: bool = True) -> str:
        return self.texts[tokens[0]]


def versus(config: RunConfig, problems: Problems, policy: TokenPolicy, other: TokenPolicy, against: str, samples: int,
           temperature: float, judge: str = "reward", ask: Asking | None = None, theirs: Asking | None = None
           ) -> Versus:  # fmt: skip
    """`policy` against `other` on the held-out prompts, `samples` answers of each, drawn apart.

    `judge`: "reward" (the higher reward wins, equal ones tie), "model(FOLDER)", or file.py:function(prompts, answers, others,
    **columns) -> probabilities that the first is preferred, asked in both orders. `ask`, `theirs`: what prompts become for
    either. Raises ConfigError where nothing is held out, RewardError, ValueError for a judge that is none.
    """
    prompts = problems.held_out
    if not prompts:
        raise ConfigError(f"{config.task} has no held-out prompts: give the run a --held-out dataset")
    settings = SamplerSettings(temperature=temperature, max_tokens=problems.max_tokens, stop=config.stop)
    sides = ((policy, ask or Asking()), (other, theirs or Asking()))
    own, others = (_answers(p, asked, prompts, settings, config.seed, samples, i) for i, (p, asked) in enumerate(sides))
    rows = [p for p in prompts for _ in range(samples)]
    score = scorer(problems.gold) if judge == "reward" else None
    every = _Texts([*own, *others])
    place, n = [[i] for i in range(2 * len(rows))], len(rows)
    first, second = (Answers(rows, tokens, _scored(score, rows, texts))
                     for tokens, texts in ((place[:n], own), (place[n:], others)))  # fmt: skip
    wins = judge_of(judge, 0.0)(first, second, Drawn({}, every, config.seed, 0, 0))  # type: ignore[arg-type]
    longer = torch.tensor([float(len(a) - len(b)) for a, b in zip(own, others, strict=True)], dtype=torch.float64)
    examples = [{"prompt": p.text, "completion": a, "other": b, "win": float(w)}
                for p, a, b, w in zip(rows[:8], own, others, wins, strict=False)]  # fmt: skip
    shape = (len(prompts), samples)
    return Versus(against, "the reward" if judge == "reward" else judge, wins.double().reshape(shape), longer.reshape(shape),
                  examples)  # fmt: skip


def _answers(policy: TokenPolicy, ask: Asking, prompts: Sequence[Prompt], settings: SamplerSettings, seed: int, samples: int,
             side: int) -> list[str]:  # fmt: skip
    """`samples` answers to each prompt; the draws of the two sides are independent."""
    sampler, tokenizer, texts = Sampler(policy.model, policy.tokenizer, settings), policy.tokenizer, list[str]()
    rows = [(ask.held_out(p), i) for p in prompts for i in range(samples)]
    for start in range(0, len(rows), BATCH):
        part = rows[start : start + BATCH]
        keys = torch.tensor([[seed, EVALUATION, p.id, i, side] for p, i in part])
        done = sampler.sample([encode_prompt(tokenizer, p.text) for p, _ in part], keys)
        texts += [tokenizer.decode(list(c.tokens), skip_special_tokens=True) for c in done]
    return texts


def _scored(score: Reward | None, rows: Sequence[Prompt], texts: Sequence[str]) -> dict[str, Tensor]:
    """Rewards [n] of texts, for a judge that compares them; a row that a reward drops has 0."""
    if score is None:
        return {}
    names = dict.fromkeys(n for p in rows for n in p.columns)
    found = score([p.text for p in rows], texts, {n: [p.columns.get(n) for p in rows] for n in names})
    return {"reward": torch.where(found.kept, found.reward.double(), 0.0)}
