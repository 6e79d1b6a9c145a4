"""Token policies: any Hugging Face causal language model as an emitter of signals.

Prompt tokens are computed and not scored; hidden states go through the head only at scored positions, in chunks. Sequences
are sorted by length into right-padded buckets: exact for causal models, since padding comes after everything that is
scored, and it needs no mask. The model is always in evaluation mode: signals that are compared must not differ by dropout.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from unipo.episodes import Episodes, offsets_of, ranges
from unipo.functional.chunked import chunk_rows, chunked, token_signals

PADDING_WASTE = 1.1
"""A bucket is cut where padding would pass this share of its tokens."""


class ValueHead(nn.Module):
    """V(s_n) from the hidden state that produced action n; starts at 0 everywhere."""

    def __init__(self, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.linear = nn.Linear(width, 1, dtype=dtype)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.linear(hidden).squeeze(-1)


class TokenPolicy:
    """Emits `logp` and `entropy` of the distribution softmax(logits / temperature), and `value` with a value head.

    `context`: which context its tokens are conditioned on (score for the policy, teacher for a teacher).
    `adapter` False computes with LoRA adapters switched off: the reference of an adapted model, without a second copy.
    """

    def __init__(self, model: Any, tokenizer: Any, temperature: float = 1.0, value_head: ValueHead | None = None,
                 context: str = "score", adapter: bool = True) -> None:  # fmt: skip
        self.model, self.tokenizer, self.temperature = model, tokenizer, temperature
        self.value_head, self.context, self.adapter = value_head, context, adapter
        self.model.eval()
        self._head: Callable[[Tensor], Tensor] | None = None
        self._checked = False

    @property
    def emits(self) -> frozenset[str]:
        return frozenset({"logp", "entropy"} | ({"value"} if self.value_head is not None else set()))

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        yield from self.model.named_parameters()
        if self.value_head is not None:
            yield from ((f"value_head.{n}", p) for n, p in self.value_head.named_parameters())

    def total_lengths(self, episodes: Episodes) -> Tensor:
        """[E]: tokens computed per episode, context and actions."""
        context = episodes.context(self.context)
        assert context.offsets is not None
        return episodes.lengths() + episodes.reduce(context.offsets.diff(), level="turn")

    def signals(self, episodes: Episodes, names: Sequence[str]) -> dict[str, Tensor]:
        """Each of `names` as [N], in float32 or better, differentiable in the model's parameters."""
        unknown = sorted(set(names) - self.emits)
        if unknown:
            raise KeyError(f"this policy does not emit {unknown}; it emits {sorted(self.emits)}")
        if not episodes.count("step"):
            return {name: torch.zeros(0, device=self.device) for name in names}
        with self._switched():
            self._verify()
            hidden, order = self._hidden(episodes)
            made = self._emit(hidden, episodes["token"][order].to(self.device), names)
        back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        return {name: value[back] for name, value in made.items()}

    # ---- hidden states -------------------------------------------------------------------------------------------------
    def _hidden(self, episodes: Episodes) -> tuple[Tensor, Tensor]:
        """Hidden states [N, d] that produced the actions, and the flat step index [N] of each (bucket order)."""
        flat, bounds, action = interleaved(episodes, self.context)
        lengths = bounds.diff()
        step_bounds = offsets_of(episodes.lengths())
        states, order = [], []
        for rows in buckets(lengths):
            width = int(lengths[rows].max())
            ids = flat.new_full((len(rows), width), self._pad)
            scored = torch.zeros(len(rows), width, dtype=torch.bool)
            inside = torch.arange(width)[None] < lengths[rows][:, None]
            at = ranges(bounds[rows], lengths[rows])
            ids[inside], scored[inside] = flat[at], action[at]
            before = torch.roll(scored, -1, 1)
            before[:, -1] = False
            if bool(scored[:, 0].any()):
                raise ValueError(
                    "an episode has actions but no context before them: give it a prompt of at least one token"
                )
            states.append(self._last_hidden(ids.to(self.device))[before.to(self.device)])
            order.append(ranges(step_bounds[rows], episodes.lengths()[rows]))
        return torch.cat(states), torch.cat(order)

    @property
    def _pad(self) -> int:
        pad = self.tokenizer.pad_token_id
        return int(pad if pad is not None else self.tokenizer.eos_token_id)

    def _last_hidden(self, ids: Tensor) -> Tensor:
        """Final hidden states [B, T, d]; full logits [B, T, V] for architectures whose head could not be taken apart."""
        if self._head is None:
            return self.model(input_ids=ids, use_cache=False).logits
        return decoder_of(self.model)(input_ids=ids, use_cache=False).last_hidden_state

    # ---- signals from hidden states ------------------------------------------------------------------------------------
    def _emit(self, hidden: Tensor, tokens: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
        made: dict[str, Tensor] = {}
        if "value" in names and self.value_head is not None:
            if self._head is None:
                raise KeyError("this architecture does not expose its hidden states, so it cannot carry a value head")
            made["value"] = self.value_head(hidden)
        if "logp" in names or "entropy" in names:
            head = self._head or (lambda x: x)
            entropy = "entropy" in names

            def signal(h: Tensor, y: Tensor) -> Tensor:
                return token_signals(head(h), y, self.temperature, entropy)

            rows = chunk_rows(self.model.get_input_embeddings().weight.shape[0], 4)
            both = chunked(signal, (hidden, tokens), rows)
            made.update({n: both[:, i] for i, n in enumerate(("logp", "entropy")) if n in names})
        return made

    def _verify(self) -> None:
        """Once: does head(hidden) equal the model's own logits? If not, its own logits are used, at their cost in memory."""
        if self._checked:
            return
        self._checked = True
        ids = torch.arange(1, 7, device=self.device)[None] % self.model.get_input_embeddings().weight.shape[0]
        head = head_of(self.model)
        try:
            with torch.no_grad():
                own = self.model(input_ids=ids, use_cache=False).logits
                ours = head(decoder_of(self.model)(input_ids=ids, use_cache=False).last_hidden_state)
            same = ours.shape == own.shape and torch.allclose(ours.float(), own.float(), rtol=1e-3, atol=1e-3)
        except (AttributeError, TypeError, RuntimeError):
            same = False
        self._head = head if same else None
        if not same:
            warnings.warn(
                f"{type(self.model).__name__}: the output head could not be separated from the model, so full logits are "
                "kept for every position: correct, but with more memory", stacklevel=2,
            )  # fmt: skip

    def _switched(self) -> AbstractContextManager[Any]:
        return nullcontext() if self.adapter else self.model.disable_adapter()

    # ---- saving --------------------------------------------------------------------------------------------------------
    def save(self, folder: str | Path) -> None:
        """The `from_pretrained` layout with the tokenizer; a LoRA model is merged, its adapter saved in `adapter/`."""
        folder, model = Path(folder), self.model
        if hasattr(model, "merge_adapter"):
            model.save_pretrained(folder / "adapter")
            model.merge_adapter()
            try:
                base = model.get_base_model()
                weights = {k.replace(".base_layer", ""): v for k, v in base.state_dict().items() if "lora_" not in k}
                base.save_pretrained(folder, state_dict=weights)
            finally:
                model.unmerge_adapter()
        else:
            model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)


def interleaved(episodes: Episodes, context: str) -> tuple[Tensor, Tensor, Tensor]:
    """Whole token sequences: (tokens [T], offsets [E + 1], is_action [T]), each turn its context and then its actions."""
    column = episodes.context(context)
    assert column.offsets is not None
    before, acted = column.offsets.diff(), episodes.lengths("turn")
    counts = torch.stack([before, acted], 1).reshape(-1)
    starts = offsets_of(counts)[:-1].reshape(-1, 2)
    flat = episodes["token"].new_zeros(int(counts.sum()))
    action = torch.zeros(len(flat), dtype=torch.bool)
    flat[ranges(starts[:, 0], before)] = column.values
    where = ranges(starts[:, 1], acted)
    flat[where], action[where] = episodes["token"], True
    return flat, offsets_of(episodes.reduce(before + acted, level="turn")), action


def buckets(lengths: Tensor) -> list[Tensor]:
    """Row indices by length, longest first, cut where padding passes `PADDING_WASTE` of the tokens inside."""
    order = torch.argsort(lengths, descending=True, stable=True)
    found: list[list[int]] = []
    inside = 0
    for i, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        if found:
            width = int(lengths[found[-1][0]])
            if (len(found[-1]) + 1) * width <= PADDING_WASTE * (inside + length) + 32:
                found[-1].append(i)
                inside += length
                continue
        found.append([i])
        inside = length
    return [torch.tensor(b) for b in found]


def causal_model(model: Any) -> Any:
    """The causal language model inside an adapter, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def decoder_of(model: Any) -> Any:
    """The part of a causal language model that ends in hidden states."""
    inner = causal_model(model)
    return getattr(inner, inner.base_model_prefix)


def head_of(model: Any) -> Callable[[Tensor], Tensor]:
    """Hidden states -> logits, with the scalings and soft caps that architectures put after the linear map."""
    inner = causal_model(model)
    linear, config = inner.get_output_embeddings(), inner.config
    cap = getattr(config, "final_logit_softcapping", None)
    scale = float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)

    def head(hidden: Tensor) -> Tensor:
        logits = linear(hidden)
        logits = logits * scale if scale != 1.0 else logits
        return torch.tanh(logits / cap) * cap if cap else logits

    return head


__all__ = ["TokenPolicy", "ValueHead", "interleaved"]
