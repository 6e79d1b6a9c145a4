"""The command line: parses, builds a run, calls it. Everything it does can be done from Python through `unipo.api`."""

from __future__ import annotations

import ast
import difflib
import json
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.table import Table

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
console = Console()
errors = Console(stderr=True)


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
        return _failed(f"there is no command {name!r}{_near(name, COMMANDS)}. Commands: {', '.join(COMMANDS)}")
    return _guarded(COMMANDS[name], rest)


def _guarded(command: Callable[[list[str]], int], rest: list[str]) -> int:
    """Expected errors are one clear message and exit code 1 or 130; anything else is a bug and keeps its traceback."""
    from unipo.methods.catalog import MethodError
    from unipo.policies.loading import ModelError
    from unipo.rewards import RewardError
    from unipo.sources.data_problems import DataError
    from unipo.sources.environment_errors import EnvironmentFailure, TaskEnvironmentError
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


class UsageError(ValueError):
    """A command line that cannot be meant; the message says what can."""


def _failed(message: str) -> int:
    errors.print("[bold red]error[/] ", end="")
    errors.print(message, markup=False, highlight=False, soft_wrap=True)
    return 1


def _near(name: str, known: Any) -> str:
    near = difflib.get_close_matches(name, list(known), 1, 0.4)
    return f"; did you mean {near[0]!r}?" if near else ""


def _quiet() -> None:
    """Libraries' progress bars and notices are not ours to show."""
    import logging

    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)


# ---- train -----------------------------------------------------------------------------------------------------------
def _parsed(command: str, arguments: list[str]) -> tuple[Any, Any]:
    """METHOD TASK [--flags] as a configuration and its recipe."""
    from unipo.api import configure
    from unipo.methods.catalog import parse

    words, options, flags = _divided(arguments)
    if "-h" in flags or "--help" in flags:
        words = [*words, "grpo", "arithmetic"][:2] if len(words) < 2 else words
    if len(words) != 2:
        raise UsageError(
            f"unipo {command} takes METHOD and TASK first, then flags; found {' '.join(words) or 'nothing'}"
        )
    parse(words[0])
    environment = options.pop("env", {})
    variant, flags = _taken_word(flags, "--variant")
    if variant:
        options.setdefault(words[0], {})["variant"] = variant
    preset = "--no-preset" not in flags
    more = {"env_options": environment} if environment else {}
    default, recipe = configure(words[0], words[1], options, preset, **more)
    flags = [f for f in flags if f != "--no-preset"]
    return tyro.cli(type(default), prog=f"unipo {command} METHOD TASK", args=flags, default=default), recipe


def _divided(arguments: list[str]) -> tuple[list[str], dict[str, dict[str, Any]], list[str]]:
    """(positional words before the first flag, {method: {keyword: value}} from --METHOD.KEYWORD VALUE, other flags)."""
    first = next((i for i, a in enumerate(arguments) if a.startswith("-")), len(arguments))
    words, rest = arguments[:first], arguments[first:]
    options: dict[str, dict[str, Any]] = {}
    flags: list[str] = []
    while rest:
        flag = rest.pop(0)
        slug, dot, keyword = flag.removeprefix("--").partition("=")[0].partition(".")
        if not (flag.startswith("--") and dot):
            flags.append(flag)
            continue
        value = flag.partition("=")[2] if "=" in flag else (rest.pop(0) if rest else "")
        options.setdefault(slug, {})[keyword.replace("-", "_")] = _literal(value)
    return words, options, flags


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def run(arguments: list[str]) -> int:
    from unipo.api import finish, start

    config, recipe = _parsed("run", arguments)
    made = start(config, recipe, console)
    console.print(
        f"[bold]{config.method}[/] on [bold]{config.task}[/], seed {config.seed}, in {config.folder}", highlight=False
    )
    if "--no-preset" not in arguments:
        _tell_preset(config.method, config.task)
    return _finished(finish(made))


def _tell_preset(method: str, task: str) -> None:
    """Which settings of a pair are not the method's own, where there are such."""
    from unipo.training.presets import preset_of

    fields, keywords = preset_of(method, task)
    if fields or keywords:
        told = ", ".join(f"{k} {v}" for k, v in {**fields, **keywords}.items())
        console.print(f"preset of {method} on {task} (--no-preset for none): {told}", highlight=False, soft_wrap=True)


def resume(arguments: list[str]) -> int:
    from unipo import api

    def parse(folder: Annotated[str, tyro.conf.Positional], changed_code: bool = False) -> Any:
        """Go on with a run from its newest whole checkpoint.

        Args:
            folder: The run directory.
            changed_code: Go on although code or configuration have changed since.
        """
        return api.resume(folder, console, changed_code)

    return _finished(tyro.cli(parse, prog="unipo resume", args=arguments))


def _finished(made: Any) -> int:
    """Say what came out, write the report, name its path last."""
    from unipo.report import write_report
    from unipo.training.judging import by_margin

    for name, shown, form in (("accuracy", "held-out accuracy", "{:.1%}"), ("eval_return", "return", "{:,.1f}")):
        measured = [m for m in made.records.metrics if m.get(name, float("nan")) == m.get(name)]
        if measured:
            first, last = measured[0], measured[-1]
            low, high = form.format(last[f"{name}_low"]), form.format(last[f"{name}_high"])
            console.print(
                f"{shown} [bold]{form.format(first[name])}[/] -> [bold]{form.format(last[name])}[/] "
                f"(95 % interval {low} to {high}) in {last['seconds']:.0f} s",
                highlight=False,
            )
            told = by_margin(last) if name == "accuracy" else ""
            if told:
                console.print(told, highlight=False, soft_wrap=True)
    kind = "judge " if getattr(made.policy, "judges", "") else "policy"
    console.print(f"{kind}  {made.folder / 'final'}", highlight=False, soft_wrap=True)
    if getattr(made.config, "record", ""):
        told = f"{made.data.collector.recorder.recorded:,} episodes; unipo data check {made.config.record}"
        console.print(f"data    {made.config.record}  ({told})", highlight=False, soft_wrap=True)
    for path in sorted((made.folder / "video").glob("*.*")):
        console.print(f"video   {path}", highlight=False, soft_wrap=True)
    page = write_report([made.folder], made.folder / "report.html")
    console.print(f"report  [bold]{page}[/]", highlight=False, soft_wrap=True)
    return 0


def compare(arguments: list[str]) -> int:
    from unipo import api
    from unipo.methods.catalog import parse as parse_method
    from unipo.report import comparison_table, write_report

    words, _, flags = _divided(arguments)
    if len(words) != 2:
        raise UsageError("unipo compare takes METHOD,METHOD,... and TASK first, then flags such as --seeds 3")
    methods, task = words[0].split(","), words[1]
    for method in methods:
        parse_method(method)
    seeds, flags = _taken(flags, "--seeds", 3)
    preset, flags = "--no-preset" not in flags, [f for f in flags if f != "--no-preset"]
    default, _ = api.configure(methods[0], task, {}, preset=False)
    config = tyro.cli(type(default), prog="unipo compare METHODS TASK --seeds K", args=flags, default=default)
    out = config.out or f"runs/compare-{Path(task).stem.replace(':', '_')}"
    skip = {"method", "task", "seed", "out", "method_options"}
    changed = {
        n: v
        for n in type(default).__dataclass_fields__
        if n not in skip and (v := getattr(config, n)) != getattr(default, n)
    }
    for method in methods if preset else ():
        _tell_preset(method, task)
    folders = api.compare(methods, task, seeds, out, console, preset=preset, **changed)
    console.print(comparison_table(folders))
    console.print(
        f"report  [bold]{write_report(folders, Path(out) / 'report.html')}[/]", highlight=False, soft_wrap=True
    )
    return 0


def _taken_word(flags: list[str], name: str) -> tuple[str, list[str]]:
    """The word after `name`, or "", and the other flags."""
    if name not in flags[:-1]:
        return "", flags
    at = flags.index(name)
    return flags[at + 1], flags[:at] + flags[at + 2 :]


def _taken(flags: list[str], name: str, default: int) -> tuple[int, list[str]]:
    if name not in flags:
        return default, flags
    at = flags.index(name)
    try:
        return int(flags[at + 1]), flags[:at] + flags[at + 2 :]
    except (IndexError, ValueError):
        raise UsageError(f"{name} takes a whole number") from None


# ---- look ------------------------------------------------------------------------------------------------------------
def evaluate(arguments: list[str]) -> int:
    from unipo.training import ControlConfig
    from unipo.training.revisit import as_json, config_of, evaluate_control, evaluate_run, evaluate_versus

    def parse(folder: Annotated[str, tyro.conf.Positional], prompts: int = 512, samples: int = 1, temperature: float = 1.0,
              against: str = "", judge: str = "reward", angle: float | None = None, best_of: int = 0, reward: str = "",
              episodes: int = 100,
              json_output: Annotated[bool, tyro.conf.arg(name="json")] = False) -> int:  # fmt: skip
        """Measure what a finished run trained: held-out pass@1 and pass@k, the return of whole episodes, or pairs in order.

        Args:
            folder: The run directory.
            prompts: Text: held-out prompts.
            samples: Text: completions per prompt; k of pass@k goes up to it.
            temperature: Text: of sampling (0: greedy).
            against: Text: another run, or "reference" (the model that this one started from): the win rate against its answers,
                ties half, and the win rate at equal length.
            judge: Text: who says which answer is better: "reward" (the higher one), "model(FOLDER)", or file.py:function.
            angle: Text: the direction in degrees that a policy with directions (dpa) is asked for.
            best_of: Text: of so many answers to a prompt the best by --reward is picked, and judged by the task's own reward.
            reward: Text: who picks, written as for unipo run, such as "model(FOLDER)" (default: what the run was trained with).
            episodes: Environments: episodes, with the mode of the policy.
            json_output: Print JSON.
        """
        in_environment = isinstance(config_of(folder), ControlConfig)
        if against:
            met = evaluate_versus(folder, against, prompts, samples, temperature, judge, angle)
            print(json.dumps(as_json(met))) if json_output else console.print(str(met), highlight=False, soft_wrap=True)
            return 0
        found = (
            evaluate_control(folder, episodes)
            if in_environment
            else evaluate_run(folder, prompts, samples, temperature, best_of, reward, angle)
        )
        print(json.dumps(as_json(found))) if json_output else _measured(found)
        return 0

    return int(tyro.cli(parse, prog="unipo evaluate", args=arguments))


def _measured(found: Any) -> None:
    """An evaluation in words."""
    from unipo.training.judging import by_margin

    m = found.metrics()
    if "return" in m:
        how = f"bootstrap; {len(found.returns)} episodes of {m['length']:,.1f} steps on average, with the policy's mode"
        shown = f"95 % interval {m['return_low']:,.1f} to {m['return_high']:,.1f} ({how})"
        console.print(f"return [bold]{m['return']:,.1f}[/]  {shown}", highlight=False, soft_wrap=True)
        return
    if "best_of" in m:
        _best_of(m)
        return
    if by_margin(m):
        span = f"95 % interval {m['accuracy_low']:.1%} to {m['accuracy_high']:.1%} (Wilson)"
        told = f"pairs in order [bold]{m['accuracy']:.1%}[/]  {span}; it expects {m['predicted']:.1%}"
        console.print(told, highlight=False, soft_wrap=True)
        console.print(by_margin(m), highlight=False, soft_wrap=True)
        return
    kind = "Wilson" if found.samples == 1 else "Student's t over prompts"
    console.print(f"pass@1 [bold]{found.accuracy:.1%}[/]  95 % interval {found.low:.1%} to {found.high:.1%} "
                  f"({kind}; {found.prompts} prompts x {found.samples})", highlight=False, soft_wrap=True)  # fmt: skip
    for k, value in found.pass_k.items():
        console.print(f"pass@{k} [bold]{value:.1%}[/]", highlight=False, soft_wrap=True)


def _best_of(m: Any) -> None:
    """The best of n, by n."""
    table = Table("n", "reward of the judge", "95 % interval", "reward of who picks", "if the judge picks", "KL at most",
                  title=f"best of n of {m['prompts']} prompts' {m['samples']} answers", title_justify="left")  # fmt: skip
    for row in m["best_of"]:
        table.add_row(f"{row['n']:.0f}", f"{row['gold']:.3f}", f"{row['gold_low']:.3f} to {row['gold_high']:.3f}",
                      f"{row['proxy']:.3f}", f"{row['oracle']:.3f}", f"{row['kl']:.2f}")  # fmt: skip
    console.print(table)


def report(arguments: list[str]) -> int:
    from unipo.report import write_report

    folders = [Path(a) for a in arguments if not a.startswith("-")]
    if not folders:
        raise UsageError("unipo report takes one or more run directories")
    bad = [f for f in folders if not (f / "config.yaml").exists()]
    if bad:
        raise UsageError(f"{bad[0]} is not a run: it has no config.yaml")
    out = folders[0] / "report.html" if len(folders) == 1 else Path("report.html")
    console.print(f"report  [bold]{write_report(folders, out)}[/]", highlight=False, soft_wrap=True)
    return 0


def methods(arguments: list[str]) -> int:
    from unipo.methods.catalog import catalog

    family = arguments[arguments.index("--family") + 1] if "--family" in arguments[:-1] else None
    known = {"--family", "--json", family}
    unknown = [a for a in arguments if a not in known]
    if unknown:
        raise UsageError(f"unipo methods has no option {unknown[0]!r}{_near(unknown[0], ('--family', '--json'))}")
    entries = [e for e in catalog() if family in (None, e.family)]
    if not entries:
        raise UsageError(f"there is no family {family!r}; families: {', '.join(sorted({e.family for e in catalog()}))}")
    if "--json" in arguments:
        print(json.dumps([e.as_dict() for e in entries], indent=1))
        return 0
    shown = ("row", "method", "family", "state", "tests", "verdict", "title")[: 7 if console.width >= 100 else 6]
    table = Table()
    for name in shown:
        table.add_column(name, no_wrap=True, min_width={"row": 3, "state": 7, "verdict": 14}.get(name))
    for e in entries:
        color = {"works": "green", "partial": "yellow"}.get(e.state, "dim")
        row = "" if e.row is None else str(e.row)
        cells = (
            row,
            e.slug,
            e.family,
            f"[{color}]{e.state}[/]",
            str(e.tests or ""),
            e.verdict or "",
            e.title[: console.width - 84],
        )
        table.add_row(*cells[: len(shown)])
    console.print(table)
    states = [e.state for e in entries]
    console.print(
        ", ".join(f"{states.count(s)} {s}" for s in ("works", "partial", "planned")), highlight=False, soft_wrap=True
    )
    return 0


def show(arguments: list[str]) -> int:
    from unipo.methods.catalog import describe

    if len(arguments) != 1:
        raise UsageError("unipo show takes one METHOD")
    console.print(describe(arguments[0]), markup=False, highlight=False, soft_wrap=True)
    return 0


def explain(arguments: list[str]) -> int:
    from unipo.training.explain import explain_run

    for part in explain_run(*_parsed("explain", arguments)):
        console.print(part, highlight=False, soft_wrap=True)
    return 0


def reproduce(arguments: list[str]) -> int:
    from unipo.reproduce import CLAIMS, reproduce_claim

    words = [a for i, a in enumerate(arguments) if not a.startswith("-") and (not i or arguments[i - 1] != "--seeds")]
    seeds, _ = _taken([a for a in arguments if a not in words], "--seeds", 5)
    if len(words) != 1 or (words[0] != "all" and words[0] not in CLAIMS):
        near = _near(words[0], CLAIMS) if words else ""
        raise UsageError(f"unipo reproduce takes one of: all, {', '.join(CLAIMS)}{near}")
    for slug in CLAIMS if words[0] == "all" else words:
        console.print(reproduce_claim(slug, seeds, console))
    return 0


def data(arguments: list[str]) -> int:
    from unipo.sources.control_report import is_control_data

    if arguments[:1] == ["segments"]:
        return _segments(arguments[1:])
    if len(arguments) < 2 or arguments[0] != "check":
        raise UsageError("unipo data knows two verbs: unipo data check DATASET, unipo data segments RECORDED OUT")
    if is_control_data(arguments[1]):
        return _control_data(arguments[1], arguments[2:])
    return int(tyro.cli(_check_text, prog="unipo data check", args=arguments[1:]))


def _check_text(dataset: Annotated[str, tyro.conf.Positional], model: str = "", reference: str = "",
                rating_range: tuple[float, ...] = ()) -> int:  # fmt: skip
    """What is in a dataset, what is wrong with it, and what it can be used for.

    Args:
        dataset: A file, a folder, or a hub name.
        model: A start policy ("tiny", a folder, a hub name): how it ranks comparisons, and lengths in its tokens.
        reference: Another model, whose log-probs the model's are compared with.
        rating_range: Least and highest rating that there can be.
    """
    from unipo.methods.catalog import fitting_text
    from unipo.policies import load_policy
    from unipo.sources.data_report import check
    from unipo.sources.datasets import load_rows
    from unipo.training.build_text import model_folder
    from unipo.training.ranking import check_same_tokenizer, ranking_report

    if reference and not model:
        raise UsageError("--reference is compared with a model: give --model too")
    if rating_range and not (len(rating_range) == 2 and rating_range[0] < rating_range[1]):
        raise UsageError("--rating-range takes two numbers, the least first, such as --rating-range 1 10")
    policy = load_policy(model_folder(model)) if model else None
    other = load_policy(model_folder(reference)) if reference else None
    if policy is not None and other is not None:
        check_same_tokenizer(policy, other, reference)
    found = check(dataset, policy.tokenizer if policy else None, rating_range=rating_range)
    console.print(str(found), markup=False, highlight=False, soft_wrap=True)
    if found.kinds:
        console.print(f"methods that fit: {', '.join(fitting_text(found.kinds))}", highlight=False, soft_wrap=True)
    if found.ok and found.pairs is not None and policy is not None:
        ranked = ranking_report(load_rows(dataset).comparisons(), policy, other)
        console.print(str(ranked), markup=False, highlight=False, soft_wrap=True)
    return 0 if found.ok else 1


def _segments(arguments: list[str]) -> int:
    from unipo.sources.segment_pairs import write_pairs

    def parse(recorded: Annotated[str, tyro.conf.Positional], out: Annotated[Path, tyro.conf.Positional], expert: str = "",
              length: int = 16, pairs: int = 1000, temperature: float = 1.0, noise: bool = False,
              seed: int = 0) -> Any:  # fmt: skip
        """Pairs of segments of recorded control data, of which one is preferred, for methods such as cpl.

        Args:
            recorded: A Minari dataset, or a folder of episodes.
            out: The folder to write to.
            expert: A run (or its final/) whose policy judges by its log-probabilities; without one, what was earned judges.
            length: Steps of a segment.
            pairs: How many.
            temperature: Of the expert's log-probabilities.
            noise: The better one is preferred with probability sigmoid(difference), and not always.
            seed: Of the choice of segments, and of the noise.
        """
        return write_pairs(
            recorded, out, expert, length=length, pairs=pairs, temperature=temperature, noise=noise, seed=seed
        )

    try:
        made = tyro.cli(parse, prog="unipo data segments", args=arguments)
    except ValueError as error:
        raise UsageError(str(error)) from error
    console.print(f"{made.count('group'):,} pairs; the preferred one is the better one by probability "
                  f"{float(made['confidence'].mean()):.2f} on average", highlight=False, soft_wrap=True)  # fmt: skip
    return 0


def _control_data(name: str, flags: list[str]) -> int:
    """Recorded episodes of environments: --reference DATASET, --bins N."""
    from unipo.methods.catalog import fitting_transitions
    from unipo.sources.control_report import check_control

    reference, flags = _taken_word(flags, "--reference")
    bins, flags = _taken(flags, "--bins", 100)
    if flags:
        raise UsageError(f"unipo data check has no option {flags[0]!r}; it has: --reference DATASET, --bins N")
    try:
        found = check_control(name, reference or None, bins)
    except ValueError as error:
        raise UsageError(str(error)) from error
    console.print(str(found), markup=False, highlight=False, soft_wrap=True)
    fitting = ", ".join(fitting_transitions(found.kind)) or "none: recorded data need Box or Discrete actions"
    console.print(f"methods that fit: {fitting}", highlight=False, soft_wrap=True)
    return 0 if found.ok else 1


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "run": run, "resume": resume, "compare": compare, "evaluate": evaluate, "report": report, "methods": methods,
    "show": show, "explain": explain, "reproduce": reproduce, "data": data,
}  # fmt: skip

if __name__ == "__main__":
    sys.exit(main())
