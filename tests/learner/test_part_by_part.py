"""One pass over micro-batches where the coefficients of each depend on its own signals alone; otherwise two."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import Tensor, nn

from unipo.episodes import Episodes
from unipo.learner import Learner, LearnerSettings
from unipo.methods import policy_gradients, preferences
from unipo.objectives import Objective


class Bigram:
    """logp of a table [token] of logits; counts how many episodes it was asked for."""

    emits = frozenset({"logp", "entropy"})
    scalar_signals = True

    def __init__(self) -> None:
        self.table = nn.Parameter(torch.linspace(-1, 1, 9, dtype=torch.float64))
        self.asked = 0

    def signals(self, episodes: Episodes, names: Sequence[str]) -> dict[str, Tensor]:
        self.asked += len(episodes)
        logp = torch.log_softmax(self.table, 0)
        made = {"logp": logp[episodes["token"]], "entropy": -(logp.exp() * logp).sum().expand(episodes.count("step"))}
        return {name: made[name] for name in names}

    def total_lengths(self, episodes: Episodes) -> Tensor:
        return episodes.lengths()

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        yield "table", self.table


def rollouts() -> Episodes:
    return Episodes.build(
        [[1, 2, 3], [4], [5, 6], [7, 8, 1, 2], [3], [3, 4]], [[1]] * 6, [0, 0, 1, 1, 2, 2], kind=["rollout"] * 6,
        reward=[1.0, 0.0, 0.3, 0.7, 0.2, 0.9], behavior_logp=[[-2.0] * n for n in (3, 1, 2, 4, 1, 2)],
    )  # fmt: skip


def pairs() -> Episodes:
    return Episodes.build(
        [[1, 2, 3], [4], [5, 6], [7, 8, 1, 2]], [[1]] * 4, [0, 0, 1, 1], kind=["pair"] * 4, chosen=[True, False] * 2,
        reference_logp=[[-2.0] * n for n in (3, 1, 2, 4)],
    )  # fmt: skip


@pytest.mark.parametrize(
    ("objective", "episodes"),
    [(policy_gradients.grpo().objective, rollouts()), (policy_gradients.gspo().objective, rollouts()),
     (preferences.dpo().objective, pairs())],
)  # fmt: skip
def test_one_pass_gives_the_gradient_of_one_graph(objective: Objective, episodes: Episodes) -> None:
    found = {}
    for budget in (1000, 6):
        policy = Bigram()
        learner = Learner({"policy": policy}, LearnerSettings(token_budget=budget), monitor=("logp",))
        made = learner.gradient(episodes, objective)
        found[budget] = (policy.table.grad, made.coefficients.loss, made.signals["logp"])
        assert policy.asked == len(episodes), "each episode once"
        assert made.passes == 1
    for a, b in zip(*found.values(), strict=True):
        torch.testing.assert_close(a, b)


def test_a_group_that_is_cut_takes_two_passes() -> None:
    """Budget 3 cuts pairs apart: the coefficient of one side needs the log-probs of the other."""
    policy, whole = Bigram(), Bigram()
    made = Learner({"policy": policy}, LearnerSettings(token_budget=3)).gradient(pairs(), preferences.dpo().objective)
    Learner({"policy": whole}, LearnerSettings()).gradient(pairs(), preferences.dpo().objective)
    assert made.passes == 2
    torch.testing.assert_close(policy.table.grad, whole.table.grad)
