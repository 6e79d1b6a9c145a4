"""Networks with memory: a GRU over the steps of each fragment; a policy is that with a `ControlPolicy` as its head."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from unipo.episodes import Episodes
from unipo.policies.control import ControlPolicy, distribution_of
from unipo.policies.distributions import Distribution
from unipo.policies.networks import MLP, Normaliser


def over_fragments(gru: nn.GRU, x: Tensor, lengths: Tensor, start: Tensor) -> Tensor:
    """Outputs [N, H] of `gru` over fragments of `lengths` [E], from inputs `x` [N, I] and first memories `start` [E, H].

    No padding: steps are laid out position by position, longer fragments first, as `PackedSequence` has them.
    """
    if not len(x):
        return x.new_zeros(0, start.shape[1])
    order = lengths.argsort(descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    owner = torch.repeat_interleave(lengths)
    position = torch.arange(len(x), device=x.device) - (lengths.cumsum(0) - lengths)[owner]
    laid_out = (position * len(lengths) + rank[owner]).argsort()
    alive = torch.bincount(position)
    packed, _ = gru(PackedSequence(x[laid_out], alive.cpu()), start[order[: int(alive[0])]][None])
    return torch.empty_like(packed.data).index_copy(0, laid_out, packed.data)


class Memory(nn.Module):
    """h_t = GRU(h_t-1, encoder(normalised s_t)): what a network keeps of a fragment, from one step to the next.

    `hidden`: the encoder's layers, the last being the width H of the memory.
    """

    def __init__(
        self, observation_size: int, hidden: Sequence[int], activation: str, normaliser: Normaliser | None
    ) -> None:
        super().__init__()
        self.normaliser, self.width = normaliser, hidden[-1]
        self.encoder = MLP(observation_size, hidden, 1, activation).trunk
        self.gru = nn.GRU(self.width, self.width)
        for name, parameter in self.gru.named_parameters():
            nn.init.orthogonal_(parameter) if "weight" in name else nn.init.zeros_(parameter)

    def encoded(self, observation: Tensor) -> Tensor:
        """[N, H]: what the GRU reads of each of `observation` [N, d]."""
        return self.encoder(observation if self.normaliser is None else self.normaliser(observation))

    def after(self, observation: Tensor, memory: Tensor) -> Tensor:
        """The memory [n, H] after seeing `observation` [n, d], from that before it."""
        return self.gru(self.encoded(observation)[None], memory[None])[1][0]

    def over(self, observation: Tensor, lengths: Tensor, start: Tensor) -> Tensor:
        """Memories [N, H] after each of `observation` [N, d], of fragments of `lengths` [E], the first after `start` [E, H]."""
        return over_fragments(self.gru, self.encoded(observation), lengths, start)


class RecurrentPolicy(nn.Module):
    """pi(a_t | s_1 ... s_t) = head(h_t), h_t its `Memory`; signals are those of `ControlPolicy`.

    A fragment starts from the episode column `memory` [E, H], the memory before its first step, or from zeros where there
    is no such column: store it where fragments continue an episode, or they are scored as if it had just begun.
    """

    emits = ControlPolicy.emits
    column = "memory"

    def __init__(
        self,
        observation_size: int,
        distribution: Distribution,
        hidden: Sequence[int] = (64, 64),
        activation: str = "tanh",
        log_std: str = "parameter",
        log_std_init: float = 0.0,
        normaliser: Normaliser | None = None,
    ) -> None:
        super().__init__()
        self.observation_size, self.distribution = observation_size, distribution
        self.memory = Memory(observation_size, hidden, activation, normaliser)
        self.head = ControlPolicy(self.memory.width, distribution, (), activation, log_std, log_std_init)
        self.config = {"observation_size": observation_size, "hidden": list(hidden), "activation": activation,
                       "log_std": log_std, "log_std_init": log_std_init}  # fmt: skip

    @property
    def normaliser(self) -> Normaliser | None:
        return self.memory.normaliser

    def start(self, n: int) -> Tensor:
        """The memory [n, H] of `n` episodes that begin."""
        return torch.zeros(n, self.memory.width)

    @torch.no_grad()
    def act(
        self, observation: Tensor, noise: Tensor, memory: Tensor, deterministic: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(actions, log-prob [n], the memory [n, H] after this step), from the `memory` [n, H] before it."""
        after = self.memory.after(observation, memory)
        return *self.head.act(after, noise, deterministic), after

    def signals(self, episodes: Episodes, names: Sequence[str]) -> dict[str, Tensor]:
        """The signals `names` of `ControlPolicy`, differentiable through time within each fragment."""
        lengths, observation = episodes.lengths(), episodes["observation"]
        start = episodes[self.column] if self.column in episodes else self.start(len(lengths)).to(observation)
        remembered = self.memory.over(observation, lengths, start)
        return self.head.signals(episodes.with_columns("step", observation=remembered), names)

    def total_lengths(self, episodes: Episodes) -> Tensor:
        """[E] steps of each fragment: what its signals cost."""
        return episodes.lengths()

    def save(self, folder: str | Path) -> None:
        """Write `config.json` and `model.safetensors` into `folder`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        clip = None if self.normaliser is None else self.normaliser.clip
        described = {**self.config, "distribution": self.head.described()["distribution"], "normaliser_clip": clip}
        (folder / "config.json").write_text(json.dumps({"recurrent": described}, indent=2) + "\n")
        save_file({k: v.contiguous() for k, v in self.state_dict().items()}, folder / "model.safetensors")


def load_recurrent_policy(folder: str | Path) -> RecurrentPolicy:
    """The policy that `RecurrentPolicy.save` wrote into `folder`; ValueError where there is none."""
    folder = Path(folder)
    path = folder / "config.json"
    config = json.loads(path.read_text()).get("recurrent") if path.is_file() else None
    if config is None:
        raise ValueError(f"{folder} holds no recurrent policy: expected what RecurrentPolicy.save writes")
    distribution, clip = distribution_of(config.pop("distribution"), path), config.pop("normaliser_clip")
    normaliser = None if clip is None else Normaliser(config["observation_size"], clip)
    policy = RecurrentPolicy(**config, distribution=distribution, normaliser=normaliser)
    policy.load_state_dict(load_file(folder / "model.safetensors"))
    return policy
