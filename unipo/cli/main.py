"""One command of many: what is expected to go wrong is one clear message, anything else a traceback."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Sequence

from unipo.cli.data import data
from unipo.cli.evaluation import evaluate
from unipo.cli.looking import explain, methods, report, reproduce, show
from unipo.cli.training import compare, resume, run
from unipo.cli.words import UsageError, console, errors, near

USAGE = """\
unipo: policy optimization from any mix of data

  unipo run METHOD TASK [--flags]        train; METHOD may be a sum, such as grpo+0.2*sft+0.1*dpo,
                                         TASK a task, a dataset, or an environment such as CartPole-v1
  unipo resume RUN                       go on after a crash, a kill or Ctrl-C, exactly
  unipo compare M1,M2,... TASK --seeds K side by side: a table with intervals, and curves
  unipo evaluate RUN [--against RUN2]    held-out pass@1 and pass@k, win rates, or returns of episodes, with intervals
  unipo report RUN...                    one self-contained HTML page, and PNGs
  unipo methods [--family F] [--json]    the catalog: every work, its state, its evidence
  unipo show METHOD                      paper, equation, needs, defaults, claim, measured result
  unipo explain METHOD TASK [--flags]    dry run: what each term would train on
  unipo reproduce METHOD|all             the paper's claim as a small experiment; writes a verdict
  unipo data check DATASET               what is in a dataset, what is wrong with it, what it can be used for
  unipo data segments RECORDED OUT       pairs of segments of recorded control data, preferred by --expert RUN

Flags of a command: unipo run --help
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0 only when it did all it was asked for."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        console.print(USAGE, markup=False, highlight=False, soft_wrap=True)
        return 0
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Waiting threads that spin make small steps many times slower on a busy machine; read when torch is first imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("SDL_VIDEODRIVER", "dummy")  # videos are drawn without a screen
    warnings.formatwarning = lambda message, *_, **__: f"warning  {message}\n"  # users need no line of our code
    name, rest = arguments[0], arguments[1:]
    if name == "--version":
        import unipo

        console.print(unipo.__version__)
        return 0
    if name not in COMMANDS:
        return _failed(f"there is no command {name!r}{near(name, COMMANDS)}. Commands: {', '.join(COMMANDS)}")
    return _guarded(COMMANDS[name], rest)


def _guarded(command: Callable[[list[str]], int], rest: list[str]) -> int:
    """Expected errors are one clear message and exit code 1 or 130; anything else is a bug and keeps its traceback."""
    from unipo.methods.catalog import MethodError
    from unipo.policies.loading import ModelError
    from unipo.rewards import RewardError
    from unipo.sources.acting.environment_errors import EnvironmentFailure, TaskEnvironmentError
    from unipo.sources.data.problems import DataError
    from unipo.tasks import TaskError
    from unipo.training import ConfigError, Interrupted

    _quiet()
    try:
        return command(rest)
    except (
        ConfigError,
        DataError,
        MethodError,
        ModelError,
        RewardError,
        TaskEnvironmentError,
        TaskError,
        EnvironmentFailure,
        FloatingPointError,
        UsageError,
    ) as error:
        return _failed(str(error))
    except OSError as error:
        where = f": {error.filename}" if error.filename else ""
        return _failed((error.strerror or str(error)) + where)
    except Interrupted as stop:
        errors.print(f"[yellow]{stop}[/]", highlight=False, soft_wrap=True)
        return 130
    except KeyboardInterrupt:
        errors.print(
            "[yellow]stopped at once; the last checkpoint is intact: unipo resume[/]", highlight=False, soft_wrap=True
        )
        return 130


def _failed(message: str) -> int:
    errors.print("[bold red]error[/] ", end="")
    errors.print(message, markup=False, highlight=False, soft_wrap=True)
    return 1


def _quiet() -> None:
    """Libraries' progress bars and notices are not ours to show."""
    import logging

    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "run": run, "resume": resume, "compare": compare, "evaluate": evaluate, "report": report, "methods": methods,
    "show": show, "explain": explain, "reproduce": reproduce, "data": data,
}  # fmt: skip
