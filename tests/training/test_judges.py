"""Models that judge, from the command line: trained, measured, used as reward and as judge, resumed; lists and bad input."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from tests.training.test_resume import same_weights
from unipo import api
from unipo.cli import main
from unipo.episodes import Episodes
from unipo.policies import load_policy
from unipo.sources.stages.arrange import EveryPair
from unipo.training.best_of import BestOf
from unipo.training.checkpoint import existing
from unipo.training.config import ConfigError
from unipo.training.judging import Judgement, by_margin
from unipo.training.stored_rows import rated_rollouts

SMALL = ("--pairs", "task", "--dataset-rows", "120", "--pairs-per-step", "8", "--steps", "6", "--eval-every", "3")


@pytest.fixture(scope="module")
def judges(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A reward model and a preference model, hardly trained."""
    folder = tmp_path_factory.mktemp("judges")
    for slug in ("reward-model", "preference-model"):
        assert main(["run", slug, "arithmetic:1", *SMALL, "--out", str(folder / slug)]) == 0
    return {slug: folder / slug for slug in ("reward-model", "preference-model")}


def test_a_run_measures_pairs_that_it_did_not_train_on(
    judges: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    for slug, kind in (("reward-model", "answers"), ("preference-model", "pairs")):
        table = pq.read_table(judges[slug] / "metrics.parquet")
        measured = {"accuracy", "accuracy_low", "accuracy_high", "accuracy_closest", "accuracy_clearest", "predicted"}
        assert measured <= set(table.column_names)
        assert table.column("accuracy").to_pylist()[0] == 0.5, "a head of zeros knows nothing"
        assert load_policy(str(judges[slug] / "final")).judges == kind
        page = (judges[slug] / "report.html").read_text()
        assert "Accuracy on the closest pairs" in page
        assert main(["evaluate", str(judges[slug])]) == 0
        assert "quarters of the pairs, closest" in capsys.readouterr().out.replace("\n", " ")
        assert main(["evaluate", str(judges[slug]), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["accuracy"] == table.column("accuracy").to_pylist()[-1]


def test_a_reward_model_rewards_a_run_and_picks_the_best_of_n(
    judges: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The task's own reward judges what the model rewards."""
    reward, out = f"model({judges['reward-model']})", tmp_path / "grpo"
    assert main(["run", "grpo", "arithmetic:1", "--reward", reward, "--prompts", "2", "--rollouts", "4", "--steps", "1",
                 "--eval-prompts", "4", "--out", str(out)]) == 0  # fmt: skip
    rows = pq.read_table(out / "metrics.parquet").to_pylist()
    assert rows[-1]["reward"] != round(rows[-1]["reward"]), "a score, no verdict"
    assert rows[-1]["eval_reward"] == rows[-1]["accuracy"], "verdicts"
    capsys.readouterr()
    assert main(["evaluate", str(out), "--best-of", "4", "--prompts", "4", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["n"] for row in found["best_of"]] == [1, 2, 4]
    assert found["best_of"][0]["kl"] == 0.0
    proxy = [row["proxy"] for row in found["best_of"]]
    assert proxy == sorted(proxy), "who picks likes the best of more better"
    assert main(["evaluate", str(out), "--best-of", "4", "--prompts", "4", "--reward", "length"]) == 0
    assert "KL at most" in capsys.readouterr().out.replace("\n", " ")


def test_a_preference_model_judges_a_game(judges: dict[str, Path], tmp_path: Path) -> None:
    judge = f"model({judges['preference-model'] / 'final'})"
    assert main(["run", "spo", "arithmetic:1", "--spo.judge", judge, "--prompts", "2", "--rollouts", "3", "--steps", "1",
                 "--eval-prompts", "2", "--out", str(tmp_path / "spo")]) == 0  # fmt: skip
    made = Episodes.load(next((tmp_path / "spo" / "episodes").glob("*.parquet")))
    rates = made.reduce("win_rate", to="group", how="mean", level="episode")
    assert torch.allclose(rates, torch.full_like(rates, 0.5))
    assert bool((made["win_rate"] != made["win_rate"].round(decimals=1)).any())


def test_what_cannot_judge_is_told_before_training(
    judges: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, model = ["--out", str(tmp_path / "x")], judges["preference-model"]
    for words, said in (
        (["run", "grpo", "arithmetic", "--reward", f"model({model})", *out], "preference model"),
        (["run", "grpo", "arithmetic", "--reward", "model(/nowhere)", *out], "no such folder"),
        (["run", "spo", "arithmetic", "--spo.judge", "model(/nowhere)", *out], "no such folder"),
        (["run", "reward-model", "arithmetic", *out], "--pairs"),
    ):
        assert main(words) == 1
        assert said in capsys.readouterr().err.replace("\n", " ")
    assert not (tmp_path / "x" / "config.yaml").exists()


def test_a_resumed_judge_is_the_same(judges: dict[str, Path], tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    whole = tmp_path / "whole"
    words = ["run", "reward-model", "arithmetic:1", *SMALL, "--checkpoint-every", "2", "--out", str(whole)]
    assert main(words) == 0
    shutil.copytree(whole, broken)
    shutil.rmtree(broken / "final")
    shutil.rmtree(existing(broken / "checkpoints")[-1])
    assert main(["resume", str(broken)]) == 0
    assert same_weights(whole, broken)
    heads = [load_policy(str(f / "final")).state_dict()["value_head.linear.weight"] for f in (whole, broken)]
    assert torch.equal(*heads)


def test_lists_with_ratings_and_margins(tmp_path: Path) -> None:
    """A file of rated lists: all pairs are trained on, further apart where ratings are; a tenth of the prompts is kept apart."""
    data = tmp_path / "lists.jsonl"
    rows = [
        {"prompt": f"{i} + 1 =", "completions": [f"{i + 1}", f"{i + 2}", "?"], "ratings": [5, 3, 0]} for i in range(60)
    ]
    data.write_text("\n".join(json.dumps(row) for row in rows))
    made = api.train("reward-model", str(data), pairs=str(data), steps=3, pairs_per_step=4, reward="exact_match",
                     options={"reward-model": {"margin": 0.3, "center": 0.01}}, out=str(tmp_path / "run"))  # fmt: skip
    metrics: list[dict[str, Any]] = made.records.metrics
    assert metrics[-1]["apart_closest"] == pytest.approx(2.0)
    assert metrics[-1]["apart_clearest"] == pytest.approx(5.0, abs=0.35)
    assert {"ledger/term/Pairwise/loss", "ledger/term/MeanScore/loss"} <= set(metrics[-1])
    trained, kept = made.data.mixer.sources["pairs"].episodes, made.data.held_out.rows  # type: ignore[attr-defined]
    assert trained.count("group") + kept.count("group") == 60 * 3
    assert not set(trained["prompt_id"].tolist()) & set(kept["prompt_id"].tolist())
    assert len(EveryPair()(trained, None)) == len(trained), "pairs stay pairs"


def test_a_runs_rollouts_are_rated_lists(tmp_path: Path) -> None:
    """Finished answers with their rewards; a prompt whose answers were all worth the same says nothing."""
    rows = Episodes.build([[5, 2], [6, 2], [7, 2], [5, 2], [6, 2], [7]], [[1, 4]] * 6, [0, 0, 0, 1, 1, 1], kind=["rollout"] * 6,
                          prompt_id=[1] * 3 + [2] * 3, truncated=[False] * 5 + [True], policy_version=[3] * 6)  # fmt: skip
    worth = torch.tensor([0.2, 1.0, 0.5, 0.3, 0.3, 0.9])
    rows = rows.with_columns("episode", reward=worth).with_columns("step", behavior_logp=torch.zeros(11))
    rows.save(tmp_path / "run" / "episodes" / "step_000001.parquet")
    lists = rated_rollouts(str(tmp_path / "run"))
    assert lists is not None
    assert lists["rating"].tolist() == pytest.approx([0.2, 1.0, 0.5])
    assert lists["chosen"].tolist() == [False, True, False]
    assert not {"reward", "behavior_logp"} & set(lists.columns), "they are given now, not its own"
    rows.select(torch.tensor([3, 4, 5])).save(tmp_path / "run" / "episodes" / "step_000001.parquet")
    with pytest.raises(ConfigError, match="different rewards"):
        rated_rollouts(str(tmp_path / "run"))
    assert rated_rollouts("task") is None


def test_quarters_by_hand() -> None:
    margin = torch.tensor([0.1, -0.2, 0.3, -0.4, 1.0, 2.0, 3.0, 0.0], dtype=torch.float64)
    found = Judgement(margin, torch.full((8,), torch.nan), []).metrics()
    assert found["accuracy"] == pytest.approx(5.5 / 8)
    assert found["accuracy_closest"] == pytest.approx(0.75), "0.0 and 0.1: half right and right"
    assert found["accuracy_closer"] == pytest.approx(0.5)
    assert found["accuracy_clearest"] == 1.0
    rated = Judgement(margin, torch.arange(8.0).flip(0), []).metrics()
    assert rated["accuracy_clearest"] == pytest.approx(0.5)
    assert rated["apart_clearest"] == pytest.approx(6.5)
    assert "closest 75%" in by_margin(found)
    assert by_margin({"accuracy": 0.5}) == ""


def test_best_of_by_hand() -> None:
    found = BestOf(
        torch.tensor([[1.0, 0.0, 0.0]]).double().repeat(2, 1), torch.tensor([[0.1, 0.9, 0.5], [0.9, 0.1, 0.5]]).double()
    )
    rows = {row["n"]: row for row in found.rows()}
    assert set(rows) == {1.0, 2.0, 3.0}
    assert rows[1.0]["gold"] == pytest.approx(1 / 3)
    assert rows[2.0]["gold"] == pytest.approx((0 + 2 / 3) / 2)
    assert rows[3.0]["gold"] == pytest.approx(0.5)
    assert rows[2.0]["oracle"] == pytest.approx(2 / 3)
