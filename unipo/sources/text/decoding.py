"""Next-token logits of many sequences: the interface that the sampler drives, and its general form for any causal model.

The general form calls the model as it is. It is the slow twin: what `fused.FusedDecoding` is verified against, and what
runs where that does not apply.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from unipo.policies.token import causal_model

COMPACT = 0.125
"""Ended rows leave the general form's batch when they are this share of it: leaving copies the whole cache.
Measured (0.8M parameters, 256 rows, 32 tokens, one core, CPU seconds): at 1/2 0.33, at 1/4 0.28, at 1/8 0.28, at once 0.32."""


class Decoding(Protocol):
    """The state of rows that are being decoded. Rows have an order, which only `admit` (at the end) and `keep` change."""

    def room(self, prompts: Sequence[tuple[int, ...]], begun: int, live: int) -> int:
        """How many of `prompts`, from number `begun` on, may be admitted beside `live` rows now."""

    def admit(self, prompts: Sequence[tuple[int, ...]]) -> Tensor:
        """New rows: their next-token logits [len(prompts), V]."""

    def step(self, token: Tensor) -> Tensor:
        """`token` [B] is appended to the rows: their next-token logits [B, V]."""

    def keep(self, going: Tensor) -> Tensor:
        """Rows where `going` [B] is False may leave. Indices of the rows that stay, in their new order."""


class ModelDecoding:
    """Any causal model, prompts padded on the left, with the model's own cache where a probe found both exact.

    `batch`: most rows that are decoded together. `pad`: the token that fills up.
    """

    def __init__(self, call: ModelCall, batch: int, pad: int) -> None:
        self.call, self.batch, self.pad = call, batch, pad
        self.device = next(call.model.parameters()).device

    def room(self, prompts: Sequence[tuple[int, ...]], begun: int, live: int) -> int:
        """A whole batch at a time, since all rows share one cache; of one length where padding is not exact."""
        if live or begun == len(prompts):
            return 0
        waiting = prompts[begun : begun + self.batch]
        return len(waiting) if self.call.pads else sum(len(p) == len(waiting[0]) for p in waiting)

    def admit(self, prompts: Sequence[tuple[int, ...]]) -> Tensor:
        """Distinct prompts are computed once."""
        distinct = {p: i for i, p in enumerate(dict.fromkeys(prompts))}
        index = torch.tensor([distinct[p] for p in prompts], device=self.device)
        self.ids, self.seen = left_padded(list(distinct), self.pad, self.device)
        logits, self.cache = self.call(self.ids, self.seen, None)
        self._take(index)
        return logits[index]

    def step(self, token: Tensor) -> Tensor:
        self.ids, self.seen = torch.cat([self.ids, token[:, None]], 1), torch.cat([self.seen, _ones(self.seen)], 1)
        logits, self.cache = self.call(self.ids, self.seen, self.cache)
        return logits

    def keep(self, going: Tensor) -> Tensor:
        rows = going.nonzero().squeeze(1)
        if not len(rows):
            return rows
        if len(rows) > (1 - COMPACT) * len(going):
            return torch.arange(len(going), device=self.device)
        self._take(rows)
        return rows

    def _take(self, rows: Tensor) -> None:
        self.ids, self.seen, self.cache = self.ids[rows], self.seen[rows], taken(self.cache, rows)


@dataclass(frozen=True)
class MixedDecoding:
    """Two models on the same rows: logits (1 - share) l + share l' of log-probabilities, a geometric mixture per token."""

    first: Decoding
    second: Decoding
    share: float

    def room(self, prompts: Sequence[tuple[int, ...]], begun: int, live: int) -> int:
        return min(d.room(prompts, begun, live) for d in (self.first, self.second))

    def admit(self, prompts: Sequence[tuple[int, ...]]) -> Tensor:
        return self._mixed(self.first.admit(prompts), self.second.admit(prompts))

    def step(self, token: Tensor) -> Tensor:
        return self._mixed(self.first.step(token), self.second.step(token))

    def keep(self, going: Tensor) -> Tensor:
        stay, other = self.first.keep(going), self.second.keep(going)
        if not torch.equal(stay, other):
            raise RuntimeError(
                "two models of a mixture keep different rows: their decoders differ; sample with fused=False"
            )
        return stay

    def _mixed(self, own: Tensor, other: Tensor) -> Tensor:
        return (1.0 - self.share) * own.log_softmax(-1) + self.share * other.to(own.dtype).log_softmax(-1)


@dataclass(frozen=True)
class ModelCall:
    """Next-token logits [B, V] of left-padded sequences; `pads` and `caches` say what is exact for this architecture."""

    model: Any
    arguments: frozenset[str]
    pads: bool = True
    caches: bool = True

    @classmethod
    def probed(cls, model: Any) -> ModelCall:
        """Compare padded and cached logits of a tiny batch with those of whole sequences, and keep what is equal."""
        arguments = frozenset(inspect.signature(causal_model(model).forward).parameters)
        plain, fast = cls(model, arguments, caches=False), cls(model, arguments)
        vocabulary = model.get_input_embeddings().weight.shape[0]
        device = next(model.parameters()).device
        rows = [[i % vocabulary for i in row] for row in ((3, 4, 5, 6, 7, 8), (9, 10, 11))]
        one, longer = left_padded(rows[:1], 0, device), left_padded([[*rows[0], 2]], 0, device)
        caches = _same(
            lambda: plain(*longer, None)[0], lambda: fast(*longer, taken(fast(*one, None)[1], one[0][:, 0] * 0))[0]
        )
        both = left_padded(rows, 0, device)
        tried = cls(model, arguments, caches=caches)
        pads = _same(
            lambda: torch.cat([plain(*left_padded([[*r, 2]], 0, device), None)[0] for r in rows]),
            lambda: tried(*_appended(*both, 2), tried(*both, None)[1])[0],
        )
        return cls(model, arguments, pads, caches)

    def __call__(self, ids: Tensor, seen: Tensor, cache: Any) -> tuple[Tensor, Any]:
        """`ids`, `seen` [B, T]: whole sequences and where they are not padding; with a cache only the last token is run."""
        new = ids if cache is None else ids[:, -1:]
        padded = None if bool(seen.all()) else seen
        inputs: dict[str, Any] = {"input_ids": new, "attention_mask": padded, "use_cache": self.caches}
        if "cache_params" in self.arguments:  # a state instead of keys and values: nothing of the past is masked
            inputs.update(cache_params=cache, attention_mask=padded if cache is None else None)
        else:
            inputs["past_key_values"] = cache
        if "position_ids" in self.arguments:
            inputs["position_ids"] = (seen.cumsum(1) - 1).clamp(min=0)[:, -new.shape[1] :]
        if "logits_to_keep" in self.arguments:
            inputs["logits_to_keep"] = 1
        out = self.model(**inputs)
        return out.logits[:, -1], cache_of(out) if self.caches else None


def _same(exact: Callable[[], Tensor], tried: Callable[[], Tensor]) -> bool:
    """Equal up to rounding? A wrong mask or position changes logits by far more; what raises is not equal."""
    try:
        a, b = exact(), tried()
    except (AttributeError, TypeError, RuntimeError, ValueError, IndexError):
        return False
    tolerance = max(16 * torch.finfo(a.dtype).eps, 1e-4)
    return float((a - b).abs().max()) <= tolerance * float(a.abs().max())


def left_padded(prompts: Sequence[Sequence[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(ids, seen): [B, longest] int64 with padding on the left, and 1 where a token is not padding."""
    width = max(len(p) for p in prompts)
    ids = torch.tensor([[pad] * (width - len(p)) + list(p) for p in prompts])
    seen = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    return ids.to(device), seen.to(device)


def _appended(ids: Tensor, seen: Tensor, token: int) -> tuple[Tensor, Tensor]:
    return torch.cat([ids, _ones(ids) * token], 1), torch.cat([seen, _ones(seen)], 1)


def _ones(rows: Tensor) -> Tensor:
    return rows.new_ones(len(rows), 1)


def taken(cache: Any, rows: Tensor) -> Any:
    """The cache of `rows` (int64, any length, with repetitions); changes `cache` in place."""
    if cache is not None:
        cache.reorder_cache(rows)
    return cache


def cache_of(out: Any) -> Any:
    found = getattr(out, "past_key_values", None)
    return found if found is not None else getattr(out, "cache_params", None)
