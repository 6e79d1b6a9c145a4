"""Rewards: plain callables `f(prompts, completions, **columns) -> list[float | None]`, sync or async."""

from unipo.rewards.calling import RewardError, RewardFunction, RewardSet
from unipo.rewards.verifiers import exact_match, math, resolve_reward

__all__ = ["RewardError", "RewardFunction", "RewardSet", "exact_match", "math", "resolve_reward"]
