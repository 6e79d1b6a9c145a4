"""Plots, tables and the HTML report: reads run folders only."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from unipo.report.html import write_report
    from unipo.report.runs import RunData, RunFolderError, read_run
    from unipo.report.tables import comparison_table

__all__ = ["RunData", "RunFolderError", "comparison_table", "read_run", "write_report"]
_HOMES = {
    "write_report": "html",
    "RunData": "runs",
    "RunFolderError": "runs",
    "read_run": "runs",
    "comparison_table": "tables",
}


def __getattr__(name: str) -> Any:
    """Imported when it is asked for: what draws is slow to import, and runs do not draw."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"unipo.report.{_HOMES[name]}"), name)
