"""Ranked lists, and what pairs leave out: whole orders, how good either answer is, and who wrote them.

lipo                  lists of rated answers     learning to rank on beta log(pi / ref)
reward-augmented-dpo  pairs with ratings         both answers right, each behind the rating that it earned
suboptimal-onpolicy   own answers and rewards    two switches: answers of the policy as it is, or of its start; push the
                                                 others away, or imitate the best alone
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from unipo.methods.method import Method, choice
from unipo.methods.preferences import dpo
from unipo.objectives import (
    Advantage,
    AdvantageWeight,
    BatchMax,
    EpisodeSum,
    GroupStd,
    HingeLink,
    Link,
    ListLoss,
    ListSoftmax,
    Listwise,
    LogRatioScore,
    Normalised,
    Objective,
    Pairwise,
    PlackettLuce,
    PointLogistic,
    PointSquare,
    PolicyGradient,
    RankedPairs,
    RankWeight,
    Rating,
    SquaredLink,
    SwapGain,
    WinShare,
    own_pairs,
    pairs,
)
from unipo.recipe import Recipe, RolloutSpec, Snapshot
from unipo.sources.spec import Writer
from unipo.sources.stages.goals import GoalAsked, GoalPairs, RatingGoal
from unipo.sources.stages.preferences import Compared, FarApart, Judge, Opponents, Paired, ScoreJudge, judge_of
from unipo.sources.stages.rated import Rated

LABELS: Mapping[str, Rating | WinShare] = {"wins": WinShare(), "ratings": Rating()}


def lipo(*, beta: float = 0.05, loss: str = "lambda", labels: str = "wins", base: float = 2.0, sized: bool = True,
         normalised: bool = False, per: str = "pair", lists: str = "stored", group: int = 8, judge: str | Judge = "reward",
         temperature: float = 1.0, epochs: int = 1, minibatches: int = 1) -> Recipe:  # fmt: skip
    """Listwise preference optimisation (arXiv 2402.01878): learning to rank, the policy being the scorer.

        s_i = beta log(pi / ref)(y_i)        psi_i = share of its list that y_i beats, itself counting one half
        L   = mean over psi_i > psi_j of  K |2^psi_i - 2^psi_j| |1 / D_i - 1 / D_j| * - log sigmoid(s_i - s_j)

    D = log_base(1 + rank of y by s), detached; `sized`, `per` pair and no division by the ideal DCG (`normalised`) are what
    rax does, which the authors used. `loss`: lambda, or without its weight pairs and hinge, or list-mle, softmax (of lists),
    point-mse and point-sigmoid. `labels` ratings: psi is the column `rating` as it is. `lists` own: of `group` rollouts, psi
    the mean probability by which the judge prefers them to the group. Departs from the paper: no pairwise ranking model is
    trained for psi (give one as `judge`); ties of s are broken by the answers' content in place of at random.
    """
    weight = SwapGain(base, sized, normalised)
    ranking: Mapping[str, ListLoss] = {
        "lambda": RankedPairs(weight=weight, per=per), "pairs": RankedPairs(per=per),
        "hinge": RankedPairs(HingeLink(), per=per), "list-mle": PlackettLuce(), "softmax": ListSoftmax(),
        "point-mse": PointSquare(), "point-sigmoid": PointLogistic(),
    }  # fmt: skip
    own = choice({"stored": False, "own": True}, "lists", lists)
    rated = (Compared(judge_of(judge, temperature), Opponents(itself=1.0)), Rated("win_rate"))
    objective = Listwise(
        score=LogRatioScore(beta), rating=Rating() if own else choice(LABELS, "labels", labels),
        ranking=choice(ranking, "loss", loss), rows=own_pairs if own else pairs,
    )  # fmt: skip
    spec = RolloutSpec(group=group, augment=rated if own else ())
    return Recipe(objective=objective, rollouts=spec, epochs=epochs, minibatches=minibatches)


SCORE = "Overall score: {rating:g}\n"


# ---- pairs whose answers are both right, each where it is asked for ---------------------------------------------------
def reward_augmented_dpo(*, beta: float = 0.01, label_smoothing: float = 0.0, goal: str | RatingGoal = SCORE,
                         best: float = 10.0, step: float = 1.0) -> Recipe:  # fmt: skip
    """Reward-augmented preference data (arXiv 2410.08067): behind the goal r the answer that is rated r is preferred.

        (x | r):   y over y'         (x | r'):  y' over y             for every pair y, y' with ratings r > r'
        L = mean over both copies of  - log sigmoid( beta log(pi / ref)(chosen) - beta log(pi / ref)(rejected) )

    `goal`: the text in front of every prompt, the reference's too; at evaluation the rating `best` is asked for. Ratings are
    rounded to multiples of `step`. Any other pairwise loss learns of the same pairs with `.but(arrange=..., ask=...)`. Departs
    from the paper: the goal stands in front of a plain prompt and not in a system message.
    """
    said = goal if isinstance(goal, RatingGoal) else RatingGoal(goal, step)
    return dpo(beta=beta, label_smoothing=label_smoothing).but(
        arrange=(GoalPairs(said),), rollouts=RolloutSpec(ask=GoalAsked(best, said))
    )


# ---- own answers, and what is pushed away ----------------------------------------------------------------------------
def suboptimal_onpolicy(*, loss: str = "best-of-n", negative: str = "mean", coefficient: float = 1.0, beta: float = 0.1,
                        gap: float = 0.2, refresh: int = 1, group: int = 10, epochs: int = 1,
                        minibatches: int = 1) -> Recipe:  # fmt: skip
    """Preference fine-tuning with two switches (arXiv 2404.14367): whose answers, and whether others are pushed away.

        best-of-n  L = mean over prompts of  - log pi(best) + coefficient * N_neg log pi(others)

    `refresh` R: answers are written by the policy of every R-th step, and a prompt that comes again in between has the same
    ones; 0: by the start of the run, the same for ever. `epochs`: gradient steps on the same answers. `negative`: none, the
    worst, the mean or the sum over all but the best. `loss`: best-of-n, rwr (exp(R / beta), less one maximum of the batch in the
    exponent), reinforce (R - mean over population std), dpo (pairs at least `gap` apart), ipo ((margin - beta)^2 on those).
    Departs from the code: of equally bad answers the last is the worst.
    """
    away = {"none": (0.0, 0.0), "worst": (0.0, 1.0), "mean": (1.0, 0.0), "sum": (group - 1.0, 0.0)}
    others, worst = choice(away, "negative", negative)
    ranked = RankWeight(1.0, -coefficient * others, -coefficient * worst)
    exponential = AdvantageWeight(Normalised(center=BatchMax()), 1.0 / beta, 1.0)
    standard = Normalised(scale=GroupStd(eps=1e-8, ddof=0))
    objective = choice(
        {
            "best-of-n": _gradient(Advantage(), weight=ranked), "rwr": _gradient(Advantage(), weight=exponential),
            "reinforce": _gradient(standard), "dpo": Pairwise(score=LogRatioScore(beta), link=Link(), rows=own_pairs),
            "ipo": Pairwise(score=LogRatioScore(1.0), link=SquaredLink(target=beta), rows=own_pairs),
        }, "loss", loss,
    )  # fmt: skip
    paired = (Paired(ScoreJudge(0.0), FarApart(gap=gap)),) if isinstance(objective, Pairwise) else ()
    writers = {0: Writer("reference", redraw=0), 1: None}
    spec = RolloutSpec(group=group, augment=paired, writer=writers.get(refresh, Writer("writer", redraw=refresh)))
    snapshots = {"writer": Snapshot(every=refresh)} if refresh > 1 else {}
    return Recipe(objective=objective, rollouts=spec, snapshots=snapshots, epochs=epochs, minibatches=minibatches)


def _gradient(advantage: Advantage, **parts: Any) -> Objective:
    return PolicyGradient(advantage=advantage, aggregate=EpisodeSum(), **parts)


def _tests(*names: str) -> tuple[str, ...]:
    return tuple("tests/methods/test_preference_lists.py::" + name for name in names)


METHODS = (
    Method(
        slug="lipo", build=lipo, row=110, family="preference", paper="arXiv 2402.01878",
        title="LiPO: Listwise Preference Optimization through Learning-to-Rank",
        equation="L = mean over psi_i > psi_j of Delta_ij * -log sigmoid(s_i - s_j),  s = beta log(pi / ref)\n"
                 "Delta_ij = K |2^psi_i - 2^psi_j| |1 / log2(1 + rank_i) - 1 / log2(1 + rank_j)|",
        claim="weighting pairs of a list by what their exchange changes of the ranking beats all pairs alike and the "
              "probability of the order, and these beat softmax and pointwise losses; it gains with the length of the list",
        identity_tests=_tests(
            "test_two_items_are_dpo", "test_swap_gain_is_the_change_of_dcg", "test_alike_weights_are_dpo_on_all_pairs",
            "test_list_mle_of_two_is_dpo", "test_hinge_of_two_is_slic", "test_shifts_and_sums_of_advantages",
            "test_equal_labels_contribute_nothing", "test_lists_match_a_second_derivation", "test_advantages_of_the_card",
            "test_win_shares_by_hand",
        ),
    ),
    Method(
        slug="reward-augmented-dpo", build=reward_augmented_dpo, row=5, family="preference", paper="arXiv 2410.08067",
        title="Reward-Augmented Data Enhances Direct Preference Alignment of LLMs",
        equation="L = mean of -log sigmoid(h(chosen) - h(rejected)) over (x | r): y > y' and (x | r'): y' > y\n"
                 "h = beta log(pi / ref), both of them behind the goal",
        claim="asked for the best rating, a policy of goal-conditioned pairs earns more than DPO's, which unlearns good answers "
              "that lost and learns bad ones that won",
        identity_tests=_tests(
            "test_a_goal_blind_policy_learns_nothing", "test_equal_ratings_cancel_and_are_dropped",
            "test_first_copies_of_one_goal_are_dpo", "test_both_answers_are_chosen_once",
        ),
    ),
    Method(
        slug="suboptimal-onpolicy", build=suboptimal_onpolicy, row=2, family="evaluation", paper="arXiv 2404.14367",
        title="Preference Fine-Tuning of LLMs Should Leverage Suboptimal, On-Policy Data",
        equation="L = -log pi(best) + c * mean over others log pi     (or rwr, reinforce, dpo, ipo)\n"
                 "answers of the policy of every R-th step, or of its start",
        claim="where the best answers are far from the reference, learning from the policy's own answers reaches far more reward "
              "than from the reference's with every loss, and sooner with a negative gradient",
        identity_tests=_tests(
            "test_reinforce_is_the_policy_gradient", "test_without_coefficient_the_best_is_imitated",
            "test_worst_of_two_is_dpo_at_the_reference", "test_negatives_by_hand", "test_forward_and_reverse_kl",
            "test_rwr_by_hand", "test_pairs_are_far_apart", "test_same_answers_until_they_are_renewed",
            "test_refreshing_is_epochs",
        ),
    ),
)  # fmt: skip
