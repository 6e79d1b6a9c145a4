"""Sampling from Hugging Face causal models: batched, cached, and with the exact log-probs of what was sampled.

What is drawn depends on (key, position) alone: uniform numbers come from a hash, not from a generator's state, so neither
the batch around a prompt nor the order of prompts changes its completions (up to rounding of the logits).

Prompts that occur several times are computed once. Prompts are padded on the left and decoded with a cache where a probe
on first use finds both exact; else prompts of equal length are batched, or whole sequences recomputed.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from unipo.functional.chunked import chunk_rows, chunks, wide
from unipo.policies.token import causal_model, context_limit

COMPACT = 0.125
"""Ended rows leave the batch when they are this share of it. Leaving copies the cache, as every decoded token does.
Measured (0.8M parameters, 256 rows, 32 tokens, one core, CPU seconds): at 1/2 0.33, at 1/4 0.28, at 1/8 0.28, at once 0.32."""
MARGIN = 8
"""Tokens decoded beside those that a stop string can span (tokens without text, a decoder's leading space)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplerSettings:
    """`temperature` 0 is greedy. `top_k` 0 and `top_p` 1 keep all tokens. `stop`: strings that end a completion.

    `batch`: most rows that are decoded together.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_tokens: int = 256
    stop: tuple[str, ...] = ()
    batch: int = 256

    def __post_init__(self) -> None:
        checks = {
            "temperature": (self.temperature >= 0, "0 (greedy) or above"),
            "top_p": (0 < self.top_p <= 1, "in (0, 1]"),
            "top_k": (self.top_k >= 0, "0 (all tokens) or above"),
            "max_tokens": (self.max_tokens >= 1, "at least 1"),
            "stop": (all(self.stop), "strings that are not empty"),
            "batch": (self.batch >= 1, "at least 1"),
        }
        for name, (good, expected) in checks.items():
            if not good:
                raise ValueError(f"{name} is {getattr(self, name)!r}: expected {expected}")


@dataclass(frozen=True, slots=True)
class Completion:
    """Sampled tokens (the end-of-sequence token included), their behavior log-probs, and whether a limit cut them off.

    `logp`: of the distribution that was sampled, after temperature, top-k and top-p (0 when greedy).
    `stop_reason`: eos, stop (a stop string; its last token is the last one kept) or length (truncated).
    """

    tokens: tuple[int, ...]
    logp: tuple[float, ...]
    truncated: bool
    stop_reason: str


class Sampler:
    """Draws completions from `model`; use `sample`."""

    def __init__(self, model: Any, tokenizer: Any, settings: SamplerSettings) -> None:
        self.model, self.tokenizer, self.settings = model, tokenizer, settings
        extra = getattr(getattr(causal_model(model), "generation_config", None), "eos_token_id", None)
        ends = {tokenizer.eos_token_id, *(extra if isinstance(extra, list) else [extra])} - {None}
        self._ends = torch.tensor(sorted(ends), device=self.device)
        self._limit = context_limit(model)
        self._decoder: _Decoder | None = None

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @torch.no_grad()
    def sample(self, prompts: Sequence[Sequence[int]], keys: Tensor) -> list[Completion]:
        """One completion per prompt. `keys` [n, k] int64: what the draw of each depends on (seed, step, prompt, sample).

        Raises ValueError for an empty prompt, or one that leaves no room in the model's context.
        """
        if keys.ndim != 2 or len(keys) != len(prompts):
            raise ValueError(
                f"got keys of shape {list(keys.shape)} for {len(prompts)} prompts: one row of keys per prompt is needed"
            )
        for row, prompt in enumerate(prompts):
            self._check(row, prompt)
        done: dict[int, Completion] = {}
        self.model.eval()
        for rows in self._waves(prompts):
            made = self._wave([tuple(prompts[i]) for i in rows], mix(keys[rows].to(self.device)))
            done.update(zip(rows, made, strict=True))
        return [done[i] for i in range(len(prompts))]

    def _check(self, row: int, prompt: Sequence[int]) -> None:
        if not len(prompt):
            raise ValueError(f"prompt {row} is empty: a completion needs at least one token before it")
        if self._limit is not None and len(prompt) + self.settings.max_tokens > self._limit:
            raise ValueError(
                f"prompt {row} has {len(prompt)} tokens; with max_tokens {self.settings.max_tokens} it passes the model's "
                f"context of {self._limit}. Shorten or drop it, or lower --max-tokens."
            )

    def _waves(self, prompts: Sequence[Sequence[int]]) -> Iterator[list[int]]:
        """Rows that are decoded together, longest prompts first; of one length where padding is not exact."""
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]), reverse=True)
        if not order:
            return
        self._decoder = self._decoder or _Decoder.probed(self.model)
        runs = [order]
        if not self._decoder.pads:
            runs = [list(rows) for _, rows in groupby(order, key=lambda i: len(prompts[i]))]
        for run in runs:
            yield from (run[part] for part in chunks(len(run), self.settings.batch))

    # ---- one wave ------------------------------------------------------------------------------------------------------
    def _wave(self, prompts: Sequence[tuple[int, ...]], key: Tensor) -> list[Completion]:
        """Prefill of the distinct prompts, then one token for all live rows per step."""
        assert self._decoder is not None
        distinct = {p: i for i, p in enumerate(dict.fromkeys(prompts))}
        index = torch.tensor([distinct[p] for p in prompts], device=self.device)
        ids, seen = left_padded(list(distinct), self._pad, self.device)
        logits, cache = self._decoder(ids, seen, None)
        logits, ids, seen, cache = logits[index], ids[index], seen[index], taken(cache, index)
        live, log = torch.arange(len(prompts), device=self.device), _Log(len(prompts), self.settings.max_tokens, key)
        for position in range(self.settings.max_tokens):
            token, logp = draw(logits, uniform(key[live], position), self.settings)
            log.write(live, position, token, logp)
            log.end("eos", live[torch.isin(token, self._ends)])
            log.end("stop", self._stopped(log, live, position))
            keep = log.open[live].nonzero().squeeze(1)
            if not len(keep) or position + 1 == self.settings.max_tokens:
                break
            ids, seen = torch.cat([ids, token[:, None]], 1), torch.cat([seen, seen.new_ones(len(seen), 1)], 1)
            if len(keep) <= (1 - COMPACT) * len(live):
                live, ids, seen, cache = live[keep], ids[keep], seen[keep], taken(cache, keep)
            logits, cache = self._decoder(ids, seen, cache)
        return log.completions()

    @property
    def _pad(self) -> int:
        pad = self.tokenizer.pad_token_id
        return int(pad if pad is not None else self.tokenizer.eos_token_id)

    def _stopped(self, log: _Log, live: Tensor, position: int) -> Tensor:
        """Rows of `live` whose newest token completes a stop string.

        Only the last tokens are decoded: a token that has text has at least one byte of it.
        """
        if not self.settings.stop:
            return live[:0]
        rows = live[log.open[live]]
        span = max(len(s.encode()) for s in self.settings.stop) + MARGIN
        tails = log.tokens[rows, max(0, position + 1 - span) : position + 1].tolist()
        texts = self.tokenizer.batch_decode(tails, clean_up_tokenization_spaces=False)
        hit = [any(s in text for s in self.settings.stop) for text in texts]
        return rows[torch.tensor(hit, dtype=torch.bool, device=rows.device)]


class _Log:
    """What was drawn: `tokens` and log-probs [n, max_tokens], and which rows are still `open`."""

    def __init__(self, n: int, max_tokens: int, like: Tensor) -> None:
        self.tokens = like.new_zeros(n, max_tokens)
        self.logp = like.new_zeros(n, max_tokens, dtype=torch.float64)
        self.length = like.new_zeros(n)
        self.open = like.new_ones(n, dtype=torch.bool)
        self.reason = ["length"] * n

    def write(self, live: Tensor, position: int, token: Tensor, logp: Tensor) -> None:
        active = self.open[live]
        rows = live[active]
        self.tokens[rows, position], self.logp[rows, position] = token[active], logp[active].double()
        self.length[rows] += 1

    def end(self, reason: str, rows: Tensor) -> None:
        """Close the rows that are open among `rows`."""
        for row in rows[self.open[rows]].tolist():
            self.reason[row] = reason
        self.open[rows] = False

    def completions(self) -> list[Completion]:
        rows = zip(self.tokens.tolist(), self.logp.tolist(), self.length.tolist(), self.reason, strict=True)
        return [Completion(tuple(t[:n]), tuple(p[:n]), why == "length", why) for t, p, n, why in rows]


# ---- decoding --------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class _Decoder:
    """Next-token logits [B, V] of left-padded sequences; `pads` and `caches` say what is exact for this architecture."""

    model: Any
    arguments: frozenset[str]
    pads: bool = True
    caches: bool = True

    @classmethod
    def probed(cls, model: Any) -> _Decoder:
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
    one = seen.new_ones(len(seen), 1)
    return torch.cat([ids, one * token], 1), torch.cat([seen, one], 1)


def taken(cache: Any, rows: Tensor) -> Any:
    """The cache of `rows` (int64, any length, with repetitions); changes `cache` in place."""
    if cache is not None:
        cache.reorder_cache(rows)
    return cache


def cache_of(out: Any) -> Any:
    found = getattr(out, "past_key_values", None)
    return found if found is not None else getattr(out, "cache_params", None)


# ---- drawing ---------------------------------------------------------------------------------------------------------
def draw(logits: Tensor, u: Tensor, settings: SamplerSettings) -> tuple[Tensor, Tensor]:
    """A token per row of logits [B, V] by inverting the distribution's cumulative sum at u [B]; and its log-prob."""
    if settings.temperature == 0:
        return logits.argmax(-1), torch.zeros(len(logits), device=logits.device)
    parts = chunks(len(logits), chunk_rows(logits.shape[-1], 8))
    token, logp = zip(*(_drawn(logits[part], u[part], settings) for part in parts), strict=True)
    return torch.cat(token), torch.cat(logp)


def _drawn(logits: Tensor, u: Tensor, settings: SamplerSettings) -> tuple[Tensor, Tensor]:
    logp = truncated_logp(torch.log_softmax(wide(logits) / settings.temperature, -1), settings.top_k, settings.top_p)
    p = logp.exp().double()
    total = p.cumsum(-1)
    token = torch.searchsorted(total, (u * total[:, -1])[:, None], right=True).squeeze(1)
    last = p.shape[1] - 1 - (p.flip(-1) > 0).int().argmax(-1)
    token = torch.minimum(token, last)
    return token, logp.gather(-1, token[:, None]).squeeze(-1)


def truncated_logp(logp: Tensor, top_k: int, top_p: float) -> Tensor:
    """Log-probs [B, V] restricted to the top-k, then to the smallest set of mass >= top_p, and normalised again."""
    some = 0 < top_k < logp.shape[-1]
    if not some and top_p >= 1:
        return logp
    ranked, order = logp.topk(top_k) if some else logp.sort(-1, descending=True)
    ranked = ranked.log_softmax(-1)
    if top_p < 1:
        before = ranked.exp().cumsum(-1) - ranked.exp()
        ranked = ranked.masked_fill(before >= top_p, -torch.inf).log_softmax(-1)
    return torch.full_like(logp, -torch.inf).scatter_(-1, order, ranked)


def mix(keys: Tensor) -> Tensor:
    """One well-mixed int64 per row of keys [n, k] (the finaliser of SplitMix64, folded over the columns)."""
    state = torch.zeros(len(keys), dtype=torch.long, device=keys.device)
    for column in keys.unbind(1):
        state = _finalise(state ^ (column + _GOLDEN))
    return state


def uniform(key: Tensor, position: int) -> Tensor:
    """Uniform numbers in [0, 1) with 53 random bits, a function of (key, position): [n] float64."""
    bits = _finalise(key + _wrapped((position + 1) * _GOLDEN))
    return ((bits >> 11) & ((1 << 53) - 1)).double() / float(1 << 53)


_GOLDEN = -7046029254386353131
_FIRST, _SECOND = -4658895280553007687, -7723592293110705685


def _wrapped(x: int) -> int:
    """x modulo 2^64, as a signed 64-bit integer."""
    return (x + (1 << 63)) % (1 << 64) - (1 << 63)


def _finalise(x: Tensor) -> Tensor:
    x = (x ^ _shift(x, 30)) * _FIRST
    x = (x ^ _shift(x, 27)) * _SECOND
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
