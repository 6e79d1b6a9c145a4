"""UniPO: policy optimization from any mix of data."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from unipo.api import compare, resume, train
    from unipo.episodes import Episodes
    from unipo.recipe import Recipe

__version__ = "0.1.0"
__all__ = ["Episodes", "Recipe", "__version__", "compare", "resume", "train"]
_HOME = {
    "Episodes": "unipo.episodes",
    "Recipe": "unipo.recipe",
    "compare": "unipo.api",
    "resume": "unipo.api",
    "train": "unipo.api",
}


def __getattr__(name: str) -> Any:
    """Load the heavy parts on first use, so that `import unipo` and `unipo --help` stay quick."""
    if name not in _HOME:
        raise AttributeError(f"module 'unipo' has no attribute {name!r}; it has: {', '.join(__all__)}")
    import importlib

    return getattr(importlib.import_module(_HOME[name]), name)
