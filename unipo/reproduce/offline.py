"""TOPR: many epochs on a fixed set of the policy's own samples (arXiv 2503.14286)."""

from __future__ import annotations

from collections.abc import Mapping

from unipo.methods.catalog import build
from unipo.objectives import ClipMask, TokenRatio
from unipo.reproduce.claim import Claim, Expectation, Phases
from unipo.reproduce.training import copy_of, entropy, key, near_uniform, success, train
from unipo.tasks.tabular import TabularTask

PROMPTS, VOCABULARY, LENGTH, SAMPLES = 8, 6, 3, 16


def digit_sum() -> TabularTask:
    """Right when the digits sum to the prompt's number, modulo the vocabulary: one answer in six."""
    return TabularTask(PROMPTS, VOCABULARY, LENGTH, lambda q, t: float(sum(t) % VOCABULARY == q % VOCABULARY))


def trial(phases: Phases, rate: float, seed: int, steps: int) -> Mapping[str, float]:
    """`steps` epochs, one update each, on `SAMPLES` answers per prompt of the initial policy; exact success."""
    task = digit_sum()
    policy = near_uniform(task, seed)
    data = task.sample(copy_of(policy), SAMPLES, key(seed, "dataset"))
    curve = [success(task, policy)]

    def watch(step: int) -> None:
        if step % 10 == 0 or step == steps:
            curve.append(success(task, policy))

    train(phases, policy, lambda step: data, steps=steps, rate=rate, watch=watch)
    return {"success": curve[-1], "drop from best": max(curve) - curve[-1], "entropy": entropy(task, policy)}


TOPR = build("topr", {})
ONE, ZERO = (1.0, 1.0), (0.0, 0.0)
CLAIMS = (
    Claim(
        slug="topr",
        statement="many epochs on a fixed set of own samples: naive REINFORCE degenerates, PPO's clip stalls, positives only "
        "plateau, and TOPR is best and stable",
        arms={
            "topr": (TOPR,),
            "naive reinforce": (build("topr", {"topr": {"positive": ONE, "negative": ONE}}),),
            "positives only": (build("topr", {"topr": {"negative": ZERO}}),),
            "ppo clip": (TOPR.but(weight=TokenRatio(), mask=ClipMask(0.2, 0.2)),),
        },
        trial=trial,
        steps=400,
        tune="success",
        expectations=(
            Expectation(arm="topr", metric="success", than="naive reinforce", least=0.0),
            Expectation(arm="topr", metric="success", than="positives only", least=0.0),
            Expectation(arm="topr", metric="success", than="ppo clip", least=0.0),
            Expectation(arm="topr", metric="drop from best", most=0.02),
        ),
        note=f"Tabular language policy, {PROMPTS} prompts, {SAMPLES} samples each of the initial policy (right one time in "
        "six), A = 1 or -1, 400 epochs of one update, exact success rate. Nothing generalises between prompts here.",
    ),
)
