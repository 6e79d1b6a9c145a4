"""Makes the shipped default model: a 0.8M-parameter character-level Qwen3, warm-started on the embedded tasks.

    python -m unipo.tasks.warm_start --out unipo/tasks/tiny --minutes 10

First on right demonstrations, so that the capability is there; then for the last part on demonstrations of which a
stated share is wrong on purpose (`WRONG`), so that sampling is right only part of the time: what a base model trained on
mixed text is like, and what reinforcement learning then sharpens.
"""  # fmt: skip

from __future__ import annotations

import argparse
import json
import math
import string
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from unipo.tasks import TASKS, Task, get_task

WRONG = 0.62
"""Share of demonstrations with a wrong answer in the last part of the warm start."""
LAST = 0.15
SHARES = {"arithmetic": 0.55, "countdown": 0.15, "modular_chain": 0.1, "reverse": 0.1, "sort": 0.1}
TEMPLATE = (
    "{% for m in messages %}{{ m['role'][0] + ' ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'a ' }}{% endif %}"
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per printable ASCII character, and <pad>, <bos>, <eos>, <unk>."""
    characters = [c for c in string.printable if c in string.ascii_letters + string.digits + string.punctuation + " \n"]
    vocabulary = {t: i for i, t in enumerate(["<pad>", "<bos>", "<eos>", "<unk>", *characters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", unk_token="<unk>"
    )
    fast.chat_template = TEMPLATE
    return fast


def make_model(vocabulary: int) -> Qwen3ForCausalLM:
    config = Qwen3Config(
        vocab_size=vocabulary, hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=512, tie_word_embeddings=True,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    return Qwen3ForCausalLM(config)


def batch(
    tokenizer: Any, tasks: dict[str, Task], start: int, size: int, wrong: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids [B, T] (right-padded) and labels, -100 on prompts and padding."""
    rng = np.random.default_rng([7, start])
    names = rng.choice(list(SHARES), size=size, p=list(SHARES.values()))
    rows = []
    for i, name in enumerate(names):
        task = tasks[name]
        problem = task.problem(start + i)
        worked = len(task.styles) > 1 and rng.random() < 0.1
        answer = task.demonstration(problem, task.styles[-1] if worked else "direct")
        if rng.random() < wrong:
            answer = task.corrupted(problem, rng)
        prompt = tokenizer(problem.prompt)["input_ids"]
        rows.append((prompt, tokenizer(answer)["input_ids"] + [tokenizer.eos_token_id]))
    width = max(len(p) + len(a) for p, a in rows)
    ids, labels = torch.zeros(size, width, dtype=torch.long), torch.full((size, width), -100)
    for i, (prompt, answer_ids) in enumerate(rows):
        n = len(prompt) + len(answer_ids)
        ids[i, :n] = torch.tensor(prompt + answer_ids)
        labels[i, len(prompt) : n] = torch.tensor(answer_ids)
    return ids, labels


def train(minutes: float, size: int = 384, peak: float = 3e-3) -> tuple[Any, Any]:
    """The model and tokenizer after `minutes` of supervised learning; the learning rate falls by a cosine of time."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    model = make_model(len(tokenizer))
    tasks = {n: get_task(f"{n}:{_all_but_hard(n)}") for n in TASKS}
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, betas=(0.9, 0.98), weight_decay=0.01)
    begun, step = time.monotonic(), 0
    while (done := (time.monotonic() - begun) / (60 * minutes)) < 1:
        ids, labels = batch(tokenizer, tasks, step * size, size, WRONG if done > 1 - LAST else 0.0)
        logits = model(input_ids=ids).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), labels[:, 1:].reshape(-1))
        for group in optimizer.param_groups:
            group["lr"] = peak * min(1.0, (step + 1) / 100) * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * done)))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        if step % 100 == 0:
            print(f"step {step}  done {done:.0%}  loss {float(loss):.3f}", flush=True)
    return model, tokenizer


def _all_but_hard(name: str) -> str:
    levels = [level for level in TASKS[name].all_levels if level <= 4]
    return ",".join(map(str, levels[:2] if name in ("arithmetic", "countdown") else levels))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=10.0)
    arguments = parser.parse_args()
    model, tokenizer = train(arguments.minutes)
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=0)
    model.to(torch.bfloat16).save_pretrained(arguments.out)
    tokenizer.save_pretrained(arguments.out)
    size = sum(p.numel() for p in model.parameters())
    print(json.dumps({"parameters": size, "out": str(arguments.out)}))


if __name__ == "__main__":
    main()
