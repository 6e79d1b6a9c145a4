"""Control policies: signals by hand, fragments, normalisation, saving."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from unipo.episodes import Column, Episodes, offsets_of
from unipo.policies.control import ControlPolicy, load_control_policy, next_index, next_observation
from unipo.policies.distributions import (
    Beta,
    Categorical,
    Deterministic,
    Gaussian,
    GaussianMixture,
    MultiCategorical,
    SquashedGaussian,
)
from unipo.policies.networks import MLP, Normaliser, StackedMLP


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def fragments(lengths: list[int], **columns: Any) -> Episodes:
    """Fragments of those lengths; observations are 0, 1, 2, ... and final observations 100, 101, ... (d = 1)."""
    sizes = torch.tensor(lengths)
    one = torch.arange(len(lengths) + 1)
    n = int(sizes.sum())
    made = {
        "observation": Column(torch.arange(n, dtype=torch.float32)[:, None], "step"),
        "final_observation": Column(100 + torch.arange(len(lengths), dtype=torch.float32)[:, None], "episode"),
        **{name: Column(values, "step") for name, values in columns.items()},
    }
    return Episodes({"turn": offsets_of(sizes), "episode": one, "group": one}, made)


def random_batch(n: int, d: int, action: Tensor, **columns: Tensor) -> Episodes:
    one = torch.arange(n + 1)
    generator = torch.Generator().manual_seed(7)
    made = {
        "observation": Column(torch.randn(n, d, generator=generator), "step"),
        "final_observation": Column(torch.randn(n, d, generator=generator), "episode"),
        "action": Column(action, "step"),
        **{name: Column(values, "step") for name, values in columns.items()},
    }
    return Episodes({"turn": one, "episode": one, "group": one}, made)


# ---- fragments -----------------------------------------------------------------------------------------------------
def test_the_next_observation_is_shifted_inside_fragments() -> None:
    found = next_observation(fragments([3, 1, 2]))[:, 0].tolist()
    assert found == [1, 2, 100, 101, 5, 102]


def test_the_next_observation_of_transitions_is_the_final_one() -> None:
    assert next_observation(fragments([1, 1, 1]))[:, 0].tolist() == [100, 101, 102]


@pytest.mark.parametrize(
    ("lengths", "expected"), [([0, 2, 1], [1, 101, 102]), ([2, 0], [1, 100]), ([3, 0, 0], [1, 2, 100])]
)
def test_fragments_without_steps_have_no_next(lengths: list[int], expected: list[int]) -> None:
    episodes = fragments(lengths)
    assert next_observation(episodes)[:, 0].tolist() == expected
    assert len(next_index(episodes)) == len(expected)


# ---- networks ------------------------------------------------------------------------------------------------------
def test_orthogonal_weights_have_the_gains_of_ppo() -> None:
    mlp = MLP(5, (8, 8), 3, output_gain=0.01)
    linears = [m for m in mlp.modules() if isinstance(m, nn.Linear)]
    for layer, gain in zip(linears, [math.sqrt(2), math.sqrt(2), 0.01], strict=True):
        w = layer.weight if layer.weight.shape[0] <= layer.weight.shape[1] else layer.weight.T
        assert torch.allclose(w @ w.T, gain**2 * torch.eye(len(w)), atol=1e-6)
        assert bool((layer.bias == 0).all())


@pytest.mark.parametrize("layer_norm", [False, True])
def test_a_stack_is_its_members(layer_norm: bool) -> None:
    torch.manual_seed(0)
    stack = StackedMLP(3, 4, (6, 5), 2, "gelu", layer_norm)
    for p in stack.parameters():
        p.data.normal_(0, 0.5)
    x = torch.randn(7, 4)
    out = stack(x)
    assert out.shape == (7, 3, 2)
    for j in range(3):
        h = x
        for i in range(2):
            h = h @ stack.weights[i][j] + stack.biases[i].view(3, -1)[j]
            if layer_norm:
                centred = h - h.mean(-1, keepdim=True)
                h = centred / (h.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
                h = h * stack.scales[i].view(3, -1)[j] + stack.shifts[i].view(3, -1)[j]
            h = nn.functional.gelu(h)
        assert torch.allclose(out[:, j], h @ stack.weights[2][j] + stack.biases[2].view(3, -1)[j], atol=1e-5)


def test_members_start_apart_within_the_bound_of_torch() -> None:
    stack = StackedMLP(2, 16, (9,), 1)
    assert not torch.equal(stack.weights[0][0], stack.weights[0][1])
    assert float(stack.weights[0].detach().abs().max()) <= 0.25
    assert float(stack.weights[0].detach().abs().max()) > 0.2


def test_a_frozen_stack_passes_gradients_to_its_input_only() -> None:
    stack, x = StackedMLP(2, 3, (4,), 1), torch.randn(5, 3, requires_grad=True)
    live, frozen = stack(x), stack(x, frozen=True)
    assert torch.equal(live, frozen)
    frozen.sum().backward()
    assert all(p.grad is None for p in stack.parameters())
    assert x.grad is not None
    (expected,) = torch.autograd.grad(live.sum(), x)
    assert torch.allclose(x.grad, expected)


# ---- normaliser ----------------------------------------------------------------------------------------------------
def test_merged_statistics_are_those_of_all_rows() -> None:
    torch.manual_seed(0)
    rows = torch.randn(1000, 3) * torch.tensor([0.1, 1, 50.0]) + torch.tensor([5.0, -1, 300])
    normaliser = Normaliser(3)
    for part in rows.split([1, 99, 0, 500, 400]):
        normaliser.update(part)
    assert torch.allclose(normaliser.mean, rows.mean(0), rtol=1e-5)
    assert torch.allclose(normaliser.var, rows.var(0, correction=0), rtol=1e-4)
    assert int(normaliser.count) == 1000
    out = normaliser(rows)
    assert torch.allclose(out.mean(0), torch.zeros(3), atol=1e-3)
    assert torch.allclose(out.var(0, correction=0), torch.ones(3), atol=1e-3)


def test_a_normaliser_without_rows_is_the_identity_and_later_clips() -> None:
    normaliser = Normaliser(1, clip=2.0)
    far = torch.tensor([[1e4]])
    assert torch.equal(normaliser(far), far)
    normaliser.update(torch.tensor([[0.0], [2.0]]))
    assert normaliser(torch.tensor([[1e4], [-1e4], [2.0]]))[:, 0].tolist() == pytest.approx([2, -2, 1])
    with pytest.raises(ValueError, match="NaN or infinite"):
        normaliser.update(torch.tensor([[float("nan")]]))


def test_normaliser_by_hand() -> None:
    normaliser = Normaliser(1)
    normaliser.update(torch.tensor([[1.0], [3.0]]))
    normaliser.update(torch.tensor([[8.0]]))
    assert float(normaliser.mean) == pytest.approx(4)
    assert float(normaliser.var) == pytest.approx((9 + 1 + 16) / 3)


# ---- policy --------------------------------------------------------------------------------------------------------
def test_signals_by_hand() -> None:
    policy = ControlPolicy(3, Gaussian(2), log_std_init=-0.5)
    action, old = torch.randn(6, 2), torch.randn(6, 4)
    episodes = random_batch(6, 3, action, old_parameters=old)
    found = policy.signals(episodes, ["logp", "entropy", "parameters", "reverse_kl:old", "forward_kl:old"])
    mean = policy.network(episodes["observation"])
    mine = torch.distributions.Normal(mean, math.exp(-0.5))
    theirs = torch.distributions.Normal(old[:, :2], old[:, 2:].exp())
    between = torch.distributions.kl_divergence
    assert torch.allclose(found["logp"], mine.log_prob(action).sum(1), atol=1e-5)
    assert torch.allclose(found["entropy"], mine.entropy().sum(1), atol=1e-5)
    assert torch.allclose(found["parameters"][:, 2:], torch.full((6, 2), -0.5))
    assert torch.allclose(found["reverse_kl:old"], between(mine, theirs).sum(1), rtol=1e-4)
    assert torch.allclose(found["forward_kl:old"], between(theirs, mine).sum(1), rtol=1e-4)


def test_the_state_independent_log_std_is_one_trained_vector() -> None:
    policy = ControlPolicy(3, Gaussian(2), log_std="parameter", log_std_init=-1.0)
    assert policy.log_std is not None
    assert policy.log_std.tolist() == [-1, -1]
    policy.signals(random_batch(4, 3, torch.zeros(4, 2)), ["entropy"])["entropy"].sum().backward()
    assert policy.log_std.grad is not None
    assert policy.log_std.grad.tolist() == [4, 4]


def test_the_state_dependent_log_std_starts_at_its_value() -> None:
    policy = ControlPolicy(3, SquashedGaussian(2), log_std="network", log_std_init=-1.5)
    assert policy.log_std is None
    raw = policy.raw(torch.randn(5, 3))
    assert raw.shape == (5, 4)
    assert torch.allclose(raw[:, 2:], torch.full((5, 2), -1.5), atol=0.05)
    assert raw[:, 2:].std() > 0


def test_gradients_of_the_policy_are_finite_differences() -> None:
    policy = ControlPolicy(2, Gaussian(1), hidden=(3,)).double()
    observation, action = torch.randn(4, 2, dtype=torch.float64), torch.randn(4, 1, dtype=torch.float64)

    def total(*values: Tensor) -> Tensor:
        named = dict(zip((n for n, _ in policy.named_parameters()), values, strict=True))
        raw = torch.func.functional_call(_Raw(policy), {f"policy.{n}": v for n, v in named.items()}, (observation,))
        return policy.distribution.logp(raw, action)

    assert torch.autograd.gradcheck(total, tuple(p.detach().requires_grad_() for p in policy.parameters()))


class _Raw(nn.Module):
    def __init__(self, policy: ControlPolicy) -> None:
        super().__init__()
        self.policy = policy

    def forward(self, observation: Tensor) -> Tensor:
        return self.policy.raw(observation)


@pytest.mark.parametrize("distribution", [Categorical(3), MultiCategorical((2, 4)), Gaussian(2), SquashedGaussian(2),
                                          GaussianMixture(2, 3), Beta(2)], ids=str)  # fmt: skip
@pytest.mark.parametrize("log_std", ["parameter", "network"])
def test_the_stored_log_prob_is_the_one_that_training_starts_from(distribution: Any, log_std: str) -> None:
    policy = ControlPolicy(3, distribution, log_std=log_std)
    episodes = random_batch(8, 3, torch.zeros(8))
    action, logp = policy.act(episodes["observation"], torch.randn(8, distribution.noise))
    assert action.shape == (8, *distribution.action_shape)
    assert not logp.requires_grad
    again = policy.signals(episodes.with_columns("step", action=action), ["logp"])["logp"]
    assert torch.allclose(again, logp, atol=1e-4)


def test_deterministic_action_is_the_mode_with_unknown_log_prob() -> None:
    policy = ControlPolicy(3, SquashedGaussian(2))
    observation = torch.randn(4, 3)
    action, logp = policy.act(observation, torch.full((4, 2), 50.0), deterministic=True)
    assert torch.equal(action, policy.raw(observation)[:, :2].detach().tanh())
    assert bool(logp.isnan().all())


def test_a_row_does_not_depend_on_its_batch() -> None:
    policy = ControlPolicy(3, Categorical(4), normaliser=Normaliser(3))
    policy.normaliser.update(torch.randn(50, 3) + 2)  # type: ignore[union-attr]
    observation = torch.randn(16, 3)
    assert torch.allclose(policy.raw(observation)[5:6], policy.raw(observation[5:6]), atol=1e-6)


# ---- saving --------------------------------------------------------------------------------------------------------
SAVED: list[Any] = [
    Categorical(3),
    MultiCategorical((2, 4)),
    Gaussian(2),
    Deterministic(2, 0.3),
    SquashedGaussian(2, -5),
    GaussianMixture(2, 3, spread=1.0),
    Beta(2),
]


@pytest.mark.parametrize("distribution", SAVED, ids=str)
def test_a_saved_policy_acts_the_same(distribution: Any, tmp_path: Path) -> None:
    normaliser = Normaliser(3, clip=5.0)
    normaliser.update(torch.randn(20, 3) * 3)
    policy = ControlPolicy(3, distribution, (8,), "relu", "network", -1.0, normaliser, orthogonal=False)
    policy.save(tmp_path / "policy")
    loaded = load_control_policy(tmp_path / "policy")
    observation, noise = torch.randn(6, 3), torch.randn(6, distribution.noise)
    assert loaded.distribution == distribution
    for ours, theirs in zip(policy.act(observation, noise), loaded.act(observation, noise), strict=True):
        assert torch.equal(ours, theirs) or bool(ours.isnan().all() and theirs.isnan().all())
    assert torch.equal(loaded.normaliser.var, normaliser.var)  # type: ignore[union-attr]


def test_a_copy_is_independent() -> None:
    policy = ControlPolicy(3, Gaussian(2), normaliser=Normaliser(3))
    target = copy.deepcopy(policy)
    policy.normaliser.update(torch.ones(5, 3))  # type: ignore[union-attr]
    assert int(target.normaliser.count) == 0  # type: ignore[union-attr]


# ---- bad input -----------------------------------------------------------------------------------------------------
def test_bad_input() -> None:
    with pytest.raises(ValueError, match=r"log_std is 'both'.*'parameter'.*'network'"):
        ControlPolicy(3, Gaussian(2), log_std="both")
    with pytest.raises(ValueError, match=r"unknown activation 'swish'.*tanh, relu, gelu"):
        ControlPolicy(3, Gaussian(2), activation="swish")
    policy = ControlPolicy(3, Gaussian(2))
    with pytest.raises(KeyError, match=r"no signal \['value'\].*logp"):
        policy.signals(random_batch(2, 3, torch.zeros(2, 2)), ["value"])
    with pytest.raises(KeyError, match="no column 'old_parameters'"):
        policy.signals(random_batch(2, 3, torch.zeros(2, 2)), ["reverse_kl:old"])


def test_loading_what_is_no_policy(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no control policy: expected config\.json"):
        load_control_policy(tmp_path)
    ControlPolicy(3, Gaussian(2)).save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["distribution"]["name"] = "Cauchy"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"distribution 'Cauchy': expected one of"):
        load_control_policy(tmp_path)
