"""Signals -> coefficients -> gradient: the one learner of every method, and the ledger of who moved the policy."""

from unipo.learner.annotate import annotate
from unipo.learner.coefficients import Coefficients, coefficients
from unipo.learner.learner import Learner, LearnerSettings, Update
from unipo.learner.ledger import ledger, summary
from unipo.learner.player import Player

__all__ = [
    "Coefficients",
    "Learner",
    "LearnerSettings",
    "Player",
    "Update",
    "annotate",
    "coefficients",
    "ledger",
    "summary",
]
