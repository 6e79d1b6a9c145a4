"""Lists of rated answers: learning to rank, on flat rows.

[E] rows with a score and a rating (higher is better, finite), `index` [E] the list of each, `n` lists. A place is 0 for the first
of a list; of equal numbers the earlier row has the better place. A pair is two rows of one list whose ratings differ.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from unipo.episodes import offsets_of, ranges, segment_reduce
from unipo.functional.selection import places
from unipo.functional.shapes import same_length

__all__ = [
    "discounted_gain",
    "list_cross_entropy",
    "ndcg",
    "ordered_pairs",
    "plackett_luce",
    "swap_gain",
    "win_shares",
]


def _meetings(index: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """(row, other row) of every two rows of a list, in both orders and each with itself."""
    order, size = index.argsort(stable=True), torch.bincount(index, minlength=n)
    own = index[order]
    row = order.repeat_interleave(size[own])
    return row, order[ranges(offsets_of(size)[:-1][own], size[own])]


def ordered_pairs(rating: Tensor, index: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """(better row, worse row) [P] of every two rows of a list whose ratings [E] differ."""
    same_length(rating=rating, index=index)
    row, other = _meetings(index, n)
    better = rating[row] > rating[other]
    return row[better], other[better]


def win_shares(rating: Tensor, index: Tensor, n: int) -> Tensor:
    """psi [E]: the share of its list that a row beats, equal ones and itself counting one half; 1/2 in the mean of a list.

    (1 / K) sum_i Psi_ki with the matrix Psi of win probabilities that ranks give (LiPO, arXiv 2402.01878).
    """
    same_length(rating=rating, index=index)
    row, other = _meetings(index, n)
    won = ((rating[row] - rating[other]).sign() + 1) / 2
    return segment_reduce(won, row, len(rating)) / torch.bincount(index, minlength=n)[index]


def _gain(rating: Tensor) -> Tensor:
    return torch.exp2(rating) - 1


def _undiscounted(place: Tensor, base: float) -> Tensor:
    """1 / D, D = log_base(2 + place)."""
    return math.log(base) / torch.log(place.double() + 2.0)


def discounted_gain(rating: Tensor, place: Tensor, index: Tensor, n: int, base: float = 2.0) -> Tensor:
    """DCG [n] of rows at the places `place` [E]: sum of (2^rating - 1) / log_base(2 + place)."""
    same_length(rating=rating, place=place, index=index)
    return segment_reduce(_gain(rating) * _undiscounted(place, base).to(rating.dtype), index, n)


def ndcg(score: Tensor, rating: Tensor, index: Tensor, n: int) -> Tensor:
    """[n] in [0, 1]: the DCG of the order by score, over that of the order by rating; 1 where nothing is to be gained."""
    same_length(score=score, rating=rating, index=index)
    found, best = (discounted_gain(rating, places(by, index, n), index, n) for by in (score, rating))
    return torch.where(best > 0, found / torch.where(best > 0, best, 1.0), 1.0)


def swap_gain(rating: Tensor, place: Tensor, first: Tensor, second: Tensor, base: float = 2.0) -> Tensor:
    """|change of the DCG| [P] if the rows `first` and `second` [P] of a list changed places:

    |2^r_i - 2^r_j| |1 / D(i) - 1 / D(j)|,   D = log_base(2 + place)                 (LambdaRank)
    """
    same_length(rating=rating, place=place)
    apart = _undiscounted(place[first], base) - _undiscounted(place[second], base)
    return ((_gain(rating[first]) - _gain(rating[second])) * apart.to(rating.dtype)).abs()


def plackett_luce(score: Tensor, rating: Tensor, index: Tensor, n: int) -> Tensor:
    """[n]: - log of the probability of the order by rating, when rows are drawn one after the other by softmax(score):

    sum_i  log sum_{j not before i} exp(s_j) - s_i                                     (list-MLE; ties of ratings by position)
    """
    same_length(score=score, rating=rating, index=index)
    place, (row, other) = places(rating, index, n), _meetings(index, n)
    left = place[other] >= place[row]
    row, other = row[left], other[left]
    top = segment_reduce(score.detach()[other], row, len(score), "max")
    total = top + segment_reduce((score[other] - top[row]).exp(), row, len(score)).log()
    return segment_reduce(total - score, index, n)


def list_cross_entropy(score: Tensor, rating: Tensor, index: Tensor, n: int) -> Tensor:
    """[n]: - sum_i (psi_i / sum psi) log softmax(score)_i, psi the ratings (>= 0); 0 for a list in which all are 0."""
    same_length(score=score, rating=rating, index=index)
    total = segment_reduce(rating, index, n)
    share = rating / torch.where(total > 0, total, 1.0)[index]
    top = segment_reduce(score.detach(), index, n, "max")
    log_z = torch.where(top.isfinite(), top, 0.0)[index]
    log_z = log_z + segment_reduce((score - log_z).exp(), index, n)[index].log()
    return segment_reduce(share * (log_z - score), index, n)
