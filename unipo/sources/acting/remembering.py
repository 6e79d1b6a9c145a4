"""Acting with memory: one for each copy of the environment, forgotten where an episode ended."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from numpy.typing import NDArray
from torch import Tensor

from unipo.episodes import Episodes
from unipo.policies.recurrent import RecurrentPolicy
from unipo.sources.acting.collector import Act
from unipo.sources.acting.environments import Environments


class Remembers(Protocol):
    """A network that does not act and has a memory all the same, such as a recurrent critic."""

    column: str

    def start(self, n: int) -> Tensor: ...

    def remember(self, observation: Tensor, memory: Tensor) -> Tensor: ...


class Remembering:
    """Acts (it is an `Act`) in `environments` with `policy`, and lets `critics` remember what it sees.

    A memory is that of the episode that runs: it starts anew where the environment's episode number is another than
    when it last acted. It is not made anew where networks are trained in the middle of an episode: what was seen then has
    been remembered with the weights of that time, here as in the columns that `marked` adds.
    """

    def __init__(self, policy: RecurrentPolicy, environments: Environments, critics: Sequence[Remembers] = (),
                 deterministic: bool = False) -> None:  # fmt: skip
        self.policy, self.environments, self.critics = policy, environments, tuple(critics)
        self.deterministic = deterministic
        self._memory = {policy.column: policy.start(environments.num)}
        self._memory |= {critic.column: critic.start(environments.num) for critic in self.critics}
        self._episode: NDArray[Any] = environments.episode_number

    def __call__(self, observation: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        before = self.before()
        action, logp, after = self.policy.act(observation, noise, before[self.policy.column], self.deterministic)
        others = {c.column: c.remember(observation, before[c.column]) for c in self.critics}
        self._memory = {self.policy.column: after, **others}
        return action, logp

    def before(self) -> Mapping[str, Tensor]:
        """By column: the memories [n, H] before the next step."""
        if self._episode is not self.environments.episode_number:
            ended = torch.from_numpy(self._episode != self.environments.episode_number)[:, None]
            self._episode = self.environments.episode_number
            self._memory = {name: memory.masked_fill(ended, 0.0) for name, memory in self._memory.items()}
        return self._memory

    @staticmethod
    def marked(fragments: Episodes, begun: Mapping[str, Tensor]) -> Episodes:
        """Collected `fragments` with the memory that each began with [E, H]; `begun`: what `before` was when it began.

        The first fragment of each environment goes on from there, the others are new episodes.
        """
        env = fragments["env"]
        first = torch.ones_like(env, dtype=torch.bool)
        first[1:] = env[1:] != env[:-1]
        columns = {name: memory[env].masked_fill(~first[:, None], 0.0) for name, memory in begun.items()}
        return fragments.with_columns("episode", **columns)

    def state_dict(self) -> dict[str, Any]:
        """For JSON, which gives the same float32 back."""
        return {name: memory.tolist() for name, memory in self.before().items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken; the environments have gone back there already."""
        self._episode = self.environments.episode_number
        self._memory = {name: torch.tensor(memory, dtype=torch.float32) for name, memory in state.items()}


@dataclass(frozen=True)
class Mode:
    """How a policy with memory acts when it is evaluated, wherever that is."""

    policy: RecurrentPolicy

    def within(self, environments: Environments) -> Remembering:
        """The policy's mode in these environments, whose episodes begin now."""
        return Remembering(self.policy, environments, deterministic=True)


def mode(policy: Any) -> Act | Mode:
    """How any policy acts when it is evaluated: with its mode, whatever the noise."""
    if isinstance(policy, RecurrentPolicy):
        return Mode(policy)

    def act(observation: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        found: tuple[Tensor, Tensor] = policy.act(observation, noise, deterministic=True)
        return found

    return act


def act_in(environments: Environments, act: Act | Mode) -> Act:
    """`act` as it is in these environments, whose episodes begin now."""
    return act.within(environments) if isinstance(act, Mode) else act
