"""PROPS: a behaviour policy that fills in what the data lack."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from unipo.episodes import Episodes
from unipo.learner import Learner, annotate
from unipo.methods.props import buffered_ppo, props, ros, undersampled
from unipo.objectives import Objective
from unipo.policies.control import ControlPolicy
from unipo.policies.distributions import Categorical, Gaussian
from unipo.recipe import Recipe
from unipo.sources.acting.behaviour import Behaviour, Recent
from unipo.training.adapted import Adapted
from unipo.training.build_control import build_control
from unipo.training.config import ControlConfig
from unipo.training.loop import Run

ARMS = 5


def bandit(seed: int = 0, spread: float = 1.0) -> ControlPolicy:
    """A softmax over arms whose bias holds all of its logits."""
    policy = ControlPolicy(1, Categorical(ARMS), hidden=()).double()
    with torch.no_grad():
        policy.network.head.weight.zero_()
        policy.network.head.bias.copy_(
            spread * torch.randn(ARMS, generator=torch.Generator().manual_seed(seed)).double()
        )
    return policy


def pulls(counts: list[int], target: ControlPolicy) -> Episodes:
    """Data of a bandit, with the log-probs of the target."""
    action = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    step = {"observation": torch.ones(len(action), 1, dtype=torch.float64), "action": action}
    needs = undersampled(0.3, 1.0).needs
    return annotate(Episodes.flat(step=step, kind="rollout"), needs, {"old": target}, 1000)


def gradient(policy: ControlPolicy, data: Episodes, objective: Objective) -> Tensor:
    policy.zero_grad()
    Learner({"policy": policy}).gradient(data, objective)
    found = policy.network.head.bias.grad
    assert found is not None
    return found.clone()


def ratio(policy: ControlPolicy, data: Episodes) -> Tensor:
    return (policy.signals(data, ["logp"])["logp"] - data["old_logp"]).exp()


# ---- the objective ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("spread", [0.0, 0.1, 1.0])
def test_its_loss_is_ppo_where_every_advantage_is_minus_one(seed: int, spread: float) -> None:
    """mean max(g, clip g) = -mean min(g A, clip(g) A) at A = -1, for any phi: equal gradients."""
    data, phi = pulls([3, 1, 4, 1, 5], bandit(0)), bandit(seed, spread)
    g = ratio(phi, data)
    ppo = -torch.minimum(g * -1.0, g.clamp(0.7, 1.3) * -1.0).mean()
    expected = torch.autograd.grad(ppo, phi.network.head.bias)[0]
    assert torch.allclose(gradient(phi, data, undersampled(0.3)), expected, atol=1e-14)
    assert torch.equal(torch.maximum(g, g.clamp(0.7, 1.3)).mean(), ppo)


def test_its_gradient_is_that_of_the_ratio_above_the_lower_clip_and_zero_below() -> None:
    """The upper clip never binds."""
    target, phi = bandit(0, 0.0), bandit(0, 0.0)
    with torch.no_grad():
        phi.network.head.bias.copy_(torch.tensor([1.5, 0.25, 0.0, -0.1, -2.0]))
    for arm in range(ARMS):
        data = pulls([int(a == arm) for a in range(ARMS)], target)
        g = ratio(phi, data).sum()
        expected = torch.autograd.grad(g, phi.network.head.bias)[0]
        found = gradient(phi, data, undersampled(0.3))
        assert torch.allclose(found, expected if g.item() > 0.7 else torch.zeros(ARMS).double(), atol=1e-14)
        assert torch.allclose(gradient(phi, data, undersampled(None)), expected, atol=1e-14)
    shares = [ratio(phi, pulls([int(a == arm) for a in range(ARMS)], target)).item() for arm in range(ARMS)]
    assert max(shares) > 1.3
    assert min(shares) < 0.7


def test_on_a_bandit_its_gradient_is_empirical_minus_target() -> None:
    """At phi = theta dL/dlogits = pi_D - pi_theta: a descent step raises exactly the arms that were pulled too rarely."""
    target, counts = bandit(1), [4, 0, 3, 2, 1]
    pi = target.network.head.bias.detach().softmax(0)
    expected = torch.tensor(counts).double() / sum(counts) - pi
    for objective in (undersampled(0.3), undersampled(None), undersampled(0.3, 0.7)):
        assert torch.allclose(gradient(bandit(1), pulls(counts, target), objective), expected, atol=1e-14)
    even = bandit(0, 0.0)
    assert float(gradient(bandit(0, 0.0), pulls([2] * ARMS, even), undersampled(0.3)).norm()) < 1e-14


def test_the_penalty_is_the_divergence_from_the_target() -> None:
    """d/dlogits KL(theta || phi) = phi - theta, for every step alike."""
    target, phi = bandit(1), bandit(2)
    data = pulls([1, 2, 0, 1, 1], target)
    own, other = (p.network.head.bias.detach().softmax(0) for p in (phi, target))
    found = gradient(phi, data, undersampled(0.3, 0.7)) - gradient(phi, data, undersampled(0.3))
    assert torch.allclose(found, 0.7 * (own - other), atol=1e-14)


def test_the_greedy_oracle_keeps_every_arm_within_a_pull() -> None:
    """Pulling argmax(pi - pi_D): |pi_D - pi| <= (A - 1) / n at every n; that is what adaptation can hope for."""
    for seed in range(20):
        pi = np.random.default_rng(seed).dirichlet(np.ones(ARMS))
        counts = np.zeros(ARMS)
        for n in range(1, 400):
            counts[(pi - counts / max(n - 1, 1)).argmax()] += 1
            assert np.abs(counts / n - pi).max() <= (ARMS - 1) / n + 1e-12


# ---- the policy that acts --------------------------------------------------------------------------------------------
def adapted(spec: Behaviour, target: ControlPolicy, memory: int = 50, copies: int = 1) -> Adapted:
    return Adapted(spec, target, memory, seed=3, copies=copies)


def acted(who: Adapted, steps: int, copies: int = 1) -> list[int]:
    generator = torch.Generator().manual_seed(7)
    seen = torch.ones(copies, 1, dtype=torch.float64)
    return [int(a) for _ in range(steps) for a in who.act(seen, torch.randn(copies, 1, generator=generator))[0]]


def logits(policy: ControlPolicy) -> Tensor:
    return policy.raw(torch.ones(1, 1, dtype=torch.float64)).detach()[0]


def test_it_moves_towards_what_the_data_lack() -> None:
    target = bandit(0, 0.0)
    who = adapted(Behaviour(objective=undersampled(), epochs=2, minibatches=1), target)
    who.begin([pulls([10, 10, 10, 10, 0], target)], 0)
    acted(who, 1)
    now, before = logits(who.policy).softmax(0), logits(target).softmax(0)
    assert (now[:4] < before[:4]).all()
    assert now[4] > before[4]


def test_it_starts_from_the_target_every_time() -> None:
    """What it was before does not matter: a second one that begins with the same data acts the same."""
    target, spec = bandit(1), Behaviour(objective=undersampled(), every=4, epochs=3, minibatches=2)
    past = pulls([3, 3, 3, 3, 3], target)
    tired, new = adapted(spec, target), adapted(spec, target)
    tired.begin([], 0)
    acted(tired, 20)
    for who in (tired, new):
        who.begin([past], 5)
    assert acted(tired, 12) == acted(new, 12)
    assert torch.equal(logits(tired.policy), logits(new.policy))
    assert not torch.equal(logits(new.policy), logits(target))


def test_passes_end_once_it_is_far_enough() -> None:
    target = bandit(0, 0.0)
    reached = []
    for stop in (1e-12, 0.003, 0.05):
        who = adapted(
            Behaviour(objective=undersampled(), epochs=200, minibatches=1, learning_rate=1e-2, stop=stop), target
        )
        who.begin([pulls([20, 5, 5, 5, 5], target)], 0)
        acted(who, 1)
        reached.append(who.divergence)
        assert who.divergence > stop
    assert reached == sorted(reached)
    assert reached[-1] < 0.06


def test_the_oldest_steps_are_forgotten() -> None:
    """Two copies: batches are stored copy by copy, memory runs by time."""
    target = bandit(0, 0.0)
    who = adapted(Behaviour(objective=undersampled(), every=1, epochs=1, minibatches=1), target, memory=4, copies=2)
    past = Episodes.flat(step={"observation": torch.ones(6, 1).double(), "action": torch.tensor([0, 1, 2, 3, 4, 0])})
    who.begin([past], 0)
    assert who._data()["action"].tolist() == [1, 4, 2, 0]


def test_ros_takes_one_step_along_the_gradient() -> None:
    target, data = bandit(1), pulls([4, 0, 3, 2, 1], bandit(1))
    control = ros(behaviour_rate=0.01).control
    assert control is not None
    assert control.behaviour is not None
    assert (control.behaviour.every, control.behaviour.epochs, control.behaviour.minibatches) == (1, 1, 1)
    who = adapted(control.behaviour, target)
    who.begin([data], 0)
    acted(who, 1)
    moved = who.policy.network.head.bias.detach() - target.network.head.bias.detach()
    step = -0.01 * gradient(bandit(1), data, undersampled(None))
    assert torch.allclose(moved, step, rtol=0.5, atol=0)
    assert torch.allclose(moved, step / (1 + (step / 0.01).abs()), rtol=1e-6)


def test_gaussian_actions_are_pushed_from_the_mean_of_the_data() -> None:
    target = ControlPolicy(1, Gaussian(1), hidden=()).double()
    data = Episodes.flat(step={"observation": torch.ones(8, 1).double(), "action": torch.full((8, 1), 0.6).double()})
    who = Adapted(Behaviour(objective=undersampled(), epochs=4), target, 100, 0)
    who.begin([data.with_columns("episode", kind="rollout")], 0)
    acted_mean = who.act(torch.ones(1, 1).double(), torch.zeros(1, 1).double())[0]
    assert float(acted_mean) < float(target.act(torch.ones(1, 1).double(), torch.zeros(1, 1).double())[0])


@pytest.mark.parametrize("wrong", [{"every": 0}, {"epochs": 0}, {"learning_rate": -1.0}, {"stop": 0.0}])
def test_settings_that_cannot_be(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"at least 1|expected"):
        Behaviour(objective=undersampled(), **wrong)  # type: ignore[arg-type]


def test_the_newest_batches(tmp_path: Path) -> None:
    one, two, three = (pulls([i, 1, 0, 0, 0], bandit()) for i in (1, 2, 3))
    recent = Recent(2)
    assert recent.add(one).count("step") == 2
    assert recent.add(two).count("step") == 5
    assert recent.add(three)["action"].tolist() == [0, 0, 1, 0, 0, 0, 1]
    recent.save(tmp_path)
    again = Recent(2)
    again.load(tmp_path)
    assert torch.equal(again.joined()["old_logp"], recent.joined()["old_logp"])


# ---- runs ------------------------------------------------------------------------------------------------------------
def run_of(recipe: Recipe, folder: Path) -> Run:
    config = ControlConfig(method="props", task="CartPole-v1", out=str(folder), total_timesteps=256, rollout=64, num_envs=1,
                           batch_size=32, hidden=(8,), epochs=2, evaluations=0, tensorboard=False, threads=1)  # fmt: skip
    return build_control(config, recipe)


def weights(run: Run) -> Tensor:
    return torch.cat([p.detach().flatten() for p in run.learner.parameters()])


def test_without_a_step_it_is_ppo_on_the_newest_batches(tmp_path: Path) -> None:
    still = run_of(
        props(every=16, behaviour_rate=0.0, behaviour_epochs=1, behaviour_minibatches=1), tmp_path / "a"
    ).train()
    plain = run_of(buffered_ppo(), tmp_path / "b").train()
    moving = run_of(props(every=16, behaviour_rate=0.05, stop=1.0), tmp_path / "c").train()
    assert torch.equal(weights(still), weights(plain))
    assert not torch.equal(weights(moving), weights(plain))


def test_two_batches_are_trained_on_from_the_second_step_on(tmp_path: Path) -> None:
    run = run_of(buffered_ppo(), tmp_path)
    drawn = []
    for step in range(3):
        batch = run._annotated(next(run.data.batches(step, step)))
        drawn.append(batch.count("step"))
        assert torch.equal(batch["old_logp"], run.policy.signals(batch, ["logp"])["logp"].detach())
    assert drawn == [64, 128, 128]
    assert batch["policy_version"].unique().tolist() == [1, 2]


def test_it_resumes_exactly(tmp_path: Path) -> None:
    recipe = props(every=16, behaviour_rate=0.02, behaviour_epochs=2, stop=1.0)
    whole = run_of(recipe, tmp_path / "whole").train()
    begun = run_of(recipe, tmp_path / "begun")
    for _ in range(2):
        begun.advance()
    begun.save()
    resumed = run_of(recipe, tmp_path / "begun")
    resumed.restore()
    assert resumed.step == 2
    resumed.train()
    assert torch.equal(weights(resumed), weights(whole))
