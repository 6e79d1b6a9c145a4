"""Plots, tables and the HTML report: reads run folders only."""

from unipo.report.html import write_report
from unipo.report.runs import RunData, RunFolderError, read_run
from unipo.report.tables import comparison_table

__all__ = ["RunData", "RunFolderError", "comparison_table", "read_run", "write_report"]
