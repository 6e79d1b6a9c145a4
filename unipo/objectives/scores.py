"""Losses on scores of whole answers: margins between preferred and other answers, and regressions of log-ratios to rewards.

With rho_i = log( pi(y_i) / to(y_i) ) summed over the answer and R_i its reward, most quadratic losses on groups are one, the
variance over the group of a_i = R_i - beta rho_i (Var with divisor G):

    regression with a free constant       ScoreRegression(center=GroupMean())       Var(a) / (2 beta^2)
    pairs of a group (CoPG, REC)          GroupSquare                               G / (G - 1) Var(a) / beta
    standardised on both sides            ScoreRegression(scale=SmoothStd())        1 - correlation of R and rho, as eps -> 0

all with the minimiser to * exp(R / beta) / Z on full support. Without the free constant the target must be normalised.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from unipo import functional as F
from unipo.episodes import Episodes
from unipo.objectives.advantages import Advantage, Center, GroupMean, Outcome, Scale
from unipo.objectives.base import Knob, Needs, Objective, Part, Rows, Signals, labels, number, pairs, rollouts
from unipo.objectives.masks import AdvantageMask
from unipo.objectives.regression import Squared

__all__ = [
    "Brevity",
    "Contrast",
    "GroupSquare",
    "HingeLink",
    "Link",
    "LogOdds",
    "LogRatioScore",
    "LogisticLink",
    "Marked",
    "MeanLogp",
    "MismatchedRatio",
    "Pairwise",
    "Pointwise",
    "ScoreRegression",
    "ScoreSum",
    "SigmoidLink",
    "SquaredLink",
    "SumLogp",
    "Unflipped",
    "Zero",
]


@dataclass(frozen=True, repr=False)
class Marked(Rows):
    """Episodes whose column `column` (bool) is True."""

    column: str = "chosen"

    def __call__(self, episodes: Episodes, signals: Signals | None = None) -> Tensor:
        return episodes[self.column]

    def __repr__(self) -> str:
        return self.column

    def own_needs(self) -> Needs:
        return Needs.of(columns=self.column)


# ---- scores of answers: [E] -------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class LogRatioScore(Part):
    """h(y) = beta * sum_t log( pi(y_t) / to(y_t) ) per episode [E], differentiable in the policy."""

    beta: float | Knob = 0.1
    to: str = "reference"

    def own_needs(self) -> Needs:
        return Needs.of(columns=f"{self.to}_logp", signals="logp")

    def __call__(self, episodes: Episodes, signals: Signals) -> Tensor:
        return number(self.beta) * episodes.reduce(signals["logp"] - episodes[f"{self.to}_logp"])


@dataclass(frozen=True)
class ScoreSum(Part):
    """sum_k weight_k * score_k per episode [E]: log-ratios to several policies, say; weights are given as (weight, score)."""

    weights: tuple[float | Knob, ...]
    scores: tuple[Part, ...]

    def __call__(self, episodes: Episodes, signals: Signals) -> Tensor:
        found = [number(w) * s(episodes, signals) for w, s in zip(self.weights, self.scores, strict=True)]
        return torch.stack(found).sum(0)


@dataclass(frozen=True)
class SumLogp(Part):
    """s(y) = beta * sum_t log pi(y_t) per episode [E], differentiable in the policy: a score without a reference."""

    beta: float | Knob = 1.0

    def own_needs(self) -> Needs:
        return Needs.of(signals="logp")

    def __call__(self, episodes: Episodes, signals: Signals) -> Tensor:
        return number(self.beta) * episodes.reduce(signals["logp"])


@dataclass(frozen=True)
class MeanLogp(Part):
    """s(y) = beta * mean_t log pi(y_t) per episode [E], differentiable in the policy; 0 for an answer without steps."""

    beta: float | Knob = 1.0

    def own_needs(self) -> Needs:
        return Needs.of(signals="logp")

    def __call__(self, episodes: Episodes, signals: Signals) -> Tensor:
        return number(self.beta) * episodes.reduce(signals["logp"], how="mean")


@dataclass(frozen=True)
class LogOdds(Part):
    """s(y) = log( p / (1 - p) ) per episode [E], p = exp( mean_t log pi(y_t) ) (ORPO); p counts as at most 1 - `eps`."""

    eps: float = 1e-6

    def own_needs(self) -> Needs:
        return Needs.of(signals="logp")

    def __call__(self, episodes: Episodes, signals: Signals) -> Tensor:
        mean = episodes.reduce(signals["logp"], how="mean").clamp(max=-self.eps)
        return mean - torch.log(-torch.expm1(mean))


@dataclass(frozen=True)
class MismatchedRatio(Part):
    """beta * max( 0, mean of log( pi(y) / to(y) ) behind other prompts ), the same for every episode [E], detached.

    An estimate of beta KL(pi || to) from answers that do not fit (KTO, arXiv 2402.01306): each answer is read behind the
    prompt of the group before its own (columns `old_mismatched_logp` and `<to>_mismatched_logp`).
    """

    beta: float | Knob = 0.1
    to: str = "reference"

    def own_needs(self) -> Needs:
        return Needs.of(columns=f"old_mismatched_logp {self.to}_mismatched_logp")

    def __call__(self, episodes: Episodes, signals: Signals) -> Tensor:
        ratio = episodes.reduce(episodes["old_mismatched_logp"] - episodes[f"{self.to}_mismatched_logp"])
        return number(self.beta) * ratio.mean().clamp(min=0.0).expand(len(episodes))


@dataclass(frozen=True)
class Zero(Part):
    """0 for every episode [E]: the target of a score that shall not vary."""

    def __call__(self, episodes: Episodes, signals: Signals) -> Tensor:
        return torch.zeros(len(episodes), device=episodes.device)


@dataclass(frozen=True)
class Brevity(Part):
    """1 - T / longest [E]: how much shorter than the longest answer allowed; needs no column."""

    longest: float

    def __call__(self, episodes: Episodes, signals: Signals) -> Tensor:
        return 1.0 - episodes.lengths().double() / self.longest


@dataclass(frozen=True)
class Contrast(Advantage):
    """Right answers share +1 by softmax( preference / temper ), wrong ones share -1 by softmax( score / tau ).

    Right: outcome above 1/2. `preference` tells right answers apart, never right from wrong; `temper` and `tau` inf make the
    shares equal. A group that is all right or all wrong has advantage 0.
    """

    preference: Part
    temper: float = 0.1
    tau: float = 10.0
    score: Part = MeanLogp()
    outcome: Part = Outcome()

    def own_needs(self) -> Needs:
        return Needs(group_size=2)

    def __call__(self, episodes: Episodes, signals: Signals) -> Tensor:
        index, n = episodes.index("group", "episode"), episodes.count("group")
        right = self.outcome(episodes, signals) > 0.5
        score = self.score(episodes, signals)
        raised = F.group_softmax(self.preference(episodes, signals).to(score.dtype) / self.temper, index, n, right)
        lowered = F.group_softmax(score / self.tau, index, n, ~right)
        mixed = torch.stack([episodes.reduce(x, to="group", how="any", level="episode") for x in (right, ~right)]).all(
            0
        )
        return episodes.expand(torch.where(mixed[index], raised - lowered, 0.0))


# ---- preferences -----------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Link(Part):
    """A loss on the margin between two scores: `of(margin [P]) -> [P]`. This one is logistic: -log sigmoid(margin)."""

    def of(self, margin: Tensor) -> Tensor:
        return F.logistic(margin)


@dataclass(frozen=True)
class LogisticLink(Link):
    """-(1 - s) log sigmoid(m - margin) - s log sigmoid(margin - m), s the share of labels believed to be flipped."""

    label_smoothing: float = 0.0
    margin: float = 0.0

    def of(self, margin: Tensor) -> Tensor:
        return F.logistic(margin - self.margin, self.label_smoothing)


@dataclass(frozen=True)
class SquaredLink(Link):
    """(margin - target)^2: IPO."""

    target: float = 1.0

    def of(self, margin: Tensor) -> Tensor:
        return F.squared(margin, self.target)


@dataclass(frozen=True)
class HingeLink(Link):
    """max(0, target - margin): SLiC."""

    target: float = 1.0

    def of(self, margin: Tensor) -> Tensor:
        return F.hinge(margin, self.target)


@dataclass(frozen=True)
class SigmoidLink(Link):
    """1 - sigmoid(margin), which saturates on both sides: KTO."""

    def of(self, margin: Tensor) -> Tensor:
        return torch.sigmoid(-margin)


@dataclass(frozen=True)
class Unflipped(Link):
    """( (1 - e) link(m) - e link(-m) ) / (1 - 2 e): on labels of which a share e is flipped, link(m) of clean ones on average.

    Unbounded below (for the logistic link its tail is - e / (1 - 2 e) m): stop early, or hold the policy otherwise.
    """

    flipped: float = 0.1
    link: Link = Link()

    def __post_init__(self) -> None:
        if not 0.0 <= self.flipped < 0.5:
            raise ValueError(f"flipped is {self.flipped}: expected the share of wrong labels, from 0 to below 1/2")

    def of(self, margin: Tensor) -> Tensor:
        kept = (1.0 - self.flipped) * self.link.of(margin) - self.flipped * self.link.of(-margin)
        return kept / (1.0 - 2.0 * self.flipped)


@dataclass(frozen=True, kw_only=True, repr=False)
class Pairwise(Objective):
    """L = mean over groups of link( mean score of the chosen - mean score of the others ); most often a pair of answers.

    A group without a chosen or without another answer is left out. `confidence` [E]: the probability p that the chosen are
    preferred; the loss is then p link(m) + (1 - p) link(-m). `apart` [E]: what the chosen have more of it is taken off the
    margin first (their ratings: the better they are, the further ahead they shall score); nothing where it is unknown (NaN).
    """

    score: Part = LogRatioScore()
    link: Link = Link()
    confidence: Part | None = None
    apart: Part | None = None
    rows: Rows = pairs

    def own_needs(self) -> Needs:
        return Needs.of(columns="chosen kind", group_size=2)

    def evaluate(self, episodes: Episodes, signals: Signals) -> tuple[Tensor, dict[str, Tensor]]:
        score, chosen = self.score(episodes, signals), episodes["chosen"]
        counts = [episodes.reduce(side.to(score), to="group", level="episode") for side in (chosen, ~chosen)]
        won, lost = (episodes.expand(1 / n.clamp(min=1), to="episode", level="group") for n in counts)
        sign = torch.where(chosen, won, -lost)
        margin = episodes.reduce(sign * score, to="group", level="episode")
        complete = (counts[0] > 0) & (counts[1] > 0)
        ahead = margin[complete]
        if self.apart is not None:
            more = episodes.reduce(sign * self.apart(episodes, signals).to(score.dtype), to="group", level="episode")
            ahead = ahead - torch.nan_to_num(more[complete])
        each = self.link.of(ahead)
        if self.confidence is not None:
            sure = self.confidence(episodes, signals).to(score.dtype)
            sure = episodes.reduce(sure, to="group", how="mean", level="episode")[complete]
            each = sure * each + (1.0 - sure) * self.link.of(-ahead)
        loss = each.sum() / max(int(complete.sum()), 1)
        preferred = (margin.detach() > 0).to(score.dtype)
        return loss, {"preferred": episodes.expand(preferred, level="group"),
                      "margin": episodes.expand(margin.detach(), level="group")}  # fmt: skip


@dataclass(frozen=True, kw_only=True, repr=False)
class Pointwise(Objective):
    """L = mean over answers of weight * link( +-(score - anchor) ): + and `good` for the chosen, - and `bad` for the others.

    Answers that were judged each on its own; the anchor is what neither is. Sides of pairs may be judged so as well.
    """

    score: Part = LogRatioScore()
    anchor: Part = Zero()
    link: Link = Link()
    good: float = 1.0
    bad: float = 1.0
    rows: Rows = labels

    def own_needs(self) -> Needs:
        return Needs.of(columns="chosen kind")

    def evaluate(self, episodes: Episodes, signals: Signals) -> tuple[Tensor, dict[str, Tensor]]:
        score, chosen = self.score(episodes, signals), episodes["chosen"]
        above = score - self.anchor(episodes, signals).detach().to(score.dtype)
        margin = torch.where(chosen, above, -above)
        each = torch.where(chosen, self.good, self.bad) * self.link.of(margin)
        preferred = (margin.detach() > 0).to(score.dtype)
        return each.sum() / max(len(episodes), 1), {"preferred": episodes.expand(preferred),
                                                    "margin": episodes.expand(margin.detach())}  # fmt: skip


# ---- regressions -----------------------------------------------------------------------------------------------------
@dataclass(frozen=True, kw_only=True, repr=False)
class ScoreRegression(Objective):
    """The score of an answer is regressed to what it is worth:

        L = mean over groups of mean over members of penalty( e_i - center_g(e) ),   e_i = target_i - score_i / scale_g(score)

    `center` GroupMean: a constant per group is free (the partition function of the optimum); none: the target must be
    normalised itself. `per` episode: the mean runs over all answers, whatever their groups. `ddof` 1: over a group's pairs
    rather than its members. A group without any step under `mask` adds 0 and counts. The target is detached.
    """  # fmt: skip

    target: Part
    score: Part = LogRatioScore(1.0)
    center: Center = Center()
    scale: Scale = Scale()
    penalty: Squared = Squared()
    mask: AdvantageMask = AdvantageMask()
    per: str = "group"
    ddof: int = 0
    rows: Rows = rollouts

    def own_needs(self) -> Needs:
        return Needs.of(columns="kind", signals="logp")

    def evaluate(self, episodes: Episodes, signals: Signals) -> tuple[Tensor, dict[str, Tensor]]:
        score = self.score(episodes, signals)
        with torch.no_grad():
            target = self.target(episodes, signals).to(score.dtype)
            kept = self.mask.of(episodes.expand(target), episodes, signals)
            live = episodes.reduce(kept, to="group", how="any")
        error = target - score / self.scale.of(score, episodes)
        error = error - self.center.of(error, episodes)
        each = torch.where(episodes.expand(live, "episode", "group"), self.penalty.of(error), 0.0)
        index, n = episodes.index(self.per, "episode"), episodes.count(self.per)
        size = (torch.bincount(index, minlength=n) - self.ddof).clamp(min=1)
        total = episodes.reduce(each, to=self.per, level="episode")
        return (total / size).sum() / max(n, 1), {"advantage": episodes.expand(target)}


@dataclass(frozen=True, kw_only=True, repr=False)
class GroupSquare(Objective):
    """Mean over groups of the mean over unordered pairs of (a_i - a_j)^2 / (2 beta), a = R - beta * log(pi / to).

    The gradient flows through the policy inside `a` (CoPG, arXiv 2406.19185; REC's pairwise loss with `to="old"`). It is
    2 / beta times the regression of beta * log(pi / to) to R with a free constant.
    """

    beta: float | Knob = 0.1
    to: str = "reference"
    outcome: Part
    rows: Rows = rollouts

    def own_needs(self) -> Needs:
        return Needs.of(columns=f"{self.to}_logp kind", signals="logp", group_size=2)

    def evaluate(self, episodes: Episodes, signals: Signals) -> tuple[Tensor, dict[str, Tensor]]:
        score = LogRatioScore(self.beta, self.to)
        whole = ScoreRegression(target=self.outcome, score=score, center=GroupMean(), ddof=1)
        return 2.0 / number(self.beta) * whole.evaluate(episodes, signals)[0], {}
