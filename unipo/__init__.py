"""UniPO: policy optimization from any mix of data."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from unipo.api import compare, resume, train
    from unipo.episodes import Episodes
    from unipo.recipe import Recipe
    from unipo.training.revisit import load_actor
    from unipo.training.revisit import load_trained as load_policy

__version__ = "0.1.0"
__all__ = ["Episodes", "Recipe", "__version__", "compare", "load_actor", "load_policy", "resume", "train"]
_HOME = {
    "Episodes": "unipo.episodes:Episodes",
    "Recipe": "unipo.recipe:Recipe",
    "compare": "unipo.api:compare",
    "load_actor": "unipo.training.revisit:load_actor",
    "load_policy": "unipo.training.revisit:load_trained",
    "resume": "unipo.api:resume",
    "train": "unipo.api:train",
}


def __getattr__(name: str) -> Any:
    """Load the heavy parts on first use, so that `import unipo` and `unipo --help` stay quick."""
    if name not in _HOME:
        raise AttributeError(f"module 'unipo' has no attribute {name!r}; it has: {', '.join(__all__)}")
    import importlib

    module, _, attribute = _HOME[name].partition(":")
    return getattr(importlib.import_module(module), attribute)
