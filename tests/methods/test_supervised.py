"""Identity tests of otr and dft: at one position, from the gradient on its logits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.toys import gradient, toy_batch
from unipo.episodes import Episodes
from unipo.functional.quantities import measured
from unipo.methods.catalog import find
from unipo.objectives import Objective

V, Y = 5, 2
LOGITS = torch.tensor([0.3, -1.2, 0.8, 0.1, 1.5], dtype=torch.float64)


def demo(rows: int = 1, tokens: int = 1, seed: int = 0) -> Episodes:
    """Equal demonstrations of the token Y, each drawn another time."""
    made = Episodes.build([[Y] * tokens] * rows, [[0]] * rows, kind=["demo"] * rows)
    return made.with_columns("episode", draw=torch.arange(rows) + 1000 * seed)


def on_logits(objective: Objective, episodes: Episodes, logits: Tensor = LOGITS) -> Tensor:
    """Minus the gradient of the loss on the logits of each step [N, V], all of which have the same ones."""
    z = logits.expand(episodes.count("step"), V).clone().requires_grad_()
    signals = measured(sorted(objective.needs.signals), z, episodes)
    return -torch.autograd.grad(objective(episodes, signals), z)[0]


def otr(**settings: object) -> Objective:
    return find("otr").build(**settings).objective


def expected(kappa: float, wrong: float) -> Tensor:
    """(1 - wrong) q(y) (e_y - p) + wrong (q - p), q = softmax(logits / kappa)."""
    p, q = LOGITS.softmax(0), (LOGITS / kappa).softmax(0)
    right = torch.nn.functional.one_hot(torch.tensor(Y), V).double()
    return (1 - wrong) * q[Y] * (right - p) + wrong * (q - p)


@pytest.mark.parametrize("kappa", [0.7, 1.0, 1.3])
@pytest.mark.parametrize("wrong", [-0.1, 0.0, 0.4])
def test_expected_logit_gradient(kappa: float, wrong: float) -> None:
    torch.testing.assert_close(on_logits(otr(kappa=kappa, wrong=wrong), demo())[0], expected(kappa, wrong))


@pytest.mark.parametrize("wrong", [-0.3, 0.0, 0.5])
def test_at_kappa_one_otr_is_dft(wrong: float) -> None:
    """(1 - wrong) times, also with CHORD's probability weight; and DFT is the gradient of p(y)."""
    episodes = demo(tokens=2)
    dft = find("dft").build(mean="episode").objective
    torch.testing.assert_close(on_logits(otr(kappa=1.0, wrong=wrong), episodes), (1 - wrong) * on_logits(dft, episodes))
    z = LOGITS.clone().requires_grad_()
    (slope,) = torch.autograd.grad(z.softmax(0)[Y], z)
    torch.testing.assert_close(on_logits(dft, demo())[0], slope)
    chord = find("chord").build(token_weight="probability").objective.terms()[1][1]
    torch.testing.assert_close(
        on_logits(chord, demo(tokens=3)), on_logits(find("dft").build().objective, demo(tokens=3))
    )


def test_a_baseline_changes_nothing_at_kappa_one() -> None:
    """rho - b: right 1 - b, wrong beta - b: by linearity b times the gradient of sum q log pi, which is q - p = 0 at kappa 1."""
    for kappa, silent in ((1.0, True), (1.3, False)):
        every = otr(kappa=kappa, wrong=-0.1).terms()[1][1]
        found = on_logits(every, demo()).abs().max()
        assert (float(found) < 1e-15) is silent


def test_otr_over_its_share_is_sft() -> None:
    """wrong 0, divided by q(y): exactly the likelihood, and with draws in expectation."""
    sft = on_logits(find("sft").build().objective, demo())[0]
    q = (LOGITS / 1.3).softmax(0)[Y]
    torch.testing.assert_close(on_logits(otr(wrong=0.0), demo())[0] / q, sft)
    drawn = on_logits(otr(wrong=0.0, draws=8), demo(4000)).mean(0) * 4000 / q
    assert float((drawn - sft).abs().max()) < 0.03


@pytest.mark.parametrize("draws", [1, 8])
def test_draws_are_unbiased_with_covariance_over_k(draws: int) -> None:
    """20,000 rows: the mean gradient is the exact one, the covariance that of one draw (by enumeration) over K."""
    rows, kappa, wrong = 20_000, 1.3, -0.1
    found = on_logits(otr(draws=draws, kappa=kappa, wrong=wrong), demo(rows, seed=draws)) * rows
    exact, error = expected(kappa, wrong), found.std(0) / rows**0.5
    assert ((found.mean(0) - exact).abs() < 4 * error).all()
    p, q = LOGITS.softmax(0), (LOGITS / kappa).softmax(0)
    rho = torch.where(torch.arange(V) == Y, 1.0, wrong).double()
    one = rho[:, None] * (torch.eye(V, dtype=torch.float64) - p)
    covariance = one.T @ (q[:, None] * one) - torch.outer(exact, exact)
    measured_covariance = torch.cov(found.T)
    torch.testing.assert_close(
        measured_covariance, covariance / draws, atol=0.05 * float(covariance.max()) / draws, rtol=0.05
    )


def test_the_second_term_sharpens() -> None:
    """kappa > 1 and wrong < 0: it lowers the entropy to first order; kappa < 1 raises it; kappa = 1 leaves it."""
    z = LOGITS.clone().requires_grad_()
    p = z.softmax(0)
    (slope,) = torch.autograd.grad(-(p * p.log()).sum(), z)
    for kappa, sign in ((1.5, -1), (0.6, 1)):
        coefficient, every = otr(kappa=kappa, wrong=-0.2).terms()[1]
        assert float(coefficient) * float(on_logits(every, demo())[0] @ slope) * sign > 1e-4  # type: ignore[arg-type]


def test_cold_tokens() -> None:
    """q(y) -> 0: the gradient vanishes at kappa 1 or with wrong 0; otherwise wrong (q - p) stays."""
    cold = LOGITS - 60.0 * (torch.arange(V) == Y)
    for kappa, wrong in ((1.0, -0.1), (1.3, 0.0)):
        assert float(on_logits(otr(kappa=kappa, wrong=wrong), demo(), cold).abs().max()) < 1e-15
    left = on_logits(otr(), demo(), cold)[0]
    torch.testing.assert_close(left, -0.1 * ((cold / 1.3).softmax(0) - cold.softmax(0)))


def test_weights_and_count_form() -> None:
    """- (n_y / K) log pi(y) - wrong sum_{a != y} (n_a / K) log pi(a), n counted from the same draws."""
    episodes = demo()
    signals = measured(["logp", "drawn:1.3:8", "drawn_share:1.3:8"], LOGITS[None], episodes)
    share, logp = signals["drawn_share:1.3:8"][0], LOGITS.log_softmax(0)
    others = signals["drawn:1.3:8"][0] - share * logp[Y]
    loss = otr(draws=8)(episodes, signals)
    torch.testing.assert_close(loss, -share * logp[Y] + 0.1 * others)
    assert float(share * 8) == round(float(share * 8)), "eighths"


def test_equal_weights() -> None:
    """Long demonstrations: `episode` gives each the same weight, `token` each of its tokens."""
    episodes = Episodes.build([[Y], [Y] * 3], [[0]] * 2, kind=["demo"] * 2)
    by_episode, by_token = (on_logits(otr(mean=m), episodes).abs().sum(1) for m in ("episode", "token"))
    torch.testing.assert_close(by_episode / by_episode[0], torch.tensor([1, 1 / 3, 1 / 3, 1 / 3], dtype=torch.float64))
    torch.testing.assert_close(by_token / by_token[0], torch.ones(4, dtype=torch.float64))
    batch = toy_batch()
    logp = torch.full((batch.count("step"),), -1.0, dtype=torch.float64)
    shown = batch.expand(batch.category("kind", "demo"))
    assert torch.equal(gradient(find("dft").build().objective, batch, logp) != 0, shown)
