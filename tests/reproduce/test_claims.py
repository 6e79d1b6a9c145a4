"""Every claim runs in a form of a few steps; the committed verdicts are whole; the tasks are what they say."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import pytest
import torch
from rich.console import Console

from unipo.learner import Learner
from unipo.methods.catalog import METHODS, STUDIES, build
from unipo.reproduce import CLAIMS, bandits, gradients, mixed, offline, online, reproduce_claim
from unipo.reproduce.claim import INCONCLUSIVE, NOT_REPRODUCED, REPRODUCED, Claim
from unipo.reproduce.network import NetworkPolicy
from unipo.reproduce.page import page, verdicts
from unipo.reproduce.run import KEYS, tuned
from unipo.reproduce.training import copy_of, divergence, fresh, success, train

ROWS = tuple(sorted(CLAIMS))
STATES = {REPRODUCED, NOT_REPRODUCED, INCONCLUSIVE}


def quiet() -> Console:
    return Console(file=io.StringIO())


def checked(verdict: dict, claim: Claim) -> None:
    """All keys are there, every arm has all its seeds, and the parts decide the whole."""
    assert tuple(verdict) == KEYS
    assert verdict["verdict"] in STATES
    assert verdict["note"]
    assert verdict["seconds"] >= 0
    for arm in claim.arms:
        for metric, found in verdict["numbers"][arm].items():
            if metric != "learning_rate":
                assert len(found["seeds"]) == len(verdict["seeds"])
                assert None not in found["seeds"], (arm, metric)
                digits = 1e-7 + 1e-4 * max(map(abs, found["seeds"]))  # five are written; seeds may cancel
                assert found["mean"] == pytest.approx(sum(found["seeds"]) / len(found["seeds"]), rel=1e-3, abs=digits)
    parts = {p["verdict"] for p in verdict["expectations"]}
    assert (verdict["verdict"] == REPRODUCED) == (parts == {REPRODUCED})
    assert (verdict["verdict"] == NOT_REPRODUCED) == (NOT_REPRODUCED in parts)


def test_every_row_has_its_claim() -> None:
    assert {m.slug for m in METHODS if m.row is not None} | set(STUDIES) == set(CLAIMS)


@pytest.mark.parametrize("slug", ROWS)
def test_a_claim_runs(slug: str, tmp_path: Path) -> None:
    shown = reproduce_claim(slug, 2, quiet(), steps=3, folder=tmp_path)
    console = Console(file=io.StringIO(), width=200)
    console.print(shown)
    verdict = json.loads((tmp_path / f"{slug}.json").read_text(encoding="utf-8"))
    checked(verdict, CLAIMS[slug])
    assert verdict["verdict"] in console.file.getvalue()  # type: ignore[attr-defined]
    assert f"## {slug}" in page([verdict])


@pytest.mark.parametrize("slug", ROWS)
def test_the_committed_verdict_is_whole(slug: str) -> None:
    found = {v["slug"]: v for v in verdicts()}
    assert slug in found, f"run: unipo reproduce {slug}"
    checked(found[slug], CLAIMS[slug])
    assert len(found[slug]["seeds"]) >= 5
    assert found[slug]["command"].startswith(f"unipo reproduce {slug}")


def test_a_trial_is_a_function_of_its_seed() -> None:
    claim = CLAIMS["nft"]
    first, again, other = (claim.trial(claim.arms["nft"], 0.03, seed, 4) for seed in (0, 0, 1))
    assert first == again != other


def test_unknown_claims_and_seeds_are_refused(tmp_path: Path) -> None:
    with pytest.raises(KeyError, match="no claim"):
        reproduce_claim("dpo", 2, quiet(), folder=tmp_path)
    with pytest.raises(ValueError, match="seeds is 0"):
        reproduce_claim("nft", 0, quiet(), folder=tmp_path)


@pytest.mark.parametrize(("minimise", "best"), [(False, 0.6), (True, 0.02)])
def test_tuning_takes_the_best_of_the_grid(minimise: bool, best: float) -> None:
    """A trial that scores its own learning rate."""
    claim = Claim(slug="x", statement="", arms={"a": ()}, trial=lambda phases, rate, seed, steps: {"s": rate}, steps=1,
                  tune="s", minimise=minimise, expectations=(), note="")  # fmt: skip
    assert tuned(claim, "a", 1) == best


# ---- the tasks are what they say -------------------------------------------------------------------------------------
def test_the_optimum_of_the_bandit_has_no_copg_loss() -> None:
    """pi* = ref exp(R / beta) / Z: all pairs agree there, so an update on any data moves nothing."""
    task = bandits.bandit(0)
    reference = bandits.near_uniform(task, 0)
    with torch.no_grad():
        best = (task.log_probability(reference) + task.rewards / bandits.BETA).log_softmax(1)
    optimum = copy_of(reference)
    optimum.logits.data = best[:, None, None, :].expand_as(optimum.logits).clone()
    assert divergence(task, optimum, best) == pytest.approx(0.0, abs=1e-12)
    learner = Learner({"policy": optimum})
    data = task.sample(bandits.bad_policy(task), 8, 0)
    data = data.with_columns("step", reference_logp=reference.signals(data, ["logp"])["logp"].detach())
    learner.gradient(data, build("copg", {"copg": {"beta": bandits.BETA}}).objective)
    assert float(optimum.logits.grad.abs().max()) < 1e-12


def test_the_bad_policy_is_bad() -> None:
    task = bandits.bandit(0)
    assert success(task, bandits.bad_policy(task)) < float(task.rewards.mean())


def test_relative_variance_of_known_numbers() -> None:
    """Estimates 1 and 3: variance 2, mean 2, |E g|^2 without bias 4 - 2 / 2 = 3."""
    assert gradients.relative_variance(torch.tensor([[1.0], [3.0]])) == pytest.approx(2 / 3)
    assert gradients.relative_variance(torch.tensor([[10.0], [30.0]])) == pytest.approx(2 / 3)


def test_rates_of_right_answers() -> None:
    assert float(offline.digit_sum().rewards.mean()) == pytest.approx(1 / 6)
    assert float(online.scattered(0).rewards.mean()) == pytest.approx(online.RIGHT, abs=0.01)


def test_network_logits_share_parameters() -> None:
    """An update on prompt 0 alone changes prompt 1 too, and its gradient is that of autograd through success."""
    task = online.scattered(0)
    policy = NetworkPolicy(task, 0)
    assert policy.logits.shape == (task.prompts, task.length, task.vocabulary + 1, task.vocabulary)
    before = policy.logits.detach().clone()
    shown = mixed.demonstrations({0: (1, 2, 3, 4)})
    train((mixed.SFT,), policy, lambda step: shown, steps=1, rate=0.01)
    assert not torch.equal(before[1], policy.logits[1])


def test_demonstrations_join_the_groups_of_their_prompts() -> None:
    task = online.scattered(0)
    policy = NetworkPolicy(task, 0)
    batch = mixed.with_demonstrations(fresh(task, policy, 4, 0), {1: (1, 2, 3, 4)})(0)
    assert batch.lengths("group", "episode").tolist() == [4, 5, *[4] * (task.prompts - 2)]
    demo = batch.category("kind", "demo")
    assert demo.nonzero().flatten().tolist() == [8]
    assert batch["token"][batch.step_index(torch.tensor([8]))].tolist() == [1, 2, 3, 4]
    assert math.isnan(float(batch["reward"][8]))


def test_stale_rollouts_keep_the_old_policy_until_the_synchronisation() -> None:
    """The behaviour log-probs of step 1 are those of the policy at step 0, not of the one that moved since."""
    task = online.scattered(0)
    policy = NetworkPolicy(task, 0)
    draw, start = fresh(task, policy, 4, 0, sync_every=2), copy_of(policy)
    draw(0)
    with torch.no_grad():
        policy.bias += torch.arange(6.0)
    for step, expected in ((1, start), (2, policy)):
        batch = draw(step)
        logp = expected.signals(batch, ["logp"])["logp"]
        assert torch.allclose(batch["behavior_logp"], logp, atol=1e-12), step
