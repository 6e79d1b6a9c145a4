"""Densities against quadrature, samples against probabilities, closed forms against enumeration."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor

from unipo.policies.distributions import (
    Beta,
    Categorical,
    Deterministic,
    Distribution,
    Gaussian,
    GaussianMixture,
    MultiCategorical,
    SquashedGaussian,
)

CONTINUOUS: list[Any] = [
    Gaussian(1),
    SquashedGaussian(1),
    Beta(1),
    GaussianMixture(1, 3, squashed=False),
    GaussianMixture(1, 3, squashed=True),
]
ALL: list[Any] = [*CONTINUOUS, Gaussian(3), SquashedGaussian(3), Beta(3), GaussianMixture(3, 2), Categorical(4),
                  MultiCategorical((2, 3, 2))]  # fmt: skip


def name(distribution: Distribution) -> str:
    return str(distribution)


def raws(distribution: Distribution, n: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 0.7 * torch.randn(n, distribution.parameters, generator=generator, dtype=torch.float64)


def noises(distribution: Distribution, n: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, distribution.noise, generator=generator, dtype=torch.float64)


def grid(distribution: Distribution) -> tuple[Tensor, Tensor]:
    """(actions [M, 1], the width of each cell [M]) that cover the action space, by midpoints."""
    if isinstance(distribution, Gaussian) or getattr(distribution, "squashed", True) is False:
        edges = torch.linspace(-40, 40, 80_001, dtype=torch.float64)
    else:  # finer towards the bounds, where squashed densities rise
        edges = torch.linspace(-15, 15, 40_001, dtype=torch.float64).tanh()
    return ((edges[1:] + edges[:-1]) / 2)[:, None], edges.diff()


# ---- density -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("distribution", CONTINUOUS, ids=name)
def test_a_density_integrates_to_one(distribution: Any) -> None:
    action, width = grid(distribution)
    for raw in raws(distribution, 3):
        density = distribution.logp(raw.expand(len(action), -1), action).exp()
        assert float((density * width).sum()) == pytest.approx(1, abs=2e-4)


@pytest.mark.parametrize("distribution", [Categorical(4), MultiCategorical((2, 3, 2))], ids=name)
def test_probabilities_sum_to_one(distribution: Any) -> None:
    sizes = getattr(distribution, "sizes", (distribution.parameters,))
    action = torch.cartesian_prod(*(torch.arange(n) for n in sizes))
    logp = distribution.logp(raws(distribution, 1).expand(len(action), -1), action)
    assert float(logp.exp().sum()) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("distribution", ALL, ids=name)
def test_the_log_prob_of_a_sample_is_that_of_its_action(distribution: Any) -> None:
    raw, noise = raws(distribution, 64), noises(distribution, 64)
    action, logp = distribution.sample_with_logp(raw, noise)
    assert action.shape == (64, *distribution.action_shape)
    assert torch.equal(action, distribution.sample(raw, noise))
    assert torch.allclose(logp, distribution.logp(raw, action), atol=1e-8)
    assert logp.shape == (64,)


def test_log_prob_by_hand() -> None:
    raw = torch.tensor([[0.5, math.log(2.0)]], dtype=torch.float64)
    at = torch.tensor([[0.25]], dtype=torch.float64)
    normal = stats.norm(0.5, 2.0)
    assert float(Gaussian(1).logp(raw, at)) == pytest.approx(normal.logpdf(0.25), abs=1e-12)
    squashed = normal.logpdf(math.atanh(0.25)) - math.log(1 - 0.25**2)
    assert float(SquashedGaussian(1).logp(raw, at)) == pytest.approx(squashed, abs=1e-12)
    alpha, beta = (1 + math.log1p(math.exp(x)) for x in raw[0].tolist())
    assert float(Beta(1).logp(raw, at)) == pytest.approx(stats.beta(alpha, beta).logpdf(0.625) - math.log(2), abs=1e-12)
    logits = torch.tensor([[0.0, math.log(3.0), math.log(4.0)]])
    assert float(Categorical(3).logp(logits, torch.tensor([1]))) == pytest.approx(math.log(3 / 8), abs=1e-6)
    two = torch.tensor([[0.0, math.log(3.0), 0.0, 0.0, math.log(2.0)]])
    logp = MultiCategorical((2, 3)).logp(two, torch.tensor([[1, 2]]))
    assert float(logp) == pytest.approx(math.log(3 / 4 * 2 / 4), abs=1e-6)


def test_squashed_log_prob_stays_exact_where_tanh_saturates() -> None:
    raw = torch.tensor([[9.0, 0.0]], dtype=torch.float32)
    action, logp = SquashedGaussian(1).sample_with_logp(raw, torch.tensor([[3.0]]))
    slope = 2 * (math.log(2) - 12 - math.log1p(math.exp(-24)))
    assert float(action) == 1.0
    assert float(logp) == pytest.approx(-4.5 - 0.5 * math.log(2 * math.pi) - slope, rel=1e-6)
    far = SquashedGaussian(1).sample_with_logp(torch.tensor([[-300.0, 0.0]]), torch.zeros(1, 1))[1]
    assert float(far) == pytest.approx(600 - math.log(4) - 0.5 * math.log(2 * math.pi), rel=1e-6)


def test_log_std_is_clamped_to_its_bounds() -> None:
    narrow = SquashedGaussian(1, log_std_low=-5, log_std_high=2)
    noise = torch.ones(2, 1)
    action = narrow.sample(torch.tensor([[0.0, -50.0], [0.0, 50.0]]), noise)
    assert action[:, 0].tolist() == pytest.approx([math.tanh(math.exp(-5)), math.tanh(math.exp(2))], rel=1e-6)


# ---- sampling ------------------------------------------------------------------------------------------------------
def levels(n: int) -> Tensor:
    """Normal quantiles of the midpoints of n equal cells: noise whose empirical law is normal to 1/n."""
    return torch.special.ndtri((torch.arange(n, dtype=torch.float64) + 0.5) / n)


def test_categorical_frequencies_are_the_probabilities() -> None:
    raw = raws(Categorical(5), 1)
    action = Categorical(5).sample(raw.expand(10_000, -1), levels(10_000)[:, None])
    frequency = torch.bincount(action, minlength=5) / 10_000
    assert torch.allclose(frequency, raw.softmax(-1)[0].float(), atol=1.1e-4)


def test_multicategorical_components_follow_their_own_noise() -> None:
    distribution, raw = MultiCategorical((2, 3)), raws(MultiCategorical((2, 3)), 1)
    noise = torch.cartesian_prod(levels(100), levels(100))
    action = distribution.sample(raw.expand(len(noise), -1), noise)
    joint = torch.bincount(action[:, 0] * 3 + action[:, 1], minlength=6).view(2, 3) / len(noise)
    expected = raw[0, :2].softmax(-1)[:, None] * raw[0, 2:].softmax(-1)
    assert torch.allclose(joint, expected.float(), atol=0.02)


def test_extreme_noise_gives_the_first_and_the_last_category() -> None:
    action = Categorical(3).sample(torch.zeros(2, 3), torch.tensor([[-40.0], [40.0]]))
    assert action.tolist() == [0, 2]


def test_absent_categories_are_never_drawn() -> None:
    """Shorter components are filled up inside: even where float32 probabilities sum to less than 1, nothing falls there."""
    distribution = MultiCategorical((2, 7, 3))
    raw = raws(distribution, 1000).float()
    assert distribution.sample(raw, torch.full((1000, 3), 40.0)).amax(0).tolist() == [1, 6, 2]
    assert distribution.sample(raw, torch.full((1000, 3), -40.0)).amax(0).tolist() == [0, 0, 0]


@pytest.mark.parametrize("distribution", [Gaussian(1), SquashedGaussian(1), Beta(1)], ids=name)
def test_samples_have_the_density(distribution: Any) -> None:
    """The distribution function at a sample is the probability that its noise stands for."""
    action, width = grid(distribution)
    raw = raws(distribution, 1, seed=3)
    mass = (distribution.logp(raw.expand(len(action), -1), action).exp() * width).cumsum(0)
    noise = levels(9)
    at = distribution.sample(raw.expand(9, -1), noise[:, None])[:, 0]
    cells = torch.searchsorted(action[:, 0].contiguous(), at)
    assert torch.allclose(mass[cells], torch.special.ndtr(noise), atol=2e-3)


def test_mixture_samples_choose_components_by_weight() -> None:
    mixture = GaussianMixture(1, 3, squashed=False)
    means, log_stds = torch.tensor([-10.0, 0.0, 10.0]), torch.full((3,), -3.0)
    raw = torch.cat([torch.tensor([0.2, 0.5, 0.3]).log(), means, log_stds]).double()
    noise = torch.cat([torch.zeros(1000, 3, dtype=torch.float64), levels(1000)[:, None]], 1)
    action = mixture.sample(raw.expand(1000, -1), noise)[:, 0]
    assert [int((action == m).sum()) for m in means] == [200, 500, 300]
    assert float(mixture.mode(raw[None])) == 0.0


def test_one_expert_is_the_gaussian() -> None:
    raw, noise = raws(SquashedGaussian(2), 16), noises(SquashedGaussian(2), 16)
    mixture = GaussianMixture(2, 1)
    theirs = torch.cat([torch.zeros(16, 1), raw], 1)
    a, logp = mixture.sample_with_logp(theirs, torch.cat([noise, torch.randn(16, 1)], 1))
    expected, expected_logp = SquashedGaussian(2).sample_with_logp(raw, noise)
    assert torch.allclose(a, expected, atol=1e-14)
    assert torch.allclose(logp, expected_logp, atol=1e-12)


def test_component_densities_make_the_mixture() -> None:
    mixture = GaussianMixture(2, 3)
    raw, noise = raws(mixture, 8), noises(mixture, 8)
    action, logp = mixture.components(raw, noise)
    weights, mean, log_std = mixture.weights(raw), raw[:, 3:9].view(8, 3, 2), raw[:, 9:].view(8, 3, 2)
    alone = SquashedGaussian(2)
    for k in range(3):
        own = torch.cat([mean[:, k], log_std[:, k]], 1)
        assert torch.allclose(logp[:, k], alone.logp(own, action[:, k]), atol=1e-8)
        each = torch.stack([alone.logp(torch.cat([mean[:, j], log_std[:, j]], 1), action[:, k]) for j in range(3)], 1)
        total = (weights * each.exp()).sum(1).log()
        assert torch.allclose(mixture.logp(raw, action[:, k]), total, atol=1e-8)
    drawn, drawn_logp = mixture.component_sample(raw, noise)
    same = (action == drawn[:, None]).all(-1)
    assert bool((same.sum(1) == 1).all())
    assert torch.allclose(logp[same], drawn_logp)


def test_spread_sets_experts_apart() -> None:
    torch.manual_seed(0)
    start = GaussianMixture(2, 400, spread=1.5).initial(-1.0)
    assert float(start[400:1200].std()) == pytest.approx(1.5, rel=0.1)
    assert start[:400].abs().max() == 0
    assert set(start[1200:].tolist()) == {-1.0}


# ---- closed forms --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("distribution", [Gaussian(1), SquashedGaussian(1), Beta(1)], ids=name)
def test_kl_is_the_integral(distribution: Any) -> None:
    action, width = grid(distribution)
    p, q = raws(distribution, 3, seed=4), raws(distribution, 3, seed=5)
    for i, found in enumerate(distribution.kl(p, q)):
        logp = distribution.logp(p[i].expand(len(action), -1), action)
        logq = distribution.logp(q[i].expand(len(action), -1), action)
        assert float(found) == pytest.approx(float((logp.exp() * (logp - logq) * width).sum()), abs=2e-3)
    assert float(distribution.kl(p, p).abs().max()) < 1e-12


@pytest.mark.parametrize("distribution", [Gaussian(1), Beta(1)], ids=name)
def test_entropy_is_the_integral(distribution: Any) -> None:
    action, width = grid(distribution)
    raw = raws(distribution, 3)
    for i, found in enumerate(distribution.entropy(raw)):
        logp = distribution.logp(raw[i].expand(len(action), -1), action)
        assert float(found) == pytest.approx(float(-(logp.exp() * logp * width).sum()), abs=2e-4)


@pytest.mark.parametrize("distribution", [Categorical(4), MultiCategorical((2, 3, 2))], ids=name)
def test_discrete_entropy_and_kl_are_the_sums(distribution: Any) -> None:
    sizes = getattr(distribution, "sizes", (distribution.parameters,))
    action = torch.cartesian_prod(*(torch.arange(n) for n in sizes))
    p, q = raws(distribution, 1, seed=4), raws(distribution, 1, seed=5)
    logp, logq = (distribution.logp(raw.expand(len(action), -1), action) for raw in (p, q))
    assert float(distribution.entropy(p)) == pytest.approx(float(-(logp.exp() * logp).sum()), abs=1e-12)
    assert float(distribution.kl(p, q)) == pytest.approx(float((logp.exp() * (logp - logq)).sum()), abs=1e-12)


@pytest.mark.parametrize("distribution", [Gaussian(2), Beta(2)], ids=name)
def test_entropies_and_divergences_add_over_components(distribution: Any) -> None:
    p, q = raws(distribution, 4, seed=4), raws(distribution, 4, seed=5)
    one = type(distribution)(1)
    parts = [(p[:, i::2], q[:, i::2]) for i in range(2)]
    assert torch.allclose(distribution.kl(p, q), torch.stack([one.kl(a, b) for a, b in parts]).sum(0))
    assert torch.allclose(distribution.entropy(p), torch.stack([one.entropy(a) for a, _ in parts]).sum(0))


@pytest.mark.parametrize("distribution", [Gaussian(1), Beta(1), Categorical(4)], ids=name)
def test_the_mode_has_the_highest_density(distribution: Any) -> None:
    raw = raws(distribution, 1, seed=6)
    action = torch.arange(4) if distribution.discrete else grid(distribution)[0]
    best = distribution.logp(raw.expand(len(action), -1), action).max()
    assert float(distribution.logp(raw, distribution.mode(raw))) >= float(best) - 1e-9


# ---- gradients -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("distribution", ALL, ids=name)
def test_gradients_of_log_prob_are_finite_differences(distribution: Any) -> None:
    raw, noise = raws(distribution, 2), noises(distribution, 2)
    action = distribution.sample(raw, noise)
    raw.requires_grad_()
    assert torch.autograd.gradcheck(lambda r: distribution.logp(r, action), raw)


@pytest.mark.parametrize("distribution", [d for d in ALL if not d.discrete], ids=name)
def test_samples_are_reparameterised(distribution: Any) -> None:
    """d sample / d raw is a finite difference at fixed noise, for the sample and for its log-prob."""
    raw, noise = raws(distribution, 2).requires_grad_(), noises(distribution, 2)
    assert torch.autograd.gradcheck(lambda r: distribution.sample_with_logp(r, noise), raw, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(
    "distribution", [Gaussian(2), SquashedGaussian(2), Beta(2), MultiCategorical((2, 2))], ids=name
)
def test_gradients_of_kl_are_finite_differences(distribution: Any) -> None:
    p, q = raws(distribution, 2, seed=4).requires_grad_(), raws(distribution, 2, seed=5).requires_grad_()
    assert torch.autograd.gradcheck(distribution.kl, (p, q))


def test_beta_samples_stay_differentiable_in_the_tails() -> None:
    raw = torch.full((2, 2), 3.0, dtype=torch.float64, requires_grad=True)
    sample = Beta(1).sample(raw, torch.tensor([[-5.0], [5.0]], dtype=torch.float64))
    (grad,) = torch.autograd.grad(sample.sum(), raw)
    assert bool(grad.isfinite().all())
    assert torch.allclose(grad[0], -grad[1].flip(0), rtol=1e-4)  # the same law, mirrored


# ---- what has no closed form ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("distribution", [SquashedGaussian(2), GaussianMixture(2, 2)], ids=name)
def test_entropy_without_closed_form_names_the_remedy(distribution: Any) -> None:
    with pytest.raises(NotImplementedError, match="log-density of a sample"):
        distribution.entropy(raws(distribution, 1))


def test_kl_of_mixtures_names_the_remedy() -> None:
    with pytest.raises(NotImplementedError, match="k3"):
        GaussianMixture(1, 2).kl(torch.zeros(1, 6), torch.zeros(1, 6))


def test_a_point_has_no_density() -> None:
    point, raw = Deterministic(2, exploration=0.5), torch.tensor([[0.3, 3.0]])
    assert torch.equal(point.mode(raw), raw.tanh())
    action, logp = point.sample_with_logp(raw, torch.tensor([[-1.0, 1.0]]))
    assert action.tolist()[0] == pytest.approx([math.tanh(0.3) - 0.5, 1.0])
    assert bool(logp.isnan().all())
    for call in (lambda: point.logp(raw, action), lambda: point.entropy(raw), lambda: point.kl(raw, raw)):
        with pytest.raises(NotImplementedError, match="no density"):
            call()
