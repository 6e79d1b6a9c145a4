"""The weights of Llama-like models, laid out for decoding: copies that are made at the beginning of every `sample` call.

Query, key and value maps are one matrix, gate and up maps one; the scale of the norm before each is multiplied in, and all
are in an order in which the product with a few rows is fast on a CPU. LoRA updates are added to the copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unipo.functional.chunked import Head
from unipo.policies.token import causal_model, head_of
from unipo.sources.text.native import Library, Panels, library

KINDS = frozenset({"llama", "mistral", "qwen2", "qwen3"})
ROTATIONS = frozenset({"default", "linear", "llama3", "yarn"})
"""Rotary embeddings whose angles do not depend on the sequence's length."""
ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}


Matrix = Tensor | Panels


@dataclass(frozen=True, slots=True)
class Layer:
    """Weights [in, out] of one layer, the norms' scales inside; `qk` [H + K, h] scales queries and keys after their norm."""

    qkv: Matrix
    qkv_bias: Tensor | None
    qk: Tensor | None
    out: Matrix
    out_bias: Tensor | None
    gate_up: Matrix
    gate_up_bias: Tensor | None
    down: Matrix
    down_bias: Tensor | None


@dataclass(frozen=True, slots=True)
class Parts:
    """The modules of a model that can be decoded here. `window`: longest sequence that attends to all of itself.

    `native`: compiled functions that decode it, None where torch's operations do. `dtype`: of the copied matrices.
    """

    inner: Any
    head: Head
    heads: int
    keys: int
    size: int
    eps: float
    scaling: float
    window: int
    native: Library | None
    dtype: torch.dtype

    @classmethod
    def of(cls, model: Any) -> Parts | None:
        """None where the model's kind, modules or precision are not known here."""
        inner, config = causal_model(model), causal_model(model).config
        if config.model_type not in KINDS or getattr(inner.model.rotary_emb, "rope_type", "") not in ROTATIONS:
            return None
        if inner.dtype == torch.float64:  # these models' norms compute in float32 then, which is not copied here
            return None
        head, layers = head_of(model), inner.model.layers
        if not all(map(_plain, layers)) or not _map_alone(head.linear):
            return None
        first = layers[0].self_attn
        windows = [
            getattr(x, "sliding_window", None) or 1 << 60 for x in (config, *(layer.self_attn for layer in layers))
        ]
        heads, keys = (linear.out_features // first.head_dim for linear in (first.q_proj, first.k_proj))
        suits = inner.dtype == torch.float32 and inner.device.type == "cpu" and first.head_dim % 4 == 0
        return cls(inner, head, heads, keys, first.head_dim, _eps(layers[0].input_layernorm), first.scaling, min(windows),
                   library() if suits else None, inner.dtype)  # fmt: skip

    @torch.no_grad()
    def layers(self) -> list[Layer]:
        """Copies of the weights as they are now."""
        return [self._layer(layer) for layer in self.inner.model.layers]

    def _layer(self, layer: Any) -> Layer:
        attention, mlp = layer.self_attn, layer.mlp
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        before, scale, qk = layer.input_layernorm.weight, self.scaling, None
        if hasattr(attention, "q_norm"):
            each = (
                (attention.q_norm.weight * scale).expand(self.heads, -1),
                attention.k_norm.weight.expand(self.keys, -1),
            )
            qk, scale = torch.cat(each), 1.0
        return Layer(*self._matrix(projections, before, self.heads * self.size, scale), qk,
                     *self._matrix((attention.o_proj,)),
                     *self._matrix((mlp.gate_proj, mlp.up_proj), layer.post_attention_layernorm.weight),
                     *self._matrix((mlp.down_proj,)))  # fmt: skip

    @torch.no_grad()
    def output(self) -> Matrix:
        """The head's weights, transposed, with the last norm's scale."""
        return self._matrix((self.head.linear,), self.inner.model.norm.weight)[0]

    def _matrix(
        self, linears: Sequence[Any], before: Tensor | None = None, first: int = 0, scale: float = 1.0
    ) -> tuple[Matrix, Tensor | None]:
        """`_joined`, with the memory in the order that products want: panels, or transposed; rounded matrices as they are."""
        joined, bias = _joined(linears, before, first, scale)
        if self.dtype != joined.dtype:
            return joined.to(self.dtype).t(), bias
        return joined.t().contiguous() if self.native is None else Panels.of(self.native, joined), bias

    def rotations(self, length: int) -> tuple[Tensor, Tensor]:
        """Cosines [length, h] and sines [length, h / 2] of positions."""
        weight = self.inner.model.embed_tokens.weight
        cos, sin = self.inner.model.rotary_emb(weight[:1, None], torch.arange(length, device=weight.device)[None])
        return cos[0], sin[0, :, : self.size // 2].contiguous()


def _plain(layer: Any) -> bool:
    """Is this decoder layer made of the modules that `_forward` computes, and of no others?"""
    children = {name for name, _ in layer.named_children()}
    attention, mlp = layer.self_attn, layer.mlp
    inside = {name for name, _ in attention.named_children()}
    linears = [getattr(attention, n, None) for n in sorted(ATTENTION)]
    linears += [getattr(mlp, n, None) for n in ("gate_proj", "up_proj", "down_proj")]
    return (
        children == {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
        and inside in (ATTENTION, ATTENTION | {"q_norm", "k_norm"})
        and _is_silu(getattr(mlp, "act_fn", None))
        and all(_mergeable(linear) for linear in linears)
    )


def _map_alone(linear: Any) -> bool:
    return type(linear) is nn.Linear and linear.bias is None


def _is_silu(activation: Any) -> bool:
    x = torch.linspace(-4, 4, 9)
    return callable(activation) and torch.equal(activation(x), F.silu(x))


def _mergeable(linear: Any) -> bool:
    """A plain linear map, or one with plain LoRA updates that are switched on and not merged."""
    if type(linear) is nn.Linear:
        return True
    plain = type(getattr(linear, "base_layer", None)) is nn.Linear and hasattr(linear, "get_delta_weight")
    return plain and not any((linear.merged, linear.disable_adapters, *getattr(linear, "use_dora", {}).values(),
                              *getattr(linear, "lora_bias", {}).values()))  # fmt: skip


def _joined(linears: Sequence[Any], before: Tensor | None, first: int, scale: float) -> tuple[Tensor, Tensor | None]:
    """[sum of outputs, d]: the weights one below the other, columns times `before` [d], the `first` rows times `scale`; and
    their biases, if there are any."""
    weights = [_weight(linear) for linear in linears]
    joined = torch.cat(weights)
    if before is not None:
        joined *= before
    biases = [_base(linear).bias for linear in linears]
    zeros = [w.new_zeros(len(w)) for w in weights]
    bias = torch.cat([z if b is None else b for b, z in zip(biases, zeros, strict=True)])
    if scale != 1.0:
        joined[:first] *= scale
        bias[:first] *= scale
    return joined, None if all(b is None for b in biases) else bias


def _base(linear: Any) -> Any:
    return linear if type(linear) is nn.Linear else linear.base_layer


def _weight(linear: Any) -> Tensor:
    weight = _base(linear).weight
    for adapter in getattr(linear, "active_adapters", ()):
        if adapter in linear.lora_A:
            weight = weight + linear.get_delta_weight(adapter)
    return weight


def _eps(norm: Any) -> float:
    return float(norm.variance_epsilon)
