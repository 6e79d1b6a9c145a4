"""What helps a group that fails: hints, teachers, ground truth, old successes, prefixes.

A group whose answers are all wrong teaches nothing. Each of these puts something into reach that the policy rarely finds by
itself, and differs in what is shown, whose rows get it, and how rows that the policy did not write are weighted:

                 when           what                        rows                  weight        mask
    guide-grpo   all failed     a hint, scored without it   join the group        r to hinted   clip
    pope         every prompt   shortest useful prefix      groups of their own   r             clip
    ampo         all failed     teachers best understood    replace failed ones   shaped        -
    tempsamp     every prompt   the right answer            join the group        1             -
    arpo-replay  all failed     a remembered success        replaces the first    r to now      clip

Advantages are the group's, over everybody in it: GRPO's z-score, in tempsamp of softened rewards, in ampo the centred reward.
Rows that the policy wrote itself have GRPO's ratio and clip beside them (in tempsamp 1 too). With nothing to show, and where
nothing fails, each is its base, GRPO or Dr. GRPO, exactly. shaped: gamma p / (p + gamma)^2, LUFFY's.
"""

from __future__ import annotations

from collections.abc import Mapping

from unipo.methods.method import Method, choice
from unipo.methods.policy_gradients import dr_grpo, grpo, regularised
from unipo.objectives import (
    Advantage,
    Anchored,
    ClipMask,
    Condition,
    DualClipMask,
    EpisodeMean,
    EvenAndLow,
    GroupStd,
    KLPenalty,
    MaskByRows,
    Normalised,
    One,
    Outcome,
    Part,
    PolicyGradient,
    Product,
    SequenceRatio,
    ShapedProbability,
    SoftenedOutcome,
    SolvedAtMost,
    TokenMean,
    TokenRatio,
    Weight,
    WeightByRows,
    answers,
    demonstrations,
)
from unipo.recipe import Recipe
from unipo.sources.stages.guidance import GuidedPrompts, Hint, Hinted, Prefix, Share, ShortestUseful
from unipo.sources.stages.injection import AtRandom, BestUnderstood, FailedRows, Injected, Ranking, Recalled

RATIOS: Mapping[str, Weight] = {"token": TokenRatio(), "sequence": SequenceRatio(), "none": One()}
RANKINGS: Mapping[str, Ranking] = {"understood": BestUnderstood(), "random": AtRandom(), "given": Ranking()}
STUDY = "Study this beginning of a solution, check it, and complete it.\n{hint}\n\n{prompt}"


def guide_grpo(*, group: int = 8, threshold: float = 0.0, column: str = "hint", share: float = 1.0,
               form: str = "{hint}\n{prompt}", ratio: str = "token", pooled: bool = True, clip_low: float = 0.2,
               clip_high: float = 0.28, kl: float = 0.0) -> Recipe:  # fmt: skip
    """Guide-GRPO (arXiv 2506.13923): where all fail, sample as often with a hint, and correct for the hint.

        success rate of the group <= threshold:  as many more rollouts y ~ pi(. | q, hint), pooled with the plain ones
        r_n = pi(y_n | q, y_<n) / pi_old(y_n | q, hint, y_<n)       not 1 at the first update already; plain rows: as ever
        L   = - SEQ( min(r_n A, clip(r_n, 1 - clip_low, 1 + clip_high) A) ),   A = z-score

    `column` of the data: the hint; `share`: of its tokens, so that the beginning of a `solution` is a hint too; `form`: where
    it stands in the prompt. `threshold` 1: always guided. `ratio`: token, sequence, or none (no correction: the hinted policy
    is imitated). `pooled` False: the guided rollouts are a group of their own. The paper does not say how it groups, nor its
    constants.
    """  # fmt: skip
    weight = choice(RATIOS, "ratio", ratio)
    stage = Hinted(SolvedAtMost(threshold), Hint(column, form), Share(share), pooled)
    base = grpo(group=group).but(weight=weight, mask=ClipMask(clip_low, clip_high, weight), augment=(stage,))
    return regularised(base, kl, 0.0)


def pope(*, group: int = 8, clip: float = 0.2, most: float = 0.25, grid: int = 8, samples: int = 16, begin: str = "prompt",
         column: str = "solution", kl: float = 0.0) -> Recipe:  # fmt: skip
    """POPE (arXiv 2601.18779): hard prompts also with the beginning of a solution, as prompts of their own.

        for every prompt x with solution z: the shortest of `grid` beginnings, up to `most` of z, behind which one of `samples`
        answers is right (the longest where none is)
        L = GRPO on the group of x and on the group of (x, beginning), side by side

    What is shown is prompt: no loss, no weight, no ratio between contexts; what transfers does so through states that both
    groups reach. `begin`: "prompt", with the request to study and complete it, or "answer", which then begins with it. The
    search is made when a prompt is first met, by the policy of that step (paper: before training).
    """
    guides = {"prompt": Hint(column, STUDY), "answer": Prefix(column)}
    guide = choice(guides, "begin", begin)
    stage = GuidedPrompts(Condition(), guide, ShortestUseful(most, grid, samples))
    return grpo(group=group, clip=clip, kl=kl).but(augment=(stage,))


def ampo(*, group: int = 8, teachers: int = 2, pick: str = "understood", always: bool = False, gamma: float = 0.1,
         clip: float = 0.2, dual: float = 10.0, budget: float = 1024, column: str = "teachers",
         entropy: float = 0.001) -> Recipe:  # fmt: skip
    """AMPO (arXiv 2510.02227): where all fail, the answers of the teachers that the policy understands best.

        all wrong:  `teachers` failed rows make room for teachers' answers, ranked by 0.1 [well formed]
                    + 0.9 mean_t pi(a_t | q, their reasoning, a_<t) of the right answer a; their reward is at least 1
        A = R - mean over the mixed group
        L = - CONST( min(r_n A, clip(r_n) A), dual clip )        own rows
            - CONST( A pi / (pi + gamma) )                       teachers' rows: denominator 1, shaped as in LUFFY, no clip

    `column` of the data: a list of right answers. `pick`: understood, random, or given (the first ones). `always`: not only
    where all fail. With one teacher, always, it is LUFFY (arXiv 2504.14945) without the std. Well formed is our answer's mark
    behind some reasoning (the paper: its tags).
    """  # fmt: skip
    stage = Injected(Condition() if always else SolvedAtMost(0.0), column, teachers, choice(RANKINGS, "pick", pick),
                     FailedRows(at_random=True), least=1.0)  # fmt: skip
    base = dr_grpo(group=group, clip=clip, budget=budget)
    mixed = base.but(
        weight=WeightByRows(demonstrations, ShapedProbability(gamma), TokenRatio()),
        mask=MaskByRows(demonstrations, others=Product((ClipMask(clip, clip), DualClipMask(dual)))),
        rows=answers, augment=(stage,),
    )  # fmt: skip
    return regularised(mixed, 0.0, entropy)


def tempsamp(*, group: int = 3, correction: str = "soft", threshold: float = 0.8, slope: float = 0.01, steepness: float = 1.0,
             anchor: float = 1.2, scale: float = 0.8, kl: float = 0.04, eps: float = 1e-6) -> Recipe:  # fmt: skip
    """TempSamp-R1 (arXiv 2509.18056): the right answer in every group, its advantage kept from drowning the others'.

        A = z-score over `group` rollouts and the demonstration together, of softened rewards
        R' = c + slope log(R - c + 1) above the threshold c,   c - (e^(steepness (c - R)) - 1) / (e^steepness - 1) below
        L = - SEQ( A log pi ) + kl SEQ( k3(pi || ref) )          over all rows, the demonstration as if it were on-policy

    `correction`: soft (above), downscaled (the demonstration's reward times `scale`), anchored (z-score of the rollouts alone,
    the demonstration has `anchor` times their largest), or none. One update per batch: weight 1. lr and kl are not given.
    """  # fmt: skip
    softened: Part = SoftenedOutcome(threshold, slope, steepness)
    plain = Normalised(scale=GroupStd(eps))
    advantages: dict[str, Advantage] = {
        "soft": plain.but(outcome=softened), "anchored": Anchored(plain, demonstrations, anchor), "downscaled": plain,
        "none": plain,
    }  # fmt: skip
    advantage = choice(advantages, "correction", correction)
    stage = Injected(Condition(), scale=scale if correction == "downscaled" else 1.0)
    objective = PolicyGradient(advantage=advantage, aggregate=EpisodeMean(), rows=answers)
    base = grpo(group=group).but(objective=objective, augment=(stage,))
    penalty = kl * KLPenalty(aggregate=EpisodeMean(), rows=answers)
    return base.but(objective=objective + penalty) if kl else base


def arpo_replay(*, group: int = 8, clip_low: float = 0.2, clip_high: float = 0.3, dual: float = 3.0, capacity: int = 8,
                mean: float = 0.2, std: float = 0.05, right: float = 0.1, success: str = "reward", to: str = "old",
                eps: float = 1e-6) -> Recipe:  # fmt: skip
    """ARPO (arXiv 2505.16282): where all fail, an earlier success of the same task takes the place of the first answer.

        all failed (mean of the group < mean, std < std): one success of this task's last `capacity`, drawn at random
        L = - TOK( min(r_n A, clip(r_n, 1 - clip_low, 1 + clip_high) A), dual clip ),   A = z-score, the success included

    `success`: the column of the outcome that is judged, where the reward has other parts ("reward.arithmetic").
    `to`: old, as in the paper: r is to the policy before the update for every row, so that a remembered answer counts as fresh;
    behavior: r is to who wrote it. The paper's filter of tasks is the data's.
    """
    outcome, ratio = Outcome(success), TokenRatio(to)
    stage = Recalled(EvenAndLow(mean, std, outcome), FailedRows(), right, capacity, outcome=outcome)
    mask = Product((ClipMask(clip_low, clip_high, ratio), DualClipMask(dual, ratio)))
    return grpo(group=group, eps=eps).but(weight=ratio, mask=mask, aggregate=TokenMean(), augment=(stage,))


_TESTS = "tests/methods/test_guided.py::"
METHODS = (
    Method(
        slug="guide-grpo", build=guide_grpo, row=67, family="llm-rl",
        title="Adaptive Guidance Accelerates Reinforcement Learning of Reasoning Models", paper="arXiv 2506.13923",
        equation="all fail: as many rollouts with a hint, pooled\n"
                 "L = -SEQ(min(r A, clip(r) A)),  r = pi(y | q) / pi_old(y | q, hint)",
        claim="on prompts that are almost never solved, Guide learns where GRPO and GRPO on mixed groups do not; hints for every "
              "prompt are worse",
        identity_tests=tuple(_TESTS + t for t in (
            "test_guide_without_a_trigger_is_grpo", "test_guide_with_an_empty_hint_is_grpo_with_twice_the_samples",
            "test_the_sequence_ratio_takes_the_hint_out_of_the_expectation",
            "test_the_token_ratio_damps_what_the_hint_reveals", "test_either_grouping_has_one_direction",
            "test_hinted_rows_are_scored_on_the_plain_prompt")),
    ),
    Method(
        slug="pope", build=pope, row=157, family="llm-rl",
        title="POPE: Learning to Reason on Hard Problems via Privileged On-Policy Exploration", paper="arXiv 2601.18779",
        equation="L = GRPO on groups of x and groups of (x, shortest useful prefix of a solution), 1 : 1",
        claim="hard prompts are solved without guidance after training with prefixes, where GRPO and GRPO with an "
              "entropy bonus do not get there",
        identity_tests=tuple(_TESTS + t for t in (
            "test_pope_with_an_empty_prefix_is_grpo_with_duplicated_prompts", "test_a_whole_solution_teaches_nothing",
            "test_a_prefix_is_context", "test_guided_gradient_is_that_of_another_start",
            "test_the_shortest_useful_prefix_is_found", "test_a_prefix_is_kept_with_the_chance_of_a_success",
            "test_scoring_on_the_plain_prompt_is_another_gradient")),
    ),
    Method(
        slug="ampo", build=ampo, row=65, family="llm-rl",
        title="More Than One Teacher: Adaptive Multi-Guidance Policy Optimization for Diverse Exploration",
        paper="arXiv 2510.02227",
        equation="all fail: the best understood teachers replace failed rows\nL = -CONST(min(r A, clip(r) A)) own rows, "
                 "-CONST(A pi / (pi + gamma)) teachers',  A = R - mean_g",
        claim="with several teachers AMPO solves more than GRPO, keeps more ways to a right answer than one teacher alone, and "
              "understood teachers are no worse than random ones",
        identity_tests=tuple(_TESTS + t for t in (
            "test_ampo_with_any_success_is_dr_grpo", "test_ampo_without_teachers_is_dr_grpo",
            "test_advantages_of_inserted_answers", "test_the_gradient_of_teachers_is_shaped",
            "test_one_teacher_always_is_luffy_without_the_std", "test_the_best_understood_teacher_is_taken")),
    ),
    Method(
        slug="tempsamp", build=tempsamp, row=53, family="llm-rl",
        title="TempSamp-R1: Effective Temporal Sampling with Reinforcement Fine-Tuning for Video LLMs", paper="arXiv 2509.18056",
        equation="L = -SEQ(A log pi) + kl SEQ(k3),  A = z-score of softened rewards over rollouts and the right answer",
        claim="the right answer in the group with softened rewards beats GRPO and the right answer without them",
        identity_tests=tuple(_TESTS + t for t in (
            "test_softened_rewards_by_hand", "test_corrections_of_the_card", "test_tempsamp_without_a_demonstration_is_grpo",
            "test_one_better_answer_among_equals")),
    ),
    Method(
        slug="arpo-replay", build=arpo_replay, row=99, family="llm-rl",
        title="ARPO:End-to-End Policy Optimization for GUI Agents with Experience Replay", paper="arXiv 2505.16282",
        equation="all fail: one remembered success of the task replaces the first row\n"
                 "L = -TOK(min(r A, clip(r) A)), dual clip,  A = z-score, r to the policy before the update",
        claim="with remembered successes GRPO learns sparse tasks faster, and more of its groups have a signal",
        identity_tests=tuple(_TESTS + t for t in (
            "test_arpo_with_an_empty_memory_is_grpo", "test_arpo_with_a_success_is_grpo", "test_advantages_with_one_recalled",
            "test_the_memory_is_a_bounded_queue", "test_recalled_answers_count_as_fresh")),
    ),
)  # fmt: skip
