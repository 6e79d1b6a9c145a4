"""Models that judge answers, trained by the learner that trains policies, and what is made of a score without training on it.

                      what is trained                                        said of an answer
    reward-model      - log sigmoid( s(y) - s(y') )                          a number; P(y > y') = sigmoid(s - s')
    preference-model  - log sigmoid( s(y | y') - s(y' | y) )                 P(y > y'), also of cycles
    best-of-n         the likelihood of the best of n own answers
    cdr-dr-sow        SimPO (or DPO) on the best and the worst own answer    reward: density_ratio(STRONG, WEAK)

A judge is a language model with a value head, and s its value at the end of an answer. What it trained to is used by name:
--reward "model(FOLDER)" in any run, --METHOD.judge "model(FOLDER)" in games, unipo evaluate RUN --best-of N --reward ...
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from unipo.methods.method import Method, choice
from unipo.methods.preferences import dpo, simpo
from unipo.objectives import (
    AffineOutcome,
    EpisodeSum,
    FinalValue,
    Likelihood,
    LogisticLink,
    MeanScore,
    Objective,
    Outcome,
    Pairwise,
    RankWeight,
    own_pairs,
    rollouts,
)
from unipo.recipe import Recipe, RolloutSpec
from unipo.sources.stages.arrange import Arrange, EveryPair, Rivals
from unipo.sources.stages.preferences import Extremes, Paired, ScoreJudge


# ---- judges ------------------------------------------------------------------------------------------------------------
def _judge(arrange: Arrange, margin: float, center: float, label_smoothing: float) -> Recipe:
    apart = AffineOutcome(margin, 0.0, Outcome("rating")) if margin else None
    pairs = Pairwise(score=FinalValue(), link=LogisticLink(label_smoothing), apart=apart)
    objective: Objective = pairs + 8.0 * center * MeanScore() if center else pairs
    return Recipe(objective=objective, arrange=(arrange,))


def reward_model(*, margin: float = 0.0, center: float = 0.0, label_smoothing: float = 0.0) -> Recipe:
    """A Bradley-Terry reward model (arXiv 1706.03741, 2203.02155): a score whose differences explain comparisons.

        P(y > y' | x) = sigmoid( s(x, y) - s(x, y') )                  s(x, y): the value at the end of y
        L = mean over pairs of - log sigmoid( s(w) - s(l) - margin (r(w) - r(l)) ) + center (s(w) + s(l))^2

    A list gives all its pairs. `margin`: per point of rating (r, known where the data have a column of it; Llama 2, arXiv
    2307.09288). `center` draws the scores of a pair to 0 on average (arXiv 2312.09244), so that scores of different prompts
    compare; 0.01 is usual. Departs from the papers: the head starts at 0, and sees the answer's end, not a token of its own.
    Minimiser over all pairs: s(y) - s(y') = logit P(y > y'), where such scores exist; a cycle has none (`preference-model`).
    """
    return _judge(EveryPair(), margin, center, label_smoothing)


def preference_model(*, label_smoothing: float = 0.0) -> Recipe:
    """A pairwise preference model (as arXiv 2312.00886, 2305.10425 train): an answer is scored having read its rival.

        P(y > y' | x) = sigmoid( s(y | x, y') - s(y' | x, y) )          s(y | x, y'): the value at the end of y behind x, y'
        L = mean over pairs of - log P(w > l | x)

    P(y > y') + P(y' > y) = 1 whatever s is, and P(y > y) = 1/2: each answer is read in either place, which costs two passes
    where the papers' classifier takes one and is symmetrised, if at all, by both. Any preference can be represented, also
    cycles; with s(y | x, y') = s(y | x) it is a reward model.
    """
    return _judge(Rivals(), 0.0, 0.0, label_smoothing)


# ---- what a score is good for -----------------------------------------------------------------------------------------
def best_of_n(*, n: int = 16) -> Recipe:
    """Best-of-n, distilled: the likelihood of the best of n own answers (RAFT, arXiv 2304.06767; BOND, arXiv 2407.14622).

        L = - mean over prompts of log pi( argmax_i R(y_i) )            the first of equal ones

    Without training, `unipo evaluate RUN --best-of n` draws and picks; `unipo.tabular.best_of_n` is its exact distribution.
    Over all samples of a fixed policy the minimiser is that distribution, no further than log n - (n - 1) / n from the policy;
    here samples are of the policy as it is, so that what is made is the best of n of the best of n, and so on.
    """
    if n < 2:
        raise ValueError(f"n is {n}: the best is picked of at least 2")
    best = RankWeight(best=1.0, others=0.0)
    objective = Likelihood(weight=best, aggregate=EpisodeSum(), rows=rollouts)
    return Recipe(objective=objective, rollouts=RolloutSpec(group=n))


BASES: Mapping[str, Callable[[float, float], Recipe]] = {
    "simpo": lambda beta, margin: simpo(beta=beta, margin=margin),
    "dpo": lambda beta, margin: dpo(beta=beta),
}


def dr_sow(*, group: int = 8, base: str = "simpo", beta: float = 2.5, margin: float = 1.25, epochs: int = 1,
           minibatches: int = 1) -> Recipe:  # fmt: skip
    """CDR, Dr. SoW (arXiv 2411.02481): own answers, rated by how much likelier a strong model writes them than a weak one.

        R(y) = log p_strong(y | c, x) - log p_weak(y | c, x)            --reward "density_ratio(STRONG, WEAK, context=...)"
        L    = SimPO on (argmax_i R(y_i), argmin_i R(y_i)) of `group` answers; a prompt whose R are all equal is left out

    Where strong is argmax E r - beta KL(. || weak), R = r / beta - log Z(x) exactly: it orders answers to a prompt as r does.
    `per=token` divides by their number (what the released scorer returns): then lengths matter. `base` dpo: with `beta` 0.1,
    say, and the start as its reference. Departs from the paper: pairs are of the policy as it is, renewed every step.
    """
    spec = RolloutSpec(group=group, augment=(Paired(ScoreJudge(0.0), Extremes("reward")),))
    made = choice(BASES, "base", base)(beta, margin)
    return made.but(rollouts=spec, epochs=epochs, minibatches=minibatches, rows=own_pairs)


_TESTS = "tests/methods/test_reward_models.py::"


def _tests(*names: str) -> tuple[str, ...]:
    return tuple(_TESTS + name for name in names)


def _read(*names: str) -> tuple[str, ...]:
    return tuple("tests/rewards/test_models.py::" + name for name in names)


METHODS = (
    Method(
        slug="reward-model", build=reward_model, family="preference", title="Bradley-Terry reward model",
        paper="arXiv 2203.02155",
        equation="L = mean_pairs -log sigmoid(s(w) - s(l) - margin (r(w) - r(l))) + center (s(w) + s(l))^2\ns = value at the end",
        identity_tests=_tests("test_scores_find_the_logits_of_preferences", "test_the_loss_by_hand",
                              "test_lists_are_all_their_pairs", "test_a_cycle_is_fitted_by_the_preference_model_alone"),
    ),
    Method(
        slug="preference-model", build=preference_model, family="preference", title="Pairwise preference model",
        paper="arXiv 2312.00886", equation="L = mean_pairs -log sigmoid(s(w | l) - s(l | w)),  s(y | y') = value at the end of y",
        identity_tests=_tests("test_a_cycle_is_fitted_by_the_preference_model_alone",
                              "test_preferences_are_antisymmetric_whatever_the_model",
                              "test_blind_to_its_rival_it_is_a_reward_model")
        + _read("test_a_preference_model_reads_the_rival_first"),
    ),
    Method(
        slug="best-of-n", build=best_of_n, family="preference", title="Best of n, distilled", paper="arXiv 2304.06767",
        equation="L = -mean_prompts log pi(argmax_i R(y_i))",
        identity_tests=_tests("test_best_of_n_gradient", "test_best_of_n_by_enumeration", "test_best_of_n_bound_is_tight",
                              "test_expected_best_is_unbiased"),
    ),
    Method(
        slug="cdr-dr-sow", build=dr_sow, row=12, family="preference", paper="arXiv 2411.02481",
        title="Dr. SoW: Density Ratio of Strong-over-weak LLMs for Reducing the Cost of Human Annotation in Preference Tuning",
        equation="R = log p_strong(y | x) - log p_weak(y | x);  SimPO on (argmax R, argmin R) of K own answers",
        claim="the further a strong model is aligned beyond a weak one, the better their density ratio orders answers by the "
              "true reward; preferences that it annotates raise that reward",
        identity_tests=_tests("test_the_ratio_is_the_reward_of_its_optimum",
                              "test_constants_of_a_prompt_change_sums_nothing_and_averages_something",
                              "test_rl_on_the_ratio_ends_at_the_strong_model", "test_annotation_takes_the_extremes")
        + _read("test_equal_models_have_no_ratio", "test_tokens_and_contexts_of_each_model"),
    ),
)  # fmt: skip
