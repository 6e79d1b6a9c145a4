"""Preferences as a game: a policy is good if no other wins against it, whether or not preferences have a reward behind them.

P(y > y') is a judge's (a reward's by default; `judge` names a function or model). w(y) = mean over opponents of P(y > y').

                 opponents                    anchors                        how the step is taken
    spo          own group, or recent ones    none (the host's clip)         policy gradient of w
    nash-md      policy^(1-c) reference^c     reference                      policy gradient of w
    nash-ema     an average of the policy     reference                      policy gradient of w
    nash-mp      own group                    reference, a slow copy         policy gradient of w
    inpo         own group                    reference, pi_t                pairs:  (h - 1/(2 eta))^2
    online-dpo   own group                    pi_t                           pairs:  - log sigmoid(h)
    dno          own group and a teacher      pi_t                           pairs:  - log sigmoid(h)
    sppo         own group                    pi_t                           answers: (log pi/pi_t - eta (w - 1/2))^2
    apo          its base's                   its base's, and momentum       its base's, then pi (pi / pi_before)^alpha

pi_t is the policy at the beginning of an iteration of `every` steps (1: of the step, whose `epochs` then make the iteration:
answers are then drawn from pi_t exactly). Their exact steps on enumerable answers are in `unipo.tabular.game_solvers`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from unipo.methods.method import Method, Study, choice
from unipo.methods.policy_gradients import regularised
from unipo.objectives import (
    AffineOutcome,
    ClipMask,
    Condition,
    EpisodeSum,
    LeaveOneOut,
    Link,
    LogRatioScore,
    LogRatioToGo,
    Normalised,
    Outcome,
    Pairwise,
    Plain,
    Plus,
    PolicyGradient,
    ScoreRegression,
    ScoreSum,
    ShapedOutcome,
    SquaredLink,
    TokenRatio,
    Zero,
    own_pairs,
    rollouts,
)
from unipo.recipe import Recipe, RolloutSpec, Snapshot
from unipo.sources.stages.augment import Augment
from unipo.sources.stages.injection import Injected
from unipo.sources.stages.preferences import (
    Choice,
    Compared,
    Disjoint,
    Extremes,
    FarApart,
    Judge,
    Opponents,
    Paired,
    Recent,
    Sampled,
    ScoreJudge,
    Verdicts,
    judge_of,
)
from unipo.tabular.halpern import halpern

WIN, AMONG = Outcome("win_rate"), Outcome("win_rate", group_size=2)
LABEL = Outcome("confidence")


def _iteration(every: int) -> tuple[str, dict[str, Snapshot]]:
    """The name of pi_t's column, and the snapshot that keeps it where an iteration has several steps."""
    if every < 1:
        raise ValueError(f"every is {every}: an iteration has at least one step")
    return ("old", {}) if every == 1 else ("previous", {"previous": Snapshot(every=every)})


def _drawn_pairs(judge: Judge, among: str) -> tuple[Augment, ...]:
    """Stages that make pairs whose label is one draw of the judge's probability."""
    picked = choice(PAIRS, "pairs", among)
    ranked = (Compared(judge),) if isinstance(picked, Extremes) else ()
    return (*ranked, Paired(Verdicts(judge), picked))


PAIRS: Mapping[str, Choice] = {"all": Choice(), "disjoint": Disjoint(), "extremes": Extremes()}


# ---- policy gradients of the win rate --------------------------------------------------------------------------------
def spo(*, group: int = 8, recent: int = 0, clip: float = 0.2, kl: float = 0.0, judge: str | Judge = "reward",
        temperature: float = 1.0, epochs: int = 1, minibatches: int = 1) -> Recipe:  # fmt: skip
    """Self-play preference optimisation (arXiv 2401.04056): one policy plays against itself; the win rate is its reward.

        R_i = mean over opponents of 2 P(y_i > y_j) - 1                L = - SUM( min(r R, clip(r) R) )

    `recent` 0: the others of the group, whose R sum to 0; else the last so many answers to the prompt. No baseline is needed.
    The guarantee is for the average of the policies: max_pi P(pi > average) - 1/2 is the average regret.
    """
    opponents = Recent(most=recent) if recent else Opponents()
    reward = AffineOutcome(2.0, -1.0, WIN if recent else AMONG)
    gradient = PolicyGradient(
        advantage=Plain(reward), weight=TokenRatio(), mask=ClipMask(clip, clip), aggregate=EpisodeSum()
    )
    spec = RolloutSpec(group=group, augment=(Compared(judge_of(judge, temperature), opponents),))
    return regularised(Recipe(objective=gradient, rollouts=spec, epochs=epochs, minibatches=minibatches), kl, 0.0)


def nash_md(*, group: int = 4, samples: int = 4, mixture: float = 0.25, tau: float = 0.008, judge: str | Judge = "reward",
            temperature: float = 1.0) -> Recipe:  # fmt: skip
    """Nash-MD-PG (arXiv 2312.00886): against a geometric mixture of policy and reference, token by token.

        y ~ pi,   y' ~ softmax( (1 - mixture) l_pi + mixture l_ref )       no gradient through y'
        L = - SUM( (w(y) - 1/2 - tau sum_{m >= n} log(pi / ref)(y_m)) log pi(y_n) )

    w is the mean over `samples` opponents that all answers of the group meet (the paper has one each). `mixture` 0:
    self-play; 1: best response to the reference. The KL is of what is still to come: unbiased as the whole is, less noisy.
    """
    advantage = Plus((Plain(AffineOutcome(1.0, -0.5, WIN)), LogRatioToGo(tau)))
    against = Sampled(player="reference", share=mixture, samples=samples)
    return Recipe(
        objective=PolicyGradient(advantage=advantage, aggregate=EpisodeSum()),
        rollouts=RolloutSpec(group=group, augment=(Compared(judge_of(judge, temperature), against),)),
    )


def nash_ema(*, group: int = 4, samples: int = 4, average: float = 0.99, tau: float = 0.008, judge: str | Judge = "reward",
             temperature: float = 1.0) -> Recipe:  # fmt: skip
    """Nash-EMA-PG (arXiv 2312.00886): `nash_md` against the policy whose parameters are a running average.

    theta_bar <- (1 - average) theta + average theta_bar, from the start of the run. 0: self-play; 1: best response to the start.
    """
    against = Sampled(player="average", share=1.0, samples=samples)
    base = nash_md(group=group, tau=tau, judge=judge, temperature=temperature)
    return base.but(
        augment=(Compared(judge_of(judge, temperature), against),),
        snapshots={"average": Snapshot(every=1, tau=1.0 - average)},
    )


def nash_mp(*, group: int = 8, beta: float = 0.05, eta: float = 0.1, kappa: float = 0.05, copy: int = 0,
            judge: str | Judge = "reward", temperature: float = 1.0) -> Recipe:  # fmt: skip
    """Nash Prox (arXiv 2505.19731): self-play policy gradient, regularised to the reference and to a slow copy of itself.

        k_i = beta log(pi / ref)(y_i) + beta / eta log(pi / anchor)(y_i)           anchor <- (1 - kappa) anchor + kappa pi
        L   = - SUM( (w_i - 1/2 - (k_i - mean_{j != i} k_j)) log pi(y_n) )

    `copy` > 0: the anchor is a hard copy, renewed every so many steps. w sums to its own baseline over the group: subtracting
    the others' mean again would multiply its gradient by K / (K - 1), and move the fixed point to ref exp(K/(K-1) P / beta).
    Our instance of the paper's scheme (a self-play gradient inside a proximal point): its constants are not readable.
    """
    pull = ShapedOutcome(beta / eta, "anchor", ShapedOutcome(beta, "reference", Zero()))
    free = Normalised(center=LeaveOneOut(), outcome=pull)
    advantage = Plus((Plain(AffineOutcome(1.0, -0.5, AMONG)), free))
    return Recipe(
        objective=PolicyGradient(advantage=advantage, aggregate=EpisodeSum()),
        rollouts=RolloutSpec(group=group, augment=(Compared(judge_of(judge, temperature)),)),
        snapshots={"anchor": Snapshot(every=copy) if copy else Snapshot(every=1, tau=kappa)},
    )


# ---- regressions and classifications against the policy of the iteration ----------------------------------------------
def inpo(*, group: int = 8, tau: float = 0.0025, eta: float = 0.0075, pairs: str = "all", every: int = 1, epochs: int = 4,
         minibatches: int = 1, judge: str | Judge = "reward", temperature: float = 1.0) -> Recipe:  # fmt: skip
    """Iterative Nash policy optimisation (arXiv 2407.00617): online mirror descent of the regularised game, by pairs.

        h = tau/eta log(pi / ref) + (1 - tau/eta) log(pi / pi_t)            L = mean over pairs ( h(won) - h(lost) - 1/(2 eta) )^2

    The minimiser over pairs drawn from pi_t is the step of `tabular.game_solvers.inpo`; no win rate is estimated. `pairs`: all
    or disjoint ones of the group, or its extremes by win rate (the paper's practice, for which that equality does not hold).
    tau = eta: IPO with tau on its own samples; tau = 0: without a reference.
    """
    if not 0 <= tau <= eta:
        raise ValueError(f"tau is {tau} and eta {eta}: expected 0 <= tau <= eta")
    to, snapshots = _iteration(every)
    score = ScoreSum((tau / eta, 1.0 - tau / eta), (LogRatioScore(1.0), LogRatioScore(1.0, to)))
    objective = Pairwise(score=score, link=SquaredLink(target=0.5 / eta), confidence=LABEL, rows=own_pairs)
    spec = RolloutSpec(group=group, augment=_drawn_pairs(judge_of(judge, temperature), pairs))
    return Recipe(objective=objective, rollouts=spec, snapshots=snapshots, epochs=epochs, minibatches=minibatches)


def online_dpo(*, group: int = 8, beta: float = 0.1, pairs: str = "all", every: int = 1, epochs: int = 4, minibatches: int = 1,
               judge: str | Judge = "reward", temperature: float = 1.0) -> Recipe:  # fmt: skip
    """Iterative DPO (arXiv 2312.11456, 2402.04792): DPO on pairs of its own answers, the policy of the iteration as reference.

    L = mean over pairs - log sigmoid( beta log(pi / pi_t)(won) - beta log(pi / pi_t)(lost) )
    """
    to, snapshots = _iteration(every)
    objective = Pairwise(score=LogRatioScore(beta, to), link=Link(), confidence=LABEL, rows=own_pairs)
    spec = RolloutSpec(group=group, augment=_drawn_pairs(judge_of(judge, temperature), pairs))
    return Recipe(objective=objective, rollouts=spec, snapshots=snapshots, epochs=epochs, minibatches=minibatches)


TARGETS: Mapping[str, Outcome] = {"soft": AMONG, "hard": Outcome("chosen")}


def sppo(*, group: int = 5, eta: float = 1000.0, answers: str = "extremes", labels: str = "soft", every: int = 1, epochs: int = 4,
         minibatches: int = 1, judge: str | Judge = "reward", temperature: float = 1.0) -> Recipe:  # fmt: skip
    """Self-play preference optimisation (arXiv 2405.00675): the exponential weights of the win rate, by least squares.

        L = mean over answers ( log(pi / pi_t)(y) - eta (w(y) - 1/2) )^2           pi' prop. to pi_t exp(eta w)

    w counts an answer itself as 1/2. `answers`: the extremes of the group by win rate (the authors' code, which skips groups
    whose scores are equal) or all. `labels` hard: 1 for the best, 0 for the worst. The constant log Z is taken as eta / 2.
    """
    to, snapshots = _iteration(every)
    goal = choice(TARGETS, "labels", labels)
    if choice({"extremes": True, "all": False}, "answers", answers) < (labels == "hard"):
        raise ValueError("labels are hard for the best and the worst answer: leave answers at extremes")
    rated = judge_of(judge, temperature)
    paired = (Paired(ScoreJudge(0.0, "win_rate"), Extremes()),) if answers == "extremes" else ()
    regression = ScoreRegression(
        target=AffineOutcome(eta, -eta / 2.0, goal), score=LogRatioScore(1.0, to), per="episode",
        rows=own_pairs if paired else rollouts,
    )  # fmt: skip
    spec = RolloutSpec(group=group, augment=(Compared(rated, Opponents(itself=1.0)), *paired))
    return Recipe(
        objective=2.0 * regression, rollouts=spec, snapshots=snapshots, epochs=epochs, minibatches=minibatches
    )


def dno(*, group: int = 5, beta: float = 0.1, gap: float = 0.2, least: float = 0.5, teacher: int = 1, soft: float = 0.0,
        replayed: float = 0.3, every: int = 1, epochs: int = 1, minibatches: int = 1, judge: str | Judge = "reward",
        temperature: float = 1.0) -> Recipe:  # fmt: skip
    """Direct Nash optimisation (arXiv 2404.03715): its own answers and a teacher's are ranked; pairs far apart are learned.

        L = mean over pairs - log sigmoid( beta log(pi / pi_t)(y+) - beta log(pi / pi_t)(y-) )

    Ranked by win rate among the `group` answers and `teacher` demonstrations (0: none); of a pair the better has at least
    `least` and is `gap` above the other. `soft` > 0: labels sigmoid(soft (w - w')) in place of 1, and the minimiser is
    pi_t exp(soft w / beta). A share `replayed` of the groups are pairs of the last two steps. Departs from the paper: scores
    are win rates in place of a rater's six points, so that `gap` and `least` are ours.
    """
    to, snapshots = _iteration(every)
    gold = (Injected(when=Condition(), count=teacher),) if teacher else ()
    label = ScoreJudge(1.0 / soft if soft else 0.0, "win_rate")
    ranked = Compared(judge_of(judge, temperature), Opponents(itself=1.0))
    objective = Pairwise(score=LogRatioScore(beta, to), confidence=LABEL, rows=own_pairs)
    spec = RolloutSpec(group=group, augment=(*gold, ranked, Paired(label, FarApart("win_rate", least, gap))), replay=replayed,
                       replay_steps=2)  # fmt: skip
    return Recipe(objective=objective, rollouts=spec, snapshots=snapshots, epochs=epochs, minibatches=minibatches)


BASES: Mapping[str, Callable[..., Recipe]] = {"online-dpo": online_dpo, "sppo": sppo, "inpo": inpo}


def apo(*, base: str = "online-dpo", alpha: float = 0.3, every: int = 10, group: int = 5, epochs: int = 1,
        judge: str | Judge = "reward", temperature: float = 1.0) -> Recipe:  # fmt: skip
    """Accelerated preference optimisation (arXiv 2410.06293): Nesterov's momentum between the iterations of another method.

        made_{t+1} = an iteration of `base` from pi_t                pi_{t+1} prop. to made_{t+1} (made_{t+1} / made_t)^alpha

    In parameters: theta <- theta + alpha (theta - theta_made before); the same as in logits where these are linear in theta.
    The answers and the reference of the next iteration are those of pi_{t+1}; the run ends with what was made.
    alpha 0: the base. A fixed reward is followed with steps that tend to r / (beta (1 - alpha)).
    """
    made = choice(BASES, "base", base)(every=every, group=group, epochs=epochs, judge=judge, temperature=temperature)
    if not alpha:
        return made
    return made.but(snapshots={"made": Snapshot(every=every, beyond=alpha), **made.snapshots})


_TESTS = "tests/methods/test_preference_games.py::"
_TABULAR = "tests/tabular/test_games.py::"


def _tests(*names: str) -> tuple[str, ...]:
    return tuple(_TESTS + n for n in names)


def _exact(*names: str) -> tuple[str, ...]:
    return tuple(_TABULAR + n for n in names)


METHODS = (
    Method(
        slug="spo", build=spo, row=80, family="preference", paper="arXiv 2401.04056",
        title="A Minimaximalist Approach to Reinforcement Learning from Human Feedback",
        equation="R_i = mean over opponents of 2 P(y_i > y_j) - 1,  L = -SUM(min(r R, clip(r) R))\n"
                 "opponents: the others of the group, or the last answers to the prompt",
        claim="the average of self-play has the exploitability of its regret, 1 / sqrt(T), where the best answer by a fitted "
              "reward can be exploited",
        identity_tests=_tests("test_win_rates_among_a_group_sum_to_half", "test_spo_gradient_is_that_of_the_win_rate",
                              "test_recent_answers_are_the_opponents")
        + _exact("test_exploitability_of_the_average_is_the_average_regret",
                 "test_the_average_converges_and_the_last_iterate_circles",
                 "test_iterative_dpo_solves_bradley_terry_games_and_not_cycles",
                 "test_a_fit_to_skewed_comparisons_of_a_cycle_is_no_equilibrium"),
    ),
    Method(
        slug="nash-md", build=nash_md, row=158, family="preference", title="Nash Learning from Human Feedback",
        paper="arXiv 2312.00886",
        equation="L = -SUM((w - 1/2 - tau sum_{m>=n} log(pi / ref)) log pi(y_n)),  w against softmax((1-c) l_pi + c l_ref)\n"
                 "exact: pi' = mix exp(eta P(. > mix)) / Z,  mix = pi^(1 - eta tau) ref^(eta tau)",
        claim="against a mixture with the reference the policy is harder to exploit than RL on a fitted reward and than the best "
              "response to the reference; KL to the equilibrium stays below 8 / (tau^2 (T + 1))",
        identity_tests=_tests("test_nash_md_gradient", "test_a_half_less_changes_no_expectation",
                              "test_the_divergence_to_the_mixture_is_a_share_of_that_to_the_reference",
                              "test_the_divergence_of_tokens", "test_opponents_are_drawn_from_the_mixture",
                              "test_a_model_and_its_reference_are_mixed_token_by_token")
        + _exact("test_nash_md_one_step_bound_and_schedule", "test_nash_md_differs_from_inpo_by_its_opponent_alone",
                 "test_without_regularisation_all_are_multiplicative_weights"),
    ),
    Method(slug="nash-ema", build=nash_ema, family="preference", title="Nash-EMA-PG (Nash Learning from Human Feedback)",
           paper="arXiv 2312.00886", equation="as nash-md, against the policy of averaged parameters",
           identity_tests=_tests("test_nash_ema_between_its_limits")),
    Method(
        slug="nash-mp", build=nash_mp, row=85, family="preference", paper="arXiv 2505.19731",
        title="Accelerating Nash Learning from Human Feedback via Mirror Prox",
        equation="A_i = w_i - 1/2 - (k_i - mean_{j != i} k_j),  k = beta log(pi / ref) + beta / eta log(pi / anchor)\n"
                 "exact: two prox steps from pi_k, KL(pi* || pi_k) <= (1 + 2 beta)^-k KL(pi* || ref) at eta = 2 beta",
        claim="Nash-MP converges linearly in the last iterate, far below the best constant steps of Nash-MD and INPO at equal "
              "queries; with samples, the anchor lowers the noise floor at large learning rates",
        identity_tests=_tests("test_nash_mp_rests_at_the_equilibrium", "test_a_second_baseline_moves_the_fixed_point",
                              "test_at_the_anchor_nash_mp_is_regularised_self_play",
                              "test_nash_mp_gradient_away_from_the_anchor")
        + _exact("test_nash_mp_contracts_by_1_over_1_plus_2_tau", "test_the_proximal_point_equality",
                 "test_halving_nash_mp_gives_inpo", "test_in_a_linear_game_the_half_steps_coincide",
                 "test_the_equilibrium_stays_where_it_is"),
    ),
    Method(
        slug="inpo", build=inpo, row=81, family="preference", paper="arXiv 2407.00617",
        title="Iterative Nash Policy Optimization: Aligning LLMs with General Preferences via No-Regret Learning",
        equation="L = mean_pairs (h(won) - h(lost) - 1 / (2 eta))^2,  h = tau/eta log(pi / ref) + (1 - tau/eta) log(pi / pi_t)",
        claim="on intransitive preferences the last iterate of INPO comes near the equilibrium where iterative DPO drifts to an "
              "exploitable policy",
        identity_tests=_tests("test_inpo_minimiser_is_the_mirror_step", "test_inpo_at_equal_rates_is_ipo_on_its_own_pairs",
                              "test_inpo_gradient_as_advantages", "test_expected_labels_have_the_mean_gradient_of_drawn_ones",
                              "test_inpo_without_a_reference_is_the_exponential_weights")
        + _exact("test_inpo_one_step_bound", "test_the_equilibrium_stays_where_it_is",
                 "test_the_regularised_equilibrium_is_the_fixed_point"),
    ),
    Method(slug="online-dpo", build=online_dpo, family="preference", title="Iterative DPO on its own answers",
           paper="arXiv 2402.04792", equation="L = mean_pairs -log sigmoid(beta (rho(won) - rho(lost))),  rho = log(pi / pi_t)",
           identity_tests=_tests("test_dno_is_dpo_against_the_iterate")
           + _exact("test_iterative_dpo_solves_bradley_terry_games_and_not_cycles")),
    Method(
        slug="sppo", build=sppo, row=88, family="preference", paper="arXiv 2405.00675",
        title="Self-Play Preference Optimization for Language Model Alignment",
        equation="L = mean_answers (log(pi / pi_t) - eta (w - 1/2))^2     exact: pi' = pi_t exp(eta P(. > pi_t)) / Z",
        claim="the average iterate nears the equilibrium like 1 / sqrt(T), and SPPO raises the log-probs of winners where DPO "
              "lets them fall",
        identity_tests=_tests("test_sppo_minimiser_is_the_exponential_weights_step", "test_sppo_of_five_answers_by_hand",
                              "test_sppo_skips_groups_whose_scores_are_equal", "test_the_difference_of_sppo_targets_is_inpos",
                              "test_sppo_raises_the_winner_whatever_the_loser_does")
        + _exact("test_the_average_converges_and_the_last_iterate_circles"),
    ),
    Method(
        slug="dno", build=dno, row=109, family="preference", paper="arXiv 2404.03715",
        title="Direct Nash Optimization: Teaching Language Models to Self-Improve with General Preferences",
        equation="L = mean_pairs -log sigmoid(beta (rho(y+) - rho(y-))),  rho = log(pi / pi_t)\n"
                 "pairs: K answers and a teacher's ranked by win rate, far apart; 30 % are of the last steps",
        claim="iterating on its own and a teacher's answers beats DPO on fixed pairs and supervised learning of the better ones, "
              "improves from iteration to iteration, and goes past the teacher",
        identity_tests=_tests("test_dno_is_dpo_against_the_iterate", "test_dno_population_minimiser",
                              "test_dno_pairs_of_students_and_teacher"),
    ),
    Method(
        slug="apo-accelerated", build=apo, row=91, family="preference", paper="arXiv 2410.06293",
        title="Accelerated Preference Optimization for Large Language Model Alignment",
        equation="theta_{t+1} = made_{t+1} + alpha (made_{t+1} - made_t),  made_{t+1} = an iteration of the base from theta_t",
        claim="momentum alpha between iterations reaches the same suboptimality in about (1 - alpha) of them",
        identity_tests=_tests("test_without_momentum_apo_is_its_base", "test_extrapolated_parameters_are_extrapolated_logits",
                              "test_a_run_extrapolates_before_it_samples_and_renews_its_reference")
        + _exact("test_extrapolated_exact_steps_have_a_closed_form", "test_extrapolation_rests_at_a_fixed_point"),
    ),
)  # fmt: skip
STUDIES = (
    Study(
        slug="vr-halpern", function=halpern, row=101, family="theory", paper="arXiv 2310.02987",
        title="Variance Reduced Halpern Iteration for Finite-Sum Monotone Inclusions",
        equation="u_{k+1} = J(lam_k u_0 + (1 - lam_k) u_k - eta F~_k),  eta = 1 / (4 L),  F~: PAGE with sqrt(n) components\n"
                 "E |F(u_k)| <= 16 L |u_0 - u*| / (k + 4)",
        claim="at equal component evaluations the residual of the last iterate is several times smaller than with full batches, "
              "and within its bound",
        identity_tests=tuple(f"tests/tabular/test_halpern.py::{t}" for t in (
            "test_without_anchor_it_is_the_forward_step", "test_a_whole_batch_is_deterministic",
            "test_the_expected_error_shrinks_by_1_minus_p", "test_the_residual_bound_and_its_constant",
            "test_the_resolvent_bound", "test_the_sampled_resolvent_finds_the_exact_one",
            "test_anchored_extragradient_solves_what_forward_steps_cannot")),
    ),
)  # fmt: skip
