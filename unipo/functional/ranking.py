"""Does a policy rank answers as the labels do, and could the method that trains it make it do so?

With c = log( ref(y_l) / ref(y_w) ), by how much the reference prefers the wrong answer, and z = log( pi(y_w) / pi(y_l) ):

    reward accuracy    1[ z + c > 0 ]     what preference training improves: the policy against its reference
    ranking accuracy   1[ z > 0 ]         what is wanted of the policy: ranks the two answers right
    difficulty         -log sigmoid(beta c): z > 0 exactly where the DPO loss of the pair is below it

so that a pair with a large c is learned by its loss long before its ranking is (arXiv 2405.19534).
"""

from __future__ import annotations

import torch
from torch import Tensor

from unipo.functional.shapes import same_length

__all__ = ["idealised_log_ratio", "ranking_difficulty", "ranks_right"]


def ranks_right(preferred: Tensor, other: Tensor) -> Tensor:
    """1[ log pi(y_w) > log pi(y_l) ]: bool [P]. Equal ones are wrong.

    `preferred`, `other` [P]: log-probabilities of whole answers (or per token, for the length-normalised variant; or scores).
    The mean is the ranking accuracy (arXiv 2405.19534, def. 2.1).
    """
    same_length(preferred=preferred, other=other)
    return preferred > other


def idealised_log_ratio(reference: Tensor, probability: Tensor | float, beta: float) -> Tensor:
    """log( pi*(y_w) / pi*(y_l) ) = log( ref(y_w) / ref(y_l) ) + logit(alpha) / beta: [P].

    pi* minimises the DPO loss, or maximises the reward under the KL penalty, on Bradley-Terry labels. `reference` [P]: its
    log-ratio under the reference, -c. `probability`: alpha = P(y_w > y_l), the share of raters that prefer y_w, in (0, 1); for
    unanimous ones take 1 - eps (arXiv 2405.19534, theorem 3.1). Where it is above 0, pi* ranks the pair right.
    """
    alpha = torch.as_tensor(probability, dtype=reference.dtype, device=reference.device)
    if not bool(((alpha > 0) & (alpha < 1)).all()):
        raise ValueError(f"probabilities from {float(alpha.min()):g} to {float(alpha.max()):g}: expected above 0 and below 1 "
                         "(1 - eps for raters that all agree)")  # fmt: skip
    return reference + torch.logit(alpha) / beta


def ranking_difficulty(reference: Tensor, beta: float) -> Tensor:
    """-log sigmoid(beta c) = -log sigmoid(-beta log( ref(y_w) / ref(y_l) )): [P], above 0.

    The DPO loss that a pair must get below to be ranked right (arXiv 2405.19534, theorem 4.1): the smaller, the harder; log 2
    where the reference is indifferent. `reference` [P]: log-ratio of the pair under the reference, -c.
    """
    return -torch.nn.functional.logsigmoid(-beta * reference)
