"""On-policy learning without on-policy sampling: a second policy acts so that the data look on-policy (row 4).

    theta   PPO on the newest b batches, as if theta had drawn them: r = pi_theta / sg(pi_theta before the update)
    phi     acts; every m steps  phi <- theta, then it is pushed away from what the data hold too much of:

            L(phi) = mean( max(g, clip(g, 1 - c, 1 + c)) ) + kl * mean( KL(theta || phi) ),    g = pi_phi / sg(pi_theta)

g enters the denominators nowhere else: no importance correction for phi. L is PPO's clipped loss where every advantage is -1:

               advantage   weight   mask   passes, minibatches     step
    props      -1          g        clip   16, 4; stops by KL      Adam
    ros        -1          g        -      1, 1                    along the gradient
    buffered-ppo   no second policy: the same newest b batches, drawn by the policies of their time
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from unipo.episodes import Episodes
from unipo.methods.method import Method
from unipo.objectives import (
    Advantage,
    AdvantageMask,
    BatchStd,
    Bonus,
    ClipMask,
    GeneralisedAdvantage,
    Objective,
    PolicyGradient,
    Signals,
    TokenMean,
    TokenRatio,
    ValueRegression,
    ValueTarget,
)
from unipo.recipe import Recipe
from unipo.sources.acting.behaviour import Behaviour
from unipo.sources.spec import ControlSpec

OLD = TokenRatio(to="old")
SETTINGS: dict[str, Any] = {"learning_rate": 1e-3, "batch_size": 128}


@dataclass(frozen=True)
class Uniform(Advantage):
    """The same advantage everywhere. -1: every step of the data is to become less likely, the frequent ones most."""

    value: float = -1.0

    def __call__(self, episodes: Episodes, signals: Signals) -> Tensor:
        return torch.full((episodes.count("step"),), self.value, device=episodes.device)


def undersampled(clip: float | None = 0.3, kl: float = 0.0) -> Objective:
    """L(phi), in which `old` is the target policy: mean( max(g, clip(g)) ) + kl * mean( KL(old || phi) ).

    At phi = theta its gradient in the logits of a bandit is pi_D - pi_theta: a step raises what the data D hold too little
    of. `clip` None: none (ROS).
    """
    mask = AdvantageMask() if clip is None else ClipMask(clip, clip, ratio=OLD)
    pushed: Objective = PolicyGradient(advantage=Uniform(), weight=OLD, mask=mask, aggregate=TokenMean())
    return pushed + (-kl) * Bonus(signal="forward_kl:old") if kl else pushed


def _on_newest(batches: int, behaviour: Behaviour | None, clip: float, gamma: float, lam: float, value: float,
               entropy: float, epochs: int) -> Recipe:  # fmt: skip
    """PPO on the newest batches; values, advantages and the ratio's denominator are those before the update."""
    objective: Objective = PolicyGradient(
        advantage=GeneralisedAdvantage(gamma, lam, whiten=BatchStd()),
        weight=OLD,
        mask=ClipMask(clip, clip, ratio=OLD),
        aggregate=TokenMean(),
    )
    objective = objective + value * ValueRegression(target=ValueTarget(gamma, lam)) if value else objective
    objective = objective + entropy * Bonus() if entropy else objective
    control = ControlSpec(gamma=gamma, batches=batches, behaviour=behaviour, settings=SETTINGS)
    return Recipe(objective=objective, control=control, epochs=epochs)


def props(*, batches: int = 2, every: int = 16, behaviour_clip: float = 0.3, behaviour_kl: float = 0.0,
          behaviour_rate: float = 1e-3, behaviour_epochs: int = 16, behaviour_minibatches: int = 4, stop: float = 0.01,
          clip: float = 0.2, gamma: float = 0.99, lam: float = 0.95, value: float = 0.5, entropy: float = 0.0,
          epochs: int = 10) -> Recipe:  # fmt: skip
    """Proximal robust on-policy sampling (arXiv 2311.08290): adapt who acts, so that the data look on-policy.

        phi <- theta; L(phi) = mean( max(g, clip(g, 1 -+ behaviour_clip)) ) + behaviour_kl * mean( KL(theta || phi) )

    over the newest `batches` rollouts, `every` so many steps, until k3 of KL(theta || phi) is above `stop`. Defaults of
    discrete actions (`stop` .1 and `every` 8 for continuous ones). Departs from the code: Adam starts over with phi, the
    target's own KL stop (.03) is left out, 10 epochs of minibatches of 128.
    """
    behaviour = Behaviour(objective=undersampled(behaviour_clip, behaviour_kl), every=every, epochs=behaviour_epochs,
                          minibatches=behaviour_minibatches, learning_rate=behaviour_rate, stop=stop)  # fmt: skip
    return _on_newest(batches, behaviour, clip, gamma, lam, value, entropy, epochs)


def ros(*, batches: int = 1, behaviour_rate: float = 1.0, clip: float = 0.2, gamma: float = 0.99, lam: float = 0.95,
        value: float = 0.5, entropy: float = 0.0, epochs: int = 10) -> Recipe:  # fmt: skip
    """Robust on-policy sampling (Zhong et al. 2022): after every step phi <- theta and one gradient step on mean( g ).

    The step is `behaviour_rate` times the gradient, as long as that is well below 1 in every weight.
    """
    behaviour = Behaviour(objective=undersampled(None), every=1, epochs=1, minibatches=1, learning_rate=behaviour_rate,
                          eps=1.0)  # fmt: skip
    return _on_newest(batches, behaviour, clip, gamma, lam, value, entropy, epochs)


def buffered_ppo(*, batches: int = 2, clip: float = 0.2, gamma: float = 0.99, lam: float = 0.95, value: float = 0.5,
                 entropy: float = 0.0, epochs: int = 10) -> Recipe:  # fmt: skip
    """PPO on the newest `batches` rollouts as if they were its own: what PROPS is compared with; 1 is PPO.

    L = - mean( min(r A, clip(r) A) ) + value * mean( (V - return)^2 / 2 ),   r to the policy before the update
    """
    return _on_newest(batches, None, clip, gamma, lam, value, entropy, epochs)


_method = partial(Method, family="control", paper="arXiv 2311.08290")
_TESTS = "tests/methods/test_props.py::"

METHODS = (
    _method(slug="props", build=props, row=4, title="On-policy learning without on-policy sampling", equation="""
L(phi) = mean(max(g, clip(g, 1 -+ c))) + kl KL(theta || phi),  g = pi_phi / sg(pi_theta),  phi <- theta every m steps
L(theta) = PPO on the newest b batches, r = pi_theta / sg(pi_theta before the update)""",
            claim="Adapting the policy that acts brings the empirical distribution of actions nearer to the target policy "
                  "than sampling it does.",
            identity_tests=tuple(_TESTS + t for t in (
                "test_its_loss_is_ppo_where_every_advantage_is_minus_one",
                "test_its_gradient_is_that_of_the_ratio_above_the_lower_clip_and_zero_below",
                "test_on_a_bandit_its_gradient_is_empirical_minus_target",
                "test_without_a_step_it_is_ppo_on_the_newest_batches",
                "test_the_greedy_oracle_keeps_every_arm_within_a_pull"))),
    _method(slug="ros", build=ros, title="Robust on-policy sampling", paper="Zhong et al. 2022",
            equation="phi <- theta - rate grad mean(pi_phi / sg(pi_theta)),  every step",
            identity_tests=(_TESTS + "test_ros_takes_one_step_along_the_gradient",)),
    _method(slug="buffered-ppo", build=buffered_ppo, title="PPO on the newest batches",
            equation="L = -mean(min(r A, clip(r) A)) on the newest b batches,  r = pi / sg(pi before the update)",
            identity_tests=(_TESTS + "test_without_a_step_it_is_ppo_on_the_newest_batches",)),
)  # fmt: skip
