"""Q(s, a): ensembles of action values, and distributional critics.

Every critic has
`q(observation [N, d], action, frozen=False, members=None)` -> [N, n] for its n members; frozen: with detached weights, so that
the gradient flows to the action only; members: of the first so many alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from unipo.episodes import Episodes
from unipo.policies.networks import Normaliser, StackedMLP


def refuse_unknown(names: Sequence[str], emits: frozenset[str]) -> None:
    """KeyError where `names` holds what is not emitted."""
    unknown = set(names) - emits
    if unknown:
        raise KeyError(f"no signal {sorted(unknown)}: this player emits {', '.join(sorted(emits))}")


class _Ensemble(nn.Module):
    """Members that read a normalised observation and an action: the body that critics of continuous actions share."""

    def __init__(self, normaliser: Normaliser | None, network: StackedMLP) -> None:
        super().__init__()
        self.normaliser, self.network = normaliser, network

    def forward(self, observation: Tensor, action: Tensor | None = None, frozen: bool = False,
                members: int | None = None) -> Tensor:  # fmt: skip
        """[N, n, outputs] of `observation` [N, d] and `action` [N, A]."""
        x = observation if self.normaliser is None else self.normaliser(observation)
        return self.network(x if action is None else torch.cat([x, action], -1), frozen, members)

    def total_lengths(self, episodes: Episodes) -> Tensor:
        """[E] steps of each fragment: what its signals cost."""
        return episodes.lengths()


class QEnsemble(_Ensemble):
    """Q_j(s, a), j < n = `critics`, of continuous actions. Signal `q` [N, n] at the data's actions."""

    emits = frozenset({"q"})

    def __init__(
        self,
        observation_size: int,
        action_size: int,
        critics: int = 2,
        hidden: Sequence[int] = (256, 256),
        activation: str = "relu",
        layer_norm: bool = False,
        normaliser: Normaliser | None = None,
    ) -> None:
        network = StackedMLP(critics, observation_size + action_size, hidden, 1, activation, layer_norm)
        super().__init__(normaliser, network)

    def q(self, observation: Tensor, action: Tensor, frozen: bool = False, members: int | None = None) -> Tensor:
        """Q [N, n]."""
        return self(observation, action, frozen, members).squeeze(-1)

    def signals(self, episodes: Episodes, names: Sequence[str]) -> dict[str, Tensor]:
        """`q` [N, n]; KeyError names any other."""
        refuse_unknown(names, self.emits)
        return {"q": self.q(episodes["observation"], episodes["action"])}


class DiscreteQ(_Ensemble):
    """Q_j(s, .) of all `actions` at once. Signal `q` [N, n] at the data's actions (int64 [N]).

    `dueling`: Q = V + A - mean_a A (arXiv:1511.06581), V and A being the last layer's outputs.
    `config`: the arguments that it was made of, in plain types, without the normaliser.
    """

    emits = frozenset({"q"})

    def __init__(
        self,
        observation_size: int,
        actions: int,
        critics: int = 1,
        hidden: Sequence[int] = (120, 84),
        activation: str = "relu",
        layer_norm: bool = False,
        dueling: bool = False,
        normaliser: Normaliser | None = None,
    ) -> None:
        network = StackedMLP(critics, observation_size, hidden, actions + int(dueling), activation, layer_norm)
        super().__init__(normaliser, network)
        self.dueling = dueling
        self.config = {"observation_size": observation_size, "actions": actions, "critics": critics,
                       "hidden": list(hidden), "activation": activation, "layer_norm": layer_norm,
                       "dueling": dueling}  # fmt: skip

    def values(self, observation: Tensor, frozen: bool = False, members: int | None = None) -> Tensor:
        """Q [N, n, A] of `observation` [N, d]."""
        out = self(observation, frozen=frozen, members=members)
        if not self.dueling:
            return out
        value, advantage = out[..., :1], out[..., 1:]
        return value + advantage - advantage.mean(-1, keepdim=True)

    def q(self, observation: Tensor, action: Tensor, frozen: bool = False, members: int | None = None) -> Tensor:
        """Q [N, n] at `action` [N] int64."""
        return at_action(self.values(observation, frozen, members), action)

    def signals(self, episodes: Episodes, names: Sequence[str]) -> dict[str, Tensor]:
        """`q` [N, n]; KeyError names any other."""
        refuse_unknown(names, self.emits)
        return {"q": self.q(episodes["observation"], episodes["action"])}


def at_action(values: Tensor, action: Tensor) -> Tensor:
    """[N, n]: `values` [N, n, A] at `action` [N] int64."""
    return values.gather(-1, action[:, None, None].expand(-1, values.shape[1], 1)).squeeze(-1)


class GaussianQ(_Ensemble):
    """Returns Z_j(s, a) ~ N(q_j, q_std_j^2), q_std = softplus (DSAC-T, arXiv:2310.05858). Signals `q`, `q_std` [N, n]."""

    emits = frozenset({"q", "q_std"})

    def __init__(
        self,
        observation_size: int,
        action_size: int,
        critics: int = 2,
        hidden: Sequence[int] = (256, 256, 256),
        activation: str = "gelu",
        layer_norm: bool = False,
        normaliser: Normaliser | None = None,
    ) -> None:
        network = StackedMLP(critics, observation_size + action_size, hidden, 2, activation, layer_norm)
        super().__init__(normaliser, network)

    def moments(self, observation: Tensor, action: Tensor, frozen: bool = False,
                members: int | None = None) -> tuple[Tensor, Tensor]:  # fmt: skip
        """(q, q_std), each [N, n]."""
        q, spread = self(observation, action, frozen, members).unbind(-1)
        return q, softplus(spread)

    def q(self, observation: Tensor, action: Tensor, frozen: bool = False, members: int | None = None) -> Tensor:
        """The means [N, n]."""
        return self.moments(observation, action, frozen, members)[0]

    def signals(self, episodes: Episodes, names: Sequence[str]) -> dict[str, Tensor]:
        """`q`, `q_std`, each [N, n]; KeyError names any other."""
        refuse_unknown(names, self.emits)
        q, q_std = self.moments(episodes["observation"], episodes["action"])
        made = {"q": q, "q_std": q_std}
        return {name: made[name] for name in names}


class QuantileQ(_Ensemble):
    """K = `quantiles` of the return at levels (k + 1/2) / K, for each of n members (QR-DQN, TQC arXiv:2005.04269).

    Signals: `quantiles` [N, n, K], in no enforced order; `q` [N, n], their mean.
    """

    emits = frozenset({"quantiles", "q"})

    def __init__(
        self,
        observation_size: int,
        action_size: int,
        quantiles: int = 25,
        critics: int = 2,
        hidden: Sequence[int] = (256, 256),
        activation: str = "relu",
        layer_norm: bool = False,
        normaliser: Normaliser | None = None,
    ) -> None:
        network = StackedMLP(critics, observation_size + action_size, hidden, quantiles, activation, layer_norm)
        super().__init__(normaliser, network)
        self.levels = (torch.arange(quantiles) + 0.5) / quantiles

    def quantiles(self, observation: Tensor, action: Tensor, frozen: bool = False) -> Tensor:
        """[N, n, K]."""
        return self(observation, action, frozen)

    def q(self, observation: Tensor, action: Tensor, frozen: bool = False, members: int | None = None) -> Tensor:
        """The means of the quantiles [N, n]."""
        return self(observation, action, frozen, members).mean(-1)

    def signals(self, episodes: Episodes, names: Sequence[str]) -> dict[str, Tensor]:
        """`quantiles`, `q`; KeyError names any other."""
        refuse_unknown(names, self.emits)
        quantiles = self.quantiles(episodes["observation"], episodes["action"])
        return {name: quantiles if name == "quantiles" else quantiles.mean(-1) for name in names}
