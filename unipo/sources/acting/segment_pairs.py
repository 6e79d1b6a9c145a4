"""Pairs of segments of recorded episodes, of which somebody preferred one: preferences about control.

    segments          stretches of recorded episodes, at random places
    labelled          pairs of them, preferred by how good the actions are (regret) or by what they earned
    write_pairs       both, from recorded data and an expert's policy to a file (`unipo data segments`)
    SegmentPairs      the reader of a run, in the place of a replay

A preference by regret: P(first) = sigmoid( sum gamma^t A*(s_t, a_t) of the first - that of the second ). For an expert of
greatest entropy A* = temperature * log pi*(a | s), so that a policy is all it takes (CPL, arXiv 2310.13639).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unipo.episodes import Column, Episodes, offsets_of, ranges
from unipo.policies.control import load_control_policy, next_observation
from unipo.sources.acting.recordings import load_recorded
from unipo.sources.keyed import keyed_generator

Score = Callable[[Episodes], Tensor]
"""Segments [E] -> how good each is, [E] float."""


# ---- making them -------------------------------------------------------------------------------------------------------
def segments(episodes: Episodes, length: int, count: int, seed: int) -> Episodes:
    """`count` stretches of `length` steps, each from an episode drawn by how many there are in it, at a random place.

    Columns of steps are cut; `final_observation` is what followed the last step, `terminated` whether nothing did. Raises
    ValueError where no episode is so long.
    """
    room = (episodes.lengths() - length + 1).clamp(min=0)
    if int(room.sum()) == 0:
        raise ValueError(f"no episode has {length} steps; the longest has {int(episodes.lengths().max())}")
    generator = keyed_generator(seed, "segments", length)
    place = torch.from_numpy(generator.integers(int(room.sum()), size=count))
    bounds = offsets_of(room)
    whose = torch.searchsorted(bounds, place, right=True) - 1
    start = offsets_of(episodes.lengths())[whose] + place - bounds[whose]
    taken = ranges(start, torch.full_like(start, length))
    last = start + length - 1
    ends = last == offsets_of(episodes.lengths())[whose + 1] - 1
    columns = {n: c.take(taken) for n, c in episodes.columns.items() if c.level == "step"}
    columns |= {n: c.take(whose) for n, c in episodes.columns.items() if c.level == "episode"}
    columns["final_observation"] = Column(next_observation(episodes)[last], "episode")
    over = ends & episodes["terminated"][whose]
    columns |= {"terminated": Column(over, "episode"), "truncated": Column(~over, "episode")}
    one = torch.arange(count + 1)
    made = Episodes({"turn": torch.arange(0, count * length + 1, length), "episode": one, "group": one}, columns)
    return made.with_columns("episode", prompt_id=whose)


def labelled(parts: Episodes, score: Tensor, seed: int | None = None) -> Episodes:
    """Neighbours become pairs of kind "pair", the preferred one first: of scores [E] the higher; with a `seed` a draw of
    sigmoid(difference), as people answer. `confidence` [E]: its probability; equal ones count one half."""
    first, second = torch.arange(len(parts) - len(parts) % 2).reshape(-1, 2).T
    chance = torch.sigmoid((score[first] - score[second]).double())
    if seed is not None:
        won = torch.from_numpy(keyed_generator(seed, "preferences").random(len(chance))) < chance
    else:
        won = score[first] >= score[second]
    better, worse = torch.where(won, first, second), torch.where(won, second, first)
    rows = torch.stack([better, worse], 1).flatten()
    made = parts.select(rows).grouped(torch.arange(len(better)).repeat_interleave(2))
    sure = torch.where(won, chance, 1.0 - chance).repeat_interleave(2)
    return made.with_columns("episode", kind="pair", chosen=torch.arange(len(rows)) % 2 == 0, confidence=sure,
                             rating=score[rows].double())  # fmt: skip


@dataclass(frozen=True)
class Regret:
    """sum gamma^t temperature * log pi*(a_t | s_t) of an expert's policy: its advantage, if it is one of greatest entropy."""

    expert: Any
    temperature: float = 1.0
    gamma: float = 1.0

    @torch.no_grad()
    def __call__(self, parts: Episodes) -> Tensor:
        logp = self.expert.signals(parts, ["logp"])["logp"]
        return self.temperature * parts.reduce(self.gamma ** parts.position() * logp)


@dataclass(frozen=True)
class Earned:
    """sum gamma^t r_t of the segment alone: what preferences are often taken for."""

    gamma: float = 1.0

    def __call__(self, parts: Episodes) -> Tensor:
        reward = parts["raw_reward"] if "raw_reward" in parts else parts["reward"]
        return parts.reduce(self.gamma ** parts.position() * reward)


def write_pairs(recorded: str, out: Path, expert: str = "", *, length: int = 16, pairs: int = 1000, temperature: float = 1.0,
                noise: bool = False, seed: int = 0) -> Episodes:  # fmt: skip
    """Pairs of segments of recorded data, labelled by the policy in the folder `expert` (a run, or its final/), or without
    one by what they earned, as `out/pairs.parquet`. `noise`: labels are drawn. ValueError for what cannot be used."""
    episodes = load_recorded(recorded)
    score: Score = Earned()
    if expert:
        folder = Path(expert)
        score = Regret(load_control_policy(folder / "final" if (folder / "final").is_dir() else folder), temperature)
    parts = segments(episodes, length, 2 * pairs, seed)
    made = labelled(parts, score(parts), seed if noise else None)
    made.save(out / "pairs.parquet")
    return made


# ---- reading them ------------------------------------------------------------------------------------------------------
@dataclass
class SegmentPairs:
    """Draws pairs, a keyed choice with replacement; has of a replay what a run on recorded data uses."""

    seed: int
    pairs: Episodes | None = None
    prioritised: None = field(default=None, init=False)

    def add(self, recorded: Episodes) -> None:
        """The pairs; ValueError where they are none."""
        whole = recorded.lengths("group", "episode") == 2
        if "chosen" not in recorded or not bool(whole.all()):
            raise ValueError("these are no pairs of segments: expected groups of two episodes, one of which is chosen")
        self.pairs = recorded

    def __len__(self) -> int:
        return 0 if self.pairs is None else self.pairs.count("group")

    def samples(self, batch_size: int, step: int, count: int) -> Iterator[Episodes]:
        """`count` batches of `batch_size` pairs: a function of (pairs, seed, step)."""
        assert self.pairs is not None
        for index in range(count):
            generator = keyed_generator(self.seed, "segment pairs", step, index)
            chosen = torch.from_numpy(generator.integers(len(self), size=batch_size))
            drawn = self.pairs.select(chosen, "group")
            yield drawn.grouped(torch.arange(batch_size).repeat_interleave(2))

    def remembered(self, name: str) -> Tensor:
        assert self.pairs is not None
        return self.pairs[name]

    def save(self, folder: Path) -> None:
        return None

    def load(self, folder: Path) -> None:
        return None
