"""unipo evaluate: a finished run measured, and said in words."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Annotated, Any

import tyro
from rich.table import Table

from unipo.cli.words import console


def evaluate(arguments: list[str]) -> int:
    from unipo.api import asking
    from unipo.sources.directions import Asking, Directed
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
        config = config_of(folder)
        in_environment = isinstance(config, ControlConfig)
        ask = Asking() if in_environment else asking(config, angle)
        if against:
            theirs = asking(config if against == "reference" else config_of(against))
            theirs = theirs if angle is None or not isinstance(theirs, Directed) else replace(theirs, shown=angle)
            met = evaluate_versus(folder, against, prompts, samples, temperature, judge, ask, theirs)
            print(json.dumps(as_json(met))) if json_output else console.print(str(met), highlight=False, soft_wrap=True)
            return 0
        found = (
            evaluate_control(folder, episodes)
            if in_environment
            else evaluate_run(folder, prompts, samples, temperature, best_of, reward, ask)
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
