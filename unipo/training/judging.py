"""Comparisons that are kept apart, and how well a model that is trained to judge answers orders them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from unipo.episodes import Episodes
from unipo.learner.annotate import annotate, emitted
from unipo.objectives import FinalValue, Needs
from unipo.policies import TokenPolicy
from unipo.recipe import Recipe
from unipo.sources.stages.arrange import Arrange, EveryPair, Rivals
from unipo.statistics import wilson_interval
from unipo.training.config import ConfigError, RunConfig
from unipo.training.problems import HELD_OUT_SHARE, Problems
from unipo.training.ranking import RankingEvaluator
from unipo.training.stored_rows import fixed_rows

QUARTERS = ("closest", "closer", "clearer", "clearest")
"""Quarters of the pairs by how far apart their ratings are; where these are not known, the model's own scores."""


JUDGED: Mapping[str, Arrange] = {stage.judges: stage for stage in (EveryPair(), Rivals())}
"""How pairs are arranged for a judge of answers, and for one of pairs."""


@dataclass(frozen=True)
class Judgement:
    """How a model orders pairs [P]: `margin`, its score of the better less that of the worse, and `apart`, their ratings'
    difference (NaN unknown). Equal scores are half right."""

    margin: Tensor
    apart: Tensor
    examples: list[dict[str, Any]]

    @property
    def rated(self) -> bool:
        """Whether all ratings are known, and not all equally far apart."""
        return bool(self.apart.isfinite().all()) and bool((self.apart != self.apart[:1]).any())

    def metrics(self) -> dict[str, float]:
        """Accuracy with its 95 % Wilson interval, the mean margin, and by quarters of how far apart the answers are.

        `predicted`: what the model itself expects its accuracy to be, the mean of sigmoid(|margin|): above the accuracy, it is
        surer than it should be.
        """
        right, n = (self.margin.sign() + 1.0) / 2.0, len(self.margin)
        low, high = wilson_interval(round(float(right.sum())), n)
        found = {"accuracy": float(right.mean()), "accuracy_low": low, "accuracy_high": high,
                 "eval_margin": float(self.margin.mean()),
                 "predicted": float(torch.sigmoid(self.margin.abs()).mean())}  # fmt: skip
        order = torch.argsort(self.apart if self.rated else self.margin.abs(), stable=True)
        for name, rows in zip(QUARTERS, order.tensor_split(len(QUARTERS)), strict=True):
            if len(rows):
                found[f"accuracy_{name}"] = float(right[rows].mean())
                found[f"predicted_{name}"] = float(torch.sigmoid(self.margin[rows].abs()).mean())
                found[f"apart_{name}"] = float((self.apart if self.rated else self.margin.abs())[rows].mean())
        return found


def by_margin(row: Mapping[str, float]) -> str:
    """The quarters of an evaluation's metrics in words; "" where it was none of pairs."""
    told = [f"{name} {row[f'accuracy_{name}']:.0%} (expects {row[f'predicted_{name}']:.0%})"
            for name in QUARTERS if row.get(f"accuracy_{name}", math.nan) == row.get(f"accuracy_{name}")]  # fmt: skip
    return "quarters of the pairs, " + ", ".join(told) if told else ""


@dataclass
class PairEvaluator:
    """Held-out pairs, each better row before its worse one."""

    rows: Episodes
    tokenizer: Any
    token_budget: int

    @property
    def prompts(self) -> range:
        return range(self.rows.count("group"))

    def __call__(self, policy: TokenPolicy) -> Judgement:
        score = FinalValue()(self.rows, emitted(self.rows, ["value"], policy, self.token_budget)).double().cpu()
        rating = self.rows["rating"].double() if "rating" in self.rows else torch.full_like(score, torch.nan)
        return Judgement(score[::2] - score[1::2], rating[::2] - rating[1::2], list(self._examples(score)))

    def _examples(self, score: Tensor, n: int = 8) -> Any:
        context, tokens = self.rows.context("score"), self.rows["token"].split(self.rows.lengths().tolist())
        for i in range(min(n, len(self.rows))):
            prompt = context.take(torch.tensor([i])).values.tolist()
            yield {"prompt": self.tokenizer.decode(prompt), "completion": self.tokenizer.decode(tokens[i].tolist()),
                   "reward": float(score[i])}  # fmt: skip


def arranged(fixed: Mapping[str, Any], stages: Sequence[Arrange], tokenizer: Any) -> dict[str, Any]:
    """The same sources, their rows as the stages of a recipe arrange them. Raises ConfigError where nothing is left of one."""
    for name, rows in fixed.items():
        for stage in stages:
            before = rows.episodes.count("group")
            try:
                rows.episodes = stage(rows.episodes, tokenizer)
            except ValueError as error:
                raise ConfigError(f"{name}: {error}") from error
            if (after := rows.episodes.count("group")) != before:
                rows.notes.append(f"{stage.title} made {after:,} groups of {before:,} {name}")
        if not len(rows.episodes):
            raise ConfigError(f"nothing is left of the {name} that were given after {stages}: does every list have two "
                              "answers of which one is better?")  # fmt: skip
    return dict(fixed)


def judged(fixed: Mapping[str, Any], config: RunConfig, stages: Sequence[Arrange], policy: TokenPolicy, problems: Problems
           ) -> PairEvaluator:  # fmt: skip
    """How well pairs are judged that are kept apart."""
    return PairEvaluator(apart(fixed, config, stages, policy, problems), policy.tokenizer, config.token_budget)


def apart(fixed: Mapping[str, Any], config: RunConfig, stages: Sequence[Arrange], policy: TokenPolicy, problems: Problems
          ) -> Episodes:  # fmt: skip
    """Pairs to evaluate on: those of `--held-out`, else a tenth of those given, by prompt, which are trained on no longer."""
    pairs = fixed["pairs"].episodes
    if config.held_out:
        other = dataclasses.replace(config, pairs=config.held_out, demos="", labels="", keep_pairs="", flip_labels=0.0)
        kept = arranged(fixed_rows(other, policy, problems), stages, policy.tokenizer)["pairs"].episodes
    else:
        away = pairs["prompt_id"] % 1000 < 1000 * HELD_OUT_SHARE
        if bool(away.all()) or pairs.count("group") < 20:
            away = torch.zeros_like(away)
        kept, fixed["pairs"].episodes = pairs.select(away), pairs.select(~away)
    first = torch.arange(min(kept.count("group"), config.eval_prompts))
    return kept.select(first, "group")


def ranked(fixed: Mapping[str, Any], config: RunConfig, recipe: Recipe, policy: TokenPolicy, problems: Problems,
           references: Mapping[str, TokenPolicy]) -> RankingEvaluator:  # fmt: skip
    """How a policy itself ranks pairs that are kept apart, for runs that nothing else judges; against its reference, if any."""
    kept = EveryPair()(apart(fixed, config, recipe.arrange, policy, problems), policy.tokenizer)
    start = {who: p for who, p in references.items() if who == "reference"}
    kept = annotate(kept, Needs.of(columns="reference_logp"), start, config.token_budget)
    if "reference_logp" in kept and bool(kept["reference_logp"].isnan().any()):
        kept = kept.without("reference_logp")
    return RankingEvaluator(kept, policy.tokenizer, config.token_budget)
