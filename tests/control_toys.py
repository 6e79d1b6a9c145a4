"""Tiny players and random batches of environment steps for any recipe that is for environments, in float64."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from unipo.episodes import Column, Episodes, offsets_of
from unipo.learner import Player, annotate
from unipo.objectives import Needs
from unipo.recipe import Recipe
from unipo.sources.acting.spaces import ActionSpec
from unipo.training.build_control import Players, annotators, make_players, modules, trained_players
from unipo.training.config import ControlConfig

SIZE = 3
TOLD = {"reward_to_go"}
"""Columns of the source that are not entries of an info."""
TOLD_SHAPES = {"post_observation": (SIZE,)}
BOX = ActionSpec("box", 2, low=-np.ones(2), high=np.ones(2))
CHOICES = ActionSpec("categorical", 4, (4,))


def actions_of(recipe: Recipe) -> ActionSpec:
    """The action space that a recipe is tried on: a box, unless it takes maxima over choices."""
    assert recipe.control is not None
    return CHOICES if recipe.control.backup in ("greedy", "double") else BOX


def all_players(recipe: Recipe, actions: ActionSpec | None = None, seed: int = 0) -> Players:
    """Networks with one hidden layer of five, away from their initial symmetry; targets differ from what they follow."""
    assert recipe.control is not None
    config = ControlConfig(hidden=(5,), orthogonal=False, log_std_init=-0.3)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = make_players(config, recipe, recipe.control, SIZE, actions or actions_of(recipe))
        for module in modules_of(made):
            moved(module.double(), 0.3)
    return made


def modules_of(players: Players) -> list[nn.Module]:
    return [players.policy, *modules(players).values()]


def moved(module: nn.Module, spread: float) -> nn.Module:
    """Normal noise added to every parameter, in place."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(spread * torch.randn_like(parameter))
    return module


def control_players(recipe: Recipe, actions: ActionSpec | None = None, seed: int = 0) -> dict[str, Player]:
    """What the learner trains."""
    assert recipe.control is not None
    return trained_players(recipe, recipe.control, all_players(recipe, actions, seed))


def control_batch(recipe: Recipe, seed: int = 0, fragments: int = 6, rewards: Sequence[float] | None = None,
                  actions: ActionSpec | None = None) -> Episodes:  # fmt: skip
    """Fragments (transitions, for off-policy recipes) with every column that the recipe needs.

    The columns `<who>_<signal>` and behavior log-probs are those of players near the ones of `control_players`.
    """
    assert recipe.control is not None
    spec, actions = recipe.control, actions or actions_of(recipe)
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.ones(fragments) if spec.off_policy else torch.randint(1, 6, (fragments,), generator=generator)
    earlier: Any = copy.deepcopy(all_players(recipe, actions))
    noise = getattr(getattr(earlier.policy, "distribution", None), "noise", 2)
    batch = raw_fragments(lengths.long(), actions, generator, noise, spec.gamma)
    if recipe.needs.group_size > 1:
        batch = in_groups(batch, recipe.needs.group_size)
    n, told = batch.count("step"), sorted({*spec.info_columns, *(recipe.needs.columns & TOLD)})
    batch = batch.with_columns("step", **{name: normal(generator, n, *TOLD_SHAPES.get(name, ())) for name in told})
    if rewards is not None:
        batch = batch.with_columns("step", reward=torch.tensor(rewards).double().repeat(99)[: batch.count("step")])
    with torch.random.fork_rng():
        torch.manual_seed(seed + 1)
        for module in modules_of(earlier):
            moved(module, 0.1)
    who = annotators(spec, earlier)
    asked = Needs.of(columns="old_next_value" if "old_value" in recipe.needs.columns else "") | recipe.needs
    return annotate(batch, asked, {**who, "behavior": earlier.policy, "reference": earlier.policy}, 1 << 20)


def raw_fragments(lengths: Tensor, actions: ActionSpec, generator: torch.Generator, noise: int = 2,
                  gamma: float = 0.99) -> Episodes:  # fmt: skip
    """What a collector gives: fragments of these lengths, every other one terminated, the others cut."""
    n, e = int(lengths.sum()), len(lengths)
    box = actions.kind == "box"
    chosen = (
        normal(generator, n, actions.size).tanh() if box else torch.randint(actions.size, (n,), generator=generator)
    )
    terminated = torch.arange(e) % 2 == 0
    columns = {
        "observation": Column(normal(generator, n, SIZE), "step"),
        "action": Column(chosen, "step"),
        "reward": Column(normal(generator, n), "step"),
        "noise": Column(normal(generator, n, noise), "step"),
        "next_noise": Column(normal(generator, n, noise), "step"),
        "target_noise": Column(normal(generator, n), "step"),
        "terminated": Column(terminated, "episode"),
        "truncated": Column(~terminated, "episode"),
        "discount": Column(torch.full((e,), gamma, dtype=torch.float64), "episode"),
        "final_observation": Column(normal(generator, e, SIZE), "episode"),
        "env": Column(torch.arange(e), "episode"),
        "episode_number": Column(torch.arange(e), "episode"),
        "policy_version": Column(torch.zeros(e, dtype=torch.long), "episode"),
        "kind": Column(torch.zeros(e, dtype=torch.long), "episode", None, ("rollout",)),
    }
    one = torch.arange(e + 1)
    return Episodes({"turn": offsets_of(lengths), "episode": one, "group": one}, columns)


def in_groups(batch: Episodes, size: int) -> Episodes:
    """Neighbours in groups of `size`; the last group holds the rest."""
    bounds = torch.tensor([*range(0, len(batch), size), len(batch)])
    offsets = {"turn": offsets_of(batch.lengths()), "episode": torch.arange(len(batch) + 1), "group": bounds}
    return Episodes(offsets, batch.columns)


def normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)
