"""Policies from recorded transitions alone: a dataset is a source like any other, the recipe only never acts.

           actor           moved by                                         critic's next
    td3-bc deterministic   Q in units of its own size, and the data's a     as td3
    iql    gaussian        log pi(a|s) of the data's a, weighted by exp A   V(s'), an expectile over the data's actions

`unipo run iql Pendulum-v1 --dataset DIR`: a Minari dataset, or a folder of episodes.
"""

from __future__ import annotations

from dataclasses import replace

from unipo.methods.actor_critic import OFF_POLICY, td3
from unipo.methods.method import Method
from unipo.objectives import (
    Advantage,
    AdvantageWeight,
    Bellman,
    Cloning,
    Expectile,
    PolicyGradient,
    Regression,
    RelativeBonus,
    SmallestOf,
    TokenMean,
)
from unipo.recipe import Recipe
from unipo.sources.spec import ControlSpec


def td3_bc(*, alpha: float = 2.5, gamma: float = 0.99, tau: float = 0.005, smoothing: float = 0.2, clip: float = 0.5,
           delay: int = 2) -> Recipe:  # fmt: skip
    """TD3 with behaviour cloning (arXiv 2106.06860): stay near the recorded actions, by as little as their value asks.

        L_pi = - alpha mean Q_1(s, pi(s)) / sg( mean |Q_1(s, pi(s))| ) + mean( (pi(s) - a)^2 )      every `delay` updates

    The mean square is over batch and action dimensions. Critics as in `td3`. Observations are standardised by the data.
    """
    base = td3(gamma=gamma, tau=tau, smoothing=smoothing, clip=clip, delay=delay)
    critic = Regression(target=Bellman(), name="critic")
    actor = RelativeBonus(every=delay, name="actor")
    assert base.control is not None
    control = replace(base.control, recorded=True, settings={**OFF_POLICY, "normalize_observations": True})
    return base.but(objective=critic + alpha * actor + Cloning(every=delay, name="cloning"), control=control)


def iql(*, expectile: float = 0.7, beta: float = 3.0, cap: float = 100.0, gamma: float = 0.99,
        tau: float = 0.005) -> Recipe:  # fmt: skip
    """Implicit Q-learning (arXiv 2110.06169, eq. 5 to 7): no action is valued that the data does not have.

        L_V  = mean( |expectile - 1{u < 0}| u^2 ),   u = min_j Q_tj(s, a) - V(s)
        L_Q  = sum_j mean( (r + gamma (1 - d) V(s') - Q_j)^2 / 2 )
        L_pi = - mean( min(exp(beta u), cap) log pi(a|s) )

    expectile 0.5: V is the data's own value; towards 1: the best of the data's actions. The Gaussian's mean is not squashed
    (released code: by tanh); its spread is one vector. V and V(s') are those before the update.
    """
    value = Regression(signal="value", target=SmallestOf("target_q"), penalty=Expectile(expectile), name="value")
    critic = Regression(target=Bellman(value="old_next_value"), name="critic")
    weight = AdvantageWeight(scale=beta, cap=cap)
    actor = PolicyGradient(advantage=Advantage(), weight=weight, aggregate=TokenMean(), name="actor")
    control = ControlSpec(actor="gaussian", critic="q", off_policy=True, gamma=gamma, tau=tau, recorded=True,
                          settings=OFF_POLICY)  # fmt: skip
    return Recipe(objective=value + critic + actor, control=control)


_TESTS = "tests/methods/test_offline_control.py::"
METHODS: tuple[Method, ...] = (
    Method(slug="td3-bc", build=td3_bc, family="control", title="TD3 with behaviour cloning", paper="arXiv 2106.06860",
           equation="""
L = sum_j mean (Q_j - y)^2 / 2 - alpha mean Q_1(s, pi) / sg(mean |Q_1|) + mean (pi(s) - a)^2
y = r + gamma (1 - d) min_j Qtarg_j(s', pitarg(s') + clipped noise),  actor every second update""",
           identity_tests=tuple(_TESTS + t for t in (
               "test_the_actor_of_td3_bc_does_not_see_the_scale_of_q", "test_td3_bc_between_its_limits",
           ))),
    Method(slug="iql", build=iql, family="control", title="Implicit Q-learning", paper="arXiv 2110.06169, eq. 5 to 7",
           equation="""
L = mean |expectile - 1{u < 0}| u^2 + sum_j mean (r + gamma (1 - d) V(s') - Q_j)^2 / 2 - mean min(exp(beta u), cap) log pi
u = min_j Qtarg_j(s, a) - V(s)""",
           identity_tests=tuple(_TESTS + t for t in (
               "test_expectile_of_a_half_is_the_mean_and_of_one_the_maximum", "test_iql_by_hand",
           ))),
)  # fmt: skip
