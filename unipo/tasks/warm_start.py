"""Make the shipped model: a character-level transformer that can do the embedded tasks and usually does not.

    python -m unipo.tasks.warm_start --out DIR --minutes 20

Supervised learning on demonstrations of the train splits. In the first phase all are right: the model acquires the
capability. In the second a stated share (`WRONG`) is replaced by plausible mistakes, independently of the problem: the
model comes to answer rightly only about as often as its teachers, though it knows better. That is the headroom which
policy optimisation is to recover. Held-out problems are never seen.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast, Qwen3Config

from unipo.tasks.base import Problem
from unipo.tasks.table import TASKS, get_task

SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>")
CHARACTERS = "\n" + "".join(map(chr, range(32, 127)))
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
)
LEVELS = {
    "arithmetic": (1, 2, 2, 2, 3), "countdown": (1, 1, 2, 2), "modular_chain": (1, 2, 2),
    "reverse": (1, 2, 2, 3), "sort": (1, 2, 2, 3),
}  # fmt: skip
"""Levels of the corpus, in these shares; tasks that are not here the shipped model has never seen."""
SHARE = {"arithmetic": 0.37, "countdown": 0.2, "modular_chain": 0.2, "reverse": 0.11, "sort": 0.12}
WRONG = {"arithmetic": 0.74, "countdown": 0.2, "modular_chain": 0.5, "reverse": 0.6, "sort": 0.6}
"""Share of wrong demonstrations in the second phase."""
WORKED = {"arithmetic": 0.0, "countdown": 0.3, "modular_chain": 0.7, "reverse": 0.1, "sort": 0.1}
"""Share of demonstrations that write out the work before the answer; none for arithmetic: there, worked demonstrations are
an expert of another style than the policy's own."""
SECOND_PHASE = 0.8
"""Share of the training time after which the demonstrations go wrong."""
CARD = """# The tiny model

A character-level Qwen3 of {size:,} parameters (bfloat16), warm-started on the embedded tasks by

    python -m unipo.tasks.warm_start --out unipo/tasks/tiny --minutes {minutes:g}

For the first {right:.0%} of the time all demonstrations were right; after that the share below was replaced by plausible
mistakes (a forgotten carry, two letters swapped, ...), independently of the problem. So the model answers rightly about
as often as its teachers did, though it has the capability: the headroom that policy optimisation is to recover.
Held-out problems were never seen.

Held-out results at temperature 1 in float32 (256 problems, or all there are at a small level; 8 samples each):

| task:level | wrong demonstrations | pass@1 | pass@8 |
|---|---|---|---|
{table}
"""
BATCH, POOL = 128, 4096


@dataclass(frozen=True)
class Sample:
    """Token ids of one demonstration; the loss counts from position `start` on, the end of the prompt."""

    ids: list[int]
    start: int


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character (newline and printable ASCII), `<bos>` in front of every prompt."""
    vocabulary = {symbol: i for i, symbol in enumerate((*SPECIAL, *CHARACTERS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", vocabulary["<bos>"])]
    )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>",
        clean_up_tokenization_spaces=False, model_max_length=512,
    )  # fmt: skip
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


def make_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> PreTrainedModel:
    """0.8M parameters with random weights."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=512, tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    model.generation_config = GenerationConfig(**ends, pad_token_id=tokenizer.pad_token_id, do_sample=True)
    return model


def demonstration(random: Random, wrong: dict[str, float]) -> tuple[Problem, str]:
    """A random train problem and somebody's answer to it, wrong with probability `wrong[task]`."""
    task = TASKS[random.choices(list(SHARE), list(SHARE.values()))[0]]
    problem = task.problem(random.getrandbits(40), "train", [random.choice(LEVELS[task.name])])
    style = "worked" if random.random() < WORKED[task.name] else "direct"
    if random.random() < wrong.get(task.name, 0.0):
        return problem, task.wrong(problem, random.getrandbits(30), style)
    return problem, task.demonstration(problem, style)


def batches(tokenizer: PreTrainedTokenizerFast, random: Random, wrong: dict[str, float]) -> Iterator[list[Sample]]:
    """Endless batches of samples of similar lengths."""
    while True:
        drawn = [demonstration(random, wrong) for _ in range(POOL)]
        prompts = tokenizer([p.prompt for p, _ in drawn])["input_ids"]
        answers = tokenizer([a for _, a in drawn], add_special_tokens=False)["input_ids"]
        end = [tokenizer.eos_token_id]
        pool = [Sample(p + a + end, len(p)) for p, a in zip(prompts, answers, strict=True)]
        pool.sort(key=lambda s: len(s.ids))
        made = [pool[i : i + BATCH] for i in range(0, POOL, BATCH)]
        random.shuffle(made)
        yield from made


def padded(batch: list[Sample], pad: int) -> tuple[Tensor, Tensor]:
    """Token ids [B, T] and targets [B, T] (-100 on prompts and padding)."""
    width = max(len(s.ids) for s in batch)
    ids = torch.tensor([s.ids + [pad] * (width - len(s.ids)) for s in batch])
    position = torch.arange(width)
    counted = [(position >= s.start) & (position < len(s.ids)) for s in batch]
    return ids, torch.where(torch.stack(counted), ids, -100)


def train(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, minutes: float, seed: int, peak: float) -> None:
    """Both phases, in `minutes` of this thread's own computing time (what else the machine does changes nothing).

    The learning rate warms up over 2 % of the time, then falls linearly to a tenth.
    """
    random, started, step = Random(seed), time.thread_time(), 0
    right, mixed = batches(tokenizer, random, {}), batches(tokenizer, random, WRONG)
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, betas=(0.9, 0.95), weight_decay=0.01)
    while (done := (time.thread_time() - started) / (60 * minutes)) < 1:
        ids, targets = padded(next(right if done < SECOND_PHASE else mixed), tokenizer.pad_token_id)
        for group in optimizer.param_groups:
            group["lr"] = peak * min(done / 0.02, 1.0 - 0.9 * done)
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), targets[:, 1:].flatten(), ignore_index=-100)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 0:
            print(f"{100 * done:5.1f} %  step {step:6d}  loss {loss.item():.4f}", flush=True)
        step += 1


@torch.no_grad()
def measured(model: Any, tokenizer: PreTrainedTokenizerFast, name: str, problems: int = 256, n: int = 8
             ) -> tuple[float, float]:  # fmt: skip
    """(pass@1, pass@n) on the first held-out problems of task `name`, from `n` samples each at temperature 1."""
    task = get_task(name)
    rows = [p for i in range(problems) for p in [task.problem(i, "held_out")] * n]
    inputs = tokenizer([p.prompt for p in rows], return_tensors="pt", padding=True, padding_side="left")
    made = model.generate(**inputs, do_sample=True, temperature=1.0, top_k=0, max_new_tokens=task.max_completion_tokens)
    texts = tokenizer.batch_decode(made[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    columns = {k: [p.columns[k] for p in rows] for k in rows[0].columns}
    found = task.reward([p.prompt for p in rows], texts, **columns, answer=[p.answer for p in rows])
    right = torch.tensor([[float(r or 0) for r in found[i : i + n]] for i in range(0, len(found), n)])
    return right.mean().item(), right.amax(1).mean().item()


def described(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, minutes: float) -> str:
    """The model card: how it was made, and what it can do before any policy optimisation."""
    torch.manual_seed(0)
    trained = [f"{name}:{level}" for name, levels in LEVELS.items() for level in sorted(set(levels))]
    results = {name: measured(model, tokenizer, name) for name in trained}
    wrong = {name: WRONG[name.partition(":")[0]] for name in trained}
    lines = [f"| {name} | {wrong[name]:.0%} | {one:.1%} | {eight:.1%} |" for name, (one, eight) in results.items()]
    size = sum(p.numel() for p in model.parameters())
    return CARD.format(size=size, minutes=minutes, right=SECOND_PHASE, table="\n".join(lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True, help="folder for the model (from_pretrained layout)")
    parser.add_argument("--minutes", type=float, default=20.0, help="of one thread's computing time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    tokenizer = make_tokenizer()
    model = make_model(tokenizer, options.seed)
    train(model, tokenizer, options.minutes, options.seed, options.learning_rate)
    model.bfloat16().save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)
    (options.out / "README.md").write_text(
        described(model.float().eval(), tokenizer, options.minutes), encoding="utf-8"
    )


if __name__ == "__main__":
    main()
