"""Our learner beside the matmul rate: an update of the 60M-parameter model, and the operations that it has to make.

    python -m benchmarks.text.learner_rate --precision bfloat16

What is counted: `work.py`.
"""

from __future__ import annotations

import argparse
from dataclasses import replace

from benchmarks.text import work
from benchmarks.text.ours_update import BUDGET, DAPO, episodes_of, prepared
from benchmarks.text.shapes import Shape, folder, scripted
from benchmarks.text.timing import Stopwatch, versions
from unipo.learner import Learner, LearnerSettings
from unipo.methods.catalog import build
from unipo.policies import load_policy

SHAPE = Shape(prompt=16, longest=192, shortest=192, groups=1, group=8)
PRECISIONS = {"float32": ("float32", "off"), "autocast": ("float32", "bfloat16"), "bfloat16": ("bfloat16", "off")}
"""Of the weights, and of autocast."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", default="60m")
    parser.add_argument("--precision", choices=sorted(PRECISIONS), default="float32")
    parser.add_argument("--warm", type=int, default=1)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--sequences", type=int, default=SHAPE.group)
    given = parser.parse_args()
    dtype, autocast = PRECISIONS[given.precision]
    watch, policy = Stopwatch(given.warm), load_policy(str(folder(given.model)), dtype)
    recipe = build("dapo-bytedance", {"dapo-bytedance": DAPO})
    settings = LearnerSettings(learning_rate=1e-6, token_budget=BUDGET, autocast=autocast)
    learner = Learner({"policy": policy}, settings, monitor=("logp", "entropy"))
    shape = replace(SHAPE, group=given.sequences)
    batches = [scripted(shape, policy.vocabulary, step) for step in range(given.warm + given.steps)]
    known = [prepared(recipe, policy, batch, False) for batch in batches]
    watch.mark()
    for batch, columns in zip(batches, known, strict=True):
        learner.update(episodes_of(batch, False, **columns), recipe.objective)
        watch.mark()
    watch.say("update", work=work.update(policy.model.config, batches[0]), versions=versions("unipo", "torch"))


if __name__ == "__main__":
    main()
