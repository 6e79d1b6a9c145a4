"""Shares, groups, intervals, smoothing: numbers worked out by hand."""

from __future__ import annotations

import io
import math
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from tests.report.synthetic import make_run, write_metrics
from unipo.report import comparison_table
from unipo.report.groups import group, standings
from unipo.report.kinds import TEXT
from unipo.report.ledger import in_words, quantities, shares_of
from unipo.report.panels import run_lines, seeds_line
from unipo.report.plots import MOST_POINTS, colors_of, smooth, thin
from unipo.report.runs import RunData, read_run
from unipo.report.text import amount, between, duration, percent

NAN = math.nan
ACCURACY, REWARD = TEXT.measure.curve, TEXT.reward


def run_of(config: dict[str, object] | None = None, **columns: list[float]) -> RunData:
    steps = len(next(iter(columns.values())))
    metrics = {"step": np.arange(1.0, steps + 1)} | {k.replace("__", "/"): np.array(v) for k, v in columns.items()}
    return RunData(folder=Path("x"), config=config or {}, metrics=metrics)


def test_a_name_that_is_absent_had_no_share_and_the_rest_is_named() -> None:
    run = run_of(
        ledger__source__demos__gradient_share=[NAN, NAN, 0.25, 0.2],
        ledger__source__fresh__gradient_share=[NAN, 1.0, 0.75, 0.6],
    )
    shares = shares_of(run, "source")
    assert shares is not None
    assert shares.names == ("demos", "fresh", "other")
    np.testing.assert_allclose(shares.steps, [2, 3, 4])
    np.testing.assert_allclose(shares.shares, [[0, 0.25, 0.2], [1, 0.75, 0.6], [0, 0, 0.2]], atol=1e-12)
    assert shares.mean("demos") == pytest.approx(0.15)
    assert shares.early_late("fresh") == pytest.approx((1.0, 0.6))


def test_a_step_that_moved_nothing_has_no_rest() -> None:
    run = run_of(ledger__sign__raised__gradient_share=[0.0, 0.4], ledger__sign__lowered__gradient_share=[0.0, 0.6])
    shares = shares_of(run, "sign")
    assert shares is not None
    assert shares.names == ("raised", "lowered")
    assert shares_of(run, "term") is None


def test_staleness_goes_from_new_to_old_and_slashes_are_part_of_names() -> None:
    run = run_of(
        **{f"ledger__staleness__{n}__gradient_share": [0.25] for n in ("9-32", "33+", "0", "1-2")},
        **{"ledger__term__a/b__gradient_share": [1.0]},
    )
    staleness, term = shares_of(run, "staleness"), shares_of(run, "term")
    assert staleness is not None
    assert term is not None
    assert staleness.names == ("0", "1-2", "9-32", "33+")
    assert term.names == ("a/b",)
    assert len(set(colors_of(staleness))) == 4


def test_the_table_of_sources() -> None:
    run = run_of(
        ledger__source__fresh__gradient_share=[0.5, 0.7], ledger__source__fresh__tokens=[30, 30],
        ledger__source__demos__gradient_share=[0.5, 0.3], ledger__source__demos__tokens=[10, 10],
        ledger__source__fresh__ess=[0.9, NAN],
    )  # fmt: skip
    fresh, demos = quantities(run, "source")
    assert (fresh["name"], fresh["gradient_share"], fresh["token_share"], fresh["ess"]) == ("fresh", 0.6, 0.75, 0.9)
    assert demos["token_share"] == 0.25
    assert math.isnan(float(demos["ess"]))


def test_in_words() -> None:
    run = run_of(
        ledger__source__fresh__gradient_share=[0.9] * 5 + [0.5] * 5, ledger__source__fresh__tokens=[30.0] * 10,
        ledger__source__demos__gradient_share=[0.1] * 5 + [0.5] * 5, ledger__source__demos__tokens=[10.0] * 10,
        ledger__sign__raised__gradient_share=[0.8] * 10, ledger__sign__lowered__gradient_share=[0.2] * 10,
        ess=[0.7] * 10, clipped_share=[0.05] * 10,
    )  # fmt: skip
    assert in_words(run) == [
        "Fresh rollouts moved the policy most: 70 % of the gradient from 75 % of the tokens, then demonstrations 30 %; "
        "the share of fresh rollouts went from 90 % early to 50 % late.",
        "80 % of the push pulled the policy towards what is in the batch, 20 % pushed it away.",
        "The importance weights kept 70 % of the effective sample size, and 5.0 % of the tokens were cut off by the clip: "
        "the data was off-policy, and still informative.",
    ]
    assert in_words(run_of(reward=[1.0])) == []
    assert "no other source" in in_words(run_of(ledger__source__fresh__gradient_share=[1.0]))[0]
    assert "practically on-policy" in in_words(run_of(ess=[0.99]))[0]
    assert "lower the staleness" in in_words(run_of(ess=[0.2]))[0]


def test_smoothing_and_thinning_keep_means() -> None:
    assert smooth(np.array([0.0, 3.0, 6.0, 0.0])).tolist() == [1.5, 3.0, 3.0, 3.0]
    np.testing.assert_allclose(smooth(np.full(100, 2.0)), 2.0)
    steps, values = np.arange(6000.0), np.arange(12000.0).reshape(2, 6000)
    few, means = thin(steps, values)
    assert len(few) == MOST_POINTS
    assert few[0] == 4.5
    np.testing.assert_allclose(means.mean(1), values.mean(1))


def test_seeds_become_a_mean_with_a_t_interval_at_shared_steps() -> None:
    runs = [run_of(accuracy=[0.1, NAN, 0.5]), run_of(accuracy=[0.3, 0.4, 0.7])]
    (line,) = seeds_line(runs, ACCURACY, "grpo", "#000000")
    half = 12.706205 * 0.1  # t_1 at 97.5 %, and s / sqrt(2) = 0.1
    assert line.steps.tolist() == [1, 3]
    np.testing.assert_allclose(line.values, [0.2, 0.6])
    assert line.low is not None
    assert line.high is not None
    np.testing.assert_allclose(line.low, [0, 0])
    np.testing.assert_allclose(line.high, [1, 1])
    (reward,) = seeds_line([run_of(reward=[0.1]), run_of(reward=[0.3])], REWARD, "grpo", "#000000")
    assert reward.low is not None
    np.testing.assert_allclose(reward.low, [0.2 - half], atol=1e-6)
    assert seeds_line([run_of(kl=[1.0])], REWARD, "grpo", "#000000") == []


def test_a_run_has_its_recorded_band() -> None:
    (line,) = run_lines(run_of(accuracy=[0.5, NAN], accuracy_low=[0.4, NAN], accuracy_high=[0.6, NAN]), ACCURACY)
    assert line.low is not None
    assert line.low.tolist() == [0.4]
    (bare,) = run_lines(run_of(accuracy=[0.5]), ACCURACY)
    assert bare.low is None


def measured(method: str, seed: int, accuracy: float, **config: object) -> RunData:
    columns = {"accuracy": [0.1, accuracy], "accuracy_low": [0.0, accuracy - 0.1], "accuracy_high": [0.2, accuracy + 0.1],
               "seconds": [0.0, 10.0 + seed], "tokens_sampled": [0.0, 100.0], "tokens_trained": [0.0, 50.0]}  # fmt: skip
    return run_of({"method": method, "seed": seed, "task": "arithmetic", **config}, **columns)


def test_standings() -> None:
    runs = [measured("grpo", 0, 0.5), measured("grpo", 1, 0.7), measured("rloo", 0, 0.6), measured("rloo", 1, 0.9)]
    best, second = standings(group(runs))
    assert (best.label, best.seeds, best.interval) == ("rloo", 2, "t, 2 seeds")
    assert best.value == pytest.approx(0.75)
    assert (best.low, best.high) == (0.0, 1.0)
    assert best.versus == pytest.approx((0.15, 0.15 - 12.706205 * 0.05, 0.15 + 12.706205 * 0.05), abs=1e-6)
    assert math.isnan(second.versus[0])
    assert (best.seconds, best.work, best.before) == pytest.approx((10.5, 150, 0.1))


def test_one_seed_keeps_the_interval_that_the_run_recorded() -> None:
    (only,) = standings(group([measured("grpo", 0, 0.5)]))
    assert (only.low, only.high, only.interval) == (0.4, 0.6, "held-out prompts, 1 seed")


def test_labels_name_what_differs() -> None:
    runs = [measured("grpo", 0, 0.5, learning_rate=1e-3), measured("grpo", 0, 0.6, learning_rate=1e-2, out="elsewhere")]
    assert [g.label for g in group(runs)] == ["grpo, learning rate 0.001", "grpo, learning rate 0.01"]
    options = {"method_options": {"grpo": {"clip_high": 0.3}}}
    assert [g.label for g in group([measured("grpo", 0, 0.5), measured("grpo", 0, 0.5, **options)])] == [
        "grpo", "grpo, grpo.clip high 0.3",
    ]  # fmt: skip


def test_terminal_table(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / f"{m}{s}", method=m, seed=s, steps=25, final=f) for m, f in (("grpo", 0.8), ("sft", 0.4))
            for s in range(2)]  # fmt: skip
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(comparison_table(runs))
    text = console.export_text()
    assert "held-out accuracy: mean over seeds, 95 % intervals (t, 2 seeds)" in text
    lines = [line for line in text.splitlines() if "%" in line and ("grpo" in line or "sft" in line)][-2:]
    assert [("grpo" in line, "sft" in line) for line in lines] == [(True, False), (False, True)]
    assert percent(np.mean([read_run(r).last("accuracy") for r in runs[:2]])) in lines[0]


def test_terminal_table_of_a_run_without_accuracy(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", steps=2)
    write_metrics(folder, [{"step": 1, "reward": 0.2}])
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(comparison_table([folder]))
    assert "–" in console.export_text()


def test_numbers_as_text() -> None:
    assert [amount(x) for x in (NAN, 0.123, 9.5, 12, 9999, 12345, 1e6, 2.5e9)] == [
        "–", "0.12", "9.5", "12", "9,999", "12.3k", "1.00M", "2.50G",
    ]  # fmt: skip
    assert [duration(x) for x in (NAN, 5, 75, 3700)] == ["–", "5 s", "1 min 15 s", "1 h 1 min"]
    assert (percent(0.1234), percent(NAN), between(0.1, 0.25), between(NAN, 1)) == ("12.3 %", "–", "10.0 – 25.0 %", "–")
