"""unipo data check, unipo data segments."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import tyro

from unipo.cli.words import UsageError, console, taken, taken_word


def data(arguments: list[str]) -> int:
    from unipo.sources.acting.control_report import is_control_data

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
    from unipo.sources.data.datasets import load_rows
    from unipo.sources.data.report import check
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
    from unipo.sources.acting.segment_pairs import write_pairs

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
    from unipo.sources.acting.control_report import check_control

    reference, flags = taken_word(flags, "--reference")
    bins, flags = taken(flags, "--bins", 100)
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
