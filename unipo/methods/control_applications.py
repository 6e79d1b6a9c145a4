"""Policy gradients where the environment tells more than state and reward: inventories, fleets, portfolios.

    L = - mean( min(r A, clip(r) A) ) + critics - entropy * H(pi)         r to the policy that acted

                    A                                                critics
    pdppo           max( G - V(s), G^x - V_x(s^x) )                  V -> G,  V_x -> G^x
    pdppo-q         r^x + V_x(s^x) - V(s)                            V -> G,  V_x -> G - r^x
    ospo            r_i - mean_g r, over one fleet and time          none; KL(pi || best so far)
    grpo-ride       (G_i - mean_g G) / std_g                         none; KL(pi || best so far)
    fleet-ppo       G_i - V(s_i)                                     V -> G
    esg-portfolio   GAE, of rewards that were granted and taxed      V -> GAE return

s^x = f(s, a) is what a decision leads to before chance answers, r^x the reward of that half, G a return.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from unipo.methods.method import Method
from unipo.methods.policy_gradients import ppo
from unipo.objectives import (
    Advantage,
    AfterDecision,
    BatchStd,
    Bonus,
    ClipMask,
    DecisionReturn,
    DiscountedReturn,
    Excess,
    GroupStd,
    Knob,
    LargerOf,
    Normalised,
    Objective,
    Outcome,
    PolicyGradient,
    PostDecisionValue,
    Regression,
    Stored,
    TokenMean,
    TokenRatio,
    ValueRegression,
    ValueTarget,
    Whitened,
)
from unipo.recipe import Recipe
from unipo.sources.controllers import Controller, Doubling
from unipo.sources.spec import ControlSpec

HALVES = ("post_observation", "reward_decision", "reward_outcome")
PLANT: dict[str, Any] = {"num_envs": 8, "rollout": 128, "batch_size": 128}
FLEET: dict[str, Any] = {"num_envs": 1, "rollout": 30, "batch_size": 256, "adam_eps": 1e-8, "clip_norm": 1.0}


def _clipped(advantage: Advantage, low: float, high: float) -> Objective:
    return PolicyGradient(advantage=advantage, weight=TokenRatio(), mask=ClipMask(low, high), aggregate=TokenMean())


def _two_critics(advantage: Advantage, value: Advantage, post: Advantage, clip: float, gamma: float, entropy: float,
                 epochs: int) -> Recipe:  # fmt: skip
    critics = ValueRegression(target=value) + Regression(signal="post_value", target=post, name="post_value")
    gradient = _clipped(Whitened(advantage, BatchStd()), clip, clip)
    objective = gradient + critics + entropy * Bonus() if entropy else gradient + critics
    control = ControlSpec(gamma=gamma, info_columns=HALVES, settings=PLANT)
    return Recipe(objective=objective, control=control, epochs=epochs)


def pdppo(*, clip: float = 0.2, gamma: float = 0.99, entropy: float = 0.005, epochs: int = 10) -> Recipe:
    """Post-decision PPO (arXiv 2504.05150): two critics, and the larger of two advantages.

        A = max( G - V(s), G^x - V_x(s^x) ),   whitened over the batch
        G^x: discounted return of the decisions' own rewards r^x, the current one among them;  V -> G,  V_x -> G^x

    Known: where s^x determines r^x, E[G^x - V_x | s, a] = 0 for every a: the second advantage is noise. The maximum is above
    both (its mean is whitened away). Departs from the code: one optimiser; returns that were cut
    go on with the critics; whitening, as PPO has it here.
    """
    before = Excess(DiscountedReturn(gamma), "old_value")
    decided = Excess(DecisionReturn(gamma), "old_post_value")
    return _two_critics(LargerOf((before, decided)), DiscountedReturn(gamma), DecisionReturn(gamma), clip, gamma, entropy,
                        epochs)  # fmt: skip


def pdppo_q(*, clip: float = 0.2, gamma: float = 0.99, lam: float = 0.95, entropy: float = 0.005,
            epochs: int = 10) -> Recipe:  # fmt: skip
    """Post-decision PPO with an advantage that chance has no part in.

        A = r^x(s, a) + V_x(s^x) - V(s),   V_x(s^x) = E[ r(s^x, xi) + gamma V(s') ],   whitened over the batch

    V is regressed to the GAE return, V_x to the same without r^x: at `lam` 0 to r(s^x, xi) + gamma V(s').
    """
    target = ValueTarget(gamma, lam)
    advantage = Excess(PostDecisionValue(), "old_value")
    return _two_critics(advantage, target, AfterDecision(target), clip, gamma, entropy, epochs)


# ---- fleets ----------------------------------------------------------------------------------------------------------
def _fleet(gradient: Objective, gamma: float, kl: float, limit: float, entropy: float, epochs: int) -> Recipe:
    """With the KL to the best policy so far, whose coefficient rises, and an entropy bonus."""
    objective, controllers = gradient, list[Controller]()
    if kl:
        objective = objective + Knob("best_kl", kl, scale=-1.0) * Bonus(signal="reverse_kl:reference", name="best")
        controllers.append(Doubling(knob="best_kl", value=kl, limit=limit))
    objective = objective + entropy * Bonus() if entropy else objective
    control = ControlSpec(gamma=gamma, keep_best=bool(kl), settings=FLEET)
    return Recipe(objective=objective, control=control, controllers=tuple(controllers), epochs=epochs)


def ospo(*, clip: float = 0.2, widen: float = 1.4, kl: float = 0.5, limit: float = 0.01, entropy: float = 0.05,
         epochs: int = 4) -> Recipe:  # fmt: skip
    """One-step policy optimisation (arXiv 2507.15351): among exchangeable agents the future cancels from the group mean.

        A_i = r_i - mean_g r,   r_i the reward of the next step alone, g the agents that chose at one time
        L   = - mean( min(rho A, clip(rho, 1 - clip, 1 + widen * clip) A) ) + b * mean( KL(pi || best) ) - entropy * mean( H )

    b is 0 until the mean return first fails to improve, then `kl`, and doubles where the divergence is above `limit`.
    The released code feeds raw rewards (`Normalised(Center())`); centring is that of the derivation. Departs: b doubles after
    the update that was too far, which is not skipped. Limitation: where actions matter for later, it learns the myopic policy.
    """
    gradient = _clipped(Normalised(), clip, widen * clip)
    return _fleet(gradient, 0.0, kl, limit, entropy, epochs)


def grpo_ride(*, clip: float = 0.2, widen: float = 1.4, gamma: float = 0.99, kl: float = 0.5, limit: float = 0.01,
              entropy: float = 0.05, epochs: int = 4) -> Recipe:  # fmt: skip
    """GRPO for fleets (arXiv 2507.15351): the group of one time is the baseline of each agent's return.

        A_i = (G_i - mean_g G) / std_g,   G = r + gamma^dt G',   dt until the agent's next decision

    The rest is OSPO's. Population std; a group of one has A = 0.
    """
    outcome = Outcome("reward_to_go")
    gradient = _clipped(Normalised(scale=GroupStd(1e-8, ddof=0), outcome=outcome), clip, widen * clip)
    return _fleet(gradient, gamma, kl, limit, entropy, epochs)


def fleet_ppo(*, clip: float = 0.2, gamma: float = 0.99, entropy: float = 0.05, epochs: int = 4) -> Recipe:
    """PPO for fleets: a critic is the baseline of each agent's return, G = r + gamma^dt G'.

    A_i = G_i - V(s_i), whitened over the batch;   L = - mean( min(rho A, clip(rho) A) ) + mean( (V - G)^2 / 2 )
    """
    togo = Stored("reward_to_go")
    gradient = _clipped(Whitened(Excess(togo), BatchStd()), clip, clip)
    return _fleet(gradient + ValueRegression(target=togo), gamma, 0.0, 0.0, entropy, epochs)


# ---- portfolios ------------------------------------------------------------------------------------------------------
def esg_portfolio(*, kappa: float = 5.0, gamma: float = 0.95, lam: float = 0.95, clip: float = 0.2, entropy: float = 0.0,
                  epochs: int = 10) -> Recipe:  # fmt: skip
    """PPO on a market that grants and taxes by the portfolio's ESG score (arXiv 2307.09631).

        r' = r + kappa max(E_p - E_index, 0) / 100 * max(r, 0) - kappa max(E_index - E_p, 0) / 100 * |r|

    The regulation is the environment's (`unipo/PortfolioWeights-v0`); `kappa` is its strength, 0 for none. Compare r, not r'.
    """
    base = ppo(clip=clip, gamma=gamma, lam=lam, value=0.5, value_clip=0.0, entropy=entropy, epochs=epochs)
    settings: dict[str, Any] = {"num_envs": 4, "rollout": 250, "batch_size": 250, "normalize_rewards": True,
                                "log_std_init": -0.5, "env_options": {"kappa": kappa}}  # fmt: skip
    return base.but(control=ControlSpec(gamma=gamma, settings=settings))


_method = partial(Method, family="control")
_TESTS = "tests/methods/test_control_applications.py::"


def _tests(*names: str) -> tuple[str, ...]:
    return tuple(_TESTS + name for name in names)


METHODS = (
    _method(slug="pdppo", build=pdppo, row=172, title="Post-decision PPO with dual critics", paper="arXiv 2504.05150",
            equation="A = max(G - V(s), G^x - V_x(s^x)),  V -> G,  V_x -> G^x,  PPO clip",
            claim="On lot-sizing, post-decision PPO earns more than PPO after equally many steps.",
            identity_tests=_tests(
                "test_with_the_first_advantage_alone_pdppo_is_ppo_with_monte_carlo_returns",
                "test_the_larger_advantage_is_biased_upwards",
                "test_where_the_post_decision_state_tells_the_reward_its_advantage_carries_no_gradient")),
    _method(slug="pdppo-q", build=pdppo_q, title="Post-decision PPO without the noise of the outcome",
            paper="arXiv 2504.05150, the principled variant",
            equation="A = r^x + V_x(s^x) - V(s),  V_x -> G - r^x,  PPO clip",
            identity_tests=_tests(
                "test_without_chance_the_post_decision_advantage_is_that_of_one_step",
                "test_exact_critics_leave_no_variance_and_no_mean",
                "test_a_decision_that_changes_nothing_leaves_its_own_reward")),
    _method(slug="ospo", build=ospo, row=31, title="One-step policy optimization of homogeneous agents",
            paper="arXiv 2507.15351",
            equation="A_i = r_i - mean_g r (one step, one time),  clip(1 - c, 1 + 1.4 c),  + b KL(pi || best) - entropy",
            claim="In order dispatch, one-step rewards centred over the fleet train as well as GRPO's returns, and both better "
                  "than PPO with a critic.",
            identity_tests=_tests(
                "test_grpo_ride_without_a_future_is_ospo",
                "test_where_actions_do_not_matter_for_later_ospo_has_the_gradient_of_returns_up_to_the_group",
                "test_ospo_is_myopic",
                "test_a_constant_added_to_a_group_changes_nothing")),
    _method(slug="grpo-ride", build=grpo_ride, title="GRPO of fleets", paper="arXiv 2507.15351",
            equation="A_i = (G_i - mean_g G) / std_g,  G = r + gamma^dt G',  the rest as OSPO",
            identity_tests=_tests("test_grpo_ride_without_a_future_is_ospo")),
    _method(slug="fleet-ppo", build=fleet_ppo, title="PPO of fleets", paper="arXiv 1707.06347",
            equation="A_i = G_i - V(s_i),  G = r + gamma^dt G',  PPO clip",
            identity_tests=_tests("test_returns_of_decisions_count_the_time_between_them")),
    _method(slug="esg-portfolio", build=esg_portfolio, row=79, title="ESG-regulated portfolio management",
            paper="arXiv 2307.09631",
            equation="PPO on r' = r + kappa max(E_p - E, 0)/100 max(r, 0) - kappa max(E - E_p, 0)/100 |r|",
            claim="Grants and taxes by the ESG score raise the score of the learned portfolio at a comparable return.",
            identity_tests=_tests("test_without_regulation_it_is_ppo", "test_equal_scores_are_not_regulated",
                                  "test_losses_are_never_granted")),
)  # fmt: skip
