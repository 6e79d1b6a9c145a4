"""What is evaluated once on the whole batch: the same value and gradients, whatever rows a term claims and steps are masked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from unipo.episodes import Column, Episodes, offsets_of
from unipo.learner import coefficients
from unipo.objectives import (
    AdvantageWeight,
    BatchStd,
    Bellman,
    Bonus,
    ClipMask,
    DiscountedReturn,
    GeneralisedAdvantage,
    KLPenalty,
    Likelihood,
    Needs,
    Objective,
    PolicyGradient,
    Regression,
    Signals,
    TokenMean,
    TokenRatio,
    ValueRegression,
    ValueTarget,
    Whitened,
    demonstrations,
    hoisted,
    rollouts,
)
from unipo.objectives.advantages import Advantage
from unipo.objectives.base import Category
from unipo.objectives.hoisting import Stored

LENGTHS = [3, 1, 4, 2, 2, 1]


def batch(masked: Sequence[int] = (), kinds: Sequence[str] = ("rollout",) * 6) -> Episodes:
    """Fragments with random columns; the rows of no rollout have NaN where only rollouts have a number."""
    generator = torch.Generator().manual_seed(3)
    n, e = sum(LENGTHS), len(LENGTHS)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    step = {
        k: normal(n) for k in ("reward", "old_value", "old_next_value", "behavior_logp", "reference_logp", "next_q")
    }
    step["target_q"] = normal(n, 2)
    ended = torch.arange(e) % 2 == 0
    columns = {name: Column(v, "step") for name, v in step.items()}
    columns |= {"terminated": Column(ended, "episode"), "truncated": Column(~ended, "episode"),
                "discount": Column(torch.full((e,), 0.9, dtype=torch.float64), "episode"),
                "policy_version": Column(torch.arange(e), "episode")}  # fmt: skip
    one = torch.arange(e + 1)
    made = Episodes({"turn": offsets_of(torch.tensor(LENGTHS)), "episode": one, "group": one}, columns)
    made = made.with_columns("episode", kind=list(kinds), source=["fresh", "old", "fresh", "old", "old", "fresh"])
    foreign = made.expand(~made.category("kind", "rollout"))
    for name in ("reward", "old_value", "old_next_value"):
        made = made.with_columns("step", **{name: torch.where(foreign, torch.nan, made[name])})
    if masked:
        keep = torch.ones(n, dtype=torch.bool)
        keep[list(masked)] = False
        made = made.with_columns("step", mask=keep)
    return made


def signals_of(episodes: Episodes) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(4)
    n = episodes.count("step")
    made = {k: torch.randn(n, generator=generator, dtype=torch.float64) for k in ("logp", "entropy", "value")}
    return {**made, "q": torch.randn(n, 2, generator=generator, dtype=torch.float64)}


PPO = PolicyGradient(advantage=GeneralisedAdvantage(0.9, 0.8, BatchStd()), weight=TokenRatio(), mask=ClipMask(),
                     aggregate=TokenMean()) + 0.7 * ValueRegression(target=ValueTarget(0.9, 0.8), clip=0.3)  # fmt: skip
OBJECTIVES: dict[str, Objective] = {
    "ppo": PPO + 0.01 * Bonus(),
    "nested": PolicyGradient(advantage=Whitened(DiscountedReturn(0.9)), aggregate=TokenMean()),
    "rows by source": PPO + 0.3 * PolicyGradient(advantage=DiscountedReturn(0.5), aggregate=TokenMean(),
                                                 rows=rollouts & Category("old", "source")),
    "critic": Regression(target=Bellman(), rows=Category("fresh", "source")) + KLPenalty(),
    "weights of their own": PolicyGradient(advantage=Advantage(), weight=AdvantageWeight(), aggregate=TokenMean()),
    "twice the same": PPO + PPO,
    "with demonstrations": PPO + 0.2 * Likelihood(rows=demonstrations),
}  # fmt: skip
BATCHES: dict[str, Callable[[], Episodes]] = {
    "plain": batch,
    "masked": lambda: batch(masked=[1, 3, 9, 12]),
    "kinds": lambda: batch(kinds=["rollout", "demo", "rollout", "rollout", "demo", "rollout"]),
    "both": lambda: batch([0, 3, 9], ["rollout", "demo", "rollout", "rollout", "demo", "rollout"]),
}


@pytest.mark.parametrize("data", BATCHES)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_hoisting_changes_neither_value_nor_gradients(name: str, data: str) -> None:
    objective, episodes = OBJECTIVES[name], BATCHES[data]()
    signals = signals_of(episodes)
    before = coefficients(objective, episodes, signals)
    after_objective, stored = hoisted(objective, episodes)
    for form in (stored, stored.as_steps()):
        after = coefficients(after_objective, form, signals)
        torch.testing.assert_close(after.loss, before.loss, rtol=1e-12, atol=1e-14)
        assert after.total.keys() == before.total.keys()
        assert [t.title for t in after.terms] == [t.title for t in before.terms]
        for one, other in zip(after.terms, before.terms, strict=True):
            assert one.coefficient == other.coefficient
            for signal, gradient in other.gradient.items():
                torch.testing.assert_close(one.gradient[signal], gradient, rtol=1e-12, atol=1e-14)


def test_minibatches_of_shuffled_steps_read_the_advantages_of_the_whole_batch() -> None:
    """Without hoisting each step would be an episode of its own, and its return its reward."""
    episodes = batch()
    objective, stored = hoisted(PolicyGradient(advantage=DiscountedReturn(0.9), aggregate=TokenMean()), episodes)
    whole = DiscountedReturn(0.9)(episodes, {})
    chosen = torch.tensor([7, 0, 12, 4])
    part = stored.as_steps().select(chosen, "group")
    found = coefficients(objective, part, {"logp": torch.zeros(4, dtype=torch.float64)}).total["logp"]
    torch.testing.assert_close(found, -whole[chosen] / 4)


def test_scales_are_those_of_the_whole_batch() -> None:
    episodes = batch()
    objective, stored = hoisted(OBJECTIVES["ppo"], episodes)
    (name,) = [n for n in stored.columns if n.startswith("hoisted/0/")]
    assert stored[name].mean().item() == pytest.approx(0, abs=1e-12)
    assert stored[name].std().item() == pytest.approx(1, abs=1e-4)
    assert len([n for n in stored.columns if n.startswith("hoisted/")]) == 2, "the advantage and the target"
    part = stored.as_steps().select(torch.tensor([2, 3]), "group")
    found = coefficients(objective, part, {k: v[:2] for k, v in signals_of(episodes).items()})
    assert torch.equal(found.terms[0].facts["advantage"], stored[name][[2, 3]])


def test_rows_of_nobody_stay_without_a_number() -> None:
    episodes = BATCHES["both"]()
    _, stored = hoisted(PPO, episodes)
    (advantage,) = (stored[n] for n in stored.columns if n.startswith("hoisted/0/"))
    counted = episodes.expand(episodes.category("kind", "rollout")) & episodes["mask"]
    assert torch.equal(advantage.isnan(), ~counted)


@dataclass(frozen=True)
class ReadsLogp(Advantage):
    """An advantage that changes while a batch is trained on."""

    base: Advantage = DiscountedReturn(0.9)

    def own_needs(self) -> Needs:
        return Needs.of(signals="logp")

    def __call__(self, episodes: Episodes, signals: Signals) -> Tensor:
        return self.base(episodes, signals) - signals["logp"]


def test_what_reads_a_signal_is_evaluated_every_time_and_what_is_in_it_once() -> None:
    episodes = batch(masked=[2])
    objective = PolicyGradient(advantage=ReadsLogp(), aggregate=TokenMean())
    after, stored = hoisted(objective, episodes)
    ((_, term),) = after.terms()
    assert isinstance(term, PolicyGradient)
    assert isinstance(term.advantage, ReadsLogp)
    assert isinstance(term.advantage.base, Stored)
    signals = signals_of(episodes)
    for scale in (1.0, 2.0):
        now = {k: scale * v for k, v in signals.items()}
        torch.testing.assert_close(coefficients(after, stored, now).total["logp"],
                                   coefficients(objective, episodes, now).total["logp"])  # fmt: skip


def test_turns_titles_and_coefficients_stay() -> None:
    objective = PPO + 0.3 * Regression(every=2, name="critic")
    after, _ = hoisted(objective, batch())
    assert [(c, t.title, t.every) for c, t in after.terms()] == [(c, t.title, t.every) for c, t in objective.terms()]
    assert len(after.at(0).terms()) == 2
    assert after.needs.signals == objective.needs.signals
    assert "old_value" in after.needs.columns, "the clipped value regression reads it still"
    assert "discount" not in after.needs.columns


def test_hoisting_twice_is_hoisting_once() -> None:
    episodes = batch()
    once, stored = hoisted(PPO, episodes)
    twice, again = hoisted(once, stored)
    assert twice.terms() == once.terms()
    assert again.columns.keys() == stored.columns.keys()
