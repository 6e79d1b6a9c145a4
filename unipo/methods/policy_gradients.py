"""Policy gradients on rollouts, and supervised learning as their neutral member: one objective, five slots.

    L = - aggregate( mask * weight * advantage * logp )          mask, weight, advantage detached

Symbols: r_n = pi(y_n) / mu(y_n) token ratio to the behaviour policy; R_i reward of episode i, T_i its length; mean_g and
std_g over the episodes of a prompt (std with Bessel's correction); TOK mean over tokens, SEQ mean over episodes of
token means, SUM mean over episodes of token sums, CONST sum over tokens / budget, mean over episodes.

               advantage            weight           mask          aggregate
    sft        1                    1                -             TOK      (on demonstrations)
    reinforce  R - b                1                -             SUM      (in environments: `reinforce_control`)
    rloo       R - mean_{j != i} R  1                -             SUM
    grpo       z-score in group     r                clip          SEQ
    dr-grpo    R - mean_g           r                clip          CONST
    dapo       z-score in group     r                clip-higher   TOK
    gspo       z-score in group     exp mean log r   clip of it    SEQ
    cispo      z-score in group     min(r, cap)      -             TOK
    ppo        GAE                  r                clip          TOK      (+ value regression)

Where a configuration value is 0 the term is absent: `grpo().needs` names no reference, `grpo(kl=0.04).needs` does.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from unipo.methods.method import Method
from unipo.methods.on_policy_control import reinforce_control
from unipo.objectives import (
    BatchStd,
    Bonus,
    Budget,
    ClipMask,
    Constant,
    EpisodeMean,
    EpisodeSum,
    GeneralisedAdvantage,
    GeometricRatio,
    GroupStd,
    KLPenalty,
    Knob,
    LeaveOneOut,
    Likelihood,
    Normalised,
    Objective,
    Outcome,
    PolicyGradient,
    ShapedOutcome,
    TokenMean,
    TokenRatio,
    Truncated,
    ValueRegression,
    ValueTarget,
)
from unipo.recipe import Recipe, RolloutSpec
from unipo.sources.controllers import RunningMean
from unipo.sources.spec import ControlSpec
from unipo.sources.text.filters import MixedOutcomes, SoftOverlong


def regularised(recipe: Recipe, kl: float, entropy: float) -> Recipe:
    """recipe + kl * KL(pi || reference) - entropy * H(pi), aggregated as its policy gradient; absent where 0.

    The divergence is the k3 estimate on the rollouts, differentiated directly (as GRPO does).
    """
    gradient = next(term for _, term in recipe.objective.terms() if isinstance(term, PolicyGradient))
    total: Objective = recipe.objective
    if kl:
        total = total + kl * KLPenalty(aggregate=gradient.aggregate)
    if entropy:
        total = total + entropy * Bonus(aggregate=gradient.aggregate)
    return recipe.but(objective=total)


def sft() -> Recipe:
    """Supervised fine-tuning: maximum likelihood of demonstrations.

        L = - TOK( log pi(y_n) )                                 over demonstrations only

    A policy gradient with advantage 1 whose denominator is the policy itself (arXiv 2509.04419, table 1).
    """  # fmt: skip
    return Recipe(objective=Likelihood())


def reinforce(*, group: int = 1, decay: float = 0.9, kl: float = 0.0, entropy: float = 0.0) -> Recipe:
    """REINFORCE (Williams 1992, eq. 11): the score function times reward minus a baseline.

        L = - SUM( (R_i - b) log pi(y_n) )       b = running mean of past batches' rewards: unbiased

    `decay`: of the running mean b; one controller turns it.
    """
    baseline = Constant(Knob("baseline", 0.0))
    objective = PolicyGradient(advantage=Normalised(center=baseline), aggregate=EpisodeSum())
    controllers = (RunningMean(knob="baseline", metric="reward", decay=decay),)
    recipe = Recipe(objective=objective, rollouts=RolloutSpec(group=group), controllers=controllers)
    return regularised(recipe, kl, entropy)


def rloo(*, group: int = 4, kl: float = 0.0, entropy: float = 0.0) -> Recipe:
    """REINFORCE leave-one-out (arXiv 2402.14740, eq. 6): the other answers to the prompt are the baseline.

    A_i = R_i - mean_{j != i} R_j = G / (G - 1) (R_i - mean_g R)          unbiased
    L   = - SUM( A_i log pi(y_n) )           R_i <- R_i - kl * sum_n log(pi / ref) inside the reward
    """
    outcome = ShapedOutcome(kl) if kl else Outcome()
    advantage = Normalised(center=LeaveOneOut(), outcome=outcome)
    objective = PolicyGradient(advantage=advantage, aggregate=EpisodeSum())
    return regularised(Recipe(objective=objective, rollouts=RolloutSpec(group=group)), 0.0, entropy)


def grpo(*, group: int = 8, clip: float = 0.2, eps: float = 1e-6, kl: float = 0.0, entropy: float = 0.0,
         epochs: int = 1, minibatches: int = 1) -> Recipe:  # fmt: skip
    """Group-relative policy optimisation (arXiv 2402.03300, eq. 3 and 4): the group is the baseline, no critic.

        A_i = (R_i - mean_g R) / (std_g R + eps)
        L   = - SEQ( min(r_n A_i, clip(r_n, 1 - clip, 1 + clip) A_i) ) + kl * SEQ( k3(pi || ref) )

    Departs from the paper: eps; group 8 (paper 64) and kl 0 (paper 0.04), as later work does. r is to the behaviour
    policy, so replayed rows need nothing else. Known bias: 1 / T_i favours short right answers (see `dr_grpo`).
    """
    objective = PolicyGradient(
        advantage=Normalised(scale=GroupStd(eps)),
        weight=TokenRatio(),
        mask=ClipMask(clip, clip),
        aggregate=EpisodeMean(),
    )
    recipe = Recipe(objective=objective, rollouts=RolloutSpec(group=group), epochs=epochs, minibatches=minibatches)
    return regularised(recipe, kl, entropy)


def dr_grpo(*, group: int = 8, clip: float = 0.2, budget: float = 1024, kl: float = 0.0, entropy: float = 0.0,
            epochs: int = 1, minibatches: int = 1) -> Recipe:  # fmt: skip
    """Dr. GRPO (arXiv 2503.20783): GRPO without its two biases, the std and the length of the answer.

        A_i = R_i - mean_g R                     L = - CONST( min(r_n A_i, clip(r_n) A_i) )

    `budget`: the tokens that every episode's sum is divided by, a constant (paper: the generation limit, 3000).
    """
    base = grpo(group=group, clip=clip, epochs=epochs, minibatches=minibatches)
    return regularised(base.but(advantage=Normalised(), aggregate=Budget(budget)), kl, entropy)


def dapo(*, group: int = 16, clip_low: float = 0.2, clip_high: float = 0.28, refill: int = 10, overlong: float = 0.2,
         eps: float = 1e-6, kl: float = 0.0, entropy: float = 0.0, minibatches: int = 4) -> Recipe:  # fmt: skip
    """DAPO (arXiv 2503.14476, eq. 8-13): clip-higher, token mean, dynamic sampling, soft overlong punishment.

        L = - TOK( min(r_n A_i, clip(r_n, 1 - clip_low, 1 + clip_high) A_i) )       A as in GRPO
        groups whose answers are all right or all wrong are sampled anew, up to `refill` rounds
        R_i <- R_i + length penalty: 0, then linearly to -1 over the last `overlong` share of the limit

    Departs from the paper: 4 updates per batch (paper 16, of 512 prompts each).
    """
    relabel = (SoftOverlong(overlong),) if overlong else ()
    base = grpo(group=group, eps=eps, minibatches=minibatches).but(
        mask=ClipMask(clip_low, clip_high), aggregate=TokenMean(),
        keep=MixedOutcomes(), refill=refill, relabel=relabel,
    )  # fmt: skip
    return regularised(base, kl, entropy)


def gspo(*, group: int = 8, clip_low: float = 3e-4, clip_high: float = 4e-4, eps: float = 1e-6, kl: float = 0.0,
         entropy: float = 0.0, minibatches: int = 4) -> Recipe:  # fmt: skip
    """Group sequence policy optimisation (arXiv 2507.18071, eq. 5-7): one ratio per answer, clipped as one.

    s_i = exp( mean_n log r_n )              L = - SEQ( min(s_i A_i, clip(s_i) A_i) )
    """
    base = grpo(group=group, eps=eps, minibatches=minibatches)
    ratio = GeometricRatio()
    return regularised(base.but(weight=ratio, mask=ClipMask(clip_low, clip_high, ratio)), kl, entropy)


def cispo(*, group: int = 8, cap: float = 5.0, eps: float = 1e-6, kl: float = 0.0, entropy: float = 0.0,
          minibatches: int = 4) -> Recipe:  # fmt: skip
    """CISPO (arXiv 2506.13585, eq. 4 and 5): the importance weight is clipped, no token loses its gradient.

        L = - TOK( sg(min(r_n, cap)) A_i log pi(y_n) )                              A as in GRPO

    The paper bounds the weight from above only and states no number: cap 5 is ScaleRL's (arXiv 2510.13786).
    """
    base = grpo(group=group, eps=eps, minibatches=minibatches)
    objective = PolicyGradient(
        advantage=Normalised(scale=GroupStd(eps)),
        weight=Truncated(TokenRatio(), high=cap),
        aggregate=TokenMean(),
    )
    return regularised(base.but(objective=objective), kl, entropy)


def ppo(*, group: int = 1, clip: float = 0.2, gamma: float = 1.0, lam: float = 0.95, value: float = 0.1,
        value_clip: float = 0.2, kl: float = 0.0, entropy: float = 0.0, epochs: int = 4,
        minibatches: int = 1) -> Recipe:  # fmt: skip
    """Proximal policy optimisation (arXiv 1707.06347, eq. 7 and 9) with a critic, as in RLHF (arXiv 2203.02155).

        A_n = sum_k (gamma lam)^k delta_{n+k},   delta_n = R_n + gamma V(n+1) - V(n), whitened over the batch
        L   = - TOK( min(r_n A_n, clip(r_n) A_n) ) + value * TOK( (V - (A + V_old))^2 / 2, clipped around V_old )

    gamma, value and value_clip are those of RLHF (in environments: gamma .99, value 1 without clip, 10 epochs); 0 switches
    the value term or its clip off.
    """
    gradient = PolicyGradient(
        advantage=GeneralisedAdvantage(gamma, lam, whiten=BatchStd()),
        weight=TokenRatio(),
        mask=ClipMask(clip, clip),
        aggregate=TokenMean(),
    )
    critic = ValueRegression(target=ValueTarget(gamma, lam), clip=value_clip or None)
    objective = gradient + value * critic if value else gradient
    recipe = Recipe(objective=objective, rollouts=RolloutSpec(group=group), control=ControlSpec(gamma=gamma),
                    epochs=epochs, minibatches=minibatches)  # fmt: skip
    return regularised(recipe, kl, entropy)


_TESTS = "tests/methods/test_policy_gradients.py::"


def _baseline(slug: str, build: Callable[..., Recipe], title: str, paper: str, equation: str, *tests: str,
              environments: Callable[..., Recipe] | None = None) -> Method:  # fmt: skip
    return Method(slug=slug, build=build, family="llm-rl", title=title, paper=paper, equation=equation,
                  identity_tests=tuple(_TESTS + t for t in tests), environments=environments)  # fmt: skip


METHODS = (
    _baseline("sft", sft, "Supervised fine-tuning", "arXiv 2509.04419, table 1", "L = -TOK(log pi) on demonstrations",
              "test_sft_is_cross_entropy"),
    _baseline("reinforce", reinforce, "REINFORCE with a running baseline", "Williams 1992, eq. 11",
              "L = -SUM((R - b) log pi),  b = running mean", "test_reinforce_expectation_is_the_policy_gradient",
              "test_sequences_have_the_exact_policy_gradient_in_expectation",
              "test_the_baseline_of_reinforce_is_subtracted_and_turned", environments=reinforce_control),
    _baseline("rloo", rloo, "REINFORCE leave-one-out", "arXiv 2402.14740, eq. 6", "L = -SUM((R_i - mean_{j != i} R_j) log pi)",
              "test_rloo_is_scaled_group_centring", "test_rloo_expectation_is_the_policy_gradient",
              "test_sequences_have_the_exact_policy_gradient_in_expectation", "test_the_kl_of_rloo_is_in_the_reward"),
    _baseline("grpo", grpo, "Group relative policy optimization", "arXiv 2402.03300, eq. 3 and 4",
              "L = -SEQ(min(r A, clip(r) A)) + kl SEQ(k3(pi || ref)),  A = (R - mean_g) / (std_g + eps)",
              "test_log_form_has_the_gradient_of_the_ratio_form", "test_on_policy_all_are_reinforce_up_to_constants",
              "test_the_kl_term_pulls_to_the_reference", "test_the_entropy_term_is_a_reward"),
    _baseline("dr-grpo", dr_grpo, "Dr. GRPO", "arXiv 2503.20783", "L = -CONST(min(r A, clip(r) A)),  A = R - mean_g",
              "test_on_policy_all_are_reinforce_up_to_constants",
              "test_group_mean_expectation_is_shrunk_by_g_minus_one_over_g"),
    _baseline("dapo-bytedance", dapo, "DAPO", "arXiv 2503.14476, eq. 8 to 13",
              "L = -TOK(min(r A, clip(r, 1 - low, 1 + high) A)), dynamic sampling, soft overlong punishment",
              "test_log_form_has_the_gradient_of_the_ratio_form", "test_dapo_counts_tokens", "test_soft_overlong_punishment",
              "test_dapo_samples_anew_and_punishes_length"),
    _baseline("gspo", gspo, "Group sequence policy optimization", "arXiv 2507.18071, eq. 5 to 7",
              "L = -SEQ(min(s A, clip(s) A)),  s = exp mean log r", "test_gspo_gradient_is_that_of_its_objective"),
    _baseline("cispo", cispo, "CISPO", "arXiv 2506.13585, eq. 4 and 5", "L = -TOK(sg(min(r, cap)) A log pi)",
              "test_cispo_caps_the_weight_and_keeps_the_gradient"),
    _baseline("ppo", ppo, "Proximal policy optimization with a critic", "arXiv 1707.06347, eq. 7 and 9",
              "L = -TOK(min(r A, clip(r) A)) + value TOK(clipped (V - return)^2 / 2),  A = GAE",
              "test_ppo_without_a_critic_is_reinforce", "test_on_policy_all_are_reinforce_up_to_constants",
              "test_ppo_whitens_over_steps", "test_the_critic_of_ppo_regresses_to_the_return", "test_gae_by_hand",
              environments=partial(ppo, gamma=0.99, value=1.0, value_clip=0.0, epochs=10)),
)  # fmt: skip
