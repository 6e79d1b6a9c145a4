"""Policies and critics: anything that emits differentiable per-step signals."""

from unipo.policies.control import ControlPolicy, load_control_policy
from unipo.policies.loading import ModelError, load_policy
from unipo.policies.networks import Normaliser
from unipo.policies.recurrent import RecurrentPolicy, load_recurrent_policy
from unipo.policies.token import TokenPolicy, ValueHead

__all__ = [
    "ControlPolicy",
    "ModelError",
    "Normaliser",
    "RecurrentPolicy",
    "TokenPolicy",
    "ValueHead",
    "load_control_policy",
    "load_policy",
    "load_recurrent_policy",
]
