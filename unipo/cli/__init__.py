"""The command line: parses, builds a run, calls it. Everything it does can be done from Python through `unipo.api`."""

from unipo.cli.main import COMMANDS, main

__all__ = ["COMMANDS", "main"]
