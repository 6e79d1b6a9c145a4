"""Rollouts and demonstrations in one loss, and the rule that shares the policy between them.

L = a * L_RL(rollouts) + b * L_SFT(demonstrations)

chord      a = 1 - mu(step), b = mu(step)                     each averaged over its own tokens before mixing
hpt        per prompt: a = 1, b = 0 where it is solved often enough, else a = 0, b = 1
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from unipo.episodes import Episodes
from unipo.methods.method import Method
from unipo.methods.policy_gradients import grpo
from unipo.objectives import (
    Budget,
    Knob,
    Likelihood,
    Needs,
    Normalised,
    One,
    PolicyGradient,
    Probability,
    Rows,
    Signals,
    SuccessGate,
    TokenMean,
    TokenRatio,
    Uncertainty,
    demonstrations,
    success_rate,
)
from unipo.recipe import Recipe, RolloutSpec
from unipo.sources.controllers import WarmupCosine
from unipo.sources.stages.augment import Demonstrated

TOKEN_WEIGHTS = {"phi": Uncertainty(), "probability": Probability(), "one": One()}


def chord(*, group: int = 8, clip: float = 0.2, token_weight: str = "phi", peak: float = 0.1, valley: float = 0.1,
          warmup: int = 0, decay: int = 200) -> Recipe:  # fmt: skip
    """CHORD (arXiv 2508.11408): supervised learning on experts inside on-policy RL, both softly weighted.

        L     = (1 - mu) * L_GRPO + mu * L_SFT                mu(step): linear 0 -> peak, cosine peak -> valley
        L_SFT = - TOK( sg(phi(p_n)) log pi(y_n) ),  phi(p) = p (1 - p)          over expert tokens
        L_GRPO: clipped, z-score over the on-policy group, TOK over on-policy tokens

    `token_weight`: phi (CHORD-phi, with mu constant at 0.1), one (CHORD-mu: `chord_mu`), probability (SFT-IS ablation).
    """
    mu = Knob("mu", peak if not warmup else 0.0)
    rl = grpo(group=group, clip=clip).but(aggregate=TokenMean())
    sft = Likelihood(weight=TOKEN_WEIGHTS[token_weight])
    schedule = WarmupCosine(knob="mu", peak=peak, valley=valley, warmup=warmup, decay=decay)
    return rl.but(objective=(1 - mu) * rl.objective + mu * sft, controllers=(schedule,))


def chord_mu(*, group: int = 8, clip: float = 0.2, peak: float = 0.9, valley: float = 0.05, warmup: int = 0,
             decay: int = 200) -> Recipe:  # fmt: skip
    """CHORD-mu (arXiv 2508.11408): the schedule alone, without the token weight."""
    return chord(group=group, clip=clip, token_weight="one", peak=peak, valley=valley, warmup=warmup, decay=decay)


@dataclass(frozen=True, repr=False)
class Unsolved(Rows):
    """Demonstrations of prompts whose rollouts succeed at most `threshold` of the time."""

    threshold: float = 0.0

    def own_needs(self) -> Needs:
        return Needs.of(columns="reward kind")

    def __call__(self, episodes: Episodes, signals: Signals | None = None) -> Tensor:
        return episodes.expand(success_rate(episodes) <= self.threshold, to="episode", level="group")

    def __repr__(self) -> str:
        return f"success<={self.threshold:g}"


def hpt(*, group: int = 8, threshold: float = 0.0, sft: float = 1.0, budget: float = 1024.0) -> Recipe:
    """Hybrid post-training (arXiv 2509.04419): where a prompt is never solved, learn from its demonstration instead.

        P > threshold :  L_RL  = CONST( - r_n (R_i - mean_g R) ),  no clip            over the prompt's rollouts
        P <= threshold:  L_SFT = - TOK( log pi(y_n) )                                 over its demonstration
        L = L_RL + sft * L_SFT

    The mean of L_RL runs over all sampled episodes, dropped ones too, so that it is the mean over prompts of a * L_RL;
    that of L_SFT over the tokens of the demonstrations in use. The paper's code divides both per micro-batch, which makes
    their balance depend on its size. threshold: 0 for Qwen, 2/8 for LLaMA.
    """
    rl = PolicyGradient(
        advantage=Normalised(), weight=TokenRatio(), mask=SuccessGate(threshold), aggregate=Budget(budget), name="rl"
    )
    shown = Likelihood(rows=demonstrations & Unsolved(threshold), name="sft")
    return Recipe(objective=rl + sft * shown, rollouts=RolloutSpec(group=group, augment=(Demonstrated(),)))


_TESTS = "tests/methods/test_mixed_data.py::"
METHODS = (
    Method(
        slug="chord", build=chord, row=3, family="llm-rl",
        title="On-Policy RL Meets Off-Policy Experts: Harmonizing Supervised Fine-Tuning and Reinforcement Learning via "
              "Dynamic Weighting",
        paper="arXiv 2508.11408",
        equation="L = (1 - mu) L_GRPO(rollouts) + mu L_SFT(experts)\nL_SFT = -TOK(sg(p (1 - p)) log pi)\n"
                 "mu: warm-up to peak, cosine to valley (phi: constant 0.1)",
        claim="with experts of another style, SFT then RL dips in accuracy; CHORD-phi does not and ends at or above GRPO",
        identity_tests=tuple(_TESTS + t for t in (
            "test_chord_at_mu_zero_is_grpo", "test_chord_at_mu_one_without_phi_is_sft", "test_phi_gradient_on_the_logits",
            "test_probability_weight_is_the_gradient_of_the_probability", "test_mu_schedule",
            "test_each_loss_is_averaged_over_its_own_tokens")),
    ),
    Method(
        slug="chord-mu", build=chord_mu, family="llm-rl", title="CHORD with the schedule alone", paper="arXiv 2508.11408",
        equation="chord with token weight 1 and mu from 0.9 to 0.05 over 200 steps",
        identity_tests=(_TESTS + "test_chord_at_mu_one_without_phi_is_sft", _TESTS + "test_mu_schedule"),
    ),
    Method(
        slug="upge-hpt", build=hpt, row=142, family="llm-rl",
        title="Towards a Unified View of Large Language Model Post-Training", paper="arXiv 2509.04419",
        equation="P > threshold: L_RL = CONST(-r_n (R - mean))   else: L_SFT = -TOK(log pi) on the prompt's demonstration",
        claim="where some prompts are never solved, HPT beats RL alone, SFT alone and SFT then RL",
        identity_tests=tuple(_TESTS + t for t in (
            "test_hpt_below_zero_is_dr_grpo_without_clip", "test_hpt_at_one_is_sft", "test_hpt_switches_per_prompt",
            "test_dropped_episodes_stay_in_the_denominator", "test_advantages_sum_to_zero_in_a_group",
            "test_a_likelihood_is_the_estimator_with_advantage_one")),
    ),
)  # fmt: skip
