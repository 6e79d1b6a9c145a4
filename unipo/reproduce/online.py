"""REC: rollouts from weights that are up to 20 updates old. NFT: learning from wrong answers too."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from unipo.methods.catalog import build, find
from unipo.recipe import Recipe
from unipo.reproduce.claim import Claim, Expectation, Phases
from unipo.reproduce.network import NetworkPolicy
from unipo.reproduce.training import copy_of, divergence, entropy, fresh, success, train
from unipo.sources.keyed import keyed_generator
from unipo.tasks.tabular import TabularTask

PROMPTS, VOCABULARY, LENGTH, GROUP, SYNC = 10, 6, 4, 8, 20
RATES = (0.003, 0.01, 0.03, 0.1)
RIGHT = 0.05


def scattered(seed: int, prompts: int = PROMPTS) -> TabularTask:
    """A random 5 % of the 1,296 answers to each prompt are right: mixing two right answers token by token gives a wrong one."""
    right = keyed_generator(seed, "right answers").uniform(size=(prompts, *[VOCABULARY] * LENGTH)) < RIGHT
    return TabularTask(prompts, VOCABULARY, LENGTH, lambda prompt, tokens: float(right[(prompt, *tokens)]))


def stale_trial(phases: Phases, rate: float, seed: int, steps: int) -> Mapping[str, float]:
    """The rollout policy is a copy of the weights, renewed every `SYNC` updates. Tail: the last fifth of the steps."""
    task = scattered(seed)
    policy = NetworkPolicy(task, seed)
    before, curve, moved = [copy_of(policy)], [success(task, policy)], [0.0]

    def watch(step: int) -> None:
        if step % SYNC == 0 or step == steps:
            with torch.no_grad():
                moved.append(divergence(task, policy, task.log_probability(before[0])))
            before[0] = copy_of(policy)
            curve.append(success(task, policy))

    train(phases, policy, fresh(task, policy, GROUP, seed, SYNC), steps=steps, rate=rate, watch=watch)
    tail = curve[-max(1, len(curve) // 5) :]
    return {"success": sum(tail) / len(tail), "drop from best": max(curve) - curve[-1], "KL to behaviour": max(moved)}


def fresh_trial(phases: Phases, rate: float, seed: int, steps: int) -> Mapping[str, float]:
    """On-policy groups; exact success and entropy after `steps` updates, and the mean success on the way there."""
    task = scattered(seed)
    policy, curve = NetworkPolicy(task, seed), []

    def watch(step: int) -> None:
        if step % 5 == 0 or step == steps:
            curve.append(success(task, policy))

    train(phases, policy, fresh(task, policy, GROUP, seed), steps=steps, rate=rate, watch=watch)
    return {"success": curve[-1], "mean success": sum(curve) / len(curve), "entropy": entropy(task, policy)}


def _rec(**settings: str) -> tuple[Recipe]:
    return (build("rec", {"rec": settings}),)


SETTING = (
    f"A network of one hidden layer for {PROMPTS} prompts, of whose 1,296 answers each a random 5 % is right. In a table of "
    "logits without shared parameters every arm, the baselines too, went to a success of 1, which decides nothing."
)
STALE, WITH, WITHOUT = "plain reinforce", "one-side, IS", "one-side, no IS"
CLAIMS = (
    Claim(
        slug="rec",
        statement=find("rec").claim,
        arms={
            WITH: _rec(),
            WITHOUT: _rec(weight="none"),
            STALE: _rec(weight="none", clip="none"),
            "asymre": (build("asymre", {}),),
        },
        trial=stale_trial,
        steps=200,
        tune="success",
        grid=RATES,
        expectations=(
            Expectation(arm=WITH, metric="success", than=STALE, least=0.0),
            Expectation(arm=WITHOUT, metric="success", than=STALE, least=0.0),
            Expectation(arm=WITHOUT, metric="success", than=WITH, least=-0.03, most=0.03),
            Expectation(arm=WITH, metric="KL to behaviour", than=STALE, most=0.0),
            Expectation(arm=WITHOUT, metric="KL to behaviour", than=STALE, most=0.0),
        ),
        note=f"{SETTING} Groups of {GROUP} from weights synchronised every {SYNC} updates, exact success "
        "(mean of the last fifth of the run) and KL to the behaviour policy just before a synchronisation (largest).",
    ),
    Claim(
        slug="nft",
        statement="NFT beats rejection fine-tuning in success and in entropy, and is as good as GRPO at equal steps",
        arms={
            "nft": (build("nft", {}),),
            "rejection fine-tuning": (build("nft", {"nft": {"negative": 0.0, "omega": "1"}}),),
            "grpo": (build("grpo", {}),),
        },
        trial=fresh_trial,
        steps=120,
        tune="success",
        grid=RATES,
        expectations=(
            Expectation(arm="nft", metric="success", than="rejection fine-tuning", least=0.0),
            Expectation(arm="nft", metric="entropy", than="rejection fine-tuning", least=0.0),
            Expectation(arm="nft", metric="success", than="grpo", least=-0.02),
        ),
        note=f"{SETTING} On-policy groups of {GROUP}, 120 updates, exact success and entropy. Rejection "
        "fine-tuning is nft with negative 0 and omega 1. Groups of equal outcome are left out by both and not refilled.",
    ),
)
