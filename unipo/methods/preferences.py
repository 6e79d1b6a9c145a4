"""Preferences: losses on the margin between two answers to one prompt.

h(y) = beta * sum_n log( pi(y_n) / ref(y_n) )         margin = h(chosen) - h(rejected)
"""

from __future__ import annotations

from unipo.methods.method import Method
from unipo.objectives import Link, LogRatioScore, Pairwise, SquaredLink
from unipo.recipe import Recipe


def dpo(*, beta: float = 0.1, label_smoothing: float = 0.0) -> Recipe:
    """Direct preference optimisation (arXiv 2305.18290, eq. 7): the policy is its own reward model.

        L = mean over pairs of  - log sigmoid( h(chosen) - h(rejected) )

    `label_smoothing` is the conservative variant: the share of labels believed to be flipped.
    """
    return Recipe(objective=Pairwise(score=LogRatioScore(beta), link=Link(label_smoothing)))


def ipo(*, beta: float = 0.1) -> Recipe:
    """Identity preference optimisation (arXiv 2310.12036, eq. 17): regress the bare margin to 1 / (2 beta).

    L = mean over pairs of  ( log pi/ref (chosen) - log pi/ref (rejected) - 1 / (2 beta) )^2
    """
    return dpo(beta=1.0).but(link=SquaredLink(target=1.0 / (2.0 * beta)))


_TESTS = "tests/methods/test_preferences.py::"
METHODS = (
    Method(
        slug="dpo", build=dpo, family="preference", title="Direct Preference Optimization", paper="arXiv 2305.18290, eq. 7",
        equation="L = mean_pairs -log sigmoid(h(chosen) - h(rejected)),  h = beta * sum log(pi / ref)",
        identity_tests=(_TESTS + "test_dpo_gradient_at_the_reference", _TESTS + "test_dpo_matches_a_second_derivation"),
    ),
    Method(
        slug="ipo", build=ipo, family="preference", title="Identity Preference Optimization", paper="arXiv 2310.12036, eq. 17",
        equation="L = mean_pairs (h(chosen) - h(rejected) - 1 / (2 beta))^2,  h = sum log(pi / ref)",
        identity_tests=(_TESTS + "test_ipo_is_copg_with_half_reward_margin",),
    ),
)  # fmt: skip
