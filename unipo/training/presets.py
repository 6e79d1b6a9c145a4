"""Settings that an environment is known to learn well with: `presets.yaml`, applied under what the user sets."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import Any

import yaml

from unipo.recipe import Recipe
from unipo.training.config import ConfigError, ControlConfig


@cache
def presets() -> Mapping[str, Mapping[str, Mapping[str, Any]]]:
    """{method: {environment: {setting: value}}}; a setting `options` holds the method's own keyword arguments."""
    loaded: Mapping[str, Any] = yaml.safe_load((files("unipo.training") / "presets.yaml").read_text(encoding="utf-8"))
    return loaded


def preset_of(method: str, environment: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """(fields of `ControlConfig`, keyword arguments of the method) that are kept for the pair; both empty without one."""
    found = dict(presets().get(method, {}).get(environment, {}))
    options = dict(found.pop("options", {}))
    return {k: tuple(v) if isinstance(v, list) else v for k, v in found.items()}, options


def control_config(recipe: Recipe, preset: Mapping[str, Any], **settings: Any) -> ControlConfig:
    """Defaults, under what the recipe starts from, under the preset, under `settings`. Raises ConfigError for unknown ones."""
    if recipe.control is None:
        raise ConfigError(
            f"{settings.get('method')!r} is not for environments such as {settings.get('task')}: take a method whose "
            "`unipo show` says so, such as ppo, sac or dqn"
        )
    layers = (recipe.control.settings, preset, settings)
    merged = {**recipe.control.settings, **preset, **settings}
    merged["env_options"] = {k: v for layer in layers for k, v in layer.get("env_options", {}).items()}
    known = ControlConfig.__dataclass_fields__
    unknown = [name for name in merged if name not in known]
    if unknown:
        raise ConfigError(f"runs in environments have no setting {unknown[0]!r}; they have: {', '.join(known)}")
    return ControlConfig(**merged)
