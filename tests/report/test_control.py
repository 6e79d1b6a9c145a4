"""Runs in environments: aggregates worked out by hand, the axis of environment steps, and the page."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from tests.report.synthetic import control_returns, make_control_run, make_run, write_metrics
from tests.report.test_page import check
from unipo.report import RunFolderError, comparison_table, read_run, write_report
from unipo.report.aggregate import improvement, iqm, iqm_across, iqm_of_episodes
from unipo.report.groups import group, standings
from unipo.report.html import LARGEST_VIDEO
from unipo.report.kinds import CONTROL, RECORDED, TEXT, kind_of
from unipo.report.panels import run_lines, seeds_line
from unipo.report.runs import RunData
from unipo.report.text import number, number_span

NAN = math.nan
CONFIG = {"method": "ppo", "task": "CartPole-v1", "total_timesteps": 1000, "num_envs": 4, "rollout": 64}


# ---- aggregates ------------------------------------------------------------------------------------------------------
def test_interquartile_mean() -> None:
    assert iqm(np.array([3.0, 0.0, 1.0, 2.0])) == 1.5
    assert iqm(np.array([0.0, 1.0, 2.0, 3.0, 1e9])) == 2.0
    assert iqm(np.array([0.0, 1.0, 5.0])) == 2.0  # too few to leave any out
    assert iqm(np.array([[0.0, 4.0], [2.0, 4.0]]), axis=0).tolist() == [1.0, 4.0]


def test_bootstrap_of_seeds_and_episodes() -> None:
    # two seeds: both draws are the first with probability 1/4, more than a tail of 2.5 %
    assert iqm_of_episodes([np.array([10.0]), np.array([20.0])]) == (15.0, 10.0, 20.0)
    assert iqm_of_episodes([np.full(3, 1.0), np.full(3, 2.0)]) == (1.5, 1.0, 2.0)
    # one seed: its episodes alone, and both draws are the lower with probability 1/4
    assert iqm_of_episodes([np.array([0.0, 1.0])]) == (0.5, 0.0, 1.0)
    assert iqm_of_episodes([np.array([1.0, 3.0]), np.array([5.0])])[0] == 3.5  # unequal: means 2 and 5
    value, low, high = iqm_of_episodes([np.array([7.0])])
    assert (value, math.isnan(low), math.isnan(high)) == (7.0, True, True)


def test_bootstrap_covers_the_spread_of_seeds_and_not_only_of_episodes() -> None:
    rng = np.random.default_rng(0)
    scores = [rng.normal(center, 1.0, 50) for center in (0.0, 100.0, 200.0, 300.0)]
    _, low, high = iqm_of_episodes(scores)
    assert low < 60
    assert high > 240
    assert np.subtract(*iqm_of_episodes(scores[:1])[:0:-1]) < 1.5


def test_band_of_curves_and_probability_of_improvement() -> None:
    value, low, high = iqm_across(np.array([[1.0, 3.0], [5.0, 5.0]]))
    assert (value.tolist(), low.tolist(), high.tolist()) == ([2, 5], [1, 5], [3, 5])
    ours, theirs = {"0": 1.0, "1": 2.0}, {"0": 0.0, "1": 1.0}
    assert improvement(ours, theirs)[0] == 0.875  # wins 1, 1/2, 1, 1
    assert math.isnan(improvement(ours, theirs)[1])  # two runs each are too few for an interval
    assert improvement(theirs, ours)[0] == 0.125
    assert all(math.isnan(x) for x in improvement({"0": 1.0}, theirs))
    few, many = {str(i): float(i == 4) for i in range(5)}, dict.fromkeys("01234", 0.5)
    # one run in five wins: a resample wins with Binomial(5, 0.2) / 5, whose 97.5 % quantile is 3/5
    assert improvement(few, many) == (0.2, 0.0, 0.6)


# ---- reading ---------------------------------------------------------------------------------------------------------
def run_of(samples: tuple[dict[str, object], ...] = (), **columns: list[float]) -> RunData:
    metrics = {k: np.array(v, dtype=float) for k, v in columns.items()}
    return RunData(folder=Path("x"), config=CONFIG, metrics=metrics, samples=samples)


def test_kinds() -> None:
    assert kind_of({"steps": 3}) is TEXT
    assert kind_of(CONFIG) is CONTROL
    assert kind_of({**CONFIG, "dataset": "D4RL/pen"}) is RECORDED
    assert CONTROL.planned(CONFIG) == 4  # 1000 / 256, rounded up
    assert CONTROL.planned({"total_timesteps": 1024, "num_envs": 4, "rollout": 64}) == 4
    assert CONTROL.planned({"total_timesteps": 1025, "num_envs": 4, "rollout": 64}) == 5
    assert CONTROL.planned({"total_timesteps": 1025}) is None


def test_curves_run_over_environment_steps() -> None:
    run = run_of(step=[0, 1, 2, 3], env_steps=[NAN, 256, NAN, 768], seconds=[0, 1, 2, 4], eval_return=[9, NAN, NAN, 20])
    assert run.axis.tolist() == [0, 256, 512, 768]
    assert run.measured("eval_return")[0].tolist() == [0, 768]
    assert run.speed[0].tolist() == [256, 768]
    assert run.speed[1].tolist() == [256, 512 / 3]  # the second step does not say: the third counts from the first
    assert run.worked == 768
    assert run_of(step=[0, 1], eval_return=[1, 2]).axis.tolist() == [0, 1]  # nothing acted


def test_a_run_is_finished_when_its_last_rollout_is_there() -> None:
    assert run_of(step=[0, 4]).finished
    assert not run_of(step=[0, 3]).finished


def test_scores_are_the_episodes_where_all_were_kept() -> None:
    rows = tuple({"step": 2, "source": "held_out", "reward": r} for r in (1.0, 3.0))
    other = ({"step": 1, "source": "held_out", "reward": 9.0}, {"step": 2, "source": "fresh", "reward": 9.0})
    columns = {"step": [0, 1, 2], "env_steps": [NAN, 10, 20]}
    assert run_of((*rows, *other), **columns, eval_return=[0, 1, 2]).scores(20).tolist() == [1, 3]
    assert run_of(rows, **columns, eval_return=[0, 1, 5]).scores(20).tolist() == [
        5
    ]  # some were lost: their mean is not 5
    assert run_of((), **columns, eval_return=[0, 1, 2]).scores(10).tolist() == [1]


# ---- curves, standings -----------------------------------------------------------------------------------------------
def test_seeds_are_read_between_their_points() -> None:
    one = run_of(step=[0, 1, 2], env_steps=[NAN, 10, 20], reward=[0, NAN, 4])
    two = run_of(step=[0, 1, 2], env_steps=[NAN, 10, 20], reward=[NAN, 4, 8])
    (line,) = seeds_line([one, two], CONTROL.reward, "ppo", "#000000")
    assert line.steps.tolist() == [10, 20]
    assert line.values.tolist() == [3, 6]
    assert line.low is not None
    assert line.low.tolist() == [2, 4]
    (alone,) = seeds_line([one], CONTROL.reward, "ppo", "#000000")
    assert (alone.label, alone.steps.tolist()) == ("ppo", [0, 20])


def test_one_run_keeps_its_recorded_band() -> None:
    run = run_of(step=[0, 1], env_steps=[NAN, 256], eval_return=[1, 2], eval_return_low=[0, 1], eval_return_high=[2, 3])
    (line,) = run_lines(run, CONTROL.measure.curve)
    assert line.marked
    assert line.steps.tolist() == [0, 256]
    assert line.high is not None
    assert line.high.tolist() == [2, 3]


@pytest.mark.parametrize(("kept", "over"), [(10, "2 seeds x 10 episodes"), (0, "2 seeds")])
def test_standings(tmp_path: Path, kept: int, over: str) -> None:
    folders = [make_control_run(tmp_path / f"{m}{s}", m, s, f, episodes=kept) for m, f in (("a2c", 300.0), ("ppo", 450.0))
               for s in range(2)]  # fmt: skip
    best, second = standings(group([read_run(f) for f in folders]))
    assert (best.label, second.label, best.seeds, best.interval) == ("ppo", "a2c", 2, over)
    assert best.value == pytest.approx(446)  # 450 - 8 and 450: symmetric, so the IQM is the mean
    assert best.before == pytest.approx(16)
    assert best.low < 446 < best.high
    assert best.versus[0] == 1.0
    assert math.isnan(second.versus[0])
    assert best.work == 40 * 256


def test_one_seed_has_the_interval_over_its_episodes(tmp_path: Path) -> None:
    kept = read_run(make_control_run(tmp_path / "a", seed=1))
    (row,) = standings(group([kept]))
    assert (row.interval, row.value) == ("1 seed x 10 episodes", pytest.approx(450))
    assert 441 <= row.low < 450 < row.high <= 459
    (row,) = standings(group([read_run(make_control_run(tmp_path / "b", seed=1, episodes=0))]))
    assert row.interval == "evaluation episodes, 1 seed"
    assert (row.low, row.high) == (kept.last("eval_return_low"), kept.last("eval_return_high"))


def test_labels_do_not_list_what_methods_start_from(tmp_path: Path) -> None:
    runs = [make_control_run(tmp_path / "a", "ppo"), make_control_run(tmp_path / "b", "sac", batch_size=256),
            make_control_run(tmp_path / "c", "sac", batch_size=64)]  # fmt: skip
    assert [g.label for g in group([read_run(f) for f in runs])] == ["ppo", "sac, batch size 256", "sac, batch size 64"]


def test_kinds_are_not_compared(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "a", steps=2), make_control_run(tmp_path / "b")]
    with pytest.raises(RunFolderError, match="held-out accuracy and some by return"):
        write_report(runs, tmp_path / "report.html")


def test_terminal_table(tmp_path: Path) -> None:
    runs = [
        make_control_run(tmp_path / f"{m}{s}", m, s, f) for m, f in (("ppo", 450.0), ("a2c", 300.0)) for s in range(2)
    ]
    console = Console(width=180, record=True, file=io.StringIO())
    console.print(comparison_table(runs))
    text = console.export_text()
    assert "return: interquartile mean, 95 % intervals (2 seeds x 10 episodes)" in text
    assert "better than ppo, P" in text
    (row,) = [line for line in text.splitlines() if "a2c" in line]
    assert "296" in row
    assert "0.00" in row
    assert "10.2k" in row


# ---- the page --------------------------------------------------------------------------------------------------------
def test_page_of_a_run(tmp_path: Path) -> None:
    folder = make_control_run(tmp_path / "run")
    text = check(write_report([folder], folder / "report.html"))
    for expected in (
        "ppo on CartPole-v1", "--total-timesteps 10140", "442", "Training return", "Environment steps", "10.2k", "steps/s",
        "102k trained on", "The same evaluation episodes, before and after", "Fragments of episodes", "reward 64",
        "policy gradient", "value (critic)", "after 10.2k environment steps", "nats per action", "environment steps",
    ):  # fmt: skip
        assert expected in text, expected
    for foreign in ("token", "prompt", "completion", "accuracy", "not finished"):
        assert foreign not in text.split("Every setting")[0].lower(), foreign


def test_page_of_several(tmp_path: Path) -> None:
    runs = [
        make_control_run(tmp_path / f"{m}{s}", m, s, f) for m, f in (("ppo", 450.0), ("a2c", 300.0)) for s in range(3)
    ]
    text = check(write_report(runs, tmp_path / "report.html"))
    for expected in ("2 configurations on CartPole-v1", "Final return interquartile mean", "3 seeds x 10 episodes",
                     "better than ppo, P", "best return: ppo, 450", "two stages"):  # fmt: skip
        assert expected in text, expected


def test_unfinished_and_poor_runs(tmp_path: Path) -> None:
    folder = make_control_run(tmp_path / "run")
    write_metrics(folder, [{"step": 0, "eval_return": 5.0}, {"step": 3, "env_steps": 768.0}])
    assert "not finished: 3 of 40 rollouts" in check(write_report([folder], folder / "report.html"))
    write_metrics(folder, [{"step": 0}])
    check(write_report([folder], folder / "report.html"))


def test_recorded_data_has_no_environment_steps(tmp_path: Path) -> None:
    folder = make_control_run(tmp_path / "run", "td3-bc", dataset="D4RL/pen/human-v2")
    write_metrics(
        folder, [{"step": t, "eval_return": 5.0 + t, "seconds": float(t), "tokens_trained": 64.0 * t} for t in range(5)]
    )
    text = check(write_report([folder], folder / "report.html"))
    assert "256" in text
    assert "Transitions" in text
    assert "environment steps" not in text.lower()


@pytest.mark.parametrize(("name", "media", "tag"), [("video.gif", "image/gif", "<img"),
                                                    ("video/video-episode-0.mp4", "video/mp4", "<video")])  # fmt: skip
def test_video(tmp_path: Path, name: str, media: str, tag: str) -> None:
    folder = make_control_run(tmp_path / "run")
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(b"GIF89a")
    page = write_report([folder], folder / "report.html")
    check(page)
    assert f"data:{media};base64,R0lGODlh" in page.read_text()
    assert tag in page.read_text()
    (folder / name).write_bytes(bytes(LARGEST_VIDEO))
    page = write_report([folder], folder / "report.html")
    assert "2.0 MiB): too large for this page" in check(page)
    assert tag not in page.read_text()


def test_replayed_transitions_are_not_shown_as_episodes(tmp_path: Path) -> None:
    folder = make_control_run(tmp_path / "run")
    (folder / "samples.jsonl").write_text(
        json.dumps({"step": 1, "prompt": "drawn again", "source": "replay", "reward": 1.0})
    )
    assert "drawn again" not in check(write_report([folder], folder / "report.html"))


def test_returns_as_text() -> None:
    assert [number(x) for x in (NAN, 0.7834, 9.1, 500.0, 123.44, -1204.61, 123456.7)] == [
        "–", "0.783", "9.1", "500", "123.4", "-1,204.6", "123,457",
    ]  # fmt: skip
    assert (number_span(-10.0, 2.0), number_span(NAN, 1.0)) == ("-10 to 2", "–")


def test_synthetic_returns_are_what_the_tests_say() -> None:
    assert np.mean(control_returns(1.0, 450.0, 0)) == pytest.approx(442)
