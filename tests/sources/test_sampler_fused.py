"""Fused and native decoding beside the model itself: the same tokens and log-probs, and few rows computed for nothing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from scipy import stats
from transformers import AutoModelForCausalLM, MistralConfig, Qwen2Config

from tests.policies.models import configurations, saved
from unipo.policies import load_policy
from unipo.policies.token import TokenPolicy
from unipo.sources.text import native
from unipo.sources.text.drawing import inverted, mix, uniform
from unipo.sources.text.fused import FusedDecoding, verified_parts
from unipo.sources.text.fused_weights import Parts
from unipo.sources.text.sampler import Completion, Sampler, SamplerSettings

PROMPTS = [[20, 21], [22, 23, 24, 25, 26, 27, 28], [29], [30, 31, 32, 33]] * 5
KEYS = torch.arange(20)[:, None]
needs_compiler = pytest.mark.skipif(native.library() is None, reason="no C compiler")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_policy(str(saved("qwen3", tmp_path_factory.mktemp("model")))).tokenizer


def model_of(name: str) -> Any:
    """Tiny models with weights large enough for attention, biases and norms to matter."""
    known = configurations(300)
    qwen2 = Qwen2Config(**{**known["llama"].to_dict(), "model_type": "qwen2"})
    mistral = MistralConfig(**{**known["llama"].to_dict(), "model_type": "mistral", "sliding_window": 10})
    config = {**known, "qwen2": qwen2, "mistral": mistral}[name]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.15 if parameter.ndim > 1 else 0.3))
    model.generation_config.eos_token_id = [1, *range(100, 130)]
    return model


def sampler(model: Any, tokenizer: Any, form: str, **settings: Any) -> Sampler:
    made = Sampler(model, tokenizer, SamplerSettings(**{"max_tokens": 10, "fused": form != "model", **settings}))
    if form != "model":
        parts = verified_parts(model)
        assert parts is not None
        assert (parts.native is not None) == (native.library() is not None)
        made._known, made._parts = True, parts if form == "native" else replace(parts, native=None)
    return made


def compare(a: list[Completion], b: list[Completion]) -> None:
    for x, y in zip(a, b, strict=True):
        assert x.tokens == y.tokens
        assert x.stop_reason == y.stop_reason
        torch.testing.assert_close(torch.tensor(x.logp), torch.tensor(y.logp), atol=3e-5, rtol=1e-5)


@pytest.mark.parametrize("form", [pytest.param("native", marks=needs_compiler), "torch"])
@pytest.mark.parametrize("name", ["qwen3", "llama", "qwen2"])
def test_forms_agree(name: str, form: str, tokenizer: Any) -> None:
    """Uneven prompts; all at once, and in few places that are filled again and again (the columns are moved, too)."""
    model = model_of(name)
    expected = sampler(model, tokenizer, "model").sample(PROMPTS, KEYS)
    assert {c.stop_reason for c in expected} == {"eos", "length"}
    for batch in (256, 3):
        made = sampler(model, tokenizer, form, batch=batch)
        compare(made.sample(PROMPTS, KEYS), expected)
        assert made._call is None
    for settings in ({"temperature": 0.0}, {"temperature": 1.7, "top_k": 7, "top_p": 0.8}, {"temperature": 0.6}):
        compare(*(sampler(model, tokenizer, f, **settings).sample(PROMPTS, KEYS) for f in (form, "model")))


@pytest.mark.parametrize("form", [pytest.param("native", marks=needs_compiler), "torch"])
def test_weights_are_those_of_the_call(form: str, tokenizer: Any) -> None:
    model = model_of("qwen3")
    made = sampler(model, tokenizer, form)
    before = made.sample(PROMPTS, KEYS)
    assert made.sample(PROMPTS, KEYS) == before
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    after = made.sample(PROMPTS, KEYS)
    assert after != before
    compare(after, sampler(model, tokenizer, "model").sample(PROMPTS, KEYS))


@pytest.mark.parametrize("form", [pytest.param("native", marks=needs_compiler), "torch"])
def test_adapters_are_added_to_the_weights(form: str, tokenizer: Any) -> None:
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
    model = get_peft_model(model_of("qwen3"), config).eval()
    slow = sampler(model, tokenizer, "model")
    adapted = sampler(model, tokenizer, form).sample(PROMPTS, KEYS)
    compare(adapted, slow.sample(PROMPTS, KEYS))
    with model.disable_adapter():
        plain = Sampler(model, tokenizer, SamplerSettings(max_tokens=10)).sample(PROMPTS, KEYS)
        assert plain != adapted
        compare(plain, slow.sample(PROMPTS, KEYS))


@pytest.mark.parametrize("name", ["gemma", "gemma2", "mixtral", "mamba", "qwen3_moe", "cohere", "granite", "falcon_h1"])
def test_other_architectures_are_called_as_they_are(name: str) -> None:
    assert Parts.of(model_of(name)) is None


def test_float64_and_adapters_that_are_no_plain_updates_are_called_as_they_are() -> None:
    assert Parts.of(model_of("qwen3").double()) is None
    assert Parts.of(get_peft_model(model_of("qwen3"), LoraConfig(target_modules=["q_proj"], use_dora=True))) is None


def test_a_window_is_decoded_by_the_model_where_a_sequence_passes_it(tokenizer: Any) -> None:
    model = model_of("mistral")
    assert (made := Parts.of(model)) is not None
    assert made.window == 10
    short, long = (sampler(model, tokenizer, "torch", max_tokens=n) for n in (3, 10))
    short.sample(PROMPTS, KEYS)
    assert short._call is None
    compare(long.sample(PROMPTS, KEYS), sampler(model, tokenizer, "model").sample(PROMPTS, KEYS))
    assert long._call is not None


def test_a_model_with_other_logits_is_told_and_called(tokenizer: Any) -> None:
    class Doubled(type(model_of("llama"))):  # type: ignore[misc]
        def forward(self, *arguments: Any, **keywords: Any) -> Any:
            out = super().forward(*arguments, **keywords)
            out.logits = out.logits * 2
            return out

    model = model_of("llama")
    model.__class__ = Doubled
    with pytest.warns(UserWarning, match="fused decoding does not give this model's logits"):
        done = Sampler(model, tokenizer, SamplerSettings(max_tokens=6)).sample(PROMPTS, KEYS)
    compare(done, sampler(model, tokenizer, "model", max_tokens=6).sample(PROMPTS, KEYS))


def test_half_precision_records_what_the_policy_would_say(tokenizer: Any) -> None:
    model = model_of("llama").bfloat16()
    assert (parts := verified_parts(model)) is not None
    assert parts.native is None
    done = Sampler(model, tokenizer, SamplerSettings(max_tokens=6)).sample(PROMPTS[:4], KEYS[:4])
    assert all(len(c.tokens) == len(c.logp) for c in done)


# ---- counts ------------------------------------------------------------------------------------------------------------
def test_no_row_is_computed_for_nothing_and_places_are_filled_again(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[int] = []
    prompted: list[int] = []
    step, prefilled = FusedDecoding.step, FusedDecoding._prefilled

    def counted_step(self: FusedDecoding, token: torch.Tensor) -> torch.Tensor:
        rows.append(len(token))
        return step(self, token)

    def counted_prefill(self: FusedDecoding, prompts: Any, index: torch.Tensor) -> torch.Tensor:
        prompted.append(len(prompts))
        return prefilled(self, prompts, index)

    monkeypatch.setattr(FusedDecoding, "step", counted_step)
    monkeypatch.setattr(FusedDecoding, "_prefilled", counted_prefill)
    made = Sampler(model_of("qwen3"), tokenizer, SamplerSettings(max_tokens=40, batch=16))
    made._decoding(1, 2, 40)
    rows.clear()
    prompted.clear()
    done = made.sample([[20 + i // 8, 21] for i in range(128)], torch.arange(128)[:, None])
    lengths = [len(c.tokens) for c in done]
    assert sum(rows) == sum(lengths) - 128
    assert len(rows) <= 1.6 * sum(rows) / 16 + 40
    assert len(set(lengths)) > 10
    assert sum(prompted) == 16


def natively(logits: torch.Tensor, u: torch.Tensor, temperature: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    library = native.library()
    assert library is not None
    return native.drawn(library, logits, u, temperature)


# ---- drawing -----------------------------------------------------------------------------------------------------------
@needs_compiler
@pytest.mark.parametrize("words", [1, 5, 63, 64, 65, 300, 1000])
def test_native_draws_are_the_torch_draws(words: int) -> None:
    generator = torch.Generator().manual_seed(words)
    logits = torch.randn(500, words, generator=generator) * torch.logspace(-2, 2, 500)[:, None]
    u = uniform(mix(torch.arange(500)[:, None]), 3)
    u[:2] = torch.tensor([0.0, 1 - 2**-53])
    for temperature in (1.0, 0.7):
        token, logp = natively(logits, u, temperature)
        expected, of_expected = inverted(logits / temperature, u)
        assert int((token != expected).sum()) <= 1
        same = token == expected
        torch.testing.assert_close(logp[same], of_expected[same], atol=2e-5, rtol=2e-6)


@pytest.mark.parametrize("draw", [inverted, pytest.param(natively, marks=needs_compiler)])
def test_frequencies_over_many_blocks(draw: Any) -> None:
    z = torch.linspace(-2, 2, 150)[torch.randperm(150, generator=torch.Generator().manual_seed(0))]
    z[:7] = -200.0
    token, logp = draw(z.repeat(40_000, 1), uniform(mix(torch.arange(40_000)[:, None]), 0))
    p = z.double().softmax(0)
    counts = torch.bincount(token, minlength=150)
    assert int(counts[:7].sum()) == 0
    assert stats.chisquare(counts[7:].numpy(), (p[7:] / p[7:].sum() * 40_000).numpy()).pvalue > 1e-3
    torch.testing.assert_close(logp.double(), p.log()[token], atol=2e-6, rtol=2e-6)


@needs_compiler
@pytest.mark.parametrize(("rows", "inside", "out"), [(1, 4, 64), (6, 32, 130), (13, 300, 63), (64, 20, 200)])
def test_native_products(rows: int, inside: int, out: int) -> None:
    """Every number of rows that is left over, panels that are not full, and more than one part of a panel."""
    library = native.library()
    assert library is not None
    x, w = torch.randn(rows, inside), torch.randn(out, inside)
    torch.testing.assert_close(native.Panels.of(library, w)(x), x @ w.t(), atol=1e-4, rtol=1e-4)


def test_rounded_weights_sample_near_the_model_and_record_what_was_sampled(tokenizer: Any) -> None:
    from unipo.episodes import Episodes

    model = model_of("qwen3")
    done = Sampler(model, tokenizer, SamplerSettings(max_tokens=10, weights="bfloat16")).sample(PROMPTS, KEYS)
    episodes = Episodes.build([c.tokens for c in done], PROMPTS)
    behavior = torch.tensor([x for c in done for x in c.logp])
    with torch.no_grad():
        logp = TokenPolicy(model, tokenizer).signals(episodes, ["logp"])["logp"]
    assert 1e-4 < float((logp - behavior).abs().mean()) < 0.2


# ---- machines ----------------------------------------------------------------------------------------------------------
def test_a_machine_without_a_compiler_uses_torch(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    native.library.cache_clear()
    try:
        made = Sampler(model_of("llama"), tokenizer, SamplerSettings(max_tokens=4))
        made.sample(PROMPTS, KEYS)
        assert made._parts is not None
        assert made._parts.native is None
    finally:
        native.library.cache_clear()


def test_a_compiler_that_fails_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CC", "false")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    native.library.cache_clear()
    try:
        with pytest.warns(UserWarning, match="decoding in torch"):
            assert native.library() is None
        assert not list(tmp_path.rglob("*.so"))
    finally:
        native.library.cache_clear()


def test_recorded_log_probs_are_the_policys(tokenizer: Any) -> None:
    from unipo.episodes import Episodes

    model = model_of("qwen3")
    done = Sampler(model, tokenizer, SamplerSettings(max_tokens=10)).sample(PROMPTS, KEYS)
    with torch.no_grad():
        episodes = Episodes.build([c.tokens for c in done], PROMPTS)
        logp = TokenPolicy(model, tokenizer).signals(episodes, ["logp"])["logp"]
    torch.testing.assert_close(logp, torch.tensor([x for c in done for x in c.logp]), atol=5e-5, rtol=1e-5)
