"""The algebra: sums, scales, knobs, needs, `but`."""

from __future__ import annotations

import pytest
import torch

from tests.toys import ToyPolicy, toy_batch
from unipo.methods.catalog import build
from unipo.objectives import (
    Bonus,
    EpisodeMean,
    Knob,
    Likelihood,
    Needs,
    Pairwise,
    TokenMean,
    TokenRatio,
    demonstrations,
    everything,
    knobs_of,
    nothing,
    rollouts,
    with_settings,
)
from unipo.recipe import Recipe
from unipo.sources.controllers import AdaptiveKL, Controller, RunningMean


def losses() -> tuple[object, dict[str, torch.Tensor]]:
    episodes = toy_batch()
    return episodes, {k: v.detach() for k, v in ToyPolicy().signals(episodes, ["logp", "entropy", "value"]).items()}


def test_objectives_form_a_vector_space() -> None:
    episodes, signals = losses()
    a, b = Likelihood(), Bonus()
    la, lb = a(episodes, signals), b(episodes, signals)
    torch.testing.assert_close((a + b)(episodes, signals), la + lb)
    torch.testing.assert_close((2.0 * (a + 0.5 * b))(episodes, signals), 2 * la + lb)
    torch.testing.assert_close((a + nothing)(episodes, signals), la)
    assert float(nothing(episodes, signals)) == 0.0
    assert [c for c, _ in (3 * (a + 2 * b)).terms()] == [3.0, 6.0]


def test_needs_are_derived_from_parts() -> None:
    assert Likelihood().needs == Needs.of(columns="kind", signals="logp")
    assert Likelihood(weight=TokenRatio()).needs == Needs.of(columns="kind behavior_logp", signals="logp")
    assert Pairwise().needs.group_size == 2
    assert (Likelihood() + Bonus()).needs.signals == {"logp", "entropy"}


def test_knobs_are_affine_and_resolved() -> None:
    mu = Knob("mu", 0.25)
    assert (1 - mu).at(0.25) == 0.75
    assert (2 * (1 - mu) + 1).at(0.5) == 2.0
    objective = (1 - mu) * Bonus() + mu * Likelihood()
    assert knobs_of(objective) == {"mu": 0.25}
    assert [c for c, _ in with_settings(objective, {"mu": 0.1}).terms()] == pytest.approx([0.9, 0.1])
    assert [c for c, _ in with_settings(objective, {}).terms()] == pytest.approx([0.75, 0.25])
    episodes, signals = losses()
    expected = 0.75 * Bonus()(episodes, signals) + 0.25 * Likelihood()(episodes, signals)
    torch.testing.assert_close(objective(episodes, signals), expected)
    with pytest.raises(TypeError, match="cannot multiply the knobs"):
        mu * (Knob("nu", 1.0) * Bonus())


def test_but_finds_the_one_part_that_has_the_field() -> None:
    grpo = build("grpo", {})
    assert "clip" not in repr(grpo.but(mask=build("reinforce", {}).objective.mask).objective)  # type: ignore[attr-defined]
    assert isinstance(grpo.but(aggregate=TokenMean()).objective.aggregate, TokenMean)  # type: ignore[attr-defined]
    assert grpo.objective.but(eps=0.5).advantage.scale.eps == 0.5  # type: ignore[attr-defined]
    assert isinstance(grpo.objective.aggregate, EpisodeMean), "the original is untouched"  # type: ignore[attr-defined]
    with pytest.raises(TypeError, match="no part has the fields"):
        grpo.but(colour=1)
    with pytest.raises(TypeError, match="parts have"):
        grpo.objective.but(to="reference")


def test_rows_narrow() -> None:
    episodes = toy_batch()
    assert not (rollouts & demonstrations)(episodes).any()
    assert everything(episodes).all()
    assert repr(rollouts) == "kind=rollout"


def test_recipes_add_and_check_their_controllers() -> None:
    total = build("grpo", {}) + 0.5 * build("chord", {})
    assert [c.knob for c in total.controllers] == ["mu"]
    assert (build("dpo", {}) + build("rloo", {})).rollouts.group == 4, "the recipe that has rollouts says how"
    assert (build("rloo", {}) + build("grpo", {})).rollouts.group == 4, "of two that have, the first"
    with pytest.raises(ValueError, match="controllers set"):
        Recipe(objective=Likelihood(), controllers=(Controller(knob="mu"),))


def test_controllers_by_hand() -> None:
    mean = RunningMean(knob="baseline", decay=0.5)
    state = mean.start()
    assert mean.setting(state, 0) == 0.0
    for x in (1.0, 3.0, float("nan")):
        state = mean.observe(state, {"reward": x})
    assert mean.setting(state, 3) == pytest.approx((0.25 * 1 + 0.5 * 3) / 0.75)
    kl = AdaptiveKL(knob="kl", value=0.1, target=0.05, gain=0.5)
    state = kl.observe(kl.start(), {"kl_reference": 1.0})
    assert kl.setting(state, 1) == pytest.approx(0.1 * 1.1), "the error is clipped at 0.2"
    assert kl.observe(state, {}) == state
