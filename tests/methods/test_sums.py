"""Sums of methods that draw rollouts: whose rows are whose."""

import pytest
import torch

from tests.methods.test_preference_games import arms, gradient, same, table
from unipo.episodes import Episodes
from unipo.methods.catalog import MethodError, build
from unipo.policies.tabular import TabularPolicy
from unipo.recipe import Recipe
from unipo.sources.stages.preferences import Compared, Paired
from unipo.sources.text.tabular import tabular_rollouts
from unipo.training.config import ConfigError, RunConfig
from unipo.training.suitable import check_sources

START = torch.tensor([0.1, 0.2, 0.3, 0.4]).log().double()


def drawn(recipe: Recipe) -> Episodes:
    policy: TabularPolicy = table(START)
    batch = tabular_rollouts(arms(4), policy, recipe.rollouts, 0).draw(0, 0)
    return batch.with_columns("step", old_logp=START[batch["token"]], reference_logp=START[batch["token"]])


@pytest.mark.parametrize("expression", ["grpo+0.1*online-dpo", "0.1*online-dpo+grpo"])
def test_pairs_of_own_answers_beside_the_rollouts_they_are_made_of(expression: str) -> None:
    """Each term has the gradient that it has alone: of the rollouts as they were drawn, of the pairs made of them."""
    recipe = build(expression, {})
    batch = drawn(recipe)
    rollouts, pairs = batch.category("kind", "rollout"), batch.category("kind", "pair")
    assert int(rollouts.sum()) == recipe.rollouts.group
    assert int(pairs.sum()) == recipe.rollouts.group * (recipe.rollouts.group - 1)
    logp = 0.5 * START[batch["token"]]
    found = gradient(recipe.objective, batch, logp)
    for alone, scale, rows in (("grpo", 1.0, rollouts), ("online-dpo", 0.1, pairs)):
        own = batch.select(rows)
        same(found[rows], scale * gradient(build(alone, {}).objective, own, logp[rows]))
        assert float(found[rows].abs().sum()) > 0


def test_stages_that_nobody_shares_stay_as_they_are() -> None:
    """Without a term on rollouts the pairs take their place; stages that are the same are run once."""
    alone = build("online-dpo", {})
    assert not any(stage.keep for stage in alone.rollouts.augment if isinstance(stage, Paired))
    assert not bool(drawn(alone).category("kind", "rollout").any())
    assert build("online-dpo+sft", {}).rollouts == alone.rollouts
    twice = build("online-dpo+0.5*inpo", {})
    assert len(twice.rollouts.augment) == 1
    with_win_rate = build("grpo+0.5*spo", {})
    assert [type(stage) for stage in with_win_rate.rollouts.augment] == [Compared]
    assert with_win_rate.rollouts.group == build("grpo", {}).rollouts.group


def test_one_column_measured_in_two_ways_is_told() -> None:
    with pytest.raises(MethodError, match=r"cannot train 'spo\+nash-md': both methods of the sum measure win_rate"):
        build("spo+nash-md", {})


def test_copies_of_one_name_are_renewed_at_the_same_steps() -> None:
    """Neither method would notice that its reference is the other's."""
    options = {"online-dpo": {"every": 5}, "sppo": {"every": 5, "answers": "all"}}
    assert build("online-dpo+0.5*sppo", options).snapshots == build("sppo", {"sppo": {"every": 5}}).snapshots
    options["sppo"]["every"] = 10
    with pytest.raises(MethodError, match="copy of the policy called previous, renewed at other steps"):
        build("online-dpo+0.5*sppo", options)


def test_what_nothing_in_a_sum_makes_is_told() -> None:
    """Rollouts are those of the first method: a second one that asks for other ones has to come first."""
    recipe = build("grpo+0.5*drpo-reset", {})
    assert recipe.unmade
    assert not recipe.for_text
    with pytest.raises(ConfigError, match="put first the one that asks for other rollouts"):
        check_sources(RunConfig(method="grpo+0.5*drpo-reset", task="arithmetic"), recipe)
    assert not build("drpo-reset+0.5*grpo", {}).unmade
