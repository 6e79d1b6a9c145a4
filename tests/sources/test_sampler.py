"""The sampler: right frequencies, right log-probs, and draws that depend on their key alone."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from scipy import stats
from transformers import AutoModelForCausalLM, RwkvConfig

from tests.policies.models import saved
from unipo.episodes import Episodes
from unipo.policies import TokenPolicy, load_policy
from unipo.sources.text.decoding import taken
from unipo.sources.text.drawing import draw, mix, truncated_logp, uniform
from unipo.sources.text.sampler import Completion, Sampler, SamplerSettings


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_policy(str(saved("qwen3", tmp_path_factory.mktemp("model"))))


def sample(policy: Any, prompts: list[list[int]], keys: torch.Tensor, **settings: Any) -> list[Completion]:
    return Sampler(policy.model, policy.tokenizer, SamplerSettings(**{"max_tokens": 8, **settings})).sample(
        prompts, keys
    )


def test_frequencies_are_those_of_the_distribution() -> None:
    logits = torch.tensor([2.0, 0.0, -1.0, 1.0, -30.0]).repeat(20_000, 1)
    token, logp = draw(logits, uniform(mix(torch.arange(20_000)[:, None]), 0), SamplerSettings(temperature=0.9))
    p = torch.softmax(logits[0] / 0.9, 0).double()
    counts = torch.bincount(token, minlength=5)
    assert stats.chisquare(counts[:4].numpy(), (p[:4] / p[:4].sum() * 20_000).numpy()).pvalue > 1e-3
    assert counts[4] == 0
    torch.testing.assert_close(logp.double(), p.log()[token], atol=1e-6, rtol=1e-6)


def test_uniform_numbers_are_uniform_and_differ_by_position() -> None:
    u = torch.stack([uniform(mix(torch.arange(5000)[:, None]), t) for t in range(3)])
    for row in u:
        assert stats.kstest(row.numpy(), "uniform").pvalue > 1e-3
    assert abs(float(torch.corrcoef(u)[0, 1])) < 0.05
    keys = torch.tensor([[0, 1], [1, 0], [0, 0]])
    assert len(set(mix(keys).tolist())) == 3


def test_truncation_by_hand() -> None:
    """p = .5 .3 .2: top-2 renormalises to 5/8 and 3/8; top-p 0.6 needs the first two."""
    logp = torch.tensor([[0.3, 0.5, 0.2]]).log()
    expected = torch.tensor([[3 / 8, 5 / 8, 0.0]])
    torch.testing.assert_close(truncated_logp(logp, 2, 1.0).exp(), expected)
    torch.testing.assert_close(truncated_logp(logp, 0, 0.6).exp(), expected)
    torch.testing.assert_close(truncated_logp(logp, 0, 0.4).exp(), torch.tensor([[0.0, 1.0, 0.0]]))
    assert truncated_logp(logp, 0, 1.0) is logp


def test_top_k_log_probs_are_of_the_truncated_distribution(policy: Any) -> None:
    for c in sample(policy, [[20, 21]] * 16, torch.arange(16)[:, None], top_k=1, max_tokens=4):
        assert all(x == pytest.approx(0.0, abs=1e-6) for x in c.logp)


def test_draws_do_not_depend_on_the_batch(policy: Any) -> None:
    prompts = [[20, 21], [22, 23, 24, 25], [26], [27, 28, 29]] * 2
    keys = torch.tensor([[7, i] for i in range(8)])
    whole = sample(policy, prompts, keys)
    alone = [sample(policy, [p], k[None])[0] for p, k in zip(prompts, keys, strict=True)]
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0))
    moved = sample(policy, [prompts[i] for i in order], keys[order])
    small = sample(policy, prompts, keys, batch=3)
    for i in range(8):
        assert whole[i].tokens == alone[i].tokens == small[i].tokens
        assert moved[i].tokens == whole[int(order[i])].tokens
    assert len({c.tokens for c in sample(policy, [[20]] * 8, keys)}) > 1


def test_greedy_is_the_argmax(policy: Any) -> None:
    done = sample(policy, [[20, 21]], torch.zeros(1, 1, dtype=torch.long), temperature=0.0, max_tokens=3)[0]
    ids = [20, 21]
    for token in done.tokens:
        assert token == int(policy.model(torch.tensor([ids])).logits[0, -1].argmax())
        ids.append(token)
    assert done.logp == (0.0,) * len(done.tokens)


def test_truncated_completions_are_flagged_and_ends_are_kept(policy: Any) -> None:
    done = sample(policy, [[20]] * 200, torch.arange(200)[:, None], max_tokens=20)
    for c in done:
        assert c.truncated == (c.tokens[-1] != policy.tokenizer.eos_token_id) == (c.stop_reason == "length")
        assert len(c.tokens) == len(c.logp) <= 20
        assert policy.tokenizer.eos_token_id not in c.tokens[:-1]
    assert {c.stop_reason for c in done} == {"eos", "length"}


def test_stop_strings_may_span_tokens(policy: Any) -> None:
    free = sample(policy, [[20]] * 32, torch.arange(32)[:, None], max_tokens=16)
    texts = [policy.tokenizer.decode(c.tokens, skip_special_tokens=True) for c in free]
    row, stop = next(
        (i, t[k : k + 2]) for i, t in enumerate(texts) for k in range(2, len(t) - 2) if "\ufffd" not in t[: k + 2]
    )
    done = sample(policy, [[20]] * 32, torch.arange(32)[:, None], max_tokens=16, stop=(stop,))[row]
    decoded = policy.tokenizer.decode(done.tokens, skip_special_tokens=True)
    assert stop in decoded
    assert stop not in policy.tokenizer.decode(done.tokens[:-1], skip_special_tokens=True)
    assert done.stop_reason == "stop"
    assert not done.truncated
    assert done.tokens == free[row].tokens[: len(done.tokens)]


def test_model_frequencies_are_its_probabilities(policy: Any) -> None:
    """20,000 first tokens of one prompt against softmax of the model's logits."""
    n = 20_000
    done = sample(policy, [[20, 21]] * n, torch.stack([torch.full((n,), 3), torch.arange(n)], 1), max_tokens=1, batch=n)
    p = torch.softmax(policy.model(torch.tensor([[20, 21]])).logits[0, -1].double(), -1).detach()
    counts = torch.bincount(torch.tensor([c.tokens[0] for c in done]), minlength=len(p))
    assert stats.chisquare(counts.numpy(), (p * n).numpy()).pvalue > 1e-3


def test_truncated_distributions_are_recorded_as_they_were_sampled(policy: Any) -> None:
    """Temperature, then top-k, then top-p: recomputed from full logits, token by token."""
    settings = {"temperature": 1.3, "top_k": 20, "top_p": 0.7}
    for c in sample(policy, [[20, 21]] * 12, torch.arange(12)[:, None], **settings):
        ids = torch.tensor([[20, 21, *c.tokens]])
        logits = policy.model(ids).logits[0, 1:-1].detach() / 1.3
        for row, token, logp in zip(logits, c.tokens, c.logp, strict=True):
            p, order = torch.softmax(row, 0).topk(20)
            p = p / p.sum()
            kept = int((p.cumsum(0) < 0.7).sum()) + 1
            where = order[:kept].tolist().index(token)
            assert logp == pytest.approx(float((p[where] / p[:kept].sum()).log()), abs=2e-5)


def test_equal_prompts_are_computed_once_and_ended_rows_leave(policy: Any) -> None:
    shapes: list[tuple[int, int]] = []
    hook = policy.model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    sampler = Sampler(policy.model, policy.tokenizer, SamplerSettings(max_tokens=40, fused=False))
    sampler.sample([[20]], torch.zeros(1, 1, dtype=torch.long))
    shapes.clear()
    done = sampler.sample([[20, 21]] * 64 + [[22]] * 64, torch.arange(128)[:, None])
    hook.remove()
    assert shapes[:2] == [(2, 2), (128, 1)]
    computed, sampled = sum(rows for rows, _ in shapes[1:]), sum(len(c.tokens) for c in done)
    assert {c.stop_reason for c in done} == {"eos", "length"}
    assert computed <= 1.15 * sampled


@pytest.mark.parametrize("name", ["qwen3", "mamba", "falcon_h1"])
def test_the_comparison_with_the_policy_would_notice_a_wrong_cache(name: str, tmp_path: Path) -> None:
    """Recorded log-probs equal the policy's through the cache, not beside it: with a spoiled cache they do not."""
    policy = load_policy(str(saved(name, tmp_path)))
    prompts = [[20, 21], [22, 23, 24, 25], [26]]
    sampler = Sampler(policy.model, policy.tokenizer, SamplerSettings(max_tokens=8, fused=False))

    def distance() -> float:
        done = sampler.sample(prompts, torch.arange(3)[:, None])
        with torch.no_grad():
            logp = policy.signals(Episodes.build([c.tokens for c in done], prompts), ["logp"])["logp"]
        return float((logp - torch.tensor([x for c in done for x in c.logp])).abs().max())

    assert distance() < 2e-5
    call = sampler._call
    assert call is not None
    assert call.pads
    assert call.caches

    def spoiled(ids: torch.Tensor, seen: torch.Tensor, cache: Any) -> Any:
        return call(ids, seen, taken(cache, torch.arange(len(ids)).roll(1)))

    spoiled.pads, spoiled.model = True, policy.model  # type: ignore[attr-defined]
    sampler._call = spoiled  # type: ignore[assignment]
    assert distance() > 1e-3


def test_an_architecture_that_cannot_be_padded_is_batched_by_length() -> None:
    """RWKV has no mask: padding on the left would change its state; the probe finds out."""
    torch.manual_seed(0)
    config = RwkvConfig(vocab_size=60, hidden_size=16, num_hidden_layers=2, intermediate_size=32, eos_token_id=1)
    policy = TokenPolicy(AutoModelForCausalLM.from_config(config), SimpleNamespace(pad_token_id=0, eos_token_id=1))
    sampler = Sampler(policy.model, policy.tokenizer, SamplerSettings(max_tokens=6))
    prompts = [[20, 21], [22, 23, 24, 25], [26], [27, 28]]
    done = sampler.sample(prompts, torch.arange(4)[:, None])
    assert sampler._call is not None
    assert not sampler._call.pads
    with torch.no_grad():
        logp = policy.signals(Episodes.build([c.tokens for c in done], prompts), ["logp"])["logp"]
    torch.testing.assert_close(logp, torch.tensor([x for c in done for x in c.logp]), atol=2e-5, rtol=1e-5)


def test_settings_are_checked() -> None:
    for wrong in (
        {"temperature": -1.0},
        {"top_p": 0.0},
        {"top_k": -1},
        {"max_tokens": 0},
        {"stop": ("",)},
        {"batch": 0},
    ):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            SamplerSettings(**wrong)


def test_bad_prompts_are_told(policy: Any) -> None:
    assert sample(policy, [], torch.zeros(0, 1, dtype=torch.long)) == []
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        sample(policy, [[20], []], torch.zeros(2, 1, dtype=torch.long))
    with pytest.raises(ValueError, match="passes the model's context of 128"):
        sample(policy, [[20] * 125], torch.zeros(1, 1, dtype=torch.long))
    with pytest.raises(ValueError, match="one row of keys"):
        sample(policy, [[20]], torch.zeros(2, 1, dtype=torch.long))
    assert len(sample(policy, [[20]], torch.zeros(1, 1, dtype=torch.long), max_tokens=1)[0].tokens) == 1
