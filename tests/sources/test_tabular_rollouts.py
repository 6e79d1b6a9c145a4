"""Rollouts over an enumerable task, completions behind any context, and stages that add rows to groups."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from unipo.episodes import Episodes
from unipo.policies.tabular import TabularPolicy
from unipo.recipe import Recipe, Snapshot
from unipo.reproduce.training import train
from unipo.sources.spec import RolloutSpec
from unipo.sources.stages.augment import Augment, Demonstrated, Drawn, joined
from unipo.sources.text.filters import MixedOutcomes
from unipo.sources.text.tabular import TabularPrompts, tabular_rollouts
from unipo.tasks.tabular import TabularTask


def made(end: int | None = 0) -> tuple[TabularTask, TabularPolicy]:
    task = TabularTask(3, 4, 3, lambda prompt, tokens: float(sum(tokens) % 3 == prompt), end)
    return task, TabularPolicy.random(3, 3, 4)


@pytest.mark.parametrize("end", [None, 0])
def test_draws_have_the_policys_distribution(end: int | None) -> None:
    task, policy = made(end)
    rollouts = tabular_rollouts(task, policy, RolloutSpec(group=4000), 0)
    batch = rollouts.draw(0, 7)
    assert batch.count("group") == 3
    assert set(batch["policy_version"].tolist()) == {7}
    logp = policy.signals(batch, ["logp"])["logp"].detach()
    torch.testing.assert_close(batch["behavior_logp"].double(), logp, atol=1e-5, rtol=0)
    rate = batch.reduce("reward", to="group", how="mean")
    torch.testing.assert_close(rate, task.success(policy).detach(), atol=0.03, rtol=0)
    assert not batch["truncated"].any()
    again = tabular_rollouts(task, policy, RolloutSpec(group=4000), 0).draw(0, 7)
    assert torch.equal(batch["token"], again["token"])
    other = tabular_rollouts(task, policy, RolloutSpec(group=4000), 1).draw(0, 7)
    assert other.count("step") != batch.count("step") or not torch.equal(batch["token"], other["token"])


def test_completions_go_on_behind_what_is_written() -> None:
    """The reward is of the whole answer, the log-probs are of the rest, and draws of another use are others."""
    task, policy = made(None)
    rollouts = tabular_rollouts(task, policy, RolloutSpec(), 0)
    prompts, written = [rollouts.prompts[1]] * 3000, [[2]] * 3000  # type: ignore[index]
    found = rollouts.complete(
        prompts, [[1, 2]] * 3000, 0, 0, use="branches", written=written, branch=torch.arange(3000)
    )
    assert found.lengths().unique().tolist() == [2]
    assert found.count("group") == 1
    assert torch.equal(found["branch"], torch.arange(3000))
    exact = sum(
        float(policy.signals(Episodes.build([[a, b]], [[1, 2]]), ["logp"])["logp"].sum().exp())
        for a in range(4) for b in range(4) if (2 + a + b) % 3 == 1
    )  # fmt: skip
    assert float(found["reward"].mean()) == pytest.approx(exact, abs=0.03)
    plain = rollouts.complete(prompts, [[1, 2]] * 3000, 0, 0, written=written)
    assert not torch.equal(plain["token"], found["token"])


@dataclass(frozen=True)
class Doubled(Augment):
    """Every group gets as many rows again."""

    filtered: ClassVar[bool] = False

    def __call__(self, groups: Episodes, drawn: Drawn) -> Episodes:
        prompts = [p for p in drawn.prompt_of(groups) for _ in range(2)]
        extra = drawn.source.complete(prompts, [[p.id] for p in prompts], drawn.step, drawn.version, use="again")
        drawn.source.kept["extra"] = extra
        return joined(groups, extra, [g for g in range(groups.count("group")) for _ in range(2)])


def test_stages_add_rows_and_remember(tmp_path: Path) -> None:
    task, policy = made()
    shown = TabularPrompts(task, {0: (3,), 1: (1, 0), 2: (2, 0)})
    spec = RolloutSpec(group=2, augment=(Doubled(), Demonstrated()))
    rollouts = tabular_rollouts(task, policy, spec, 0, shown)
    batch = rollouts.draw(0, 0)
    assert batch.lengths("group", "episode").tolist() == [5, 5, 5]
    assert batch.category("kind", "demo").tolist() == [False] * 4 + [True] + [False] * 4 + [True] + [False] * 4 + [True]
    assert torch.equal(batch["prompt_id"], batch.index("group", "episode"))
    assert rollouts.metrics["rollouts"] == 6.0, "metrics are of the policy's own rollouts"
    rollouts.save(tmp_path)
    fresh = tabular_rollouts(task, policy, spec, 0, shown)
    fresh.load(tmp_path)
    assert torch.equal(fresh.kept["extra"]["token"], rollouts.kept["extra"]["token"])


def test_the_filter_judges_what_earlier_stages_made() -> None:
    task, policy = made()
    plain = tabular_rollouts(task, policy, RolloutSpec(group=1, keep=MixedOutcomes()), 0).draw(0, 0)
    assert not (plain.reduce("reward", to="group", how="max") > plain.reduce("reward", to="group", how="min")).any()
    spec = RolloutSpec(group=1, keep=MixedOutcomes(), augment=(Doubled(),))
    mixed = tabular_rollouts(task, policy, spec, 3).draw(0, 0)
    assert (mixed.reduce("reward", to="group", how="max") > mixed.reduce("reward", to="group", how="min")).all()


def test_snapshots_are_renewed_when_they_are_due() -> None:
    assert [Snapshot(every=2).due(s) for s in range(5)] == [False, False, True, False, True]
    assert [Snapshot(every=1, lag=1).due(s) for s in range(3)] == [True, True, True]
    assert [Snapshot(at=(2,)).due(s) for s in range(4)] == [False, False, True, False]
    assert not Snapshot().moves


def test_a_lagging_snapshot_is_the_policy_of_one_step_before() -> None:
    """Its log-probs in step k are those that the policy had in step k - 1."""
    from unipo.objectives import KLPenalty, Normalised, PolicyGradient

    task, policy = made(None)
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    class Watching(KLPenalty):
        def evaluate(self, episodes, signals):  # type: ignore[no-untyped-def]
            seen.append((episodes["previous_logp"].clone(), signals["logp"].detach().clone()))
            return super().evaluate(episodes, signals)

    objective = PolicyGradient(advantage=Normalised()) + 0.1 * Watching(to="previous")
    recipe = Recipe(objective=objective, snapshots={"previous": Snapshot(every=1, lag=1)})
    batch = task.sample(policy, 8, 0)
    train((recipe,), policy, lambda step: batch, steps=3, rate=0.1)
    torch.testing.assert_close(seen[0][0], seen[0][1])
    torch.testing.assert_close(seen[1][0], seen[0][1])
    torch.testing.assert_close(seen[2][0], seen[1][1])
    assert not torch.allclose(seen[2][0], seen[2][1])
