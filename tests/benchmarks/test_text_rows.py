"""The text rows: what both sides are given is the same, lengths are what is claimed, and every side can be started."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch
import transformers

from benchmarks.text import work
from benchmarks.text.reward import even_share
from benchmarks.text.rows import ROWS
from benchmarks.text.shapes import SHAPES, SIZES, Batch, reward_of, scripted, text_of, tokenizer_of, write_model


def test_a_step_is_the_same_for_everyone_and_another_at_every_step() -> None:
    for shape in SHAPES.values():
        first, again, second = (scripted(shape, 100, step) for step in (0, 0, 1))
        assert first == again
        assert first.prompts != second.prompts
        assert {len(p) for p in first.prompts} == {shape.prompt}
        assert len(first.completions) == shape.groups * shape.group == 32
        assert all(shape.shortest <= len(c) <= shape.longest and c[-1] == 99 for c in first.completions)
        assert max(map(max, first.prompts)) < 98


def test_words_and_ids_are_one_anothers_inverse() -> None:
    tokenizer = tokenizer_of(50)
    assert tokenizer(f"{text_of([3, 47])} <eos>").input_ids == [3, 47, 49]
    assert tokenizer.decode([3, 47]) == "t3 t47"
    assert reward_of([3, 47, 2, 4]) == even_share(["x"], ["t3 t47 t2 t4"])[0] == 0.5


def test_completions_end_after_as_many_tokens_as_asked(tmp_path: object) -> None:
    size = replace(SIZES["10m"], hidden=64, layers=2, heads=2, inner=64, words=512, ends=20)
    write_model(size, tmp_path)  # type: ignore[arg-type]
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        logits = model(torch.randint(0, 500, (8, 32), generator=torch.Generator().manual_seed(1))).logits
    assert float(logits.softmax(-1)[..., -1].mean()) == pytest.approx(1 / 20, rel=0.3)


def test_the_operations_of_an_update_by_hand() -> None:
    """One layer of width 2 with one head: matrices of 4 * 4 + 3 * 2 * 3 = 34 weights; 3 + 1 tokens computed, 2 scored."""
    config = transformers.Qwen3Config(
        hidden_size=2, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1, head_dim=2, intermediate_size=3,
        vocab_size=7,
    )  # fmt: skip
    batch = Batch([[1, 2, 3]], [[4, 5]], [0.0])
    pairs = 3 * 3 / 2 + 1 * (3 + 0.5)
    assert work.update(config, batch) == 6 * 34 * 4 + 12 * 2 * pairs + 6 * 2 * 7 * 2
    shared, apart = Batch([[1, 2, 3]], [[4, 5], [6, 5]], []), Batch([[1, 2, 3]] * 2, [[4, 5], [6, 5]], [])
    assert work.update(config, apart) == 2 * work.update(config, batch)
    assert work.update(config, apart) - work.update(config, shared) == 6 * 34 * 3 + 12 * 2 * 4.5


def test_every_row_has_sides_that_exist_and_peers_under_quick() -> None:
    assert [row.name for row in ROWS[:8]] == [
        "grpo-s1", "grpo-s2", "grpo-s3", "dpo-d1", "dpo-d2", "grpo-1m", "grpo-10m", "grpo-60m",
    ]  # fmt: skip
    for row in ROWS:
        sides = [row.ours, *row.peers, *row.also, *([row.limit] if row.limit else [])]
        assert all(find_spec(side.command[1]) for side in sides)
        assert len({side.name for side in sides}) == len(sides)
        releases = 1 if row.name == "grpo-time-to-90" else 2  # runs are long: the faster release alone
        assert row.limit or len([side for side in row.peers if side.quick is not None]) >= releases
