"""On-policy methods of environments: one advantage, and what keeps the step it gives small.

    A_n = sum_k (gamma lam)^k delta_{n+k},   delta_n = r_n + gamma V(n+1) - V(n)      0 after a terminated step only
    L   = - mean( weight * A * log pi ) + divergence + value * mean( (V - (A + V_old))^2 / 2 )

r = pi / mu is the ratio to the policy that acted, pi_k; on fresh data pi_k = mu.

                   lam    weight   the policy's step                                    divergence
    reinforce      1      1        Adam, whole episodes                                 -
    a2c            1      1        Adam, a few steps of many environments               -
    ppo            .95    r, clip  Adam, epochs of minibatches                          (the clip)
    trpo           .95    r        s = F^-1 g at |s|_F = 2 max_kl, line search          KL(pi_k || pi) <= max_kl
    npg            .95    r        the same without line search                         -
    mdpo           .95    r        m steps of Adam on the whole batch                   KL(pi || pi_k) / t_k
    npg-igt-harpg  1      1        gamma_t along an average of gradients                -

`ppo` is on the page of policy gradients: it is the same function that trains a language model. For the last four
`Recipe.policy_step` names the optimiser of the policy; the critic then trains by the other terms, in epochs of minibatches.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from unipo.methods.actor_critic import mdpo_off_policy
from unipo.methods.method import Method
from unipo.objectives import (
    BatchStd,
    Bonus,
    DiscountedReturn,
    EpisodeSum,
    GeneralisedAdvantage,
    Knob,
    Objective,
    PolicyGradient,
    Surrogate,
    TokenMean,
    TokenRatio,
    ValueRegression,
    ValueTarget,
    Whitened,
)
from unipo.optimizers import (
    Decay,
    HessianAidedRecursive,
    ImplicitGradientTransport,
    NormalisedMomentum,
    RepeatedSteps,
    StochasticGradient,
    TrustRegion,
)
from unipo.recipe import Recipe
from unipo.sources.controllers import InverseDecay
from unipo.sources.spec import ControlSpec

FITTED: Mapping[str, Any] = {"rollout": 2048, "batch_size": 64, "value_learning_rate": 1e-3}
"""The policy moves on the whole batch of 2048 steps, the critic in minibatches of 64."""


def with_critic(
    gradient: Objective, gamma: float, lam: float, value: float, entropy: float, value_clip: float = 0.0
) -> Objective:
    """gradient - entropy * mean( H(pi) ) + value * the regression of V to its GAE return; absent where 0."""
    total = gradient + entropy * Bonus(name="entropy") if entropy else gradient
    critic = ValueRegression(target=ValueTarget(gamma, lam), clip=value_clip or None)
    return total + value * critic if value else total


def a2c(*, gamma: float = 0.99, lam: float = 1.0, value: float = 0.5, entropy: float = 0.0) -> Recipe:
    """Advantage actor-critic, synchronous (arXiv 1602.01783, alg. S3): one update on a few steps of many environments.

        L = - mean( A_n log pi(a_n|s_n) ) - entropy * mean( H(pi) ) + value * mean( (V - (A + V_old))^2 / 2 )

    Five steps of 16 environments in a batch. Departs from the paper: environments in step, Adam (it is RMSprop there),
    entropy 0 (0.01 there).
    """
    gradient = PolicyGradient(advantage=GeneralisedAdvantage(gamma, lam), aggregate=TokenMean())
    settings = {"num_envs": 16, "rollout": 5, "batch_size": 0, "learning_rate": 7e-4}
    control = ControlSpec(gamma=gamma, settings=settings)
    return Recipe(objective=with_critic(gradient, gamma, lam, value, entropy), control=control)


def reinforce_control(*, gamma: float = 0.99, value: float = 1.0, entropy: float = 0.0, epochs: int = 10) -> Recipe:
    """REINFORCE with a learned baseline (Williams 1992; Sutton and Barto 2018, section 13.4): Monte-Carlo returns.

        A_n = G_n - V(s_n),   G_n = sum_k gamma^k r_{n+k}, whitened over the batch
        L   = - mean( A_n log pi(a_n|s_n) ) - entropy * mean( H(pi) ) + value * mean( (V - G)^2 / 2 )

    One step of Adam on the whole batch; the baseline is fitted in `epochs` of minibatches. An episode that was cut, by a
    time limit or by the end of the batch, goes on with V. `value` 0: no baseline, and what was cut is worth nothing more.
    As everybody does, and against the theorem, there is no factor gamma^n before A_n.
    """
    returns = GeneralisedAdvantage(gamma, 1.0, BatchStd()) if value else Whitened(DiscountedReturn(gamma))
    gradient = PolicyGradient(advantage=returns, aggregate=TokenMean())
    control = ControlSpec(gamma=gamma, settings={**FITTED, "learning_rate": 1e-2})
    return Recipe(objective=with_critic(gradient, gamma, 1.0, value, entropy), control=control, epochs=epochs,
                  policy_step=RepeatedSteps(steps=1))  # fmt: skip


def trpo(*, gamma: float = 0.99, lam: float = 0.95, max_kl: float = 0.01, damping: float = 0.1, cg_iterations: int = 10,
         backtracks: int = 10, entropy: float = 0.0, epochs: int = 10) -> Recipe:  # fmt: skip
    """Trust-region policy optimisation (arXiv 1502.05477, eq. 14 and appendix C): the largest step that KL allows.

        maximise  mean( r_n A_n ) + entropy * mean( H(pi) )   subject to   mean( KL(pi_k || pi) ) <= max_kl

    s = F^-1 g by conjugate gradients, scaled to (s^T F s) / 2 = max_kl, then halved until the surrogate rises and the
    constraint holds. A whitened; the critic is fitted in `epochs` of minibatches. F is measured on the whole batch (the
    authors' code takes a tenth of it).
    """
    gradient = Surrogate(advantage=GeneralisedAdvantage(gamma, lam, BatchStd()))
    region = TrustRegion(max_kl=max_kl, damping=damping, cg_iterations=cg_iterations, backtracks=backtracks)
    control = ControlSpec(gamma=gamma, settings=FITTED)
    return Recipe(objective=with_critic(gradient, gamma, lam, 1.0, entropy), control=control, epochs=epochs,
                  policy_step=region)  # fmt: skip


def npg(*, gamma: float = 0.99, lam: float = 0.95, max_kl: float = 0.01, damping: float = 0.1, cg_iterations: int = 10,
        entropy: float = 0.0, epochs: int = 10) -> Recipe:  # fmt: skip
    """Natural policy gradient (Kakade 2001), its step length set in KL (Peters and Schaal 2008; arXiv 1703.02660).

        theta <- theta + sqrt( 2 max_kl / g^T F^-1 g ) F^-1 g

    `trpo` without its line search: the step is taken as the quadratic model has it.
    """
    base = trpo(gamma=gamma, lam=lam, entropy=entropy, epochs=epochs)
    return base.but(
        policy_step=TrustRegion(max_kl=max_kl, damping=damping, cg_iterations=cg_iterations, line_search=False)
    )


def mdpo_on_policy(*, gamma: float = 0.99, lam: float = 0.95, steps: int = 10, step_size: float = 1.0,
                   value_clip: float = 0.0, epochs: int = 5) -> Recipe:  # fmt: skip
    """Mirror descent policy optimisation (arXiv 2005.09814, eq. 10), on-policy.

        L = - mean( r_n A_n ) + 1/t_k * mean( KL(pi || pi_k) ),   t_k = step_size * max(1 - k/K, 1/K)

    `steps` (m) steps of Adam on the whole batch of iteration k of K; A whitened; the KL in closed form in every state, the
    new policy first: the opposite of TRPO's. The critic has `epochs` of minibatches; `value_clip` clips its loss around V_old
    (0.2 in the authors' code, whose rewards are normalised; here 0: not at all).
    """
    gradient = PolicyGradient(
        advantage=GeneralisedAdvantage(gamma, lam, BatchStd()), weight=TokenRatio(), aggregate=TokenMean()
    )
    inverse = Knob("inverse_step", 1.0 / step_size)
    nearness = (-1.0 * inverse) * Bonus(signal="reverse_kl:old", name="divergence")
    return Recipe(
        objective=with_critic(gradient + nearness, gamma, lam, 1.0, 0.0, value_clip),
        control=ControlSpec(gamma=gamma, settings=FITTED),
        controllers=(InverseDecay(knob=inverse.name, value=inverse.default),),
        policy_step=RepeatedSteps(steps=steps),
        epochs=epochs,
    )


AVERAGES: Mapping[str, Callable[[float, float], Any]] = {
    "n-pg-igt": lambda rate, reach: ImplicitGradientTransport(rate=Decay(rate), reach=reach),
    "n-harpg": lambda rate, reach: HessianAidedRecursive(rate=Decay(rate)),
    "harpg": lambda rate, reach: HessianAidedRecursive(rate=Decay(rate, 1 / 2), normalise=False),
    "momentum": lambda rate, reach: NormalisedMomentum(rate=Decay(rate)),
    "sgd": lambda rate, reach: StochasticGradient(rate=Decay(rate, 2 / 3)),
}


def npg_igt_harpg(*, variant: str = "n-pg-igt", rate: float = 0.1, reach: float = float("inf"), gamma: float = 0.99,
                  epochs: int = 10) -> Recipe:  # fmt: skip
    """Normalised policy gradients whose momentum has less bias (arXiv 2302.01734, alg. 2 and 3).

        d_t = (1 - eta_t) (d_{t-1} + v_t) + eta_t g_t,   theta_{t+1} = theta_t + gamma_t d_t / |d_t|,   gamma_t = 2 rate/(t + 2)

        n-pg-igt   v = 0; g is of episodes sampled at theta~_t = theta_t + (1 - eta_t) / eta_t (theta_t - theta_{t-1})
        n-harpg    v = H (theta_t - theta_{t-1}), estimated on a second batch between the two; `harpg` does not normalise
        momentum   v = 0; `sgd`: eta = 1, not normalised

    g is the gradient of a mean over episodes of sum_n (G_n - V(s_n)) log pi(a_n|s_n), as in the authors' code without a
    factor gamma^n and not whitened. Evaluated and saved is theta, not theta~. A second batch is as long as the first and
    not counted in `total_timesteps`. Batches of 1000 steps.
    """
    if variant not in AVERAGES:
        raise ValueError(f"there is no variant {variant!r}: expected one of {', '.join(AVERAGES)}")
    gradient = PolicyGradient(advantage=GeneralisedAdvantage(gamma, 1.0), aggregate=EpisodeSum())
    return Recipe(
        objective=with_critic(gradient, gamma, 1.0, 1.0, 0.0),
        control=ControlSpec(gamma=gamma, settings={**FITTED, "rollout": 1000}),
        policy_step=AVERAGES[variant](rate, reach),
        epochs=epochs,
    )


def mdpo(*, variant: str = "on_policy", gamma: float = 0.99, step_size: float = 1.0, lam: float = 0.95, steps: int = 10,
         value_clip: float = 0.0, epochs: int = 5, tau: float = 0.005, temperature: float = 0.2,
         refresh: int = 1000) -> Recipe:  # fmt: skip
    """Mirror descent policy optimisation (arXiv 2005.09814): an Adam-sized step of a KL-regularised surrogate.

        on_policy    L = - mean( r_n A_n ) + 1/t_k * mean( KL(pi || pi_k) )                        see `mdpo_on_policy`
        off_policy   L = mean( c KL(pi || pi_k) + temperature log pi_k(a_theta|s) - Q(s, a_theta) )  see `mdpo_off_policy`

    `step_size`: t_0, and 1/c. `lam`, `steps`, `value_clip` and `epochs` are on-policy's; `tau`, `temperature` and `refresh`
    off-policy's.
    """
    variants: Mapping[str, Callable[[], Recipe]] = {
        "on_policy": lambda: mdpo_on_policy(
            gamma=gamma, lam=lam, steps=steps, step_size=step_size, value_clip=value_clip, epochs=epochs
        ),
        "off_policy": lambda: mdpo_off_policy(
            gamma=gamma, tau=tau, temperature=temperature, closeness=1.0 / step_size, refresh=refresh
        ),
    }
    if variant not in variants:
        raise ValueError(f"there is no variant {variant!r}: expected one of {', '.join(variants)}")
    return variants[variant]()


def _tests(place: str, *names: str) -> tuple[str, ...]:
    return tuple(f"tests/{place}.py::{name}" for name in names)


def _baseline(slug: str, build: Callable[..., Recipe], title: str, paper: str, equation: str, *tests: str) -> Method:
    return Method(slug=slug, build=build, family="control", title=title, paper=paper, equation=equation,
                  identity_tests=tests)  # fmt: skip


_EQUAL, _EXACT, _STEP = (
    "methods/test_on_policy_control",
    "methods/test_exact_policy_gradients",
    "learner/test_policy_step",
)
METHODS = (
    _baseline("a2c", a2c, "Advantage actor-critic", "arXiv 1602.01783, alg. S3",
              "L = -TOK(A log pi) - entropy TOK(H) + value TOK((V - return)^2 / 2),  A = GAE",
              *_tests(_EQUAL, "test_the_first_epoch_of_ppo_is_a2c"),
              *_tests(_EXACT, "test_the_expected_update_is_the_exact_policy_gradient", "test_only_a_cut_episode_goes_on")),
    _baseline("trpo", trpo, "Trust region policy optimization", "arXiv 1502.05477, eq. 14",
              "max TOK(r A)  subject to  TOK(KL(pi_k || pi)) <= max_kl",
              *_tests(_EQUAL, "test_a_trust_region_step_keeps_its_constraint",
                      "test_the_surrogate_has_the_gradient_of_the_log_form",
                      "test_the_natural_gradient_of_an_enumerated_softmax")),
    _baseline("npg", npg, "Natural policy gradient", "Kakade 2001; arXiv 1703.02660, eq. 5",
              "theta + sqrt(2 max_kl / g^T F^-1 g) F^-1 g",
              *_tests(_EQUAL, "test_the_natural_gradient_of_an_enumerated_softmax",
                      "test_npg_is_trpo_without_its_line_search")),
    Method(slug="mdpo", build=mdpo, row=50, family="control", title="Mirror Descent Policy Optimization",
           paper="arXiv 2005.09814, eq. 10 and 14", equation="""
on_policy    L = -TOK(r A) + 1/t_k TOK(KL(pi || pi_k)) + TOK((V - return)^2 / 2),  m steps on the whole batch
             t_k = max(1 - k/K, 1/K)
off_policy   L = TOK(c KL(pi || pi_k) + lam log pi_k(a) - min Q(s, a)),  a ~ pi;  critics as sac's""",
           claim="Several gradient steps on the mirror-descent surrogate do as well as TRPO and better than PPO without "
           "tricks, and better than a single step.",
           identity_tests=(
               *_tests(_EQUAL, "test_the_first_step_of_mdpo_is_the_policy_gradient", "test_mdpo_with_one_step_is_a2c",
                       "test_exact_mirror_descent_is_a_softmax_of_advantages",
                       "test_a_shift_of_the_advantages_changes_no_solution", "test_the_step_size_of_mdpo_has_its_limits",
                       "test_the_divergence_of_mdpo_is_new_to_old"),
               *_tests("methods/test_actor_critic", "test_mdpo_with_one_coefficient_is_sac",
                       "test_mdpo_with_a_uniform_snapshot_is_sac_at_its_closeness", "test_the_exact_step_of_mdpo"))),
    Method(slug="npg-igt-harpg", build=npg_igt_harpg, row=170, family="theory",
           title="Stochastic Policy Gradient Methods: Improved Sample Complexity for Fisher-non-degenerate Policies",
           paper="arXiv 2302.01734, alg. 2 and 3", equation="""
theta' = theta + gamma_t d / |d|,   d <- (1 - eta_t)(d + v) + eta_t g
n-pg-igt   v = 0, g at theta + (1 - eta_t)/eta_t (theta - theta_before);   n-harpg   v = H (theta - theta_before)
g = grad mean over episodes of sum_n (G_n - V_n) log pi_n""",
           claim="With one trajectory per iteration, implicit gradient transport and Hessian-aided momentum end nearer to the "
           "optimum than normalised momentum and stochastic gradient ascent.",
           identity_tests=(
               *_tests(_STEP, "test_transport_samples_ahead_and_deploys_theta", "test_every_step_has_its_length",
                       "test_the_hessian_aided_step_is_that_of_its_formula"),
               *_tests("optimizers/test_momentum", "test_transport_carries_the_exact_gradient_of_a_quadratic",
                       "test_the_expected_difference_over_q_is_the_change_of_the_gradient"),
               *_tests(_EXACT, "test_monte_carlo_returns_need_no_exact_baseline"))),
)  # fmt: skip
