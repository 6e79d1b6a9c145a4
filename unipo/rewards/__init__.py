"""Rewards: plain callables `f(prompts, completions, **columns) -> list[float | None]`, sync or async."""

from unipo.rewards.calling import RewardError, RewardFunction, RewardSet, RewardWarning
from unipo.rewards.mathematics import math
from unipo.rewards.verifiers import REWARDS, exact_match, length, resolve_reward

__all__ = [
    "REWARDS",
    "RewardError",
    "RewardFunction",
    "RewardSet",
    "RewardWarning",
    "exact_match",
    "length",
    "math",
    "resolve_reward",
]
