"""Losses on lists of rated answers: learning to rank, with whatever scores the answers.

    pairs of a list     RankedPairs          weight * link( s_i - s_j ) for every r_i > r_j;  SwapGain: LambdaRank's weight
    whole lists         PlackettLuce         the probability of the order;    ListSoftmax   cross-entropy of the scores
    answers alone       PointSquare          (r - s)^2;                       PointLogistic cross-entropy of sigmoid(s)

With lists of two, `RankedPairs` and `PlackettLuce` are `Pairwise`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from unipo import functional as F
from unipo.episodes import Episodes, segment_reduce
from unipo.functional.keyed import mix
from unipo.objectives.base import Needs, Objective, Part, Rows, Signals, pairs
from unipo.objectives.scores import Link, LogRatioScore

__all__ = [
    "ListLoss",
    "ListSoftmax",
    "Listwise",
    "PairWeight",
    "PlackettLuce",
    "PointLogistic",
    "PointSquare",
    "RankedPairs",
    "Rating",
    "SwapGain",
    "WinShare",
    "by_content",
]


# ---- ratings: [E], NaN where unknown ---------------------------------------------------------------------------------
@dataclass(frozen=True)
class Rating(Part):
    """The column `rating`; in lists that have none at all 1 for the chosen and 0 for the others."""

    def own_needs(self) -> Needs:
        return Needs.of(columns="rating chosen")

    def __call__(self, episodes: Episodes, signals: Signals) -> Tensor:
        rating = episodes["rating"].double()
        known = episodes.reduce(~rating.isnan(), to="group", how="any", level="episode")
        return torch.where(episodes.expand(known, "episode", "group"), rating, episodes["chosen"].double())


@dataclass(frozen=True)
class WinShare(Part):
    """The share of its list that an answer beats by `outcome`, equal ones and itself counting one half; in [0, 1]."""

    outcome: Part = Rating()

    def __call__(self, episodes: Episodes, signals: Signals) -> Tensor:
        rating, index = self.outcome(episodes, signals), episodes.index("group", "episode")
        known = ~rating.isnan()
        share = F.win_shares(rating[known], index[known], episodes.count("group"))
        return torch.full_like(rating, torch.nan).masked_scatter(known, share.to(rating.dtype))


# ---- losses of lists: (score [E], rating [E], index [E], n) -> (their sum, over how many) -----------------------------
@dataclass(frozen=True)
class ListLoss(Part):
    """`of(score, rating, index, n)`: numerator and denominator of a mean over n lists; ratings are finite and detached."""

    def of(self, score: Tensor, rating: Tensor, index: Tensor, n: int) -> tuple[Tensor, float]:
        raise TypeError(f"{type(self).__name__} is abstract: define of(score, rating, index, n)")


@dataclass(frozen=True)
class PairWeight(Part):
    """How much a pair (better, worse) [P] of a list counts: [P], detached. This one: 1."""

    def of(self, score: Tensor, rating: Tensor, index: Tensor, n: int, better: Tensor, worse: Tensor) -> Tensor:
        return torch.ones_like(score[better])


@dataclass(frozen=True)
class SwapGain(PairWeight):
    """|change of the list's DCG if the two changed places in the order by current scores| (LambdaRank).

    `base` of the logarithm in the discount; `sized`: times the size of the list; `normalised`: over the best DCG of the list.
    """

    base: float = 2.0
    sized: bool = True
    normalised: bool = False

    def of(self, score: Tensor, rating: Tensor, index: Tensor, n: int, better: Tensor, worse: Tensor) -> Tensor:
        weight = F.swap_gain(rating, F.places(score, index, n), better, worse, self.base)
        if self.sized:
            weight = weight * torch.bincount(index, minlength=n)[index[better]]
        if self.normalised:
            best = F.discounted_gain(rating, F.places(rating, index, n), index, n, self.base)
            weight = weight / best[index[better]]
        return weight


@dataclass(frozen=True)
class RankedPairs(ListLoss):
    """weight * link( s_i - s_j ) over all pairs of a list with r_i > r_j.

    `per` pair: the mean over all pairs of the batch; group: the mean over lists of the sum over their pairs.
    """

    link: Link = Link()
    weight: PairWeight = PairWeight()
    per: str = "pair"

    def __post_init__(self) -> None:
        if self.per not in ("pair", "group"):
            raise ValueError(f"per is {self.per!r}: expected pair or group")

    def of(self, score: Tensor, rating: Tensor, index: Tensor, n: int) -> tuple[Tensor, float]:
        better, worse = F.ordered_pairs(rating, index, n)
        weight = self.weight.of(score.detach(), rating, index, n, better, worse).to(score.dtype)
        return (weight * self.link.of(score[better] - score[worse])).sum(), len(better) if self.per == "pair" else n


@dataclass(frozen=True)
class PlackettLuce(ListLoss):
    """- log probability of the order by rating (list-MLE), mean over lists."""

    def of(self, score: Tensor, rating: Tensor, index: Tensor, n: int) -> tuple[Tensor, float]:
        return F.plackett_luce(score, rating, index, n).sum(), n


@dataclass(frozen=True)
class ListSoftmax(ListLoss):
    """Cross-entropy of softmax(scores) to the ratings' shares of their sum, mean over lists."""

    def of(self, score: Tensor, rating: Tensor, index: Tensor, n: int) -> tuple[Tensor, float]:
        return F.list_cross_entropy(score, rating.to(score.dtype), index, n).sum(), n


@dataclass(frozen=True)
class PointSquare(ListLoss):
    """Sum over a list of (r - s)^2, mean over lists."""

    def of(self, score: Tensor, rating: Tensor, index: Tensor, n: int) -> tuple[Tensor, float]:
        return (rating.to(score.dtype) - score).square().sum(), n


@dataclass(frozen=True)
class PointLogistic(ListLoss):
    """Sum over a list of the cross-entropy of sigmoid(s) to r in [0, 1], mean over lists. ValueError for other ratings."""

    def of(self, score: Tensor, rating: Tensor, index: Tensor, n: int) -> tuple[Tensor, float]:
        beyond = rating[(rating < 0) | (rating > 1)]
        if len(beyond):
            raise ValueError(
                f"a rating is {float(beyond[0]):g}: the cross-entropy takes ratings from 0 to 1; give shares (WinShare), or "
                "divide by the highest rating"
            )
        right = rating.to(score.dtype)
        return (right * F.logistic(score) + (1 - right) * F.logistic(-score)).sum(), n


def by_content(episodes: Episodes) -> Tensor:
    """[E] positions of the episodes in an order that is a function of their tokens, and random otherwise."""
    return episodes.reduce(mix(torch.stack([episodes["token"], episodes.position()], 1))).argsort(stable=True)


# ---- the term --------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, kw_only=True, repr=False)
class Listwise(Objective):
    """L = mean of a `ranking` loss over lists of answers, a group each: their scores against their ratings.

    Answers whose rating is unknown are left out of their list. The ratings are detached. Ties (at the reference all scores
    are 0) are broken by what the answers say, mixed: the order of a list in its file, often the best first, does not matter.
    """

    score: Part = LogRatioScore()
    rating: Part = Rating()
    ranking: ListLoss = RankedPairs()
    rows: Rows = pairs

    def own_needs(self) -> Needs:
        return Needs.of(columns="kind", group_size=2)

    def evaluate(self, episodes: Episodes, signals: Signals) -> tuple[Tensor, dict[str, Tensor]]:
        score = self.score(episodes, signals)
        with torch.no_grad():
            rating = self.rating(episodes, signals)
        known = by_content(episodes)
        known = known[~rating[known].isnan()]
        rated, rating = score[known], rating[known]
        lists, index = episodes.index("group", "episode")[known].unique(return_inverse=True)
        total, count = self.ranking.of(rated, rating, index, len(lists))
        return total / max(count, 1), {"preferred": self._right(episodes, rated.detach(), rating, lists, index)}

    def _right(self, episodes: Episodes, score: Tensor, rating: Tensor, lists: Tensor, index: Tensor) -> Tensor:
        """[N]: the share of the pairs of the step's list that scores have in the right order; NaN for a list without pairs."""
        better, worse = F.ordered_pairs(rating, index, len(lists))
        right = (score[better] > score[worse]).double()
        pairs_of, found = (segment_reduce(x, index[better], len(lists)) for x in (torch.ones_like(right), right))
        share = torch.full((episodes.count("group"),), torch.nan, dtype=right.dtype, device=right.device)
        return episodes.expand(share.index_put((lists,), found / pairs_of), level="group")
