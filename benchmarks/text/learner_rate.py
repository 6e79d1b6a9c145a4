"""Our learner beside the matmul rate: an update of the 60M-parameter model, and the operations that it has to make.

    python -m benchmarks.text.learner_rate --precision bfloat16

Counted are the multiply-adds of the equations, forward once and backward twice, for tokens that have to be computed: not what
padding, recomputation, softmax, norms or the optimiser cost. The prompt that the sequences share is counted once.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any

from benchmarks.text.ours_update import BUDGET, DAPO, episodes_of, prepared
from benchmarks.text.shapes import Batch, Shape, folder, scripted
from benchmarks.text.timing import Stopwatch, versions
from unipo.learner import Learner, LearnerSettings
from unipo.methods.catalog import build
from unipo.policies import load_policy

SHAPE = Shape(prompt=16, longest=192, shortest=192, groups=1, group=8)
PRECISIONS = {"float32": ("float32", "off"), "autocast": ("float32", "bfloat16"), "bfloat16": ("bfloat16", "off")}
"""Of the weights, and of autocast."""


def flop(config: Any, batch: Batch) -> float:
    """Of forward and backward: 6 per weight of a matrix and token (the head: per scored token), 6 d per pair of positions
    and layer for each of the two products of attention, half of the pairs because it is causal."""
    width, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    layer = config.hidden_size * (2 * width + 2 * kv) + 3 * config.hidden_size * config.intermediate_size
    prompt, lengths = len(batch.prompts[0]), [len(c) for c in batch.completions]
    tokens = prompt + sum(n - 1 for n in lengths)
    pairs = prompt**2 / 2 + sum((n - 1) * (prompt + (n - 1) / 2) for n in lengths)
    body = config.num_hidden_layers * (6 * layer * tokens + 12 * width * pairs)
    return body + 6 * config.hidden_size * config.vocab_size * sum(lengths)


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
    watch.say("update", work=flop(policy.model.config, batches[0]), versions=versions("unipo", "torch"))


if __name__ == "__main__":
    main()
