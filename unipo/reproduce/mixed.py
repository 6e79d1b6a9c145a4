"""Rollouts and demonstrations in one run: HPT on prompts that are never solved, CHORD with experts of another style."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from unipo.episodes import Episodes, offsets_of
from unipo.methods.catalog import build, find
from unipo.reproduce.claim import Claim, Expectation, Phases
from unipo.reproduce.network import NetworkPolicy
from unipo.reproduce.training import Draw, fresh, success, train
from unipo.sources.keyed import keyed_generator
from unipo.tasks.tabular import TabularTask

PROMPTS, VOCABULARY, LENGTH, GROUP = 10, 6, 4, 8
HARD, STYLED = 4, 0.2
RATES = (0.003, 0.01, 0.03, 0.1)
GRPO, SFT = build("grpo", {}), build("sft", {})
Answer = tuple[int, ...]


def demonstrations(answers: Mapping[int, Answer]) -> Episodes:
    """One episode of kind "demo" per prompt that has one."""
    prompts = list(answers)
    return Episodes.build(list(answers.values()), [[q] for q in prompts], prompt_id=prompts,
                          kind=["demo"] * len(prompts), truncated=[False] * len(prompts))  # fmt: skip


def with_demonstrations(draw: Draw, answers: Mapping[int, Answer]) -> Draw:
    """The same batches; the demonstration of each prompt that has one joins its group."""
    shown = demonstrations(answers)

    def joined(step: int) -> Episodes:
        made = Episodes.cat([draw(step), shown])
        made = made.select(made["prompt_id"].argsort(stable=True))
        sizes = torch.unique_consecutive(made["prompt_id"], return_counts=True)[1]
        counts = {"turn": made.lengths("turn"), "episode": made.lengths("episode", "turn"), "group": sizes}
        return Episodes({level: offsets_of(n) for level, n in counts.items()}, made.columns)

    return joined


def answer(seed: int, prompt: int, style: str = "") -> Answer:
    return tuple(keyed_generator(seed, "answer", style, prompt).integers(VOCABULARY, size=LENGTH).tolist())


# ---- HPT -------------------------------------------------------------------------------------------------------------
def hpt_trial(phases: Phases, rate: float, seed: int, steps: int) -> Mapping[str, float]:
    """The first `HARD` prompts have one right answer of 1,296 and a demonstration of it; of the others one in six is right."""
    hard = {prompt: answer(seed, prompt) for prompt in range(HARD)}

    def reward(prompt: int, tokens: Answer) -> float:
        return float(tokens == hard[prompt] if prompt in hard else sum(tokens) % VOCABULARY == prompt % VOCABULARY)

    task = TabularTask(PROMPTS, VOCABULARY, LENGTH, reward)
    policy = NetworkPolicy(task, seed)
    train(phases, policy, with_demonstrations(fresh(task, policy, GROUP, seed), hard), steps=steps, rate=rate)
    with torch.no_grad():
        solved = task.success(policy)
    return {"success": float(solved.mean()), "hard prompts": float(solved[:HARD].mean()),
            "other prompts": float(solved[HARD:].mean())}  # fmt: skip


# ---- CHORD -----------------------------------------------------------------------------------------------------------
def styled_policy(task: TabularTask, own: Sequence[Answer], seed: int) -> NetworkPolicy:
    """A policy taught its own style until `STYLED` of its answers are right."""
    policy = NetworkPolicy(task, seed)
    taught = demonstrations(dict(enumerate(own)))
    while success(task, policy) < STYLED:
        train((SFT,), policy, lambda step: taught, steps=5, rate=0.01)
    return policy


def chord_trial(phases: Phases, rate: float, seed: int, steps: int) -> Mapping[str, float]:
    """Two answers are right: the one in the policy's style, and the expert's, which differs from it in every token."""
    own = [answer(seed, q, "own") for q in range(PROMPTS)]
    shift = keyed_generator(seed, "style").integers(1, VOCABULARY, size=(PROMPTS, LENGTH))
    expert = [tuple((t + int(s)) % VOCABULARY for t, s in zip(own[q], shift[q], strict=True)) for q in range(PROMPTS)]
    task = TabularTask(PROMPTS, VOCABULARY, LENGTH, lambda q, tokens: float(tokens in (own[q], expert[q])))
    policy = styled_policy(task, own, seed)
    curve = [success(task, policy)]
    draw = with_demonstrations(fresh(task, policy, GROUP, seed), dict(enumerate(expert)))
    train(phases, policy, draw, steps=steps, rate=rate, watch=lambda step: curve.append(success(task, policy)))
    return {"success": curve[-1], "dip": curve[0] - min(curve), "mean success": sum(curve) / len(curve)}


THEN = "sft, then grpo"
CLAIMS = (
    Claim(
        slug="upge-hpt",
        statement=find("upge-hpt").claim,
        arms={
            "hpt": (build("upge-hpt", {"upge-hpt": {"budget": float(LENGTH)}}),),
            "grpo": (GRPO,),
            "sft": (SFT,),
            THEN: (SFT, GRPO),
        },
        trial=hpt_trial,
        steps=120,
        tune="success",
        grid=RATES,
        expectations=tuple(
            Expectation(arm="hpt", metric="success", than=than, least=0.0) for than in ("grpo", "sft", THEN)
        ),
        note=f"A network of one hidden layer, {PROMPTS} prompts, of which {HARD} have a pass rate near 0 and one demonstration "
        f"each (the others have none), groups of {GROUP}, 120 updates for every arm, exact success rate. Sft alone "
        "sees the demonstrated prompts only. (In a table of logits HPT and sft, then grpo both reached 1.) "
        "Sft, then grpo: half the updates each.",
    ),
    Claim(
        slug="chord",
        statement="with experts of another style, SFT then RL dips in accuracy; CHORD-phi does not, and ends at or above GRPO "
        "and SFT + GRPO with a constant mu",
        arms={
            "chord-phi": (build("chord", {}),),
            "grpo": (GRPO,),
            THEN: (SFT, GRPO),
            "sft + grpo, constant mu": (build("chord", {"chord": {"token_weight": "one"}}),),
        },
        trial=chord_trial,
        steps=100,
        tune="success",
        grid=RATES,
        expectations=(
            Expectation(arm=THEN, metric="dip", least=0.02),
            Expectation(arm="chord-phi", metric="dip", most=0.02),
            Expectation(arm="chord-phi", metric="success", than="grpo", least=-0.02),
            Expectation(arm="chord-phi", metric="success", than="sft + grpo, constant mu", least=-0.02),
        ),
        note=f"A network of one hidden layer, {PROMPTS} prompts with two right answers: one in the policy's own style (about "
        f"20 % at the start) and the expert's, other in every token; groups of {GROUP}, 100 updates for every arm, exact success "
        "after every update. Dip: initial success minus the lowest. Constant mu: 0.1, as CHORD-phi, without phi. The experts "
        "answer the very prompts that are measured, which favours plain likelihood.",
    ),
)
