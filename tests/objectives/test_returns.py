"""Advantages and returns along fragments, against a recursion written out step by step."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from unipo.episodes import Column, Episodes, offsets_of
from unipo.objectives import BatchStd, DiscountedReturn, GeneralisedAdvantage, ValueTarget
from unipo.objectives.returns import bootstrap_of, continues, gae_of, step_rewards

GAMMA, LAM = 0.9, 0.7
LENGTHS = [3, 1, 4, 2, 1, 5]
TERMINATED = [True, False, False, True, True, False]
"""The third goes on in the next batch, the second and the last hit a time limit."""


def fragments(lengths: list[int] = LENGTHS, terminated: list[bool] = TERMINATED, seed: int = 0) -> Episodes:
    """Fragments with random rewards and values, as a collector and an annotator leave them."""
    generator = torch.Generator().manual_seed(seed)
    n, e = sum(lengths), len(lengths)

    def numbers(k: int) -> Tensor:
        return torch.randn(k, generator=generator, dtype=torch.float64)

    value, final, ended = numbers(n), numbers(e), torch.tensor(terminated)
    last = torch.tensor(lengths).cumsum(0) - 1
    following = value.roll(-1).index_put((last,), final)
    columns = {"reward": Column(numbers(n), "step"), "old_value": Column(value, "step"),
               "old_next_value": Column(following, "step"), "terminated": Column(ended, "episode"),
               "truncated": Column(~ended, "episode"), "kind": Column(torch.zeros(e).long(), "episode", None, ("rollout",)),
               "unfinished": Column(torch.arange(e) == 2, "episode")}  # fmt: skip
    one = torch.arange(e + 1)
    return Episodes({"turn": offsets_of(torch.tensor(lengths)), "episode": one, "group": one}, columns)


def by_hand(episodes: Episodes, gamma: float, lam: float) -> tuple[list[float], list[float]]:
    """GAE and discounted returns, backwards through each fragment: after a terminated step nothing, else V(s')."""
    advantages: list[float] = []
    returns: list[float] = []
    start = 0
    for length, over in zip(episodes.lengths().tolist(), episodes["terminated"].tolist(), strict=True):
        reward, value, following = (
            episodes[name][start : start + length].tolist() for name in ("reward", "old_value", "old_next_value")
        )
        a, g = 0.0, 0.0 if over or not length else following[-1]
        mine: list[float] = []
        sums: list[float] = []
        for t in reversed(range(length)):
            after = 0.0 if over and t == length - 1 else following[t]
            delta = reward[t] + gamma * after - value[t]
            a = delta + gamma * lam * a
            g = reward[t] + gamma * g
            mine.insert(0, a)
            sums.insert(0, g)
        advantages, returns, start = [*advantages, *mine], [*returns, *sums], start + length
    return advantages, returns


@pytest.mark.parametrize("lam", [0.0, LAM, 1.0])
@pytest.mark.parametrize("gamma", [0.0, GAMMA, 1.0])
def test_advantages_and_returns_are_the_recursion(gamma: float, lam: float) -> None:
    e = fragments()
    advantages, returns = by_hand(e, gamma, lam)
    assert GeneralisedAdvantage(gamma, lam)(e, {}).tolist() == pytest.approx(advantages, abs=1e-12)
    value = e["old_value"].tolist()
    expected = [a + v for a, v in zip(advantages, value, strict=True)]
    assert ValueTarget(gamma, lam)(e, {}).tolist() == pytest.approx(expected, abs=1e-12)
    assert DiscountedReturn(gamma)(e, {}).tolist() == pytest.approx(returns, abs=1e-12)


def test_small_numbers() -> None:
    """Two steps of reward 1, values 10 and 20, V of the state after them 30, gamma 1/2."""
    e = fragments([2], [False]).with_columns(
        "step", reward=torch.ones(2), old_value=torch.tensor([10.0, 20.0]), old_next_value=torch.tensor([20.0, 30.0])
    )
    ended = e.with_columns("episode", terminated=torch.tensor([True]), truncated=torch.tensor([False]))
    assert DiscountedReturn(0.5)(e, {}).tolist() == [1 + 0.5 * (1 + 0.5 * 30), 1 + 0.5 * 30]
    assert DiscountedReturn(0.5)(ended, {}).tolist() == [1.5, 1.0]
    assert GeneralisedAdvantage(0.5, 0.0)(e, {}).tolist() == [1 + 0.5 * 20 - 10, 1 + 0.5 * 30 - 20]
    assert GeneralisedAdvantage(0.5, 0.0)(ended, {}).tolist() == [1 + 0.5 * 20 - 10, 1 - 20]
    assert GeneralisedAdvantage(0.5, 0.5)(ended, {}).tolist() == [1 - 0.25 * 19, -19]


def test_lambda_one_is_the_return_less_the_value() -> None:
    e = fragments()
    expected = DiscountedReturn(GAMMA)(e, {}) - e["old_value"]
    torch.testing.assert_close(GeneralisedAdvantage(GAMMA, 1.0)(e, {}), expected)
    torch.testing.assert_close(ValueTarget(GAMMA, 1.0)(e, {}), DiscountedReturn(GAMMA)(e, {}))


def test_an_episode_cut_in_two_has_the_returns_of_the_whole() -> None:
    """Where the value of the state that it was cut at is the true rest, a cut changes nothing."""
    whole = fragments([6], [True])
    returns = DiscountedReturn(GAMMA)(whole, {})
    for at in range(1, 6):
        following = whole["old_next_value"].clone()
        following[at - 1] = returns[at]
        columns = {n: Column(whole[n], "step") for n in ("reward", "old_value")} | {
            "old_next_value": Column(following, "step"),
            "terminated": Column(torch.tensor([False, True]), "episode"),
            "truncated": Column(torch.tensor([True, False]), "episode"),
        }
        one = torch.arange(3)
        cut = Episodes({"turn": torch.tensor([0, at, 6]), "episode": one, "group": one}, columns)
        torch.testing.assert_close(DiscountedReturn(GAMMA)(cut, {}), returns)


def test_monte_carlo_without_a_critic_stops_at_the_cut() -> None:
    e = fragments().without("old_value", "old_next_value")
    zero = e.with_columns("step", old_next_value=torch.zeros(e.count("step")), old_value=torch.zeros(e.count("step")))
    assert DiscountedReturn(GAMMA)(e, {}).tolist() == pytest.approx(by_hand(zero, GAMMA, 1.0)[1])


def test_a_token_policy_bootstraps_on_the_value_of_its_last_step() -> None:
    e = fragments().without("old_next_value")
    expected = torch.where(e["truncated"], e["old_value"][e.lengths().cumsum(0) - 1], 0.0)
    assert torch.equal(bootstrap_of(e, e["old_value"]), expected)
    assert not bootstrap_of(e.without("truncated"), e["old_value"]).any()


def test_nothing_follows_a_step_that_terminated_at_the_time_limit() -> None:
    """Some environments say both: then it is over."""
    e = fragments().with_columns("episode", truncated=torch.ones(6, dtype=torch.bool))
    assert GeneralisedAdvantage(GAMMA, LAM)(e, {}).tolist() == pytest.approx(by_hand(fragments(), GAMMA, LAM)[0])


def test_outcomes_arrive_at_the_last_step() -> None:
    e = fragments().with_columns("episode", outcome=torch.arange(6.0) + 1)
    placed = [0, 0, 1, 2, 0, 0, 0, 3, 0, 4, 5, 0, 0, 0, 0, 6]
    assert step_rewards(e, "outcome").tolist() == placed
    returns = DiscountedReturn(0.5, "outcome")(e.without("old_next_value"), {}).tolist()
    assert returns == [0.25, 0.5, 1, 2, 0.375, 0.75, 1.5, 3, 2, 4, 5, 0.375, 0.75, 1.5, 3, 6]


def test_fragments_without_steps_shift_nothing() -> None:
    """Masked steps are taken out before: a fragment may be left with none, or without its last."""
    e = fragments()
    keep = torch.ones(16, dtype=torch.bool)
    keep[[3, 15]] = False
    left = e.select(keep, "step")
    assert left.lengths().tolist() == [3, 0, 4, 2, 1, 4]
    found, short = gae_of(left, GAMMA, LAM)[0], by_hand(left, GAMMA, LAM)[0]
    assert found.tolist() == pytest.approx(short)
    assert continues(left).tolist() == [1, 1, 0, 1, 1, 1, 1, 1, 0, 0, 1, 1, 1, 1]
    assert bootstrap_of(left, left["old_value"])[1] == 0


def test_continuation_is_zero_at_terminated_ends_only() -> None:
    assert continues(fragments()).tolist() == [1, 1, 0, 1, 1, 1, 1, 1, 1, 0, 0, 1, 1, 1, 1, 1]
    flat = Episodes.flat({"reward": torch.zeros(3)}, {"terminated": torch.tensor([True, False, True])})
    assert continues(flat).tolist() == [0, 1, 0]
    ragged = fragments([1, 1, 1], [True, False, True])
    assert continues(ragged).tolist() == continues(flat).tolist()


def test_whitening_is_over_all_steps() -> None:
    e = fragments()
    plain, _ = by_hand(e, GAMMA, LAM)
    mean = sum(plain) / len(plain)
    std = math.sqrt(sum((a - mean) ** 2 for a in plain) / (len(plain) - 1))
    found = GeneralisedAdvantage(GAMMA, LAM, BatchStd(1e-3))(e, {}).tolist()
    assert found == pytest.approx([(a - mean) / (std + 1e-3) for a in plain])
    equal = e.with_columns("step", reward=torch.full((16,), 0.3), old_value=torch.zeros(16))
    assert not GeneralisedAdvantage(0.0, LAM, BatchStd())(equal, {}).any()


def test_needs() -> None:
    assert GeneralisedAdvantage().needs.columns == ValueTarget().needs.columns == {"reward", "old_value"}
    assert DiscountedReturn(column="raw_reward").needs.columns == {"raw_reward"}
    assert not GeneralisedAdvantage(whiten=BatchStd()).needs.signals
