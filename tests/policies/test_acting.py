"""Acting in numpy is the policy's own acting; whatever is not known acts by itself."""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from unipo.policies.acting import Acting
from unipo.policies.control import ControlPolicy
from unipo.policies.distributions import (
    Beta,
    Categorical,
    Deterministic,
    Distribution,
    Gaussian,
    MultiCategorical,
    SquashedGaussian,
)
from unipo.policies.networks import Normaliser
from unipo.sources.acting.collector import Collector
from unipo.sources.acting.environments import Environments, make_environment

D, N = 5, 8
LAWS: list[Distribution] = [Categorical(2), Categorical(5), Gaussian(3), SquashedGaussian(3), Deterministic(3)]


def policy_of(law: Distribution, normalised: bool = False, seed: int = 0, **settings: Any) -> ControlPolicy:
    torch.manual_seed(seed)
    normaliser = Normaliser(D) if normalised else None
    policy = ControlPolicy(D, law, hidden=(16, 12), normaliser=normaliser, orthogonal=False, **settings)
    with torch.no_grad():
        for p in policy.parameters():
            p.add_(0.3 * torch.randn_like(p))
    if normaliser is not None:
        normaliser.update(3 * torch.randn(50, D) + 1)
    return policy


def given(seed: int, steps: int, noise: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return (
        (2 * rng.standard_normal((steps, N, D))).astype(np.float32),
        rng.standard_normal((steps, N, noise), dtype=np.float32),
    )


@pytest.mark.parametrize("law", LAWS, ids=str)
@pytest.mark.parametrize(
    ("activation", "log_std"), list(itertools.product(("tanh", "relu", "gelu"), ("parameter", "network")))
)
@pytest.mark.parametrize("normalised", [False, True])
def test_actions_and_log_probs_are_the_policys(
    law: Distribution, activation: str, log_std: str, normalised: bool
) -> None:
    policy = policy_of(law, normalised, activation=activation, log_std=log_std)
    acting = Acting(policy)
    assert Acting.suits(policy)
    observation, noise = given(1, 40, law.noise)
    prepared = acting.begin(observation[0], noise)
    assert prepared is not None
    actions = np.stack([acting.choose(o, g) for o, g in zip(observation, prepared, strict=True)])
    wanted = [policy.act(torch.from_numpy(o), torch.from_numpy(n)) for o, n in zip(observation, noise, strict=True)]
    expected, logp = (torch.stack(x).numpy() for x in zip(*wanted, strict=True))
    assert actions.dtype == expected.dtype
    np.testing.assert_allclose(actions, expected, rtol=1e-5, atol=2e-6)
    np.testing.assert_allclose(acting.logp(noise, actions).numpy(), logp, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("law", LAWS, ids=str)
@pytest.mark.parametrize(("log_std", "normalised"), [("parameter", False), ("network", True)])
def test_one_observation_at_a_time(law: Distribution, log_std: str, normalised: bool) -> None:
    """With the weights of now: trained in place, loaded, or replaced by others."""
    policy = policy_of(law, normalised, activation="relu", log_std=log_std)
    acting, (observation, noise) = Acting(policy), given(3, 30, law.noise)
    for t, (o, z) in enumerate(zip(torch.from_numpy(observation), torch.from_numpy(noise), strict=True)):
        found, wanted = acting(o[:1], z[:1]), policy.act(o[:1], z[:1])
        for a, b in zip(found, wanted, strict=True):
            assert a.dtype == b.dtype
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5, equal_nan=True)
        with torch.no_grad():
            policy.network.head.weight.mul_(1.02)
        if t == 10:
            policy.load_state_dict(policy_of(law, normalised, seed=7, activation="relu", log_std=log_std).state_dict())
        if t == 20:
            policy.network.head.weight = nn.Parameter(0.5 * torch.randn_like(policy.network.head.weight))
    with Counted() as counted:
        acting(o[:1], z[:1])
    assert counted.calls <= 20  # views and wrapping; no product, no tanh
    torch.testing.assert_close(acting(o, z)[0], policy.act(o, z)[0])  # several: the policy itself


def test_one_observation_that_differs_is_said() -> None:
    policy = policy_of(Gaussian(2))
    policy.network.head.register_forward_hook(lambda module, args, out: 2 * out)
    acting, (observation, noise) = Acting(policy), given(3, 1, 2)
    o, z = torch.from_numpy(observation[0][:1]), torch.from_numpy(noise[0][:1])
    with pytest.warns(UserWarning, match="acts in torch"):
        first = acting(o, z)
    for action, _ in (first, acting(o, z)):
        assert action.equal(policy.act(o, z)[0])


def test_one_of_two_by_hand() -> None:
    """Logits (0, log 3): the second where Phi(noise) > 1/4, noise > -0.6745."""
    policy = ControlPolicy(1, Categorical(2), hidden=())
    with torch.no_grad():
        policy.network.head.weight.zero_()
        policy.network.head.bias.copy_(torch.tensor([0.0, np.log(3)]))
    acting, x = Acting(policy), np.zeros((4, 1), np.float32)
    noise = np.array([-9, -0.6746, -0.6744, 9], np.float32).reshape(1, 4, 1)
    prepared = acting.begin(x, noise)
    assert prepared is not None
    action = acting.choose(x, prepared[0])
    assert action.tolist() == [0, 0, 1, 1]
    assert acting.logp(noise, action[None]).exp().tolist()[0] == pytest.approx([0.25, 0.25, 0.75, 0.75])


def test_weights_are_those_of_when_it_began() -> None:
    policy = policy_of(Gaussian(2))
    acting, (observation, noise) = Acting(policy), given(2, 1, 2)
    for _ in range(2):
        prepared = acting.begin(observation[0], noise)
        assert prepared is not None
        expected = policy.act(torch.from_numpy(observation[0]), torch.from_numpy(noise[0]))[0].numpy()
        np.testing.assert_allclose(acting.choose(observation[0], prepared[0]), expected, rtol=1e-5, atol=1e-6)
        policy.load_state_dict(policy_of(Gaussian(2), seed=5).state_dict())


# ---- who acts by itself --------------------------------------------------------------------------------------------
class Own(ControlPolicy):
    """Somebody's own."""


def test_who_is_not_known() -> None:
    patched = policy_of(Gaussian(2))
    patched.act = lambda observation, noise: (observation, noise)  # type: ignore[method-assign]
    for policy in (Own(D, Gaussian(2)), patched, policy_of(Beta(2)), policy_of(MultiCategorical((2, 3))),
                   policy_of(Categorical(3), masked=True), policy_of(Gaussian(2)).double(), nn.Linear(2, 2)):  # fmt: skip
        assert not Acting.suits(policy)


def test_a_difference_is_said_and_the_policy_acts_itself() -> None:
    """What it computes is not what the network computes any more: a hook that numpy cannot see."""
    policy = policy_of(Categorical(2))
    policy.observation_size = D
    policy.network.head.register_forward_hook(lambda module, args, out: 2 * out + 1)
    environments = Environments(partial(make_environment, "CartPole-v1"), 4, 0)
    policy.network.trunk[0] = nn.Linear(4, 16)
    acting, collector = Acting(policy), Collector(environments, 0, 1)
    with pytest.warns(UserWarning, match="acts in torch"):
        found = collector.collect(20, acting, 0)
    other = Collector(Environments(partial(make_environment, "CartPole-v1"), 4, 0), 0, 1).collect(20, policy.act, 0)
    assert found["action"].equal(other["action"])
    assert found["behavior_logp"].equal(other["behavior_logp"])


# ---- in a collector ------------------------------------------------------------------------------------------------
class Counted(TorchDispatchMode):
    """Calls of torch's operators."""

    calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += 1
        return func(*args, **(kwargs or {}))


def collector_of(name: str) -> Collector:
    environments = Environments(partial(make_environment, name), 8, 0)
    return Collector(environments, 0, max(1, environments.action_spec.size if name != "CartPole-v1" else 1))


@pytest.mark.parametrize(("name", "law"), [("CartPole-v1", Categorical(2)), ("HalfCheetah-v5", Gaussian(6))])
def test_a_rollout_calls_torch_as_often_however_long_it_is(name: str, law: Distribution) -> None:
    collector = collector_of(name)
    policy = ControlPolicy(collector.environments.observation_spec.size, law)
    acting = Acting(policy)
    collector.collect(2, acting, 0)
    counts = []
    for steps in (8, 64):
        with Counted() as counted:
            collector.collect(steps, acting, 0)
        counts.append(counted.calls)
    assert counts[1] <= counts[0] + 5  # noise of another block, at most
    assert counts[1] < 100  # the log-probs and the columns, once


@pytest.mark.parametrize(("name", "law"), [("CartPole-v1", Categorical(2)), ("HalfCheetah-v5", Gaussian(6))])
def test_rollouts_are_those_of_the_slow_twin(name: str, law: Distribution) -> None:
    fast, slow = collector_of(name), collector_of(name)
    policy = ControlPolicy(fast.environments.observation_spec.size, law)
    a, b = fast.collect(20, Acting(policy), 3), slow.collect(20, policy.act, 3)
    assert a.columns.keys() == b.columns.keys()
    assert a.lengths().equal(b.lengths())
    torch.testing.assert_close(a["action"], b["action"], rtol=1e-3, atol=1e-3)  # physics spreads roundings
    again = policy.signals(a, ["logp"])["logp"]
    torch.testing.assert_close(a["behavior_logp"], again.detach(), rtol=0, atol=2e-6)  # the learner's ratio is 1
