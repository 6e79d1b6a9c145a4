"""Answers that somebody touched: corrected, explained, or begun.

             from                                     what is learned of it
opa-dpo      an answer and its correction             likelihood of the correction first, then DPO against that policy
rationale-po two answers, and why one is better       a pair loss, and the likelihood of the reason
drpo-reset   the beginning of a demonstration         PPO on how the policy goes on from there
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from unipo.methods.method import Method, choice
from unipo.methods.policy_gradients import ppo
from unipo.methods.preferences import dpo, ipo, orpo, simpo
from unipo.objectives import (
    BatchStd,
    Category,
    ClipMask,
    EpisodeMean,
    EpisodeSum,
    FromColumn,
    GeneralisedAdvantage,
    Knob,
    LessDivergence,
    Likelihood,
    LogRatioScore,
    Marked,
    Objective,
    Pairwise,
    Pointwise,
    PolicyGradient,
    Rescaled,
    StepReward,
    SumLogp,
    TokenMean,
    TokenRatio,
    ValueRegression,
    ValueTarget,
    WeightedScore,
    Where,
    nothing,
    pairs,
)
from unipo.recipe import Recipe, RolloutSpec, Snapshot
from unipo.sources.controllers import Switch
from unipo.sources.stages.beginnings import Reset
from unipo.sources.stages.editing import EDITED, GIVEN, NOBODY, Corrected, Editor, EditViews
from unipo.sources.stages.explained import RATIONALE, Explained


def opa_dpo(*, align: int = 50, beta: float = 0.1, editor: str | Editor = "", group: int = 1, severity: float = 4.0,
            context: float = 0.2, masked: float = 0.3, focus: float = 3.0, anchor: float = 1.0) -> Recipe:  # fmt: skip
    """On-policy-alignment DPO (arXiv 2501.09695): what the reference never says cannot be preferred, so first let it say that.

        steps < align:   L = - TOK( log pi(y) )                             over corrected answers and demonstrations
        then             L = ls( R_c(w) - R_c(l) ) + context ls( R_d(w | x) - R_d(w | masked x) ) + anchor (ls(r(w)) + ls(-r(l)))
        R_c(y) = beta sum_t c_t log( pi / pi_align )(y_t),   r = R_1,   ls = - log sigmoid

    l is an answer of the policy, w what the `editor` made of it, or the prompt's demonstration: L is the sum over both kinds
    of pairs (`editor` demonstration: the second alone). c_t = 1 + (4 - severity) / 2 on what was changed, else 1; d_t = `focus`
    on what was changed because the prompt was misread, else 1. The reference pi_align is the policy at step `align`. Without an
    editor the pairs are the data's (--pairs), and `severity` is of all that differs. Departs from the paper: answers are those
    of the policy as it is, drawn anew in every step; the optimiser is not started anew; masked prompts have other tokens where
    images have their mean.
    """
    phase = Knob("align", 1.0)
    shown = Likelihood(rows=pairs & Marked(), name="align")
    found: Objective = nothing
    for made in (GIVEN,) if editor == NOBODY else (EDITED, GIVEN) if editor else (EDITED,):
        found = found + _edited(made, beta, context, anchor)
    stages = (Corrected(editor, focus),) if editor else ()
    return Recipe(
        objective=phase * shown + (1 - phase) * found,
        rollouts=RolloutSpec(group=group, augment=stages),
        controllers=(Switch(knob="align", value=1.0, after=0.0, at=align),),
        snapshots={"aligned": Snapshot(at=(align,))},
        companions=(EditViews(severity=severity, masked=masked if context else -1.0),),
    )


def _edited(made: str, beta: float, context: float, anchor: float) -> Objective:
    """The terms on one kind of pairs, against the policy after the alignment."""
    rows, seen = pairs & Category(made, "made"), Category("context") & Category(made, "made")
    total: Objective = Pairwise(score=WeightedScore(beta, FromColumn("edit_weight"), "aligned"), rows=rows, name=made)
    if context:
        score = WeightedScore(beta, FromColumn("context_weight"), "aligned")
        total = total + context * Pairwise(score=score, rows=seen, name=f"{made}, masked")
    if anchor:
        total = total + 2.0 * anchor * Pointwise(
            score=LogRatioScore(beta, "aligned"), rows=rows, name=f"{made}, anchor"
        )
    return total


REWARDS: Mapping[str, str] = {"rescaled": "rescaled", "plain": "plain"}


BASES: Mapping[str, Callable[[float], Recipe]] = {
    "dpo": lambda strength: dpo(beta=strength),
    "ipo": lambda strength: ipo(beta=strength),
    "orpo": lambda strength: orpo(lam=strength),
    "simpo": lambda strength: simpo(beta=strength),
}
EXPLAINED = Category(RATIONALE)
REASONS: Mapping[str, Callable[[float], Objective]] = {
    "sum": lambda gamma: gamma * Likelihood(rows=EXPLAINED, aggregate=EpisodeSum(), name="rationale"),
    "mean": lambda gamma: gamma * Likelihood(rows=EXPLAINED, aggregate=EpisodeMean(), name="rationale"),
    "sigmoid": lambda gamma: 1.0 * Pointwise(score=SumLogp(gamma), rows=EXPLAINED, name="rationale"),
}


def rationale_po(*, base: str = "dpo", strength: float = 0.1, gamma: float = 0.1, loss: str = "sum",
                 form: str = Explained.form) -> Recipe:  # fmt: skip
    """Preferences with rationales (arXiv 2407.14477): the probability of a preference, and of the reason that is given for it.

        L = L_base(w, l) - gamma log pi(r | x, both answers)             from p(w > l, r | x) = p(w > l | x) p(r | x, w > l)

    r is the column `rationale` of the pairs, said behind the prompt and both answers as `form` shows them, in random order (the
    released code: the chosen first). `base`: dpo, ipo, orpo or simpo, of that `strength` (beta, or lam). `loss`: sum (the
    paper's), mean over tokens (RORPO, gamma 1), or sigmoid: - log sigmoid(gamma log pi(r)), as released, whose gradient is that
    of the sum for long rationales and half of it for certain ones.
    """
    recipe = choice(BASES, "base", base)(strength)
    if not gamma:
        return recipe
    return recipe.but(objective=recipe.objective + choice(REASONS, "loss", loss)(gamma), arrange=(Explained(form),))


def drpo_reset(*, mix: float = 0.5, column: str = "demonstration", shortest: int = 1, group: int = 1, clip: float = 0.2,
               gamma: float = 1.0, lam: float = 0.95, value: float = 0.1, value_clip: float = 0.2, kl: float = 0.05,
               rewards: str = "rescaled", epochs: int = 4, minibatches: int = 1) -> Recipe:  # fmt: skip
    """Dataset reset policy optimisation (DR-PO, arXiv 2404.08495): PPO whose rollouts begin somewhere along a demonstration.

        with probability mix: the first h tokens of a demonstration y, h uniform in shortest, ..., |y| - 1; the rest from pi
        r_n = R at the last token - kl log( pi_old / ref )(y_n), rescaled;   A = GAE over the whole answer, whitened
        L   = - TOK_m( min(r A, clip(r) A) ) + value TOK( clipped (V - return)^2 / 2 )        m: tokens that pi wrote

    Rewards, divergence, values and their statistics are of all tokens, the policy's loss of those that it wrote. With mix 1 and
    shortest 1 (the released script) the first token is never trained: keep mix below 1, or shortest 0. Without its penalty for
    answers that do not end: that is the reward's.
    """
    plain: StepReward = LessDivergence(kl) if kl else StepReward()
    reward = {"rescaled": Rescaled(plain), "plain": plain}[choice(REWARDS, "rewards", rewards)]
    gradient = PolicyGradient(
        advantage=GeneralisedAdvantage(gamma, lam, BatchStd(), reward), weight=TokenRatio(), mask=ClipMask(clip, clip),
        counted=Where("generated"), aggregate=TokenMean(),
    )  # fmt: skip
    critic = ValueRegression(target=ValueTarget(gamma, lam, reward), clip=value_clip or None)
    base = ppo(group=group, epochs=epochs, minibatches=minibatches)
    return base.but(objective=gradient + value * critic if value else gradient, control=None,
                    begin=Reset(mix, column, shortest))  # fmt: skip


_TESTS = "tests/methods/test_edited_answers.py::"
METHODS: tuple[Method, ...] = (
    Method(
        slug="opa-dpo", build=opa_dpo, row=1, family="preference",
        title="Mitigating Hallucinations in Large Vision-Language Models via DPO: On-Policy Data Hold the Key",
        paper="arXiv 2501.09695",
        equation="steps < align: L = -TOK(log pi) on corrections;  then, with reference pi_align,\n"
                 "L = ls(R_c(w) - R_c(l)) + context ls(R_d(w | x) - R_d(w | masked x)) + anchor (ls(r(w)) + ls(-r(l)))",
        claim="corrections that the start never says are learned by DPO only after an alignment that makes them the reference's "
              "own; better than by the alignment alone",
        identity_tests=tuple(_TESTS + t for t in (
            "test_opa_dpo_without_its_parts_is_dpo",
            "test_without_alignment_the_reference_is_the_start",
            "test_at_the_reference_a_step_moves_by_half_of_its_weight",
            "test_the_optimum_of_dpo_has_the_support_of_its_reference",
            "test_an_unmasked_prompt_teaches_nothing",
            "test_the_anchor_pushes_the_sides_apart",
            "test_changed_stretches_and_what_they_count",
            "test_corrections_make_pairs",
            "test_phases_of_opa_dpo")),
    ),
    Method(
        slug="rationale-po", build=rationale_po, row=114, family="preference",
        title="Data-Centric Human Preference Optimization with Rationales", paper="arXiv 2407.14477",
        equation="L = L_base(w, l) - gamma log pi(rationale | x, both answers)",
        claim="with rationales fewer pairs are needed for the same accuracy on held-out pairs; shuffled rationales do not help",
        identity_tests=tuple(_TESTS + t for t in (
            "test_without_gamma_it_is_its_base",
            "test_the_released_form_is_the_likelihood_of_long_rationales",
            "test_a_rationale_never_enters_the_margin",
            "test_rationales_stand_behind_both_answers_in_random_order")),
    ),
    Method(
        slug="drpo-reset", build=drpo_reset, row=44, family="llm-rl",
        title="Dataset Reset Policy Optimization for RLHF", paper="arXiv 2404.08495",
        equation="with probability mix an answer begins with h tokens of a demonstration\n"
                 "L = -TOK_m(min(r A, clip(r) A)) + value TOK((V - return)^2 / 2),  m: tokens that pi wrote",
        claim="where a reward is never found from the start, PPO from resets along demonstrations finds it, and does better than "
              "the demonstrations; with resets alone the first token is never learned",
        identity_tests=tuple(_TESTS + t for t in (
            "test_without_resets_it_is_ppo",
            "test_what_a_demonstration_wrote_has_no_policy_gradient",
            "test_behind_all_but_the_last_token_it_is_a_bandit",
            "test_starts_are_a_mixture",
            "test_the_divergence_is_paid_by_every_token_and_rewards_are_rescaled")),
    ),
)  # fmt: skip
