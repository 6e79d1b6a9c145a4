"""A reward of every token that is learned beside the policy, where the verifier judges only whole answers.

rlfr    GRPO + reward-to-go of -coef * how unlike the hidden states of right answers a token's are (a flow's error)
oreal   leave-one-out REINFORCE, weighted by how sure a reward model of tokens is of the outcome; right and wrong
        answers are averaged apart

Both models are companions of the policy: they see its batches, add a column, and no gradient passes between them.
"""

from __future__ import annotations

from unipo.methods.method import Method, choice
from unipo.methods.policy_gradients import grpo
from unipo.objectives import (
    AffineOutcome,
    DiscountedReturn,
    FromColumn,
    GroupStd,
    KLPenalty,
    Knob,
    LeaveOneOut,
    Normalised,
    One,
    Plus,
    PolicyGradient,
    Signed,
    TokenMean,
)
from unipo.recipe import Recipe, RolloutSpec
from unipo.sources.companions.flow import FlowReward
from unipo.sources.companions.token_rewards import TokenCredit
from unipo.sources.controllers import Controller, Switch
from unipo.sources.stages.augment import Demonstrated
from unipo.sources.text.filters import MixedOutcomes, OneOfEach, Relabel, RepeatedByDifficulty


def started_at(step: int) -> tuple[Controller, ...]:
    """The policy stands still until `step` (0: never) while its companions learn: a switch of its learning rate."""
    return (Switch(knob="learning_rate", value=0.0, after=1.0, at=step),) if step else ()


def rlfr(*, group: int = 8, flow: float = 0.01, time: float = 0.8, threshold: float = 0.6, top: int = 15,
         context: str = "previous", offline: int = 20, updates: int = 4, flow_rate: float = 1e-4, depth: int = 6,
         clip: float = 0.2, eps: float = 1e-6, kl: float = 0.0, entropy: float = 0.0) -> Recipe:  # fmt: skip
    """RLFR (arXiv 2510.10201): tokens whose hidden states a flow of right answers does not expect are punished.

        A_n = z_i + sum_{m >= n} r_m,   z the z-score of the outcome,   r_n = -flow * d_n
        d_n = t / (1 - t) * mean (v(x_t, t, c) - (h - e))^2,  x_t = t h + (1 - t) e, at t = `time`, c = a neighbour's h
        d is scaled to [0, 1] in each answer; what is not above `threshold` or not among its `top` largest is 0

    h: hidden states at 25, 50 and 75 % of the depth when the token has been read; v: AdaLN-MLP of `depth` blocks. In the
    first `offline` steps the policy stands still and v is fitted to the prompts' demonstrations, then to right rollouts of
    the batch, by `updates` updates a step. `context`: previous (the code's token_post, its 7B runs), next (token_pre), or
    the mean of both.

    Departs from the paper: h is divided by its root mean square; aggregated per episode, as GRPO (the card's choice).
    """
    base = grpo(group=group, clip=clip, eps=eps, kl=kl, entropy=entropy)
    if not flow:
        return base
    shaped = Plus((Normalised(scale=GroupStd(eps)), DiscountedReturn(1.0, "token_reward")))
    model = FlowReward(coefficient=flow, time=time, threshold=threshold, top=top, context=context, offline=offline,
                       updates=updates, depth=depth, learning_rate=flow_rate)  # fmt: skip
    return base.but(
        advantage=shaped, companions=(model,), augment=(Demonstrated(),) if offline else (),
        learning_rate=Knob("learning_rate", 1.0), controllers=started_at(offline),
    )  # fmt: skip


CREDIT = {"learned": FromColumn("token_weight"), "one": One()}
KEPT: dict[str, tuple[Relabel, ...]] = {"pair": (OneOfEach(),), "all": ()}
REPEATS: dict[str, tuple[Relabel, ...]] = {"none": (), "paper": (RepeatedByDifficulty(),)}


def oreal(*, group: int = 16, positive: float = 1.0, negative: float = 0.5, kl: float = 0.01, credit: str = "learned",
          kept: str = "pair", repeats: str = "none", warmup: int = 10, credit_rate: float = 1e-4) -> Recipe:  # fmt: skip
    """OREAL (arXiv 2502.06781): clone what is right, push away what is wrong, each token as far as it decided the outcome.

        A_i = R_i - mean_{j != i} R_j,  R = +-1, over all rollouts; groups of equal outcome are left out
        L   = positive * sum_{A > 0} -w_n A_i log pi(y_n) / tokens of these
            + negative * sum_{A < 0} -w_n A_i log pi(y_n) / tokens of these + kl * TOK( k3(pi || ref) )
        w_n = max(2 c_n - 1, 0) in right answers, max(1 - 2 c_n, 0) in wrong ones,  c: see `TokenCredit`

    `kept`: pair (one right and one wrong rollout of each prompt are trained on) or all. `credit`: learned, or one (w = 1).
    `repeats` paper: groups solved less than .2, .6, .8 of the time count 6, 4, 2 times, easier ones not at all (the paper
    repeats prompts, by an earlier model's rate).
    The policy stands still for the first `warmup` steps while the reward model learns: before it has, all w are 0.

    Departs from the paper: rates of small models (paper: policy 5e-7, reward model 2e-6).
    Of its code: the KL is over everything kept, and cloning is multiplied by A (the paper states it without).
    """
    learned = credit == "learned"
    advantage, weight = Normalised(center=LeaveOneOut(), outcome=AffineOutcome()), CREDIT[credit]
    raised, lowered = (
        PolicyGradient(advantage=advantage, weight=weight, counted=Signed(sign), aggregate=TokenMean(), name=name)
        for sign, name in ((1, "positive"), (-1, "negative"))
    )
    objective = positive * raised + negative * lowered if negative else positive * raised
    return Recipe(
        objective=objective + kl * KLPenalty() if kl else objective,
        rollouts=RolloutSpec(group=group, keep=MixedOutcomes(), relabel=(*choice(REPEATS, "repeats", repeats), *KEPT[kept])),
        learning_rate=Knob("learning_rate", 1.0), controllers=started_at(warmup if learned else 0),
        companions=(TokenCredit(learning_rate=credit_rate),) if learned else (),
    )  # fmt: skip


_TESTS = "tests/methods/test_token_rewards.py::"
METHODS = (
    Method(
        slug="rlfr", build=rlfr, row=16, family="llm-rl",
        title="RLFR: Extending Reinforcement Learning for LLMs with Flow Environment", paper="arXiv 2510.10201",
        equation="A_n = z_i + sum_{m >= n} -flow * d_m\nd: error of a flow at the token's hidden states, scaled in the answer, "
                 "above a threshold, the largest\nthe rest is GRPO",
        claim="a flow of expert solutions has a larger error on wrong answers than on right ones, and as a reward of tokens "
              "it is at least as good as GRPO at equal steps",
        identity_tests=tuple(_TESTS + t for t in (
            "test_without_coefficient_or_threshold_rlfr_is_grpo", "test_the_best_flow_of_a_normal_scores_outliers",
            "test_reward_to_go_of_tokens", "test_a_fitted_flow_has_the_error_of_the_best_one", "test_standouts_by_hand")),
    ),
    Method(
        slug="oreal", build=oreal, row=156, family="llm-rl",
        title="Exploring the Limit of Outcome Reward for Learning Mathematical Reasoning", paper="arXiv 2502.06781",
        equation="L = positive * TOK+(-w A log pi) + negative * TOK-(-w A log pi) + kl TOK(k3)\nA = RLOO of +-1, one right and "
                 "one wrong rollout of a prompt\nw: running certainty of a token reward model",
        claim="learning from right answers alone loses entropy; wrong ones, reshaped, improve pass@1, and token weights more",
        identity_tests=tuple(_TESTS + t for t in (
            "test_advantages_of_signs", "test_with_a_common_denominator_oreal_is_rloo",
            "test_one_pair_of_a_prompt_has_the_direction_of_its_policy_gradient",
            "test_a_blind_reward_model_leaves_the_divergence_alone", "test_cloning_right_answers_conditions_the_policy",
            "test_the_ratio_form_has_the_same_gradient", "test_running_certainty_by_hand")),
    ),
)  # fmt: skip
