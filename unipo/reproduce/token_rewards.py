"""RLFR: does a flow of expert solutions tell right from wrong, and does it help? OREAL: right answers alone, and more."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import cache, lru_cache
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from unipo.episodes import Episodes
from unipo.methods.catalog import build, find
from unipo.reproduce.claim import Claim, Expectation, Phases
from unipo.reproduce.mixed import demonstrations
from unipo.reproduce.network import NetworkPolicy
from unipo.reproduce.training import copy_of, entropy, success, train
from unipo.sources.companions.flow import FlowCompanion, FlowReward
from unipo.sources.keyed import keyed_generator
from unipo.sources.text.tabular import TabularPrompts, tabular_rollouts
from unipo.tasks.tabular import TabularTask

# ---- RLFR ------------------------------------------------------------------------------------------------------------
PROMPTS, VOCABULARY, LENGTH, FOLLOWING = 10, 6, 4, 3
ASKED, READ = 24, 0.2
OFFLINE = 20
FLOW = FlowReward(offline=OFFLINE, layers=(1.0,), updates=3, learning_rate=1e-3, depth=2)


def grammar(seed: int) -> tuple[TabularTask, dict[int, tuple[int, ...]]]:
    """Right is what a grammar allows, three followers of each token, and ends in the token of its prompt; and an answer each."""
    draw = keyed_generator(seed, "grammar")
    allowed = [draw.permutation(VOCABULARY)[:FOLLOWING].tolist() for _ in range(VOCABULARY)]
    words = _walks(allowed, LENGTH)
    shown = {q: words[int(draw.integers(len(words)))] for q in range(ASKED)}

    def reward(prompt: int, tokens: tuple[int, ...]) -> float:
        follows = all(b in allowed[a] for a, b in pairwise(tokens))
        return float(follows and tokens[-1] == shown[prompt][-1])

    return TabularTask(ASKED, VOCABULARY, LENGTH, reward), shown


@lru_cache(32)
def reader(seed: int) -> NetworkPolicy:
    """A policy that has read the demonstrations until a share `READ` of what it says is right."""
    task, known = grammar(seed)
    policy = NetworkPolicy(task, seed)
    while success(task, policy) < READ:
        train((build("sft", {}),), policy, lambda step: demonstrations(known), steps=2, rate=0.01)
    return policy


def _walks(allowed: list[list[int]], length: int) -> list[tuple[int, ...]]:
    """Every sequence of `length` that the grammar allows."""
    found: list[tuple[int, ...]] = [(token,) for token in range(len(allowed))]
    for _ in range(length - 1):
        found = [(*word, token) for word in found for token in allowed[word[-1]]]
    return found


def flow_trial(phases: Phases, rate: float, seed: int, steps: int) -> Mapping[str, float]:
    """Exact success after as many steps of the policy for every arm: what a flow learns before does not count."""
    (task, shown), policy = grammar(seed), copy.deepcopy(reader(seed))
    (recipe,) = phases
    auc = separation(seed, min(OFFLINE, steps))
    waiting = OFFLINE if recipe.companions and steps > OFFLINE else 0
    rollouts = tabular_rollouts(task, policy, recipe.rollouts, seed, TabularPrompts(task, shown))
    train(phases, policy, lambda step: rollouts.draw(step, step), steps=steps + waiting, rate=rate)
    return {"success": success(task, policy), "entropy": entropy(task, policy), "AUC before": auc}


@cache
def separation(seed: int, steps: int) -> float:
    """How often a right answer has a lower mean flow score than a wrong one to the same prompt, before any learning from
    rewards: the flow is fitted to demonstrations of a policy that stands still."""
    (task, shown), policy = grammar(seed), reader(seed)
    recipe = build("rlfr", {"rlfr": {"offline": OFFLINE, "group": 2}})
    rollouts = tabular_rollouts(task, policy, recipe.rollouts, seed, TabularPrompts(task, shown))
    flow = FlowCompanion(FLOW, policy, seed)
    for step in range(steps):
        batch = rollouts.draw(step, step)
        flow.learn(flow.annotate(batch, step), step)
    right = task.rewards.flatten() > 0.5
    looked = right | (torch.arange(len(right)) % 7 == 0)
    prompt, chosen = torch.cartesian_prod(*(torch.arange(n) for n in task.rewards.shape))[looked].unbind(1)
    some = Episodes.build([task.sequences[i] for i in chosen.tolist()], prompt[:, None].tolist(), prompt.tolist(),
                          kind=["rollout"] * len(chosen), prompt_id=prompt.tolist(),
                          reward=right[looked].double().tolist())  # fmt: skip
    flow.annotate(some, steps)
    score, known = flow.scores(some, steps)
    mean = some.reduce(torch.where(known, score, 0.0)) / some.reduce(known.to(score))
    return area(mean, some["reward"] > 0.5, some["prompt_id"])


def area(score: Tensor, right: Tensor, prompt: Tensor) -> float:
    """Share of pairs of a right and a wrong answer to one prompt in which the wrong one has the larger score."""
    better = score[right][:, None] < score[~right][None]
    same = prompt[right][:, None] == prompt[~right][None]
    return float(better[same].double().mean()) if bool(same.any()) else 0.5


# ---- OREAL -----------------------------------------------------------------------------------------------------------
def stepwise(seed: int) -> TabularTask:
    """Right is an answer of which every token is one of the two that its prompt allows at its place: 1 in 81."""
    order = keyed_generator(seed, "stepwise").permuted(np.tile(np.arange(VOCABULARY), (PROMPTS, LENGTH, 1)), axis=2)
    return TabularTask(PROMPTS, VOCABULARY, LENGTH,
                       lambda q, tokens: float(all(t in order[q, i, :2] for i, t in enumerate(tokens))))  # fmt: skip


def outcome_trial(phases: Phases, rate: float, seed: int, steps: int) -> Mapping[str, float]:
    """Exact pass@1, pass@16 and entropy after equal steps, of which a warm-up of the reward model counts as any other."""
    task = stepwise(seed)
    policy = NetworkPolicy(task, seed)
    (recipe,) = phases
    rollouts = tabular_rollouts(task, policy, recipe.rollouts, seed)

    def draw(step: int) -> Episodes:
        return rollouts.draw(step, step)

    train(phases, policy, draw, steps=steps, rate=rate, reference=copy_of(policy))
    with torch.no_grad():
        solved = task.success(policy)
    return {"pass@1": float(solved.mean()), "pass@16": float((1 - (1 - solved) ** 16).mean()),
            "entropy": entropy(task, policy)}  # fmt: skip


def _oreal(**settings: float | str) -> Phases:
    return (build("oreal", {"oreal": {"credit_rate": 1e-2, **settings}}),)


FULL, UNWEIGHTED, POSITIVE = "oreal", "without token weights", "right answers alone"
CLAIMS = (
    Claim(
        slug="rlfr",
        statement=find("rlfr").claim,
        arms={
            "rlfr": (build("rlfr", {"rlfr": {"offline": OFFLINE}}).but(companions=(FLOW,)),),
            "grpo": (build("grpo", {}),),
            "grpo, entropy bonus": (build("grpo", {"grpo": {"entropy": 0.01}}),),
        },
        trial=flow_trial,
        steps=24,
        tune="success",
        grid=(0.01, 0.03),
        expectations=(
            Expectation(arm="rlfr", metric="AUC before", least=0.5),
            Expectation(arm="rlfr", metric="success", than="grpo", least=-0.03),
            Expectation(arm="rlfr", metric="success", than="grpo, entropy bonus", least=-0.03),
        ),
        note="A network of one hidden layer, whose states are the flow's. An answer of four tokens is right if each token "
        "is one of three that may follow the one before and the last is that of its prompt; one demonstration for each of "
        f"{ASKED} prompts, which the policy has read until {READ:.0%} of what it says is right. AUC: the flow fitted to "
        "demonstrations for 20 steps, right against wrong answers to one prompt, before any training from rewards. Groups "
        "of eight; every arm trains its policy for the same 24 steps. Changed: ten prompts and a policy of random weights, "
        "which the paper does not start from: runs differed by the prompts that they ever solved, and 10 seeds left the "
        "success open (+0.02 [-0.08, 0.13]). Seen: the flow tells right from wrong before any training; as a reward it "
        "moves success by about as much as the tolerance or less. At the paper's coefficient of 0.01 a token's reward is a "
        "hundredth of an outcome's, and in four tokens the largest error is punished whatever it is, so that the "
        "difference to GRPO is mostly what two runs differ by.",
    ),
    Claim(
        slug="oreal",
        statement=find("oreal").claim,
        arms={
            FULL: _oreal(),
            UNWEIGHTED: _oreal(credit="one"),
            POSITIVE: _oreal(credit="one", negative=0.0),
            "grpo": (build("grpo", {"grpo": {"group": 16}}),),
        },
        trial=outcome_trial,
        steps=60,
        tune="pass@1",
        grid=(0.03, 0.1),
        expectations=(
            Expectation(arm=UNWEIGHTED, metric="pass@1", than=POSITIVE, least=0.0),
            Expectation(arm=UNWEIGHTED, metric="entropy", than=POSITIVE, least=0.0),
            Expectation(arm=FULL, metric="pass@1", than=UNWEIGHTED, least=0.0),
            Expectation(arm=FULL, metric="pass@1", than="grpo", least=-0.03),
        ),
        note="A network of one hidden layer for ten prompts; each of the four tokens of a right answer is one of two that the "
        "prompt allows at its place, so that tokens can be credited apart. Groups of 16, "
        "60 steps, exact pass@1, pass@16 and entropy; all arms but GRPO keep one right and one wrong rollout of each mixed "
        "group and a KL to the start of 0.01. The reward model is a copy of the network with a scalar head; the policy waits "
        "for it 10 of the 60 steps. Seen: wrong answers make learning faster and entropy smaller, since they sharpen what "
        "cloning leaves broad; token weights hurt, for a reward model that sees some ten pairs a step is not sure of any token "
        "before the policy has settled. "
        "Also looked at, seed 2000: where 4 of 12 tokens decide, 80 steps, the order is the same: 0.83 without token weights, "
        "0.69 with right answers alone, 0.28 with token weights (0.57 with a reward model that learns five times as fast).",
    ),
)
