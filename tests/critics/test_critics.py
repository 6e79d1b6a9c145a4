"""Critics: values by hand, fragments, ensembles as their members, targets."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from unipo.critics import DiscreteQ, GaussianQ, QEnsemble, QuantileQ, ValueCritic, polyak
from unipo.episodes import Column, Episodes, offsets_of
from unipo.policies.networks import Normaliser


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def batch(lengths: list[int], d: int, action: Tensor, seed: int = 0, **step: Tensor) -> Episodes:
    sizes = torch.tensor(lengths)
    one = torch.arange(len(lengths) + 1)
    generator = torch.Generator().manual_seed(seed)
    columns = {
        "observation": Column(torch.randn(int(sizes.sum()), d, generator=generator), "step"),
        "final_observation": Column(torch.randn(len(lengths), d, generator=generator), "episode"),
        "action": Column(action, "step"),
        **{name: Column(values, "step") for name, values in step.items()},
    }
    return Episodes({"turn": offsets_of(sizes), "episode": one, "group": one}, columns)


# ---- V -------------------------------------------------------------------------------------------------------------
def test_next_values_are_shifted_inside_fragments() -> None:
    critic, episodes = ValueCritic(3), batch([3, 1, 2], 3, torch.zeros(6))
    found = critic.signals(episodes, ["value", "next_value"])
    value, final = critic.value(episodes["observation"]), critic.value(episodes["final_observation"])
    expected = torch.stack([value[1], value[2], final[0], final[1], value[5], final[2]])
    assert torch.allclose(found["value"], value, atol=1e-6)
    assert torch.allclose(found["next_value"], expected, atol=1e-6)
    alone = critic.signals(episodes, ["value"])
    assert list(alone) == ["value"]
    assert torch.allclose(alone["value"], value)


def test_termination_is_left_to_the_return_calculators() -> None:
    """The value after a terminated fragment is that of its final observation: no zero is put in here."""
    critic, episodes = ValueCritic(3), batch([2, 2], 3, torch.zeros(4))
    plain = critic.signals(episodes, ["next_value"])["next_value"]
    ended = episodes.with_columns("episode", terminated=torch.tensor([True, False]))
    assert torch.equal(critic.signals(ended, ["next_value"])["next_value"], plain)
    assert float(plain.detach()[1].abs()) > 0


def test_the_value_reads_normalised_observations() -> None:
    normaliser = Normaliser(3)
    normaliser.update(torch.randn(100, 3) * 4 + 2)
    critic, x = ValueCritic(3, normaliser=normaliser), torch.randn(5, 3)
    scaled = (x - normaliser.mean) / (normaliser.var + 1e-8).sqrt()
    assert torch.allclose(critic.value(x), critic.network(scaled).squeeze(-1), atol=1e-5)


def test_the_gradient_of_the_value_is_a_finite_difference() -> None:
    critic = ValueCritic(2, hidden=(4,)).double()
    x = torch.randn(3, 2, dtype=torch.float64)
    critic.value(x).sum().backward()
    weight = critic.network.head.weight
    assert weight.grad is not None
    for i in range(4):
        with torch.no_grad():
            weight[0, i] += 1e-6
            above = critic.value(x).sum()
            weight[0, i] -= 2e-6
            below = critic.value(x).sum()
            weight[0, i] += 1e-6
        assert float(weight.grad[0, i]) == pytest.approx(float((above - below) / 2e-6), abs=1e-6)


# ---- Q -------------------------------------------------------------------------------------------------------------
torch.manual_seed(0)
CONTINUOUS: list[Any] = [QEnsemble(3, 2, 3), GaussianQ(3, 2, 3, (8, 8)), QuantileQ(3, 2, 5, 3)]


@pytest.mark.parametrize("critic", CONTINUOUS, ids=lambda c: type(c).__name__)
def test_signals_are_the_values_at_the_datas_actions(critic: Any) -> None:
    episodes = batch([2, 3], 3, torch.rand(5, 2))
    found = critic.signals(episodes, sorted(critic.emits))
    assert set(found) == critic.emits
    assert found["q"].shape == (5, 3)
    assert torch.equal(found["q"], critic.q(episodes["observation"], episodes["action"]))
    assert critic.total_lengths(episodes).tolist() == [2, 3]


@pytest.mark.parametrize("critic", CONTINUOUS, ids=lambda c: type(c).__name__)
def test_a_frozen_critic_gives_no_gradient_to_its_weights(critic: Any) -> None:
    critic.zero_grad(set_to_none=True)
    numbers = torch.Generator().manual_seed(0)
    observation = torch.randn(4, 3, generator=numbers)
    action = torch.rand(4, 2, generator=numbers).requires_grad_()
    value = critic.q(observation, action, frozen=True)
    value.sum().backward()
    assert all(p.grad is None for p in critic.parameters())
    assert action.grad is not None
    step = 1e-3 * action.grad.sign()
    with torch.no_grad():
        rise = critic.q(observation, action + step).sum() - critic.q(observation, action - step).sum()
    assert float(rise) == pytest.approx(2e-3 * float(action.grad.abs().sum()), rel=0.05)


def test_the_gaussian_critic_has_positive_spread() -> None:
    critic, x, a = GaussianQ(3, 2, 2, (8,)), torch.randn(6, 3), torch.rand(6, 2)
    q, q_std = critic.moments(x, a)
    out = critic.network(torch.cat([x, a], 1))
    assert torch.equal(q, out[..., 0])
    assert torch.allclose(q_std, softplus(out[..., 1]))
    assert bool((q_std > 0).all())


def test_quantile_levels_and_mean() -> None:
    critic, x, a = QuantileQ(3, 2, 4, 2), torch.randn(6, 3), torch.rand(6, 2)
    assert critic.levels.tolist() == [0.125, 0.375, 0.625, 0.875]
    assert critic.quantiles(x, a).shape == (6, 2, 4)
    assert torch.allclose(critic.q(x, a), critic.quantiles(x, a).mean(2))


def test_discrete_values_at_the_datas_actions() -> None:
    critic, action = DiscreteQ(3, 4, 2), torch.tensor([0, 3, 1])
    episodes = batch([3], 3, action)
    values = critic.values(episodes["observation"])
    assert values.shape == (3, 2, 4)
    found = critic.signals(episodes, ["q"])["q"]
    for n, a in enumerate(action.tolist()):
        assert torch.equal(found[n], values[n, :, a])


def test_dueling_values_are_value_plus_centred_advantage() -> None:
    critic, x = DiscreteQ(3, 4, 2, dueling=True), torch.randn(5, 3)
    out = critic.network(x)
    values = critic.values(x)
    assert values.shape == (5, 2, 4)
    assert torch.allclose(values.mean(-1), out[..., 0], atol=1e-6)
    assert torch.allclose(values[..., 1] - values[..., 3], out[..., 2] - out[..., 4], atol=1e-6)


def test_a_discrete_critic_is_rebuilt_from_its_config() -> None:
    critic, x = DiscreteQ(3, 4, 2, (7, 5), "tanh", layer_norm=True, dueling=True), torch.randn(5, 3)
    again = DiscreteQ(**critic.config)  # type: ignore[arg-type]
    again.load_state_dict(critic.state_dict())
    assert torch.equal(again.values(x), critic.values(x))


def test_the_normaliser_does_not_touch_the_action() -> None:
    normaliser = Normaliser(3)
    normaliser.update(torch.randn(100, 3) * 4 + 2)
    critic, x, a = QEnsemble(3, 2, normaliser=normaliser), torch.randn(5, 3), torch.rand(5, 2)
    assert torch.allclose(critic.q(x, a), critic.network(torch.cat([normaliser(x), a], 1)).squeeze(-1))


# ---- targets -------------------------------------------------------------------------------------------------------
def test_polyak_moves_every_weight_by_its_share() -> None:
    online = QEnsemble(3, 2, layer_norm=True, normaliser=Normaliser(3))
    target = copy.deepcopy(online).requires_grad_(False)
    before = [p.clone() for p in target.parameters()]
    with torch.no_grad():
        for p in online.parameters():
            p.add_(1.0)
    online.normaliser.update(torch.ones(4, 3))  # type: ignore[union-attr]
    polyak(target, online, 0.25)
    for old, new in zip(before, target.parameters(), strict=True):
        assert torch.allclose(new, old + 0.25)
    assert torch.equal(target.normaliser.mean, torch.ones(3))  # type: ignore[union-attr]
    assert not any(p.requires_grad for p in target.parameters())
    polyak(target, online, 1.0)
    assert all(torch.equal(a, b) for a, b in zip(target.parameters(), online.parameters(), strict=True))


@pytest.mark.parametrize("critic", [*CONTINUOUS, DiscreteQ(3, 4), ValueCritic(3)], ids=lambda c: type(c).__name__)
def test_unknown_signals_are_refused(critic: Any) -> None:
    with pytest.raises(KeyError, match=r"no signal \['logp'\]: this player emits"):
        critic.signals(batch([1], 3, torch.zeros(1, 2)), ["logp"])


def test_training_a_critic_fits_a_quadratic() -> None:
    """Regression through the signals learns Q(s, a) = -(a - s)^2, and every member on its own."""
    torch.manual_seed(0)
    critic = QEnsemble(1, 1, 2, (32, 32))
    optimizer = torch.optim.Adam(critic.parameters(), 3e-3)
    for _ in range(300):
        s, a = torch.rand(128, 1) * 2 - 1, torch.rand(128, 1) * 2 - 1
        loss = (critic.q(s, a) + (a - s).square()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.02
    assert isinstance(critic, nn.Module)
