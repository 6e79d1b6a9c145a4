"""The learner: any objective, any micro-batch split, the same gradient.

By the chain rule dL/dtheta = sum_n (dL/dx_n) * dx_n/dtheta with x_n the signals of step n. So:

  1. compute the signals micro-batch by micro-batch without a graph;
  2. evaluate the objective once on the whole batch: one coefficient dL/dx_n per step;
  3. run each micro-batch again with a graph and back-propagate sum(coefficient * signal).

Pass 1 is skipped where it is not needed: with one micro-batch (the graph is kept), for objectives whose coefficients do not
depend on current signals (`Objective.linear`), and where those of a micro-batch depend on its own signals alone (`separable`:
most do, since groups stay whole), which are then known when its graph is there. Pass 3 skips episodes whose coefficients are
all zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from unipo.critics import Target
from unipo.episodes import Episodes
from unipo.learner.annotate import emitted
from unipo.learner.coefficients import Coefficients, agree, coefficients, separable
from unipo.learner.compiled import CompiledUpdates
from unipo.learner.noise import parted
from unipo.learner.player import Player
from unipo.learner.update import Update
from unipo.objectives import Objective, with_settings

SCHEDULES = ("constant", "linear", "cosine")


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnerSettings:
    """How gradients are computed and applied.

    `token_budget`: tokens computed per micro-batch (a shared prompt once); any value gives the same gradient.
    `schedule`: of the learning rate after `warmup` updates, over `total_updates`: constant, linear or cosine to 0.
    `clip_norm`: largest gradient norm (inf: no clipping). `value_learning_rate`: of value heads and critics.
    `autocast`: mixed precision, off or bfloat16. The optimiser's step is one fused kernel.
    `compiled`: updates of single steps are one graph (`unipo.learner.compiled`).
    """

    learning_rate: float = 1e-3
    value_learning_rate: float = 3e-3
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    clip_norm: float = 1.0
    warmup: int = 0
    schedule: str = "constant"
    total_updates: int = 0
    token_budget: int = 8192
    autocast: str = "off"
    compiled: bool = False

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule is {self.schedule!r}: expected one of {', '.join(SCHEDULES)}")
        if self.token_budget < 1 or self.learning_rate < 0 or self.clip_norm <= 0:
            raise ValueError("token_budget and clip_norm must be positive, learning_rate not negative")

    def rate(self, update: int) -> float:
        """Multiplier of the learning rate at an update (0-based)."""
        if update < self.warmup:
            return (update + 1) / self.warmup
        if self.schedule == "constant" or not self.total_updates:
            return 1.0
        done = min(1.0, (update - self.warmup) / max(1, self.total_updates - self.warmup))
        return 1.0 - done if self.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))


@dataclass
class Learner:
    """Trains `players` by one optimiser; `monitor` names signals that are computed only to be reported.

    `prepare`: computes the columns of a batch that depend on the networks as they are, at the beginning of every update; None
    where batches come with them. `targets`: slow copies that move at the end of every update. `rate_scale`: multiplies the
    learning rate, whatever the schedule says. `gradient_parts`: the gradient is computed in so many parts of the groups, to
    measure how noisy it is (0: it is not).
    """

    players: Mapping[str, Player]
    settings: LearnerSettings = field(default_factory=LearnerSettings)
    monitor: tuple[str, ...] = ()
    prepare: Callable[[Episodes], Episodes] | None = None
    targets: tuple[Target, ...] = ()
    updates: int = 0
    rate_scale: float = 1.0
    gradient_parts: int = 0

    def __post_init__(self) -> None:
        s = self.settings
        self.optimizer = torch.optim.AdamW(self._groups(), lr=s.learning_rate, betas=s.betas, eps=s.eps, fused=True)
        self.base_rates = [group["lr"] for group in self.optimizer.param_groups]
        self.compiled = CompiledUpdates(self) if s.compiled else None

    def _groups(self) -> list[dict[str, Any]]:
        """Weight decay for matrices only; a learning rate of their own for value heads and for players without policy."""
        groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
        for player in self.players.values():
            critic = "logp" not in player.emits
            for name, parameter in player.named_parameters():
                if parameter.requires_grad:
                    key = (critic or "value" in name.split(".")[0], parameter.ndim > 1)
                    groups.setdefault(key, []).append(parameter)
        s = self.settings
        return [
            {"params": parameters, "lr": s.value_learning_rate if value else s.learning_rate,
             "weight_decay": s.weight_decay if matrix else 0.0}
            for (value, matrix), parameters in sorted(groups.items(), key=lambda item: item[0])
        ]  # fmt: skip

    def parameters(self) -> list[nn.Parameter]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    # ---- the gradient ------------------------------------------------------------------------------------------------
    def gradient(self, episodes: Episodes, objective: Objective) -> Update:
        """Add dL/dtheta to `.grad` of the parameters; returns what it was made of."""
        episodes, names = self._prepared(episodes), self._names(objective)
        if self.gradient_parts:
            return self._in_parts(episodes, objective, names)
        split = episodes.split(self.settings.token_budget, self._cost(episodes))
        if len(split) <= 1:
            return self._one_graph(episodes, objective, names)
        if objective.linear:
            found = coefficients(objective, episodes, self._blank(episodes, names))
            return self._second_pass(episodes, objective, found, names, {}, 1)
        scalar = all(getattr(player, "scalar_signals", False) for player, _ in self._owned(names))
        if scalar and separable(objective, episodes, self._guess(episodes, names), split):
            return self._part_by_part(episodes, objective, names, split)
        signals = self._emitted(episodes, names)
        found = coefficients(objective, episodes, signals)
        return self._second_pass(episodes, objective, found, sorted(objective.needs.signals), signals, 2)

    def _in_parts(self, episodes: Episodes, objective: Objective, names: list[str]) -> Update:
        """The same gradient, summed over parts that are back-propagated one at a time, and its variance."""
        signals = self._emitted(episodes, names)
        found, own = coefficients(objective, episodes, signals), sorted(objective.needs.signals)

        def share(groups: Tensor) -> Callable[[], Update]:
            inside = torch.isin(episodes.index("group"), groups)
            only = {k: torch.where(inside.reshape(-1, *[1] * (c.ndim - 1)), c, 0.0) for k, c in found.total.items()}
            return lambda: self._second_pass(episodes, objective, Coefficients(only, found.terms), own, signals, 2)

        groups = torch.arange(episodes.count("group"), device=episodes.device)
        parts = groups.tensor_split(min(self.gradient_parts, max(len(groups), 1)))
        noise = parted(self.parameters(), [share(part) for part in parts])
        return Update(episodes, found, signals, 2 * int(self._cost(episodes).sum()), passes=2, gradient_noise=noise)

    def look(self, episodes: Episodes, objective: Objective) -> tuple[Episodes, dict[str, Tensor], Coefficients]:
        """The first half of an update in one graph: the batch with its columns, its signals, and their coefficients."""
        episodes = self._prepared(episodes)
        signals = self._signals(episodes, self._names(objective))
        return episodes, signals, coefficients(objective, episodes, signals)

    def _prepared(self, episodes: Episodes) -> Episodes:
        if self.prepare is None:
            return episodes
        if self.settings.autocast == "off":
            return self.prepare(episodes)
        with torch.autocast(episodes.device.type, dtype=getattr(torch, self.settings.autocast)):
            return self.prepare(episodes)

    def _names(self, objective: Objective) -> list[str]:
        return sorted(objective.needs.signals | {m for m in self.monitor if self._owner(m)})

    def _one_graph(self, episodes: Episodes, objective: Objective, names: list[str]) -> Update:
        signals = self._signals(episodes, names)
        found = coefficients(objective, episodes, signals)
        _backward(signals, found.total)
        detached = {k: v.detach() for k, v in signals.items()}
        return Update(episodes, found, detached, int(self._cost(episodes).sum()))

    def _part_by_part(self, episodes: Episodes, objective: Objective, names: list[str], split: list[Tensor]) -> Update:
        """One pass: each micro-batch is back-propagated with the coefficients that its own signals give.

        Where all signals together give others after all, the difference is back-propagated in a second pass.
        """
        seen, used = self._guess(episodes, names), {name: self._zeros(episodes) for name in objective.needs.signals}
        for part in split:
            steps = episodes.step_index(part)
            now = self._signals(episodes.select(part), names)
            for name, value in now.items():
                seen[name][steps] = value.detach().to(seen[name].dtype)
            total = coefficients(objective, episodes, seen).total
            for name, c in total.items():
                used[name][steps] = c[steps]
            _backward(now, {name: c[steps] for name, c in total.items()})
        found, computed = coefficients(objective, episodes, seen), int(self._cost(episodes).sum())
        if all(agree(used[name], c) for name, c in found.total.items()):
            return Update(episodes, found, seen, computed)
        missed = Coefficients({name: c - used[name] for name, c in found.total.items()}, found.terms)
        again = self._second_pass(episodes, objective, missed, sorted(objective.needs.signals), seen, 1)
        return Update(episodes, found, seen, computed + again.tokens_computed, passes=2)

    def _emitted(self, episodes: Episodes, names: list[str]) -> dict[str, Tensor]:
        """The signals, micro-batch by micro-batch, without a graph."""
        return {k: v for player, own in self._owned(names) for k, v in
                emitted(episodes, own, self._cast(player), self.settings.token_budget).items()}  # fmt: skip

    def _blank(self, episodes: Episodes, names: list[str]) -> dict[str, Tensor]:
        """Zeros in the shape of each signal: of ensembles, [N, ...], the first episode tells it."""
        made: dict[str, Tensor] = {}
        for player, own in self._owned(names):
            if getattr(player, "scalar_signals", False):
                made.update((name, self._zeros(episodes)) for name in own)
            else:
                first = emitted(
                    episodes.select(torch.zeros(1, dtype=torch.long, device=episodes.device)),
                    own,
                    self._cast(player),
                    self.settings.token_budget,
                )
                made.update((name, x.new_zeros(episodes.count("step"), *x.shape[1:])) for name, x in first.items())
        return made

    def _guess(self, episodes: Episodes, names: list[str]) -> dict[str, Tensor]:
        """Signals before they are known: log-probs as they were sampled, 0 for all else."""
        made = {name: self._zeros(episodes) for name in names}
        if "logp" in made and "behavior_logp" in episodes:
            made["logp"] = torch.nan_to_num(episodes["behavior_logp"].to(made["logp"], copy=True))
        return made

    def _second_pass(self, episodes: Episodes, objective: Objective, found: Coefficients, names: list[str],
                     signals: dict[str, Tensor], passes: int) -> Update:  # fmt: skip
        """Back-propagate sum(coefficient * signal) over the episodes that have a coefficient.

        `signals` are those of pass 1, or empty when it was skipped: then they are collected here.
        """
        nobody = torch.zeros(episodes.count("step"), dtype=torch.bool, device=episodes.device)
        rows = episodes.reduce(found.active() if found.total else nobody, how="any").nonzero().squeeze(1)
        live, cost = episodes.select(rows), self._cost(episodes)
        seen = dict(signals) or {name: x * torch.nan for name, x in self._blank(episodes, names).items()}
        for part in live.split(self.settings.token_budget, cost[rows]):
            steps = episodes.step_index(rows[part])
            emitted_now = self._signals(live.select(part), names)
            _backward(emitted_now, {name: c[steps] for name, c in found.total.items()})
            if not signals:
                for name, value in emitted_now.items():
                    seen[name][steps] = value.detach().to(seen[name].dtype)
        if not signals:
            known = {k: torch.nan_to_num(v) for k, v in seen.items()}
            found = Coefficients(found.total, coefficients(objective, episodes, known).terms)
        computed = int(cost[rows].sum()) + (int(cost.sum()) if passes > 1 else 0)
        return Update(episodes, found, seen, computed, passes=passes)

    # ---- the step ----------------------------------------------------------------------------------------------------
    def update(self, episodes: Episodes, objective: Objective, settings: Mapping[str, float] | None = None) -> Update:
        """One optimiser step; a batch without any coefficient moves nothing, not even by momentum or weight decay.

        (Otherwise it would depend on the micro-batch split: episodes without coefficient are skipped by pass 3 and so have
        no gradient, in one graph they have a gradient of 0.) `settings`: of the knobs in the objective (their defaults where
        none is given). Raises FloatingPointError, before anything is changed, when the gradient is not finite.
        """
        turned = {k: (settings or {}).get(k, default) for k, default in objective.knobs.items()}
        compiled = self.compiled if self.rate_scale == 1.0 and not self.gradient_parts else None
        made = compiled.update(episodes, objective, turned) if compiled is not None else None
        made = made or self.move(episodes, objective, turned)
        self.updates += 1
        return made

    def move(self, episodes: Episodes, objective: Objective, settings: Mapping[str, float]) -> Update:
        """`update` without counting it, one operation at a time."""
        self.optimizer.zero_grad(set_to_none=True)
        now = objective.at(self.updates)
        made = self.gradient(episodes, with_settings(now, settings) if settings else now)
        if made.coefficients.silent:
            self.optimizer.zero_grad(set_to_none=True)
        norm = float(nn.utils.clip_grad_norm_(self.parameters(), self.settings.clip_norm))
        if not math.isfinite(norm):
            self.optimizer.zero_grad(set_to_none=True)
            raise FloatingPointError(
                f"the gradient norm is {norm} at update {self.updates}, though every coefficient is finite: the model's "
                "own activations overflow. Lower the learning rate or use --dtype float32; nothing was updated."
            )
        rate = self.rate_scale * self.settings.rate(self.updates)
        for group, base in zip(self.optimizer.param_groups, self.base_rates, strict=True):
            group["lr"] = base * rate
        self.optimizer.step()
        for target in self.targets:
            if target.due(self.updates + 1):
                target.move()
        return replace(made, grad_norm=norm, learning_rate=self.settings.learning_rate * rate)

    def state_dict(self) -> dict[str, Any]:
        return {"optimizer": self.optimizer.state_dict(), "updates": self.updates}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
        self.updates = int(state["updates"])
        if self.compiled is not None:
            self.compiled.forget()

    # ---- players -----------------------------------------------------------------------------------------------------
    def _owner(self, name: str) -> Player | None:
        return next((p for p in self.players.values() if name in p.emits), None)

    def _owned(self, names: list[str]) -> list[tuple[Player, list[str]]]:
        """The players with the signals that each has to emit. Raises KeyError for a signal that nobody emits."""
        owned: dict[int, tuple[Player, list[str]]] = {}
        for name in names:
            player = self._owner(name)
            if player is None:
                known = sorted(set().union(*(p.emits for p in self.players.values())))
                raise KeyError(f"no player emits the signal {name!r}; there are: {', '.join(known)}")
            owned.setdefault(id(player), (player, []))[1].append(name)
        return list(owned.values())

    def _signals(self, episodes: Episodes, names: list[str]) -> dict[str, Tensor]:
        made: dict[str, Tensor] = {}
        for player, own in self._owned(names):
            made.update(self._cast(player).signals(episodes, own))
        return made

    def _cast(self, player: Player) -> Player:
        return player if self.settings.autocast == "off" else _Autocast(player, self.settings.autocast)

    def _cost(self, episodes: Episodes) -> Tensor:
        return torch.stack([p.total_lengths(episodes) for p in self.players.values()]).amax(0)

    def _zeros(self, episodes: Episodes) -> Tensor:
        first = self.parameters()[0]
        dtype = first.dtype if first.dtype == torch.float64 else torch.float32
        return torch.zeros(episodes.count("step"), dtype=dtype, device=episodes.device)


class _Autocast:
    """A player under mixed precision; its signals come back in float32."""

    def __init__(self, player: Player, dtype: str) -> None:
        self.player, self.dtype = player, getattr(torch, dtype)
        self.emits, self.total_lengths = player.emits, player.total_lengths
        self.named_parameters = player.named_parameters

    def signals(self, episodes: Episodes, names: Sequence[str]) -> dict[str, Tensor]:
        with torch.autocast(episodes.device.type, dtype=self.dtype):
            made = self.player.signals(episodes, names)
        return {name: value.float() for name, value in made.items()}


def _backward(signals: Mapping[str, Tensor], total: Mapping[str, Tensor]) -> None:
    live = [(signals[n], c.to(signals[n].dtype)) for n, c in total.items() if signals[n].requires_grad]
    if live:
        torch.autograd.backward([s for s, _ in live], [c for _, c in live])


__all__ = ["Learner", "LearnerSettings", "Player", "Update"]
