"""Runs with memory: which can be, and their networks."""

from __future__ import annotations

from typing import Any

from unipo.critics.recurrent import RecurrentValue
from unipo.policies.distributions import Distribution
from unipo.policies.recurrent import RecurrentPolicy
from unipo.recipe import Recipe
from unipo.sources.acting.dispatch import SIMULATORS
from unipo.sources.spec import ControlSpec
from unipo.training.config import ConfigError, ControlConfig


def check_recurrent(config: ControlConfig, recipe: Recipe, spec: ControlSpec) -> None:
    """Raises ConfigError where `--recurrent` cannot be: what is remembered must be what the trained policy itself saw, and
    the number of updates known where the learning rate depends on it."""
    one_by_one = "learns from single transitions, which have no past to remember"
    reasons = {
        one_by_one: spec.off_policy,
        "lets a second policy act, whose memory is not the trained one's": spec.behaviour is not None,
        "compares with an older policy, which would remember otherwise": spec.keep_best,
        "judges post-decision states, of which there is no sequence": "post_value" in recipe.needs.signals,
        f"has decisions of many vehicles in {config.task}, which are no sequence": config.task in SIMULATORS,
    }
    for reason, holds in reasons.items():
        if holds:
            raise ConfigError(f"{config.method!r} {reason}: leave out --recurrent, or take ppo, a2c or trpo")
    if config.schedule != "constant" and 0 < config.batch_size < config.rollout:
        raise ConfigError(
            f"--schedule {config.schedule} counts updates, and with --recurrent minibatches are whole stretches of episodes, up "
            f"to {config.rollout} steps (--rollout): there may be fewer than --batch-size {config.batch_size} says. Take a "
            f"--batch-size of at least {config.rollout}, or --schedule constant"
        )


def recurrent_networks(
    recipe: Recipe, spec: ControlSpec, size: int, distribution: Distribution, log_std_init: float, net: dict[str, Any]
) -> tuple[RecurrentPolicy, RecurrentValue | None]:
    """The policy, and the critic where the recipe has one; each with a memory of its own."""
    log_std = "network" if spec.state_std else "parameter"
    policy = RecurrentPolicy(size, distribution, log_std=log_std, log_std_init=log_std_init, **net)
    return policy, RecurrentValue(size, **net) if "value" in recipe.needs.signals else None
