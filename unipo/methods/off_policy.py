"""Policy gradients that are off-policy by nature: what a stale or foreign batch may and may not do to the policy.

          advantage                     weight                       mask        aggregate
rec       R - mean_g                    1 | r | gm | e^(A/temp)      see `rec`   TOK
topr      R - c                         [1 if A >= 0, min(s, 1)]     -           SUM
nft       omega | -omega p / (1 - p)    1 | r / max(.., v)           -           sum / 1000
bnpo      (R - p) / Beta density(p)     r                            dual clip   SUM
copg      pairwise quadratic over the group: no weight at all
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from unipo.episodes import Episodes
from unipo.methods.method import Method
from unipo.objectives import (
    Advantage,
    AdvantageMask,
    AffineOutcome,
    BetaScale,
    ClipMask,
    DualClipMask,
    EpisodeSum,
    ExponentialAdvantage,
    GeometricRatio,
    GroupMean,
    GroupSquare,
    GroupStd,
    KLPenalty,
    Likelihood,
    Needs,
    Normalised,
    Objective,
    One,
    Outcome,
    Part,
    PolicyGradient,
    Product,
    RatioTo,
    RingMask,
    Scale,
    SequenceRatio,
    Signals,
    Tapered,
    TokenMean,
    TokenRatio,
    Total,
    TwoSideMask,
    rollouts,
)
from unipo.objectives.advantages import Constant
from unipo.recipe import Recipe, RolloutSpec
from unipo.sources.text.filters import MixedOutcomes

# ---- REC -------------------------------------------------------------------------------------------------------------
REC_WEIGHTS = {
    "none": One(),
    "importance_sampling": TokenRatio(),
    "gspo": GeometricRatio(),
    "advantage": ExponentialAdvantage(),
}


def rec(*, group: int = 8, weight: str = "importance_sampling", clip: str = "one-side", low: float = 0.2, high: float = 0.2,
        outer_low: float = 0.6, outer_high: float = 2.0, k2: float = 0.0, forward_kl: float = 0.0, shift: float = 0.0,
        std: float = 0.0) -> Recipe:  # fmt: skip
    """REC: group-relative REINFORCE as an off-policy method (arXiv 2509.24203).

        L = - TOK( mask * w * A log pi ) + k2 * TOK( (lp - blp)^2 ) - forward_kl * TOK( lp ),   A = R - mean_g - shift

    `weight`: none | importance_sampling (r) | gspo (exp mean log r) | advantage (exp A). `clip`: none | one-side (PPO's) |
    two-side | ring | gspo-one-side. Masks act on the first term only; masked tokens stay in the count. `std` 1 divides
    A by the population std. Kin: `opmd`, `asymre`, `red_drop`, `red_weight`.
    """
    masks = {
        "none": AdvantageMask(), "one-side": ClipMask(low, high), "two-side": TwoSideMask(low, high),
        "ring": RingMask(low, high, outer_low, outer_high), "gspo-one-side": ClipMask(low, high, GeometricRatio()),
    }  # fmt: skip
    scale = GroupStd(eps=0.0, ddof=0) if std else Scale()
    objective: Objective = PolicyGradient(
        advantage=Normalised(center=GroupMean(shift), scale=scale),
        weight=REC_WEIGHTS[weight],
        mask=masks[clip],
        aggregate=TokenMean(),
    )
    if k2:
        objective = objective + 2.0 * k2 * KLPenalty(estimator="k2", to="behavior")
    if forward_kl:
        objective = objective + forward_kl * Likelihood(rows=rollouts, name="forward_kl")
    return Recipe(objective=objective, rollouts=RolloutSpec(group=group))


def opmd(*, group: int = 8, k2: float = 0.05) -> Recipe:
    """OPMD: no weight, no clip, a k2 pull to the behaviour policy (Kimi's online mirror descent, 1/2 absorbed)."""
    return rec(group=group, weight="none", clip="none", k2=k2)


def asymre(*, group: int = 8, shift: float = -0.1) -> Recipe:
    """AsymRE: the baseline lowered, A = R - (mean + shift); equals REINFORCE plus likelihood of all samples by -shift."""
    return rec(group=group, weight="none", clip="none", shift=shift)


def red_weight(*, group: int = 8, temperature: float = 1.0) -> Recipe:
    """RED-Weight: A weighted by exp(A / temperature)."""
    return rec(group=group, weight="none", clip="none").but(weight=ExponentialAdvantage(temperature))


@dataclass(frozen=True)
class SurplusDropped(Advantage):
    """A = R - mean over what is kept: where a group has more negatives (R < mean) than others, surplus ones are dropped.

    Which ones: by a hash of (prompt_id, place in the group), so that the choice is random over prompts and yet the same
    in every evaluation. Dropped A = 0.
    """

    outcome: Part = Outcome()

    def own_needs(self) -> Needs:
        return Needs.of(columns="prompt_id", group_size=2)

    def __call__(self, episodes: Episodes, signals: Signals) -> Tensor:
        values, index, n = self.outcome(episodes, signals), episodes.index("group", "episode"), episodes.count("group")
        kept = ~self._surplus(values, episodes)
        size = episodes.reduce(kept.to(values), to="group", level="episode").clamp(min=1)
        mean = episodes.reduce(torch.where(kept, values, 0.0), to="group", level="episode") / size
        assert len(mean) == n
        return episodes.expand(torch.where(kept, values - mean[index], 0.0))

    def _surplus(self, values: Tensor, episodes: Episodes) -> Tensor:
        """bool [E]: negatives beyond as many as there are others, in the order of their hash."""
        index = episodes.index("group", "episode")
        mean = GroupMean().of(values, episodes)
        negative = values < mean
        allowed = episodes.reduce((~negative).long(), to="group", level="episode")[index]
        place = torch.arange(len(values), device=values.device)
        place = place - episodes.reduce(place, to="group", how="min", level="episode")[index]
        order = (episodes["prompt_id"] * 6364136223846793005 + (place + 1) * 1442695040888963407) >> 20
        same = (index[:, None] == index[None]) & negative[None]
        rank = (same & (order[None] < order[:, None])).sum(1)
        return negative & (rank >= allowed)


def red_drop(*, group: int = 8) -> Recipe:
    """RED-Drop: surplus negatives are dropped until each group is balanced."""
    return rec(group=group, weight="none", clip="none").but(advantage=SurplusDropped())


# ---- TOPR ------------------------------------------------------------------------------------------------------------
TOPR_RATIOS: dict[str, RatioTo] = {"sequence": SequenceRatio(), "token": TokenRatio()}


def topr(*, group: int = 8, baseline: float = 0.0, level: str = "sequence", positive: tuple[float, float] = (1.0, 1.0),
         negative: tuple[float, float] = (0.0, 1.0)) -> Recipe:  # fmt: skip
    """Tapered off-policy REINFORCE (arXiv 2503.14286): positives as in supervised learning, negatives by at most 1.

        L = - SUM( alpha_i A_i log pi(y_n) ),   A = (2 R - 1) - baseline
        alpha = clip(s_i, *positive) if A >= 0 else clip(s_i, *negative),   s_i = pi(y_i) / mu(y_i), detached

    A verifier's 0 and 1 become -1 and 1. `level` "token" tapers each token's own ratio (another algorithm: Trinity's).
    """
    return Recipe(
        objective=PolicyGradient(
            advantage=Normalised(center=Constant(baseline), outcome=AffineOutcome(2.0, -1.0)),
            weight=Tapered(TOPR_RATIOS[level], positive, negative),
            aggregate=EpisodeSum(),
        ),
        rollouts=RolloutSpec(group=group),
    )


# ---- NFT -------------------------------------------------------------------------------------------------------------
def _rate(episodes: Episodes, bound: float) -> Tensor:
    """p [E]: the success rate of the episode's prompt, clamped to [bound, 1 - bound]."""
    p = episodes.reduce("reward", to="group", how="mean").clamp(bound, 1 - bound)
    return episodes.expand(p, to="episode", level="group")


@dataclass(frozen=True)
class NegativeAware(Advantage):
    """omega(p) for a right answer, -negative * omega(p) p / (1 - p) for a wrong one (R is 0 or 1)."""

    omega: str = "1-p"
    negative: float = 1.0
    bound: float = 0.02

    def own_needs(self) -> Needs:
        return Needs.of(columns="reward", group_size=2)

    def __call__(self, episodes: Episodes, signals: Signals) -> Tensor:
        p = _rate(episodes, self.bound)
        omega = {"1": torch.ones_like(p), "1-p": 1 - p, "sqrt": ((1 - p) / p).sqrt()}[self.omega]
        return episodes.expand(torch.where(episodes["reward"] > 0.5, omega, -self.negative * omega * p / (1 - p)))


@dataclass(frozen=True)
class ImplicitNegative(RatioTo):
    """1 for a right answer; r / max((1 - p r) / (1 - p), v) for a wrong one: the slope of -log of the implicit negative
    policy, with its straight-through clamp."""

    floor: float = 1.0
    bound: float = 0.02

    def own_needs(self) -> Needs:
        return Needs.of(columns=f"{self.to}_logp reward", signals="logp", group_size=2)

    def __call__(self, episodes: Episodes, signals: Signals) -> Tensor:
        r = self.log_ratio(episodes, signals).clamp(max=10.0).exp()
        p = episodes.expand(_rate(episodes, self.bound)).to(r.dtype)
        wrong = r / ((1 - p * r) / (1 - p)).clamp(min=self.floor)
        return torch.where(episodes.expand("reward") > 0.5, torch.ones_like(r), wrong)


def nft(*, group: int = 8, omega: str = "1-p", negative: float = 1.0, floor: float = 1.0, divisor: float = 1000.0,
        refill: int = 4) -> Recipe:  # fmt: skip
    """Negative-aware fine-tuning (arXiv 2505.18116): supervised learning on right and wrong answers alike.

        right: l = - log r       wrong: l = - log max( (1 - p r) / (1 - p), v )       r = pi / pi_old per token
        L = sum omega(p) l / divisor                            p: success rate of the prompt, in [0.02, 0.98]

    Written by its gradient: right omega, wrong -omega p r / ((1 - p) max(.., v)) on grad log pi. `omega`: 1 | 1-p | sqrt
    (sqrt((1 - p) / p)). Groups all right or all wrong are sampled anew. negative 0 is rejection fine-tuning.
    """
    return Recipe(
        objective=PolicyGradient(
            advantage=NegativeAware(omega, negative), weight=ImplicitNegative(floor=floor), aggregate=Total(divisor)
        ),
        rollouts=RolloutSpec(group=group, keep=MixedOutcomes(), refill=refill),
    )


# ---- BNPO, CoPG ------------------------------------------------------------------------------------------------------
def bnpo(*, group: int = 16, clip_low: float = 0.2, clip_high: float = 0.28, dual_clip: float = 10.0) -> Recipe:
    """Beta normalisation (arXiv 2506.02864): the scale of the advantage adapts to the batch's success rates.

        A_i = (R_i - p_g) / f(p_g; alpha, beta)      f: Beta density, 1 + a/3 and 1 + b/3 of the fitted Beta(a, b)
        L   = - SUM( min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) ), dual clip where A < 0

    Rewards lie in [0, 1]. All prompts equally hard: f = 1, that is Dr. GRPO.
    """
    return Recipe(
        objective=PolicyGradient(
            advantage=Normalised(scale=BetaScale()),
            weight=TokenRatio(),
            mask=Product((ClipMask(clip_low, clip_high), DualClipMask(dual_clip))),
            aggregate=EpisodeSum(),
        ),
        rollouts=RolloutSpec(group=group),
    )


def copg(*, group: int = 8, beta: float = 0.1) -> Recipe:
    """Contrastive policy gradient (arXiv 2406.19185): each answer's baseline is the other answer's regularised reward.

        a_i = R_i - beta * log( pi(y_i) / ref(y_i) )          L = mean over groups, pairs of (a_i - a_j)^2 / (2 beta)

    Needs no importance weight: its minimiser is ref * exp(R / beta) / Z for any data distribution of full support.
    """
    return Recipe(objective=GroupSquare(beta=beta, outcome=Outcome()), rollouts=RolloutSpec(group=group))


_TESTS = "tests/methods/test_off_policy.py::"


def _tests(*names: str) -> tuple[str, ...]:
    return tuple(_TESTS + n for n in names)


_REC = "arXiv 2509.24203"
METHODS = (
    Method(
        slug="rec", build=rec, row=23, family="llm-rl", paper=_REC,
        title="Group-Relative REINFORCE Is Secretly an Off-Policy Algorithm: Demystifying Some Myths About GRPO and Its Friends",
        equation="L = -TOK(mask w (R - mean_g) log pi) + k2 TOK((lp - blp)^2) - forward_kl TOK(lp)",
        claim="with weights synced every 20 steps plain REINFORCE degrades; clipping stabilises with and without importance "
              "sampling",
        identity_tests=_tests("test_rec_one_side_is_ppo", "test_all_rec_clips_agree_on_policy", "test_asymre_is_forward_kl",
                              "test_k2_gradient_vanishes_on_policy", "test_red_weight_at_infinite_temperature",
                              "test_red_drop_on_balanced_groups", "test_ring_limit_is_two_side",
                              "test_pairwise_loss_at_the_old_policy_is_group_reinforce"),
    ),
    Method(slug="opmd", build=opmd, family="llm-rl", title="OPMD (REC family)", paper=_REC,
           equation="rec without weight or clip, k2 > 0", identity_tests=_tests("test_k2_gradient_vanishes_on_policy")),
    Method(slug="asymre", build=asymre, family="llm-rl", title="AsymRE (REC family)", paper=_REC,
           equation="rec with A = R - (mean + shift)", identity_tests=_tests("test_asymre_is_forward_kl")),
    Method(slug="red-drop", build=red_drop, family="llm-rl", title="RED-Drop (REC family)", paper=_REC,
           equation="rec with surplus negatives dropped", identity_tests=_tests("test_red_drop_on_balanced_groups",
                                                                              "test_red_drop_balances")),
    Method(slug="red-weight", build=red_weight, family="llm-rl", title="RED-Weight (REC family)", paper=_REC,
           equation="rec weighted by exp(A / temperature)",
           identity_tests=_tests("test_red_weight_at_infinite_temperature")),
    Method(
        slug="topr", build=topr, row=60, family="llm-rl", paper="arXiv 2503.14286",
        title="Tapered Off-Policy REINFORCE: Stable and efficient reinforcement learning for LLMs",
        equation="L = -SUM(clip(s, *[1,1 if A >= 0 else 0,1]) A log pi),  A = 2R - 1 - c",
        claim="many epochs on a fixed set of own samples: naive REINFORCE degenerates, TOPR improves and is stable",
        identity_tests=_tests("test_topr_on_policy_is_reinforce", "test_topr_positives_are_weighted_sft",
                              "test_topr_unclipped_is_importance_sampling", "test_topr_is_the_gradient_of_its_taper",
                              "test_topr_is_bounded_where_reinforce_is_not"),
    ),
    Method(
        slug="nft", build=nft, row=37, family="llm-rl", paper="arXiv 2505.18116",
        title="Bridging Supervised Learning and Reinforcement Learning in Math Reasoning",
        equation="right: -omega log r;  wrong: -omega log max((1 - p r) / (1 - p), v);  sum / 1000",
        claim="NFT beats rejection fine-tuning, and matches GRPO at equal steps",
        identity_tests=_tests("test_nft_on_policy_is_dr_grpo", "test_nft_sqrt_is_grpo", "test_nft_without_negatives_is_rft",
                              "test_nft_is_the_gradient_of_its_loss", "test_nft_minimiser"),
    ),
    Method(
        slug="bnpo", build=bnpo, row=138, family="llm-rl", paper="arXiv 2506.02864",
        title="BNPO: Beta Normalization Policy Optimization",
        equation="A = (R - p) / Beta(p; 1 + a/3, 1 + b/3);  L = -SUM(clipped r A)",
        claim="on prompts of mixed difficulty its gradient has less variance than REINFORCE, Dr. GRPO and GRPO",
        identity_tests=_tests("test_bnpo_at_one_one_is_dr_grpo", "test_bnpo_at_three_halves_is_grpo",
                              "test_bnpo_parameters_are_stationary", "test_bnpo_sums_to_zero_and_handles_edges"),
    ),
    Method(
        slug="copg", build=copg, row=18, family="preference", paper="arXiv 2406.19185",
        title="Contrastive Policy Gradient: Aligning LLMs on sequence-level scores in a supervised-friendly fashion",
        equation="L = mean_pairs ((R_i - R_j) - beta (log-ratio_i - log-ratio_j))^2 / (2 beta)",
        claim="from off-policy samples it reaches ref * exp(R / beta); REINFORCE with a batch baseline does not",
        identity_tests=_tests("test_copg_minimiser_for_any_data", "test_copg_gradient_is_rloo_with_kl_inside",
                              "test_copg_ignores_a_constant_per_prompt"),
    ),
)  # fmt: skip
