"""Known objectives on other data: several tasks in a batch, plain text with holes, descriptions that another model reasons from.

               objective                                       data
    q-insight  grpo, std + 1e-4, k3 KL 0.001                    ratings and classes; rewards by task, with a tolerance
    rlpt       grpo(asr rows) + lambda * grpo(msr rows), no KL  segments of text; 1 where a prefix of what follows is written
    sophia     likelihood of selected traces                    one round: the policy describes, a frozen model reasons

The rewards are in `unipo.rewards.graded`, the tasks in `unipo.tasks.rating`, `unipo.tasks.corpus`, `unipo.tasks.describe`.
"""

from __future__ import annotations

from unipo.methods.method import Method
from unipo.methods.policy_gradients import grpo, sft
from unipo.objectives import Category, rollouts
from unipo.recipe import Recipe
from unipo.sources.text.two_stage import DescribeThenReason


def q_insight(*, group: int = 8, clip: float = 0.2, eps: float = 1e-4, kl: float = 0.001) -> Recipe:
    """Q-Insight (arXiv 2503.22679): GRPO over several tasks at once, each with a reward of its own.

        R = R_task + R_form      score: 1 where |prediction - target| < 0.35;   class: .25, with its level 1
        L = grpo:  - SEQ( min(r_n A_i, clip(r_n) A_i) ) + kl * SEQ( k3(pi || ref) ),   A_i = (R_i - mean_g) / (std_g + eps)

    A prompt says its task in the column `task`, rewards are routed by it (`--reward within(width=0.35)@score`), and their parts
    are logged apart. Advantages are within a prompt's group: the scale of one task's rewards does not reach another's. The
    embedded task `rating` has both tasks; `near` is the tolerance without an edge.
    """  # fmt: skip
    return grpo(group=group, clip=clip, eps=eps, kl=kl)


def rlpt(*, group: int = 8, clip: float = 0.2, masked: float = 0.5) -> Recipe:
    """Reinforcement learning on pre-training data (arXiv 2509.19249): the text itself says what is right.

        J = E_ASR[ R ] + masked * E_MSR[ R ]        L = L_GRPO(ASR rows) + masked * L_GRPO(MSR rows)

    ASR: the next segment is written; MSR: a segment in the middle, what follows it being shown. R = 1 where a judge finds that
    the prediction is a prefix of the segments that stand there. Each loss is aggregated over its own episodes, so that `masked`
    (lambda, in the paper within (0, 1) and not stated) is not distorted by how many of either are in the batch. On-policy, no KL.

    Departs from the paper: the judge compares strings (`unipo.rewards.Prefix`) and asks for a least length.
    """
    base = grpo(group=group, clip=clip)
    next_segment = base.objective.but(rows=rollouts & Category("asr", "task"), name="asr")
    middle = base.objective.but(rows=rollouts & Category("msr", "task"), name="msr")
    return base.but(objective=next_segment + masked * middle if masked else next_segment)


def sophia(
    *, queries: int = 256, descriptions: int = 8, traces: int = 8, threshold: float = 0.75, keep: int = 1
) -> Recipe:
    """SOPHIA (arXiv 2507.16814): learn to reason from what one sees, from a model that reasons well and sees nothing.

        c_k ~ pi(. | describe, v)      y_kn ~ teacher(. | x, c_k)      R(c_k) = mean_n R(y_kn)
        selected: R(y) = 1, R(c of y) > threshold, and the shortest `keep` such traces of the query
        L = - TOK( log pi(y_t | x, v, y_<t) )                             over selected traces

    One round before the first step, of the initial policy. The ratio pi / mu is replaced by 1: the behaviour policy, two models,
    has another context. The description is neither in the context nor in the target, and does not see the question.

    Departs from the paper: TOK as in `sft` (the paper sums); 256 queries (80k).
    """
    spec = DescribeThenReason(prompts=queries, descriptions=descriptions, traces=traces, threshold=threshold, keep=keep)
    return sft().but(round=spec)


_TESTS = "tests/methods/test_text_applications.py::"
METHODS = (
    Method(
        slug="q-insight", build=q_insight, row=40, family="llm-rl",
        title="Q-Insight: Understanding Image Quality via Visual Reinforcement Learning", paper="arXiv 2503.22679",
        equation="L = -SEQ(min(r A, clip(r) A)) + 0.001 SEQ(k3(pi || ref)),  A = (R - mean_g) / (std_g + 1e-4)\n"
                 "R = [|prediction - target| < 0.35] or .25 [class] + .75 [class and level], + [form]",
        claim="score regression and damage classification learned together are at least as good as each alone",
        identity_tests=tuple(_TESTS + t for t in (
            "test_q_insight_with_a_tolerance_without_end_is_its_kl_term", "test_q_insight_on_one_task_is_grpo",
            "test_the_scale_of_one_tasks_rewards_does_not_reach_another")),
    ),
    Method(
        slug="rlpt", build=rlpt, row=45, family="llm-rl",
        title="Reinforcement Learning on Pre-Training Data", paper="arXiv 2509.19249",
        equation="L = L_GRPO(ASR rows) + lambda L_GRPO(MSR rows),  R = [prediction is a prefix of the text that follows]",
        claim="before RL with verifiable rewards, RL on plain text helps: cold start -> RLPT -> RLVR beats cold start -> RLVR",
        identity_tests=("tests/rewards/test_graded.py::test_the_prefix_judge_of_the_card", *(_TESTS + t for t in (
            "test_rlpt_of_one_token_has_the_gradient_of_next_token_accuracy",
            "test_rlpt_with_a_thought_has_the_gradient_of_the_marginal_probability", "test_rlpt_without_lambda_is_asr_alone",
            "test_rlpt_averages_each_task_over_its_own_episodes", "test_rlpt_with_a_constant_judge_has_no_gradient"))),
    ),
    Method(
        slug="sophia", build=sophia, row=48, family="llm-rl",
        title="Semi-off-Policy Reinforcement Learning for Vision-Language Slow-thinking Reasoning", paper="arXiv 2507.16814",
        equation="L = -TOK(log pi(y | x, v)), y ~ teacher(x, c), c ~ pi(describe, v), R(y) = 1, mean R of c > .75,\n"
                 "the shortest of the query",
        claim="traces selected by outcome and by what their description is worth teach more than distillation from an oracle's "
              "descriptions and more than GRPO from a weak start",
        identity_tests=tuple(_TESTS + t for t in (
            "test_sophia_is_likelihood_of_the_selected_traces", "test_one_trace_per_description_is_rejection_sampling",
            "test_the_share_of_descriptions_that_pass", "test_selection_by_hand",
            "test_a_description_is_worth_its_probability_of_success",
            "test_the_policy_as_its_own_reasoner_is_rejection_sampling")),
    ),
)  # fmt: skip
