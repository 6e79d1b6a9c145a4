"""Rewards: plain callables `f(prompts, completions, **columns) -> list[float | None]`, sync or async."""

from unipo.rewards.calling import RewardError, RewardFunction, RewardSet, RewardWarning
from unipo.rewards.graded import Formatted, ForTask, Near, Overlap, Prefix, Within, WordByWord
from unipo.rewards.mathematics import math
from unipo.rewards.models import DensityRatio, ModelRater, ModelReward, judges_of, learned
from unipo.rewards.verifiers import REWARDS, exact_match, length, resolve_reward, split_rewards

__all__ = [
    "REWARDS",
    "DensityRatio",
    "ForTask",
    "Formatted",
    "ModelRater",
    "ModelReward",
    "Near",
    "Overlap",
    "Prefix",
    "RewardError",
    "RewardFunction",
    "RewardSet",
    "RewardWarning",
    "Within",
    "WordByWord",
    "exact_match",
    "judges_of",
    "learned",
    "length",
    "math",
    "resolve_reward",
    "split_rewards",
]
