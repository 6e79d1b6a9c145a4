"""Small runs in environments, and what watches them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from unipo.learner.learner import Update
from unipo.methods.actor_critic import OFF_POLICY
from unipo.recipe import Recipe
from unipo.training.build_control import build_control
from unipo.training.config import ControlConfig

GAMMA, LAM = 0.97, 0.9


@contextmanager
def built(folder: Path, recipe: Recipe, **settings: Any) -> Iterator[Any]:
    """A run in CartPole, whose episodes are cut after 15 steps; nothing is measured."""
    small: dict[str, Any] = {
        "task": "CartPole-v1", "out": str(folder), "tensorboard": False, "evaluations": 0, "checkpoints": 1,
        "hidden": (8,), "env_options": {"max_episode_steps": 15} if "task" not in settings else {},
    }  # fmt: skip
    run = build_control(ControlConfig(**{**small, **settings}), recipe, Console(quiet=True))
    try:
        yield run
    finally:
        run.data.close()


def watched(run: Any) -> list[Update]:
    """The updates that the run makes from now on."""
    seen: list[Update] = []
    update = run.learner.update

    def spy(*arguments: Any) -> Update:
        seen.append(update(*arguments))
        return seen[-1]

    run.learner.update = spy
    return seen


def noting(notes: list[Any], what: Callable[[], Any], call: Callable[..., Any]) -> Callable[..., Any]:
    """`call`, which writes down what is the case before it."""

    def noted(*arguments: Any, **keywords: Any) -> Any:
        notes.append(what())
        return call(*arguments, **keywords)

    return noted


def moved(*modules: nn.Module) -> None:
    """Weights away from where they collected the batch, so that ratios are not 1."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for module in modules:
            for p in module.parameters():
                p.add_(0.15 * torch.randn(p.shape, generator=generator))


def close(found: nn.Module, expected: nn.Module) -> None:
    for (name, p), q in zip(found.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=2e-4, atol=2e-6, msg=name)


CLIP, VALUE, VALUE_CLIP, ENTROPY = 0.05, 0.7, 0.1, 0.02
PPO: dict[str, Any] = {
    "gamma": GAMMA,
    "lam": LAM,
    "clip": CLIP,
    "value": VALUE,
    "value_clip": VALUE_CLIP,
    "entropy": ENTROPY,
    "epochs": 2,
}
ROLLOUT: dict[str, Any] = {"num_envs": 3, "rollout": 40, "batch_size": 32, "total_timesteps": 480,
                           "normalize_observations": True, "learning_rate": 3e-3, "schedule": "linear"}  # fmt: skip
MEMORY: dict[str, Any] = {**OFF_POLICY, "task": "Pendulum-v1", "hidden": (8,), "rollout": 1, "batch_size": 16,
                          "learning_starts": 20, "learning_rate": 3e-3, "total_timesteps": 100}  # fmt: skip


def copies(*modules: Any) -> list[list[Tensor]]:
    return [[p.detach().clone() for p in m.parameters()] for m in modules]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def weights(folder: Path, recipe: Recipe, **settings: Any) -> list[Tensor]:
    with built(folder, recipe, **settings) as run:
        for _ in range(2):
            run.advance()
        return [p.detach().clone() for p in run.learner.parameters()]
