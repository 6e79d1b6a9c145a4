"""Actor-critics on remembered transitions: a critic regressed to a backup, an actor that climbs it.

    critic   Regression( q -> r + discount * (1 - terminated) * next )        next by the recipe's backup
    actor    -mean( Q(s, a_theta(s)) ) + temperature * mean( log pi )         pathwise: a_theta(s) from the batch's noise

Both are terms of one objective and one backward pass: the actor's Q has detached weights, the critic's target has none.

               actor            next                                   beside
    sac        squashed         min_j Q_j(s', a') - alpha log pi(a'|s')    alpha by dual ascent on the entropy
"""

from __future__ import annotations

from unipo.methods.method import Method
from unipo.objectives import Bellman, Bonus, Knob, Regression
from unipo.recipe import Recipe
from unipo.sources.controllers import DualAscent
from unipo.sources.spec import ControlSpec

OFF_POLICY = {"hidden": (256, 256), "activation": "relu", "orthogonal": False, "batch_size": 256, "rollout": 1000,
              "clip_norm": float("inf"), "adam_eps": 1e-8}  # fmt: skip


def sac(*, gamma: float = 0.99, tau: float = 0.005, temperature: float = 1.0, automatic: bool = True,
        entropy_target: float = -1.0, temperature_rate: float = 3e-4) -> Recipe:  # fmt: skip
    """Soft actor-critic (arXiv 1812.05905, eq. 5, 7 and 18), twin critics, temperature by dual ascent.

        y     = r + gamma (1 - d) (min_j Q_j_target(s', a') - alpha log pi(a'|s')),    a' ~ pi(s')
        L_Q   = sum_j mean( (Q_j - y)^2 / 2 )
        L_pi  = mean( alpha log pi(a_theta|s) - min_j Q_j(s, a_theta) )                pathwise, Q frozen
        alpha : rises while the entropy is below the target, by Adam on log alpha

    `entropy_target`: per action dimension (the paper's -dim(A)).
    """
    alpha = Knob("temperature", temperature) if automatic else temperature
    critic = Regression(target=Bellman(temperature=alpha), name="critic")
    actor = Bonus(signal="pathwise_q", name="actor")
    entropy = Bonus(signal="pathwise_logp", name="entropy")
    dual = DualAscent(knob="temperature", value=temperature, learning_rate=temperature_rate, limit=-entropy_target)
    return Recipe(
        objective=critic + actor + (-1.0 * alpha) * entropy,
        controllers=(dual,) if automatic else (),
        control=ControlSpec(actor="squashed", state_std=True, critic="q", off_policy=True, gamma=gamma, backup="soft",
                            tau=tau, settings=OFF_POLICY),
    )  # fmt: skip


METHODS = (
    Method(slug="sac", build=sac, row=52, family="control", title="Soft actor-critic with automatic temperature",
           paper="arXiv 1812.05905", equation="""
L = sum_j mean (Q_j - y)^2 / 2 + mean(alpha log pi(a_theta|s) - min_j Q_j(s, a_theta))
y = r + gamma (1 - d) (min_j Qtarg_j(s', a') - alpha log pi(a'|s')),  alpha by dual ascent to H = -dim A""",
           claim="A temperature tuned to an entropy target learns Pendulum and is robust to the scale of rewards."),
)  # fmt: skip
