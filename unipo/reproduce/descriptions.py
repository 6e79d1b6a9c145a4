"""A policy that sees half of an image, a reasoner that sees descriptions: SOPHIA."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from unipo.methods.catalog import build
from unipo.reproduce.seeing import GROUP, Listed, SeeingPolicy, probabilities, rolled, scored_by, shown
from unipo.reproduce.training import train
from unipo.sources.keyed import keyed_generator
from unipo.sources.prompts import Prompt
from unipo.sources.rows import Rows
from unipo.sources.text.tabular import NumberTokenizer, TabularSampler
from unipo.sources.text.two_stage import DescribeThenReason, Reasoner, chosen, describe_then_reason
from unipo.tasks.tabular import TabularTask

GRPO, SFT = build("grpo", {}), build("sft", {})
VALUES, QUERIES, IMAGES = 6, 192, 300
NOISE, CARELESS, ORACLE = 0.45, 0.1, 2 / 3
"""Of the view; share of the reasoner's answers that are random; of an oracle's descriptions that name the hidden feature."""
SEEING = 40
"""Supervised steps of the warm-up."""
TRACES = TabularTask(1, VALUES, 3, lambda prompt, tokens: 0.0)
"""A trace: the feature that is used (0 visible, 1 hidden), its value, the answer; a description: two of these."""


@dataclass(frozen=True)
class Images:
    """Two features [n] of each image, of which one is seen, with noise; a question x [n]. Right: either feature + x, modulo 6."""

    visible: Tensor
    hidden: Tensor
    question: Tensor
    view: Tensor

    @classmethod
    def drawn(cls, seed: int, name: str, n: int) -> Images:
        g = torch.Generator().manual_seed(int(keyed_generator(seed, name).integers(2**62)))
        visible, hidden, question = (torch.randint(VALUES, (n,), generator=g) for _ in range(3))
        view = nn.functional.one_hot(visible, VALUES) + NOISE * torch.randn(n, VALUES, generator=g, dtype=torch.float64)
        return cls(visible, hidden, question, view)

    def seen(self) -> Tensor:
        """[2 n, F]: prompts with the question, then those that ask for a description and have none."""
        n = len(self.question)
        asked = torch.cat([nn.functional.one_hot(self.question, VALUES), torch.zeros(n, VALUES)])
        which = torch.eye(2).repeat_interleave(n, 0)
        return torch.cat([self.view.repeat(2, 1), asked, which], 1)

    def prompts(self, seed: int) -> list[Prompt]:
        n = len(self.question)
        return [Prompt(id=i, text=str(i), columns={
            "describe_prompt": str(n + i), "reason_prompt": f"{self.question[i]} {{description}}", "x": int(self.question[i]),
            "features": (int(self.visible[i]), int(self.hidden[i]))}) for i in range(n)]  # fmt: skip


def judged_trace(answer: str, columns: Mapping[str, Any]) -> float:
    said = [int(word) for word in answer.split()]
    return float(len(said) == 3 and said[2] in [(v + columns["x"]) % VALUES for v in columns["features"]])


def reasoner(prompts: Sequence[str], keys: Tensor) -> list[str]:
    """Sees a question and a description: what is described, and the answer from it, now and then any."""
    made = []
    for prompt, key in zip(prompts, keys.tolist(), strict=True):
        generator = random.Random("/".join(map(str, key)))
        x, *described = (int(word) for word in prompt.split())
        feature, value = (*described, 0, 0)[:2]
        answer = generator.randrange(VALUES) if generator.random() < CARELESS else (value + x) % VALUES
        made.append(f"{feature} {value} {answer}")
    return made


@dataclass(frozen=True)
class Seeing:
    """An arm: whose descriptions a round uses ("own", "oracle", or none), the value that they must pass, and GRPO's share."""

    describe: str = "own"
    threshold: float = 0.75
    grpo: float = 0.0


def oracle(images: Images, seed: int) -> Reasoner:
    """Describes either feature, rightly."""

    def describe(asked: Sequence[str], keys: Tensor) -> list[str]:
        made = []
        for text, key in zip(asked, keys.tolist(), strict=True):
            i, feature = int(text) - len(images.question), int(random.Random(f"{seed}/{key}").random() < ORACLE)
            made.append(f"{feature} {int((images.visible, images.hidden)[feature][i])}")
        return made

    return describe


def seeing_trial(arm: Seeing, rate: float, seed: int, steps: int) -> Mapping[str, float]:
    """Samples are shared out: a round has 72 for each of its queries, GRPO takes what its share of them leaves."""
    sizes = {"train": min(QUERIES, 4 * steps), "test": min(IMAGES, 4 * steps)}
    images, test = (Images.drawn(seed, name, n) for name, n in sizes.items())
    describer = SeeingPolicy(images.seen(), 3, VALUES, seed)
    _learn_to_describe(describer, seed, steps)
    policy = describer.at(images.seen()[: sizes["train"]])
    prompts, spec = images.prompts(seed), DescribeThenReason(threshold=arm.threshold)
    if arm.grpo < 1:
        sampler, tokenizer = TabularSampler(TRACES, describer), NumberTokenizer()

        def own(asked: Sequence[str], keys: Tensor) -> list[str]:
            made = sampler.sample([[int(text)] for text in asked], keys, [2] * len(asked))
            return [tokenizer.decode(c.tokens) for c in made]

        asked = prompts[: round(len(prompts) * (1 - arm.grpo))]
        describe: Reasoner = oracle(images, seed) if arm.describe == "oracle" else own
        kept = chosen(
            describe_then_reason(asked, spec, describe, reasoner, scored_by(judged_trace), tokenizer, seed), spec
        )
        if len(kept):
            rows = Rows(kept, 32, seed)
            share = round(steps * (1 - arm.grpo))
            train((SFT,), policy, lambda step: rows.draw(step, step), steps=share, rate=rate)
    if arm.grpo:
        rollouts = len(prompts) * 72 * arm.grpo
        updates = max(1, round(steps * arm.grpo))
        each = max(1, round(rollouts / updates / GROUP))
        source = rolled(TRACES, policy, Listed([prompts], seed), judged_trace, seed, each)
        train((GRPO,), policy, lambda step: source.draw(step, step), steps=updates, rate=rate)
    return seeing_quality(policy, test)


def _learn_to_describe(policy: SeeingPolicy, seed: int, steps: int) -> None:
    """What the policy can do before: say what it sees (mostly the visible feature), and reason little."""
    warm = Images.drawn(seed, "warm", QUERIES)
    look, n = policy.at(warm.seen()), len(warm.question)
    generator = keyed_generator(seed, "warm traces")
    features = [int(generator.random() < 0.3) for _ in range(n)]
    values = [int((warm.visible, warm.hidden)[f][i]) for i, f in enumerate(features)]
    described = [Prompt(id=i, text=str(n + i)) for i in range(n)]
    answered = [Prompt(id=n + i, text=str(i)) for i in range(n)]
    texts = [f"{f} {v} {generator.integers(VALUES)}" for f, v in zip(features, values, strict=True)] * 2
    rows = Rows(shown([*described, *answered], texts), 64, seed)
    train((SFT,), look, lambda step: rows.draw(step, step), steps=min(SEEING, 4 * steps), rate=0.01)
    with torch.no_grad():
        for own, learned in ((policy.inward, look.inward), (policy.outward, look.outward), (policy.bias, look.bias)):
            own.copy_(learned)


def seeing_quality(policy: SeeingPolicy, images: Images) -> dict[str, float]:
    """Exact, over other images: share of right answers, and of traces that name what cannot be seen."""
    p = probabilities(policy.at(images.seen()), TRACES)[: len(images.question)]
    sequences = torch.tensor(TRACES.sequences)
    answers = torch.stack([(f + images.question) % VALUES for f in (images.visible, images.hidden)])
    right = (sequences[:, 2][None, None] == answers[:, :, None]).any(0)
    unseen = (sequences[:, 0] == 1)[None].expand_as(right)
    return {"accuracy": float((p * right).sum(1).mean()), "uses the unseen": float((p * unseen).sum(1).mean())}
