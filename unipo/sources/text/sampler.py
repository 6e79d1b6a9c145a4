"""Sampling from Hugging Face causal models: batched, cached, and with the exact log-probs of what was sampled.

What is drawn depends on (key, position) alone: uniform numbers come from a hash, not from a generator's state, so neither
the batch around a prompt nor the order of prompts changes its completions (up to rounding of the logits).

Prompts that occur several times are computed once, rows that end leave the batch, and where the architecture allows it
waiting prompts take their place. `fused` decodes the families that it knows; `decoding` any other causal model.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from unipo.policies.token import causal_model, context_limit
from unipo.sources.text.decoding import Decoding, MixedDecoding, ModelCall, ModelDecoding
from unipo.sources.text.drawing import draw, mix, uniform
from unipo.sources.text.fused import FusedDecoding, verified_parts
from unipo.sources.text.fused_weights import Parts

MARGIN = 8
"""Tokens decoded beside those that a stop string can span (tokens without text, a decoder's leading space)."""
REASONS = ("length", "eos", "stop")


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplerSettings:
    """`temperature` 0 is greedy. `top_k` 0 and `top_p` 1 keep all tokens. `stop`: strings that end a completion.

    `batch`: most rows that are decoded together. `fused` False calls the model as it is for every token. `weights`: model, or
    bfloat16, which samples from the model with rounded weights (behavior log-probs are those of what was sampled): faster on
    processors that multiply such numbers; only where the model can be decoded fused.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_tokens: int = 256
    stop: tuple[str, ...] = ()
    batch: int = 256
    fused: bool = True
    weights: str = "model"

    def __post_init__(self) -> None:
        checks = {
            "temperature": (self.temperature >= 0, "0 (greedy) or above"),
            "top_p": (0 < self.top_p <= 1, "in (0, 1]"),
            "top_k": (self.top_k >= 0, "0 (all tokens) or above"),
            "max_tokens": (self.max_tokens >= 1, "at least 1"),
            "stop": (all(self.stop), "strings that are not empty"),
            "batch": (self.batch >= 1, "at least 1"),
            "weights": (self.weights in ("model", "bfloat16"), "model or bfloat16"),
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


class Samples(Protocol):
    """What completes contexts: `Sampler`, or an enumerable policy's."""

    settings: SamplerSettings

    def sample(
        self, prompts: Sequence[Sequence[int]], keys: Tensor, limits: Sequence[int] | None = None
    ) -> list[Completion]: ...

    def mixed(self, other: Any, share: float) -> Samples:
        """What draws from softmax((1 - share) log p + share log p') token by token."""


class Sampler:
    """Draws completions from `model`; use `sample`."""

    def __init__(self, model: Any, tokenizer: Any, settings: SamplerSettings) -> None:
        self.model, self.tokenizer, self.settings = model, tokenizer, settings
        extra = getattr(getattr(causal_model(model), "generation_config", None), "eos_token_id", None)
        self._ends = sorted({tokenizer.eos_token_id, *(extra if isinstance(extra, list) else [extra])} - {None})
        self._limit = context_limit(model)
        self._parts: Parts | None = None
        self._call: ModelCall | None = None
        self._known = False
        self._partner: tuple[Sampler, float] | None = None

    def mixed(self, other: Sampler, share: float) -> Sampler:
        """Draws from softmax((1 - share) log p + share log p') token by token, `other` having the same tokens; same settings."""
        made = copy.copy(self)
        made._partner = (other, share)
        return made

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @torch.no_grad()
    def sample(
        self, prompts: Sequence[Sequence[int]], keys: Tensor, limits: Sequence[int] | None = None
    ) -> list[Completion]:
        """One completion per prompt. `keys` [n, k] int64: what the draw of each depends on (seed, step, prompt, sample).

        `limits` [n]: most tokens of each, at least 1 (None: `settings.max_tokens`). Raises ValueError for an empty prompt, or
        one that leaves no room in the model's context.
        """
        if keys.ndim != 2 or len(keys) != len(prompts):
            raise ValueError(
                f"got keys of shape {list(keys.shape)} for {len(prompts)} prompts: one row of keys per prompt is needed"
            )
        limits = [self.settings.max_tokens] * len(prompts) if limits is None else limits
        for row, prompt in enumerate(prompts):
            self._check(row, prompt, limits[row])
        if not len(prompts):
            return []
        self.model.eval()
        given = [tuple(p) for p in prompts]
        order = sorted(range(len(given)), key=lambda i: (len(given[i]), given[i]), reverse=True)
        made = self._sampled(
            [given[i] for i in order], mix(keys[order].to(self.device)), torch.tensor([limits[i] for i in order])
        )
        return [c for _, c in sorted(zip(order, made, strict=True))]

    def _check(self, row: int, prompt: Sequence[int], tokens: int) -> None:
        if not len(prompt):
            raise ValueError(f"prompt {row} is empty: a completion needs at least one token before it")
        if self._limit is not None and len(prompt) + tokens > self._limit:
            raise ValueError(
                f"prompt {row} has {len(prompt)} tokens; with max_tokens {tokens} it passes the model's "
                f"context of {self._limit}. Shorten or drop it, or lower --max-tokens."
            )

    def _decoding(self, rows: int, longest: int, tokens: int) -> Decoding:
        """Of this model, or of this and another side by side."""
        own = self._own_decoding(rows, longest, tokens)
        if self._partner is None:
            return own
        other, share = self._partner
        other.model.eval()
        return MixedDecoding(own, other._own_decoding(rows, longest, tokens), share)

    def _own_decoding(self, rows: int, longest: int, tokens: int) -> Decoding:
        """The fused form where it knows the architecture and was found equal on first use; else the model as it is."""
        if not self._known:
            rounded = torch.bfloat16 if self.settings.weights == "bfloat16" else None
            self._parts = verified_parts(self.model, rounded) if self.settings.fused else None
            self._known = True
        batch, span = self.settings.batch, longest + tokens
        if self._parts is not None and span <= self._parts.window:
            return FusedDecoding(self._parts, batch, rows, longest, tokens)
        self._call = self._call or ModelCall.probed(self.model)
        pad = self.tokenizer.pad_token_id
        return ModelDecoding(self._call, batch, int(pad if pad is not None else self.tokenizer.eos_token_id))

    def _sampled(self, prompts: Sequence[tuple[int, ...]], key: Tensor, limit: Tensor) -> list[Completion]:
        """Completions of prompts that are sorted by length, longest first; equal ones are neighbours."""
        log = _Log(key, limit.to(key.device))
        decoding = self._decoding(len(prompts), len(prompts[0]), log.width)
        live, begun = key.new_zeros(0), 0
        logits = torch.zeros(0)
        while True:
            room = decoding.room(prompts, begun, len(live))
            if room:
                fresh = decoding.admit(prompts[begun : begun + room])
                logits = torch.cat([logits, fresh]) if len(live) else fresh
                live = torch.cat([live, log.places(begun, begun + room)])
                begun += room
            token, logp = draw(logits, log.noise[live], self.settings)
            going = log.write(live, token, logp, self._ended(log, live, token))
            if going is not None:
                stay = decoding.keep(going)
                live, token = live[stay], token[stay]
                if not bool(going.any()):
                    if begun == len(prompts):
                        return log.completions()
                    live = live[:0]
            live = live + 1
            if len(live):
                logits = decoding.step(token)

    def _ended(self, log: _Log, live: Tensor, token: Tensor) -> Tensor:
        """[B]: index in `REASONS` of why a row ends with its newest token; 0 where it goes on."""
        eos = torch.zeros_like(token)
        for end in self._ends:
            eos = eos + (token == end)
        if self.settings.stop:
            log.tokens[live] = token
            eos = torch.where(eos > 0, eos, 2 * self._stopped(log, live))
        return eos

    def _stopped(self, log: _Log, live: Tensor) -> Tensor:
        """[B]: 1 where the newest token completes a stop string.

        Only the last tokens are decoded: a token that has text has at least one byte of it.
        """
        span = max(len(s.encode()) for s in self.settings.stop) + MARGIN
        tails = [log.tokens[max(at - at % log.width, at + 1 - span) : at + 1].tolist() for at in live.tolist()]
        texts = self.tokenizer.batch_decode(tails, clean_up_tokenization_spaces=False)
        hit = [any(s in text for s in self.settings.stop) for text in texts]
        return torch.tensor(hit, dtype=torch.long, device=live.device)


class _Log:
    """What was drawn, [n * width] each: row i's position t is at place i * width + t. `noise`: the numbers to draw with."""

    def __init__(self, key: Tensor, limit: Tensor) -> None:
        n, self.width, self.limit = len(key), int(limit.max()), limit
        self.noise = uniform(key[:, None], torch.arange(self.width, device=key.device)).reshape(-1)
        self.tokens, self.logp = key.new_zeros(n * self.width), torch.zeros_like(self.noise)
        self.length, self.reason = key.new_zeros(n), key.new_zeros(n)
        self.open = key.new_ones(n, dtype=torch.bool)

    def places(self, first: int, last: int) -> Tensor:
        """Where rows [first, last) begin."""
        return torch.arange(first, last, device=self.tokens.device) * self.width

    def write(self, live: Tensor, token: Tensor, logp: Tensor, ended: Tensor) -> Tensor | None:
        """Note one token per place of `live`; which rows go on [B], None where no row ends with it."""
        self.tokens[live], self.logp[live] = token, logp.double()
        position = live % self.width
        row = live // self.width
        over = (ended > 0) | (position >= self.limit[row] - 1)
        if not bool(over.any()):
            return None
        new = over & self.open[row]
        closed = row[new]
        self.length[closed], self.reason[closed], self.open[closed] = position[new] + 1, ended[new], False
        return self.open[row]

    def completions(self) -> list[Completion]:
        shape = (-1, self.width)
        tokens, logp = self.tokens.view(shape).tolist(), self.logp.view(shape).tolist()
        rows = zip(tokens, logp, self.length.tolist(), self.reason.tolist(), strict=True)
        return [Completion(tuple(t[:n]), tuple(p[:n]), why == 0, REASONS[why]) for t, p, n, why in rows]
