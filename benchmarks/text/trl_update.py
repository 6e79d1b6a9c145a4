"""TRL's side of the scripted rows: GRPO (loss dapo, beta 0) or DPO on given tokens, in its fastest settings on a CPU.

    python -m benchmarks.text.trl_update s1 --model m25 --batch 8

One step: tokenise, score, forward, backward, clip, AdamW, and the entropy and metrics that TRL always computes. Sampling is
replaced by the scripted completions. Off: gradient checkpointing (TRL's default is on), logging, saving, progress bars.
"""

from __future__ import annotations

import argparse
import tempfile
from typing import Any

import torch
from datasets import Dataset
from torch.utils.data import SequentialSampler
from transformers import PreTrainedTokenizerFast, TrainerCallback
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer

from benchmarks.text.shapes import SHAPES, SIZES, Batch, folder, reward_of, scripted, text_of
from benchmarks.text.timing import Stopwatch, versions

FAST = {
    "use_cpu": True, "bf16": False, "fp16": False, "gradient_checkpointing": False, "optim": "adamw_torch_fused",
    "learning_rate": 1e-6, "lr_scheduler_type": "constant", "weight_decay": 0.0, "adam_beta2": 0.95,
    "max_grad_norm": 1.0, "report_to": "none", "logging_strategy": "no", "save_strategy": "no", "disable_tqdm": True,
    "dataloader_num_workers": 0, "model_init_kwargs": {"attn_implementation": "sdpa", "dtype": "float32"},
}  # fmt: skip


class Clock(TrainerCallback):
    """A mark after every optimiser step."""

    def __init__(self, watch: Stopwatch) -> None:
        self.watch = watch

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.watch.mark()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.watch.mark()


class Scripted(GRPOTrainer):
    """Completions come from the script, prompt by prompt."""

    script: dict[tuple[int, ...], list[list[int]]]

    def _generate_single_turn(self, prompt_ids: Any, *_: Any, **__: Any) -> Any:
        left = {key: iter(rows) for key, rows in self.script.items()}
        return [next(left[tuple(ids)]) for ids in prompt_ids], None


class InOrder(DPOTrainer):
    """Pairs in the order of the script."""

    def _get_train_sampler(self, dataset: Any = None) -> Any:
        return SequentialSampler(dataset if dataset is not None else self.train_dataset)


def observe(trainer: Any) -> dict[str, float]:
    """Loss and gradient norm of the first step, as the trainer computes them."""
    seen: dict[str, float] = {"loss": 0.0}
    step, clip = trainer.training_step, trainer.accelerator.clip_grad_norm_

    def training_step(*given: Any, **more: Any) -> Any:
        loss = step(*given, **more)
        if "grad_norm" not in seen:
            seen["loss"] += float(loss)
        return loss

    def clip_grad_norm_(*given: Any, **more: Any) -> Any:
        norm = clip(*given, **more)
        seen.setdefault("grad_norm", float(norm))
        return norm

    trainer.training_step, trainer.accelerator.clip_grad_norm_ = training_step, clip_grad_norm_
    return seen


def grpo(batches: list[Batch], model: str, rows: int, settings: dict[str, Any]) -> Any:
    """GRPO with `rows` rows per forward pass: identical prompts are neighbours, as TRL's sampler makes them."""
    size = len(batches[0].completions)
    group = size // len(batches[0].prompts)
    config = GRPOConfig(
        per_device_train_batch_size=rows, gradient_accumulation_steps=size // rows, num_generations=group,
        max_completion_length=max(len(c) for b in batches for c in b.completions), beta=0.0, num_iterations=1,
        loss_type="dapo", epsilon=0.2, epsilon_high=0.28, log_completions=False, mask_truncated_completions=False,
        top_entropy_quantile=1.0, shuffle_dataset=False, **settings,
    )  # fmt: skip

    def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [reward_of(ids) for ids in completion_ids]

    prompts = [text_of(p) for b in batches for p in b.prompts]
    made = Scripted(model=str(folder(model)), reward_funcs=reward, args=config,
                    train_dataset=Dataset.from_dict({"prompt": prompts}),
                    processing_class=PreTrainedTokenizerFast.from_pretrained(folder(model)))  # fmt: skip
    made.script = {
        tuple(p): b.completions[i * group : (i + 1) * group] for b in batches for i, p in enumerate(b.prompts)
    }
    return made


def dpo(batches: list[Batch], model: str, rows: int, settings: dict[str, Any]) -> Any:
    """DPO with `rows` sequences (half as many pairs) per forward pass; reference log-probs before the first step."""
    pairs = len(batches[0].prompts)
    config = DPOConfig(per_device_train_batch_size=rows // 2, gradient_accumulation_steps=2 * pairs // rows, beta=0.1,
                       per_device_eval_batch_size=rows // 2, precompute_ref_log_probs=True, max_length=None,
                       **settings)  # fmt: skip
    columns: dict[str, list[str]] = {"prompt": [], "chosen": [], "rejected": []}
    for b in batches:
        columns["prompt"] += [text_of(p) for p in b.prompts]
        for name, start in (("chosen", 0), ("rejected", 1)):
            columns[name] += [f" {text_of(c[:-1])} <eos>" for c in b.completions[start::2]]
    return InOrder(model=str(folder(model)), args=config, train_dataset=Dataset.from_dict(columns),
                   processing_class=PreTrainedTokenizerFast.from_pretrained(folder(model)))  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("shape", choices=sorted(SHAPES))
    parser.add_argument("--model", default="m25")
    parser.add_argument("--batch", type=int, default=8, help="rows per forward pass")
    parser.add_argument("--warm", type=int, default=1)
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--compile", action="store_true")
    given = parser.parse_args()
    torch.manual_seed(0)
    watch, words = Stopwatch(given.warm), SIZES[given.model].words
    batches = [scripted(SHAPES[given.shape], words, step) for step in range(given.warm + given.steps)]
    make = dpo if given.shape.startswith("d") else grpo
    with tempfile.TemporaryDirectory() as out:
        settings = {**FAST, "max_steps": len(batches), "torch_compile": given.compile, "output_dir": out}
        trainer = make(batches, given.model, given.batch, settings)
        trainer.add_callback(Clock(watch))
        seen = observe(trainer)
        trainer.train()
    watch.say("step", gate=seen, versions=versions("trl", "transformers", "torch"))


if __name__ == "__main__":
    main()
