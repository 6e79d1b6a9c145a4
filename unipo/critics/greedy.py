"""A policy that is a critic's greedy action (DQN)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from unipo.critics.action_value import DiscreteQ
from unipo.episodes import Episodes
from unipo.policies.networks import Normaliser


class GreedyPolicy(nn.Module):
    """argmax_a min_j Q_j(s, a), or with probability `epsilon` an action drawn uniformly; no signals, nothing trained here."""

    emits: frozenset[str] = frozenset()
    noise = 2

    def __init__(self, critic: DiscreteQ, actions: int) -> None:
        super().__init__()
        self.critic, self.actions, self.epsilon = critic, actions, 0.0

    @property
    def observation_size(self) -> int:
        size = self.critic.config["observation_size"]
        assert isinstance(size, int)
        return size

    @torch.no_grad()
    def act(self, observation: Tensor, noise: Tensor, deterministic: bool = False) -> tuple[Tensor, Tensor]:
        """Actions [n] int64 and their log-prob [n] (NaN where `deterministic`); `noise` [n, 2]: whether, and which."""
        greedy = self.critic.values(observation).amin(1).argmax(-1)
        if deterministic:
            return greedy, observation.new_full(greedy.shape, float("nan"))
        uniform = torch.special.ndtr(noise)
        drawn = (uniform[:, 1] * self.actions).long().clamp(max=self.actions - 1)
        action = torch.where(uniform[:, 0] < self.epsilon, drawn, greedy)
        chance = self.epsilon / self.actions + (1 - self.epsilon) * (action == greedy)
        return action, chance.log()

    def signals(self, episodes: Episodes, names: Sequence[str]) -> dict[str, Tensor]:
        """None."""
        return {}

    def total_lengths(self, episodes: Episodes) -> Tensor:
        return episodes.lengths()

    def named_parameters(self, *args: object, **kwargs: object) -> Iterator[tuple[str, nn.Parameter]]:
        """Nothing: the critic is a player itself."""
        return iter(())

    def save(self, folder: str | Path) -> None:
        """Write `config.json` and `model.safetensors` of the critic into `folder`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        clip = None if self.critic.normaliser is None else self.critic.normaliser.clip
        described = {"greedy": self.critic.config, "normaliser_clip": clip}
        (folder / "config.json").write_text(json.dumps(described, indent=2) + "\n")
        save_file({k: v.contiguous() for k, v in self.critic.state_dict().items()}, folder / "model.safetensors")


def load_greedy_policy(folder: str | Path) -> GreedyPolicy:
    """The policy that `GreedyPolicy.save` wrote into `folder`; ValueError where there is none."""
    folder = Path(folder)
    path = folder / "config.json"
    described: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    if "greedy" not in described:
        raise ValueError(f"{folder} holds no greedy policy: expected what GreedyPolicy.save writes")
    config, clip = described["greedy"], described["normaliser_clip"]
    normaliser = None if clip is None else Normaliser(config["observation_size"], clip)
    critic = DiscreteQ(**config, normaliser=normaliser)
    critic.load_state_dict(load_file(folder / "model.safetensors"))
    return GreedyPolicy(critic, config["actions"])
