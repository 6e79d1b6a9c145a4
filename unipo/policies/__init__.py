"""Policies and critics: anything that emits differentiable per-step signals."""

from unipo.policies.loading import ModelError, load_policy
from unipo.policies.token import TokenPolicy, ValueHead

__all__ = ["ModelError", "TokenPolicy", "ValueHead", "load_policy"]
