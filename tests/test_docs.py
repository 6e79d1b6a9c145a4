"""The pages are true: commands parse, links lead somewhere, tables name what a real run writes and what the code knows."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pyarrow.parquet as pq
import pytest

import unipo
from unipo.cli import COMMANDS, words
from unipo.methods.catalog import BY_SLUG, STUDIES, parse
from unipo.rewards import REWARDS, resolve_reward, split_rewards
from unipo.sources.data.datasets import load_rows
from unipo.sources.data.files import READERS
from unipo.sources.data.records import KINDS

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
PLACEHOLDERS = re.compile(r"\b(?:METHOD|TASK|SLUG|M1|ENV|DATASET|METHODS|RUN\.\.\.)\b|\.\.\.")


def commands(page: Path) -> list[str]:
    """Lines of shell blocks that call the command line, without their comments."""
    blocks = re.findall(r"```(?:sh|bash|console)\n(.*?)```", page.read_text(encoding="utf-8"), re.S)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line.removeprefix("$ ").strip() for line in lines if line.removeprefix("$ ").startswith("unipo ")]


EVERY = sorted({(page.relative_to(ROOT).as_posix(), line) for page in PAGES for line in commands(page)})


@pytest.mark.parametrize(("page", "line"), EVERY)
def test_commands_are_ones_that_the_command_line_knows(page: str, line: str) -> None:
    name, *rest = shlex.split(line, comments=True)[1:]
    assert name in COMMANDS or name.startswith("--")
    if PLACEHOLDERS.search(" ".join(rest)):
        return
    if name in ("run", "explain"):
        words.parsed(name, rest)
    elif name == "compare":
        _, flags = words.taken(rest[2:], "--seeds", 3)
        for method in rest[0].split(","):
            parse(method)
        words.parsed("run", [rest[0].split(",")[0], rest[1], *flags])
    elif name in ("show", "reproduce") and rest[0] != "all":
        assert rest[0] in BY_SLUG or rest[0] in STUDIES


@pytest.mark.parametrize("page", [p.relative_to(ROOT).as_posix() for p in PAGES])
def test_links_lead_to_files(page: str) -> None:
    text = re.sub(r"```.*?```", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.S)
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text)]
    missing = [
        link for link in links if link and "://" not in link and not (ROOT / page).parent.joinpath(link).exists()
    ]
    assert not missing


def test_the_readme_names_both_pages() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "(docs/data.md)" in text
    assert "(docs/run_directory.md)" in text


def first_cells(page: str, heading: str) -> list[str]:
    """What is in backticks in the first column of the first table below a heading."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    section = text.partition(f"# {heading}\n")[2].partition("\n#")[0] if heading else text
    rows = [line for line in section.splitlines() if line.startswith("| `")]
    return [name for row in rows for name in re.findall(r"`([^`]+)`", row.split("|")[1])]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a reward of several parts, another that is measured, a reference and demonstrations: one step."""
    out = tmp_path_factory.mktemp("docs") / "run"
    unipo.train("q-insight+0.1*sft", "rating", steps=1, prompts=2, rollouts=2, demos="task", demos_per_step=2, dataset_rows=8,
                gold="length", eval_prompts=4, eval_samples=2, out=str(out))  # fmt: skip
    return out


def documented(name: str, known: list[str]) -> bool:
    return any(re.fullmatch(re.sub(r"[A-Z]{2,}|(?<=_)K\b", "[^/]+", k), name) for k in known)


def test_every_column_of_the_metrics_is_documented_and_real(run: Path) -> None:
    known = first_cells("run_directory.md", "Columns of `metrics.parquet`")
    real = pq.read_table(run / "metrics.parquet").column_names
    assert not [name for name in real if not documented(name, known)]
    plain = {name for name in known if not re.search(r"[A-Z]", name)}
    assert plain <= set(real)


def test_the_ledger_has_the_documented_axes_and_quantities(run: Path) -> None:
    text = (ROOT / "docs" / "run_directory.md").read_text(encoding="utf-8")
    names = [n.split("/") for n in pq.read_table(run / "metrics.parquet").column_names if n.startswith("ledger/")]
    quantities = set(first_cells("run_directory.md", "The ledger"))
    assert {n[-1] for n in names} == quantities
    assert all(f"`{axis}` (" in text for axis in {n[1] for n in names})


def test_every_file_of_a_run_is_documented_and_real(run: Path) -> None:
    known = first_cells("run_directory.md", "What a run leaves behind")
    there = {p.name for p in run.iterdir()}
    stems = {name.split("/")[0] for name in known}
    assert not [name for name in there if name not in stems and not name.startswith("report_")]
    optional = {"events.jsonl", "round.parquet", "references", "report.html"}
    assert {s for s in stems if "*" not in s} - optional <= there
    sample = json.loads((run / "samples.jsonl").read_text().splitlines()[0])
    assert set(sample) == {"step", "prompt", "completion", "reward", "source", "truncated"}


def test_every_column_of_episodes_is_documented(run: Path) -> None:
    text = (ROOT / "docs" / "run_directory.md").read_text(encoding="utf-8").partition("## Columns of `episodes/`")[2]
    known = re.findall(r"`([a-z_.]+(?:NAME)?)`", text)
    real = pq.read_table(run / "episodes" / "step_000001.parquet").column_names
    assert not [name for name in real if not documented(name, known)]
    assert {k for k in known if "NAME" not in k} <= set(real)


def test_formats_rewards_and_rows_are_those_that_the_code_knows(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    assert set(re.findall(r"`(\.\w+)`", text.partition("## Formats")[2].partition("```")[0])) - {".gz"} == set(READERS)
    assert set(first_cells("data.md", "Rewards")) == set(REWARDS)
    for part in split_rewards("within(width=0.5)@score,word_by_word@damage,form*0.5"):
        resolve_reward(part)
    examples = re.search(r"```json\n(.*?)```", text, re.S)
    assert examples is not None
    uses = set()
    for i, line in enumerate(examples[1].splitlines()):
        path = tmp_path / f"{i}.jsonl"
        path.write_text(line + "\n")
        data = load_rows(path)
        for kind in data.kinds:
            data.require(kind)
        uses |= set(data.kinds)
    assert uses == set(KINDS) - {"labels"}
    columns = set(first_cells("data.md", "Columns"))
    needed = {name for kind in KINDS.values() for names in kind.needs for name in names}
    assert needed <= columns
