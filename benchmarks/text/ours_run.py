"""Our side of the end-to-end rows: the doors that `unipo run` takes, on a local model folder, a JSONL file and a Python reward.

    python -m benchmarks.text.ours_run 10m

The same loss as TRL's: group z-scores, token mean, clip 0.2 / 0.28. No evaluation, no saving, no TensorBoard, as there;
metrics, ledger and the rows of metrics.parquet are part of a step. Work: a forward pass to sample, one and a backward of two to
learn, as if all completions had the mean length.
"""

from __future__ import annotations

import argparse
import json
import tempfile

from rich.console import Console

from benchmarks.text import reward, work
from benchmarks.text.shapes import FOLDER, GROUP, QUICK, SAMPLING, SIZES, Sampling, folder, prompt_texts
from benchmarks.text.timing import Stopwatch, versions
from unipo.api import configure, start
from unipo.training import Run
from unipo.training.text import TextData

METHOD = "dapo-bytedance"
SAME = {"group": 8, "eps": 1e-4, "minibatches": 1, "overlong": 0.0, "refill": 0}


def run_of(size: str, sampling: Sampling, out: str) -> Run:
    """A run at step 0, in a folder that is not there yet."""
    data = FOLDER / f"prompts-{size}-{sampling.prompt}.jsonl"
    texts = prompt_texts(sampling.prompt, SIZES[size].words)
    data.write_text("".join(json.dumps({"prompt": text, "answer": ""}) + "\n" for text in texts))
    config, recipe = configure(
        METHOD, str(data), {METHOD: SAME}, model=str(folder(size)), reward=f"{reward.__file__}:even_share",
        prompts=sampling.groups, max_tokens=sampling.longest, learning_rate=1e-6, schedule="constant", steps=10**6,
        eval_every=0, checkpoint_every=10**6, save_episodes=False, tensorboard=False, out=out,
    )  # fmt: skip
    return start(config, recipe, Console(quiet=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("size", choices=sorted(SAMPLING))
    parser.add_argument("--warm", type=int, default=1)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="fewer rollouts per step")
    given = parser.parse_args()
    watch, sampling = Stopwatch(given.warm), (QUICK if given.quick else SAMPLING)[given.size]
    with tempfile.TemporaryDirectory() as folder:
        run, seen = run_of(given.size, sampling, f"{folder}/run"), 0
        assert isinstance(run.data, TextData)
        assert run.data.rollouts is not None
        watch.mark()
        for _ in range(given.warm + given.steps):
            run.advance()
            sampled = run.data.rollouts.tokens_sampled
            watch.mark(sampled - seen)
            seen = sampled
    length = watch.per_step / (sampling.groups * GROUP)
    sampled_once = sampling.groups * work.forward(run.policy.model.config, sampling.prompt, [length] * GROUP)
    watch.say("token", work=4 * sampled_once / watch.per_step, versions=versions("unipo", "transformers", "torch"),
              notes=f"{watch.per_step:.0f} tokens per step")  # fmt: skip


if __name__ == "__main__":
    main()
