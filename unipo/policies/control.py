"""Policies over observation vectors: a network gives the raw parameters of an action distribution."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from unipo.episodes import Episodes
from unipo.policies.distributions import ABSENT, KINDS, Distribution
from unipo.policies.networks import MLP, Normaliser

ANCHORS = ("old", "reference")
"""Columns `<anchor>_parameters` [N, P] that KL signals may be measured against."""


def next_index(episodes: Episodes) -> Tensor:
    """[N] int64: where each step's next state is in cat([observation, final_observation]): the following step of its
    fragment, or, at the fragment's end, N + its fragment."""
    if episodes.is_flat:
        return len(episodes) + episodes.index("episode")
    lengths = episodes.lengths()
    index = torch.arange(1, episodes.count("step") + 1, device=episodes.device)
    held = lengths > 0
    index[lengths.cumsum(0)[held] - 1] = len(index) + held.nonzero().squeeze(1)
    return index


def next_observation(episodes: Episodes) -> Tensor:
    """[N, d]: the observation after each step, `final_observation` at the end of a fragment."""
    observation, final = episodes["observation"], episodes["final_observation"]
    if episodes.is_flat:
        return final
    return torch.cat([observation, final])[next_index(episodes)]


class ControlPolicy(nn.Module):
    """pi(a | s) = distribution(raw(s)), raw = MLP(normalised observation).

    `log_std` "parameter": the log-std is one trained vector, the same in all states (PPO); "network": the MLP gives it too
    (SAC). Distributions without a log-std are not concerned. `masked`, of categorical ones: the last numbers of an observation,
    one for each choice, are 0 where it cannot be made. `log_std_init`: its start. `orthogonal`: PPO's initial values
    with output gain 0.01; otherwise torch's.

    Signals, each [N] but `parameters` [N, P]: `logp` of the data's action, `entropy`, `parameters` (raw), and, from a column
    `old_parameters` (or `reference_parameters`) [N, P], `reverse_kl:old` = KL(pi || old), `forward_kl:old` = KL(old || pi).
    """

    emits = frozenset(
        {"logp", "entropy", "parameters"} | {f"{k}_kl:{a}" for k in ("reverse", "forward") for a in ANCHORS}
    )

    def __init__(
        self,
        observation_size: int,
        distribution: Distribution,
        hidden: Sequence[int] = (64, 64),
        activation: str = "tanh",
        log_std: str = "parameter",
        log_std_init: float = 0.0,
        normaliser: Normaliser | None = None,
        orthogonal: bool = True,
        masked: bool = False,
    ) -> None:
        super().__init__()
        if log_std not in ("parameter", "network"):
            raise ValueError(
                f"log_std is {log_std!r}: expected 'parameter' (one vector) or 'network' (state-dependent)"
            )
        self.observation_size, self.distribution, self.normaliser = observation_size, distribution, normaliser
        self.config = {"observation_size": observation_size, "hidden": list(hidden), "activation": activation,
                       "log_std": log_std, "log_std_init": log_std_init, "orthogonal": orthogonal,
                       "masked": masked}  # fmt: skip
        free = distribution.free if log_std == "parameter" else 0
        outputs = distribution.parameters - free
        initial = distribution.initial(log_std_init)
        gain = 0.01 if orthogonal else 1.0
        self.network = MLP(observation_size, hidden, outputs, activation, gain, orthogonal)
        with torch.no_grad():
            self.network.head.bias.add_(initial[:outputs])
        self.log_std = nn.Parameter(initial[outputs:].clone()) if free else None

    def raw(self, observation: Tensor) -> Tensor:
        """Raw parameters [N, P] of the distribution in each of `observation` [N, d]."""
        x = observation if self.normaliser is None else self.normaliser(observation)
        out = self.network(x)
        if self.config["masked"]:
            return out.masked_fill(observation[..., -out.shape[-1] :] == 0, ABSENT)
        if self.log_std is None:
            return out
        return torch.cat([out, self.log_std.expand(*out.shape[:-1], -1)], -1)

    @torch.no_grad()
    def act(self, observation: Tensor, noise: Tensor, deterministic: bool = False) -> tuple[Tensor, Tensor]:
        """Actions and their log-prob [N] (NaN where none is known), from `observation` [N, d] and `noise` [N, noise].

        `deterministic`: the mode, whatever the noise; its log-prob is NaN: nothing was sampled.
        """
        raw = self.raw(observation)
        if deterministic:
            return self.distribution.mode(raw), raw.new_full(raw.shape[:1], float("nan"))
        return self.distribution.sample_with_logp(raw, noise)

    def signals(self, episodes: Episodes, names: Sequence[str]) -> dict[str, Tensor]:
        """The signals `names`, differentiable; the KL's other side is constant. KeyError names what is not there."""
        unknown = set(names) - self.emits
        if unknown:
            raise KeyError(f"no signal {sorted(unknown)}: this policy emits {', '.join(sorted(self.emits))}")
        raw = self.raw(episodes["observation"])
        return {name: self._signal(name, raw, episodes) for name in names}

    def _signal(self, name: str, raw: Tensor, episodes: Episodes) -> Tensor:
        kind, _, anchor = name.partition(":")
        made: dict[str, Callable[[], Tensor]] = {
            "logp": lambda: self.distribution.logp(raw, episodes["action"]),
            "entropy": lambda: self.distribution.entropy(raw),
            "parameters": lambda: raw,
            "reverse_kl": lambda: self.distribution.kl(raw, episodes[f"{anchor}_parameters"].detach()),
            "forward_kl": lambda: self.distribution.kl(episodes[f"{anchor}_parameters"].detach(), raw),
        }
        return made[kind]()

    def total_lengths(self, episodes: Episodes) -> Tensor:
        """[E] steps of each fragment: what its signals cost."""
        return episodes.lengths()

    def described(self) -> dict[str, Any]:
        """What `load_control_policy` needs beside the weights, in plain types."""
        fields: Any = self.distribution
        distribution = {"name": type(self.distribution).__name__, **dataclasses.asdict(fields)}
        clip = None if self.normaliser is None else self.normaliser.clip
        return {**self.config, "distribution": distribution, "normaliser_clip": clip}

    def save(self, folder: str | Path) -> None:
        """Write `config.json` and `model.safetensors` (weights and normaliser statistics) into `folder`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.described(), indent=2) + "\n")
        save_file({k: v.contiguous() for k, v in self.state_dict().items()}, folder / "model.safetensors")


def distribution_of(described: dict[str, Any], where: Path) -> Distribution:
    """The distribution of a saved `described` (its name and fields); ValueError names those that exist."""
    fields = {k: tuple(v) if isinstance(v, list) else v for k, v in described.items() if k != "name"}
    if described.get("name") not in KINDS:
        raise ValueError(
            f"{where} names the distribution {described.get('name')!r}: expected one of {', '.join(KINDS)}"
        )
    return KINDS[described["name"]](**fields)


def load_control_policy(folder: str | Path) -> ControlPolicy:
    """The policy that `ControlPolicy.save` wrote into `folder`; ValueError where there is none."""
    folder = Path(folder)
    path = folder / "config.json"
    config = json.loads(path.read_text()) if path.is_file() and (folder / "model.safetensors").is_file() else {}
    if "distribution" not in config:
        raise ValueError(f"{folder} holds no control policy: expected config.json and model.safetensors in it")
    distribution, clip = distribution_of(config.pop("distribution"), path), config.pop("normaliser_clip")
    normaliser = None if clip is None else Normaliser(config["observation_size"], clip)
    policy = ControlPolicy(**config, distribution=distribution, normaliser=normaliser)
    policy.load_state_dict(load_file(folder / "model.safetensors"))
    return policy
