"""Rollouts and demonstrations in one run: HPT on prompts that are never solved, CHORD with experts of another style."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from unipo.episodes import Episodes
from unipo.methods.catalog import build, find
from unipo.policies.tabular import TabularPolicy
from unipo.reproduce.claim import Claim, Expectation, Phases
from unipo.reproduce.training import Draw, fresh, near_uniform, success, train
from unipo.sources.keyed import keyed_generator
from unipo.tasks.tabular import TabularTask

PROMPTS, VOCABULARY, LENGTH, GROUP = 10, 6, 4, 8
HARD = 4
TOKENS = PROMPTS * LENGTH
Answer = tuple[int, ...]


def demonstration(prompt: int, answer: Answer) -> Episodes:
    """One episode of kind "demo"."""
    return Episodes.build([answer], [[prompt]], kind=["demo"], prompt_id=[prompt], truncated=[False])


def with_demonstrations(draw: Draw, answers: Mapping[int, Answer]) -> Draw:
    """The same batches; the demonstration of each prompt that has one joins its group."""
    shown = {prompt: demonstration(prompt, answer) for prompt, answer in answers.items()}

    def joined(step: int) -> Episodes:
        batch = draw(step)
        groups = [batch.select(torch.tensor([g]), "group") for g in range(batch.count("group"))]
        return Episodes.cat([Episodes.cat([g, shown[q]]).as_one_group() if q in shown else g
                             for q, g in enumerate(groups)])  # fmt: skip

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
    policy = near_uniform(task, seed)
    train(phases, policy, with_demonstrations(fresh(task, policy, GROUP, seed), hard), steps=steps, rate=rate)
    with torch.no_grad():
        solved = task.success(policy)
    return {"success": float(solved.mean()), "hard prompts": float(solved[:HARD].mean()),
            "other prompts": float(solved[HARD:].mean())}  # fmt: skip


# ---- CHORD -----------------------------------------------------------------------------------------------------------
def styled_policy(own: Sequence[Answer], boost: float = 2.3) -> TabularPolicy:
    """A policy whose own style takes two thirds of every token's probability: about one answer in five is right."""
    logits = torch.zeros(len(own), LENGTH, VOCABULARY + 1, VOCABULARY, dtype=torch.float64)
    for prompt, tokens in enumerate(own):
        for position, token in enumerate(tokens):
            logits[prompt, position, :, token] = boost
    return TabularPolicy(logits)


def chord_trial(phases: Phases, rate: float, seed: int, steps: int) -> Mapping[str, float]:
    """Two answers are right: the one in the policy's style, and the expert's, which differs from it in every token."""
    own = [answer(seed, q, "own") for q in range(PROMPTS)]
    shift = keyed_generator(seed, "style").integers(1, VOCABULARY, size=(PROMPTS, LENGTH))
    expert = [tuple((t + int(s)) % VOCABULARY for t, s in zip(own[q], shift[q], strict=True)) for q in range(PROMPTS)]
    task = TabularTask(PROMPTS, VOCABULARY, LENGTH, lambda q, tokens: float(tokens in (own[q], expert[q])))
    policy = styled_policy(own)
    curve = [success(task, policy)]
    draw = with_demonstrations(fresh(task, policy, GROUP, seed), dict(enumerate(expert)))
    train(phases, policy, draw, steps=steps, rate=rate, watch=lambda step: curve.append(success(task, policy)))
    return {"success": curve[-1], "dip": curve[0] - min(curve), "mean success": sum(curve) / len(curve)}


GRPO, SFT = build("grpo", {}), build("sft", {})
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
        expectations=tuple(
            Expectation(arm="hpt", metric="success", than=than, least=0.0) for than in ("grpo", "sft", THEN)
        ),
        note=f"Tabular language policy, {PROMPTS} prompts, of which {HARD} have a pass rate near 0 and one demonstration "
        f"each (the others have none), groups of {GROUP}, 120 updates for every arm, exact success rate. Nothing "
        "generalises between prompts, so SFT can solve the demonstrated prompts only. Sft, then grpo: half the updates each.",
    ),
    Claim(
        slug="chord",
        statement=find("chord").claim,
        arms={
            "chord-phi": (build("chord", {}),),
            "grpo": (GRPO,),
            THEN: (SFT, GRPO),
            "sft + grpo, constant mu": (build("chord", {"chord": {"token_weight": "one"}}),),
        },
        trial=chord_trial,
        steps=100,
        tune="success",
        expectations=(
            Expectation(arm=THEN, metric="dip", least=0.02),
            Expectation(arm="chord-phi", metric="dip", most=0.02),
            Expectation(arm="chord-phi", metric="success", than="grpo", least=-0.02),
            Expectation(arm="chord-phi", metric="success", than="sft + grpo, constant mu", least=-0.02),
        ),
        note=f"Tabular language policy, {PROMPTS} prompts with two right answers: one in the policy's own style (about 20 % "
        f"at the start) and the expert's, other in every token; groups of {GROUP}, 100 updates for every arm, exact success "
        "after every update. Dip: initial success minus the lowest. Constant mu: 0.1, as CHORD-phi, without phi.",
    ),
)
