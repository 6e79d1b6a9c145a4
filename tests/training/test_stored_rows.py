"""Runs on comparisons and labels of a user: every form trains, filters and noise are told, references run where they must."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import unipo
from tests.policies.models import trained_tokenizer
from unipo.api import configure, start
from unipo.cli import main
from unipo.episodes import Episodes
from unipo.learner.annotate import emitted
from unipo.methods.preferences import dpo, simpo
from unipo.objectives import LogRatioScore, Needs, Signals
from unipo.policies import load_policy
from unipo.policies.loading import ModelError
from unipo.sources.data.comparisons import comparison_episodes, labelled_episodes
from unipo.sources.data.datasets import load_rows
from unipo.sources.data.problems import DataError
from unipo.tasks import TINY_MODEL
from unipo.training import ConfigError, references
from unipo.training.ranking import ranking_report

SMALL: dict[str, Any] = {
    "steps": 2,
    "prompts": 2,
    "eval_prompts": 2,
    "eval_every": 0,
    "tensorboard": False,
    "pairs_per_step": 3,
}
SUMS = [(i, i + 3, 2 * i + 3) for i in range(1, 9)]


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return str(path)


def asked() -> Iterator[tuple[str, str, str]]:
    """(prompt, right answer, wrong answer)."""
    yield from ((f"{a}+{b}=", str(c), str(c + 1)) for a, b, c in SUMS)


def pairs(**columns: Any) -> list[dict[str, Any]]:
    return [{"prompt": p, "chosen": w, "rejected": x, **columns} for p, w, x in asked()]


def made(folder: Path, method: str = "dpo", **settings: Any) -> Any:
    return start(*configure(method, "arithmetic", {}, out=str(folder), **{**SMALL, **settings}))


def batch(run: Any) -> Episodes:
    drawn: Episodes = run.draw()
    return drawn


# ---- forms -----------------------------------------------------------------------------------------------------------
def test_pairs_lists_and_rated_rows_train_alike(tmp_path: Path) -> None:
    lists = [{"prompt": p, "completions": [x, w], "ratings": [1, 4]} for p, w, x in asked()]
    rated = [{"prompt": p, "completion": c, "rating": 4 - 3 * k, "group": i} for i, (p, w, x) in enumerate(asked())
             for k, c in enumerate((w, x))]  # fmt: skip
    files = {"pairs": pairs(chosen_rating=4, rejected_rating=1), "lists": lists, "rated": rated}
    weights = []
    for name, rows in files.items():
        run = unipo.train(
            "dpo", "arithmetic", out=str(tmp_path / name), pairs=write(tmp_path / f"{name}.jsonl", rows), **SMALL
        )
        weights.append(torch.cat([p.detach().flatten() for p in run.policy.parameters()]))
    assert torch.equal(weights[0], weights[1])
    assert torch.equal(weights[0], weights[2])


def test_what_was_done_to_comparisons_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{**row, "chosen_rating": 3 + i % 3, "rejected_rating": 2} for i, row in enumerate(pairs())]
    words = ["run", "dpo", "arithmetic", "--pairs", write(tmp_path / "a.jsonl", rows), "--out", str(tmp_path / "run"),
             "--steps", "1", "--eval-prompts", "2", "--no-tensorboard"]  # fmt: skip
    assert main([*words, "--keep-pairs", "margin(2),quality(4),diverse(0.5,k=1)", "--flip-labels", "0.5"]) == 0
    said = capsys.readouterr().out
    for part in ("of 8 comparisons were turned round (--flip-labels 0.5)", "margin(least=2) left 5 of 8 comparisons",
                 "diverse(k=1) left 3 of 5 comparisons"):  # fmt: skip
        assert part in said
    assert "quality(least=4) left 5 of 5" in said


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"keep_pairs": "margins(1)"}, "--keep-pairs: unknown filter 'margins': did you mean 'margin'"),
        ({"keep_pairs": "margin(1)"}, "margin(least=1): 8 of 8 comparisons have no ratings to look at -> rate both sides"),
        ({"pairs": "", "keep_pairs": "margin(1)", "method": "sft", "demos": "task"}, "there are no comparisons: give --pairs"),
        ({"flip_labels": 1.5}, "--flip-labels is 1.5: expected a share from 0 to 1"),
        ({"rating_range": (5.0, 1.0)}, "--rating-range is (5.0, 1.0): expected two numbers, the least first"),
        ({"reference": "tiny", "method": "simpo"}, "'simpo' asks for no reference: leave it out"),
    ],
)  # fmt: skip
def test_settings_that_cannot_be(tmp_path: Path, settings: dict[str, Any], told: str) -> None:
    given = {"pairs": write(tmp_path / "a.jsonl", pairs()), **settings}
    with pytest.raises((ConfigError, DataError)) as caught:
        made(tmp_path / "run", **given)
    assert told in str(caught.value)


def test_answers_over_the_context_and_cut_ones_are_told_by_row(tmp_path: Path) -> None:
    rows = pairs()
    rows[2]["chosen"] = "1" * 600
    rows[4]["truncated"] = True
    path = write(tmp_path / "a.jsonl", rows)
    with pytest.raises(DataError) as caught:
        made(tmp_path / "run", pairs=path)
    assert [p.row for p in caught.value.problems] == [3, 5]
    assert "more than the model's context of 512" in str(caught.value)
    with pytest.raises(DataError) as caught:
        made(tmp_path / "run", pairs=path, keep_pairs="length(20)")
    assert [p.row for p in caught.value.problems] == [5]


def test_ratings_outside_their_range_are_told_by_row(tmp_path: Path) -> None:
    rows = pairs(chosen_rating=4, rejected_rating=1)
    rows[1]["rejected_rating"] = -1
    with pytest.raises(DataError, match="line 2: a rating of -1, outside 1 to 5"):
        made(tmp_path / "run", pairs=write(tmp_path / "a.jsonl", rows), rating_range=(1.0, 5.0))


# ---- references ------------------------------------------------------------------------------------------------------
def logged(folder: Path) -> str:
    """The pairs with the sums that the start policy gives them."""
    policy = load_policy(str(TINY_MODEL))
    rows = comparison_episodes(policy.tokenizer, list(load_rows(write(folder / "plain.jsonl", pairs())).comparisons()))
    sums = rows.reduce(emitted(rows, ["logp"], policy, 4096)["logp"]).tolist()
    found = [
        {**row, "ref_chosen_logps": sums[2 * i], "ref_rejected_logps": sums[2 * i + 1]} for i, row in enumerate(pairs())
    ]
    return write(folder / "logged.jsonl", found)


def test_logged_log_probs_stand_in_for_the_reference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only one model is loaded, and the run is the same but for rounding."""
    path, loaded = logged(tmp_path), list[str]()
    with_model = unipo.train("dpo", "arithmetic", out=str(tmp_path / "a"), pairs=str(tmp_path / "plain.jsonl"), **SMALL)
    monkeypatch.setattr(references, "load_policy", lambda name, *more: loaded.append(name) or load_policy(name, *more))
    without = unipo.train("dpo", "arithmetic", out=str(tmp_path / "b"), pairs=path, **SMALL)
    assert not loaded
    assert set(without.annotators) == {"old"}
    for a, b in zip(with_model.policy.parameters(), without.policy.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
    other = tmp_path / "c"
    moved = [json.loads(line) | {"ref_chosen_logps": -90.0} for line in Path(path).read_text().splitlines()]
    assert float(batch(made(other, pairs=write(tmp_path / "m.jsonl", moved)))["reference_logp"].sum()) < -3 * 90 + 1


def test_labels_bring_theirs_too(tmp_path: Path) -> None:
    rows = [{"prompt": p, "completion": w, "label": True, "ref_logps": -2.5} for p, w, _ in asked()]
    made_of = labelled_episodes(
        load_policy(str(TINY_MODEL)).tokenizer, list(load_rows(write(tmp_path / "a.jsonl", rows)).labels())
    )
    assert made_of.reduce("reference_logp").tolist() == pytest.approx([-2.5] * 8)


@dataclass(frozen=True)
class Uneven(LogRatioScore):
    """A score that weighs tokens by their place."""

    def __call__(self, episodes: Episodes, signals: Signals) -> Tensor:
        place = 1.0 + episodes.position().double()
        return episodes.reduce(place * (signals["logp"] - episodes["reference_logp"]))


def test_a_method_that_asks_for_tokens_is_told_of_sums(tmp_path: Path) -> None:
    path, recipe = logged(tmp_path), dpo().but(score=Uneven())
    config, _ = configure("dpo", "arithmetic", {}, out=str(tmp_path / "run"), pairs=path, **SMALL)
    with pytest.raises(ConfigError, match="needs the reference's log-prob of every token, and the pairs say the sum"):
        start(config, recipe)
    one = comparison_episodes(load_policy(str(TINY_MODEL)).tokenizer, list(load_rows(path).comparisons()))
    assert references.reads_sums(dpo().objective, one)
    assert references.reads_sums(simpo().objective, one)
    assert not references.reads_sums(recipe.objective, one)
    assert references.spread_evenly(one)
    assert not references.spread_evenly(
        one.with_columns("step", reference_logp=-torch.arange(float(one.count("step"))))
    )


def test_a_reference_is_run_once_for_rows_that_come_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, calls = write(tmp_path / "a.jsonl", pairs()), list[Needs]()
    real = references.annotate
    monkeypatch.setattr(
        references, "annotate", lambda rows, needs, *more: calls.append(needs) or real(rows, needs, *more)
    )
    once = made(tmp_path / "once", pairs=path, steps=2)
    assert not calls, "six of eight pairs: none comes back"
    assert set(once.annotators) == {"old", "reference"}
    again = made(tmp_path / "again", pairs=path, steps=6)
    assert calls == [Needs.of(columns="reference_logp")]
    assert set(again.annotators) == {"old"}
    torch.testing.assert_close(batch(again)["reference_logp"], batch(once)["reference_logp"])
    mixed = made(tmp_path / "mixed", "grpo+0.1*dpo", pairs=path, steps=6, rollouts=2)
    assert set(mixed.annotators) == {"old", "reference"}, "rollouts are new every step"
    made(tmp_path / "none", "simpo", pairs=path, steps=6)
    assert len(calls) == 2


def test_stored_log_probs_resume_bit_for_bit(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", pairs())
    settings = {**SMALL, "pairs": path, "steps": 6, "checkpoint_every": 3}
    whole = unipo.train("dpo", "arithmetic", out=str(tmp_path / "whole"), **settings)
    shutil.copytree(tmp_path / "whole", tmp_path / "broken")
    for left in ("final", "checkpoints/step-000006"):
        shutil.rmtree(tmp_path / "broken" / left)
    stored = tmp_path / "broken" / "references" / "pairs.parquet"
    resumed = unipo.api.resume(tmp_path / "broken")
    for a, b in zip(whole.policy.parameters(), resumed.policy.parameters(), strict=True):
        assert torch.equal(a, b)
    kept = Episodes.load(stored)
    assert (len(kept), set(kept.columns)) == (16, {"token", "prompt", "reference_logp"})
    kept.with_columns("step", token=kept["token"] + 1).save(stored)
    assert bool((batch(made(tmp_path / "other", pairs=path, steps=6))["reference_logp"] < 0).all())


def test_a_reference_with_another_tokenizer_is_told(tmp_path: Path) -> None:
    policy = load_policy(str(TINY_MODEL))
    policy.save(tmp_path / "other")
    trained_tokenizer().save_pretrained(tmp_path / "other")
    path = write(tmp_path / "a.jsonl", pairs())
    shrunk = len(trained_tokenizer()) <= policy.model.get_input_embeddings().weight.shape[0]
    told = "has another tokenizer than the policy" if shrunk else "they do not belong together"
    with pytest.raises(ModelError, match=told):
        made(tmp_path / "run", pairs=path, reference=str(tmp_path / "other"))


def test_another_reference_of_the_same_family(tmp_path: Path) -> None:
    policy = load_policy(str(TINY_MODEL))
    with torch.no_grad():
        next(iter(policy.parameters())).mul_(0.5)
    policy.save(tmp_path / "other")
    path = write(tmp_path / "a.jsonl", pairs())
    own = batch(made(tmp_path / "a", pairs=path))["reference_logp"]
    other = batch(made(tmp_path / "b", pairs=path, reference=str(tmp_path / "other")))["reference_logp"]
    assert not torch.allclose(own, other)


# ---- ranking ---------------------------------------------------------------------------------------------------------
def test_the_check_of_a_file_says_how_a_model_ranks_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = logged(tmp_path)
    assert main(["data", "check", path, "--model", "tiny"]) == 0
    said = capsys.readouterr().out
    policy, rows = load_policy(str(TINY_MODEL)), list(load_rows(path).comparisons())
    found = ranking_report(rows, policy)
    right = sum(row.reference_logps[0] > row.reference_logps[1] for row in rows)
    assert int((found.policy > 0).sum()) == right
    assert f"ranking accuracy: {right / 8:.1%}" in said
    assert "of log-ratios to the reference:" in said
    assert found.reference is not None
    torch.testing.assert_close(found.reference, found.policy, rtol=1e-4, atol=1e-4)
    assert main(["data", "check", str(tmp_path / "plain.jsonl"), "--reference", "tiny"]) == 1
    assert main(["data", "check", str(tmp_path / "plain.jsonl"), "--rating-range", "5", "1"]) == 1
    assert main(["data", "check", str(tmp_path / "plain.jsonl"), "--model", "tiny", "--reference", "tiny"]) == 0
    assert "of log-ratios to the reference: 0.0%" in capsys.readouterr().out, "a model against itself: ties are wrong"


def test_lists_are_ranked_by_all_their_pairs(tmp_path: Path) -> None:
    row = {"prompt": "1+2=", "completions": ["3", "4", "77"], "ratings": [3, 2, 1]}
    rows = list(load_rows(write(tmp_path / "a.jsonl", [row])).comparisons())
    found = ranking_report(rows, load_policy(str(TINY_MODEL)))
    assert len(found.policy) == 3
    assert float(found.policy[0] + found.policy[2]) == pytest.approx(float(found.policy[1]), abs=1e-4)
    assert found.reference is None


# ---- a file of comparisons alone -------------------------------------------------------------------------------------
def test_a_file_of_comparisons_is_task_and_data_and_held_out_pairs_are_ranked(tmp_path: Path) -> None:
    rows = [
        {"prompt": f"{a}+{b}=", "chosen": str(a + b), "rejected": str(a + b + 1)}
        for a in range(1, 9)
        for b in range(1, 9)
    ]
    path = write(tmp_path / "a.jsonl", rows)
    settings = {**SMALL, "steps": 3, "eval_prompts": 64, "out": str(tmp_path / "run")}
    run = unipo.train("dpo", path, **settings)
    first, last = (m for m in run.records.metrics if m["accuracy"] == m["accuracy"])
    kept = run.data.held_out.rows
    assert 0 < kept.count("group") < 20
    assert kept.count("group") + run.data.mixer.sources["pairs"].episodes.count("group") == 64
    assert not set(kept["prompt_id"].tolist()) & set(run.data.mixer.sources["pairs"].episodes["prompt_id"].tolist())
    assert first["accuracy_against_reference"] == 0.0, "at the start both models are one: ties are wrong"
    assert last["accuracy_against_reference"] > 0.5
    logp = kept.reduce(emitted(kept, ["logp"], run.policy, 4096)["logp"])
    assert last["accuracy"] == pytest.approx(float((logp[::2] > logp[1::2]).double().mean()))
    other = unipo.train("simpo", path, **{**settings, "out": str(tmp_path / "simpo")})
    assert "accuracy_against_reference" not in other.records.metrics[-1]


def test_lists_named_as_the_arguments_of_rewards_do_not_reach_them(tmp_path: Path) -> None:
    rows = [{"prompt": p, "completions": [x, w], "ratings": [1, 4], "answer": w} for p, w, x in asked()]
    run = unipo.train("dpo", write(tmp_path / "a.jsonl", rows), out=str(tmp_path / "run"), **SMALL)
    assert run.records.metrics[-1]["reward"] != run.records.metrics[-1]["reward"]
    assert run.config.pairs.endswith("a.jsonl")


def test_labels_are_no_answers_to_judge_by(tmp_path: Path) -> None:
    rows = [{"prompt": p, "completion": w, "label": i % 2 == 0} for i, (p, w, _) in enumerate(asked())]
    run = unipo.train("kto", write(tmp_path / "a.jsonl", rows), out=str(tmp_path / "run"), labels_per_step=4, **SMALL)
    assert all(m["accuracy"] != m["accuracy"] for m in run.records.metrics)
