"""Laws that hold for every method of the catalog: a method joins by being in it."""

from __future__ import annotations

import pytest
import torch

from tests.control_toys import control_batch, control_players
from tests.toys import ToyPolicy, toy_batch
from unipo.episodes import Episodes
from unipo.learner import Learner, LearnerSettings, Player
from unipo.methods.catalog import METHODS, build
from unipo.objectives import TrustRegion, with_settings
from unipo.recipe import Recipe, kinds_of

MIX = "grpo+0.2*sft+0.1*dpo"
OPTIONS = {
    "grpo, regularised": ("grpo", {"kl": 0.2, "entropy": 0.1}),
    "rloo, regularised": ("rloo", {"kl": 0.2, "entropy": 0.1}),
}
ENVIRONMENTS = ", in environments"
NAMES = [*(m.slug for m in METHODS), MIX, "ppo+0.5*dpo+0.1*chord", *OPTIONS,
         *(m.slug + ENVIRONMENTS for m in METHODS if m.environments)]  # fmt: skip
SETTINGS = {"mu": 0.4, "reference_share": 0.4, "baseline": 0.3, "align": 0.4}
CONTEXT = {"token", "prompt", "source", "policy_version", "truncated", "observation", "action", "final_observation", "noise",
           "old_next_value", "post_observation"}  # fmt: skip
"""What players look at, whatever the objective; a bootstrap is used where there is one."""


def recipe_of(name: str) -> Recipe:
    slug, settings = OPTIONS.get(name, (name.removesuffix(ENVIRONMENTS), {}))
    return build(slug, {slug: settings} if settings else {}, environment=name.endswith(ENVIRONMENTS))


def of_text(name: str) -> bool:
    """Whether it is tried on tokens: where these have all that it reads, unless it is the version for environments."""
    needs, episodes = recipe_of(name).needs, toy_batch()
    served = needs.signals <= ToyPolicy.emits and needs.columns <= set(episodes.columns)
    return served and not name.endswith(ENVIRONMENTS)


def batch_of(name: str, group: int = 4, rewards: list[float] | None = None, demos: bool = True) -> Episodes:
    if of_text(name):
        return toy_batch(group=group, rewards=rewards, demos=demos)
    return control_batch(recipe_of(name), fragments=1 if group == 1 else 6, rewards=rewards)


def players_of(name: str) -> dict[str, Player]:
    return {"policy": ToyPolicy()} if of_text(name) else control_players(recipe_of(name))


def gradients(name: str, episodes: Episodes, token_budget: int) -> tuple[torch.Tensor, int]:
    """The flat gradient of all parameters and the number of passes it took."""
    learner = Learner(players_of(name), LearnerSettings(token_budget=token_budget))
    update = learner.gradient(episodes, with_settings(recipe_of(name).objective, SETTINGS))
    flat = [torch.zeros_like(p) if p.grad is None else p.grad for p in learner.parameters()]
    return torch.cat([g.flatten() for g in flat]), update.passes


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-9) -> bool:
    return float((a - b).norm()) <= tolerance * max(float(b.norm()), 1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_any_micro_batch_split_gives_the_same_gradient(name: str) -> None:
    """Token budgets from everything at once to one episode at a time cut groups and pairs; the gradient does not notice."""
    episodes = batch_of(name)
    whole, _ = gradients(name, episodes, 10_000)
    assert float(whole.norm()) > 0
    for budget in (60, 23, 9, 1):
        split, _ = gradients(name, episodes, budget)
        assert close(split, whole), f"budget {budget}: {float((split - whole).norm() / whole.norm()):.1e}"


@pytest.mark.parametrize("name", NAMES)
def test_the_order_of_groups_does_not_matter(name: str) -> None:
    episodes = batch_of(name)
    order = torch.randperm(episodes.count("group"), generator=torch.Generator().manual_seed(1))
    assert close(gradients(name, episodes.select(order, "group"), 40)[0], gradients(name, episodes, 10_000)[0])


@pytest.mark.parametrize("name", NAMES)
def test_masked_steps_change_nothing(name: str) -> None:
    """Junk steps under mask=False at the end of every episode, with NaN in their columns."""
    episodes = batch_of(name)
    junk = [_with_junk(episodes.select(torch.tensor([g]), "group")) for g in range(episodes.count("group"))]
    assert close(gradients(name, Episodes.cat(junk), 10_000)[0], gradients(name, episodes, 10_000)[0])


ANNOTATED = ("behavior_", "reference_", "old_", "target_", "next_")
OF_PLAYERS = ("_noise", "_parameters")
"""Columns that are read by players, which compute a signal for every step."""


def _with_junk(group: Episodes) -> Episodes:
    """The same group, each episode followed by a masked step."""
    rows = []
    for i in range(len(group)):
        one = group.select(torch.tensor([i]))
        again = one.select(torch.cat([torch.arange(one.count("step")), torch.tensor([0])]), "step")
        junk = torch.arange(again.count("step")) == again.count("step") - 1
        annotated = [k for k in again.columns if k.startswith(ANNOTATED) and not k.endswith(OF_PLAYERS)]
        columns = {k: torch.where(junk.reshape(-1, *[1] * (again[k].ndim - 1)), torch.nan, again[k]) for k in annotated}
        rows.append(again.with_columns("step", mask=~junk, **columns))
    return Episodes.cat(rows).as_one_group()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("rewards", [[1.0] * 4, [0.0] * 4, [0.3] * 4, [1.0, 0.0, 0.0, 0.0]])
def test_degenerate_groups_give_finite_gradients(name: str, rewards: list[float]) -> None:
    assert gradients(name, batch_of(name, rewards=rewards), 30)[0].isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_a_group_of_one_and_an_empty_kind(name: str) -> None:
    assert gradients(name, batch_of(name, group=1, rewards=[1.0]), 30)[0].isfinite().all()
    for kind in ("rollout", "demo", "pair", "label"):
        episodes = batch_of(name, demos=False)
        without = episodes.select(~episodes.category("kind", kind))
        assert gradients(name, without, 30)[0].isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_every_term_moves_rows_it_claims_and_no_others(name: str) -> None:
    """The dead-term guard, as a law."""
    from unipo.learner import coefficients

    recipe, episodes = recipe_of(name), batch_of(name)
    signals: dict[str, torch.Tensor] = {}
    for player in players_of(name).values():
        signals |= player.signals(episodes, sorted(recipe.needs.signals & player.emits))
    found = coefficients(with_settings(recipe.objective, SETTINGS), episodes, signals)
    for share, (_, term) in zip(found.terms, recipe.objective.terms(), strict=True):
        live = torch.stack([(g != 0).flatten(1).any(1) if g.ndim > 1 else g != 0 for g in share.gradient.values()]).any(
            0
        )
        claimed = episodes.expand(term.rows(episodes))
        if not claimed.any():
            assert name == "upge-hpt", "only a per-prompt switch may find no prompt to act on"
            continue
        if isinstance(term, TrustRegion) and not share.loss:
            continue  # inside its region it is silent
        assert live[claimed].any(), share.title
        assert not live[~claimed].any(), share.title


@pytest.mark.parametrize("name", NAMES)
def test_rows_that_no_term_claims_do_not_matter(name: str) -> None:
    recipe, episodes = recipe_of(name), batch_of(name, demos=True)
    kinds = {kind for _, term in recipe.objective.terms() for kind in kinds_of(term.rows)}
    wanted = torch.stack([episodes.category("kind", k) for k in kinds]).any(0)
    assert close(gradients(name, episodes.select(wanted), 10_000)[0], gradients(name, episodes, 10_000)[0])


@pytest.mark.parametrize("name", NAMES)
def test_needs_are_what_is_read(name: str) -> None:
    """Without a column that is not in `needs` nothing changes; without one that is, the error names it."""
    recipe, episodes = recipe_of(name), batch_of(name)
    spare = set(episodes.columns) - CONTEXT - recipe.needs.columns
    assert close(gradients(name, episodes.without(*spare), 10_000)[0], gradients(name, episodes, 10_000)[0])
    for column in sorted(recipe.needs.columns):
        with pytest.raises(KeyError, match=column):
            gradients(name, episodes.without(column), 10_000)


@pytest.mark.parametrize("name", NAMES)
def test_one_pass_is_taken_where_it_is_exact(name: str) -> None:
    recipe, episodes = recipe_of(name), batch_of(name)
    assert gradients(name, episodes, 20 if of_text(name) else 2)[1] == (1 if recipe.objective.linear else 2)


@pytest.mark.parametrize("name", NAMES)
def test_recipes_read_as_their_parts(name: str) -> None:
    text = repr(recipe_of(name))
    assert "object at" not in text
    assert recipe_of(name) == recipe_of(name), "a recipe is a value"
