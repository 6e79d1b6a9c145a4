"""The sampler: right frequencies, right log-probs, and draws that depend on their key alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from scipy import stats

from tests.policies.models import saved
from unipo.policies import load_policy
from unipo.sources.sampler import Completion, Sampler, SamplerSettings, draw, mix, truncated_logp, uniform


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


def test_bad_prompts_are_told(policy: Any) -> None:
    assert sample(policy, [], torch.zeros(0, 1, dtype=torch.long)) == []
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        sample(policy, [[20], []], torch.zeros(2, 1, dtype=torch.long))
    with pytest.raises(ValueError, match="passes the model's context of 128"):
        sample(policy, [[20] * 125], torch.zeros(1, 1, dtype=torch.long))
    with pytest.raises(ValueError, match="one row of keys"):
        sample(policy, [[20]], torch.zeros(2, 1, dtype=torch.long))
    assert len(sample(policy, [[20]], torch.zeros(1, 1, dtype=torch.long), max_tokens=1)[0].tokens) == 1
