"""Preference data: which comparisons are trained on, and what a policy can learn from each of them.

fifa                DPO on the few comparisons with wide margins, clear prompts and few prompts like theirs
dpo-gamma           DPO with the reference to the power gamma: 1 is DPO, 0 has no reference
ranking-accuracy    a pair is ranked right exactly where its DPO loss is below its difficulty
"""

from __future__ import annotations

import math

from unipo.functional import ranking_difficulty
from unipo.methods.method import Method, Study
from unipo.methods.preferences import dpo
from unipo.objectives import LogRatioScore, ScoreSum, SumLogp
from unipo.recipe import Recipe
from unipo.sources.data.pair_filters import Important, Keep


def fifa(*, beta: float = 0.1, share: float = 0.05, alpha: float = 0.5, gamma: float = 0.5, neighbours: int = 5,
         per_prompt: int = 1, cap: float = math.inf) -> Recipe:  # fmt: skip
    """FiFA (arXiv 2410.10166): DPO on the `share` of comparisons with the largest importance, chosen once, before training.

        f = z(margin) + alpha z(quality) + gamma z(log d_k),     z(x) = (x - mean) / std over all comparisons
        L = mean over the comparisons kept of  -log sigmoid( h(chosen) - h(rejected) )

    margin: |r_w - r_l| of the ratings that come with the data (of a proxy reward model; never that of the evaluation).
    quality: a column of the prompts, 0 where there is none. d_k: the distance of the prompt to its k-th nearest `neighbour`, by
    a column `embedding` or a fingerprint of its tokens. At most `per_prompt` comparisons to a prompt (0: any number); margins
    count up to `cap`.

    Departs from the paper: DPO of token policies in place of diffusion; k, alpha and gamma, which we could not verify there, and
    the standardisation are choices (the card's).
    """
    filters = Important(share=share, alpha=alpha, gamma=gamma, k=neighbours, per_prompt=per_prompt, cap=cap)
    return dpo(beta=beta).but(arrange=(Keep((filters,)),))


def dpo_gamma(*, beta: float = 0.1, gamma: float = 0.5) -> Recipe:
    """DPO with the reference to the power gamma (arXiv 2405.19534, sec. 4): what the reference prefers counts less.

        s(y) = beta ( log pi(y) - gamma log ref(y) )
        L    = mean over pairs of  -log sigmoid( s(chosen) - s(rejected) )

    `gamma` 1 is DPO; 0 has no reference, and then a loss below log 2 is a right ranking.
    """
    score = ScoreSum((gamma, 1.0 - gamma), (LogRatioScore(beta), SumLogp(beta)))
    return dpo(beta=beta).but(score=score)


_TESTS = "tests/methods/test_preference_data.py::"
METHODS = (
    Method(
        slug="fifa", build=fifa, row=103, family="data", paper="arXiv 2410.10166",
        title="Automated Filtering of Human Feedback Data for Aligning Text-to-Image Diffusion Models",
        equation="f = z(|r_w - r_l|) + alpha z(quality) + gamma z(log d_k(prompt)); the top share by f, one per prompt\n"
                 "L = mean over the pairs kept of -log sigmoid(h(chosen) - h(rejected)),  h = beta * sum log(pi / ref)",
        claim="DPO on a twentieth of noisy comparisons, chosen by margin and spread, reaches a higher reward in few steps than "
              "on all of them or on random ones; by margin alone it loses on prompts that were not trained on",
        identity_tests=tuple(_TESTS + t for t in (
            "test_without_weights_the_widest_margins_stay", "test_the_whole_share_is_dpo",
            "test_importance_does_not_depend_on_the_order_of_rows", "test_embeddings_may_be_moved_and_scaled",
            "test_copies_of_a_prompt_go_first")),
    ),
    Method(
        slug="dpo-gamma", build=dpo_gamma, family="preference", title="DPO with the reference to a power",
        paper="arXiv 2405.19534, sec. 4",
        equation="L = mean_pairs -log sigmoid(s(w) - s(l)),  s = beta (log pi - gamma log ref)",
        identity_tests=tuple(_TESTS + t for t in (
            "test_the_whole_reference_is_dpo", "test_without_a_reference_the_loss_ranks")),
    ),
)  # fmt: skip
STUDIES = (
    Study(
        slug="ranking-accuracy", function=ranking_difficulty, row=55, family="evaluation", paper="arXiv 2405.19534",
        title="Preference Learning Algorithms Do Not Learn Preference Rankings",
        equation="R = mean 1[log pi(w) > log pi(l)]          c = log ref(l) / ref(w)\n"
                 "R = 1 of a pair  <=>  its DPO loss < -log sigmoid(beta c)\n"
                 "idealised: log pi*(w) / pi*(l) = -c + logit(alpha) / beta,  alpha the share of raters that prefer w",
        claim="DPO orders nearly all pairs against its reference, and far fewer by the policy itself: it turns those with a "
              "small c, and leaves those with a large one wrong; only at its optimum the ranking is the idealised one",
        identity_tests=(
            *("tests/functional/test_ranking.py::" + t for t in (
                "test_the_optimal_policy_is_the_idealised_one", "test_right_exactly_where_the_loss_is_below_the_difficulty",
                "test_a_loss_of_six_tenths_ranks_what_the_reference_ranks", "test_zero_ipo_loss_ranks_right_below_half_over_tau",
                "test_ties_are_wrong_and_a_constant_changes_nothing")),
            _TESTS + "test_the_whole_reference_is_dpo",
        ),
    ),
)  # fmt: skip
