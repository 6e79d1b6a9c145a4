"""Methods that watch their own gradient and set something by it: which prompts are drawn, the baseline, the step size.

sec-curriculum   drawn:         softmax over categories of prompts of a running mean of |advantage|
oblr-po          baseline:      rewards of the others, weighted by the squared norms of their scores
                 learning rate: times SNR / (1 + SNR), the share of the measured gradient that is signal

What is learned from the rest is plain GRPO, and REINFORCE.
"""

from __future__ import annotations

from unipo.methods.method import Method
from unipo.methods.policy_gradients import grpo
from unipo.objectives import EpisodeSum, Knob, Normalised, NormWeighted, PolicyGradient
from unipo.recipe import Recipe, RolloutSpec
from unipo.sources.controllers import SignalShare
from unipo.sources.text.arms import ArmChoice


def sec_curriculum(*, group: int = 8, by: str = "category", rate: float = 0.5, temperature: float = 1.0,
                   rule: str = "softmax", epsilon: float = 0.1, signal: str = "advantage", unsampled: str = "decay",
                   clip: float = 0.2, eps: float = 1e-6, kl: float = 0.0, entropy: float = 0.0) -> Recipe:  # fmt: skip
    """Self-evolving curriculum (arXiv 2505.14970): GRPO whose prompts come from the categories that teach most now.

        category of each prompt ~ softmax(Q / temperature)                    Q = 0 at the start: uniform
        Q(c) <- (1 - rate) Q(c) + rate * mean over rollouts of c of mean_n |A_n|

    Categories are the levels of an embedded task (all of them unless TASK names some), or the joint values of the columns
    `by` of a dataset. `signal`: advantage, unnormalised (|R - mean_g|) or progress (change of the mean reward); `rule`:
    softmax, proportional (Q / sum Q) or greedy (with `epsilon`). A category that was not drawn is paid 0, as in the
    paper's code; its text keeps the old value (`unsampled="keep"`). temperature: 1 (countdown), 0.4 (math).
    """
    arms = ArmChoice(by=by, rate=rate, temperature=temperature, rule=rule, epsilon=epsilon, signal=signal,
                     unsampled=unsampled)  # fmt: skip
    return grpo(group=group, clip=clip, eps=eps, kl=kl, entropy=entropy).but(arms=arms)


def oblr_po(*, group: int = 8, parts: int = 8, decay: float = 0.9) -> Recipe:
    """OBLR-PO (arXiv 2511.23310): the baseline of least variance, and a step as long as the gradient is certain.

        L    = - SUM( (R_i - b_i) log pi(y_n) )
        b_i  = sum_{j != i} n_j R_j / sum_{j != i} n_j              n_j = || grad log pi(y_j) ||^2
        rate = base rate * SNR / (1 + SNR)                          SNR = |grad J|^2 / Var(g)

    n_j by the gradient with respect to the logits, sum_n (1 - 2 pi(y_n) + sum_a pi^2), which is exact for a table (the paper
    states no estimator). Left out, i keeps the gradient unbiased. Var(g) of the batch's gradient is estimated from its
    `parts` (0: the rate stays), and both norms are averaged over steps (`decay`). The theory is of plain gradient steps; with
    Adam the factor multiplies its rate.
    """
    objective = PolicyGradient(advantage=Normalised(center=NormWeighted()), aggregate=EpisodeSum())
    recipe = Recipe(objective=objective, rollouts=RolloutSpec(group=group))
    if not parts:
        return recipe
    share = SignalShare(knob="learning_rate", decay=decay)
    return recipe.but(learning_rate=Knob("learning_rate", 1.0), controllers=(share,), gradient_parts=parts)


_TESTS = "tests/methods/test_self_tuning.py::"
METHODS = (
    Method(
        slug="sec-curriculum", build=sec_curriculum, row=129, family="data",
        title="Self-Evolving Curriculum for LLM Reasoning", paper="arXiv 2505.14970",
        equation="category ~ softmax(Q / temperature)\nQ(c) <- (1 - rate) Q(c) + rate * mean |A| of the rollouts of c\n"
                 "the rest is GRPO",
        claim="with equal rollouts, drawing categories by |advantage| ends above uniform draws on the hardest and on "
              "unseen levels, and moves from easy to hard",
        identity_tests=tuple(_TESTS + t for t in (
            "test_without_values_or_sharpness_arms_are_uniform", "test_mean_absolute_advantage_of_binary_rewards",
            "test_a_constant_payment_is_approached_geometrically", "test_a_constant_added_to_all_values_changes_nothing",
            "test_arms_that_were_not_sampled", "test_signals_of_arms", "test_prompts_of_an_arm_come_in_turn")),
    ),
    Method(
        slug="oblr-po", build=oblr_po, row=144, family="theory",
        title="OBLR-PO: A Theoretical Framework for Stable Reinforcement Learning", paper="arXiv 2511.23310",
        equation="L = -SUM((R - b) log pi),  b = mean of the others' R weighted by |grad log pi|^2\n"
                 "learning rate * max(|g|^2 - V, 0) / |g|^2,  V = variance of the batch's gradient",
        claim="the norm-weighted baseline has less gradient variance than none, the mean and leave-one-out, and the "
              "signal-to-noise learning rate makes training robust to its base rate",
        identity_tests=tuple(_TESTS + t for t in (
            "test_two_arms_with_the_best_baseline_have_no_variance", "test_the_best_baseline_minimises_the_variance",
            "test_equal_norms_give_leave_one_out", "test_a_constant_added_to_rewards_moves_the_baseline_alone",
            "test_the_group_estimates_the_best_baseline", "test_the_estimator_is_unbiased",
            "test_the_rate_follows_the_share_of_signal", "test_noise_is_the_variance_of_the_gradient")),
    ),
)  # fmt: skip
