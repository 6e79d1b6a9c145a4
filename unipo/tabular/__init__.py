"""Algorithms on decision processes small enough to enumerate: what theory claims, checked by numbers."""

from unipo.tabular.mdp import KL as KL
from unipo.tabular.mdp import EpisodicMDP as EpisodicMDP
from unipo.tabular.mdp import FiniteMDP as FiniteMDP
from unipo.tabular.mdp import Free as Free
from unipo.tabular.mdp import Regulariser as Regulariser
from unipo.tabular.mdp import Trajectories as Trajectories
from unipo.tabular.mdp import Values as Values
from unipo.tabular.mdp import deep_sea as deep_sea
from unipo.tabular.mdp import random_episodic_mdp as random_episodic_mdp
from unipo.tabular.mdp import random_mdp as random_mdp
