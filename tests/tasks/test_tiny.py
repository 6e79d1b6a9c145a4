"""The shipped model and the script that makes such models."""

from random import Random

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from unipo.tasks import TASKS, TINY_MODEL, get_task
from unipo.tasks import warm_start as warm


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TINY_MODEL)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(TINY_MODEL, dtype=torch.float32).eval()


def test_the_shipped_model_is_small_and_whole(model, tokenizer):
    assert sum(f.stat().st_size for f in TINY_MODEL.iterdir()) < 2_000_000
    assert model.config.vocab_size == len(tokenizer)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert model.config.pad_token_id == tokenizer.pad_token_id not in (tokenizer.eos_token_id, tokenizer.bos_token_id)


def test_every_printable_character_is_one_token_and_comes_back(tokenizer):
    for made in (tokenizer, warm.make_tokenizer()):
        text = "".join(map(chr, range(32, 127)))
        ids = made(text)["input_ids"]
        assert ids[0] == made.bos_token_id
        assert len(ids) == 1 + len(text)
        assert made.unk_token_id not in ids
        assert made.decode(ids, skip_special_tokens=True) == text
        chat = made.apply_chat_template([{"role": "user", "content": "1+1="}], tokenize=False)
        assert made(chat, add_special_tokens=False)["input_ids"] == made("1+1=")["input_ids"]


def test_the_shipped_model_is_often_wrong_and_able(model, tokenizer):
    """1,024 samples of 128 problems: the intervals are wider than four standard errors of the shipped numbers."""
    torch.manual_seed(0)
    one, eight = warm.measured(model, tokenizer, "arithmetic", problems=128, n=8)
    assert 0.20 < one < 0.45
    assert eight > 0.90


def test_demonstrations_are_wrong_as_often_as_stated_and_from_the_train_split():
    random, share = Random(0), {"arithmetic": 0.7, "sort": 0.2}
    right = {name: [] for name in warm.SHARE}
    for _ in range(3000):
        problem, completion = warm.demonstration(random, share)
        name = next(n for n in warm.SHARE if problem.prompt in _prompts(n, problem))
        columns = {k: [v] for k, v in problem.columns.items()}
        right[name] += TASKS[name].reward([problem.prompt], [completion], **columns, answer=[problem.answer])
    for name, found in right.items():
        expected = 1 - share.get(name, 0.0)
        assert abs(sum(found) / len(found) - expected) <= 4 * (expected * (1 - expected) / len(found)) ** 0.5


def _prompts(name, problem):
    kinds = {"reverse": "reverse ", "sort": "sort ", "countdown": " from ", "modular_chain": "%"}
    other = any(mark in problem.prompt for mark in kinds.values())
    mine = kinds[name] in problem.prompt if name in kinds else not other
    return [problem.prompt] if mine else []


def test_the_loss_counts_completions_and_nothing_else():
    batch = [warm.Sample([1, 10, 11, 12, 2], 2), warm.Sample([1, 10, 2], 2)]
    ids, targets = warm.padded(batch, pad=0)
    assert ids.tolist() == [[1, 10, 11, 12, 2], [1, 10, 2, 0, 0]]
    assert targets.tolist() == [[-100, -100, 11, 12, 2], [-100, -100, 2, -100, -100]]


def test_a_few_steps_of_the_warm_start_learn_and_write_a_card(tmp_path, monkeypatch):
    torch.manual_seed(0)
    tokenizer = warm.make_tokenizer()
    model = warm.make_model(tokenizer, seed=0)
    batch = next(warm.batches(tokenizer, Random(1), {}))
    ids, targets = warm.padded(batch, tokenizer.pad_token_id)

    def loss():
        logits = model(input_ids=ids).logits[:, :-1].flatten(0, 1)
        return torch.nn.functional.cross_entropy(logits, targets[:, 1:].flatten(), ignore_index=-100).item()

    before = loss()
    warm.train(model, tokenizer, minutes=0.03, seed=0, peak=2e-3)
    assert loss() < before - 0.5
    monkeypatch.setattr(warm, "measured", lambda model, tokenizer, name: (0.25, 0.5))
    assert "| arithmetic:2 | 74% | 25.0% | 50.0% |" in warm.described(model, tokenizer, 20)


def test_the_default_level_leaves_headroom():
    assert get_task("arithmetic").levels == (2,)
