"""Our side of the scripted rows: `Learner.update` with a method of the catalog on the given tokens.

    python -m benchmarks.text.ours_update s1 --model m25

One step: episodes from lists of tokens, the columns that the method needs, signals, gradient, clip, AdamW. Behaviour and
reference log-probs are there before, as a sampler and a precomputed reference leave them. `--signals` names what is computed
only to be reported: TRL always computes the entropy.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch

from benchmarks.text import work
from benchmarks.text.shapes import SHAPES, SIZES, Batch, folder, scripted
from benchmarks.text.timing import Stopwatch, versions
from unipo.episodes import Episodes
from unipo.learner import Learner, LearnerSettings, Update
from unipo.learner.annotate import emitted
from unipo.methods.catalog import build
from unipo.policies import load_policy
from unipo.recipe import Recipe

BUDGET = 16384
"""Tokens per micro-batch, the default of `unipo run`."""
DAPO = {"group": 8, "eps": 1e-4, "minibatches": 1, "overlong": 0.0}
"""TRL adds 1e-4 to the standard deviation."""


def episodes_of(batch: Batch, pairs: bool, **columns: Any) -> Episodes:
    """Episodes from the lists of a step; `columns` [N] are known log-probs."""
    n = len(batch.completions)
    group = n // len(batch.prompts)
    owner = [i for i in range(len(batch.prompts)) for _ in range(group)]
    known = {"chosen": [True, False] * len(batch.prompts)} if pairs else {"reward": batch.rewards}
    made = Episodes.build(batch.completions, [batch.prompts[i] for i in owner], owner,
                          kind=["pair" if pairs else "rollout"] * n, **known)  # fmt: skip
    return made.with_columns("step", **columns)


def prepared(recipe: Recipe, policy: Any, batch: Batch, pairs: bool) -> dict[str, torch.Tensor]:
    """The log-probs that the method needs, under the weights of the start."""
    names = [c for c in ("behavior_logp", "reference_logp") if c in recipe.needs.columns]
    found = emitted(episodes_of(batch, pairs), ["logp"], policy, BUDGET)["logp"]
    return dict.fromkeys(names, found)


def loss_of(done: Update, pairs: bool) -> float:
    """What TRL calls the loss: for GRPO the ratio form, whose gradient ours has by its log form."""
    if pairs:
        return float(done.coefficients.loss)
    advantage = done.coefficients.terms[0].facts["advantage"]
    ratio = (done.signals["logp"] - done.episodes["behavior_logp"]).exp()
    return float(-torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.28) * advantage).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("shape", choices=sorted(SHAPES))
    parser.add_argument("--model", default="m25")
    parser.add_argument("--signals", default="logp,entropy")
    parser.add_argument("--warm", type=int, default=1)
    parser.add_argument("--steps", type=int, default=2)
    given = parser.parse_args()
    watch, pairs, words = Stopwatch(given.warm), given.shape.startswith("d"), SIZES[given.model].words
    batches = [scripted(SHAPES[given.shape], words, step) for step in range(given.warm + given.steps)]
    policy = load_policy(str(folder(given.model)))
    recipe = build("dpo", {}) if pairs else build("dapo-bytedance", {"dapo-bytedance": DAPO})
    known = [prepared(recipe, policy, batch, pairs) for batch in batches]
    settings = LearnerSettings(learning_rate=1e-6, token_budget=BUDGET)
    learner = Learner({"policy": policy}, settings, monitor=tuple(filter(None, given.signals.split(","))))
    seen: dict[str, float] = {}
    computed = 0
    watch.mark()
    for batch, columns in zip(batches, known, strict=True):
        done = learner.update(episodes_of(batch, pairs, **columns), recipe.objective)
        watch.mark()
        seen = seen or {"loss": loss_of(done, pairs), "grad_norm": done.grad_norm}
        computed += done.tokens_computed
    needed = sum(work.update(policy.model.config, batch) for batch in batches[given.warm :]) / given.steps
    watch.say("step", gate=seen, work=needed, versions=versions("unipo", "transformers", "torch"),
              notes=f"{computed / len(batches):.0f} tokens computed per step")  # fmt: skip


if __name__ == "__main__":
    main()
