"""Critics: V and Q in their forms, and the players that join a critic with a policy."""

from unipo.critics.action_value import DiscreteQ, GaussianQ, QEnsemble, QuantileQ
from unipo.critics.backups import (
    ComponentBackup,
    DeterministicBackup,
    ExpectedBackup,
    GaussianBackup,
    GreedyBackup,
    QuantileBackup,
    SmoothedBackup,
    SoftBackup,
)
from unipo.critics.pathwise import Pathwise
from unipo.critics.recurrent import RecurrentValue
from unipo.critics.targets import Target, polyak
from unipo.critics.value import ValueCritic

__all__ = [
    "ComponentBackup",
    "DeterministicBackup",
    "DiscreteQ",
    "ExpectedBackup",
    "GaussianBackup",
    "GaussianQ",
    "GreedyBackup",
    "Pathwise",
    "QEnsemble",
    "QuantileBackup",
    "QuantileQ",
    "RecurrentValue",
    "SmoothedBackup",
    "SoftBackup",
    "Target",
    "ValueCritic",
    "polyak",
]
