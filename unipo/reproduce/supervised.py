"""OTR: supervised learning on demonstrations as one-token rollouts, beside DFT and plain likelihood (arXiv 2509.26313)."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import lru_cache

import torch

from unipo.episodes import Episodes
from unipo.methods.catalog import build, find
from unipo.reproduce.claim import Claim, Expectation, Phases
from unipo.reproduce.network import NetworkPolicy
from unipo.reproduce.training import success, train
from unipo.sources.keyed import keyed_generator
from unipo.sources.rows import Rows
from unipo.tasks.tabular import TabularTask

PROMPTS, VOCABULARY, LENGTH, TAUGHT = 12, 6, 4, 6
DEMONSTRATIONS, BATCH, KNOWN, NOISE = 8, 16, 0.4, 0.1
TARGET = 0.6


@lru_cache(maxsize=16)
def one_answer(seed: int) -> TabularTask:
    """One right answer of 1,296 to each prompt."""
    right = keyed_generator(seed, "right answers").integers(VOCABULARY, size=(PROMPTS, LENGTH))
    return TabularTask(PROMPTS, VOCABULARY, LENGTH, lambda q, tokens: float(tokens == tuple(right[q].tolist())))


def demonstrations(task: TabularTask, prompts: range, each: int, noise: float, seed: int) -> Episodes:
    """`each` right answers per prompt in which every digit is another one with probability `noise`."""
    drawn, rows = keyed_generator(seed, "demonstrations", str(noise)), []
    for prompt in prompts:
        right = task.sequences[int(task.rewards[prompt].argmax())]
        for _ in range(each):
            slips = drawn.integers(1, VOCABULARY, size=LENGTH) * (drawn.uniform(size=LENGTH) < noise)
            rows.append((prompt, [(t + int(s)) % VOCABULARY for t, s in zip(right, slips, strict=True)]))
    return Episodes.build([t for _, t in rows], [[q] for q, _ in rows], prompt_id=[q for q, _ in rows],
                          kind=["demo"] * len(rows), truncated=[False] * len(rows))  # fmt: skip


@lru_cache(maxsize=16)
def pretrained(seed: int) -> NetworkPolicy:
    """A policy that is right `KNOWN` of the time, by likelihood of the right answers to all prompts."""
    task = one_answer(seed)
    policy, shown = NetworkPolicy(task, seed), demonstrations(task, range(PROMPTS), 1, 0.0, seed)
    while success(task, policy) < KNOWN:
        train((build("sft", {}),), policy, lambda step: shown, steps=5, rate=0.01)
    return policy


def trial(phases: Phases, rate: float, seed: int, steps: int) -> Mapping[str, float]:
    """When the taught prompts are first right `TARGET` of the time: success on the others (0 where they never are), what
    they lost, and KL(before || after) per answer in nats, mean over prompts; all exact. Else: at the end."""
    task, before = one_answer(seed), pretrained(seed)
    policy = copy.deepcopy(before)
    rows = Rows(demonstrations(task, range(TAUGHT), DEMONSTRATIONS, NOISE, seed), BATCH, seed)
    curve: list[tuple[float, float, float]] = []
    with torch.no_grad():
        old = task.log_probability(before)

    def watch(step: int) -> None:
        with torch.no_grad():
            new = task.log_probability(policy)
            solved, drift = (new.exp() * task.rewards).sum(1), (old.exp() * (old - new)).sum(1).mean()
            curve.append((float(solved[:TAUGHT].mean()), float(solved[TAUGHT:].mean()), float(drift)))

    train(phases, policy, lambda step: rows.draw(step, 0), steps=steps, rate=rate, watch=watch)
    reached = next((i for i, (taught, _, _) in enumerate(curve) if taught >= TARGET), None)
    _, others, drift = curve[-1 if reached is None else reached]
    known = float((old.exp() * task.rewards).sum(1)[TAUGHT:].mean())
    return {"kept": 0.0 if reached is None else others, "forgotten": known - others, "KL": drift,
            "taught": max(taught for taught, _, _ in curve)}  # fmt: skip


def _otr(draws: int) -> Phases:
    return (build("otr", {"otr": {"draws": draws}}),)


FEW, MANY = "otr, 8 draws", "otr, 256 draws"
CLAIMS = (
    Claim(
        slug="otr",
        statement=find("otr").claim,
        arms={
            "otr": _otr(0),
            FEW: _otr(8),
            MANY: _otr(256),
            "dft": (build("dft", {"dft": {"mean": "episode"}}),),
            "sft": (build("sft", {}),),
        },
        trial=trial,
        steps=100,
        tune="kept",
        grid=(0.001, 0.003, 0.01),
        expectations=(
            Expectation(arm="otr", metric="KL", than="sft", most=0.0),
            Expectation(arm="otr", metric="forgotten", than="sft", most=0.0),
            Expectation(arm="dft", metric="forgotten", than="sft", most=0.0),
            Expectation(arm="otr", metric="forgotten", than="dft", least=-0.02, most=0.02),
            Expectation(arm=FEW, metric="forgotten", than="otr", least=-0.02, most=0.02),
            Expectation(arm=MANY, metric="forgotten", than="otr", least=-0.01, most=0.01),
        ),
        note=f"A network of one hidden layer that is right {KNOWN:.0%} of the time about {PROMPTS} prompts with one "
        f"answer each. {DEMONSTRATIONS} demonstrations of each of {TAUGHT} prompts, one digit in ten wrong; "
        f"batches of {BATCH}, 100 updates. All numbers are taken where the taught prompts are first right "
        f"{TARGET:.0%} of the time (at the end where they never are: kept is 0 then): equal learning, not equal "
        "updates. Forgotten: success lost on the other prompts. KL: from the policy before, per answer. With "
        "wrong digits in the demonstrations plain likelihood learns those too, which is what weighting by "
        "probability avoids; whatever OTR gains here DFT gains.",
    ),
)
