"""Our side of time-to-90: a method of the catalog from the doors that `unipo run` takes.

python -m benchmarks.text.time_to_90_ours grpo --lr 1e-3 --prompts 8
"""

from __future__ import annotations

import tempfile
from typing import Any

from rich.console import Console

from benchmarks.text import time_to_90 as shared
from benchmarks.text.timing import versions
from unipo.api import configure, start

OPTIONS: dict[str, dict[str, Any]] = {
    "dapo-bytedance": {"group": shared.GROUP, "minibatches": 1, "overlong": 0.0, "refill": 0},
    "cispo": {"minibatches": 1},
}
"""One update per batch, as TRL's; the other methods do that by themselves."""
DEMOS: dict[str, Any] = {"demos": "task", "demos_per_step": 64, "dataset_rows": shared.TRAIN}
"""For methods that also imitate: right answers to training problems, written by the task."""


def main() -> None:
    given = shared.arguments(None, __doc__ or "")
    options = {name: keywords for name, keywords in OPTIONS.items() if name in given.method}
    shared.problems()
    mixed = DEMOS if "sft" in given.method else {}
    with tempfile.TemporaryDirectory() as folder:
        config, recipe = configure(
            given.method, "arithmetic", options, model=str(shared.TINY), reward=f"{shared.__file__}:exact",
            prompts=given.prompts, rollouts=shared.GROUP, learning_rate=given.lr, schedule="constant", steps=10**6,
            eval_every=0, checkpoint_every=10**6, save_episodes=False, tensorboard=False, seed=given.seed,
            out=f"{folder}/run", **mixed,
        )  # fmt: skip
        run = start(config, recipe, Console(quiet=True))
        race, model = shared.race(run.policy.tokenizer, given), run.policy.model
        race.start(model)
        while True:
            run.advance()
            if race.step(model):
                break
    race.say(given, versions=versions("unipo", "transformers", "torch"))


if __name__ == "__main__":
    main()
