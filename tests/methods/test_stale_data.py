"""Identity tests of remix and aipo."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.toys import gradient, rollouts_of
from unipo.episodes import Episodes
from unipo.methods.catalog import find
from unipo.objectives import (
    ClipMask,
    EpisodeMean,
    GroupStd,
    Normalised,
    PolicyGradient,
    ProximalClipMask,
    TokenMean,
    TokenRatio,
    knobs_of,
    with_settings,
)
from unipo.objectives.base import Objective

REWARDS = [[1.0, 0.0, 0.0, 1.0], [0.0, 1.0, 1.0, 1.0]]
LENGTHS = [[2, 3, 1, 4], [1, 2, 5, 2]]


def stale(drift: float = 0.8, moved: float = 0.5) -> tuple[Episodes, Tensor]:
    """Rows whose policy at the beginning of the update is `drift` from the behaviour, and log-probs `moved` from that."""
    episodes, old = rollouts_of(REWARDS, LENGTHS, drift=drift)
    noise = torch.randn(len(old), generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    previous = episodes["behavior_logp"] - 0.2
    return episodes.with_columns("step", old_logp=old, previous_logp=previous), old + moved * noise


def advantage(episodes: Episodes) -> Tensor:
    return Normalised(scale=GroupStd())(episodes, {}).double()


# ---- remix -----------------------------------------------------------------------------------------------------------
def test_nothing_is_masked_when_the_update_begins() -> None:
    """r = c there, however stale the row; the ordinary window masks stale rows at once."""
    episodes, _ = stale()
    start, a = {"logp": episodes["old_logp"]}, advantage(episodes)
    assert ProximalClipMask().of(a, episodes, start).all()
    assert not ClipMask().of(a, episodes, start).all()


def test_on_fresh_rows_the_window_is_ppos() -> None:
    episodes, logp = stale(drift=0.0)
    a, now = advantage(episodes), {"logp": logp}
    found = ProximalClipMask(0.1, 0.3).of(a, episodes, now)
    assert torch.equal(found, ClipMask(0.1, 0.3).of(a, episodes, now))
    assert 0 < int(found.sum()) < len(found)


def test_the_window_in_units_of_the_update() -> None:
    """In u = pi / pi_k the window is 1 +- eps / c; where c < eps there is no lower end."""
    episodes, logp = stale()
    a = advantage(episodes)
    c, u = (episodes["old_logp"] - episodes["behavior_logp"]).exp(), (logp - episodes["old_logp"]).exp()
    expected = ~((a > 0) & (u > 1 + 0.2 / c) | (a < 0) & (u < 1 - 0.2 / c))
    assert torch.equal(ProximalClipMask().of(a, episodes, {"logp": logp}), expected)
    far = episodes.with_columns("step", old_logp=episodes["behavior_logp"] - 3.0)
    assert ProximalClipMask().of(-torch.ones_like(a), far, {"logp": logp - 20.0}).all()


def test_log_form_is_the_gradient_of_the_clipped_objective() -> None:
    """L = - SEQ(min(r A, clip(r, c - eps, c + eps) A)), differentiated by autograd."""
    episodes, logp = stale()
    x, a = logp.clone().requires_grad_(), advantage(episodes)
    r, c = (x - episodes["behavior_logp"]).exp(), (episodes["old_logp"] - episodes["behavior_logp"]).exp()
    surrogate = torch.minimum(r * a, torch.maximum(torch.minimum(r, c + 0.2), c - 0.2) * a)
    loss = -episodes.reduce(surrogate) / episodes.lengths()
    (expected,) = torch.autograd.grad(loss.mean(), x)
    objective = find("remix").build(kl=0.0).objective
    torch.testing.assert_close(gradient(objective, episodes, logp), expected)
    ordinary = gradient(find("grpo").build().objective, episodes, logp)
    assert not torch.allclose(ordinary, expected)


def test_remix_without_its_parts_is_its_base() -> None:
    """No replay, one pass, lam = 1: GRPO (PPO) with the divergence to the reference."""
    episodes, logp = stale(drift=0.0)
    recipe = find("remix").build(replayed=0.0, passes=1, reborn=-1, floor=1.0, kl=0.1)
    base = find("grpo").build(kl=0.1)
    torch.testing.assert_close(gradient(recipe.objective, episodes, logp, {"reference_share": 1.0}),
                               gradient(base.objective, episodes, logp))  # fmt: skip
    assert recipe.passes == 1
    assert {c.knob for c in recipe.controllers} == {"reference_share"}
    assert recipe.controllers[0].setting({}, 10**6) == 1.0
    ppo = find("remix").build(base="ppo", kl=0.0)
    assert "value" in ppo.needs.signals
    assert ppo.rollouts.group == 8


def test_the_shares_of_the_references() -> None:
    """lam is irrelevant where both references agree; with lam = 0 and pi = pi_{k-1} nothing pulls."""
    episodes, logp = stale()
    objective = find("remix").build(kl=0.3).objective
    same = episodes.with_columns("step", previous_logp=episodes["reference_logp"])
    found = [gradient(objective, same, logp, {"reference_share": lam}) for lam in (0.0, 0.4, 1.0)]
    torch.testing.assert_close(found[0], found[1])
    torch.testing.assert_close(found[0], found[2])
    here = episodes.with_columns("step", previous_logp=logp)
    plain = gradient(find("remix").build(kl=0.0).objective, here, logp)
    torch.testing.assert_close(gradient(objective, here, logp, {"reference_share": 0.0}), plain)
    assert not torch.allclose(gradient(objective, here, logp, {"reference_share": 0.5}), plain)


def test_phases() -> None:
    """Before T: replay and two passes; from T on neither, and a new reference. lam: 1 to step 50, then stairs to 0.5."""
    recipe = find("remix").build(reborn=7)
    by_name = {c.knob: c for c in recipe.controllers}
    for knob, before, after in (("replayed", 0.4, 0.0), ("epochs", 2.0, 1.0)):
        assert [by_name[knob].setting({}, s) for s in (0, 6, 7, 99)] == [before, before, after, after]
    lam = [by_name["reference_share"].setting({}, s) for s in (0, 50, 51, 60, 61, 90, 91, 500)]
    assert lam == pytest.approx([1.0, 1.0, 0.9, 0.9, 0.8, 0.6, 0.5, 0.5])
    assert [recipe.snapshots["reference"].due(s) for s in (0, 6, 7, 8)] == [False, False, True, False]
    assert recipe.snapshots["previous"].lag == 1
    assert with_settings(recipe.rollouts, {"replayed": 0.25}).replay == 0.25
    assert knobs_of(recipe.rollouts) == {"replayed": 0.4}


# ---- aipo ------------------------------------------------------------------------------------------------------------
def aipo(**settings: object) -> Objective:
    return find("llamarl-aipo").build(**settings).objective


def test_aipo_on_policy_is_reinforce_with_the_group_mean() -> None:
    episodes, logp = rollouts_of(REWARDS, LENGTHS)
    expected = PolicyGradient(advantage=Normalised(), aggregate=TokenMean())
    for cap in ("truncate", "mask"):
        assert torch.equal(gradient(aipo(cap=cap), episodes, logp), gradient(expected, episodes, logp))


def test_truncation_and_mask_by_hand() -> None:
    """r = .5, 1, 3, 9, 20 with cap 8: weights .5, 1, 3, 8, 8 and .5, 1, 3, 0, 0; the mask is what autograd gives."""
    r = torch.tensor([0.5, 1.0, 3.0, 9.0, 20.0], dtype=torch.float64)
    episodes, logp = rollouts_of([[1.0, 0.0]], [[5, 5]])
    logp = episodes["behavior_logp"] + r.log().repeat(2)
    unit = gradient(aipo(), episodes, episodes["behavior_logp"])
    torch.testing.assert_close(gradient(aipo(), episodes, logp) / unit, r.clamp(max=8.0).repeat(2))
    masked = torch.tensor([0.5, 1.0, 3.0, 0.0, 0.0], dtype=torch.float64).repeat(2)
    torch.testing.assert_close(gradient(aipo(cap="mask"), episodes, logp) / unit, masked)
    x = logp.clone().requires_grad_()
    clamped = (x - episodes["behavior_logp"]).exp().clamp(max=8.0)
    (expected,) = torch.autograd.grad(-(clamped * Normalised()(episodes, {}).double()).mean(), x)
    torch.testing.assert_close(gradient(aipo(cap="mask"), episodes, logp), expected)


def test_aipo_is_cispo_without_the_std() -> None:
    episodes, logp = rollouts_of(REWARDS, LENGTHS, drift=1.0)
    cispo = find("cispo").build(cap=2.0).but(advantage=Normalised()).objective
    torch.testing.assert_close(gradient(aipo(rho=2.0), episodes, logp), gradient(cispo, episodes, logp))


def test_without_a_cap_it_is_token_importance_sampling() -> None:
    episodes, logp = rollouts_of(REWARDS, LENGTHS, drift=1.0)
    expected = PolicyGradient(advantage=Normalised(), weight=TokenRatio(), aggregate=TokenMean())
    for cap in ("truncate", "mask"):
        found = gradient(aipo(rho=1e9, cap=cap), episodes, logp)
        torch.testing.assert_close(found, gradient(expected, episodes, logp))


def test_the_mask_is_ppos_upper_bound_for_both_signs() -> None:
    """PPO masks a ratio above the bound for A > 0; here for A < 0 too, and there is no lower bound."""
    episodes, logp = rollouts_of(REWARDS, LENGTHS, drift=1.0)
    base = {"weight": TokenRatio(), "aggregate": TokenMean()}
    ours = gradient(aipo(rho=1.5, cap="mask"), episodes, logp)
    for sign in (1.0, -1.0):
        one_side = PolicyGradient(advantage=Normalised(), mask=ClipMask(1e9, 0.5), **base)  # type: ignore[arg-type]
        flipped = episodes.with_columns("episode", reward=sign * episodes["reward"])
        positive = Normalised()(flipped, {}) > 0
        found = sign * gradient(one_side, flipped, logp)
        torch.testing.assert_close(ours[positive], found[positive])


def test_a_cap_of_one_never_raises_a_weight() -> None:
    episodes, logp = rollouts_of(REWARDS, LENGTHS, drift=1.0)
    unit = gradient(aipo(), episodes, episodes["behavior_logp"])
    weight = gradient(aipo(rho=1.0), episodes, logp) / unit
    torch.testing.assert_close(weight, (logp - episodes["behavior_logp"]).exp().clamp(max=1.0))


def test_an_unknown_cap_is_named() -> None:
    with pytest.raises(ValueError, match="expected truncate or mask"):
        aipo(cap="clip")


def test_the_mean_runs_over_episodes_as_in_the_base() -> None:
    assert isinstance(find("remix").build(kl=0.0).objective.aggregate, EpisodeMean)  # type: ignore[attr-defined]
