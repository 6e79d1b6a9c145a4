"""The blocks of Llama-like models, computed by `kernels` while a `Layout` is scored.

Modules are known by what they are made of: a norm is one weight and an epsilon, a feed-forward part three maps and a SiLU, and
so on. Whether they also compute what their parts suggest is found out on numbers (`same_as_plain`); where they do not, the
model's own code runs. Linear maps are called as they are, so that adapters and hooks on them go on working.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unipo.policies.attention import attention
from unipo.policies.kernels import gated, library, norm, turned

PROJECTIONS = {"q_proj", "k_proj", "v_proj", "o_proj"}
NORMS_OF_HEADS = {"q_norm", "k_norm"}
TOLERANCE = 64 * torch.finfo(torch.float32).eps
"""Relative, of outputs; ten times as much of gradients."""
Forward = Callable[..., Any]
Compute = Callable[..., Tensor]


def suited(decoder: Any) -> bool:
    """Whether `blocks.c` may compute these weights where they are, in the precision that is asked for now."""
    weight = next(decoder.parameters(), None)
    return (
        weight is not None
        and weight.dtype == torch.float32
        and weight.device.type == "cpu"
        and not decoder.training
        and not torch.is_autocast_enabled("cpu")
        and library() is not None
    )


@contextmanager
def swapped(decoder: Any) -> Iterator[None]:
    """While it lasts, the modules of `decoder` that are known here compute by `kernels`."""
    changed = [(module, forward) for module in decoder.modules() if (forward := _forward_of(module)) is not None]
    for module, forward in changed:
        module.__dict__["forward"] = partial(forward, module)
    try:
        yield
    finally:
        for module, _ in changed:
            del module.__dict__["forward"]


# ---- what a module is --------------------------------------------------------------------------------------------------
def _forward_of(module: nn.Module) -> Forward | None:
    """How a module of this make is computed here; None where its make is not known, or its forward is no longer its class's."""
    if "forward" in module.__dict__:
        return None
    return next((forward for is_one, forward in _KNOWN if is_one(module)), None)


def _children(module: nn.Module) -> set[str]:
    return {name for name, child in module.named_children() if child is not None}


def _is_norm(module: Any) -> bool:
    return (
        isinstance(getattr(module, "variance_epsilon", None), float)
        and [name for name, _ in module.named_parameters()] == ["weight"]
        and module.weight.ndim == 1
    )


def _is_gated(module: Any) -> bool:
    made = _children(module) - {"act_fn"} == {"gate_proj", "up_proj", "down_proj"}
    x = torch.linspace(-4, 4, 9)
    return made and callable(activation := getattr(module, "act_fn", None)) and torch.equal(activation(x), F.silu(x))


def _is_attention(module: Any) -> bool:
    made = _children(module)
    plain = made - NORMS_OF_HEADS == PROJECTIONS and len(made) != 5 and hasattr(module, "head_dim")
    norms = [getattr(module, name) for name in sorted(made & NORMS_OF_HEADS)]
    return plain and all(_is_norm(x) and len(x.weight) == module.head_dim for x in norms)


def _is_layer(module: Any) -> bool:
    norms = ("input_layernorm", "post_attention_layernorm")
    made = _children(module) == {"self_attn", "mlp", *norms}
    return made and all(_is_norm(getattr(module, name)) for name in norms)


# ---- how it is computed ------------------------------------------------------------------------------------------------
def _norm(module: Any, hidden_states: Tensor) -> Tensor:
    return _normed(module, hidden_states)[1]


def _normed(module: Any, x: Tensor, delta: Tensor | None = None) -> tuple[Tensor, Tensor]:
    return norm(x, delta, module.weight, module.variance_epsilon)


def _gated(module: Any, x: Tensor) -> Tensor:
    return module.down_proj(gated(module.gate_proj(x), module.up_proj(x)))


def _attention(
    module: Any, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], **rest: Any
) -> tuple[Tensor, None]:
    def heads(projection: Any, of: str) -> Tensor:
        x, over = projection(hidden_states).unflatten(-1, (-1, module.head_dim)), getattr(module, of, None)
        return turned(x, *position_embeddings, *(() if over is None else (over.weight, over.variance_epsilon)))

    query, key = heads(module.q_proj, "q_norm"), heads(module.k_proj, "k_norm")
    value = module.v_proj(hidden_states).unflatten(-1, (-1, module.head_dim))
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    given = {"scaling": module.scaling, "sliding_window": getattr(module, "sliding_window", None), **rest}
    out, _ = attention(module, query, key, value, **given)
    return module.o_proj(out.flatten(-2)), None


def _layer(module: Any, hidden_states: Tensor, **rest: Any) -> Tensor:
    x, normed = _normed(module.input_layernorm, hidden_states)
    x, normed = _normed(module.post_attention_layernorm, x, module.self_attn(hidden_states=normed, **rest)[0])
    return x + module.mlp(normed)


_KNOWN: tuple[tuple[Callable[[Any], bool], Forward], ...] = (
    (_is_norm, _norm), (_is_gated, _gated), (_is_attention, _attention), (_is_layer, _layer),
)  # fmt: skip


# ---- the check ---------------------------------------------------------------------------------------------------------
def same_as_plain(decoder: Any, plain: Compute, fast: Compute, ids: Tensor) -> bool:
    """Do hidden states, and their gradients in embeddings and in trained vectors, agree between two ways to compute them?

    Both take `inputs_embeds` [1, T, d]. The weights of linear maps are left out: their gradients are torch's own in both.
    """
    with torch.inference_mode(False), torch.enable_grad():
        start = decoder.get_input_embeddings()(ids[None]).detach().clone().requires_grad_()
        trained = [start, *(p for p in decoder.parameters() if p.ndim == 1 and p.requires_grad)]

        def found(compute: Compute) -> list[Tensor]:
            hidden = compute(inputs_embeds=start)
            direction = torch.linspace(-20, 40, hidden.numel()).reshape(hidden.shape).sin()
            slopes = torch.autograd.grad((hidden * direction).sum(), trained, allow_unused=True, materialize_grads=True)
            return [hidden.detach(), *slopes]

        (mine, *slopes), (theirs, *expected) = found(fast), found(plain)
    return _close([mine], [theirs], TOLERANCE) and _close(slopes, expected, 10 * TOLERANCE)


def _close(found: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float) -> bool:
    """Each within `tolerance` of its size, or of a thousandth of the largest size."""
    floor = max(float(x.norm()) for x in expected) / 1000
    return all(
        float((a - b).norm()) <= tolerance * max(float(b.norm()), floor) for a, b in zip(found, expected, strict=True)
    )
