"""Which rollouts and tokens of a group count, and how much: five changes to one slot of GRPO or PPO each.

               what changes        to
bapo-balanced  mask                clip bounds searched per batch, until what is raised balances what is lowered
d3s            counted             rollouts whose advantages vary most, then tokens with the largest |A| H
adora          weight              r * a factor of the group, by whether longer answers or hard prompts pay
lite-ppo       advantage           mean of the group, std of the batch; a matrix of all such switches
pf-ppo         weight              r * N * share by the rank of the reward in its group (PPO with a critic)

Symbols as in `policy_gradients`; H_n the entropy of the policy at step n.
"""

from __future__ import annotations

import math

from torch import Tensor

from unipo import functional as F
from unipo.methods.method import Method, choice
from unipo.methods.policy_gradients import grpo, ppo, regularised
from unipo.objectives import (
    ActiveBalance,
    AllOf,
    AnyOf,
    BalancedClipMask,
    BatchMean,
    BatchStd,
    Bounded,
    Budget,
    Center,
    ClipMask,
    DualClipMask,
    EpisodeMean,
    EpisodeSum,
    GeneralisedAdvantage,
    GroupMean,
    GroupStd,
    GroupWeight,
    Knob,
    LargestScores,
    LessDivergence,
    LongerIsBetter,
    MeanSoFar,
    MostVaried,
    Normalised,
    One,
    PolicyGradient,
    Product,
    RankWeight,
    SampledProbability,
    Scale,
    SolvedAtMost,
    StdSoFar,
    StepReward,
    TokenMean,
    TokenRatio,
    ValueBalance,
    ValueRegression,
    ValueTarget,
    Weight,
    WeightProduct,
)
from unipo.recipe import Recipe
from unipo.sources.controllers import RunRamp, SoFar
from unipo.sources.text.filters import GroupFilter, MaskTruncated, SuccessBetween

Pair = tuple[float, float]

# ---- BAPO ------------------------------------------------------------------------------------------------------------
BALANCES = {"active": ActiveBalance(), "value": ValueBalance()}
ORDERS = {"low": (0, 1), "high": (1, 0)}
COUNTED_AS: dict[str, Weight] = {"one": One(), "probability": SampledProbability()}


def bapo(*, group: int = 8, low: Pair = (0.6, 0.8), high: Pair = (1.2, 2.0), step: Pair = (0.05, 0.05),
         target: float = 1.0, balance: str = "active", first: str = "low", token_weight: str = "one", dual_clip: float = 3.0,
         eps: float = 1e-6, kl: float = 0.0, entropy: float = 0.0, epochs: int = 1,
         minibatches: int = 1) -> Recipe:  # fmt: skip
    """Balanced policy optimisation (arXiv 2510.18927): the clip opens until positive samples weigh as much as negative ones.

        L  = - TOK( min(r_n A_i, clip(r_n, c_low, c_high) A_i) ), dual clip where A < 0            A as in GRPO
        S+ = sum_{A > 0, r <= c_high} r A              S- = sum_{A < 0, c_low <= r <= dual} r |A|
        c_low from low[0] to low[1], then c_high from high[0] to high[1], in steps, until S+ >= target * S-

    `balance` value sums min(r, c_high) A and max(r, c_low) |A| instead, as the code does: raising c_low then raises S-.
    The paper raises c_high first (`first` high) and counts tokens by their rollout probability (`token_weight`
    probability); its rho0 = S+ / (S+ + S-) is target / (1 + target). Bounds are searched over the whole minibatch, in
    metrics as clip_low, clip_high. Departs from the code: log-ratios are clamped to 30 as everywhere (20).
    """
    mask = BalancedClipMask(start=(low[0], high[0]), limit=(low[1], high[1]), step=step, target=target,
                            order=choice(ORDERS, "first", first), dual=dual_clip, balance=choice(BALANCES, "balance", balance),
                            token_weight=choice(COUNTED_AS, "token_weight", token_weight))  # fmt: skip
    base = grpo(group=group, eps=eps, epochs=epochs, minibatches=minibatches)
    return regularised(base.but(mask=mask, aggregate=TokenMean()), kl, entropy)


# ---- D3S -------------------------------------------------------------------------------------------------------------
def d3s(*, group: int = 8, per_group: float = 1.0, rollouts: Pair = (0.25, 0.5), tokens: Pair = (0.2, 0.6),
        clip: float = 0.2, eps: float = 1e-6, kl: float = 0.0, entropy: float = 0.0, epochs: int = 1,
        minibatches: int = 1) -> Recipe:  # fmt: skip
    """Dynamic dual-level down-sampling (arXiv 2509.22115): the rollouts that differ most, then the tokens that matter most.

        A_i on all rollouts, as in GRPO                                        not normalised again afterwards
        1  of each group the share `per_group`, of those N_s of all rollouts: the subsets of largest Var(A)
        2  of their tokens, pooled, the share K with the largest |A_i| H_n
        L = - TOK( min(r_n A_i, clip(r_n) A_i) )                               over kept tokens, by their number

    `rollouts`: N_s at the start and the end of the run, `tokens`: K likewise, linear in between. The paper's numbers are not
    public; these use 16 % of GRPO's tokens. rollouts (1, 1) and per_group < 1: D3S-I. A batch is a minibatch where asked.
    """
    chosen = MostVaried(Knob("rollout_share", rollouts[0]), among=MostVaried(per_group, within="group"))
    counted = LargestScores(Knob("token_share", tokens[0]), among=chosen)
    base = grpo(group=group, clip=clip, eps=eps, epochs=epochs, minibatches=minibatches)
    controllers = (RunRamp(knob="rollout_share", value=rollouts[0], final=rollouts[1]),
                   RunRamp(knob="token_share", value=tokens[0], final=tokens[1]))  # fmt: skip
    recipe = base.but(counted=counted, aggregate=TokenMean()).but(controllers=controllers)
    return regularised(recipe, kl, entropy)


# ---- ADORA -----------------------------------------------------------------------------------------------------------
def adora(*, group: int = 8, rule: str = "amplify", criteria: str = "and", factor: float = 2.0, damping: float = 0.1,
          tau: float = 0.5, right: float = 0.5, longest: float = math.inf, clip: float = 0.2, eps: float = 1e-6,
          kl: float = 0.0, entropy: float = 0.0, epochs: int = 1, minibatches: int = 1) -> Recipe:  # fmt: skip
    """ADORA (arXiv 2602.10019): groups count more where longer answers pay, or where the prompt is hard.

        LA = longest right answer > mean length of wrong ones (not cut, shorter than `longest`)
        DA = share of right answers <= tau                             right: R > `right`
        L  = - SEQ( w_g min(r_n A_i, clip(r_n) A_i) )                  A as in GRPO

    `rule`: amplify (the paper, language models: w = factor where LA `criteria` DA, else 1) | attenuate (the paper, vision:
    w = damping where not LA) | verl | openrlhf (the public codes: damping where not LA; a group without right answers is
    damped in verl alone, one whose wrong answers were all cut in openrlhf alone). `criteria`: and | or | length |
    difficulty; the paper does not say. Where LA is undefined the paper's rules give w = 1.
    """

    def longer(unsolved: bool, unfailed: bool) -> LongerIsBetter:
        return LongerIsBetter(right, longest, unsolved, unfailed)

    length, hard = longer(False, False), SolvedAtMost(tau, right)
    met = {"and": AllOf((length, hard)), "or": AnyOf((length, hard)), "length": length, "difficulty": hard}
    weights = {
        "amplify": GroupWeight(choice(met, "criteria", criteria), holds=factor),
        "attenuate": GroupWeight(longer(True, True), fails=damping),
        "verl": GroupWeight(longer(False, True), fails=damping),
        "openrlhf": GroupWeight(longer(True, False), fails=damping),
    }
    base = grpo(group=group, clip=clip, eps=eps, epochs=epochs, minibatches=minibatches)
    return regularised(base.but(weight=WeightProduct((TokenRatio(), choice(weights, "rule", rule)))), kl, entropy)


# ---- Lite PPO --------------------------------------------------------------------------------------------------------
CENTERS = {"none": Center(), "group": GroupMean(), "batch": BatchMean(), "running": MeanSoFar()}


def lite_ppo(*, group: int = 8, mean: str = "group", std: str = "batch", aggregate: str = "token-mean",
             clip_low: float = 0.2, clip_high: float = 0.2, dual_clip: float = 3.0, limit: float = 2.0,
             overlong: str = "keep", difficulty: Pair | None = None, budget: float = 1024.0, eps: float = 1e-6,
             kl: float = 0.0, entropy: float = 0.0, epochs: int = 1, minibatches: int = 1) -> Recipe:  # fmt: skip
    """Lite PPO (arXiv 2508.08221): PPO's clip without a critic, with group mean, batch std and token mean.

        A_i = (R_i - mean_g R) / (std_batch R + eps), held in [-limit, limit]          std of the rewards as they are
        L   = - TOK( min(r_n A_i, clip(r_n, 1 - clip_low, 1 + clip_high) A_i) ), dual clip where A < 0

    The paper's matrix of tricks: `mean` and `std` none | group | batch | running (all rewards so far, these included);
    `aggregate` token-mean | seq-mean-token-mean | seq-mean-token-sum | seq-mean-token-sum-norm (by `budget`); `overlong`
    keep | mask (cut answers leave the loss); `difficulty` keeps prompts whose mean reward lies between the two. limit inf:
    no bound. The std is of the minibatch where there are several. ROLL's documentation states no dual clip: 3 is assumed.
    """
    scales = {"none": Scale(), "group": GroupStd(eps), "batch": BatchStd(eps), "running": StdSoFar(eps=eps)}
    aggregates = {"token-mean": TokenMean(), "seq-mean-token-mean": EpisodeMean(), "seq-mean-token-sum": EpisodeSum(),
                  "seq-mean-token-sum-norm": Budget(budget)}  # fmt: skip
    objective = PolicyGradient(
        advantage=Bounded(Normalised(choice(CENTERS, "mean", mean), choice(scales, "std", std)), limit),
        weight=TokenRatio(),
        mask=Product((ClipMask(clip_low, clip_high), DualClipMask(dual_clip))),
        aggregate=choice(aggregates, "aggregate", aggregate),
    )
    recipe = grpo(group=group, epochs=epochs, minibatches=minibatches).but(
        objective=objective,
        keep=SuccessBetween(low=difficulty[0], high=difficulty[1]) if difficulty else GroupFilter(),
        relabel=choice({"keep": (), "mask": (MaskTruncated(),)}, "overlong", overlong),
        controllers=_SO_FAR if "running" in (mean, std) else (),
    )
    return regularised(recipe, kl, entropy)


_SO_FAR = tuple(SoFar(knob=f"past_{of}", of=of) for of in ("count", "mean", "std"))


# ---- PF-PPO ----------------------------------------------------------------------------------------------------------
FILTERS = {"bon": (1.0, 0.0, 0.0), "br": (0.5, 0.5, 0.0), "bw": (0.5, 0.0, 0.5)}
"""Shares of the best answer of a group, of all others together, and of the worst."""
RANK_WEIGHTS: dict[str, Weight] = {"none": One()} | {name: RankWeight(*shares) for name, shares in FILTERS.items()}


def pf_ppo(*, group: int = 5, filter: str = "br", clip: float = 0.2, gamma: float = 1.0, lam: float = 0.95,
           value: float = 0.1, value_clip: float = 0.2, reward_kl: float = 0.01, kl: float = 0.0, entropy: float = 0.0,
           epochs: int = 1, minibatches: int = 1) -> Recipe:  # fmt: skip
    """Policy filtration (arXiv 2409.06957): PPO on the answers whose reward can be believed, the best and another.

        w = N * share of the answer by the rank of its reward among the N of its prompt, 1 in the mean
        L = - SEQ( w min(r_n A_n, clip(r_n) A_n) ) + value * SEQ( w (V - (A + V_old))^2 / 2, clipped )

    `filter`: bon (all to the best) | br (half to the best, half to the others evenly) | bw (half to the best, half to the
    worst) | none (PPO on all N answers). A is GAE of R - `reward_kl` * log( mu / ref ), whitened over all answers, before any is
    weighed; answers are ranked by R. This is the expectation of drawing N answers per prompt by their shares (the paper's
    resampling), exact for means over episodes; so SEQ where `ppo` has TOK. `kl`: a penalty of the loss beside it.
    Which filter: the one with the largest `filter_r2` on answers whose actual score is known.
    """
    paid = LessDivergence(reward_kl) if reward_kl else StepReward()
    rank = choice(RANK_WEIGHTS, "filter", filter)
    base = ppo(group=group, epochs=epochs, minibatches=minibatches)
    gradient = PolicyGradient(
        advantage=GeneralisedAdvantage(gamma, lam, BatchStd(), paid),
        weight=WeightProduct((TokenRatio(), rank)),
        mask=ClipMask(clip, clip),
        aggregate=EpisodeMean(),
    )
    critic = ValueRegression(
        target=ValueTarget(gamma, lam, paid), weight=rank, clip=value_clip or None, aggregate=EpisodeMean()
    )
    return regularised(base.but(objective=gradient + value * critic if value else gradient, control=None), kl, entropy)


def filter_r2(actual: Tensor, reward: Tensor, index: Tensor, n: int, filter: str) -> float:
    """R^2 of actual score ~ reward, both [E] in `n` groups by `index`, over what a filter of `pf_ppo` leaves."""
    if filter == "none":
        return float(F.weighted_r2(actual, reward, reward.new_ones(len(reward))))
    return float(F.weighted_r2(actual, reward, F.rank_shares(reward, index, n, *choice(FILTERS, "filter", filter))))


_TESTS = "tests/methods/test_group_variants.py::"


def _tests(*names: str) -> tuple[str, ...]:
    return tuple(_TESTS + n for n in names)


METHODS = (
    Method(
        slug="bapo-balanced", build=bapo, row=57, family="llm-rl", paper="arXiv 2510.18927",
        title="BAPO: Stabilizing Off-Policy Reinforcement Learning for LLMs via Balanced Policy Optimization with Adaptive "
              "Clipping",
        equation="L = -TOK(clip(r, c_low, c_high) A), dual clip;  c_low, then c_high, raised until\n"
                 "sum_{A > 0, r <= c_high} r A >= target sum_{A < 0, r >= c_low} r |A|",
        claim="on stale rollouts GRPO's fixed clip loses entropy; BAPO keeps more of it and a higher reward",
        identity_tests=_tests("test_fixed_bounds_are_the_fixed_clip", "test_target_zero_leaves_the_bounds_at_their_start",
                              "test_on_policy_any_bounds_are_grpo", "test_bounds_are_monotone_and_stay_inside",
                              "test_bounds_do_not_depend_on_the_scale_of_advantages", "test_bounds_by_hand",
                              "test_value_sums_rise_with_the_low_bound", "test_bounds_are_of_the_whole_batch"),
    ),
    Method(
        slug="d3s", build=d3s, row=140, family="llm-rl", paper="arXiv 2509.22115",
        title="Learning More with Less: A Dynamic Dual-Level Down-Sampling Framework for Efficient Policy Optimization",
        equation="rollouts of largest Var(A), per group and pooled; of their tokens the K % with the largest |A| H\n"
                 "L = -TOK(min(r A, clip(r) A)) over kept tokens;  both shares grow linearly",
        claim="with few tokens per update it learns more per token than GRPO; a fixed small selection is faster early and "
              "overtaken late",
        identity_tests=_tests("test_d3s_with_everything_is_grpo_by_token_mean", "test_selection_ignores_the_scale_of_advantages",
                              "test_tokens_without_advantage_are_dropped_first", "test_constant_entropy_selects_by_advantage",
                              "test_max_variance_subset_is_the_best_of_all", "test_the_unbiased_variance_of_the_best_subset",
                              "test_binary_rewards_keep_the_minority", "test_the_schedule_of_d3s",
                              "test_kept_tokens_are_the_denominator", "test_max_variance_of_rewards_is_that_of_advantages"),
    ),
    Method(
        slug="adora", build=adora, row=132, family="llm-rl", paper="arXiv 2602.10019",
        title="ADORA: Training Reasoning Models with Dynamic Advantage Estimation on Reinforcement Learning",
        equation="A_i = w_g z-score;  w_g = 2 where the longest right answer exceeds the mean wrong one and p <= 1/2, else 1",
        claim="where right answers need more steps, ADORA by length keeps answers growing and beats GRPO at equal steps",
        identity_tests=_tests("test_weight_one_is_grpo", "test_group_sums_stay_zero", "test_the_two_public_codes",
                              "test_only_the_ratio_of_weights_matters", "test_conditions_ignore_the_scale_of_rewards",
                              "test_difficulty_flips_at_tau", "test_undefined_lengths_are_neutral",
                              "test_criteria_join"),
    ),
    Method(
        slug="lite-ppo", build=lite_ppo, row=159, family="evaluation", paper="arXiv 2508.08221",
        title="Part I: Tricks or Traps? A Deep Dive into RL for LLM Reasoning",
        equation="A_i = clamp((R_i - mean_g) / (std_batch + eps), +-2);  L = -TOK(min(r A, clip(r) A)), dual clip",
        claim="group mean, batch std and token mean alone are at least as good as GRPO and DAPO",
        identity_tests=_tests("test_one_prompt_is_grpo", "test_without_std_it_is_dr_grpo", "test_affine_rewards",
                              "test_scale_per_prompt_against_grpo", "test_equal_lengths_make_aggregates_agree",
                              "test_running_moments_are_those_of_everything_seen", "test_equal_rewards_have_no_advantage",
                              "test_advantages_are_bounded"),
    ),
    Method(
        slug="pf-ppo", build=pf_ppo, row=191, family="llm-rl", paper="arXiv 2409.06957",
        title="Policy Filtration in RLHF to Fine-Tune LLM for Code Generation",
        equation="L = -SEQ(N w(rank) min(r A, clip(r) A)) + value SEQ(N w (V - return)^2 / 2);  w: BoN | BR | BW",
        claim="with a reward model that errs most in the middle, BR and BW beat PPO on all answers, and BoN is worst; R^2 "
              "ranks the filters",
        identity_tests=_tests("test_uniform_shares_are_ppo", "test_two_answers_make_br_bw_and_ppo_one",
                              "test_best_of_n_has_no_negative_advantage", "test_resampling_in_expectation",
                              "test_resampling_is_not_exact_for_token_means", "test_r2_without_noise_is_one",
                              "test_whitening_comes_before_the_filter", "test_shares_by_rank",
                              "test_the_divergence_is_in_the_reward"),
    ),
)  # fmt: skip
