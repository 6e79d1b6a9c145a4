"""Sampling from Hugging Face causal models: batched, cached, and with the exact log-probs of what was sampled.

What is drawn depends on (key, position) alone: uniform numbers come from a hash, not from a generator's state, so neither
the batch around a prompt nor the order of prompts changes its completions (up to rounding of the logits).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplerSettings:
    """`temperature` 0 is greedy. `top_k` 0 and `top_p` 1 keep all tokens. `stop`: strings that end a completion."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_tokens: int = 256
    stop: tuple[str, ...] = ()
    batch: int = 256


@dataclass(frozen=True, slots=True)
class Completion:
    """Sampled tokens (the end-of-sequence token included), their behavior log-probs, and whether a limit cut them off.

    `logp`: of the distribution that was sampled, after temperature, top-k and top-p (0 when greedy).
    `stop_reason`: eos, stop (a stop string) or length (truncated).
    """

    tokens: tuple[int, ...]
    logp: tuple[float, ...]
    truncated: bool
    stop_reason: str


class Sampler:
    """Draws completions from `model`; use `sample`."""

    def __init__(self, model: Any, tokenizer: Any, settings: SamplerSettings) -> None:
        self.model, self.tokenizer, self.settings = model, tokenizer, settings
        config = getattr(model, "generation_config", None)
        extra = getattr(config, "eos_token_id", None)
        ends = {tokenizer.eos_token_id, *(extra if isinstance(extra, list) else [extra])} - {None}
        self._ends = torch.tensor(sorted(ends), device=self.device)
        self._limit = getattr(model.config, "max_position_embeddings", None)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def sample(self, prompts: Sequence[Sequence[int]], keys: Tensor) -> list[Completion]:
        """One completion per prompt. `keys` [n, k] int64: what the draw of each depends on (seed, step, prompt, sample).

        Raises ValueError for an empty prompt, or one that leaves no room in the model's context.
        """
        if len(keys) != len(prompts):
            raise ValueError(f"got {len(keys)} keys for {len(prompts)} prompts: one row of keys per prompt is needed")
        for row, prompt in enumerate(prompts):
            self._check(row, prompt)
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]), reverse=True)
        done: dict[int, Completion] = {}
        self.model.eval()
        with torch.no_grad():
            for start in range(0, len(order), self.settings.batch):
                rows = order[start : start + self.settings.batch]
                made = self._batch([prompts[i] for i in rows], mix(keys[rows].to(self.device)))
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

    # ---- one batch -----------------------------------------------------------------------------------------------------
    def _batch(self, prompts: Sequence[Sequence[int]], key: Tensor) -> list[Completion]:
        """Left-padded prefill, then one token for all per step; rows that have ended leave the cache when half have."""
        ids, seen = self._padded(prompts)
        cache: Any = None
        live = torch.arange(len(prompts), device=self.device)
        tokens = torch.full((len(prompts), self.settings.max_tokens), -1, device=self.device)
        logps = torch.zeros((len(prompts), self.settings.max_tokens), dtype=torch.float64, device=self.device)
        reason = ["length"] * len(prompts)
        ended = torch.zeros(len(prompts), dtype=torch.bool, device=self.device)
        for position in range(self.settings.max_tokens):
            out = self._forward(ids, seen, cache)
            cache = cache_of(out)
            token, logp = draw(out.logits[:, -1], uniform(key[live], position), self.settings)
            active = ~ended[live]
            tokens[live[active], position], logps[live[active], position] = token[active], logp[active].double()
            self._end(live, token, tokens, position, ended, reason)
            if bool(ended[live].all()):
                break
            ids, seen = token[:, None], torch.cat([seen, seen.new_ones(len(seen), 1)], 1)
            keep = (~ended[live]).nonzero().squeeze(1)
            if len(keep) <= len(live) // 2 and hasattr(cache, "batch_select_indices"):
                cache.batch_select_indices(keep)
                live, ids, seen = live[keep], ids[keep], seen[keep]
        return self._completions(tokens, logps, reason)

    def _padded(self, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        width = max(len(p) for p in prompts)
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.tokenizer.eos_token_id
        ids = torch.full((len(prompts), width), pad)
        seen = torch.zeros(len(prompts), width, dtype=torch.long)
        for i, p in enumerate(prompts):
            ids[i, width - len(p) :], seen[i, width - len(p) :] = torch.as_tensor(list(p)), 1
        return ids.to(self.device), seen.to(self.device)

    def _forward(self, ids: Tensor, seen: Tensor, cache: Any) -> Any:
        position = (seen.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        padded = None if bool(seen.all()) else seen
        inputs = {"input_ids": ids, "attention_mask": padded, "use_cache": True, "logits_to_keep": 1}
        if is_recurrent(self.model):
            inputs["cache_params"] = cache
            inputs["attention_mask"] = seen if cache is None else None
        else:
            inputs.update(past_key_values=cache, position_ids=position)
        return self.model(**inputs)

    def _end(
        self, live: Tensor, token: Tensor, tokens: Tensor, position: int, ended: Tensor, reason: list[str]
    ) -> None:
        """Mark the rows that this token ends."""
        stops = torch.isin(token, self._ends) & ~ended[live]
        for row in live[stops].tolist():
            reason[row] = "eos"
        ended[live[stops]] = True
        if not self.settings.stop:
            return
        for row in live[~ended[live]].tolist():
            text = self.tokenizer.decode(tokens[row, : position + 1].tolist(), skip_special_tokens=True)
            if any(s in text for s in self.settings.stop):
                reason[row], ended[row] = "stop", True

    def _completions(self, tokens: Tensor, logps: Tensor, reason: list[str]) -> list[Completion]:
        made = []
        for row, (ids, logp) in enumerate(zip(tokens.tolist(), logps.tolist(), strict=True)):
            n = ids.index(-1) if -1 in ids else len(ids)
            made.append(Completion(tuple(ids[:n]), tuple(logp[:n]), reason[row] == "length", reason[row]))
        return made


def is_recurrent(model: Any) -> bool:
    """State-space models keep a state in `cache_params` instead of keys and values."""
    return "mamba" in str(getattr(model.config, "model_type", "")).lower() and not hasattr(
        model.config, "layers_block_type"
    )


def cache_of(out: Any) -> Any:
    found = getattr(out, "past_key_values", None)
    return found if found is not None else getattr(out, "cache_params", None)


# ---- drawing ---------------------------------------------------------------------------------------------------------
def draw(logits: Tensor, u: Tensor, settings: SamplerSettings) -> tuple[Tensor, Tensor]:
    """A token per row of logits [B, V] by inverting the distribution's cumulative sum at u [B]; and its log-prob."""
    if settings.temperature == 0:
        return logits.argmax(-1), torch.zeros(len(logits), device=logits.device)
    logits = (logits if logits.dtype == torch.float64 else logits.float()) / settings.temperature
    logp = truncated_logp(torch.log_softmax(logits, -1), settings.top_k, settings.top_p)
    p = logp.exp().double()
    total = p.cumsum(-1)
    token = torch.searchsorted(total, (u * total[:, -1])[:, None], right=True).squeeze(1)
    last = p.shape[1] - 1 - (p.flip(-1) > 0).int().argmax(-1)
    token = torch.minimum(token, last)
    return token, logp.gather(-1, token[:, None]).squeeze(-1)


def truncated_logp(logp: Tensor, top_k: int, top_p: float) -> Tensor:
    """Log-probs [B, V] restricted to the top-k, then to the smallest set of mass >= top_p, and normalised again."""
    if (top_k <= 0 or top_k >= logp.shape[-1]) and top_p >= 1:
        return logp
    ranked, order = logp.sort(-1, descending=True)
    if 0 < top_k < logp.shape[-1]:
        ranked = ranked.masked_fill(torch.arange(logp.shape[-1], device=logp.device) >= top_k, -torch.inf).log_softmax(
            -1
        )
    if top_p < 1:
        before = ranked.exp().cumsum(-1) - ranked.exp()
        ranked = ranked.masked_fill(before >= top_p, -torch.inf).log_softmax(-1)
    return torch.empty_like(logp).scatter_(-1, order, ranked)


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
