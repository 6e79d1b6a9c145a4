"""Critics: V and Q in their forms, and the players that join a critic with a policy."""

from unipo.critics.action_value import QEnsemble, polyak
from unipo.critics.backups import SoftBackup
from unipo.critics.pathwise import Pathwise
from unipo.critics.value import ValueCritic

__all__ = ["Pathwise", "QEnsemble", "SoftBackup", "ValueCritic", "polyak"]
