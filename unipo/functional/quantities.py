"""What a policy says of the whole distribution at each step, by name: numbers per row of log-probs l [r, V].

    logp                      l[y]
    entropy                   -sum_a pi(a) l(a)
    collision                 sum_a pi(a)^2                       (|grad_logits log pi(y)|^2 = 1 - 2 pi(y) + collision)
    tempered:KAPPA            sum_a q(a) l(a)                     q = softmax(l / KAPPA), held constant
    tempered_share:KAPPA      q(y)                                held constant
    drawn:KAPPA:K             sum_a q(a) l(a)                     q = shares of K draws from softmax(l / KAPPA)
    drawn_share:KAPPA:K       q(y)                                of the same draws

Draws are a function of the column `draw` [E] (which row of which epoch it is) and of the step's place in the episode.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from unipo.episodes import Episodes
from unipo.functional.chunked import Entropy, Head, LogProb, Quantity, chunk_rows, chunked, finite, wide
from unipo.functional.keyed import mix, uniform

PLAIN = frozenset({"logp", "entropy", "collision"})
"""Names without parameters: every policy over a vocabulary emits them."""


# ---- distributions made of pi ------------------------------------------------------------------------------------------
class Distribution(Protocol):
    """q [r, V] as a function of the policy's log-probs l [r, V] of the rows `part`; nothing is differentiated through it."""

    def __call__(self, logp: Tensor, part: slice) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class Tempered:
    """softmax(l / kappa): flatter than pi for kappa > 1."""

    kappa: float

    def __call__(self, logp: Tensor, part: slice) -> Tensor:
        return torch.softmax(logp / self.kappa, -1)


@dataclass(frozen=True, slots=True)
class Shares:
    """The shares of `count` independent draws from another distribution; `key` [n] int64 says which, row by row."""

    of: Tempered
    key: Tensor
    count: int

    def __call__(self, logp: Tensor, part: slice) -> Tensor:
        cdf = self.of(logp, part).double().cumsum(-1)
        u = uniform(self.key[part, None], torch.arange(self.count, device=logp.device)) * cdf[:, -1:]
        drawn = torch.searchsorted(cdf, u, right=True).clamp(max=logp.shape[-1] - 1)
        share = torch.full_like(u, 1 / self.count, dtype=logp.dtype)
        return torch.zeros_like(logp).scatter_add_(-1, drawn, share)


# ---- quantities --------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Collision:
    """sum_a pi(a)^2: the probability that two draws agree."""

    def value(self, logp: Tensor, part: slice) -> Tensor:
        return torch.exp(2 * logp).sum(-1)

    def slope(self, logp: Tensor, part: slice) -> Tensor:
        return torch.exp(2 * logp).mul_(2)


@dataclass(frozen=True, slots=True)
class Expected:
    """sum_a q(a) l(a), q held constant: the expected log-prob of an action of q."""

    q: Distribution

    def value(self, logp: Tensor, part: slice) -> Tensor:
        return (self.q(logp, part) * finite(logp)).sum(-1)

    def slope(self, logp: Tensor, part: slice) -> Tensor:
        return self.q(logp, part)


@dataclass(frozen=True, slots=True)
class Share:
    """q(y), held constant."""

    q: Distribution
    tokens: Tensor

    def value(self, logp: Tensor, part: slice) -> Tensor:
        return self.q(logp, part).gather(-1, self.tokens[part, None]).squeeze(-1)

    def slope(self, logp: Tensor, part: slice) -> Tensor:
        return torch.zeros_like(logp)


# ---- by name -----------------------------------------------------------------------------------------------------------
def parametric(names: Iterable[str]) -> frozenset[str]:
    """Those of `names` that are quantities with parameters in their names; ValueError for parameters that cannot be."""
    return frozenset(name for name in names if _parsed(name) is not None)


def quantity(name: str, episodes: Episodes, device: torch.device | str | None = None) -> Quantity:
    """The quantity called `name` at the steps of `episodes`, on `device`. KeyError for a name that is not one."""
    tokens = episodes["token"].to(device or episodes.device)
    plain: dict[str, Quantity] = {"logp": LogProb(tokens), "entropy": Entropy(), "collision": Collision()}
    if name in plain:
        return plain[name]
    parsed = _parsed(name)
    if parsed is None:
        raise KeyError(
            f"no quantity is called {name!r}; there are {', '.join(sorted(plain))}, and tempered and drawn ones"
        )
    kind, kappa, count = parsed
    q: Distribution = Tempered(kappa)
    if count:
        q = Shares(Tempered(kappa), draw_keys(episodes).to(tokens.device), count)
    return Share(q, tokens) if kind.endswith("_share") else Expected(q)


def measured(names: Sequence[str], logits: Tensor, episodes: Episodes) -> dict[str, Tensor]:
    """Quantities by name of the rows of full logits [N, V], each [N] and differentiable in them."""
    rows = chunk_rows(logits.shape[-1], wide(logits[:0]).element_size())
    values = chunked(logits, Head(None), [quantity(name, episodes, logits.device) for name in names], rows)
    return dict(zip(names, values, strict=True))


def draw_keys(episodes: Episodes) -> Tensor:
    """[N] int64: another for every step of every row that is drawn. Raises KeyError without the column `draw`."""
    return mix(torch.stack([episodes.expand("draw"), episodes.position()], 1))


def _parsed(name: str) -> tuple[str, float, int] | None:
    """(kind, kappa, count), count 0 for a tempered one; None for another name."""
    kind, *numbers = name.split(":")
    if kind.removesuffix("_share") not in ("tempered", "drawn"):
        return None
    sizes = {"tempered": 1, "drawn": 2}
    try:
        kappa, count = float(numbers[0]), int(numbers[1]) if kind.startswith("drawn") else 0
        right = len(numbers) == sizes[kind.removesuffix("_share")] and kappa > 0 and (count > 0 or kind.startswith("t"))
    except (ValueError, IndexError):
        right = False
    if not right:
        raise ValueError(f"signal {name!r}: expected tempered:KAPPA or drawn:KAPPA:K with KAPPA > 0 and K >= 1")
    return kind, kappa, count
