"""Preferences: losses on scores of whole answers to one prompt, the score and the link chosen independently.

    L = mean over pairs of link( s(chosen) - s(rejected) )                                            (+ likelihood of the chosen)

               score s(y)                      link(m)                                  and
    dpo        beta log(pi / ref)              - log sigmoid m
    cdpo       beta log(pi / ref)              (1 - e) ls(m) + e ls(-m)                 ls(m) = - log sigmoid m
    rdpo       beta log(pi / ref)              ((1 - e) ls(m) - e ls(-m)) / (1 - 2 e)
    ipo        log(pi / ref)                   (m - 1 / (2 beta))^2
    slic       beta log pi                     max(0, margin - m)
    slic-norm  beta log(pi / ref)              max(0, 1 - m)
    simpo      beta / T log pi                 - log sigmoid(m - margin)                no reference
    orpo       log-odds of pi^(1 / T)          - lam log sigmoid m                      likelihood of the chosen, no reference
    kto        beta log(pi / ref)              1 - sigmoid(+-(s - z0))                  each answer on its own
    rpo        dpo's                           dpo's                                    likelihood of the chosen: pessimism
    vpo        dpo's                           dpo's                                    +- log pi of calibration answers
    hypo       dpo's                           dpo's                                    KL(pi || ref) on fresh, unlabelled answers

Every pair loss has the gradient of a policy gradient: A = - link'(m) for the chosen, link'(m) for the rejected.
"""

from __future__ import annotations

from collections.abc import Mapping

from unipo.methods.method import Method, choice
from unipo.objectives import (
    Advantage,
    Aggregate,
    EpisodeMean,
    EpisodeSum,
    HingeLink,
    LeaveOneOut,
    Likelihood,
    LogisticLink,
    LogOdds,
    LogRatioScore,
    LogRatioToGo,
    Marked,
    MeanLogp,
    MismatchedRatio,
    Normalised,
    Outcome,
    Pairwise,
    Pointwise,
    PolicyGradient,
    Rows,
    ShapedOutcome,
    SigmoidLink,
    SquaredLink,
    SumLogp,
    Unflipped,
    Zero,
    demonstrations,
    labels,
    own_pairs,
    pairs,
)
from unipo.recipe import Recipe, RolloutSpec
from unipo.sources.stages.augment import Augment
from unipo.sources.stages.preferences import Judge, Paired, Sampled, SampledBeside, Verdicts, judge_of

CHOSEN = pairs & Marked()


# ---- one score, one link ---------------------------------------------------------------------------------------------
def dpo(*, beta: float = 0.1, label_smoothing: float = 0.0) -> Recipe:
    """Direct preference optimisation (arXiv 2305.18290, eq. 7): the policy is its own reward model.

        h(y) = beta * sum_n log( pi(y_n) / ref(y_n) )
        L    = mean over pairs of  - log sigmoid( h(chosen) - h(rejected) )

    `label_smoothing` is the conservative variant (`cdpo`): the share of labels believed to be flipped.
    """
    return Recipe(objective=Pairwise(score=LogRatioScore(beta), link=LogisticLink(label_smoothing)))


def cdpo(*, beta: float = 0.1, label_smoothing: float = 0.1) -> Recipe:
    """Conservative DPO (Mitchell 2023): DPO whose labels are believed with 1 - label_smoothing.

    L = mean over pairs of - (1 - e) log sigmoid(m) - e log sigmoid(-m): the margin rests at log( (1 - e) / e ). See `rdpo`.
    """
    return dpo(beta=beta, label_smoothing=label_smoothing)


def rdpo(*, beta: float = 0.1, flipped: float = 0.1) -> Recipe:
    """Robust DPO (arXiv 2403.00409): on labels that are wrong with a known rate, the loss of clean ones on average.

        L = mean over pairs of ( (1 - e) ls(m) - e ls(-m) ) / (1 - 2 e) = ls(m) - e / (1 - 2 e) m,    ls(m) = - log sigmoid m

    Unbounded below where all labels agree: the push e / (1 - 2 e) never ends, so that a run must. SLiC and IPO are debiased
    alike, `Unflipped(flipped, HingeLink())`; the price is a variance larger by up to 1 / (1 - 2 e)^2.
    """
    return dpo(beta=beta).but(link=Unflipped(flipped))


def ipo(*, beta: float = 0.1) -> Recipe:
    """Identity preference optimisation (arXiv 2310.12036, eq. 17): regress the bare margin to 1 / (2 beta).

    L = mean over pairs of  ( log pi/ref (chosen) - log pi/ref (rejected) - 1 / (2 beta) )^2
    """
    return dpo(beta=1.0).but(link=SquaredLink(target=1.0 / (2.0 * beta)))


def slic(*, beta: float = 1.0, margin: float = 1.0) -> Recipe:
    """Sequence likelihood calibration (SLiC-HF, arXiv 2305.10425): a margin between log-probabilities, no reference.

        L = mean over pairs of  max(0, margin - beta (log pi(chosen) - log pi(rejected)))

    The paper adds the likelihood of a target beside it: `slic+0.1*sft` with demonstrations, or the chosen as in `rpo`.
    """
    return Recipe(objective=Pairwise(score=SumLogp(beta), link=HingeLink(margin)))


def slic_norm(*, beta: float = 0.1) -> Recipe:
    """SLiC normalised by the reference (hinge-norm of RSO, arXiv 2309.06657): max(0, 1 - m) with DPO's margin m."""
    return slic(margin=1.0).but(score=LogRatioScore(beta))


def simpo(*, beta: float = 2.5, margin: float = 1.25) -> Recipe:
    """Simple preference optimisation (arXiv 2405.14734): mean log-probability as reward, and a margin; no reference.

    L = mean over pairs of  - log sigmoid( beta / |w| log pi(w) - beta / |l| log pi(l) - margin )
    """
    return Recipe(objective=Pairwise(score=MeanLogp(beta), link=LogisticLink(margin=margin)))


def orpo(*, lam: float = 0.1) -> Recipe:
    """Odds-ratio preference optimisation (arXiv 2403.07691): likelihood of the chosen, and its odds; no reference.

    L = mean over pairs of  - log P(w) - lam log sigmoid( log odds P(w) - log odds P(l) ),      P(y) = pi(y)^(1 / T)
    """
    shown = Likelihood(rows=CHOSEN, aggregate=EpisodeMean(), name="sft")
    return Recipe(objective=shown + lam * Pairwise(score=LogOdds()))


JUDGED: Mapping[str, Rows] = {"labels": labels, "pairs": pairs}


def kto(*, beta: float = 0.1, good: float = 1.0, bad: float = 1.0, rows: str = "labels") -> Recipe:
    """Kahneman-Tversky optimisation (arXiv 2402.01306): answers judged each on its own, gains and losses saturate.

        h(y) = beta log( pi(y) / ref(y) ),      z0 = beta max(0, mean of log( pi / ref ) of answers behind other prompts)
        L    = mean over answers of  good (1 - sigmoid(h - z0))  if desirable, else  bad (1 - sigmoid(z0 - h))

    No gradient through z0, an estimate of beta KL(pi || ref). `rows`: labelled answers, or both sides of pairs. Where one
    label is rarer, the paper raises its weight: good * #good / (bad * #bad) from 1 to 4/3.
    """
    judged = Pointwise(score=LogRatioScore(beta), anchor=MismatchedRatio(beta), link=SigmoidLink(), good=good, bad=bad,
                       rows=choice(JUDGED, "rows", rows))  # fmt: skip
    return Recipe(objective=judged)


# ---- DPO and a second term -------------------------------------------------------------------------------------------
LENGTHS: Mapping[str, Aggregate] = {"token": EpisodeMean(), "answer": EpisodeSum()}
BASELINES: Mapping[str, Rows] = {"chosen": CHOSEN, "all": pairs, "demonstrations": demonstrations}


def rpo(*, beta: float = 0.5, sft: float = 0.2, per: str = "token", baseline: str = "chosen") -> Recipe:
    """Regularised preference optimisation (arXiv 2405.16436): DPO and likelihood, which is pessimism about the reward.

        L = DPO - sft * mean over answers a of the baseline of log pi(a)             sft = eta * beta

    max_pi min_r of eta (E_pi r - E_baseline r - beta KL) + the likelihood of r on the pairs: a reward is only worth what the
    pairs insist on. `per` answer: the sum of log-probs (the paper's chat settings: beta .01, sft .005), token: their mean
    (its reasoning settings, and recommended). `baseline`: the chosen answers, all of the pairs, or demonstrations.
    """
    shown = Likelihood(rows=choice(BASELINES, "baseline", baseline), aggregate=choice(LENGTHS, "per", per), name="sft")
    return dpo(beta=beta) + sft * Recipe(objective=shown)


def vpo(*, beta: float = 0.1, alpha: float = 0.1, calibration: str = "chosen") -> Recipe:
    """Value-incentivised preference optimisation (arXiv 2405.19320), offline: a small optimal value is preferred.

        r = argmin { L_MLE(r) + alpha J*(r) },    J*(r) = - beta E_calibration[ log(pi_r / ref) ]   where E_calibration[r] = 0
        L = DPO - alpha beta * mean over calibration answers of log pi

    With the chosen answers for calibration this is `rpo` with sft = alpha beta, per answer. `calibration`: chosen, all, or
    demonstrations. `vpo-online` is the optimistic form.
    """
    return rpo(beta=beta, sft=alpha * beta, per="answer", baseline=calibration)


CALIBRATIONS: Mapping[str, tuple[Rows, tuple[Augment, ...]]] = {
    "reference": (demonstrations, (SampledBeside(Sampled(player="reference", share=1.0, samples=2)),)),
    "demonstrations": (demonstrations, ()),
    "own": (own_pairs, ()),
}


def vpo_online(*, group: int = 2, beta: float = 0.1, alpha: float = 0.01, calibration: str = "reference", replayed: float = 0.5,
               epochs: int = 4, judge: str | Judge = "reward", temperature: float = 1.0) -> Recipe:  # fmt: skip
    """Value-incentivised preference optimisation (arXiv 2405.19320), online: a large optimal value is preferred.

        L = DPO(pairs of its own answers, of this step and before) + alpha beta * mean over calibration answers of log pi

    Optimism: probability is pushed away from what the reference would say. `calibration`: two samples of the reference per
    prompt (rows of kind demo; the form of XPO), demonstrations, or its own answers. A share `replayed` of the groups are of
    the last 16 steps: D of the paper. J* is convex in r, so that the bonus amplifies whatever has gained already, and does
    nothing at the reference: alpha wants a sweep.
    """
    rows, stages = choice(CALIBRATIONS, "calibration", calibration)
    optimism = Likelihood(rows=rows, aggregate=EpisodeSum(), name="optimism")
    compared = Pairwise(score=LogRatioScore(beta), confidence=Outcome("confidence"), rows=own_pairs)
    paired = Paired(Verdicts(judge_of(judge, temperature)))
    spec = RolloutSpec(group=group, augment=(paired, *stages), replay=replayed, replay_steps=16)
    return Recipe(objective=compared + (-alpha * beta) * optimism, rollouts=spec, epochs=epochs)


PULLS: Mapping[str, Advantage] = {
    "answer": Normalised(center=LeaveOneOut(), outcome=ShapedOutcome(1.0, "reference", Zero())),
    "token": LogRatioToGo(1.0),
}


def hypo(*, beta: float = 0.05, kl: float = 1e-4, group: int = 2, per: str = "answer") -> Recipe:
    """Hybrid preference optimisation (arXiv 2406.01462): DPO on pairs, and KL(pi || ref) on fresh answers without labels.

        L = DPO(pairs) + kl * mean over rollouts of  sg( l_i - mean of the others' l ) log pi(y_i),    l = log( pi(y) / ref(y) )

    The second gradient is that of KL(pi || ref): what no pair speaks of is held, where DPO alone says nothing of it.
    `per` token: log-ratios still to come at each token in place of the whole answer's, without the others' mean.
    """
    pull = PolicyGradient(advantage=choice(PULLS, "per", per), aggregate=EpisodeSum(), name="kl")
    return dpo(beta=beta) + kl * Recipe(objective=pull, rollouts=RolloutSpec(group=group))


_TESTS = "tests/methods/test_preferences.py::"
_BRIDGE = "tests/methods/test_pair_bridge.py::test_the_gradient_is_that_of_a_policy_gradient"


def _tests(*names: str) -> tuple[str, ...]:
    return (*(_TESTS + name for name in names), _BRIDGE)


METHODS = (
    Method(
        slug="dpo", build=dpo, family="preference", title="Direct Preference Optimization", paper="arXiv 2305.18290, eq. 7",
        equation="L = mean_pairs -log sigmoid(h(chosen) - h(rejected)),  h = beta * sum log(pi / ref)",
        identity_tests=_tests("test_dpo_gradient_at_the_reference", "test_dpo_matches_a_second_derivation",
                              "test_population_minimisers"),
    ),
    Method(
        slug="cdpo", build=cdpo, family="preference", title="Conservative DPO",
        paper="Mitchell 2023, A note on DPO with noisy preferences",
        equation="L = mean_pairs (1 - e) ls(m) + e ls(-m),  ls(m) = -log sigmoid(m)",
        identity_tests=_tests("test_label_smoothing_is_the_mixture_of_both_labels", "test_population_minimisers"),
    ),
    Method(
        slug="ipo", build=ipo, family="preference", title="Identity Preference Optimization", paper="arXiv 2310.12036, eq. 17",
        equation="L = mean_pairs (h(chosen) - h(rejected) - 1 / (2 beta))^2,  h = sum log(pi / ref)",
        identity_tests=_tests("test_ipo_is_copg_with_half_reward_margin", "test_population_minimisers"),
    ),
    Method(
        slug="slic", build=slic, family="preference", title="SLiC-HF: Sequence Likelihood Calibration with Human Feedback",
        paper="arXiv 2305.10425", equation="L = mean_pairs max(0, margin - beta (log pi(w) - log pi(l)))",
        identity_tests=_tests("test_baselines_match_a_second_derivation", "test_hinges_are_silent_beyond_their_margin"),
    ),
    Method(
        slug="slic-norm", build=slic_norm, family="preference", title="SLiC normalised by the reference (RSO)",
        paper="arXiv 2309.06657", equation="L = mean_pairs max(0, 1 - (h(w) - h(l))),  h = beta * sum log(pi / ref)",
        identity_tests=_tests("test_baselines_match_a_second_derivation", "test_hinges_are_silent_beyond_their_margin"),
    ),
    Method(
        slug="simpo", build=simpo, family="preference",
        title="SimPO: Simple Preference Optimization with a Reference-Free Reward",
        paper="arXiv 2405.14734", equation="L = mean_pairs -log sigmoid(beta (mean logp(w) - mean logp(l)) - margin)",
        identity_tests=_tests("test_baselines_match_a_second_derivation",
                              "test_simpo_of_equal_lengths_is_dpo_without_a_reference"),
    ),
    Method(
        slug="orpo", build=orpo, family="preference", title="ORPO: Monolithic Preference Optimization without Reference Model",
        paper="arXiv 2403.07691",
        equation="L = mean_pairs -log P(w) - lam log sigmoid(logodds P(w) - logodds P(l)),  P = pi^(1/T)",
        identity_tests=_tests("test_baselines_match_a_second_derivation", "test_orpo_without_odds_is_likelihood_of_the_chosen"),
    ),
    Method(
        slug="kto", build=kto, family="preference", title="KTO: Model Alignment as Prospect Theoretic Optimization",
        paper="arXiv 2402.01306", equation="L = mean_answers good (1 - sigmoid(h - z0)) or bad (1 - sigmoid(z0 - h))\n"
        "z0 = beta max(0, mean log(pi / ref) of answers behind other prompts), detached",
        identity_tests=tuple(_TESTS + t for t in (
            "test_kto_matches_a_second_derivation", "test_mismatched_log_ratios_are_of_answers_behind_other_prompts",
            "test_kto_saturates_on_both_sides", "test_kto_of_pairs_judges_both_sides")),
    ),
    Method(
        slug="rdpo-robust", build=rdpo, row=181, family="preference", paper="arXiv 2403.00409",
        title="Provably Robust DPO: Aligning Language Models with Noisy Feedback",
        equation="L = mean_pairs ((1 - e) ls(m) - e ls(-m)) / (1 - 2 e),  ls(m) = -log sigmoid(m)",
        claim="with a known share of flipped labels robust DPO beats DPO, and DPO label smoothing, once there are enough pairs; "
              "with few of them its variance costs more than the bias",
        identity_tests=_tests("test_robust_dpo_without_flips_is_dpo", "test_robust_dpo_is_unbiased_under_flips",
                              "test_robust_and_smoothed_dpo_differ_from_dpo_by_a_linear_term", "test_population_minimisers",
                              "test_other_links_are_debiased_alike", "test_the_push_of_robust_dpo_never_ends"),
    ),
    Method(
        slug="rpo", build=rpo, row=105, family="preference", paper="arXiv 2405.16436",
        title="Provably Mitigating Overoptimization in RLHF: Your SFT Loss is Implicitly an Adversarial Regularizer",
        equation="L = DPO - sft * mean_chosen log pi,  sft = eta * beta",
        claim="on pairs that cover the answers in part, DPO with likelihood of the chosen reaches a higher KL-regularised reward "
              "than DPO, at a smaller KL, and falls less when trained on; too much of it is imitation, with less reward",
        identity_tests=_tests("test_rpo_at_zero_weight_is_dpo", "test_rpo_without_margin_is_likelihood", "test_rpo_gradients_add",
                              "test_rpo_keeps_winners_likely_where_dpo_need_not", "test_offline_vpo_on_the_chosen_is_rpo"),
    ),
    Method(
        slug="vpo", build=vpo, row=183, family="preference", paper="arXiv 2405.19320",
        title="Value-Incentivized Preference Optimization: A Unified Approach to Online and Offline RLHF",
        equation="offline: L = DPO - alpha beta * mean_calibration log pi\n"
                 "online (vpo-online): L = DPO(own pairs) + alpha beta * mean_calibration log pi",
        claim="offline, pessimism raises the KL-regularised reward over DPO's on pairs of partial coverage; online, optimism "
              "finds a good answer that the reference hardly gives sooner than alpha = 0",
        identity_tests=_tests("test_offline_vpo_on_the_chosen_is_rpo", "test_vpo_without_alpha_is_dpo", "test_the_optimal_value",
                              "test_the_gradient_of_the_optimal_value"),
    ),
    Method(
        slug="vpo-online", build=vpo_online, family="preference", title="VPO, online and optimistic", paper="arXiv 2405.19320",
        equation="L = DPO(own pairs) + alpha beta * mean_calibration log pi",
        identity_tests=_tests("test_online_vpo_without_alpha_is_dpo_on_its_own_pairs",
                              "test_optimism_is_silent_at_the_reference",
                              "test_calibration_answers_are_drawn_from_the_reference"),
    ),
    Method(
        slug="hypo", build=hypo, row=117, family="preference", paper="arXiv 2406.01462",
        title="The Importance of Online Data: Understanding Preference Fine-tuning via Coverage",
        equation="L = DPO(pairs) + kl * mean_rollouts sg(l - leave-one-out mean) log pi,  l = log(pi / ref)",
        claim="with pairs of a part of the answers, HyPO earns what DPO does at a smaller KL to the reference; a large weight of "
              "the KL over-regularises",
        identity_tests=_tests("test_hypo_without_kl_is_dpo", "test_the_online_term_is_the_gradient_of_kl",
                              "test_answers_of_no_pair_are_free_in_dpo_and_held_by_hypo",
                              "test_without_pairs_hypo_returns_to_the_reference",
                              "test_log_ratios_to_go_have_the_gradient_of_whole_answers"),
    ),
)  # fmt: skip
