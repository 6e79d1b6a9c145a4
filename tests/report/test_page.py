"""The page: whole, self-contained, escaped, and there for the poorest run."""

from __future__ import annotations

import math
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tests.report.synthetic import MIXED, add_events, make_run, write_metrics
from unipo.report import RunFolderError, read_run, write_report
from unipo.report.text import percent

VOID = {"meta", "br", "img", "link", "input", "hr"}


class Checker(HTMLParser):
    """Tags must nest; addresses that would need a network, and scripts, are collected."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.foreign: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        if tag in ("script", "link", "iframe"):
            self.foreign.append(tag)
        for name, value in attributes:
            if name in ("src", "href", "xlink:href") and not (value or "").startswith(("#", "data:")):
                self.foreign.append(str(value))
            if name == "id":
                self.ids.append(str(value))

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data


def check(page: Path) -> str:
    """The page's text, after checking that it is whole; clip paths are shared by pictures, other ids are unique."""
    checker = Checker()
    checker.feed(page.read_text(encoding="utf-8"))
    assert checker.open == []
    assert checker.foreign == []
    assert "url(http" not in page.read_text(encoding="utf-8")
    for name in ("report_curves.png", "report_ledger.png"):
        assert page.with_name(name).read_bytes().startswith(b"\x89PNG")
    return checker.text


def test_a_run_of_mixed_data(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", "grpo+0.2*sft", steps=50, sources=MIXED)
    add_events(folder)
    page = write_report([folder], folder / "report.html")
    text, run = check(page), read_run(folder)
    assert page == folder / "report.html"
    for expected in (
        "grpo+0.2*sft on arithmetic", "unipo run 'grpo+0.2*sft' arithmetic --steps 50 --seed 0", percent(run.first("accuracy")),
        percent(run.last("accuracy")), "Fresh rollouts moved the policy most", "By staleness", "demo_weight", "1 warning",
        "<script>alert('x')</script> 43", "<b>are the prompts too hard?</b>", "reward 1", "truncated", "learning_rate",
    ):  # fmt: skip
        assert expected in text, expected
    assert "<script" not in page.read_text()


def test_the_same_run_gives_the_same_page(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", steps=30)
    first = write_report([folder], tmp_path / "a" / "report.html").read_bytes()
    assert write_report([folder], tmp_path / "b" / "report.html").read_bytes() == first


@pytest.mark.parametrize(
    "rows",
    [
        [{"step": 0}],
        [{"step": 1, "reward": 0.5}],
        [{"step": 0, "accuracy": 0.5}, {"step": 1, "reward": math.nan, "entropy": math.inf, "kl": 0.0}],
        [{"step": 1, "seconds": 1.0, "ledger/source/fresh/gradient_share": 1.0, "ledger/term/pg/gradient_share": 0.0}],
        [{"step": 1, "ledger/sign/raised/gradient_share": 0.2}, {"step": 2, "tokens_sampled": 5.0, "accuracy": 1.0}],
    ],
)
def test_poor_runs_still_have_a_page(tmp_path: Path, rows: list[dict[str, float]]) -> None:
    folder = make_run(tmp_path / "run", steps=2)
    write_metrics(folder, rows)
    (folder / "samples.jsonl").unlink()
    assert "grpo on arithmetic" in check(write_report([folder], folder / "report.html"))


def test_samples_with_holes(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", steps=2)
    (folder / "samples.jsonl").write_text(
        '{"completion": "only this"}\n[1]\n{"step": 1, "reward": "text", "prompt": null}\n'
    )
    assert "only this" in check(write_report([folder], folder / "report.html"))


def test_an_unfinished_run_says_so(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", steps=9)
    write_metrics(folder, [{"step": 4, "reward": 0.5}])
    assert "not finished: 4 of 9 steps" in check(write_report([folder], folder / "report.html"))


def test_comparison(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / f"{m}-{s}", method=m, seed=s, steps=50, final=f) for m, f in (("grpo", 0.95), ("rloo", 0.7))
            for s in range(3)]  # fmt: skip
    text = check(write_report(runs, tmp_path / "report.html"))
    for expected in (
        "2 configurations on arithmetic",
        "t, 3 seeds",
        "difference to grpo",
        "rloo, seed 2",
        "best held-out accuracy: grpo",
    ):
        assert expected in text, expected


def test_comparison_with_a_run_that_measured_nothing(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "a", steps=25), make_run(tmp_path / "b", method="sft", steps=25)]
    write_metrics(runs[1], [{"step": 1, "loss": 0.5}])
    assert "2 configurations" in check(write_report(runs, tmp_path / "report.html"))


def test_bad_folders(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="found nothing"):
        write_report([tmp_path / "absent"], tmp_path / "report.html")
    with pytest.raises(ValueError, match="at least one run folder"):
        write_report([], tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()
