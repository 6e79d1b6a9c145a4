"""TRL's side of the end-to-end rows: GRPO (loss dapo, beta 0) with its own generation, in its fastest settings on a CPU.

python -m benchmarks.text.trl_run 10m --batch 16 [--engine generate|static|continuous]
"""

from __future__ import annotations

import argparse
import tempfile
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerFast, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from benchmarks.text.reward import even_share
from benchmarks.text.shapes import GROUP, QUICK, SAMPLING, SIZES, Sampling, folder, prompt_texts
from benchmarks.text.timing import Stopwatch, versions
from benchmarks.text.trl_update import FAST

ENGINES: dict[str, dict[str, Any]] = {
    "generate": {},
    "static": {"cache_implementation": "static"},
    "continuous": {"use_transformers_continuous_batching": True},
}
"""Measured on two cores with 0.9M parameters: continuous 4.1 ms a token (and 12 GB), generate 0.24 ms; static as generate."""


class Counting(GRPOTrainer):
    """Counts the tokens that it generates."""

    generated = 0

    def _generate_single_turn(self, *given: Any, **more: Any) -> Any:
        made = super()._generate_single_turn(*given, **more)
        self.generated += sum(len(ids) for ids in made[0])
        return made


class Clock(TrainerCallback):
    """A mark after every optimiser step, with the tokens generated in it."""

    def __init__(self, watch: Stopwatch, trainer: Counting) -> None:
        self.watch, self.trainer, self.seen = watch, trainer, 0

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.watch.mark()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.watch.mark(self.trainer.generated - self.seen)
        self.seen = self.trainer.generated


def trainer_of(size: str, sampling: Sampling, batch: int, settings: dict[str, Any]) -> Counting:
    rows = sampling.groups * GROUP
    config = GRPOConfig(
        per_device_train_batch_size=min(batch, rows), gradient_accumulation_steps=max(1, rows // batch),
        num_generations=GROUP, max_completion_length=sampling.longest, beta=0.0, num_iterations=1, loss_type="dapo",
        epsilon=0.2, epsilon_high=0.28, temperature=1.0, top_p=1.0, top_k=0, log_completions=False,
        mask_truncated_completions=False, shuffle_dataset=False, **settings,
    )  # fmt: skip
    prompts = prompt_texts(sampling.prompt, SIZES[size].words)
    return Counting(model=str(folder(size)), reward_funcs=even_share, args=config,
                    train_dataset=Dataset.from_dict({"prompt": prompts}),
                    processing_class=PreTrainedTokenizerFast.from_pretrained(folder(size)))  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("size", choices=sorted(SAMPLING))
    parser.add_argument("--batch", type=int, default=16, help="rows per forward pass of the update")
    parser.add_argument("--engine", choices=sorted(ENGINES), default="generate")
    parser.add_argument("--warm", type=int, default=1)
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="fewer rollouts per step")
    given = parser.parse_args()
    torch.manual_seed(0)
    watch, sampling = Stopwatch(given.warm), (QUICK if given.quick else SAMPLING)[given.size]
    with tempfile.TemporaryDirectory() as out:
        steps = {"max_steps": given.warm + given.steps, "output_dir": out}
        trainer = trainer_of(given.size, sampling, given.batch, {**FAST, **ENGINES[given.engine], **steps})
        trainer.add_callback(Clock(watch, trainer))
        trainer.train()
    watch.say("token", versions=versions("trl", "transformers", "torch"), notes=f"{watch.per_step:.0f} tokens per step")


if __name__ == "__main__":
    main()
