"""A policy over a small vocabulary that is a table of logits: exact, differentiable, in any float type."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from unipo.episodes import Episodes
from unipo.functional.quantities import PLAIN, measured


class TabularPolicy(nn.Module):
    """pi(token | prompt, position, previous token) = softmax of `logits` [P, L, V + 1, V]; V(s) = `value` [P, L, V + 1].

    The state is (prompt id, position in the answer, previous token), the start standing at "previous token" V. A context
    is the prompt id, and behind it the tokens of the answer that are written already, if any. Signals: `value` and the
    quantities of `unipo.functional.quantities`, all [N]; `parametric` names those with parameters that are asked for.
    """

    parametric: frozenset[str] = frozenset()

    def __init__(self, logits: Tensor, value: Tensor | None = None) -> None:
        """`logits` [P, L, V + 1, V], `value` [P, L, V + 1] (default zeros); ValueError where the shapes do not agree."""
        super().__init__()
        if logits.ndim != 4 or logits.shape[2] != logits.shape[3] + 1:
            raise ValueError(
                f"logits have shape {list(logits.shape)}: expected [prompts, length, vocabulary + 1, vocabulary], the last "
                "row of previous tokens being the start"
            )
        value = torch.zeros(logits.shape[:3], dtype=logits.dtype) if value is None else value
        if value.shape != logits.shape[:3]:
            raise ValueError(f"value has shape {list(value.shape)}: expected {list(logits.shape[:3])}, one per state")
        self.logits = nn.Parameter(logits.detach().clone())
        self.value = nn.Parameter(value.detach().clone())

    @classmethod
    def random(
        cls, prompts: int, length: int, vocabulary: int, seed: int = 0, dtype: torch.dtype = torch.float64
    ) -> TabularPolicy:
        """Standard normal logits and values."""
        generator = torch.Generator().manual_seed(seed)
        shape = (prompts, length, vocabulary + 1)
        logits = torch.randn((*shape, vocabulary), generator=generator, dtype=dtype)
        return cls(logits, torch.randn(shape, generator=generator, dtype=dtype))

    @property
    def emits(self) -> frozenset[str]:
        return PLAIN | {"value"} | self.parametric

    @property
    def length(self) -> int:
        """The longest episode that the table knows, L."""
        return self.logits.shape[1]

    @property
    def vocabulary(self) -> int:
        return self.logits.shape[3]

    def signals(self, episodes: Episodes, names: Sequence[str]) -> dict[str, Tensor]:
        """The signals `names`, each [N] and differentiable. IndexError where an episode leaves the table."""
        unknown = set(names) - self.emits
        if unknown:
            raise KeyError(f"no signal {sorted(unknown)}: this policy emits {', '.join(sorted(self.emits))}")
        state = self._states(episodes)
        logp_NV = self.logits[state].log_softmax(-1)
        made = {
            "logp": lambda: logp_NV.gather(1, episodes["token"][:, None])[:, 0],
            "entropy": lambda: -(logp_NV.exp() * logp_NV).sum(-1),
            "value": lambda: self.value[state],
        }
        rest = [name for name in names if name not in made]
        others = measured(rest, self.logits[state], episodes) if rest else {}
        return {name: made[name]() if name in made else others[name] for name in names}

    def total_lengths(self, episodes: Episodes) -> Tensor:
        """[E] tokens of each episode, the prompt's one included."""
        return episodes.lengths() + 1

    def _states(self, episodes: Episodes) -> tuple[Tensor, Tensor, Tensor]:
        """(prompt, position, previous token) of every step, each [N]."""
        token, context = episodes["token"], episodes.context("score")
        assert context.offsets is not None
        sizes = context.offsets.diff()
        if len(sizes) != len(episodes) or not bool((sizes > 0).all()):
            raise ValueError(
                f"{len(context.values)} context tokens for {len(episodes)} episodes: each has its prompt id, and behind it what "
                "is written already"
            )
        position = episodes.position() + episodes.expand(sizes - 1)
        if len(token) and (int(position.max()) >= self.length or int(token.max()) >= self.vocabulary):
            raise IndexError(
                f"an episode has {int(position.max()) + 1} steps and tokens up to {int(token.max())}: this table knows "
                f"{self.length} steps and {self.vocabulary} tokens"
            )
        last = torch.where(sizes > 1, context.values[context.offsets[1:] - 1], self.vocabulary)
        previous = torch.where(episodes.position() == 0, episodes.expand(last), token.roll(1))
        return episodes.expand(context.values[context.offsets[:-1]]), position, previous
