"""Kernels of norms, rotations, gates and attention against torch; which modules they stand in for, and when they do not."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.policies.models import saved
from unipo.episodes import Episodes
from unipo.policies import TokenPolicy, blocks, kernels, load_policy
from unipo.policies.attention import in_sequences
from unipo.policies.layout import layout, sequences

needs_compiler = pytest.mark.skipif(kernels.library() is None, reason="no C compiler")
PROMPT = [20, 21, 22, 23, 24, 25, 26, 27]


def batch() -> Episodes:
    return Episodes.build(
        [[5, 6, 1], [7, 9, 8, 6], [8, 9], [10, 11, 12, 1], [9]], [PROMPT, PROMPT, [30, 31], PROMPT[:-1], PROMPT]
    )


def leaves(*shapes: tuple[int, ...]) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(shape, requires_grad=True) for shape in shapes]


def agree(fast: Callable[..., Any], slow: Callable[..., Any], inputs: list[Tensor]) -> None:
    """Outputs to 1e-6 and gradients to 1e-5 of their size; the slow twin in float64."""
    wide = [x.detach().double().requires_grad_() for x in inputs]
    mine, theirs = (out if isinstance(out, tuple) else (out,) for out in (fast(*inputs), slow(*wide)))
    directions = [torch.randn_like(x) for x in mine]
    slopes = torch.autograd.grad(mine, inputs, directions)
    expected = torch.autograd.grad(theirs, wide, [d.double() for d in directions])
    for found, known, tolerance in ((mine, theirs, 1e-6), (slopes, expected, 1e-5)):
        for a, b in zip(found, known, strict=True):
            assert float((a - b).detach().norm()) <= tolerance * float(b.detach().norm())


# ---- kernels -----------------------------------------------------------------------------------------------------------
def root_mean_square_norm(x: Tensor, weight: Tensor) -> Tensor:
    return weight * x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt()


@needs_compiler
@pytest.mark.parametrize("shape", [(1, 3), (2, 65, 7), (130, 32)])
def test_norms(shape: tuple[int, ...]) -> None:
    def summed(x: Tensor, delta: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return x + delta, root_mean_square_norm(x + delta, weight)

    x, delta, weight = leaves(shape, shape, shape[-1:])
    agree(lambda *given: kernels.norm(*given, 1e-3), summed, [x, delta, weight])
    agree(lambda x, w: kernels.norm(x, None, w, 1e-3), lambda x, w: (x, root_mean_square_norm(x, w)), [x, weight])
    agree(lambda x, w: kernels.norm(x.mT, None, w, 1e-3)[1], lambda x, w: root_mean_square_norm(x.mT, w),
          leaves((shape[-1], 9), shape[-1:]))  # fmt: skip


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    front, back = x.chunk(2, -1)
    return x * cos[..., None, :] + torch.cat([-back, front], -1) * sin[..., None, :]


@needs_compiler
@pytest.mark.parametrize("size", [2, 10, 32, 64, 128])
@pytest.mark.parametrize("heads", [1, 3])
def test_rotations(size: int, heads: int) -> None:
    """Cosines and sines of any kind: the two halves may have angles of their own. Heads may lie transposed in memory."""
    x, weight = leaves((67, heads, size), (size,))
    cos, sin = torch.randn(2, 67, size)
    agree(lambda x: kernels.turned(x, cos, sin), lambda x: rotated(x, cos, sin), [x])
    agree(lambda x, w: kernels.turned(x, cos, sin, w, 1e-3),
          lambda x, w: rotated(root_mean_square_norm(x, w), cos, sin), [x, weight])  # fmt: skip
    agree(lambda x: kernels.turned(x.transpose(0, 1), cos, sin), lambda x: rotated(x.transpose(0, 1), cos, sin),
          leaves((heads, 67, size)))  # fmt: skip
    with pytest.raises(TypeError, match="do not suit"):
        kernels.turned(x, cos[:, :-1], sin)


@needs_compiler
def test_gates() -> None:
    agree(kernels.gated, lambda gate, up: F.silu(gate) * up, leaves((3, 37), (3, 37)))
    far = torch.tensor([-1000.0, -90.0, 90.0, 1000.0], requires_grad=True)
    found = kernels.gated(far, torch.ones(4))
    torch.testing.assert_close(found, F.silu(far), atol=1e-30, rtol=1e-6)
    torch.testing.assert_close(torch.autograd.grad(found.sum(), far)[0], torch.tensor([0.0, 0.0, 1.0, 1.0]))


@needs_compiler
@pytest.mark.parametrize("size", [6, 32, 80])
@pytest.mark.parametrize("heads", [(4, 2), (3, 1)])
def test_attention(heads: tuple[int, int], size: int) -> None:
    """Runs longer and shorter than a tile, behind prompts and alone, of heads that share keys."""
    made = layout(sequences(Episodes.build([[5] * n for n in (41, 3, 75, 1, 33, 9)],
                                           [PROMPT] * 3 + [list(range(40))] * 2 + [[3]]), "score"))  # fmt: skip
    runs, tokens = kernels.Runs.of(made), len(made.tokens)
    assert int(runs.each[:, 1].sum()) == tokens
    assert len(runs.family) == 4

    def slow(*states: Tensor) -> Tensor:
        query, key, value = (x.transpose(0, 1) for x in states)
        return in_sequences(query, key, value, made, 0.4)

    agree(
        lambda *states: kernels.attended(*states, runs, 0.4),
        slow,
        leaves(*((tokens, n, size) for n in (heads[0], *heads[1:] * 2))),
    )


@needs_compiler
def test_runs_by_hand() -> None:
    """One family: the prompt, and the runs behind it; a sequence alone is its own."""
    runs = kernels.Runs.of(layout(sequences(batch(), "score")))
    assert runs.each.tolist() == [[0, 10, 0, 0], [10, 8, 10, 0], [21, 3, 10, 8], [24, 2, 10, 8], [18, 3, 18, 0]]
    assert (runs.family.tolist(), runs.longest) == ([0, 1, 4, 5], 11)


@needs_compiler
def test_results_do_not_depend_on_threads() -> None:
    def found() -> list[Tensor]:
        x, gate, weight = leaves((300, 4, 32), (300, 4, 32), (32,))
        cos, sin = torch.randn(2, 300, 32, generator=torch.Generator().manual_seed(0))
        made = layout(sequences(Episodes.build([[5] * 41] * 5, [PROMPT] * 3 + [[3] * 29] * 2), "score"))
        seen = kernels.attended(*(x[: len(made.tokens)] for x in (x, gate, gate)), kernels.Runs.of(made), 0.2)
        y = kernels.gated(kernels.turned(kernels.norm(x, gate, weight, 1e-3)[1], cos, sin, weight, 1e-3), gate)
        y = torch.cat([y, seen])
        return [y, *torch.autograd.grad(y.sum(), [x, gate, weight])]

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = found()
        torch.set_num_threads(3)
        assert all(torch.equal(a, b) for a, b in zip(alone, found(), strict=True))
    finally:
        torch.set_num_threads(threads)


@needs_compiler
def test_other_precisions_are_refused() -> None:
    with pytest.raises(TypeError, match="float32"):
        kernels.gated(torch.randn(3, dtype=torch.bfloat16), torch.randn(3, dtype=torch.bfloat16))


# ---- models ------------------------------------------------------------------------------------------------------------
KNOWN = {
    "qwen3": {"_layer": 2, "_attention": 2, "_norm": 9, "_gated": 2},
    "llama": {"_layer": 2, "_attention": 2, "_norm": 5, "_gated": 2},
    "mixtral": {"_layer": 2, "_attention": 2, "_norm": 5},
    "gemma": {"_attention": 2},
    "gpt2": {},
}


@needs_compiler
@pytest.mark.parametrize("name", list(KNOWN))
def test_modules_are_known_by_their_parts_and_are_themselves_again(name: str, tmp_path: Path) -> None:
    decoder = load_policy(str(saved(name, tmp_path))).model.get_decoder()
    with blocks.swapped(decoder):
        inside = [m.__dict__["forward"].func.__name__ for m in decoder.modules() if "forward" in m.__dict__]
        assert not any(blocks._forward_of(m) for m in decoder.modules() if "forward" in m.__dict__)
    assert Counter(inside) == KNOWN[name]
    assert not any("forward" in m.__dict__ for m in decoder.modules())


def scored(policy: TokenPolicy) -> list[Tensor]:
    """Signals, and their gradients in every parameter."""
    logp = policy.signals(batch(), ["logp"])["logp"]
    trained = list(policy.parameters())
    slopes = torch.autograd.grad(
        (logp * torch.linspace(-1, 2, len(logp))).sum(), trained, materialize_grads=True, allow_unused=True
    )
    return [logp.detach(), *slopes]


@needs_compiler
@pytest.mark.parametrize("name", list(KNOWN))
def test_signals_and_gradients_equal_the_models_own_code(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = load_policy(str(saved(name, tmp_path)))
    fast = scored(policy)
    assert policy._native
    policy._native = False
    for a, b in zip(fast, scored(policy), strict=True):
        assert float((a - b).norm()) <= 2e-5 * float(b.norm()) + 1e-7


@needs_compiler
def test_adapters_are_trained_through(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    whole = load_policy(str(saved("qwen3", tmp_path)))
    model = get_peft_model(whole.model, LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False))
    policy = TokenPolicy(model, whole.tokenizer)
    fast = scored(policy)
    assert policy._native
    policy._native = False
    for a, b in zip(fast, scored(policy), strict=True):
        assert float((a - b).norm()) <= 2e-5 * float(b.norm()) + 1e-7


@needs_compiler
def test_a_module_that_computes_something_else_is_left_to_itself(tmp_path: Path) -> None:
    """Parts like those of a known norm, and another result: one line, and what the model's own code gives."""
    policy = load_policy(str(saved("qwen3", tmp_path)))
    norm = policy.model.model.norm

    class Shifted(type(norm)):  # type: ignore[misc]
        def forward(self, hidden_states: Tensor) -> Tensor:
            return super().forward(hidden_states) + 0.01

    norm.__class__ = Shifted
    with pytest.warns(UserWarning, match="not computed in C"):
        found = policy.signals(batch(), ["logp"])["logp"]
    assert policy._native is False
    torch.testing.assert_close(found, policy.signals(batch(), ["logp"])["logp"])


@needs_compiler
def test_mixed_precision_and_other_weights_are_left_to_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def called(*_: Any) -> None:
        raise AssertionError("a kernel was called")

    monkeypatch.setattr(kernels, "_call", called)
    policy = load_policy(str(saved("qwen3", tmp_path)))
    policy._one_row = True
    with torch.autocast("cpu", dtype=torch.bfloat16):
        policy.signals(batch(), ["logp"])
    policy.model.train()
    policy.signals(batch(), ["logp"])
    policy.model.eval().to(torch.bfloat16)
    policy.signals(batch(), ["logp"])
    assert policy._native is None


def test_without_a_compiler_torch_computes_and_one_line_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = load_policy(str(saved("qwen3", tmp_path / "model")))
    expected = policy.signals(batch(), ["logp"])["logp"]
    policy = load_policy(str(tmp_path / "model"))
    monkeypatch.setenv("CC", "false")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    kernels.library.cache_clear()
    try:
        with pytest.warns(UserWarning, match="scoring in torch") as told:
            found = policy.signals(batch(), ["logp"])["logp"]
        assert len([w for w in told if "scoring in torch" in str(w.message)]) == 1
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            policy.signals(batch(), ["logp"])
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)
    finally:
        kernels.library.cache_clear()
