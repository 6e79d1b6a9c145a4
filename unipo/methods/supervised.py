"""Supervised learning on demonstrations as a policy gradient: which tokens count, and how much.

    L = - aggregate( w_n log pi(y_n) )             w detached; the reward "the token is right" on the contexts of demonstrations

sft    w = 1                                                        denominator pi
dft    w = pi(y_n)                                                  the exact policy gradient of that reward
otr    w = (1 - wrong) q(y_n),  + wrong * sum_a q(a) log pi(a)      actions of q = softmax(logits / kappa), wrong ones pay `wrong`
"""  # fmt: skip

from __future__ import annotations

from unipo.functional.quantities import parametric
from unipo.methods.method import Method
from unipo.objectives import Aggregate, Emitted, EpisodeMean, Likelihood, Probability, TokenMean
from unipo.recipe import Recipe

AGGREGATES: dict[str, Aggregate] = {"episode": EpisodeMean(), "token": TokenMean()}


def dft(*, mean: str = "token") -> Recipe:
    """Dynamic fine-tuning (arXiv 2508.05629): the likelihood weighted by the token's own probability, - sg(p) log p.

    Its gradient is that of -p: the exact policy gradient of the reward "the token is right". `mean`: token or episode.
    """
    return Recipe(objective=Likelihood(weight=Probability(), aggregate=AGGREGATES[mean]))


def otr(*, draws: int = 0, kappa: float = 1.3, wrong: float = -0.1, mean: str = "episode") -> Recipe:
    """One-Token Rollout (arXiv 2509.26313): at every token of a demonstration K one-token rollouts, rewarded 1 or `wrong`.

        L = - SEQ( (1/K) sum_k rho(a_k) log pi(a_k) ),   a_k ~ q = softmax(logits / kappa),   rho = 1 if a_k = y_n else wrong

    Written with the shares q(a) = n_a / K of the draws: - (1 - wrong) q(y) log pi(y) - wrong * sum_a q(a) log pi(a). `draws` 0
    (ours): all of q, without sampling noise (paper: 256 draws). kappa 1 makes it (1 - wrong) times `dft` in expectation.
    `mean`: episode favours short demonstrations (the paper's), token does not.
    """
    kind, numbers = ("drawn", f"{kappa:g}:{draws}") if draws else ("tempered", f"{kappa:g}")
    parametric([f"{kind}:{numbers}"])  # ValueError for numbers that cannot be
    aggregate = AGGREGATES[mean]
    right = Likelihood(weight=Emitted(f"{kind}_share:{numbers}"), aggregate=aggregate, name="right")
    every = Likelihood(signal=f"{kind}:{numbers}", aggregate=aggregate, name="every")
    return Recipe(objective=(1.0 - wrong) * right + wrong * every if wrong else right)


_TESTS = "tests/methods/test_supervised.py::"
METHODS = (
    Method(
        slug="otr", build=otr, row=7, family="llm-rl",
        title="One-Token Rollout: Guiding Supervised Fine-Tuning of LLMs with Policy Gradient", paper="arXiv 2509.26313",
        equation="L = -SEQ((1/K) sum_k rho(a_k) log pi(a_k)),  a_k ~ softmax(logits / kappa)\n"
                 "rho = 1 where a_k is the demonstration's token, else -0.1",
        claim="OTR is DFT up to the temperature of its draws: both drift and forget less than SFT, fewer draws only add noise",
        identity_tests=tuple(_TESTS + t for t in (
            "test_expected_logit_gradient", "test_at_kappa_one_otr_is_dft", "test_a_baseline_changes_nothing_at_kappa_one",
            "test_otr_over_its_share_is_sft", "test_draws_are_unbiased_with_covariance_over_k",
            "test_the_second_term_sharpens", "test_cold_tokens", "test_weights_and_count_form", "test_equal_weights")),
    ),
    Method(
        slug="dft", build=dft, family="llm-rl", title="Dynamic Fine-Tuning", paper="arXiv 2508.05629",
        equation="L = -TOK(sg(p) log p)", identity_tests=(_TESTS + "test_at_kappa_one_otr_is_dft", _TESTS + "test_equal_weights"),
    ),
)  # fmt: skip
