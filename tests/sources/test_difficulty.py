"""Help in proportion to difficulty: the measure by hand, and what is shown."""

from __future__ import annotations

import pytest
import torch

from unipo.episodes import Episodes
from unipo.policies.tabular import TabularPolicy
from unipo.sources.prompts import Prompt
from unipo.sources.spec import RolloutSpec
from unipo.sources.stages.augment import Drawn
from unipo.sources.stages.difficulty import RECENT, Disturbed, HelpInProportion
from unipo.sources.text.rollouts import Rollouts
from unipo.sources.text.tabular import TabularPrompts, tabular_rollouts
from unipo.tasks.tabular import TabularTask


def rollouts(stage: HelpInProportion) -> Rollouts:
    """Prompt 0 is always right, prompt 1 never; the answer 1 1 2 2 to it is known."""
    task = TabularTask(2, 3, 4, lambda q, t: float(q == 0))
    prompts = TabularPrompts(task, {0: (0, 0, 0, 0), 1: (1, 1, 2, 2)})
    return tabular_rollouts(task, TabularPolicy.random(2, 4, 3), RolloutSpec(group=4, augment=(stage,)), 0, prompts)


def contexts(batch: Episodes) -> set[tuple[int, ...]]:
    column = batch.context()
    assert column.offsets is not None
    return {tuple(c.tolist()) for c in column.values.split(column.offsets.diff().tolist())}


def test_hard_prompts_are_helped_once_others_are_known() -> None:
    """Step 0 knows nothing: no help. Step 1: mean 1/2 of what came before, Delta = 1/2 of prompt 1: half of its answer."""
    source = rollouts(HelpInProportion())
    assert contexts(source.draw(0, 0)) == {(0,), (1,)}
    batch = source.draw(1, 0)
    assert contexts(batch) == {(0,), (1, 1, 1)}
    helped = batch.expand(batch["prompt_id"] == 1)
    assert batch.count("group") == 2
    assert int(helped.sum()) == 4 * 2, "two tokens are left to be sampled"
    assert source.kept[RECENT]["mean_reward"].tolist() == [1.0, 0.0, 1.0, 0.0], "rewards before help are remembered"


@pytest.mark.parametrize(("stage", "shown"), [
    (HelpInProportion(best=4.0), (1, 1)), (HelpInProportion(most=0.25), (1, 1)),
    (HelpInProportion(best=0.5, most=1.0), (1, 1, 1, 2)),
])  # fmt: skip
def test_the_share_by_hand(stage: HelpInProportion, shown: tuple[int, ...]) -> None:
    """Delta 1/2 over best 4: an eighth of four tokens, rounded up; at most a quarter: one; over best 1/2: all but the last."""
    source = rollouts(stage)
    source.draw(0, 0)
    assert contexts(source.draw(1, 0)) == {(0,), shown}


def test_the_window_forgets() -> None:
    stage = HelpInProportion(window=2)
    source = rollouts(stage)
    groups = Episodes.build([[0]] * 3, [[0]] * 3, [0, 1, 2], kind=["rollout"] * 3, prompt_id=[0] * 3)
    drawn = Drawn({}, source, 0, 0, 0)
    for rewards in ([1.0, 1.0, 1.0], [0.0, 0.0, 1.0]):
        stage.difficulty(groups.with_columns("episode", reward=torch.tensor(rewards)), drawn)
    found = stage.difficulty(groups.with_columns("episode", reward=torch.tensor([0.2, 0.5, 0.9])), drawn)
    torch.testing.assert_close(found, torch.tensor([0.3, 0.0, -0.4], dtype=torch.float64), atol=1e-7, rtol=0)


def test_easy_prompts_are_disturbed() -> None:
    """Step 1: Delta = -1/2 of prompt 0: with noise 1, half of its one token, rounded up, stands before it once more."""
    source = rollouts(HelpInProportion(most=0.0, noise=1.0))
    assert contexts(source.draw(0, 0)) == {(0,), (1,)}
    words = Prompt(id=7, text="3 1 4 1 5")
    tokens, written = Disturbed().shown(words, 0.5, source.tokenizer, 8)
    assert (len(tokens), tokens[3:], written) == (8, [3, 1, 4, 1, 5], [])
    assert set(tokens[:3]) <= {3, 1, 4, 5}
    assert tokens == Disturbed().shown(words, 0.5, source.tokenizer, 8)[0], "a function of the prompt"
    assert Disturbed().shown(words, 0.0, source.tokenizer, 8) == ([3, 1, 4, 1, 5], [])
    assert (
        HelpInProportion(most=0.0).lacks(Prompt(id=0, text="1"))
        == ""
        != HelpInProportion().lacks(Prompt(id=0, text="1"))
    )
