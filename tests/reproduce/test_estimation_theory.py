"""The experiments of estimation theory: they run, their tasks are what they say, the committed verdicts are whole."""

from __future__ import annotations

import io
import json

import pytest
import torch
from rich.console import Console

from unipo.functional import state_action_coverage
from unipo.methods.estimation_theory import STUDIES
from unipo.reproduce import estimation_datasets as data
from unipo.reproduce import estimation_theory as theory
from unipo.reproduce.claim import Claim
from unipo.reproduce.run import KEYS, VERDICTS, run_claim
from unipo.tabular.agnostic import tables

BY_SLUG = {claim.slug: claim for claim in theory.CLAIMS}


def test_every_study_has_its_claim() -> None:
    assert {study.slug: study.claim for study in STUDIES} == {c.slug: c.statement for c in theory.CLAIMS}


@pytest.mark.parametrize("claim", theory.CLAIMS, ids=lambda c: c.slug)
def test_a_short_form_runs(claim: Claim) -> None:
    verdict = run_claim(claim, 1, Console(file=io.StringIO()), steps=2)
    for arm in claim.arms:
        for metric, found in verdict["numbers"][arm].items():
            assert metric == "learning_rate" or None not in found["seeds"], (arm, metric)


@pytest.mark.parametrize("slug", sorted(BY_SLUG))
def test_the_committed_verdict_is_whole(slug: str) -> None:
    verdict = json.loads((VERDICTS / f"{slug}.json").read_text(encoding="utf-8"))
    assert tuple(verdict) == KEYS
    assert len(verdict["seeds"]) >= 5
    assert set(verdict["numbers"]) == set(BY_SLUG[slug].arms)
    assert [p["expected"] for p in verdict["expectations"]] == [str(e) for e in BY_SLUG[slug].expectations]
    assert verdict["claim"] == BY_SLUG[slug].statement


def test_the_exact_gradients_of_the_bandit() -> None:
    """Many Monte-Carlo samples reach them; the reported covariance shrinks as 1 / M."""
    a = torch.randn(400_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for power, exact in theory.REWARDS.values():
        mean, covariance = theory.monte_carlo(torch.stack([a, a.square() - 1], 1), a**power)
        assert mean.tolist() == pytest.approx(exact, abs=0.03)
        assert float(covariance.trace()) < 1e-3


@pytest.mark.parametrize("states", [64, 256])
def test_the_walk_is_one_problem_on_every_grid(states: int) -> None:
    mdp, policies = theory.walk(states, 0)
    assert torch.unique(policies[:, 0], dim=0).shape[0] >= theory.POLICIES - 1
    assert float(mdp.reward.min()) == pytest.approx(0, abs=1e-12)
    assert float(mdp.reward.max()) == pytest.approx(1 / theory.HORIZON)
    values, finest = (
        torch.stack([m.expected_return(p) for p in tables(all_[::9], 2)])
        for m, all_ in ((mdp, policies), theory.walk(512, 0))
    )
    assert torch.allclose(values, finest, atol=0.03)
    assert float(values.max() - values.min()) > 0.1


def test_data_sets_of_a_maze() -> None:
    """The goal is reached from both policies as they should; no step starts in it; sizes agree; random scores 0."""
    mdp, expert = data.maze(7, 0)
    logs = data.data_sets(mdp, expert, 7, 0)
    assert float(data.scaled(mdp, expert)) == pytest.approx(1, abs=0.02)
    assert float(data.scaled(mdp, torch.full_like(expert, 0.25))) == 0
    for name, log in logs.items():
        assert not bool((log.state == data.GOAL).any()), name
        assert len(log.state) == pytest.approx(data.TRANSITIONS, rel=0.03), name
    assert (
        float(logs["expert"].returns.mean())
        > float(logs["noisy"].returns.mean())
        > float(logs["random"].returns.mean())
    )
    replay = (logs["replay"].state, logs["replay"].action)
    assert state_action_coverage(logs["expert"].state, logs["expert"].action, replay) < 0.5


def test_learners_of_complete_data() -> None:
    """Cloning returns the policy of the counts; Q learning on the whole process is near its optimum."""
    mdp, expert = data.maze(7, 0)
    policy = 0.7 * expert + 0.3 / data.ACTIONS
    counts = (1000 * policy[:, :, None] * mdp.transition[0]).float()[None]
    assert torch.allclose(data.cloned(counts, 0, 0)[0], policy, atol=1e-5)
    found = data.greedy_q(counts, 0, 1500, conservative=0.0)[0]
    assert float(data.scaled(mdp, found)) > 0.9


def test_correlation() -> None:
    x = torch.tensor([1.0, 2.0, 4.0])
    assert data.correlation(x, 3 - 2 * x) == pytest.approx(-1)
    assert data.correlation(x, torch.ones(3)) == 0
