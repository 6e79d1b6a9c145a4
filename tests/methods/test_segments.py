"""Identity tests of spo-segment, spo-tree and t-ppo: by hand, and by enumeration in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.toys import gradient, rollouts_of, toy_batch
from unipo import functional as F
from unipo.episodes import Episodes
from unipo.learner.coefficients import coefficients
from unipo.methods.policy_gradients import grpo, ppo
from unipo.methods.segments import spo_chain, spo_tree, t_ppo
from unipo.objectives import (
    ClipMask,
    GeneralisedAdvantage,
    Normalised,
    PolicyGradient,
    Stored,
    TokenMean,
    ValueTarget,
    with_settings,
)
from unipo.policies.tabular import TabularPolicy
from unipo.sources.stages.branching import ADVANTAGE, Every, MaskLikely, SegmentValues, Unlikely
from unipo.sources.stages.trees import SegmentTree
from unipo.sources.text.tabular import tabular_rollouts
from unipo.tasks.tabular import TabularTask

REWARDS = [[1.0, 0.0, 0.0, 1.0], [0.0, 1.0, 1.0, 1.0]]
LENGTHS = [[2, 3, 1, 4], [1, 2, 5, 2]]
TASK = TabularTask(2, 3, 4, lambda prompt, tokens: float((sum(tokens) + tokens[0] * tokens[2]) % 3 == prompt))
POLICY = TabularPolicy.random(2, 4, 3, seed=3)


def close(a: Tensor, b: Tensor, tolerance: float = 1e-12) -> bool:
    return torch.allclose(a.double(), b.double(), rtol=0, atol=tolerance)


def enumerated() -> tuple[Episodes, Tensor, Tensor]:
    """Every sequence of every prompt, their probabilities [E], and the exact value [N] of the prefix before each step."""
    rows = TASK.episodes()
    probability = TASK.log_probability(POLICY).detach().exp()
    size, value = len(TASK.sequences), torch.zeros(len(rows), TASK.length, dtype=torch.float64)
    for prompt in range(TASK.prompts):
        for i, tokens in enumerate(TASK.sequences):
            for t in range(TASK.length):
                fits = torch.tensor([s[:t] == tokens[:t] for s in TASK.sequences])
                weight = probability[prompt][fits]
                value[prompt * size + i, t] = (weight * TASK.rewards[prompt][fits]).sum() / weight.sum()
    return rows, probability.flatten(), value.flatten()


ROWS, PROBABILITY, VALUE = enumerated()


def advantages(interval: int) -> Tensor:
    start = Every(interval)(ROWS, None)
    return F.segment_advantages(VALUE[start], start, ROWS["reward"], ROWS.index("episode"))


# ---- spo-segment -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("interval", [1, 2, 3, 4])
def test_segments_telescope(interval: int) -> None:
    """One advantage per segment: they add up to R - V(prompt); without a cut at the first token, to R - V(first boundary)."""
    start = Every(interval)(ROWS, None)
    found = advantages(interval)
    total = torch.zeros(len(ROWS)).double().index_add(0, ROWS.index("episode")[start], found[start])
    assert close(total, ROWS["reward"] - VALUE[::4])
    later = start[ROWS.position()[start] > 0]
    if len(later):
        found = F.segment_advantages(VALUE[later], later, ROWS["reward"], ROWS.index("episode"))
        total = torch.zeros(len(ROWS)).double().index_add(0, ROWS.index("episode")[later], found[later])
        assert close(total, ROWS["reward"] - VALUE[interval::4])
        assert close(found.reshape(-1, 4)[:, :interval], torch.zeros(1))


def test_one_segment_is_the_group_baseline() -> None:
    """V(prompt) = mean of the group: GRPO's advantage without std, averaged over tokens."""
    episodes, logp = rollouts_of(REWARDS, LENGTHS, drift=0.5)
    start = (episodes.position() == 0).nonzero().squeeze(1)
    mean = F.group_mean(episodes["reward"], episodes.index("group", "episode"), 2)
    added = F.segment_advantages(mean, start, episodes["reward"], episodes.index("episode"))
    episodes = episodes.with_columns("step", **{ADVANTAGE: added})
    raw = spo_chain(kl=0.0).but(advantage=Stored(ADVANTAGE))
    base = grpo().but(advantage=Normalised(), aggregate=TokenMean())
    found = gradient(raw.objective, episodes, logp)
    assert close(found, gradient(base.objective, episodes, logp))
    assert float(found.abs().max()) > 0


def test_cuts_everywhere_with_exact_values_give_token_advantages() -> None:
    """A = Q - V at every token, and the expected gradient is the exact policy gradient; so it is with longer segments."""
    after = torch.where(ROWS.position() == 3, ROWS.expand("reward"), VALUE.roll(-1))
    assert close(advantages(1), after - VALUE)
    for interval in (1, 2, 3, 4):
        policy = TabularPolicy(POLICY.logits, POLICY.value)
        logp = policy.signals(ROWS, ["logp"])["logp"]
        (ROWS.expand(PROBABILITY) * advantages(interval) * logp).sum().div(TASK.prompts).backward()
        assert policy.logits.grad is not None
        assert close(policy.logits.grad, TASK.gradient(POLICY))


@pytest.mark.parametrize("interval", [1, 2, 4])
def test_segment_advantages_have_mean_zero_behind_every_prefix(interval: int) -> None:
    """sum over continuations of pi(continuation | prefix) A = 0, for every prefix at which a segment begins."""
    found, start = advantages(interval), Every(interval)(ROWS, None)
    sums: dict[tuple[int, ...], float] = {}
    for row, position in zip(ROWS.index("episode")[start].tolist(), ROWS.position()[start].tolist(), strict=True):
        name = (row // len(TASK.sequences), *TASK.sequences[row % len(TASK.sequences)][:position])
        sums[name] = sums.get(name, 0.0) + float(PROBABILITY[row] * found[row * 4 + position])
    assert max(map(abs, sums.values())) < 1e-12
    assert float(found.abs().max()) > 0.1


def test_a_threshold_of_one_switches_the_mask_off() -> None:
    full, masked = spo_chain(threshold=1.0).rollouts.augment, spo_chain().rollouts.augment
    assert full == (SegmentValues(Unlikely(1.0, 5), 9),)
    assert masked == (SegmentValues(Unlikely(0.9, 5), 9), MaskLikely(0.9))
    rows = rollouts_of(REWARDS, LENGTHS)[0]
    assert torch.equal(Unlikely(1.0, 2)(rows, None), Every(2)(rows, None))


def test_masked_tokens_leave_the_count() -> None:
    """The mask is of the policy that sampled, whatever the policy is now; the mean divides by the steps that are left."""
    task = TabularTask(1, 3, 4, lambda prompt, tokens: float(sum(tokens) % 3 == 0))
    recipe = spo_chain(kl=0.0, threshold=0.6, interval=1)
    rows = tabular_rollouts(task, TabularPolicy.random(1, 4, 3), recipe.rollouts, 0).draw(0, 0)
    kept = rows["behavior_logp"].double().exp() < 0.6
    assert 0 < int(kept.sum()) < len(kept)
    logp = rows["behavior_logp"].double()
    found = gradient(recipe.but(advantage=Stored(ADVANTAGE)).objective, rows, logp)
    assert close(found[kept], -rows[ADVANTAGE][kept] / int(kept.sum()))
    assert not found[~kept].any()


def test_whitening_is_over_what_is_not_masked() -> None:
    episodes, logp = rollouts_of(REWARDS, LENGTHS)
    added = torch.randn(len(logp), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    mask = torch.arange(len(logp)) % 3 != 0
    rows = episodes.with_columns("step", **{ADVANTAGE: added}, mask=mask)
    found = -gradient(spo_chain(kl=0.0).objective, rows, logp)[mask] * int(mask.sum())
    assert float(found.mean()) == pytest.approx(0.0, abs=1e-12)
    assert float(found.std()) == pytest.approx(1.0, abs=1e-7)
    assert close(found, (added[mask] - added[mask].mean()) / (added[mask].std() + 1e-8))


def test_a_batch_far_off_is_skipped() -> None:
    episodes, logp = rollouts_of(REWARDS, LENGTHS)
    rows = episodes.with_columns("step", **{ADVANTAGE: torch.linspace(-1, 1, len(logp)).double()})
    objective = spo_chain(kl=0.0, skip=3.0).objective
    assert gradient(objective, rows, logp + 1.0).any()
    assert not gradient(objective, rows, logp + 1.2).any(), "e^1.2 > 3"


# ---- spo-tree ----------------------------------------------------------------------------------------------------------
def test_a_tree_of_one_level_is_dr_grpo() -> None:
    """Its edges are the group's answers with A = R - mean; groups without spread have been discarded."""
    recipe = spo_tree(branching=(5,), tokens=2, kl=0.0, threshold=1.0, clip=0.2)
    rows = tabular_rollouts(TASK, POLICY, recipe.rollouts, 0).draw(0, 0)
    logp = rows["behavior_logp"].double() + 0.1
    base = PolicyGradient(advantage=Normalised(), weight=recipe.objective.terms()[0][1].weight, mask=ClipMask(),  # type: ignore[attr-defined]
                          aggregate=TokenMean())  # fmt: skip
    found = gradient(recipe.objective, rows, logp)
    assert close(found, gradient(base, rows, logp))
    assert float(found.abs().max()) > 0


def test_tree_advantages_over_the_spread_of_siblings() -> None:
    """z-score: the same edges, each over the standard deviation (Bessel) of its siblings plus 1e-6."""
    seen: list[Episodes] = []

    class Looking(SegmentTree):
        def edges(self, groups, drawn):  # type: ignore[no-untyped-def]
            seen.append(super().edges(groups, drawn))
            return seen[-1]

    for scale in ("centred", "z-score"):
        spec = spo_tree(branching=(4, 3), tokens=2, scale=scale, threshold=1.0).rollouts
        stage = spec.augment[0]
        assert isinstance(stage, SegmentTree)
        tabular_rollouts(TASK, POLICY, replace(spec, augment=(Looking((4, 3), 2, stage.scale),)), 0).draw(0, 0)
    plain, scaled = seen
    assert torch.equal(plain["token"], scaled["token"])
    index = plain.index("group", "episode")
    std = F.group_std(plain["reward"], index, plain.count("group"))
    expected = torch.where(std > 0, plain["advantage"] / (std + 1e-6), 0.0)
    assert close(scaled["advantage"], expected)
    assert float(scaled["advantage"].abs().max()) > 0.4


# ---- t-ppo -------------------------------------------------------------------------------------------------------------
def test_whole_answers_are_ppo() -> None:
    """All finished, all of this step: PPO with A as it is and a critic of lam 1."""
    episodes = toy_batch()
    episodes = episodes.with_columns("step", current=torch.ones(episodes.count("step"), dtype=torch.bool))
    episodes = episodes.with_columns("episode", finished=torch.ones(len(episodes), dtype=torch.bool))
    plain = ppo().but(advantage=GeneralisedAdvantage(1.0, 0.95), mask=ClipMask(0.2, 0.28))
    plain = plain.but(target=ValueTarget(1.0, 1.0))
    generator = torch.Generator().manual_seed(5)
    logp, value = torch.randn((2, episodes.count("step")), generator=generator, dtype=torch.float64)
    signals = {"logp": episodes["old_logp"] + 0.2 * logp, "value": value}
    for name in ("logp", "value"):
        found = coefficients(with_settings(t_ppo().objective, {}), episodes, signals).total[name]
        assert close(found, coefficients(plain.objective, episodes, signals).total[name])
        assert float(found.abs().max()) > 0


def window(values: list[float], reward: float, cut: bool, gamma: float, lam: float) -> list[float]:
    row = Episodes.build([[0] * len(values)], [[0]], kind=["rollout"], truncated=[cut], old_value=[values])
    row = row.with_columns("episode", reward=torch.tensor([reward], dtype=torch.float64))
    row = row.with_columns("step", old_value=torch.tensor(values, dtype=torch.float64))
    found: list[float] = GeneralisedAdvantage(gamma, lam)(row, {}).tolist()
    return found


def test_egae_by_hand() -> None:
    values = [0.5, 0.2, 0.7]
    assert window(values, 0.0, True, 1.0, 1.0) == pytest.approx([0.7 - 0.5, 0.7 - 0.2, 0.0])
    assert window(values, 0.0, True, 1.0, 1.0)[-1] == 0.0, "exactly"
    assert window(values, 0.0, True, 1.0, 0.0) == pytest.approx([0.2 - 0.5, 0.7 - 0.2, 0.0])
    last = (0.9 - 1) * 0.7
    assert window(values, 0.0, True, 0.9, 0.0)[-1] == pytest.approx(last)
    middle = 0.9 * 0.7 - 0.2 + 0.9 * 0.5 * last
    assert window(values, 0.0, True, 0.9, 0.5)[1] == pytest.approx(middle)


def test_a_cut_is_not_an_end() -> None:
    """After an end there is nothing: the last error is R - V; at a cut it is 0."""
    assert window([0.5, 0.8], 0.0, False, 1.0, 0.9)[-1] == pytest.approx(-0.8)
    assert window([0.5, 0.8], 0.0, True, 1.0, 0.9)[-1] == 0.0


@pytest.mark.parametrize("lam", [0.0, 0.6, 1.0])
def test_egae_is_unbiased_but_at_the_cut(lam: float) -> None:
    """Windows of 3 of 4 tokens, exact V: E[A_t | s_t, a_t] = Q - V for all but the last, whose A is 0 (true: V(s_l) - V)."""
    size, inside = len(TASK.sequences), ROWS.position() < 3
    cut = ROWS.select(inside, "step").with_columns("step", old_value=VALUE[inside])
    cut = cut.with_columns(
        "episode", truncated=torch.ones(len(cut), dtype=torch.bool), reward=torch.zeros(len(cut)).double()
    )
    found = GeneralisedAdvantage(1.0, lam)(cut, {}).reshape(2, size, 3)
    probability, value = PROBABILITY.reshape(2, size), VALUE.reshape(2, size, 4)
    for prompt in range(2):
        for tokens in TASK.sequences[::7]:
            for t in range(3):
                fits = torch.tensor([s[: t + 1] == tokens[: t + 1] for s in TASK.sequences])
                weight = probability[prompt][fits] / probability[prompt][fits].sum()
                mean = float((weight * found[prompt][fits][:, t]).sum())
                true = float((value[prompt][fits][:, t + 1] - value[prompt][fits][:, t])[0])
                assert mean == pytest.approx(true if t < 2 else 0.0, abs=1e-12)


def test_policy_and_critic_have_their_own_tokens() -> None:
    """The policy learns from what was written now, divided by that many tokens; the critic from all of finished answers."""
    rows = Episodes.build([[0, 1, 2], [1, 1]], [[0], [0]], [0, 1], kind=["rollout"] * 2, truncated=[False, True])
    rows = rows.with_columns("episode", reward=torch.tensor([1.0, 0.0]).double(), finished=torch.tensor([True, False]))
    rows = rows.with_columns(
        "step", behavior_logp=torch.full((5,), -1.0).double(),
        old_value=torch.tensor([0.1, 0.2, 0.3, 0.4, 0.6], dtype=torch.float64),
        current=torch.tensor([False, True, True, True, True]),
    )  # fmt: skip
    signals = {"logp": rows["behavior_logp"], "value": rows["old_value"]}
    found = coefficients(t_ppo(lam=1.0, value=1.0, value_clip=0.0).objective, rows, signals).total
    expected = torch.tensor([0.0, 0.8, 0.7, 0.2, 0.0], dtype=torch.float64)
    assert close(found["logp"], -expected / 4)
    expected = torch.tensor([0.1 - 1, 0.2 - 1, 0.3 - 1, 0.0, 0.0], dtype=torch.float64)
    assert close(found["value"], expected / 3)
