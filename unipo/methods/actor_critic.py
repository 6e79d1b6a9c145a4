"""Actor-critics on remembered transitions: a critic regressed to a backup, an actor that climbs it.

    critic   Regression( q -> r + discount * (1 - terminated) * next )        next by the recipe's backup
    actor    -mean( Q(s, a_theta(s)) ) + temperature * mean( log pi )         pathwise: a_theta(s) from the batch's noise

Both are terms of one objective and one backward pass: the actor's Q has detached weights, the critic's target has none.
d is 1 where the step terminated, and 0 where a time limit cut the episode.

           actor           next: what s' is worth                          beside
    dqn    greedy          max_a Qt(s', a)                                 Huber, epsilon-greedy
    ddpg   deterministic   Qt(s', pi_t(s'))                                noise on actions
    td3    deterministic   min_j Qt_j(s', pi_t(s') + clipped noise)        actor every second update
    sac    squashed        min_j Qt_j(s', a') - alpha log pi(a'|s')        alpha by dual ascent on the entropy
    mdpo   squashed        as sac                                          Bregman term to a snapshot pi_k
    pmoe   mixture         as sac, log-density of the component drawn      router to the best component
    tqc    squashed        the smallest quantiles of Zt(s', a'), as sac    quantile regression
    dsac-t squashed        min-mean Gaussian Zt(s', a'), as sac            clipped draws, gradients in units of the spread

t: slow copies. The actor moves in the same update as the critic, on the critic as it was before it (papers: after it).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from unipo.methods.method import Method
from unipo.objectives import (
    AllComponents,
    Bellman,
    BestComponent,
    Bonus,
    Components,
    GaussianReturn,
    Huber,
    Knob,
    Objective,
    QuantileRegression,
    Regression,
    Router,
)
from unipo.recipe import Recipe
from unipo.sources.controllers import Controller, DualAscent, MovingMean
from unipo.sources.spec import ActionNoise, ControlSpec, EpsilonGreedy

OFF_POLICY: dict[str, Any] = {
    "hidden": (256, 256), "activation": "relu", "orthogonal": False, "batch_size": 256, "rollout": 1000,
    "clip_norm": float("inf"), "adam_eps": 1e-8,
}  # fmt: skip
SHARES = {"all": AllComponents(), "max": BestComponent()}


def dqn(*, gamma: float = 0.99, double: bool = False, dueling: bool = False, huber: float = 1.0, tau: float = 1.0,
        target_every: int = 250, epsilon: float = 0.05, exploration: float = 0.3) -> Recipe:  # fmt: skip
    """Deep Q-learning (Mnih et al. 2015), with a slow copy for the target.

        y = r + gamma (1 - d) max_a Q_t(s', a)              double: Q_t(s', argmax_a Q(s', a))   (arXiv 1509.06461)
        L = mean( huber(Q(s, a) - y) )                      dueling: Q = V + A - mean_a A        (arXiv 1511.06581)

    Acts greedily, or with probability epsilon at random: from 1 down to `epsilon` over the share `exploration` of the run.
    The slow copy becomes the network (`tau` 1) every `target_every` updates.
    """
    settings = {**OFF_POLICY, "hidden": (120, 84), "batch_size": 64, "learning_rate": 5e-4, "learning_starts": 1000,
                "train_every": 2, "replay_capacity": 100_000}  # fmt: skip
    control = ControlSpec(
        actor="greedy", critic="q", critics=1, dueling=dueling, off_policy=True, gamma=gamma, tau=tau,
        target_every=target_every, backup="double" if double else "greedy", settings=settings,
        explore=EpsilonGreedy(end=epsilon, share=exploration),
    )  # fmt: skip
    return Recipe(objective=Regression(target=Bellman(), penalty=Huber(huber), name="critic"), control=control)


def ddpg(*, gamma: float = 0.99, tau: float = 0.005, noise: float = 0.1) -> Recipe:
    """Deep deterministic policy gradient (arXiv 1509.02971): a deterministic actor climbs one critic.

        y    = r + gamma (1 - d) Q_t(s', pi_t(s'))
        L_Q  = mean( (Q - y)^2 / 2 ),     L_pi = - mean( Q(s, pi(s)) )

    Normal exploration noise of standard deviation `noise` in units of half the action range (paper: Ornstein-Uhlenbeck).
    """
    control = ControlSpec(
        actor="deterministic", critic="q", critics=1, off_policy=True, gamma=gamma, tau=tau, backup="deterministic",
        target_policy=True, reduce="first", explore=ActionNoise(std=noise),
        settings={**OFF_POLICY, "learning_starts": 1000},
    )  # fmt: skip
    objective = Regression(target=Bellman(), name="critic") + Bonus(signal="pathwise_q", name="actor")
    return Recipe(objective=objective, control=control)


def td3(*, gamma: float = 0.99, tau: float = 0.005, noise: float = 0.1, smoothing: float = 0.2, clip: float = 0.5,
        delay: int = 2) -> Recipe:  # fmt: skip
    """Twin delayed DDPG (arXiv 1802.09477): two critics, a smoothed target action, a delayed actor.

        y    = r + gamma (1 - d) min_j Q_tj(s', pi_t(s') + clip(smoothing z, +-clip)),     z ~ N(0, 1)
        L_Q  = sum_j mean( (Q_j - y)^2 / 2 ),     L_pi = - mean( Q_1(s, pi(s)) )           every `delay` updates

    The slow copies move every `delay` updates too. Noise is in units of half the action range.
    """
    base = ddpg(gamma=gamma, tau=tau, noise=noise)
    assert base.control is not None
    control = replace(base.control, critics=2, backup="smoothed", smoothing=(smoothing, clip), target_every=delay)
    objective = Regression(target=Bellman(), name="critic") + Bonus(signal="pathwise_q", every=delay, name="actor")
    return base.but(objective=objective, control=control)


def soft(critic: Objective, control: ControlSpec, alpha: float | Knob, every: int = 1,
         controllers: tuple[Controller, ...] = ()) -> Recipe:  # fmt: skip
    """critic - mean( Q(s, a_theta) - alpha log pi(a_theta|s) ), the actor every so many updates."""
    actor = Bonus(signal="pathwise_q", every=every, name="actor")
    entropy = Bonus(signal="pathwise_logp", every=every, name="entropy")
    return Recipe(objective=critic + actor + (-1.0 * alpha) * entropy, controllers=controllers, control=control)


def dual(temperature: float, rate: float, entropy_target: float) -> DualAscent:
    """The controller of the knob `temperature`; `entropy_target` per action dimension."""
    return DualAscent(knob="temperature", value=temperature, learning_rate=rate, limit=-entropy_target)


def sac(*, gamma: float = 0.99, tau: float = 0.005, temperature: float = 1.0, automatic: bool = True,
        entropy_target: float = -1.0, temperature_rate: float = 3e-4) -> Recipe:  # fmt: skip
    """Soft actor-critic (arXiv 1812.05905, eq. 5, 7 and 18), twin critics, temperature by dual ascent.

        y     = r + gamma (1 - d) (min_j Q_tj(s', a') - alpha log pi(a'|s')),    a' ~ pi(s')
        L_Q   = sum_j mean( (Q_j - y)^2 / 2 )
        L_pi  = mean( alpha log pi(a_theta|s) - min_j Q_j(s, a_theta) )                pathwise, Q frozen
        alpha : rises while the entropy is below the target, by Adam on log alpha

    `entropy_target`: per action dimension (the paper's -dim(A)). Of discrete actions expectations are exact sums and the
    target is 0.98 log(choices) (arXiv 1910.07207).
    """
    alpha = Knob("temperature", temperature) if automatic else temperature
    critic = Regression(target=Bellman(temperature=alpha), name="critic")
    control = ControlSpec(actor="squashed", state_std=True, critic="q", off_policy=True, gamma=gamma, backup="soft",
                          tau=tau, settings=OFF_POLICY)  # fmt: skip
    controllers = (dual(temperature, temperature_rate, entropy_target),) if automatic else ()
    return soft(critic, control, alpha, controllers=controllers)


def mdpo_off_policy(*, gamma: float = 0.99, tau: float = 0.005, temperature: float = 0.2, closeness: float = 1.0,
                    refresh: int = 1000) -> Recipe:  # fmt: skip
    """Off-policy mirror descent policy optimisation (arXiv 2005.09814, eq. 14 and 15), lam = `temperature`, c = `closeness`.

        L_pi = mean( c log pi(a_theta|s) + (lam - c) log pi_k(a_theta|s) - min_j Q_j(s, a_theta) )
             = c KL(pi || pi_k) + lam E log pi_k - E Q         pi_k: the policy at the last of every `refresh` updates

    log pi_k is differentiated through the action, not through its weights. With c = lam it is `sac` at a fixed temperature.
    Departs from the released code: no separate V network (the backup is `sac`'s), the actor climbs min_j Q_j instead of Q_1,
    and no penalty on the Gaussian's parameters.
    """
    base = sac(gamma=gamma, tau=tau, temperature=temperature, automatic=False)
    critic = Regression(target=Bellman(temperature=temperature), name="critic")
    assert base.control is not None
    recipe = soft(critic, replace(base.control, snapshot_every=refresh), closeness)
    if closeness == temperature:
        return base
    prior = Bonus(signal="pathwise_reference_logp", name="snapshot")
    return recipe.but(objective=recipe.objective + (closeness - temperature) * prior)


def pmoe(*, experts: int = 4, update: str = "all", spread: float = 1.0, gamma: float = 0.99, tau: float = 0.005,
         temperature: float = 1.0, automatic: bool = True, entropy_target: float = -1.0,
         temperature_rate: float = 3e-4) -> Recipe:  # fmt: skip
    """Probabilistic mixture of experts (arXiv 2104.09122) in SAC: pi = sum_i w_i N_i, squashed.

        a_i ~ N_i each, q_i = min_j Q_j(s, a_i), best = argmax_i q_i
        L_prim = mean( mean_i (alpha log p_i(a_i) - q_i) )                 update="max": of the best component only
        L_freq = mean( mean_i (w_i - 1{i = best})^2 )                      moves the router w, and nothing else does
        y      = r + gamma (1 - d) (min_j Q_tj(s', a') - alpha log p_i'(a'|s')),    i' ~ w(s'), a' ~ N_i'

    `spread`: standard deviation of the components' initial means before squashing: alike they would stay alike. With
    update="max" components that never win are frozen. The temperature follows the mean entropy of all components.
    """
    if update not in SHARES:
        raise ValueError(f"update is {update!r}: expected one of {', '.join(SHARES)}")
    base = sac(gamma=gamma, tau=tau, temperature=temperature, automatic=automatic, entropy_target=entropy_target,
               temperature_rate=temperature_rate)  # fmt: skip
    alpha = Knob("temperature", temperature) if automatic else temperature
    assert base.control is not None
    control = replace(base.control, actor="mixture", experts=experts, spread=spread, backup="component")
    critic = Regression(target=Bellman(temperature=alpha), name="critic")
    actor = Components(temperature=alpha, share=SHARES[update], name="actor")
    return base.but(objective=critic + actor + Router(name="router"), control=control)


def tqc(*, gamma: float = 0.99, tau: float = 0.005, temperature: float = 1.0, automatic: bool = True,
        entropy_target: float = -1.0, temperature_rate: float = 3e-4) -> Recipe:  # fmt: skip
    """Truncated quantile critics (arXiv 2005.04269): SAC whose two critics hold 25 quantiles of the return each.

        y_m  = r + gamma (1 - d) (m-th smallest of all 50 quantiles at (s', a') - alpha log pi(a'|s')),   m <= 46
        L_Z  = sum_j mean( quantile Huber regression of Z_j to all y_m )
        L_pi = mean( alpha log pi(a_theta|s) - mean of all quantiles at (s, a_theta) )

    Two critics where the paper has five.
    """
    base = sac(gamma=gamma, tau=tau, temperature=temperature, automatic=automatic, entropy_target=entropy_target,
               temperature_rate=temperature_rate)  # fmt: skip
    alpha = Knob("temperature", temperature) if automatic else temperature
    assert base.control is not None
    control = replace(base.control, critic="quantile_q", backup="quantile", reduce="mean")
    critic = QuantileRegression(target=Bellman(temperature=alpha, value="next_quantiles"), name="critic")
    return soft(critic, control, alpha, controllers=base.controllers)


def dsac_t(*, gamma: float = 0.99, tau: float = 0.005, temperature: float = math.e, automatic: bool = True,
           entropy_target: float = -1.0, temperature_rate: float = 3e-4, spread_rate: float = 0.005, bound: float = 3.0,
           delay: int = 2) -> Recipe:  # fmt: skip
    """Distributional SAC with three refinements (DSAC-T, arXiv 2310.05858): critics Z_i = N(Q_i, sigma_i^2).

        y_q = r + gamma (1 - d) (Q_tj - alpha log pi_t(a'|s')),   j = argmin_i Q_ti(s', a'),   a' ~ pi_t(s')
        y_z = y_q + gamma (1 - d) z sigma_tj,                     z ~ N(0, 1) within +-3
        L_Z = sum_i mean w_i ( huber(Q_i - y_q) + sigma_i sg((sigma_i^2 - clip(y_z - Q_i, +-bound m_i)^2) / (sigma_i + .1)) )
        w_i = m_i^2 / (sigma_i^2 + .1) in [.1, 10],     m_i: running mean of sigma_i by `spread_rate`, a controller
        L_pi as in `sac`, on the means;  actor, alpha and slow copies (pi_t too) every `delay` updates

    The expected target for the mean, twin critics, and gradients in units of the returns' spread are the refinements.
    """
    alpha = Knob("temperature", temperature) if automatic else temperature
    spreads = tuple(Knob(f"spread{i}", 0.0) for i in range(2))
    critic = GaussianReturn(target=Bellman(temperature=alpha), spreads=spreads, rate=spread_rate, bound=bound,
                            name="critic")  # fmt: skip
    settings = {**OFF_POLICY, "hidden": (256, 256, 256), "activation": "gelu", "learning_rate": 1e-4}
    control = ControlSpec(
        actor="squashed", state_std=True, log_std=(-20.0, 0.5), critic="gaussian_q", off_policy=True, gamma=gamma,
        backup="gaussian", target_policy=True, tau=tau, target_every=delay, settings=settings,
    )  # fmt: skip
    running = tuple(MovingMean(knob=k.name, metric=f"q_std/{i}", rate=spread_rate) for i, k in enumerate(spreads))
    tuned = (dual(temperature, temperature_rate, entropy_target),) if automatic else ()
    return soft(critic, control, alpha, delay, (*running, *tuned))


_TESTS = "tests/methods/test_actor_critic.py::"
_VARIANTS = "tests/methods/test_actor_critic_variants.py::"


def _entry(slug: str, build: Callable[..., Recipe], title: str, paper: str, equation: str, *tests: str,
           row: int | None = None, claim: str = "", page: str = _TESTS) -> Method:  # fmt: skip
    return Method(slug=slug, build=build, row=row, family="control", title=title, paper=paper, equation=equation,
                  claim=claim, identity_tests=tuple(page + t for t in tests))  # fmt: skip


METHODS: tuple[Method, ...] = (
    _entry("dqn", dqn, "Deep Q-learning (double, dueling)", "Mnih et al. 2015; arXiv 1509.06461; arXiv 1511.06581",
           "L = mean huber(Q(s, a) - r - gamma (1 - d) max_a Qtarg(s', a))", "test_double_dqn_lets_the_network_choose",
           "test_fitted_q_reaches_the_fixed_point_of_the_bellman_equation"),
    _entry("ddpg", ddpg, "Deep deterministic policy gradient", "arXiv 1509.02971",
           "L = mean (Q - y)^2 / 2 - mean Q(s, pi(s)),  y = r + gamma (1 - d) Qtarg(s', pitarg(s'))",
           "test_the_actor_of_ddpg_has_the_deterministic_policy_gradient"),
    _entry("td3", td3, "Twin delayed DDPG", "arXiv 1802.09477", """
L = sum_j mean (Q_j - y)^2 / 2 - mean Q_1(s, pi(s)),  the second term every second update
y = r + gamma (1 - d) min_j Qtarg_j(s', pitarg(s') + clip(.2 z, -.5, .5))""",
           "test_td3_delays_its_actor_and_its_targets", "test_td3_without_its_three_changes_is_ddpg"),
    _entry("sac", sac, "Soft actor-critic with automatic temperature", "arXiv 1812.05905", """
L = sum_j mean (Q_j - y)^2 / 2 + mean(alpha log pi(a_theta|s) - min_j Q_j(s, a_theta))
y = r + gamma (1 - d) (min_j Qtarg_j(s', a') - alpha log pi(a'|s')),  alpha by dual ascent to H = -dim A""",
           "test_the_categorical_optimum_is_the_softmax", "test_the_gaussian_optimum_of_a_quadratic",
           "test_without_temperature_and_spread_the_actor_is_that_of_ddpg", "test_the_temperature_rests_at_the_entropy_target",
           "test_pathwise_and_score_function_gradients_agree", row=52,
           claim="A temperature tuned to an entropy target learns Pendulum and is robust to the scale of rewards."),
    _entry("pmoe", pmoe, "Probabilistic mixture of experts", "arXiv 2104.09122", """
L = L_Q + mean_i (alpha log p_i(a_i) - q_i) + mean_i (w_i - 1{i = argmax q})^2,  q_i = min_j Q_j(s, a_i)
y = r + gamma (1 - d) (min_j Qtarg_j(s', a') - alpha log p_i'(a'|s')),  i' ~ w(s'), a' ~ p_i'""",
           "test_pmoe_with_one_expert_is_sac", "test_the_router_learns_how_often_each_expert_is_best",
           "test_alike_experts_share_the_router", "test_max_moves_the_best_expert_only", row=56, page=_VARIANTS,
           claim="A mixture whose experts all climb their own samples keeps both of two equal peaks; one Gaussian keeps one."),
    _entry("tqc", tqc, "Truncated quantile critics", "arXiv 2005.04269", """
L = sum_j mean quantile-huber(Z_j, y_m) + mean(alpha log pi - mean of quantiles)
y_m = r + gamma (1 - d) (smallest quantiles of both Ztarg(s', a') - alpha log pi(a'|s'))""",
           "test_quantiles_of_known_returns", "test_quantile_regression_by_hand", page=_VARIANTS),
    _entry("dsac-t", dsac_t, "Distributional SAC with three refinements", "arXiv 2310.05858", """
L = sum_i mean w_i (huber(Q_i - y_q) + sigma_i sg((sigma_i^2 - clip(y_z - Q_i, b_i)^2) / (sigma_i + e))) + L_pi of sac
w_i = m_i^2 / (sigma_i^2 + e),  b_i = 3 m_i,  m_i = running mean of sigma_i;  y_z = y_q + gamma (1 - d) z sigmatarg""",
           "test_dsac_t_with_a_frozen_spread_is_the_critic_of_sac", "test_the_fixed_point_of_dsac_t",
           "test_dsac_t_gradients_scale_with_returns", "test_dsac_t_is_the_gaussian_likelihood_in_its_limit", row=119,
           page=_VARIANTS,
           claim="Gradients in units of the returns' spread make the Gaussian critic robust to the scale of rewards."),
)  # fmt: skip
