"""Token policies: any Hugging Face causal language model as an emitter of signals.

Prompt tokens are computed and not scored; hidden states go through the head only at scored positions, in chunks. All
sequences of a batch are one row of tokens without padding, in which a prompt that several episodes have is computed once
(`layout`, `attention`). An architecture whose attention cannot be taken apart (windows shorter than the batch, soft caps, state
spaces: found out by a trial at first use) has its sequences sorted by length into right-padded buckets instead: exact for
causal models, since padding comes after everything that is scored, and it needs no mask. The model is always in evaluation
mode: signals that are compared must not differ by dropout.

Measured on one CPU core, forward and backward, CPU seconds, buckets -> one row. Qwen2 of 26M parameters, 4 prompts of 256 with
8 completions of 6-61 tokens each, whole update: 8.2 -> 1.5 (2.2 with nothing but the row changed). Qwen3 of 0.9M
parameters, 256 episodes of 11-32 tokens of which 8 are prompt, 8 per prompt: 0.37 -> 0.34; the same without equal prompts 0.37 ->
0.34; 64 episodes of 28-208 tokens 0.59 -> 0.55.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from unipo.episodes import Episodes, offsets_of, ranges
from unipo.functional.chunked import Divergence, Head, Quantity, chunk_rows, chunked, log_probs
from unipo.functional.divergences import kl
from unipo.functional.quantities import PLAIN, quantity
from unipo.policies.attention import Unsupported, attending, last_only_where_scored
from unipo.policies.blocks import same_as_plain, suited, swapped
from unipo.policies.layout import Layout, Sequences, layout, probe_of, read_through, sequences
from unipo.policies.memory import keep_freed_memory

PADDING_WASTE = 1.05
"""A bucket is cut where padding would pass this share of its tokens."""
PROBE = 20.0
"""Largest logit in the check of the head: where soft caps bend, and what trained models have."""
DIVERGENCES = {"reverse_kl": lambda mine, other: kl(mine, other), "forward_kl": lambda mine, other: kl(other, mine)}
"""KL(pi || other) and KL(other || pi), of full distributions [n, V]."""


class ValueHead(nn.Module):
    """V(s_n) from the hidden state that produced action n; starts at 0 everywhere. `names`: of the signals, one per output: of
    several values `value.NAME`."""

    def __init__(self, width: int, dtype: torch.dtype, names: Sequence[str] = ("value",)) -> None:
        super().__init__()
        self.names = tuple(names)
        self.linear = nn.Linear(width, len(self.names), dtype=dtype)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    FILE = "value_head.safetensors"
    """Beside a saved model; its metadata say what it `judges`, and the names of its outputs."""

    def save(self, folder: Path, judges: str) -> None:
        save_file(
            {n: p.detach().contiguous() for n, p in self.state_dict().items()}, folder / self.FILE,
            {"judges": judges, "names": " ".join(self.names)},
        )  # fmt: skip

    def forward(self, hidden: Tensor) -> Tensor:
        """[N, outputs]"""
        return self.linear(hidden)


class TokenPolicy:
    """Emits the quantities of `unipo.functional.quantities` of softmax(logits / temperature) (`parametric` names those with
    parameters that are asked for), and `value` with a value head.

    After `attach("teacher", other)` also `reverse_kl:teacher` = KL(pi || other) and `forward_kl:teacher` = KL(other || pi),
    over the full distribution at each step, the other side constant.

    `context`: which context its tokens are conditioned on (score for the policy, teacher for a teacher).
    `adapter` False computes with LoRA adapters switched off: the reference of an adapted model, without a second copy.
    `judges`: what its value at the end of an answer says: how good it is ("answers"), or how good it is beside the one that
    its context shows ("pairs"); "": what the policy will still earn, if anything.
    """

    scalar_signals = True
    """Every signal is [N]: a learner may guess them before they are known."""

    def __init__(self, model: Any, tokenizer: Any, temperature: float = 1.0, value_head: ValueHead | None = None,
                 context: str = "score", adapter: bool = True) -> None:  # fmt: skip
        self.model, self.tokenizer, self.temperature = model, tokenizer, temperature
        self.value_head, self.context, self.adapter = value_head, context, adapter
        self.judges = ""
        self.attached: dict[str, TokenPolicy] = {}
        self.parametric: frozenset[str] = frozenset()
        self.model.eval()
        self._head: Head | None = None
        self._one_row: bool | None = None
        self._native: bool | None = None

    @property
    def emits(self) -> frozenset[str]:
        divergences = {f"{kind}:{name}" for name in self.attached for kind in DIVERGENCES}
        return PLAIN | self.parametric | divergences | set(self.values)

    @property
    def values(self) -> tuple[str, ...]:
        """Signals of the value head."""
        return self.value_head.names if self.value_head is not None else ()

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def vocabulary(self) -> int:
        """Rows of the output head (some models have more than their tokenizer has tokens)."""
        return int(causal_model(self.model).get_output_embeddings().weight.shape[0])

    @property
    def width(self) -> int:
        """Numbers in a hidden state, d."""
        return int(causal_model(self.model).get_input_embeddings().weight.shape[1])

    def attach(self, name: str, other: TokenPolicy | None) -> None:
        """Emit divergences to `other`, which keeps its own context and temperature; None: this model without its adapter.

        Raises ValueError where the two do not have the same vocabulary, or there is no adapter to switch off.
        """
        if other is None:
            if not hasattr(self.model, "disable_adapter"):
                raise ValueError(
                    f"cannot attach {name!r}: this model has no adapter to switch off, give another policy"
                )
            other = TokenPolicy(self.model, self.tokenizer, self.temperature, context=self.context, adapter=False)
        if other.vocabulary != self.vocabulary:
            raise ValueError(
                f"cannot attach {name!r}: it has {other.vocabulary} words, the policy {self.vocabulary}; a divergence over "
                "the full distribution needs the same vocabulary"
            )
        self.attached[name] = other

    def total_lengths(self, episodes: Episodes) -> Tensor:
        """[E]: tokens computed per episode; a prompt that is computed once for several counts for the first of them."""
        with self._switched():
            shared = self._takes_one_row(self._verified())
        return sequences(episodes, self.context).computed(shared)

    # ---- signals -------------------------------------------------------------------------------------------------------
    def signals(self, episodes: Episodes, names: Sequence[str]) -> dict[str, Tensor]:
        """Each of `names` as [N], in float32 or better, differentiable in the model's parameters.

        Raises KeyError for a name that is not in `emits`; ValueError for an episode without context or beyond the model's.
        """
        unknown = sorted(set(names) - self.emits)
        if unknown:
            raise KeyError(f"this policy does not emit {unknown}; it emits {sorted(self.emits)}")
        if not episodes.count("step"):
            return {name: torch.zeros(0, device=episodes.device) for name in names}
        if self.device.type == "cpu":
            keep_freed_memory()
        tokens = episodes["token"].to(self.device)
        quantities = {name: self._quantity(name, tokens, episodes) for name in names if name not in self.values}
        hidden, head = self.scored(episodes)
        made: dict[str, Tensor] = {}
        if quantities:
            rows = chunk_rows(self.vocabulary, wide_size(hidden))
            made.update(zip(quantities, chunked(hidden, head, list(quantities.values()), rows), strict=True))
        if set(names) & set(self.values):
            columns = dict(zip(self.values, self._value(hidden, head).unbind(-1), strict=True))
            made |= {name: columns[name] for name in names if name in columns}
        return {name: value.to(episodes.device) for name, value in made.items()}

    def scored(self, episodes: Episodes) -> tuple[Tensor, Head]:
        """Hidden states [N, d] that produced the actions, and the head that turns them into logits / temperature."""
        with self._switched():
            head = self._verified()
            return self._hidden(episodes, head), head

    def features(self, episodes: Episodes, layers: Sequence[float]) -> Tensor:
        """[N, K, d]: hidden states at shares of the depth (1: the last layer) when each action has been read; differentiable."""
        if not episodes.count("step"):
            return torch.zeros(0, len(layers), self.width, device=episodes.device)
        longer, read = read_through(episodes)
        found = sequences(longer, self.context)
        with self._switched():
            if not self._takes_one_row(self._verified()):
                return self._in_buckets(found, longer.lengths(), partial(self._inner, layers=layers))[read]
            row = layout(found)
            with attending(decoder_of(self.model).config, row):
                tokens, positions = row.tokens[None].to(self.device), row.positions[None].to(self.device)
                inner = self._inner(tokens, layers, position_ids=positions)[0]
            return inner.index_select(0, row.scored.to(self.device)[read])

    def _inner(self, ids: Tensor, layers: Sequence[float], **inputs: Tensor) -> Tensor:
        """Hidden states of layers [b, L, K, d]."""
        out = decoder_of(self.model)(input_ids=ids, use_cache=False, output_hidden_states=True, **inputs).hidden_states
        return torch.stack([out[max(1, round(share * (len(out) - 1)))] for share in layers], -2)

    def _quantity(self, name: str, tokens: Tensor, episodes: Episodes) -> Quantity:
        kind, _, other = name.partition(":")
        if kind not in DIVERGENCES:
            return quantity(name, episodes, tokens.device)
        with torch.no_grad():
            return Divergence(DIVERGENCES[kind], log_probs(*self.attached[other].scored(episodes)))

    def _value(self, hidden: Tensor, head: Head) -> Tensor:
        if self.value_head is None or head.linear is None:
            raise KeyError("this architecture does not expose its hidden states, so it cannot carry a value head")
        return self.value_head(hidden)

    # ---- hidden states -------------------------------------------------------------------------------------------------
    def _hidden(self, episodes: Episodes, head: Head) -> Tensor:
        """[N, d]; full logits [N, V] where the head could not be taken apart. The last token of a sequence is no input."""
        found = sequences(episodes, self.context)
        self._check(found)
        if self._takes_one_row(head):
            try:
                return self._in_one_row(layout(found))
            except Unsupported as error:
                warnings.warn(f"prompts are not shared in this batch: {error}", stacklevel=2)
        return self._in_buckets(found, episodes.lengths(), partial(self._last_hidden, head=head))

    def _in_one_row(self, row: Layout) -> Tensor:
        native = suited(decoder_of(self.model)) and self._computes_natively()
        return self._through(row, native, input_ids=row.tokens[None].to(self.device))

    def _through(self, row: Layout, native: bool, **inputs: Tensor) -> Tensor:
        """Hidden states [N, d] at the scored places of a row; `native`: computed in C where its modules are known."""
        decoder, positions = decoder_of(self.model), row.positions[None].to(self.device)
        blocks = swapped(decoder) if native else nullcontext()
        with attending(decoder.config, row, native), last_only_where_scored(decoder, row), blocks:
            hidden = decoder(**inputs, position_ids=positions, use_cache=False).last_hidden_state.squeeze(0)
        return hidden.index_select(0, row.scored.to(self.device))

    def _in_buckets(self, found: Sequences, acted: Tensor, states_of: Callable[[Tensor], Tensor]) -> Tensor:
        """[N, ...]: what `states_of` gives of padded tokens [b, L], at the scored places of its [b, L, ...]."""
        flat, bounds, action = found.tokens, found.bounds, found.action
        lengths, steps = bounds.diff() - 1, []
        first, states = offsets_of(acted)[:-1], []
        acting = acted.nonzero().squeeze(1)
        for bucket in buckets(lengths[acting]):
            rows = acting[bucket.to(acting.device)]
            column = torch.arange(int(lengths[rows[0]]), device=flat.device)
            at = bounds[rows, None] + column
            inside = column < lengths[rows, None]
            ids = torch.where(inside, flat[at.clamp(max=len(flat) - 1)], self._pad)
            scored = inside & action[(at + 1).clamp(max=len(flat) - 1)]
            states.append(states_of(ids.to(self.device))[scored.to(self.device)])
            steps.append(ranges(first[rows], acted[rows]))
        back = torch.argsort(torch.cat(steps)).to(self.device)
        return torch.cat(states)[back]

    def _check(self, found: Sequences) -> None:
        lengths, limit = found.bounds.diff(), context_limit(self.model)
        bare = ((lengths > 0) & (found.prompt == 0)).nonzero().squeeze(1)
        if len(bare):
            raise ValueError(
                f"episode {int(bare[0])} has actions but no context before them: give it a prompt of at least one token"
            )
        if limit is not None and len(lengths) and int(lengths.max()) > limit:
            row = int(lengths.argmax())
            raise ValueError(
                f"episode {row} has {int(lengths[row])} tokens, the model's context is {limit}: drop or shorten it"
            )

    @property
    def _pad(self) -> int:
        pad = self.tokenizer.pad_token_id
        return int(pad if pad is not None else self.tokenizer.eos_token_id)

    def _last_hidden(self, ids: Tensor, head: Head) -> Tensor:
        if head.linear is None:
            return self.model(input_ids=ids, use_cache=False).logits
        return decoder_of(self.model)(input_ids=ids, use_cache=False).last_hidden_state

    def _verified(self) -> Head:
        """The head, once checked: does head(hidden) equal the model's own logits? If not, its own logits are used."""
        if self._head is None:
            head = head_of(self.model, self.adapter)
            if not equals_own_logits(self.model, head):
                warnings.warn(
                    f"{type(self.model).__name__}: the output head could not be separated from the model, so full logits "
                    "are kept for every scored position: correct, but with more memory", stacklevel=2,
                )  # fmt: skip
                head = Head(None)
            self._head = replace(head, temperature=self.temperature)
        return self._head

    def _takes_one_row(self, head: Head) -> bool:
        """Whether a `Layout` of a few short sequences gives the hidden states that buckets give; asked once."""
        if self._one_row is None:
            self._one_row = head.linear is not None and self._row_equals_buckets(head)
            if head.linear is not None and not self._one_row:
                warnings.warn(
                    f"{type(self.model).__name__}: its attention could not be taken apart, so prompts are computed for every "
                    "episode that has them: correct, but slower", stacklevel=2,
                )  # fmt: skip
        return self._one_row

    @torch.no_grad()
    def _row_equals_buckets(self, head: Head) -> bool:
        probe, acted = probe_of(self.vocabulary), torch.tensor([3, 3, 1, 4])
        try:
            row = layout(probe)
            mine = self._through(row, False, input_ids=row.tokens[None].to(self.device))
            theirs = self._in_buckets(probe, acted, partial(self._last_hidden, head=head))
        except Exception:  # whatever an architecture does not take: its buckets are used
            return False
        tolerance = min(64 * torch.finfo(theirs.dtype).eps, 0.05)
        return bool((mine - theirs).norm() <= tolerance * theirs.norm())

    def _computes_natively(self) -> bool:
        """Whether `blocks` give the hidden states and gradients of the model's own code; asked once."""
        if self._native is None:
            row, decoder = layout(probe_of(self.vocabulary)), decoder_of(self.model)
            plain, fast = (partial(self._through, row, native) for native in (False, True))
            try:
                self._native = same_as_plain(decoder, plain, fast, row.tokens)
            except Exception:  # a forward that takes or gives something else
                self._native = False
            if not self._native:
                warnings.warn(
                    f"{type(self.model).__name__}: its blocks are not computed in C, which does not give what its own code "
                    "gives: correct, but slower", stacklevel=2,
                )  # fmt: skip
        return self._native

    def _switched(self) -> AbstractContextManager[Any]:
        return nullcontext() if self.adapter else self.model.disable_adapter()

    # ---- parameters and saving -----------------------------------------------------------------------------------------
    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        yield from self.model.named_parameters()
        if self.value_head is not None:
            yield from ((f"value_head.{n}", p) for n, p in self.value_head.named_parameters())

    def parameters(self) -> Iterator[nn.Parameter]:
        """The ones that are trained."""
        return (p for _, p in self.named_parameters() if p.requires_grad)

    def state_dict(self) -> dict[str, Tensor]:
        """What training changes, by name."""
        return {name: p.detach() for name, p in self.named_parameters() if p.requires_grad}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Copy the parameters of `state_dict` back. Raises KeyError where names differ: nothing is copied then."""
        own = self.state_dict()
        if own.keys() != state.keys():
            raise KeyError(f"the state and this policy differ in parameters: {sorted(own.keys() ^ state.keys())[:5]}")
        for name, value in own.items():
            value.copy_(state[name])

    def save(self, folder: str | Path) -> None:
        """The `from_pretrained` layout with the tokenizer, and a value head beside it; a LoRA model is merged, its adapter saved
        in `adapter/`.

        The model itself is not touched (merging in place and back would leave rounding in its weights).
        """
        folder, model = Path(folder), self.model
        if hasattr(model, "merge_and_unload"):
            model.save_pretrained(folder / "adapter")
            self.tokenizer.save_pretrained(folder / "adapter")
            model = copy.deepcopy(model).merge_and_unload()
        model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        if self.value_head is not None:
            self.value_head.save(folder, self.judges)


# ---- layout --------------------------------------------------------------------------------------------------------------
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


def wide_size(x: Tensor) -> int:
    """Bytes of a number in float32 or better."""
    return max(4, x.element_size())


# ---- models --------------------------------------------------------------------------------------------------------------
def causal_model(model: Any) -> Any:
    """The causal language model inside an adapter, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def decoder_of(model: Any) -> Any:
    """The part of a causal language model that ends in hidden states."""
    return causal_model(model).get_decoder()


def context_limit(model: Any) -> int | None:
    """The longest sequence the model has positions for; None: no limit."""
    config = causal_model(model).config
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def head_of(model: Any, adapter: bool = True) -> Head:
    """Hidden states -> logits, with the scalings and soft caps that architectures put after the linear map."""
    inner = causal_model(model)
    linear, config = inner.get_output_embeddings(), inner.config.get_text_config()
    if not adapter and hasattr(linear, "get_base_layer"):
        linear = linear.get_base_layer()
    multipliers = [float(getattr(config, n, None) or 1.0) for n in ("logit_scale", "lm_head_multiplier")]
    scale = multipliers[0] * multipliers[1] / float(getattr(config, "logits_scaling", None) or 1.0)
    return Head(linear, scale, getattr(config, "final_logit_softcapping", None))


@torch.no_grad()
def equals_own_logits(model: Any, head: Head) -> bool:
    """Does head(hidden) equal the model's logits, with hidden states scaled so that the largest logit is `PROBE`?

    Scaled, because a soft cap cannot be seen in the small logits of a model that has not been trained.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    ids = torch.arange(1, 7, device=next(model.parameters()).device)[None] % rows
    scaled: list[Tensor] = []

    def amplify(module: Any, inputs: Any, out: Any) -> Any:
        assert head.linear is not None
        largest = float(head.linear(out.last_hidden_state).abs().max()) * head.scale
        out.last_hidden_state = out.last_hidden_state * (PROBE / largest if largest > 0 else 1.0)
        scaled.append(out.last_hidden_state)
        return out

    hook = None
    try:
        hook = decoder_of(model).register_forward_hook(amplify)
        own = model(input_ids=ids, use_cache=False).logits
        ours = head(scaled[0])
    except (AttributeError, TypeError, RuntimeError, IndexError):
        return False
    finally:
        if hook is not None:
            hook.remove()
    coarse = max(torch.finfo(own.dtype).eps, torch.finfo(scaled[0].dtype).eps, torch.finfo(ours.dtype).eps)
    return ours.shape == own.shape and float((ours - own).abs().max()) <= 8 * coarse * PROBE


__all__ = ["TokenPolicy", "ValueHead"]
