"""Annotation and updates with signals of several numbers per step: who is asked, for which rows, and what moves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from unipo.episodes import Column, Episodes, offsets_of
from unipo.learner import Learner, LearnerSettings, annotate, coefficients, ledger
from unipo.learner.ledger import gradient_mass
from unipo.objectives import Bonus, Needs, Objective, Regression, everything
from unipo.objectives.hoisting import Stored

LENGTHS = [3, 1, 2, 4]


def data(flat: bool = False) -> Episodes:
    generator = torch.Generator().manual_seed(0)
    n = sum(LENGTHS)
    step = {"x": torch.randn(n, 3, generator=generator, dtype=torch.float64),
            "y": torch.randn(n, generator=generator, dtype=torch.float64)}  # fmt: skip
    if flat:
        return Episodes.flat(step, kind="rollout")
    one = torch.arange(len(LENGTHS) + 1)
    offsets = {"turn": offsets_of(torch.tensor(LENGTHS)), "episode": one, "group": one}
    made = Episodes(offsets, {k: Column(v, "step") for k, v in step.items()})
    return made.with_columns("episode", kind="rollout")


class Toy(nn.Module):
    """q [N, 2], quantiles [N, 2, 3] and a scalar v, each of weights of its own; it counts who asked for what."""

    emits = frozenset({"q", "quantiles", "v", "logp"})

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        for name, size in (("w_q", 2), ("w_quantiles", 6), ("w_v", 1), ("w_logp", 1)):
            setattr(self, name, nn.Parameter(torch.randn(3, size, generator=generator, dtype=torch.float64)))
        self.asked: list[tuple[list[str], int]] = []

    def signals(self, episodes: Episodes, names: Sequence[str]) -> dict[str, Tensor]:
        self.asked.append((list(names), episodes.count("step")))
        shapes: dict[str, tuple[int, ...]] = {"q": (2,), "quantiles": (2, 3), "v": (), "logp": ()}
        return {n: torch.tanh(episodes["x"] @ getattr(self, f"w_{n}")).reshape(-1, *shapes[n]) for n in names}

    def total_lengths(self, episodes: Episodes) -> Tensor:
        return episodes.lengths()


def column(name: str) -> Needs:
    return Needs.of(columns=name)


# ---- annotation ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("budget", [1, 4, 5, 1000])
def test_columns_are_the_signals_whatever_the_micro_batches(budget: int, flat: bool) -> None:
    e, toy = data(flat), Toy()
    found = annotate(e, column("old_q old_quantiles old_v y"), {"old": toy}, budget)
    with torch.no_grad():
        expected = Toy().signals(e, ["q", "quantiles", "v"])
    for name, value in expected.items():
        made = found.column(f"old_{name}")
        assert made.level == "step"
        assert not made.values.requires_grad
        torch.testing.assert_close(made.values, value, rtol=1e-14, atol=1e-15)
    assert torch.equal(found["y"], e["y"])
    assert sum(n for _, n in toy.asked) == 10, "every step once"


def test_each_player_is_asked_once_for_all_its_columns() -> None:
    old, target = Toy(1), Toy(2)
    needs = column("old_q old_v target_q target_quantiles behavior_logp y kind")
    found = annotate(data(), needs, {"old": old, "target": target}, 1000)
    assert [sorted(names) for names, _ in old.asked] == [["q", "v"]]
    assert [sorted(names) for names, _ in target.asked] == [["q", "quantiles"]]
    assert not torch.equal(found["old_q"], found["target_q"])
    assert "behavior_logp" not in found, "nobody is called behavior"
    annotate(found, needs, {"old": old, "target": target}, 1000)
    assert len(old.asked) == len(target.asked) == 1, "what is there is not asked for again"


def test_the_signal_is_all_that_follows_the_first_underscore() -> None:
    class Named(Toy):
        emits = frozenset({"next_value"})

        def signals(self, episodes: Episodes, names: Sequence[str]) -> dict[str, Tensor]:
            assert list(names) == ["next_value"]
            return {"next_value": episodes["y"]}

    e = data()
    assert torch.equal(
        annotate(e, column("old_next_value"), {"old": Named(), "next": Toy()}, 99)["old_next_value"], e["y"]
    )


def test_only_rows_without_a_number_are_computed_and_known_numbers_stay() -> None:
    e, toy = data(), Toy()
    known = torch.full((10,), 7.0, dtype=torch.float64)
    known[[3, 8]] = torch.nan
    found = annotate(e.with_columns("step", old_v=known), column("old_v"), {"old": toy}, 1000)
    with torch.no_grad():
        value = Toy().signals(e, ["v"])["v"]
    expected = known.clone()
    expected[[3, 8]] = value[[3, 8]]
    assert torch.equal(found["old_v"], expected), "the neighbours of a missing step keep what was logged"
    assert toy.asked == [(["v"], 5)], "episodes 1 and 3"


def test_a_vector_with_a_missing_entry_is_computed_whole() -> None:
    e = data()
    known = torch.full((10, 2), 7.0, dtype=torch.float64)
    known[4, 1] = torch.nan
    found = annotate(e.with_columns("step", old_q=known), column("old_q"), {"old": Toy()}, 1000)["old_q"]
    with torch.no_grad():
        value = Toy().signals(e, ["q"])["q"]
    assert torch.equal(found[4], value[4])
    assert (found[torch.arange(10) != 4] == 7).all()


def test_columns_that_miss_different_rows_are_asked_for_together() -> None:
    e, toy = data(), Toy()
    v = torch.full((10,), 7.0, dtype=torch.float64).index_fill(0, torch.tensor([0]), torch.nan)
    q = torch.full((10, 2), 8.0, dtype=torch.float64).index_fill(0, torch.tensor([9]), torch.nan)
    found = annotate(e.with_columns("step", old_v=v, old_q=q), column("old_v old_q"), {"old": toy}, 1000)
    assert toy.asked == [(["q", "v"], 7)]
    assert (found["old_v"] == 7).tolist() == [False] + [True] * 9
    assert (found["old_q"] == 8).all(1).tolist() == [True] * 9 + [False]


def test_annotation_leaves_its_input_alone() -> None:
    known = torch.full((10,), torch.nan, dtype=torch.float64)
    e = data().with_columns("step", old_v=known)
    annotate(e, column("old_v"), {"old": Toy()}, 1000)
    assert known.isnan().all()


def test_a_batch_of_no_episodes_stays_one() -> None:
    none = data().select(torch.zeros(4, dtype=torch.bool))
    e = none.with_columns("step", old_v=torch.zeros(0), old_q=torch.zeros(0, 2))
    assert len(annotate(e, column("old_v old_q"), {"old": Toy()}, 10)) == 0


# ---- the gradient ----------------------------------------------------------------------------------------------------
CRITIC = Regression(signal="q", target=Stored("y"))
OBJECTIVES: dict[str, Objective] = {
    "ensemble": CRITIC,
    "quantiles": Regression(signal="quantiles", target=Stored("y")),
    "all": CRITIC + 0.3 * Regression(signal="quantiles", target=Stored("y")) + 2.0 * Bonus(signal="v"),
    "linear": Bonus(signal="v") + 0.5 * Bonus(signal="logp"),
    "linear in an ensemble": Bonus(signal="q") + 0.5 * Bonus(signal="v"),
}


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("budget", [1, 4, 1000])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_any_split_gives_the_gradient_of_one_graph(name: str, budget: int, flat: bool) -> None:
    e, toy, plain = data(flat), Toy(), Toy()
    objective = OBJECTIVES[name]
    update = Learner({"toy": toy}, LearnerSettings(token_budget=budget)).gradient(e, objective)
    signals = plain.signals(e, sorted(objective.needs.signals))
    objective(e, signals).backward()
    for (label, p), (_, q) in zip(toy.named_parameters(), plain.named_parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), label
        if p.grad is not None and q.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-12, atol=1e-14)
    assert update.coefficients.loss.item() == pytest.approx(objective(e, signals).item())
    for label, value in signals.items():
        torch.testing.assert_close(update.signals[label], value.detach())


def test_means_of_signals_and_of_their_members() -> None:
    e, toy = data(), Toy()
    update = Learner({"toy": toy}).update(e, CRITIC)
    with torch.no_grad():
        q = Toy().signals(e, ["q"])["q"]
    assert update.means()["q"] == pytest.approx(q.mean().item())
    assert update.means()["q/1"] == pytest.approx(q[:, 1].mean().item())


def test_the_mass_of_a_step_is_summed_over_the_ensemble() -> None:
    e = data()
    update = Learner({"toy": Toy()}).gradient(e, 2.0 * CRITIC)
    with torch.no_grad():
        q = Toy().signals(e, ["q"])["q"]
    mass = 2.0 * (q - e["y"][:, None]).abs().sum(1) / 10
    torch.testing.assert_close(gradient_mass(update).double(), mass, rtol=1e-6, atol=1e-8)
    columns = ledger(update, 0)
    assert columns["ledger/term/Regression/gradient_share"] == pytest.approx(1)
    assert columns["ledger/term/Regression/tokens"] == 10
    assert columns["ledger/kind/rollout/tokens"] == 10


def test_a_step_is_active_where_any_member_has_a_coefficient() -> None:
    e = data()
    q = e["y"][:, None].expand(10, 2).clone()
    q[3, 1] += 1
    q[7, 0] -= 1
    found = coefficients(CRITIC, e, {"q": q})
    assert found.active().nonzero().squeeze(1).tolist() == [3, 7]
    assert not found.silent
    assert coefficients(CRITIC, e, {"q": e["y"][:, None].expand(10, 2)}).silent


# ---- terms that take turns -------------------------------------------------------------------------------------------
def state(learner: Learner, parameter: nn.Parameter) -> dict[str, Any]:
    return {k: v.clone() for k, v in learner.optimizer.state[parameter].items()}


@pytest.mark.parametrize("budget", [1, 4, 1000])
def test_a_delayed_term_leaves_its_weights_and_their_moments_alone(budget: int) -> None:
    """Weight decay and momentum too: as if there had been no update."""
    objective = CRITIC + Bonus(signal="v", every=3, rows=everything)
    toy = Toy()
    settings = LearnerSettings(token_budget=budget, weight_decay=0.1, learning_rate=1e-2)
    learner = Learner({"toy": toy}, settings)
    weights: dict[str, nn.Parameter] = dict(toy.named_parameters())
    counts = []
    for _ in range(7):
        before = {k: p.detach().clone() for k, p in weights.items()}
        moments = state(learner, weights["w_v"])
        learner.update(data(), objective)
        due = learner.updates % 3 == 0
        assert not torch.equal(weights["w_q"], before["w_q"])
        assert torch.equal(weights["w_v"], before["w_v"]) == (not due)
        if not due:
            assert all(torch.equal(v, moments[k]) for k, v in state(learner, weights["w_v"]).items())
        counts.append(int(state(learner, weights["w_v"]).get("step", torch.zeros(()))))
    assert counts == [0, 0, 1, 1, 1, 2, 2]
    assert int(state(learner, weights["w_q"])["step"]) == 7
    assert not state(learner, weights["w_logp"])


@pytest.mark.parametrize("budget", [1, 1000])
def test_an_update_in_which_nothing_is_due_moves_nothing(budget: int) -> None:
    toy = Toy()
    learner = Learner({"toy": toy}, LearnerSettings(token_budget=budget, weight_decay=0.1), monitor=("logp",))
    before = [p.detach().clone() for p in toy.parameters()]
    made = [learner.update(data(), Regression(signal="q", target=Stored("y"), every=2))]
    unmoved = [torch.equal(p, b) for p, b in zip(toy.parameters(), before, strict=True)]
    made.append(learner.update(data(), Regression(signal="q", target=Stored("y"), every=2)))
    assert all(unmoved)
    assert [u.grad_norm > 0 for u in made] == [False, True]
    assert learner.updates == 2
    assert ledger(made[0], 0)["ledger/kind/rollout/tokens"] == 10
