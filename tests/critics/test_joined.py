"""Players that join a policy with a critic: pathwise gradients and backups, against enumeration and by hand."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.critics.test_critics import batch
from unipo.critics import (
    ComponentBackup,
    DeterministicBackup,
    DiscreteQ,
    ExpectedBackup,
    GaussianBackup,
    GaussianQ,
    GreedyBackup,
    Pathwise,
    QEnsemble,
    QuantileBackup,
    QuantileQ,
    SmoothedBackup,
    SoftBackup,
)
from unipo.policies.control import ControlPolicy, next_observation
from unipo.policies.distributions import (
    Beta,
    Categorical,
    Deterministic,
    Gaussian,
    GaussianMixture,
    MultiCategorical,
    SquashedGaussian,
)

D, A, N = 3, 2, 6


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def policy_of(distribution: Any) -> ControlPolicy:
    return ControlPolicy(D, distribution, (8,), "tanh", "network", -0.5, orthogonal=False)


def steps(noise: int, seed: int = 3) -> Any:
    generator = torch.Generator().manual_seed(seed)
    return batch(
        [2, 1, 3],
        D,
        torch.rand(N, A, generator=generator),
        noise=torch.randn(N, noise, generator=generator),
        next_noise=torch.randn(N, noise, generator=generator),
    )


class Linear:
    """A critic with known values: Q_j(s, a) = sum a x slope_j + offset_j."""

    def __init__(self, slopes: list[float], offsets: list[float]) -> None:
        self.slopes, self.offsets = torch.tensor(slopes), torch.tensor(offsets)

    def q(self, observation: Tensor, action: Tensor, frozen: bool = False, members: int | None = None) -> Tensor:
        return action.sum(-1, keepdim=True) * self.slopes + self.offsets


# ---- pathwise ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("distribution", [Gaussian(A), SquashedGaussian(A), Beta(A)], ids=str)
def test_pathwise_values_the_policys_own_sample(distribution: Any) -> None:
    policy, critic, episodes = policy_of(distribution), QEnsemble(D, A), steps(A)
    found = Pathwise(policy, critic).signals(episodes, ["pathwise_q", "pathwise_logp", "pathwise_action"])
    raw = policy.raw(episodes["observation"])
    action, logp = distribution.sample_with_logp(raw, episodes["noise"])
    assert torch.equal(found["pathwise_action"], action)
    assert torch.equal(found["pathwise_logp"], logp)
    assert torch.allclose(found["pathwise_q"], critic.q(episodes["observation"], action).min(1).values)


@pytest.mark.parametrize(
    ("distribution", "critic"),
    [
        (SquashedGaussian(A), QEnsemble(D, A)),
        (Deterministic(A), GaussianQ(D, A)),
        (GaussianMixture(A, 2), QuantileQ(D, A)),
        (Categorical(4), DiscreteQ(D, 4)),
    ],
    ids=lambda x: type(x).__name__,
)
def test_the_critic_is_frozen_and_the_policy_is_not(distribution: Any, critic: Any) -> None:
    policy = policy_of(distribution)
    join = Pathwise(policy, critic)
    found = join.signals(steps(distribution.noise), sorted(join.emits & {"pathwise_q", "pathwise_logp"}))
    (found.get("pathwise_logp", torch.zeros(())) - found["pathwise_q"]).mean().backward()
    assert all(p.grad is None for p in critic.parameters())
    assert all(p.grad is not None for p in policy.parameters())
    assert list(join.named_parameters()) == []


@pytest.mark.parametrize(("reduce", "expected"), [("min", 0), ("first", 1), ("mean", 2)])
def test_reductions_over_critics(reduce: str, expected: int) -> None:
    policy, episodes = policy_of(Deterministic(A)), steps(A)
    found = Pathwise(policy, Linear([1.0, 1.0], [5.0, 1.0]), reduce).signals(episodes, ["pathwise_q"])["pathwise_q"]
    action = policy.raw(episodes["observation"]).tanh().sum(1)
    assert torch.allclose(found, action + [1.0, 5.0, 3.0][expected])


@pytest.mark.parametrize(
    "critic", [QEnsemble(D, A), GaussianQ(D, A), QuantileQ(D, A, layer_norm=True)], ids=lambda c: type(c).__name__
)
def test_only_the_member_that_is_read_is_computed(critic: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    policy, episodes = policy_of(Deterministic(A)), steps(A)
    whole = critic.q(episodes["observation"], policy.distribution.mode(policy.raw(episodes["observation"])))
    sizes, bmm = [], torch.bmm
    monkeypatch.setattr(torch, "bmm", lambda a, b: (sizes.append(len(b)), bmm(a, b))[1])
    found = Pathwise(policy, critic, "first").signals(episodes, ["pathwise_q"])["pathwise_q"]
    assert torch.allclose(found, whole[:, 0], atol=1e-6)
    assert set(sizes) == {1}


def test_a_deterministic_policy_is_valued_at_its_mode_without_log_prob() -> None:
    policy, episodes = policy_of(Deterministic(A)), steps(A)
    join = Pathwise(policy, Linear([2.0], [0.0]), "first")
    assert join.emits == {"pathwise_q", "pathwise_action"}
    found = join.signals(episodes, ["pathwise_q", "pathwise_action"])
    assert torch.equal(found["pathwise_action"], policy.raw(episodes["observation"]).tanh())
    assert torch.allclose(found["pathwise_q"], 2 * found["pathwise_action"].sum(1))
    with pytest.raises(KeyError, match="pathwise_logp"):
        join.signals(episodes, ["pathwise_logp"])


def test_categorical_expectations_are_enumerated() -> None:
    """Value and gradient equal the sum over actions, and the gradient the score-function one, summed over actions."""
    policy, critic = policy_of(Categorical(4)).double(), DiscreteQ(D, 4, 2).double()
    episodes = batch([2, 1, 3], D, torch.zeros(N, dtype=torch.long))
    episodes = episodes.with_columns("step", observation=episodes["observation"].double())
    found = Pathwise(policy, critic).signals(episodes, ["pathwise_q", "pathwise_logp"])
    raw = policy.raw(episodes["observation"])
    q = critic.values(episodes["observation"]).min(1).values.detach()
    each = [policy.distribution.logp(raw, torch.full((N,), a)) for a in range(4)]
    expected = sum(logp.exp() * q[:, a] for a, logp in enumerate(each))
    assert torch.allclose(found["pathwise_q"], expected)  # type: ignore[arg-type]
    assert torch.allclose(found["pathwise_logp"], -policy.distribution.entropy(raw))
    score = sum(logp.exp().detach() * q[:, a] * logp for a, logp in enumerate(each))
    ours = torch.autograd.grad(found["pathwise_q"].sum(), list(policy.parameters()), retain_graph=True)
    theirs = torch.autograd.grad(score.sum(), list(policy.parameters()))  # type: ignore[union-attr]
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(ours, theirs, strict=True))


def test_mixtures_value_every_component() -> None:
    mixture = GaussianMixture(A, 3)
    policy, critic, episodes = policy_of(mixture), QEnsemble(D, A), steps(mixture.noise)
    join = Pathwise(policy, critic)
    found = join.signals(episodes, sorted(join.emits))
    raw = policy.raw(episodes["observation"])
    action, logp = mixture.components(raw, episodes["noise"])
    assert found["pathwise_q"].shape == found["pathwise_logp"].shape == found["router"].shape == (N, 3)
    for k in range(3):
        q = critic.q(episodes["observation"], action[:, k]).min(1).values
        assert torch.allclose(found["pathwise_q"][:, k], q, atol=1e-6)
    assert torch.equal(found["pathwise_logp"], logp)
    assert torch.equal(found["router"], raw[:, :3].softmax(1))


def test_the_pathwise_gradient_is_a_finite_difference() -> None:
    policy, critic = policy_of(SquashedGaussian(A)).double(), QEnsemble(D, A, 2, (8,)).double()
    episodes = steps(A)
    columns = {name: episodes[name].double() for name in ("observation", "noise")}
    episodes = episodes.with_columns("step", **columns)

    def objective() -> Tensor:
        found = Pathwise(policy, critic, "mean").signals(episodes, ["pathwise_q", "pathwise_logp"])
        return (found["pathwise_q"] - 0.2 * found["pathwise_logp"]).sum()

    bias = policy.network.head.bias
    (grad,) = torch.autograd.grad(objective(), bias)
    for i in range(len(bias)):
        with torch.no_grad():
            bias[i] += 1e-6
            above = objective()
            bias[i] -= 2e-6
            below = objective()
            bias[i] += 1e-6
        assert float(grad[i]) == pytest.approx(float((above - below) / 2e-6), rel=1e-4, abs=1e-7)


class Quadratic:
    """Q(s, a) = -curvature (a - peak)^2."""

    def __init__(self, curvature: float, peak: float) -> None:
        self.curvature, self.peak = curvature, peak

    def q(self, observation: Tensor, action: Tensor, frozen: bool = False, members: int | None = None) -> Tensor:
        return -self.curvature * (action - self.peak).square()


def test_the_soft_optimum_is_the_boltzmann_policy() -> None:
    """pi proportional to exp(Q / alpha): for Q = -c (a - m)^2 a Gaussian with mean m and variance alpha / 2c."""
    curvature, peak, alpha = 2.0, 0.4, 0.3
    policy = ControlPolicy(1, Gaussian(1), (), log_std="network").double()
    noise = torch.special.ndtri((torch.arange(100, dtype=torch.float64) + 0.5) / 100)[:, None]
    noise = noise / noise.square().mean().sqrt()
    episodes = batch([100], 1, torch.zeros(100, 1), noise=noise)
    episodes = episodes.with_columns("step", observation=torch.zeros(100, 1, dtype=torch.float64))
    join = Pathwise(policy, Quadratic(curvature, peak), "first")

    def slope(mean: float, std: float) -> list[float]:
        with torch.no_grad():
            policy.network.head.bias.copy_(torch.tensor([mean, math.log(std)]))
        found = join.signals(episodes, ["pathwise_q", "pathwise_logp"])
        loss = (alpha * found["pathwise_logp"] - found["pathwise_q"]).mean()
        return torch.autograd.grad(loss, policy.network.head.bias)[0].tolist()

    best = (alpha / (2 * curvature)) ** 0.5
    assert slope(peak, best) == pytest.approx([0, 0], abs=1e-6)
    assert slope(peak + 0.1, best) == pytest.approx([2 * curvature * 0.1, 0], abs=1e-6)
    assert slope(peak, 2 * best) == pytest.approx([0, 3 * alpha], abs=1e-6)


def test_pathwise_refuses_what_has_no_path() -> None:
    with pytest.raises(ValueError, match=r"no pathwise gradient through MultiCategorical.*expected one of"):
        Pathwise(policy_of(MultiCategorical((2, 2))), QEnsemble(D, A))
    with pytest.raises(ValueError, match=r"unknown reduction 'max': expected one of min, first, mean"):
        Pathwise(policy_of(Gaussian(A)), QEnsemble(D, A), "max")
    with pytest.raises(KeyError, match="no column 'noise'"):
        Pathwise(policy_of(Gaussian(A)), QEnsemble(D, A)).signals(batch([1], D, torch.zeros(1, A)), ["pathwise_q"])


# ---- backups -------------------------------------------------------------------------------------------------------
def next_raw(policy: ControlPolicy, episodes: Any) -> Tensor:
    return policy.raw(next_observation(episodes)).detach()


def test_soft_backup_takes_the_smaller_value_of_the_next_sample() -> None:
    policy, critic, episodes = policy_of(SquashedGaussian(A)), QEnsemble(D, A), steps(A)
    found = SoftBackup(policy, critic).signals(episodes, ["q", "logp"])
    action, logp = policy.distribution.sample_with_logp(next_raw(policy, episodes), episodes["next_noise"])
    q = critic.q(next_observation(episodes), action)
    assert torch.allclose(found["q"], torch.minimum(q[:, 0], q[:, 1]))
    assert torch.allclose(found["logp"], logp)
    assert not found["q"].requires_grad
    assert not found["logp"].requires_grad


def test_backups_do_not_look_at_termination() -> None:
    policy, critic, episodes = policy_of(SquashedGaussian(A)), QEnsemble(D, A), steps(A)
    ended = episodes.with_columns("episode", terminated=torch.tensor([True, False, True]))
    backup = SoftBackup(policy, critic)
    assert torch.equal(backup.signals(ended, ["q"])["q"], backup.signals(episodes, ["q"])["q"])


def test_smoothing_noise_is_clipped_and_so_is_the_action() -> None:
    policy = policy_of(Deterministic(1))
    with torch.no_grad():
        policy.network.head.weight.zero_()
        policy.network.head.bias.fill_(0.9)
    noise = torch.tensor([[0.5], [-1.0], [40.0], [-40.0]])
    episodes = batch([1, 1, 1, 1], D, torch.zeros(4, 1), next_noise=noise)
    found = SmoothedBackup(policy, Linear([1.0, 1.0], [3.0, 2.0]), noise=0.2, clip=0.5).signals(episodes, ["q"])["q"]
    mode = float(torch.tensor(0.9).tanh())
    assert found.tolist() == pytest.approx([2 + mode + 0.1, 2 + mode - 0.2, 2 + 1.0, 2 + mode - 0.5])


def test_deterministic_backup_is_smoothing_without_noise() -> None:
    policy, critic, episodes = policy_of(Deterministic(A)), QEnsemble(D, A), steps(A)
    found = DeterministicBackup(policy, critic).signals(episodes, ["q"])["q"]
    assert torch.equal(found, SmoothedBackup(policy, critic, noise=0.0).signals(episodes, ["q"])["q"])
    assert torch.allclose(found, critic.q(next_observation(episodes), next_raw(policy, episodes).tanh()).min(1).values)


class Table:
    """A critic of one state with known values of its actions [n, A], the same in every row."""

    def __init__(self, values: list[list[float]]) -> None:
        self.table = torch.tensor(values)

    def values(self, observation: Tensor, frozen: bool = False) -> Tensor:
        return self.table.expand(len(observation), *self.table.shape)


def test_greedy_backup_is_the_maximum_and_double_lets_the_online_critic_choose() -> None:
    episodes: Any = batch([1, 2], D, torch.zeros(3))
    target: Any = Table([[1.0, 4.0, 3.0]])
    online: Any = Table([[0.0, 1.0, 2.0]])
    assert GreedyBackup(target).signals(episodes, ["q"])["q"].tolist() == [4, 4, 4]
    assert GreedyBackup(target, online).signals(episodes, ["q"])["q"].tolist() == [3, 3, 3]
    assert GreedyBackup(target, target).signals(episodes, ["q"])["q"].tolist() == [4, 4, 4]
    twin: Any = Table([[1.0, 4.0, 3.0], [2.0, 0.0, 2.5]])
    assert GreedyBackup(twin).signals(episodes, ["q"])["q"].tolist() == [2.5, 2.5, 2.5]


def test_expected_backup_is_the_sum_over_actions() -> None:
    policy, critic = policy_of(Categorical(4)), DiscreteQ(D, 4, 2)
    episodes = batch([2, 1], D, torch.zeros(3))
    found = ExpectedBackup(policy, critic).signals(episodes, ["q", "logp"])
    raw = next_raw(policy, episodes)
    values = critic.values(next_observation(episodes)).min(1).values
    assert torch.allclose(found["q"], sum(raw.softmax(1)[:, a] * values[:, a] for a in range(4)), atol=1e-6)  # type: ignore[arg-type]
    assert torch.allclose(found["logp"], -policy.distribution.entropy(raw), atol=1e-6)


def test_gaussian_backup_takes_mean_and_spread_of_one_critic() -> None:
    policy, critic, episodes = policy_of(SquashedGaussian(A)), GaussianQ(D, A, 2, (8,)), steps(A)
    found = GaussianBackup(policy, critic).signals(episodes, ["q", "q_std", "logp"])
    action, logp = policy.distribution.sample_with_logp(next_raw(policy, episodes), episodes["next_noise"])
    q, q_std = (x.detach() for x in critic.moments(next_observation(episodes), action))
    for n in range(N):
        j = int(q[n, 1] < q[n, 0])
        assert float(found["q"][n]) == pytest.approx(float(q[n, j]), abs=1e-6)
        assert float(found["q_std"][n]) == pytest.approx(float(q_std[n, j]), abs=1e-6)
    assert torch.allclose(found["logp"], logp)


def test_component_backup_uses_the_drawn_components_density() -> None:
    mixture = GaussianMixture(A, 3)
    policy, critic, episodes = policy_of(mixture), QEnsemble(D, A), steps(mixture.noise)
    found = ComponentBackup(policy, critic).signals(episodes, ["q", "logp"])
    raw = next_raw(policy, episodes)
    action, logp = mixture.component_sample(raw, episodes["next_noise"])
    assert torch.allclose(found["q"], critic.q(next_observation(episodes), action).min(1).values)
    assert torch.allclose(found["logp"], logp)
    whole = SoftBackup(policy, critic).signals(episodes, ["q", "logp"])
    assert torch.allclose(whole["q"], found["q"], atol=1e-6)
    assert bool((whole["logp"] >= found["logp"] + raw[:, :3].log_softmax(1).min(1).values - 1e-5).all())


def test_quantile_backup_drops_the_largest_of_all() -> None:
    policy, critic, episodes = policy_of(SquashedGaussian(A)), QuantileQ(D, A, 5, 2), steps(A)
    found = QuantileBackup(policy, critic, drop=2).signals(episodes, ["quantiles", "q", "logp"])
    action, _ = policy.distribution.sample_with_logp(next_raw(policy, episodes), episodes["next_noise"])
    expected = sorted(critic.quantiles(next_observation(episodes), action)[0].flatten().tolist())[:6]
    assert found["quantiles"].shape == (N, 6)
    assert found["quantiles"][0].tolist() == pytest.approx(expected)
    assert torch.allclose(found["q"], found["quantiles"].mean(1))
    whole = QuantileBackup(policy, critic, drop=0).signals(episodes, ["q"])["q"]
    assert torch.allclose(whole, critic.q(next_observation(episodes), action).mean(1), atol=1e-6)


def test_backups_follow_their_own_copy_of_the_policy() -> None:
    policy, critic, episodes = policy_of(Deterministic(A)), QEnsemble(D, A), steps(A)
    backup = DeterministicBackup(copy.deepcopy(policy), critic)
    before = backup.signals(episodes, ["q"])["q"]
    with torch.no_grad():
        policy.network.head.bias.add_(1.0)
    assert torch.equal(backup.signals(episodes, ["q"])["q"], before)
    assert list(backup.named_parameters()) == []
    assert backup.total_lengths(episodes).tolist() == [2, 1, 3]


def test_backups_refuse_the_wrong_policy() -> None:
    with pytest.raises(ValueError, match=r"expected a GaussianMixture policy, found Gaussian.*SoftBackup"):
        ComponentBackup(policy_of(Gaussian(A)), QEnsemble(D, A))
    with pytest.raises(ValueError, match=r"expected a Categorical policy, found Gaussian.*SoftBackup"):
        ExpectedBackup(policy_of(Gaussian(A)), DiscreteQ(D, 2))
    with pytest.raises(ValueError, match="drop is 5: expected 0 to 4"):
        QuantileBackup(policy_of(Gaussian(A)), QuantileQ(D, A, 5), 5)
    with pytest.raises(KeyError, match=r"no signal \['value'\]"):
        SoftBackup(policy_of(Gaussian(A)), QEnsemble(D, A)).signals(steps(A), ["value"])
