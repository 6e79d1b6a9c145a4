"""Losses on log-ratios and scores of whole answers, where others have a policy gradient.

With rho_i = log( pi(y_i) / to(y_i) ), s_i = mean_n log pi(y_n), all per answer, over the answers i to one prompt:

drpo-decoupled    s         right answers share +1, wrong ones -1: two softmaxes          squared hinge on KL(old || pi)
reg-grpo          rho/old   ( z(R) - z(rho) )^2                                           KL(pi || ref)
dapo-direct       rho/ref   ( A / beta - rho )^2 / 2                                      inside the target
oorl-gepo         rho/ref   -log sigmoid( beta (mean_winners - mean_losers) ) + Var       on top of a clipped policy gradient
copg, rec         rho       pairs of ( R - beta rho )                                     (`off_policy`)

A target R / beta with a free constant per prompt makes the quadratics one (table in `unipo.objectives.scores`).
"""

from __future__ import annotations

from unipo.methods.method import Method
from unipo.objectives import (
    AffineOutcome,
    BatchStd,
    Brevity,
    Center,
    ClipMask,
    Contrast,
    EpisodeMean,
    GroupMean,
    GroupSquare,
    GroupStd,
    GroupSum,
    KLPenalty,
    LogRatioScore,
    Marked,
    Objective,
    Outcome,
    Pairwise,
    PolicyGradient,
    ScoreRegression,
    ShapedReturn,
    SmoothStd,
    Spread,
    Standardised,
    TokenMean,
    TokenRatio,
    TrustRegion,
    Whitened,
    Zero,
    pairs,
)
from unipo.recipe import Recipe, RolloutSpec, Snapshot
from unipo.sources.companions.step_critic import FittedCritic
from unipo.sources.stages.branching import After, StepCandidates
from unipo.sources.stages.difficulty import HelpInProportion
from unipo.sources.text.filters import DistinctAdvantages, RewardGap


def drpo(*, group: int = 8, temper: float = 0.1, tau: float = 10.0, longest: float = 1024, strength: float = 1e3,
         limit: float = 1e-4, epochs: int = 1, minibatches: int = 1) -> Recipe:  # fmt: skip
    """DRPO (arXiv 2510.04474): how long an answer is decides among right answers only, never right against wrong.

        J = sum_right w_i s_i - tau log mean_wrong exp(s_j / tau),     w = softmax over right( (1 - T_i / longest) / temper )
        L = - mean over prompts of J + strength / 2 * max( KL(old || pi) - limit, 0 )^2

    Written by its gradient: right answers +w_i, wrong ones -softmax( s_j / tau ), on grad s_i, so that no right answer is
    ever pushed down. Prompts all right or all wrong add 0 and count. KL: token mean of log old - log pi over all rollouts
    (k1). `temper` (the paper's lambda) inf: DisCO. `longest`: the longest answer allowed (paper: 8192). Any other second
    reward: `.but(advantage=Contrast(...))`.
    """  # fmt: skip
    gradient = PolicyGradient(
        advantage=Contrast(preference=Brevity(longest), temper=temper, tau=tau), aggregate=GroupSum()
    )
    region = TrustRegion(strength=strength, limit=limit)
    spec = RolloutSpec(group=group)
    return Recipe(objective=gradient + region, rollouts=spec, epochs=epochs, minibatches=minibatches)


def reg_grpo(*, group: int = 8, eps: float = 2.0, kl: float = 0.1, hints: float = 0.0, noise: float = 0.0, epochs: int = 1,
             minibatches: int = 1) -> Recipe:  # fmt: skip
    """Reg-GRPO of DeepVideo-R1 (arXiv 2506.07464): the z-score of the log-ratio is regressed to that of the reward.

        L = mean over groups of mean_i ( z(R)_i - (rho_i - mean rho) / sqrt(var rho + eps^2) )^2 + kl * SEQ( k3(pi || ref) )

    rho = log( pi / old ) of the answer, population statistics. No ratio, clip or min. For pi* = old exp(R / lambda) / Z both
    z-scores are equal: Z and lambda cancel. Departs from the paper: `eps`, which it has not: with one update per batch
    rho is 0 and eps decides the size of the step (2: that of group-relative REINFORCE). Groups of equal rewards are left out and
    count. Without z-scores: `rebel`. `hints` 0.5 (the paper's augmentation of hard prompts; needs demonstrations in the
    prompts' data): groups that earn less than recent ones are sampled anew behind at most that share of the demonstration, as
    prompts of their own; `noise`: groups that earn more, behind up to that share of their prompt's tokens out of order. The
    paper's hint is cut from a trace of the model that has seen the answer, and its noise is on the frames of the video.
    """  # fmt: skip
    term: Objective = 2.0 * ScoreRegression(
        target=Standardised(scale=GroupStd(eps=0.0, ddof=0)),
        score=LogRatioScore(1.0, "old"),
        center=GroupMean(),
        scale=SmoothStd(eps),
        mask=Spread(),
    )
    if kl:
        term = term + kl * KLPenalty(aggregate=EpisodeMean())
    spec = RolloutSpec(group=group, augment=(HelpInProportion(most=hints, noise=noise),) if hints or noise else ())
    return Recipe(objective=term, rollouts=spec, epochs=epochs, minibatches=minibatches)


def rebel(*, group: int = 8, beta: float = 0.1, epochs: int = 1, minibatches: int = 1) -> Recipe:
    """REBEL (arXiv 2404.16767): differences of log-ratios to the old policy are regressed to differences of rewards.

    a_i = R_i - beta * log( pi(y_i) / old(y_i) )          L = mean over groups, pairs of (a_i - a_j)^2 / (2 beta)

    `copg` with the policy before the update as reference; beta is the paper's 1 / eta.
    """
    objective = GroupSquare(beta=beta, to="old", outcome=Outcome())
    return Recipe(objective=objective, rollouts=RolloutSpec(group=group), epochs=epochs, minibatches=minibatches)


CONSTANTS = {"fixed": Center(), "free": GroupMean()}


def dapo_direct(*, group: int = 32, beta: float = 0.01, gap: float = 0.1, constant: str = "fixed", solutions: int = 6,
                completions: int = 16, values: int = 16, critic: int = 0, critic_rate: float = 1e-3, boundary: str = "\\n",
                renew: int = 0) -> Recipe:  # fmt: skip
    """Direct advantage-based policy optimisation (arXiv 2412.18279): regress the log-ratio of a step to its advantage.

        L = mean over (s, a) of ( A(s, a) / beta - log( pi(a | s) / ref(a | s) ) )^2 / 2,    A = q(s, a) - mean over candidates

    States are prefixes of up to `solutions` of a prompt's `group` answers, half of them right, cut behind `boundary`; the
    candidates of a state are the first steps of `completions` answers behind it, q the mean reward of `values` further ones
    (`StepCandidates`). Equal candidates are merged after A is taken, states whose values are less than `gap` apart dropped.
    Log-ratios are sums over the step's tokens. `constant` free: the best one per state, whose minimiser is ref exp(A / beta) / Z.
    `critic`: q by a critic, fitted to the states' success rates by so many updates, as in the paper; 0: the Monte-Carlo value
    itself. Departs from the paper: data are sampled (and the critic fitted) by the current policy every step, the reference is
    the policy of the start, or of the last `renew` steps (iterative DAPO).
    """
    fitted = FittedCritic(critic, critic_rate) if critic else None
    candidates = StepCandidates(After(boundary.replace("\\n", "\n")), solutions, completions, values, fitted)
    term = ScoreRegression(
        target=AffineOutcome(1.0 / beta, 0.0), score=LogRatioScore(1.0), center=CONSTANTS[constant], per="episode"
    )
    spec = RolloutSpec(group=group, augment=(candidates,), keep=RewardGap(least=gap), relabel=(DistinctAdvantages(),))
    return Recipe(objective=term, rollouts=spec, snapshots={"reference": Snapshot(every=renew)} if renew else {})


def gepo(*, beta: float = 0.1, spread: float = 1.0) -> Recipe:
    """Group equivalent preferences (arXiv 2505.12723): winners over losers by their means, and winners alike.

        h(y) = log( pi(y) / ref(y) )
        L    = - log sigmoid( beta (mean_winners h - mean_losers h) ) + spread * Var_winners( h )       mean over groups

    One winner and one loser: DPO.
    """
    winners = pairs & Marked("chosen")
    alike = ScoreRegression(target=Zero(), score=LogRatioScore(1.0), center=GroupMean(), rows=winners, name="spread")
    return Recipe(objective=Pairwise(score=LogRatioScore(beta)) + 2.0 * spread * alike)


def oorl(*, group: int = 1, clip: float = 0.2, kl: float = 0.01, beta: float = 0.1, spread: float = 1.0,
         preference: float = 0.01) -> Recipe:  # fmt: skip
    """OORL (arXiv 2505.12723): on-policy rollouts by REINFORCE++, and groups of equivalent answers by GEPO.

        L    = - TOK( min(r A, clip(r) A) ) + preference * L_GEPO              (`gepo`, on preference groups: --pairs)
        A_n  = whitened over the batch of  R - kl * sum over m >= n of log( mu / ref )(y_m)

    Defaults of beta, kl, clip are ours: the paper gives none.
    """
    advantage = Whitened(ShapedReturn(kl), BatchStd(1e-8))
    gradient = PolicyGradient(
        advantage=advantage, weight=TokenRatio(), mask=ClipMask(clip, clip), aggregate=TokenMean()
    )
    return Recipe(objective=gradient, rollouts=RolloutSpec(group=group)) + preference * gepo(beta=beta, spread=spread)


_TESTS = "tests/methods/test_regressions.py::"


def _tests(*names: str) -> tuple[str, ...]:
    return tuple(_TESTS + n for n in names)


METHODS = (
    Method(
        slug="drpo-decoupled", build=drpo, row=8, family="llm-rl", paper="arXiv 2510.04474",
        title="DRPO: Efficient Reasoning via Decoupled Reward Policy Optimization",
        equation="J = sum_right w_i s_i - tau log mean_wrong exp(s_j / tau),  w = softmax(l_i / temper),  s = mean log pi\n"
                 "L = -mean_prompts J + strength / 2 max(KL(old || pi) - limit, 0)^2",
        claim="at equal mean length DRPO is more accurate than GRPO with a length penalty inside the reward",
        identity_tests=_tests("test_drpo_is_the_gradient_of_its_objective", "test_drpo_without_temper_is_disco",
                              "test_one_right_answer_has_no_rival", "test_drpo_at_infinity_is_grpo_without_std",
                              "test_drpo_at_tau_zero_lowers_the_likeliest_wrong_answer",
                              "test_right_answers_are_never_lowered", "test_the_trust_region_is_free_at_first",
                              "test_a_length_penalty_lowers_a_long_right_answer"),
    ),
    Method(
        slug="reg-grpo", build=reg_grpo, row=98, family="llm-rl", paper="arXiv 2506.07464",
        title="DeepVideo-R1: Video Reinforcement Fine-Tuning via Difficulty-aware Regressive GRPO",
        equation="L = mean_i (z(R)_i - (rho_i - mean rho) / sqrt(var rho + eps^2))^2 + kl SEQ(k3),  rho = log(pi / old)",
        claim="with several inner epochs on a batch Reg-GRPO beats GRPO and the pairwise regression REBEL",
        identity_tests=_tests("test_reg_grpo_is_a_correlation", "test_reg_grpo_gradient", "test_reg_grpo_is_affine_invariant",
                              "test_reg_grpo_starts_as_group_reinforce", "test_reg_grpo_leaves_out_equal_rewards",
                              "test_one_quadratic"),
    ),
    Method(slug="rebel", build=rebel, family="llm-rl", title="REBEL: Reinforcement Learning via Regressing Relative Rewards",
           paper="arXiv 2404.16767", equation="mean_pairs (a_i - a_j)^2 / (2 beta),  a = R - beta log(pi / old)",
           identity_tests=_tests("test_one_quadratic")),
    Method(
        slug="dapo-direct-advantage", build=dapo_direct, row=72, family="llm-rl", paper="arXiv 2412.18279",
        title="Improving Multi-Step Reasoning Abilities of Large Language Models with Direct Advantage Policy Optimization",
        equation="L = mean_(s,a) (A(s, a) / beta - log(pi(a|s) / ref(a|s)))^2 / 2,  A = q - mean over candidates",
        claim="from the same completions, step advantages improve more than preferences or regressions on whole answers, and a "
              "second iteration improves again",
        identity_tests=_tests("test_direct_gradient_at_the_reference", "test_candidate_advantages_sum_to_zero",
                              "test_a_shifted_baseline_moves_the_minimiser_only", "test_direct_minimiser_improves",
                              "test_direct_minimiser_with_a_free_constant", "test_no_advantage_keeps_the_reference",
                              "test_one_quadratic"),
    ),
    Method(
        slug="oorl-gepo", build=oorl, row=49, family="preference", paper="arXiv 2505.12723",
        title="On-Policy Optimization with Group Equivalent Preference for Multi-Programming Language Understanding",
        equation="L = -TOK(min(r A, clip(r) A)) + w L_GEPO,  A = whitened return with the KL inside\n"
                 "L_GEPO = -log sigmoid(beta (mean_winners h - mean_losers h)) + spread Var_winners(h),  h = log(pi / ref)",
        claim="groups of equivalent answers beside RL narrow the spread of their log-probs and do not cost pass rate, where "
              "pairs do not narrow it",
        identity_tests=_tests("test_gepo_of_a_pair_is_dpo", "test_gepo_without_spread_is_dpo_on_means",
                              "test_gepo_at_the_reference", "test_gepo_ignores_a_constant_per_prompt",
                              "test_gepo_spread_gradient", "test_equal_winners_have_no_spread",
                              "test_oorl_advantage_by_hand"),
    ),
    Method(slug="gepo", build=gepo, family="preference", title="Group Equivalent Preference Optimization (OORL's loss on groups)",
           paper="arXiv 2505.12723", equation="-log sigmoid(beta (mean_winners h - mean_losers h)) + spread Var_winners(h)",
           identity_tests=_tests("test_gepo_of_a_pair_is_dpo", "test_gepo_spread_gradient")),
)  # fmt: skip
