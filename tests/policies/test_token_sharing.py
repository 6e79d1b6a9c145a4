"""Prompts computed once: the row, its attention, and the signals and gradients that come of it, against slow twins."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.policies.models import saved
from tests.policies.test_token import by_full_logits
from unipo.episodes import Column, Episodes
from unipo.policies import TokenPolicy, load_policy
from unipo.policies.attention import _behind, _InParts, _own, in_sequences
from unipo.policies.layout import Block, Layout, Tail, layout, sequences
from unipo.policies.memory import keep_freed_memory

PROMPT = [20, 21, 22, 23, 24, 25, 26, 27]
SHARES = ("qwen3", "llama", "gemma", "mixtral", "qwen3_moe", "cohere", "granite", "gpt2")
COMPUTES_AGAIN = ("gemma2", "mamba", "falcon_h1")


def batch() -> Episodes:
    """Episodes 0, 1 and 4 share a prompt, though they are not neighbours; 2 and 3 share nothing."""
    return Episodes.build(
        [[5, 6, 1], [7, 9, 8, 6], [8, 9], [10, 11, 12, 1], [9]], [PROMPT, PROMPT, [30, 31], PROMPT[:-1], PROMPT]
    )


def row_of(episodes: Episodes) -> Layout:
    return layout(sequences(episodes, "score"))


def test_the_row_by_hand() -> None:
    made = row_of(batch())
    assert made.tokens.tolist() == [*PROMPT[:-1], 10, 11, 12, *PROMPT, 30, 31, 8, 7, 9, 8, 5, 6]
    assert made.positions.tolist() == [*range(10), *range(8), 0, 1, 2, 8, 9, 10, 8, 9]
    assert made.blocks == (Block(0, 1, 10), Block(10, 1, 8), Block(18, 1, 3), Block(21, 1, 3), Block(24, 1, 2))
    assert made.tails == (Tail(10, 18, 21, 26),)
    assert made.scored.tolist() == [17, 24, 25, 17, 21, 22, 23, 19, 20, 6, 7, 8, 9, 17]
    assert made.longest == 11


def test_runs_of_one_length_are_one_block() -> None:
    made = row_of(Episodes.build([[5, 6, 7], [8, 9, 5], [1, 2]], [PROMPT] * 3))
    assert made.blocks == (Block(0, 1, 8), Block(8, 2, 2), Block(12, 1, 1))


def test_what_is_not_worth_sharing_is_not_shared() -> None:
    made = row_of(Episodes.build([[5, 6], [7, 8]], [[20, 21]] * 2))
    assert not made.tails
    assert made.blocks == (Block(0, 2, 3),)


def test_tokens_are_counted_once() -> None:
    """Counts, not seconds: 8 completions of 3 behind a prompt of 8 take 8 + 8 * 2 tokens, not 8 * 10."""
    found = sequences(Episodes.build([[5, 6, 7]] * 8, [PROMPT] * 8), "score")
    assert found.computed().tolist() == [10, 2, 2, 2, 2, 2, 2, 2]
    assert int(found.computed().sum()) == len(layout(found).tokens) == 24
    assert found.computed(sharing=False).tolist() == [10] * 8
    assert int(sequences(batch(), "score").computed().sum()) == len(row_of(batch()).tokens)


def test_episodes_without_actions_take_nothing() -> None:
    made = row_of(Episodes.build([[], [5, 6]], [PROMPT, PROMPT]))
    assert made.tokens.tolist() == [*PROMPT, 5]
    assert made.scored.tolist() == [7, 8]


def random_states(heads: int, tokens: int) -> Tensor:
    return torch.randn(1, tokens, heads, 4, dtype=torch.float64).transpose(1, 2)[0].requires_grad_()


def test_attention_in_parts_equals_whole_sequences() -> None:
    torch.manual_seed(0)
    made = row_of(Episodes.build([[5, 6, 1], [7, 9, 8], [8] * 5, [3], [4] * 6], [PROMPT] * 4 + [[30, 31]]))
    states = [random_states(h, len(made.tokens)) for h in (4, 2, 2)]
    fast, slow = _InParts.apply(*states, made, 0.7), in_sequences(*states, made, 0.7)
    torch.testing.assert_close(fast, slow, atol=1e-12, rtol=1e-10)
    weight = torch.randn_like(fast)
    for a, b in zip(*(torch.autograd.grad((x * weight).sum(), states) for x in (fast, slow)), strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-10)


def test_equal_groups_are_taken_together() -> None:
    """Counts, not seconds: four groups of equal lengths are one block of prompts, one of runs and one pair of blocks."""
    made = row_of(Episodes.build([[5, 6, 7]] * 8, [[*PROMPT[:-1], 40 + i // 2] for i in range(8)]))
    assert _own(made) == [Block(0, 4, 8), Block(32, 8, 2)]
    assert _behind(made) == [(Block(32, 4, 4), Block(0, 4, 8))]
    torch.manual_seed(2)
    states = [random_states(h, len(made.tokens)) for h in (4, 2, 2)]
    fast, slow = _InParts.apply(*states, made, 0.7), in_sequences(*states, made, 0.7)
    torch.testing.assert_close(fast, slow, atol=1e-12, rtol=1e-10)
    for a, b in zip(*(torch.autograd.grad(x.square().sum(), states) for x in (fast, slow)), strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-10)


def test_attention_equals_its_definition() -> None:
    """Softmax over what is before a token in its run and over the prompt of the run, token by token."""
    torch.manual_seed(1)
    made = row_of(batch())
    q, k, v = (random_states(h, len(made.tokens)).detach() for h in (2, 1, 1))
    found = _InParts.apply(q, k, v, made, 0.5)
    for block in made.blocks:
        tail = next((t for t in made.tails if t.start <= block.start < t.stop), None)
        front = list(range(tail.first, tail.last)) if tail else []
        for place in range(block.stop - block.start):
            run = block.start + place // block.length * block.length
            seen = front + list(range(run, block.start + place + 1))
            for head in range(2):
                weight = torch.softmax(0.5 * (k[0, seen] @ q[head, block.start + place]), 0)
                torch.testing.assert_close(found[block.start + place, head], weight @ v[0, seen])


@pytest.mark.parametrize("name", [*SHARES, *COMPUTES_AGAIN])
def test_signals_and_gradients_equal_full_logits(name: str, tmp_path: Path) -> None:
    policy = load_policy(str(saved(name, tmp_path)), temperature=0.8)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        found = policy.signals(batch(), ["logp", "entropy"])
    assert any("taken apart" in str(w.message) for w in told) == (name in COMPUTES_AGAIN)
    logp, entropy = by_full_logits(policy, batch(), 0.8)
    torch.testing.assert_close(found["logp"], logp, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(found["entropy"], entropy, atol=2e-5, rtol=1e-5)
    weight = torch.linspace(-1, 1, len(logp))
    (found["logp"] * weight).sum().backward()
    ours = {n: p.grad.clone() for n, p in policy.named_parameters() if p.grad is not None}
    policy.model.zero_grad()
    (logp * weight).sum().backward()
    for n, p in policy.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(ours[n], p.grad, atol=1e-4, rtol=1e-3, msg=n)
    assert int(policy.total_lengths(batch()).sum()) == (26 if name in SHARES else 42)


def test_several_turns_share_their_first_prompt(tmp_path: Path) -> None:
    """Two episodes of two turns behind one prompt; the second turn sees what was said before it."""
    columns = {
        "token": Column(torch.tensor([5, 6, 7, 1, 8, 9, 1]), "step"),
        "prompt": Column(torch.tensor([*PROMPT, 30, *PROMPT, 31, 32]), "turn", torch.tensor([0, 8, 9, 17, 19])),
    }
    offsets = {"turn": torch.tensor([0, 2, 4, 5, 7]), "episode": torch.tensor([0, 2, 4]), "group": torch.tensor([0, 2])}
    episodes = Episodes(offsets, columns)
    policy = load_policy(str(saved("qwen3", tmp_path)))
    expected = []
    for tokens, acted in (([*PROMPT, 5, 6, 30, 7, 1], [8, 9, 11, 12]), ([*PROMPT, 8, 31, 32, 9, 1], [8, 11, 12])):
        logp = torch.log_softmax(policy.model(torch.tensor([tokens])).logits[0], -1)
        expected += [logp[i - 1, tokens[i]] for i in acted]
    torch.testing.assert_close(policy.signals(episodes, ["logp"])["logp"], torch.stack(expected), atol=2e-5, rtol=1e-5)
    assert int(policy.total_lengths(episodes).sum()) == 8 + 4 + 4


def test_a_window_shorter_than_the_batch_is_left_to_the_model(tmp_path: Path) -> None:
    """Within the window a prompt is shared; beyond it the model's own attention decides."""
    from transformers import AutoModelForCausalLM, MistralConfig

    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=14, bos_token_id=None, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    source = load_policy(str(saved("llama", tmp_path)))
    policy = TokenPolicy(AutoModelForCausalLM.from_config(config), source.tokenizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(
            policy.signals(batch(), ["logp"])["logp"], by_full_logits(policy, batch(), 1.0)[0], atol=2e-5, rtol=1e-5
        )
    longer = Episodes.build([[5] * 12, [6] * 9], [PROMPT] * 2)
    with pytest.warns(UserWarning, match="prompts are not shared in this batch: attention"):
        found = policy.signals(longer, ["logp"])["logp"]
    torch.testing.assert_close(found, by_full_logits(policy, longer, 1.0)[0], atol=2e-5, rtol=1e-5)


def test_the_models_own_attention_is_back_afterwards(tmp_path: Path) -> None:
    policy = load_policy(str(saved("qwen3", tmp_path)))
    before = policy.model.config._attn_implementation
    policy.signals(batch(), ["logp"])
    assert policy.model.config._attn_implementation == before
    assert not policy.model.model.layers[-1].mlp._forward_hooks


def test_freed_memory_is_kept_or_the_platform_says_no() -> None:
    assert keep_freed_memory() in (True, False)
    assert keep_freed_memory() is keep_freed_memory()
