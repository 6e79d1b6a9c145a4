"""Configurations of runs in environments: what wins over what, the round trip through YAML, and when something is due."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from unipo.api import configure
from unipo.methods.catalog import build, find
from unipo.methods.on_policy_control import a2c
from unipo.methods.policy_gradients import ppo, sft
from unipo.objectives import GeneralisedAdvantage, PolicyGradient
from unipo.sources.spec import ControlSpec
from unipo.training.config import ConfigError, ControlConfig, RunConfig, read_config
from unipo.training.presets import control_config, preset_of, presets


# ---- what wins -------------------------------------------------------------------------------------------------------
def test_settings_win_over_presets_over_the_method_over_defaults() -> None:
    recipe = ppo().but(control=ControlSpec(settings={"num_envs": 2, "rollout": 3, "batch_size": 4}))
    made = control_config(
        recipe, {"rollout": 30, "batch_size": 40, "warmup": 7}, method="ppo", task="X-v1", batch_size=400
    )
    assert (made.num_envs, made.rollout, made.batch_size, made.warmup) == (2, 30, 400, 7)
    assert made.activation == ControlConfig().activation
    assert (made.method, made.task) == ("ppo", "X-v1")
    assert control_config(a2c(), {}, method="a2c").num_envs == 16 != ControlConfig().num_envs


def test_unknown_settings_and_methods_for_text_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"no setting 'rollouts'; they have: .*rollout"):
        control_config(ppo(), {}, rollouts=3)
    with pytest.raises(ConfigError, match="'sft' is not for environments such as CartPole-v1"):
        control_config(sft(), {}, method="sft", task="CartPole-v1")


def test_keywords_of_the_method_win_one_by_one() -> None:
    config, recipe = configure("ppo", "CartPole-v1", {"ppo": {"gamma": 0.5}})
    assert isinstance(config, ControlConfig)
    assert config.method_options["ppo"] == {**preset_of("ppo", "CartPole-v1")[1], "gamma": 0.5}
    (gradient,) = (t for _, t in recipe.objective.terms() if isinstance(t, PolicyGradient))
    assert isinstance(gradient.advantage, GeneralisedAdvantage)
    assert (gradient.advantage.gamma, gradient.advantage.lam) == (0.5, 0.8)
    assert config.rollout == 32
    bare, _ = configure("ppo", "CartPole-v1", {}, preset=False)
    assert isinstance(bare, ControlConfig)
    assert bare.rollout == ControlConfig().rollout
    assert not bare.method_options.get("ppo")
    faster, _ = configure("ppo", "CartPole-v1", {}, rollout=64)
    assert isinstance(faster, ControlConfig)
    assert (faster.rollout, faster.batch_size) == (64, 256)


def test_epochs_that_are_asked_for_win_over_the_preset() -> None:
    """They are a keyword of the method and a setting of the run: neither may be undone by what is kept for the pair."""
    for config, recipe in (
        configure("ppo", "CartPole-v1", {"ppo": {"epochs": 3}}),
        configure("ppo", "CartPole-v1", {}, epochs=3),
    ):
        assert isinstance(config, ControlConfig)
        assert (config.epochs or recipe.epochs) == 3
    config, recipe = configure("ppo", "CartPole-v1", {})
    assert isinstance(config, ControlConfig)
    assert (config.epochs or recipe.epochs) == 20


PAIRS = [(method, environment) for method, of in presets().items() for environment in of]


@pytest.mark.parametrize(("method", "environment"), PAIRS)
def test_every_preset_is_one_that_the_method_takes(method: str, environment: str) -> None:
    fields, options = preset_of(method, environment)
    assert not set(options) - set(find(method).defaults_of(True)), "keywords of the method"
    config = control_config(build(method, {method: options}, True), fields, method=method, task=environment)
    assert all(getattr(config, name) == value for name, value in fields.items())
    assert config.num_envs * config.rollout >= config.batch_size


def test_presets_cannot_be_changed_by_who_asks_for_them() -> None:
    fields, options = preset_of("ppo", "CartPole-v1")
    fields.clear()
    options["gamma"] = 0.0
    assert preset_of("ppo", "CartPole-v1")[1]["gamma"] == 0.98
    assert preset_of("ppo", "CartPole-v1")[0]["rollout"] == 32
    assert preset_of("ppo", "Nowhere-v1") == preset_of("nothing", "CartPole-v1") == ({}, {})
    assert preset_of("ppo", "Hopper-v5")[0]["hidden"] == (256, 256), "as the command line has it"


# ---- YAML ------------------------------------------------------------------------------------------------------------
def test_the_round_trip_through_yaml(tmp_path: Path) -> None:
    changed: dict[str, Any] = {
        "method": "sac", "task": "Pendulum-v1", "method_options": {"sac": {"tau": 0.01, "automatic": False}},
        "env_options": {"g": 9.81, "render_mode": None}, "hidden": (32, 16, 8), "clip_norm": math.inf, "adam_eps": 1e-8,
        "learning_rate": 2.0633e-5, "asynchronous": True, "prioritized": 0.6, "dataset": "a/b-v0", "seed": 7,
    }  # fmt: skip
    config = ControlConfig(**changed)
    text = config.to_yaml()
    again = read_config(text)
    assert isinstance(again, ControlConfig)
    assert again == config
    assert again.to_yaml() == text
    assert isinstance(again.hidden, tuple)
    assert list(yaml.safe_load(text)) == [f.name for f in dataclasses.fields(ControlConfig)]
    assert ControlConfig.from_yaml(ControlConfig().to_yaml()) == ControlConfig()


def test_the_kind_of_a_configuration_is_read_from_it() -> None:
    assert type(read_config(RunConfig().to_yaml())) is RunConfig
    assert type(read_config(ControlConfig().to_yaml())) is ControlConfig
    with pytest.raises(ConfigError, match="does not know: envs"):
        read_config(ControlConfig().to_yaml() + "envs: 3\n")
    with pytest.raises(ConfigError, match="not hold a mapping"):
        read_config("")


# ---- counts ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("total", "envs", "rollout", "steps"), [(100, 1, 10, 10), (101, 1, 10, 11), (100, 3, 10, 4), (1, 4, 100, 1)]
)
def test_a_run_is_whole_rollouts_rounded_up(total: int, envs: int, rollout: int, steps: int) -> None:
    assert ControlConfig(total_timesteps=total, num_envs=envs, rollout=rollout).steps == steps


@pytest.mark.parametrize("steps", [1, 2, 7, 10, 11, 49, 100, 1003])
@pytest.mark.parametrize("parts", [1, 3, 10])
def test_so_many_evaluations_and_checkpoints_evenly_and_one_at_the_end(steps: int, parts: int) -> None:
    config = ControlConfig(total_timesteps=steps, rollout=1, evaluations=parts, checkpoints=parts)
    due = [s for s in range(1, steps + 1) if config.evaluation_due(s)]
    assert due == [s for s in range(1, steps + 1) if config.checkpoint_due(s)]
    assert len(due) == min(steps, parts)
    assert due[-1] == steps
    gaps = [b - a for a, b in zip([0, *due], due, strict=False)]
    assert max(gaps) - min(gaps) <= 1


def test_no_evaluations_are_none() -> None:
    config = ControlConfig(total_timesteps=20, rollout=1, evaluations=0, checkpoints=1)
    assert not any(config.evaluation_due(s) for s in range(1, 21))
    assert [s for s in range(1, 21) if config.checkpoint_due(s)] == [20]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"num_envs": 0}, "--num-envs is 0: expected at least 1"),
        ({"rollout": 0}, "--rollout is 0"),
        ({"hidden": (64, 0)}, "--hidden is .* expected widths of at least 1"),
        ({"activation": "sine"}, "expected tanh, relu or gelu"),
        ({"prioritized": 1.5}, r"expected in \[0, 1\]"),
        ({"checkpoints": 0}, "--checkpoints is 0"),
        ({"evaluations": -1}, "--evaluations is -1"),
        ({"schedule": "step"}, "constant, linear or cosine"),
        ({"learning_rate": 0.0}, "--learning-rate is 0.0: expected above 0"),
        ({"n_step": 0}, "--n-step is 0"),
    ],
)
def test_settings_that_cannot_be_right_are_named(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ControlConfig(**wrong)


def test_options_of_the_environment_add_up() -> None:
    """What the method asks of its environment stays where the user sets something else, and gives way where he sets it."""
    kept = configure("esg-portfolio", "unipo/PortfolioWeights-v0", {}, env_options={"days": 50})[0]
    assert kept.env_options == {"kappa": 5.0, "days": 50}  # type: ignore[attr-defined]
    changed = configure("esg-portfolio", "unipo/PortfolioWeights-v0", {}, env_options={"kappa": 0.0})[0]
    assert changed.env_options == {"kappa": 0.0}  # type: ignore[attr-defined]
