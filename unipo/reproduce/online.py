"""REC: rollouts from weights that are up to 20 updates old. NFT: learning from wrong answers too."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from unipo.methods.catalog import build, find
from unipo.recipe import Recipe
from unipo.reproduce.claim import Claim, Expectation, Phases
from unipo.reproduce.offline import digit_sum
from unipo.reproduce.training import copy_of, divergence, entropy, fresh, near_uniform, success, train

GROUP, SYNC = 8, 20


def stale_trial(phases: Phases, rate: float, seed: int, steps: int) -> Mapping[str, float]:
    """The rollout policy is a copy of the weights, renewed every `SYNC` updates. Tail: the last fifth of the steps."""
    task = digit_sum()
    policy = near_uniform(task, seed)
    behaviour, curve, moved = copy_of(policy), [success(task, policy)], [0.0]

    def watch(step: int) -> None:
        if step % SYNC == 0 or step == steps:
            with torch.no_grad():
                moved.append(divergence(task, policy, task.log_probability(behaviour)))
            behaviour.load_state_dict(policy.state_dict())
            curve.append(success(task, policy))

    train(phases, policy, fresh(task, policy, GROUP, seed, SYNC), steps=steps, rate=rate, watch=watch)
    tail = curve[-max(1, len(curve) // 5) :]
    return {"success": sum(tail) / len(tail), "drop from best": max(curve) - curve[-1], "KL to behaviour": max(moved)}


def fresh_trial(phases: Phases, rate: float, seed: int, steps: int) -> Mapping[str, float]:
    """On-policy groups; exact success and entropy after `steps` updates, and the mean success on the way there."""
    task = digit_sum()
    policy, curve = near_uniform(task, seed), []

    def watch(step: int) -> None:
        if step % 5 == 0 or step == steps:
            curve.append(success(task, policy))

    train(phases, policy, fresh(task, policy, GROUP, seed), steps=steps, rate=rate, watch=watch)
    return {"success": curve[-1], "mean success": sum(curve) / len(curve), "entropy": entropy(task, policy)}


def _rec(**settings: str) -> tuple[Recipe]:
    return (build("rec", {"rec": settings}),)


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
        steps=300,
        tune="success",
        expectations=(
            Expectation(arm=WITH, metric="success", than=STALE, least=0.0),
            Expectation(arm=WITHOUT, metric="success", than=STALE, least=0.0),
            Expectation(arm=WITHOUT, metric="success", than=WITH, least=-0.03, most=0.03),
            Expectation(arm=WITH, metric="KL to behaviour", than=STALE, most=0.0),
            Expectation(arm=WITHOUT, metric="KL to behaviour", than=STALE, most=0.0),
        ),
        note=f"Tabular language policy, groups of {GROUP} from weights synchronised every {SYNC} updates, exact success "
        "(mean of the last fifth of the run) and KL to the behaviour policy just before a synchronisation (largest).",
    ),
    Claim(
        slug="nft",
        statement=find("nft").claim,
        arms={
            "nft": (build("nft", {}),),
            "rejection fine-tuning": (build("nft", {"nft": {"negative": 0.0, "omega": "1"}}),),
            "grpo": (build("grpo", {}),),
        },
        trial=fresh_trial,
        steps=120,
        tune="success",
        expectations=(
            Expectation(arm="nft", metric="success", than="rejection fine-tuning", least=0.0),
            Expectation(arm="nft", metric="entropy", than="rejection fine-tuning", least=0.0),
            Expectation(arm="nft", metric="success", than="grpo", least=-0.02),
        ),
        note=f"Tabular language policy, on-policy groups of {GROUP}, 120 updates, exact success and entropy. Rejection "
        "fine-tuning is nft with negative 0 and omega 1. Groups of equal outcome are left out by both and not refilled.",
    ),
)
