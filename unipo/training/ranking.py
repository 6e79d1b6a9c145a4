"""How a start policy orders the comparisons that it would be trained on: `unipo data check FILE --model FOLDER`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from unipo import functional as F
from unipo.episodes import Episodes
from unipo.learner.annotate import emitted
from unipo.policies import TokenPolicy
from unipo.policies.loading import ModelError
from unipo.policies.token import context_limit
from unipo.sources.data.comparisons import check_given, comparison_episodes
from unipo.sources.data.datasets import PairRow
from unipo.sources.stages.arrange import better_worse
from unipo.statistics import wilson_interval

TOKEN_BUDGET = 16384
BETA, AGREED = 0.1, 0.9
"""What is said of idealised rankings is for DPO's default beta, and raters of whom nine in ten agree."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RankingReport:
    """Every better answer with every worse one of each comparison, P pairs in all.

    `policy`, `per_token` [P]: log-ratio of the better to the worse answer under the policy, of sums and of means over tokens.
    `reference` [P]: the same under the reference (None without one).
    """

    policy: Tensor
    per_token: Tensor
    reference: Tensor | None

    def __str__(self) -> str:
        return "\n".join(_render(self))


def _render(report: RankingReport) -> Iterator[str]:
    yield f"how the model ranks {len(report.policy):,} pairs of a better and a worse answer (95 % interval)"
    yield f"  ranking accuracy: {accuracy(report.policy > 0)}"
    yield f"  by the mean over tokens: {accuracy(report.per_token > 0)}"
    ref = report.policy if report.reference is None else report.reference
    if report.reference is not None:
        yield f"  of the reference: {accuracy(ref > 0)}"
        yield f"  of log-ratios to the reference: {accuracy(report.policy - ref > 0)}"
    wrong = -ref[ref < 0]
    if len(wrong):
        loss = F.ranking_difficulty(-wrong.median()[None], BETA)
        whose = "the model as reference" if report.reference is None else "that reference"
        yield (f"  {whose} prefers the worse answer of {len(wrong):,} by a median of {wrong.median():.1f} nats: with beta "
               f"{BETA:g} such a pair is ranked right once its DPO loss is below {float(loss):.3f}")  # fmt: skip
        ideal = F.idealised_log_ratio(ref.double(), AGREED, BETA) > 0
        yield f"  DPO at its optimum would rank right, where {AGREED:.0%} of raters agree: {accuracy(ideal)}"


def accuracy(right: Tensor) -> str:
    """A share with its Wilson interval."""
    low, high = wilson_interval(int(right.sum()), len(right))
    return f"{float(right.double().mean()):.1%} ({low:.1%} to {high:.1%})"


def ranking_report(rows: Sequence[PairRow], policy: TokenPolicy, reference: TokenPolicy | None = None) -> RankingReport:
    """Rank all comparisons. Log-probs of a reference that the data have stand in for one. DataError for what does not fit."""
    made = comparison_episodes(policy.tokenizer, rows)
    check_given(rows, made, context_limit(policy.model), ())
    logp = emitted(made, ["logp"], policy, TOKEN_BUDGET)["logp"].double().cpu()
    better, worse = better_worse(made)

    def apart(x: Tensor, how: str = "sum") -> Tensor:
        score = made.reduce(x, how=how)
        return score[better] - score[worse]

    logged = made["reference_logp"].double() if "reference_logp" in made else None
    if reference is not None:
        logged = emitted(made, ["logp"], reference, TOKEN_BUDGET)["logp"].double().cpu()
    elif logged is not None and bool(logged.isnan().any()):
        logged = None
    return RankingReport(
        policy=apart(logp), per_token=apart(logp, "mean"), reference=None if logged is None else apart(logged)
    )


# ---- held-out comparisons ----------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Ranked:
    """Log-ratios of the better to the worse answer [P] under the policy, and `against` the reference (None without one)."""

    policy: Tensor
    against: Tensor | None
    examples: list[dict[str, Any]]

    def metrics(self) -> dict[str, float]:
        """Ranking accuracy with its 95 % Wilson interval, and that of log-ratios to the reference; ties are wrong."""
        low, high = wilson_interval(int((self.policy > 0).sum()), len(self.policy))
        found = {"accuracy": float((self.policy > 0).double().mean()), "accuracy_low": low, "accuracy_high": high,
                 "eval_margin": float(self.policy.mean())}  # fmt: skip
        if self.against is not None:
            found["accuracy_against_reference"] = float((self.against > 0).double().mean())
        return found


@dataclass
class RankingEvaluator:
    """Held-out pairs, each better row before its worse one, for runs that nothing else judges."""

    rows: Episodes
    tokenizer: Any
    token_budget: int

    @property
    def prompts(self) -> range:
        return range(self.rows.count("group"))

    def __call__(self, policy: TokenPolicy) -> Ranked:
        logp = self.rows.reduce(emitted(self.rows, ["logp"], policy, self.token_budget)["logp"].double())
        against = None
        if "reference_logp" in self.rows:
            ratio = logp - self.rows.reduce(self.rows["reference_logp"].double())
            against = (ratio[::2] - ratio[1::2]).cpu()
        return Ranked((logp[::2] - logp[1::2]).cpu(), against, list(self._examples(logp)))

    def _examples(self, logp: Tensor, n: int = 8) -> Iterator[dict[str, Any]]:
        context, tokens = self.rows.context(), self.rows["token"].split(self.rows.lengths().tolist())
        for i in range(min(n, len(self.rows))):
            prompt = context.take(torch.tensor([i])).values.tolist()
            yield {"prompt": self.tokenizer.decode(prompt), "completion": self.tokenizer.decode(tokens[i].tolist()),
                   "reward": float(logp[i])}  # fmt: skip


def check_same_tokenizer(policy: TokenPolicy, other: TokenPolicy, name: str) -> None:
    """Log-probs of two models are of the same tokens only where their tokenizers agree. Raises ModelError with the first
    difference."""
    ours, theirs = policy.tokenizer, other.tokenizer
    if (
        ours.get_vocab() == theirs.get_vocab()
        and ours.eos_token_id == theirs.eos_token_id
        and _text(ours) == _text(theirs)
    ):
        return
    words = sorted(set(ours.get_vocab().items()) ^ set(theirs.get_vocab().items()))[:1]
    first = (
        f"{words[0][0]!r} is in one of them only, or has another number there"
        if words
        else "they divide text differently"
    )
    raise ModelError(
        f"the reference {name!r} has another tokenizer than the policy ({len(theirs)} tokens, the policy {len(ours)}; {first}): "
        "ratios of log-probs need the same tokens. Take a reference of the same family, such as the model that the policy "
        "started from, or give log-probs of its answers in the data (ref_chosen_logps, ref_rejected_logps)"
    )


PROBE = "How many apples are 12 * 34 + 5? Né 3,000.\n"


def _text(tokenizer: object) -> list[int]:
    return list(tokenizer(PROBE, add_special_tokens=False)["input_ids"])  # type: ignore[operator]
