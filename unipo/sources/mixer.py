"""The mixer: one batch from several sources, with stated amounts, every row saying where it came from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from unipo.episodes import Episodes


class Source(Protocol):
    """Yields groups of episodes, a function of (state, step, version) alone; the state is checkpointed.

    `draw` may return None when it has nothing to give yet (an empty replay buffer).
    """

    def draw(self, step: int, version: int) -> Episodes | None: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


@dataclass
class Mixer:
    """Draws from each of `sources` (by name) every step and joins what they gave."""

    sources: Mapping[str, Source]

    def draw(self, step: int, version: int) -> Episodes:
        """The batch, with columns `source` (the name) and `sampling_weight`: the share of the batch's groups that the
        row's source was given, the number to divide by for whoever wants to undo the mix."""
        drawn = {name: source.draw(step, version) for name, source in self.sources.items()}
        parts = {name: e for name, e in drawn.items() if e is not None and len(e)}
        if not parts:
            raise ValueError(
                f"no source gave any episodes at step {step}; sources: {', '.join(self.sources) or 'none'}"
            )
        total = sum(e.count("group") for e in parts.values())
        labelled = []
        for name, e in parts.items():
            share = e.count("group") / total
            weight = e.lengths().new_full((len(e),), 0).float() + share
            labelled.append(e.with_columns("episode", source=name, sampling_weight=weight))
        return Episodes.cat(labelled)

    def state_dict(self) -> dict[str, Any]:
        return {name: source.state_dict() for name, source in self.sources.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name, source in self.sources.items():
            source.load_state_dict(state[name])
