"""Every loss on scores of answers is a policy gradient: a method joins by having a term with a `score` in the catalog.

    dL = - sum over answers y of A(y) * ds(y),   A(y) = - dL / ds(y)            (pairs: A_w = - link'(m), A_l = link'(m))

and s(y) is a sum over tokens, so that each token has the advantage of its answer times ds / dlogp of the token. Both factors
are measured here by central differences, without the autograd that the learner uses.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import pytest
import torch
from torch import Tensor

from tests.toys import ToyPolicy, gradient, toy_batch
from unipo.episodes import Episodes
from unipo.learner import Learner, LearnerSettings
from unipo.methods.catalog import METHODS
from unipo.methods.preferences import cdpo, dpo, ipo, rdpo, simpo, slic
from unipo.objectives import Advantage, Needs, Objective, Pairwise, Part, PolicyGradient, Signals, Total
from unipo.recipe import Recipe

STEP = 1e-5


@dataclass(frozen=True)
class Probe(Part):
    """A score that is a column."""

    def own_needs(self) -> Needs:
        return Needs.of(columns="probe")

    def __call__(self, episodes: Episodes, signals: Signals) -> Tensor:
        return episodes["probe"]


@dataclass(frozen=True)
class GivenAdvantage(Advantage):
    """A step's advantage as a column."""

    def __call__(self, episodes: Episodes, signals: Signals) -> Tensor:
        return episodes["given_advantage"]


def scored() -> dict[str, Objective]:
    """Terms on scores of answers that are made of log-probs, by method and place: those that tokens of toys can feed."""
    batch, found = toy_batch(), dict[str, Objective]()
    for method in METHODS:
        for i, (_, term) in enumerate(method.build().objective.terms()):
            readable = term.needs.signals == {"logp"} and term.needs.columns <= set(batch.columns)
            if readable and "score" in {f.name for f in fields(term)}:
                found[f"{method.slug} {i}"] = term
    return found


TERMS = scored()


def advantages(term: Objective, batch: Episodes, logp: Tensor) -> Tensor:
    """[E]: A(y) = - dL / ds(y) at the scores of `logp`."""
    score = torch.zeros(len(batch), dtype=torch.float64)
    mine = term.rows(batch)
    score[mine] = scores(term, batch, logp)
    probed, found = term.but(score=Probe()), torch.zeros_like(score)
    for i in mine.nonzero().squeeze(1).tolist():
        loss = []
        for h in (STEP, -STEP):
            moved = score.clone()
            moved[i] += h
            loss.append(float(probed(batch.with_columns("episode", probe=moved), {"logp": logp})))
        found[i] = -(loss[0] - loss[1]) / (2 * STEP)
    return found


def scores(term: Objective, batch: Episodes, logp: Tensor) -> Tensor:
    """Scores of the rows that the term claims."""
    claimed, steps = term.claimed(batch)
    return term.score(claimed, {"logp": logp if steps is None else logp[steps]}).detach()  # type: ignore[attr-defined]


def slopes(term: Objective, batch: Episodes, logp: Tensor) -> Tensor:
    """[N]: ds(y) / dlogp of each token of the answers that the term claims, 0 elsewhere."""
    found, position, mine = torch.zeros_like(logp), batch.position(), term.rows(batch)
    for at in range(int(position.max()) + 1):
        here = (position == at).double()
        up, down = (scores(term, batch, logp + h * here) for h in (STEP, -STEP))
        change = torch.zeros(len(batch), dtype=torch.float64).masked_scatter(mine, (up - down) / (2 * STEP))
        found += here * batch.expand(change)
    return found


def flat(objective: Objective, batch: Episodes) -> Tensor:
    learner = Learner({"policy": ToyPolicy()}, LearnerSettings(token_budget=10_000))
    learner.gradient(batch, objective)
    return torch.cat(
        [torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in learner.parameters()]
    )


@pytest.mark.parametrize("name", TERMS)
def test_the_gradient_is_that_of_a_policy_gradient(name: str) -> None:
    term, batch = TERMS[name], toy_batch(seed=1)
    logp = ToyPolicy().signals(batch, ["logp"])["logp"].detach()
    worth = advantages(term, batch, logp)
    canonical = PolicyGradient(advantage=GivenAdvantage(), aggregate=Total(), rows=term.rows)
    given = batch.with_columns("step", given_advantage=batch.expand(worth) * slopes(term, batch, logp))
    expected = flat(term, batch)
    assert float(expected.norm()) > 0
    torch.testing.assert_close(flat(canonical, given), expected, rtol=1e-6, atol=1e-8)
    if isinstance(term, Pairwise):
        balance = batch.reduce(worth, to="group", level="episode")
        torch.testing.assert_close(balance, torch.zeros_like(balance), atol=1e-8, rtol=0)
        won = batch.reduce(torch.where(batch["chosen"], worth, 0.0), to="group", level="episode")
        assert float(won.abs().max()) > 0


def test_methods_of_pairs_are_on_the_bridge() -> None:
    named = {name.split()[0] for name in TERMS}
    assert {
        "dpo",
        "cdpo",
        "ipo",
        "slic",
        "slic-norm",
        "simpo",
        "orpo",
        "kto",
        "rdpo-robust",
        "rpo",
        "vpo",
        "hypo",
    } <= named


MARGIN = 0.8
SIGMOID = float(torch.sigmoid(torch.tensor(-MARGIN, dtype=torch.float64)))


@pytest.mark.parametrize(
    ("recipe", "pull"),
    [
        (dpo(beta=0.4), 0.4 * SIGMOID),
        (cdpo(beta=0.4, label_smoothing=0.1), 0.4 * (SIGMOID - 0.1)),
        (rdpo(beta=0.4, flipped=0.1), 0.4 * (SIGMOID + 0.1 / 0.8)),
        (ipo(beta=0.2), 2 * (1 / (2 * 0.2) - MARGIN / 0.4)),
        (slic(beta=0.4, margin=1.0), 0.4),
        (simpo(beta=0.4, margin=0.0), 0.4 * SIGMOID),
    ],
)
def test_advantages_by_hand(recipe: Recipe, pull: float) -> None:
    """One pair of single tokens whose margin beta * Delta is 0.8: A_w = -A_l as in the paper."""
    pair = Episodes.build([[0], [1]], [[0]] * 2, [0, 0], kind=["pair"] * 2, chosen=[True, False])
    pair = pair.with_columns("step", reference_logp=torch.zeros(2, dtype=torch.float64))
    logp = torch.tensor([-1.0, -1.0 - MARGIN / 0.4], dtype=torch.float64)
    found = -gradient(recipe.objective, pair, logp)
    torch.testing.assert_close(found, torch.tensor([pull, -pull], dtype=torch.float64))
