"""TRL's side of time-to-90: a loss of GRPOTrainer in its fastest settings on a CPU.

python -m benchmarks.text.time_to_90_trl dapo --lr 1e-3 --prompts 8
"""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from benchmarks.text import time_to_90 as shared
from benchmarks.text.timing import versions
from benchmarks.text.trl_update import FAST

LOSSES = ("grpo", "dapo", "dr_grpo", "bnpo", "cispo")
UPPER = {"dapo": {"epsilon_high": 0.28}, "cispo": {"epsilon_high": 5.0}}
"""The published upper clips."""
ROWS = 128
"""Completions per forward pass at most."""


class Measuring(TrainerCallback):
    """The accuracy after optimiser steps; ends the training at the bar or the cap."""

    def __init__(self, race: shared.Race) -> None:
        self.race = race

    def on_train_begin(self, *_: Any, model: Any, **__: Any) -> None:
        self.race.start(model)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any, **_: Any) -> None:
        control.should_training_stop |= self.race.step(model)


def main() -> None:
    given = shared.arguments(LOSSES, __doc__ or "")
    torch.manual_seed(given.seed)
    train, tokenizer = shared.problems()["train"], AutoTokenizer.from_pretrained(shared.TINY)
    batch = given.prompts * shared.GROUP
    settings = {**FAST, "learning_rate": given.lr, "max_steps": 10**6, "seed": given.seed}
    race = shared.race(tokenizer, given)
    with tempfile.TemporaryDirectory() as out:
        config = GRPOConfig(
            per_device_train_batch_size=min(ROWS, batch), gradient_accumulation_steps=max(1, batch // ROWS),
            num_generations=shared.GROUP, max_completion_length=shared.LONGEST, beta=0.0, num_iterations=1,
            loss_type=given.method, epsilon=0.2, temperature=1.0, top_p=1.0, top_k=0, log_completions=False,
            mask_truncated_completions=False, output_dir=out, **UPPER.get(given.method, {}), **settings,
        )  # fmt: skip
        rows = {"prompt": [p for p, _ in train], "answer": [a for _, a in train]}
        trainer = GRPOTrainer(model=str(shared.TINY), reward_funcs=shared.exact, args=config,
                              train_dataset=Dataset.from_dict(rows), processing_class=tokenizer,
                              callbacks=[Measuring(race)])  # fmt: skip
        trainer.train()
    race.say(given, versions=versions("trl", "transformers", "torch"))


if __name__ == "__main__":
    main()
