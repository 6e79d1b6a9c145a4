"""Rollouts of earlier policies inside on-policy training: what to divide by, where to clip, and when to stop.

               denominator      clip window                     weight          where stale rows come from
    remix      behaviour        c +- eps,  c = pi_old / mu      r               a share of replayed groups, until step T
    aipo       behaviour        none (or r <= rho)              min(r, rho)     an actor that samples `--ahead` steps early

r = pi / mu is to the policy that wrote the token, whatever its age: no row needs to know how old it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from unipo.methods.method import Method
from unipo.methods.policy_gradients import grpo, ppo, regularised
from unipo.objectives import (
    Bonus,
    KLPenalty,
    Knob,
    Normalised,
    Objective,
    PolicyGradient,
    ProximalClipMask,
    TokenMean,
    TokenRatio,
    Truncated,
    TwoSideMask,
)
from unipo.recipe import Recipe, RolloutSpec, Snapshot
from unipo.sources.controllers import Staircase, Switch

BASES: Mapping[str, Callable[..., Recipe]] = {"grpo": grpo, "ppo": ppo}


def remix(*, base: str = "grpo", group: int = 8, replayed: float = 0.4, replay_steps: int = 2, passes: int = 2,
          reborn: int = 50, clip: float = 0.2, kl: float = 1e-3, entropy: float = 0.0, base_share: float = 1.0,
          floor: float = 0.5, start: int = 50, every: int = 10) -> Recipe:  # fmt: skip
    """ReMix (arXiv 2507.06892): replay and several passes at first, on-policy learning from a new reference later.

        L    = - SEQ( min(r_n A_i, clip(r_n, c_n - clip, c_n + clip) A_i) ) + kl * L_KLC - entropy * H(pi)
        c_n  = pi_k / mu at the beginning of step k: stale rows may move by as much as fresh ones
        L_KLC = lam * KL(pi || reference) + (1 - lam) * KL(pi || pi_{k-1})         lam: `base_share`, then stairs to `floor`
        steps < reborn: a share `replayed` of the groups is drawn from the last `replay_steps` steps, `passes` per batch
        steps >= reborn: no replay, one pass, and the reference is the policy of step `reborn` (reincarnation)

    A is that of the base, in the row's own group (prompt and sampling step). Both divergences are k3. Departs from the
    paper: `clip`, `kl` and `entropy` are not stated there; replayed steps are drawn uniformly. `reborn` -1: never.
    """
    recipe = BASES[base](group=group, clip=clip)
    gradient = next(term for _, term in recipe.objective.terms() if isinstance(term, PolicyGradient))
    lam = Knob("reference_share", base_share)
    closeness = lam * KLPenalty(aggregate=gradient.aggregate) + (1 - lam) * KLPenalty(
        to="previous", aggregate=gradient.aggregate
    )
    total: Objective = recipe.but(mask=ProximalClipMask(clip, clip)).objective
    if kl:
        total = total + kl * closeness
    if entropy:
        total = total + entropy * Bonus(aggregate=gradient.aggregate)
    stairs = Staircase(knob="reference_share", value=base_share, drop=0.1, every=every, level=start, floor=floor)
    share, epochs = Knob("replayed", replayed), Knob("epochs", float(passes))
    phases = (Switch(knob="replayed", value=replayed, after=0.0, at=reborn),
              Switch(knob="epochs", value=float(passes), after=1.0, at=reborn)) if reborn >= 0 else ()  # fmt: skip
    return recipe.but(
        objective=total, controllers=(*((stairs,) if kl else ()), *phases),
        replay=share, replay_steps=replay_steps, epochs=epochs, minibatches=1,
        snapshots={"previous": Snapshot(every=1, lag=1),
                   "reference": Snapshot(at=(reborn,) if reborn >= 0 else ())},
    )  # fmt: skip


def aipo(*, group: int = 8, rho: float = 8.0, cap: str = "truncate", kl: float = 0.0, entropy: float = 0.0) -> Recipe:
    """AIPO of LlamaRL (arXiv 2505.24034): importance weights to the actor that sampled, capped from above only.

        L = - TOK( sg(min(r_n, rho)) (R_i - mean_g R) log pi(y_n) )            mu = the asynchronous actor's own log-prob

    `cap`: truncate (the weight of a larger ratio is rho) or mask (it is 0: what min(r, rho) gives when it is differentiated,
    as prime-rl does). rho 8 is prime-rl's, the paper has 2 to 10. Run it with `--ahead 1` or 2: rollouts are then sampled
    while the policy learns, that many steps early.
    """  # fmt: skip
    caps = {
        "truncate": {"weight": Truncated(TokenRatio(), high=rho)},
        "mask": {"weight": TokenRatio(), "mask": TwoSideMask(1.0, rho - 1.0)},
    }
    if cap not in caps:
        raise ValueError(f"cap is {cap!r}: expected truncate or mask")
    objective = PolicyGradient(advantage=Normalised(), aggregate=TokenMean(), **caps[cap])  # type: ignore[arg-type]
    return regularised(Recipe(objective=objective, rollouts=RolloutSpec(group=group)), kl, entropy)


_TESTS = "tests/methods/test_stale_data.py::"
METHODS = (
    Method(
        slug="remix", build=remix, row=9, family="llm-rl",
        title="Squeeze the Soaked Sponge: Efficient Off-policy Reinforcement Finetuning for Large Language Model",
        paper="arXiv 2507.06892",
        equation="L = -SEQ(min(r A, clip(r, c - eps, c + eps) A)) + kl (lam KL(pi || ref) + (1 - lam) KL(pi || pi_{k-1}))\n"
                 "c = pi_k / mu; 40 % replayed groups of the last 2 steps and 2 passes until step T\n"
                 "from step T: no replay, one pass, reference = pi_T; lam: 1 to 0.5 by stairs",
        claim="ReMix reaches the same success with less than half the rollouts of GRPO and of PPO",
        identity_tests=tuple(_TESTS + t for t in (
            "test_nothing_is_masked_when_the_update_begins", "test_on_fresh_rows_the_window_is_ppos",
            "test_the_window_in_units_of_the_update", "test_log_form_is_the_gradient_of_the_clipped_objective",
            "test_remix_without_its_parts_is_its_base", "test_the_shares_of_the_references", "test_phases")),
    ),
    Method(
        slug="llamarl-aipo", build=aipo, row=69, family="llm-rl",
        title="LlamaRL: A Distributed Asynchronous Reinforcement Learning Framework for Efficient Large-scale LLM Training",
        paper="arXiv 2505.24034", equation="L = -TOK(sg(min(r, rho)) (R - mean_g) log pi),  mu = the actor that sampled",
        claim="with rollouts that are up to 16 updates old REINFORCE degrades and AIPO does not; acting and learning at the same "
              "time take as long as the slower of the two",
        identity_tests=tuple(_TESTS + t for t in (
            "test_aipo_on_policy_is_reinforce_with_the_group_mean", "test_truncation_and_mask_by_hand",
            "test_aipo_is_cispo_without_the_std", "test_without_a_cap_it_is_token_importance_sampling",
            "test_the_mask_is_ppos_upper_bound_for_both_signs", "test_a_cap_of_one_never_raises_a_weight")),
    ),
)  # fmt: skip
