"""docs/claims.md and its pictures from the verdict files, and docs/methods.md: `python -m unipo.reproduce.page [FILE]`."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from unipo.reproduce.catalog_page import catalog_page
from unipo.reproduce.claim import INCONCLUSIVE, NOT_REPRODUCED, REPRODUCED
from unipo.reproduce.picture import picture
from unipo.reproduce.run import VERDICTS

INTRODUCTION = """\
# What was claimed, and what we measured

Each row of the catalog that `unipo methods` calls `works` has a small experiment here: the claim of its paper, with the
library's own recipes, on tasks small enough that success rates are exact sums, or in runs of a minute in an environment.
`unipo reproduce METHOD` repeats it.

A verdict is decided by a rule that was fixed before the experiment. A claim has parts, each a difference between two arms
with bounds. *Reproduced*: the whole 95 % interval (Student's t, paired by seed) lies within the bounds for every part.
*Not reproduced*: for some part none of it does. *Inconclusive*: anything else. Learning rates of methods and baselines
come from the same grid on seeds that are not reported. A small experiment says little about large models, in either
direction: read the settings. Two things were changed after first runs: a table of logits gave way to a small network
where every arm reached a success of 1 (REC, NFT, HPT, CHORD), and learning rates are chosen on two seeds instead of one.

This page is written by `python -m unipo.reproduce.page`. Preference games beside the rates that are proven for them:

![KL and exploitability over steps, and the bounds](games.png)
"""


def verdicts(folder: Path = VERDICTS) -> list[dict[str, Any]]:
    """All verdict files, by slug."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]


def page(found: list[dict[str, Any]]) -> str:
    """The Markdown of the whole page: an overview, then a section per claim."""
    count = Counter(v["verdict"] for v in found)
    total = ", ".join(f"{count[name]} {name}" for name in (REPRODUCED, NOT_REPRODUCED, INCONCLUSIVE))
    rows = [f"| [{v['slug']}](#{v['slug']}) | {v['claim']} | {v['verdict']} |" for v in found]
    overview = ["| method | claim | verdict |", "|---|---|---|", *rows, "", f"{len(found)} claims: {total}."]
    return "\n".join([INTRODUCTION, *overview, "", *(section(v) for v in found)])


def section(verdict: Mapping[str, Any]) -> str:
    """One claim: numbers of every arm, the parts that decide, the setting, and how to repeat it."""
    arms = verdict["numbers"]
    metrics = [m for m in next(iter(arms.values())) if m != "learning_rate"]
    lines = [f"## {verdict['slug']}", "", f"{verdict['claim']}: **{verdict['verdict']}**.", ""]
    lines += [f"| arm | rate | {' | '.join(metrics)} |", "|---|---|" + "---|" * len(metrics)]
    for arm, found in arms.items():
        cells = " | ".join(_spread(found[m]["mean"], found[m]["interval"]) for m in metrics)
        lines.append(f"| {arm} | {found['learning_rate']:g} | {cells} |")
    lines += ["", f"![{verdict['slug']}](../unipo/reproduce/verdicts/{verdict['slug']}.png)"]
    lines += ["", "| expected | measured | verdict |", "|---|---|---|"]
    for part in verdict["expectations"]:
        lines.append(f"| {part['expected']} | {_spread(part['difference'], part['interval'])} | {part['verdict']} |")
    seeds = f"{len(verdict['seeds'])} seeds, {verdict['seconds']:g} s, commit {verdict['commit'] or 'unknown'}"
    return "\n".join([*lines, "", verdict["note"], "", f"`{verdict['command']}` ({seeds})", ""])


def _spread(mean: float | None, interval: list[float | None]) -> str:
    if mean is None:
        return "-"
    low, high = interval
    return f"{mean:.3g}" if low is None or high is None else f"{mean:.3g} [{low:.3g}, {high:.3g}]"


def main(arguments: list[str]) -> None:
    path = Path(arguments[0]) if arguments else VERDICTS.parents[2] / "docs" / "claims.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    found = verdicts()
    for verdict in found:
        picture(verdict, VERDICTS / f"{verdict['slug']}.png")
    path.write_text(page(found), encoding="utf-8")
    path.with_name("methods.md").write_text(catalog_page(), encoding="utf-8")
    print(path, path.with_name("methods.md"))


if __name__ == "__main__":
    main(sys.argv[1:])
