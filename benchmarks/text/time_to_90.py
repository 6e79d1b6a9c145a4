"""Processor seconds until a policy answers 90 % of the held-out problems of `arithmetic`: what both sides share.

Both start from the shipped tiny model, in float32, and draw 8 answers of at most 23 tokens to the same training problems; the
reward is 1 for the exact answer. Accuracy is the probability that an answer sampled at temperature 1 is right, averaged over
256 held-out problems: each has one right answer, so it is computed, not sampled, by this file on both sides, every `EVERY`
batches of 256 answers, and its seconds do not count. Nothing of unipo is imported here at the top.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "unipo" / "tasks" / "tiny"
PROBLEMS = ROOT / "build" / "bench" / "arithmetic.json"
TRAIN, HELD_OUT, GROUP, LONGEST = 8192, 256, 8, 23
BAR = 0.9
EVERY = 16
"""Prompts trained on between two measurements of the accuracy, whatever the batch."""


def exact(prompts: Sequence[Any], completions: Sequence[str], answer: Sequence[str], **_: Any) -> list[float]:
    """The reward of both sides."""
    return [float(text == right) for text, right in zip(completions, answer, strict=True)]


def problems() -> dict[str, list[list[str]]]:
    """[prompt, answer] of both splits; written by our side, which runs first."""
    if not PROBLEMS.exists():
        from unipo.tasks import get_task

        task, made = get_task("arithmetic"), {}
        for split, count in (("train", TRAIN), ("held_out", HELD_OUT)):
            drawn = [task.problem(i, split) for i in range(count)]
            made[split] = [[p.prompt, p.answer] for p in drawn]
        PROBLEMS.parent.mkdir(parents=True, exist_ok=True)
        scratch = PROBLEMS.with_suffix(f".{os.getpid()}")
        scratch.write_text(json.dumps(made))
        os.replace(scratch, PROBLEMS)
    return dict(json.loads(PROBLEMS.read_text()))


@dataclass
class Accuracy:
    """Mean probability of the right answer and its end; the model may have been trained by anyone."""

    tokenizer: Any
    ids: torch.Tensor = field(init=False)
    answers: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        rows, end = problems()["held_out"], self.tokenizer.eos_token_id
        texts = self.tokenizer([p for p, _ in rows])["input_ids"]
        rights = self.tokenizer([a for _, a in rows], add_special_tokens=False)["input_ids"]
        pairs = [(p, [*a, end]) for p, a in zip(texts, rights, strict=True)]
        longest = max(len(p) + len(a) for p, a in pairs)
        self.ids = torch.full((len(pairs), longest), end)
        self.answers = torch.zeros(len(pairs), longest, dtype=torch.bool)
        for i, (p, a) in enumerate(pairs):
            self.ids[i, : len(p) + len(a)] = torch.tensor([*p, *a])
            self.answers[i, len(p) : len(p) + len(a)] = True

    @torch.no_grad()
    def __call__(self, model: Any) -> float:
        """Padding is at the right of causal attention, so that it needs no mask."""
        training = model.training
        model.eval()
        logp = model(input_ids=self.ids).logits[:, :-1].float().log_softmax(-1)
        model.train(training)
        right = logp.gather(2, self.ids[:, 1:, None])[..., 0] * self.answers[:, 1:]
        return float(right.sum(1).exp().mean())


@dataclass
class Race:
    """Accuracy over processor seconds, [(seconds, accuracy)]; the clock stands still while accuracy is measured."""

    accuracy: Accuracy
    cap: float
    every: int
    curve: list[tuple[float, float]] = field(default_factory=list)
    began: float = 0.0
    wall: float = 0.0
    steps: int = 0

    def start(self, model: Any) -> None:
        self.curve.append((0.0, self.accuracy(model)))
        self.began, self.wall = time.process_time(), time.perf_counter()

    def step(self, model: Any) -> bool:
        """Call after every optimiser step: whether the race is over."""
        self.steps += 1
        stopped = time.process_time()
        if self.steps % self.every and stopped - self.began < self.cap:
            return False
        self.curve.append((stopped - self.began, self.accuracy(model)))
        self.began += time.process_time() - stopped
        return self.curve[-1][1] >= BAR or self.curve[-1][0] >= self.cap

    def say(self, given: argparse.Namespace, **more: Any) -> None:
        seconds, reached = self.curve[-1]
        missed = "" if reached >= BAR else f" (> cap: {100 * reached:.1f} % at {seconds:.0f} s)"
        result = {
            "unit": "run", "units": 1, "cpu_seconds": seconds, "wall_seconds": time.perf_counter() - self.wall,
            "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            "notes": f"seed {given.seed}, {self.steps} steps to {100 * reached:.1f} %{missed}",
            "gate": {"curve": self.curve, "steps": self.steps, "setting": vars(given)},
        }  # fmt: skip
        print(json.dumps(result | more), flush=True)


def arguments(methods: Sequence[str] | None, doc: str) -> argparse.Namespace:
    """The same for both sides: LOSS --lr --prompts --seed --cap."""
    parser = argparse.ArgumentParser(description=doc.split("\n\n")[0])
    parser.add_argument("method", choices=methods)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--prompts", type=int, default=32, help="per optimiser step, with 8 answers each")
    parser.add_argument("--seed", type=int, default=0, help="-1: a fresh one, which is told")
    parser.add_argument("--cap", type=float, default=240.0, help="processor seconds")
    given = parser.parse_args()
    given.seed = given.seed if given.seed >= 0 else int.from_bytes(os.urandom(3))
    return given


def race(tokenizer: Any, given: argparse.Namespace) -> Race:
    return Race(Accuracy(tokenizer), given.cap, max(1, EVERY // given.prompts))
