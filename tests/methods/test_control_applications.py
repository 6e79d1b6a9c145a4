"""Post-decision PPO, one-step policy optimisation of fleets, ESG portfolios."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.control_toys import control_batch, control_players
from unipo.episodes import Column, Episodes, offsets_of
from unipo.learner import Learner, LearnerSettings, Player
from unipo.methods.control_applications import esg_portfolio, fleet_ppo, grpo_ride, ospo, pdppo, pdppo_q
from unipo.methods.policy_gradients import ppo
from unipo.objectives import (
    AfterDecision,
    BatchStd,
    Center,
    DecisionReturn,
    DiscountedReturn,
    Excess,
    GeneralisedAdvantage,
    GroupStd,
    LargerOf,
    LeaveOneOut,
    Normalised,
    Objective,
    Outcome,
    PolicyGradient,
    PostDecisionValue,
    Rows,
    TokenMean,
    ValueTarget,
    Whitened,
    with_settings,
)
from unipo.policies.control import ControlPolicy, load_control_policy
from unipo.policies.distributions import Categorical
from unipo.recipe import Recipe
from unipo.sources.acting.dispatch import Simulators, decisions, shifts
from unipo.sources.controllers import Doubling
from unipo.tabular.mdp import FiniteMDP, Values
from unipo.tasks.environments import PostDecisionFrozenLake, PostDecisionProcess
from unipo.tasks.environments.portfolio import Portfolio, Weights, regulated
from unipo.training.build_control import build_control
from unipo.training.config import ControlConfig
from unipo.training.control import Best
from unipo.training.loop import Run
from unipo.training.presets import control_config

GAMMA = 0.9


def policy_terms(recipe: Recipe) -> list[PolicyGradient]:
    return [term for _, term in recipe.objective.terms() if isinstance(term, PolicyGradient)]


def flat_gradient(players: dict[str, Player], batch: Episodes, objective: Objective) -> Tensor:
    learner = Learner(players, LearnerSettings(token_budget=10_000))
    learner.optimizer.zero_grad(set_to_none=True)
    learner.gradient(batch, objective)
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in players["policy"].parameters()]  # type: ignore[attr-defined]
    return torch.cat([g.flatten() for g in grads])


# ---- row 172: before and after chance --------------------------------------------------------------------------------
def test_with_the_first_advantage_alone_pdppo_is_ppo_with_monte_carlo_returns() -> None:
    recipe = pdppo(entropy=0.0)
    batch, players = control_batch(recipe, fragments=9), control_players(recipe)
    [term] = policy_terms(recipe)
    before = Whitened(LargerOf((Excess(DiscountedReturn(0.99)),)))
    [plain] = policy_terms(ppo(gamma=0.99, lam=1.0))
    assert torch.allclose(
        flat_gradient(players, batch, term.but(advantage=before)), flat_gradient(players, batch, plain)
    )
    assert not torch.allclose(flat_gradient(players, batch, term), flat_gradient(players, batch, plain))


def test_the_larger_advantage_is_biased_upwards() -> None:
    batch = control_batch(pdppo(), fragments=40)
    before, decided = Excess(DiscountedReturn(0.99)), Excess(DecisionReturn(0.99), "old_post_value")
    a, b, larger = (part(batch, {}) for part in (before, decided, LargerOf((before, decided))))
    assert torch.equal(larger, torch.maximum(a, b))
    assert float(larger.mean()) > max(float(a.mean()), float(b.mean()))


def test_returns_of_decisions_go_on_with_the_critic_where_they_were_cut() -> None:
    lengths = torch.tensor([2, 1])
    columns = {
        "reward_decision": Column(torch.tensor([1.0, 2.0, 4.0]), "step"),
        "old_post_value": Column(torch.tensor([8.0, 16.0, 32.0]), "step"),
        "truncated": Column(torch.tensor([True, False]), "episode"),
    }
    batch = Episodes({"turn": offsets_of(lengths), "episode": torch.arange(3), "group": torch.arange(3)}, columns)
    assert DecisionReturn(0.5)(batch, {}).tolist() == [1 + 0.5 * (2 + 0.5 * 16), 2 + 0.5 * 16, 4.0]


def random_process(seed: int, states: int = 6, actions: int = 3) -> PostDecisionProcess:
    generator = torch.Generator().manual_seed(seed)
    raw = torch.rand(states, states, generator=generator, dtype=torch.float64)
    return PostDecisionProcess(
        post=torch.randint(states, (states, actions), generator=generator),
        reward_decision=torch.randn(states, actions, generator=generator, dtype=torch.float64),
        outcome=raw / raw.sum(1, keepdim=True),
        reward_outcome=torch.randn(states, generator=generator, dtype=torch.float64),
        initial=torch.full((states,), 1.0 / states, dtype=torch.float64),
    )


def exact(process: PostDecisionProcess, seed: int) -> tuple[FiniteMDP, Values]:
    """With the values of a random policy."""
    mdp = process.mdp(GAMMA)
    policy = torch.randn(mdp.states, mdp.actions, generator=torch.Generator().manual_seed(seed)).double().softmax(1)
    return mdp, mdp.evaluate(policy)


def all_pairs(process: PostDecisionProcess, found: Values) -> Episodes:
    """Every (state, action) as a step of its own, with exact critics."""
    states, actions = process.post.shape
    state = torch.arange(states).repeat_interleave(actions)
    step = {
        "reward_decision": process.reward_decision.flatten(),
        "old_post_value": process.post_value(found.v, GAMMA)[process.post].flatten(),
        "old_value": found.v[state],
    }
    return Episodes.flat(step=step, kind="rollout")


@pytest.mark.parametrize("seed", range(5))
def test_exact_critics_leave_no_variance_and_no_mean(seed: int) -> None:
    """A is a function of (s, a) alone, it is Q - V, and its mean under the policy is 0."""
    process = random_process(seed)
    mdp, found = exact(process, seed)
    a = Excess(PostDecisionValue())(all_pairs(process, found), {}).reshape(mdp.states, mdp.actions)
    assert torch.allclose(a, found.q - found.v[:, None], atol=1e-12)
    assert torch.allclose((found.policy * a).sum(1), torch.zeros(mdp.states).double(), atol=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_a_decision_that_changes_nothing_leaves_its_own_reward(seed: int) -> None:
    """Where f(s, a) = f(s), V_x cancels: A = r^x(s, a) - E_a r^x, and 0 if r^x ignores a too."""
    process = random_process(seed)
    process = replace(process, post=process.post[:, :1].expand(-1, process.post.shape[1]).contiguous())
    _, found = exact(process, seed)
    a = Excess(PostDecisionValue())(all_pairs(process, found), {}).reshape(process.post.shape)
    mean = (found.policy * process.reward_decision).sum(1, keepdim=True)
    assert torch.allclose(a, process.reward_decision - mean, atol=1e-12)
    same = replace(
        process, reward_decision=process.reward_decision[:, :1].expand(-1, process.post.shape[1]).contiguous()
    )
    _, found = exact(same, seed)
    assert float(Excess(PostDecisionValue())(all_pairs(same, found), {}).abs().max()) < 1e-12


def test_without_chance_the_post_decision_advantage_is_that_of_one_step() -> None:
    """No slip: V_x(f(s, a)) = r(s^x) + gamma V(s'), so that A is GAE's delta; and V_x's target is exactly V_x."""
    lake = PostDecisionFrozenLake(slip=0.0, proximity=0.3)
    process = lake.process()
    mdp, found = exact(process, 1)
    following = process.outcome[process.post].argmax(-1).flatten()
    pairs = all_pairs(process, found)
    reward = (process.reward_decision + process.reward_outcome[process.post]).flatten()
    ended = torch.zeros(len(pairs), dtype=torch.bool)
    pairs = pairs.with_columns("step", reward=reward, old_next_value=found.v[following])
    pairs = pairs.with_columns("episode", terminated=ended, truncated=~ended)
    expected = GeneralisedAdvantage(GAMMA, 0.0)(pairs, {})
    assert torch.allclose(Excess(PostDecisionValue())(pairs, {}), expected, atol=1e-12)
    assert torch.allclose(AfterDecision(ValueTarget(GAMMA, 0.0))(pairs, {}), pairs["old_post_value"], atol=1e-12)
    assert mdp.states == 16


def decision_values(process: PostDecisionProcess, policy: Tensor) -> Tensor:
    """E[G^x | s, a] [S, A]: the return of the decisions' own rewards."""
    own = replace(process, reward_outcome=torch.zeros_like(process.reward_outcome))
    return own.mdp(GAMMA).evaluate(policy).q


def test_where_the_post_decision_state_tells_the_reward_its_advantage_carries_no_gradient() -> None:
    """On the lake r^x is a function of s^x: E[G^x | s, a] is the same for every (s, a) that leads there, V_x(s^x) itself."""
    process = PostDecisionFrozenLake(proximity=0.3).process()
    _, found = exact(process, 2)
    live = ~torch.tensor([bool(PostDecisionFrozenLake().ended(s)) for s in range(16)])
    q, post = decision_values(process, found.policy)[live].flatten(), process.post[live].flatten()
    assert all(float(q[post == cell].max() - q[post == cell].min()) < 1e-12 for cell in post.unique())
    general = random_process(0)
    q, post = decision_values(general, exact(general, 2)[1].policy).flatten(), general.post.flatten()
    assert max(float(q[post == x].max() - q[post == x].min()) for x in post.unique()) > 0.1


def test_both_critics_learn_and_a_run_resumes(tmp_path: Path) -> None:
    def made(recipe: Recipe, name: str) -> Run:
        config = control_config(recipe, {}, method="pdppo", task="unipo/LotSizing-v0", out=str(tmp_path / name), threads=1,
                                total_timesteps=256, num_envs=2, rollout=32, hidden=(8,), epochs=2, evaluations=0,
                                tensorboard=False)  # fmt: skip
        return build_control(config, recipe)

    for recipe in (pdppo(), pdppo_q()):
        name = f"{len(list(tmp_path.iterdir()))}"
        whole = made(recipe, name + "whole")
        start = [p.detach().clone() for p in whole.modules["post"].parameters()]
        whole.train()
        assert all(not torch.equal(a, b) for a, b in zip(start, whole.modules["post"].parameters(), strict=True))
        begun = made(recipe, name + "begun")
        begun.advance()
        begun.save()
        resumed = made(recipe, name + "begun")
        resumed.restore()
        resumed.train()
        for a, b in zip(resumed.learner.parameters(), whole.learner.parameters(), strict=True):
            assert torch.equal(a, b)


# ---- row 31: fleets --------------------------------------------------------------------------------------------------
def test_returns_of_decisions_count_the_time_between_them() -> None:
    """A vehicle paid 5 for a trip of three times, then 2: G = 5 + gamma^3 2. Busy steps are nobody's decisions."""
    acted = torch.tensor([True, False, False, True, True, True, False, True])
    columns = {
        "observation": Column(torch.arange(8.0)[:, None], "step"),
        "reward": Column(torch.tensor([5.0, 0, 0, 2.0, 1.0, 3.0, 0, 7.0]), "step"),
        "acted": Column(acted, "step"),
        "time": Column(torch.arange(4).repeat(2), "step"),
        "env": Column(torch.tensor([0, 1]), "episode"),
        "episode_number": Column(torch.zeros(2, dtype=torch.long), "episode"),
        "policy_version": Column(torch.zeros(2, dtype=torch.long), "episode"),
        "terminated": Column(torch.tensor([True, True]), "episode"),
        "truncated": Column(torch.tensor([False, False]), "episode"),
        "final_observation": Column(torch.tensor([[8.0], [9.0]]), "episode"),
    }
    two = torch.arange(3)
    batch = Episodes({"turn": torch.tensor([0, 4, 8]), "episode": two, "group": two}, columns)
    found = decisions(batch, 0.5, vehicles=2)
    assert found["observation"].flatten().tolist() == [0, 4, 5, 3, 7]
    assert found["reward_to_go"].tolist() == [5 + 2 / 8, 1 + 3 / 2 + 7 / 8, 3 + 7 / 4, 2, 7]
    assert found.lengths("group", "episode").tolist() == [2, 1, 2]
    assert found["terminated"].tolist() == [False, False, False, True, True]
    assert torch.equal(found["truncated"], ~found["terminated"])
    assert found["final_observation"].flatten().tolist() == [1, 5, 6, 8, 9]
    assert decisions(batch, 0.5, vehicles=1).lengths("group", "episode").tolist() == [1] * 5


def test_grpo_ride_without_a_future_is_ospo() -> None:
    """gamma = 0: G = r; OSPO normalised by the same std has the same gradient."""
    recipe = ospo()
    batch, players = control_batch(recipe, fragments=8), control_players(recipe)
    batch = batch.with_columns("step", reward_to_go=batch["reward"])
    [ours], [theirs] = policy_terms(recipe), policy_terms(grpo_ride(gamma=0.0))
    scaled = ours.but(scale=GroupStd(1e-8, ddof=0))
    a, b = (flat_gradient(players, batch, term) for term in (scaled, theirs))
    assert float(a.norm()) > 0
    assert torch.allclose(a, b, atol=1e-14)


ARMS, SECOND = 3, 2
PAYS = torch.tensor([0.0, 1.0, 3.0], dtype=torch.float64)


def softmax_policy(states: int = 1) -> ControlPolicy:
    policy = ControlPolicy(states, Categorical(ARMS), hidden=()).double()
    with torch.no_grad():
        policy.network.head.weight.copy_(torch.randn(ARMS, states, generator=torch.Generator().manual_seed(3)).double())
    return policy


def played(actions: tuple[int, ...], agents: int) -> Episodes:
    """`agents` that chose at each time: a group per time; rewards do not depend on anything before."""
    chosen = torch.tensor(actions)
    reward = PAYS[chosen]
    togo = reward.reshape(-1, agents).flip(0).cumsum(0).flip(0).flatten()
    step = {
        "observation": torch.ones(len(chosen), 1).double(),
        "action": chosen,
        "reward": reward,
        "reward_to_go": togo,
    }
    flat = Episodes.flat(step=step, kind="rollout")
    one = torch.arange(len(chosen) + 1)
    groups = torch.arange(0, len(chosen) + 1, agents)
    return Episodes({"turn": one, "episode": one, "group": groups}, flat.columns)


def expected_gradient(advantage: object, agents: int, times: int) -> Tensor:
    """The mean over everything that can happen, weighted by its probability."""
    term = PolicyGradient(advantage=advantage, aggregate=TokenMean(), rows=Rows())  # type: ignore[arg-type]
    policy = softmax_policy()
    pi = policy.raw(torch.ones(1, 1).double()).detach().softmax(-1)[0]
    total = torch.zeros(sum(p.numel() for p in policy.parameters())).double()
    for actions in itertools.product(range(ARMS), repeat=agents * times):
        weight = float(pi[list(actions)].prod())
        total += weight * flat_gradient({"policy": policy}, played(actions, agents), term)
    return total


def test_where_actions_do_not_matter_for_later_ospo_has_the_gradient_of_returns_up_to_the_group() -> None:
    """By enumeration: raw rewards = rewards-to-go; the group's mean multiplies by 1 - 1/G; leave-one-out is unbiased."""
    agents, raw = 2, Normalised(center=Center())
    truth = expected_gradient(raw, agents, SECOND)
    togo = expected_gradient(Normalised(center=Center(), outcome=Outcome("reward_to_go")), agents, SECOND)
    assert float(truth.norm()) > 0.05
    assert torch.allclose(togo, truth, atol=1e-12)
    for agents in (2, 3):
        truth = expected_gradient(raw, agents, 1)
        centred, left_out = (
            expected_gradient(Normalised(center=c), agents, 1) for c in (Normalised().center, LeaveOneOut())
        )
        assert torch.allclose(centred, (1 - 1 / agents) * truth, atol=1e-12)
        assert torch.allclose(left_out, truth, atol=1e-12)


def test_a_constant_added_to_a_group_changes_nothing() -> None:
    recipe = ospo()
    batch, players = control_batch(recipe, fragments=8), control_players(recipe)
    offset = batch.expand(torch.tensor([3.0, -2.0, 0.5, 9.0]).double(), level="group") / batch.expand(batch.lengths())
    moved = batch.with_columns("step", reward=batch["reward"] + offset)
    [term] = policy_terms(recipe)
    for changes, same in (
        ({}, True),
        ({"scale": GroupStd()}, True),
        ({"center": LeaveOneOut()}, True),
        ({"center": Center()}, False),
    ):
        kind = term.but(**changes) if changes else term
        a, b = flat_gradient(players, batch, kind), flat_gradient(players, moved, kind)
        assert torch.allclose(a, b, atol=1e-12) == same


def myopia(actions: Tensor) -> Episodes:
    """Two times: arm 0 pays 1 now and nothing later, the others nothing now and 2 later, whatever is done then."""
    agents = len(actions)
    first = (actions == 0).double()
    later = torch.where(actions == 0, 0.0, 2.0).double()
    see = torch.zeros(2 * agents, 3).double()
    see[:agents, 0], see[agents:, 1], see[agents:, 2] = 1, (actions == 0).double(), (actions != 0).double()
    step = {
        "observation": see, "action": torch.cat([actions, torch.zeros_like(actions)]), "reward": torch.cat([first, later]),
        "reward_to_go": torch.cat([first + later, later]),
    }  # fmt: skip
    flat, one = Episodes.flat(step=step, kind="rollout"), torch.arange(2 * agents + 1)
    return Episodes({"turn": one, "episode": one, "group": torch.tensor([0, agents, 2 * agents])}, flat.columns)


def test_ospo_is_myopic() -> None:
    """A limitation: it learns the arm that pays at once, where returns learn the other."""
    found = {}
    for recipe in (ospo(kl=0.0, entropy=0.0), grpo_ride(kl=0.0, entropy=0.0)):
        policy = ControlPolicy(3, Categorical(ARMS), hidden=()).double()
        learner = Learner({"policy": policy}, LearnerSettings(learning_rate=0.1))
        generator = torch.Generator().manual_seed(0)
        for _ in range(60):
            pi = policy.raw(torch.eye(3).double()).detach().softmax(-1)[0]
            batch = myopia(torch.multinomial(pi, 64, replacement=True, generator=generator))
            logp = policy.signals(batch, ["logp"])["logp"].detach()
            learner.update(batch.with_columns("step", behavior_logp=logp), recipe.objective)
        column = "reward" if recipe.needs.columns >= {"reward"} else "reward_to_go"
        found[column] = float(policy.raw(torch.eye(3).double()).detach().softmax(-1)[0, 0])
    assert found["reward"] > 0.95
    assert found["reward_to_go"] < 0.05


def test_the_penalty_waits_for_a_setback_then_doubles() -> None:
    doubling, state, seen = Doubling(knob="b", value=0.5, limit=0.01), None, []
    for reward, kl in ((1.0, 0.0), (2.0, 9.0), (2.0, 9.0), (3.0, 0.005), (1.0, 0.02), (float("nan"), 0.02)):
        state = doubling.observe(state or doubling.start(), {"reward": reward, "kl_reference": kl})
        seen.append(doubling.setting(state, 0))
    assert seen == [0, 0, 0.5, 0.5, 1.0, 2.0]
    assert doubling.setting(doubling.start(), 0) == 0


def test_the_best_policy_so_far_is_kept() -> None:
    policy, kept = softmax_policy(), softmax_policy()
    best = Best(kept)
    for score, weight in ((1.0, 1.0), (0.5, 2.0), (3.0, 3.0), (3.0, 4.0)):
        torch.nn.init.constant_(policy.network.head.bias, weight)
        best.offer(policy, [(score - 1, 3), (score + 1, 3)])
    best.offer(policy, [])
    assert kept.network.head.bias.tolist() == [3.0] * ARMS
    assert best.score == 3.0


def fleet(recipe: Recipe, folder: Path, **settings: object) -> Run:
    config = control_config(recipe, {}, method="ospo", task="unipo/RideDispatch-v0", out=str(folder), threads=1, hidden=(16,),
                            total_timesteps=120, evaluations=0, tensorboard=False, **settings)  # fmt: skip
    return build_control(config, recipe)


def test_a_fleet_trains_and_resumes(tmp_path: Path) -> None:
    recipe = ospo()
    whole = fleet(recipe, tmp_path / "whole").train()
    begun = fleet(recipe, tmp_path / "begun")
    for _ in range(2):
        begun.advance()
    begun.save()
    resumed = fleet(recipe, tmp_path / "begun")
    resumed.restore()
    resumed.train()
    for a, b in zip(resumed.learner.parameters(), whole.learner.parameters(), strict=True):
        assert torch.equal(a, b)
    assert resumed.data.state_dict()["best"] == whole.data.state_dict()["best"] > 0
    assert fleet_ppo().objective.needs.signals >= {"value", "logp"}


def test_the_middle_of_a_shift_is_found_again() -> None:
    def advanced(simulators: Simulators, steps: int) -> list[float]:
        paid = []
        for _ in range(steps):
            mask = simulators.observation[:, -6:]
            outcome = simulators.step(mask.shape[1] - 1 - mask[:, ::-1].argmax(1))
            paid.append(float(outcome.reward.sum()))
        return paid

    one, other = (Simulators("unipo/RideDispatch-v0", 2, 5, vehicles=3, horizon=7) for _ in range(2))
    advanced(one, 10)
    other.load_state_dict(one.state_dict())
    assert one.episode_number.tolist() == [1] * 6
    assert np.array_equal(one.observation, other.observation)
    assert advanced(one, 8) == advanced(other, 8)
    with pytest.raises(ValueError, match="use as many"):
        Simulators("unipo/RideDispatch-v0", 1, 5, vehicles=3).load_state_dict(one.state_dict())


def test_choices_that_do_not_count_are_never_made(tmp_path: Path) -> None:
    policy = ControlPolicy(5, Categorical(3), hidden=(), masked=True)
    see = torch.cat([torch.randn(200, 2), torch.tensor([1.0, 0.0, 1.0]).expand(200, 3)], 1)
    action, logp = policy.act(see, torch.randn(200, 1))
    assert set(action.tolist()) == {0, 2}
    raw = policy.raw(see)
    assert torch.allclose(policy.distribution.entropy(raw), Categorical(2).entropy(raw[:, [0, 2]]))
    assert float(policy.distribution.kl(raw, raw).abs().max()) == 0
    assert torch.allclose(logp, policy.distribution.logp(raw, action))
    policy.save(tmp_path)
    assert torch.equal(load_control_policy(tmp_path).raw(see), raw)


def test_a_whole_shift_without_noise() -> None:
    simulators = Simulators("unipo/RideDispatch-v0", 2, 0, vehicles=4, horizon=5)
    waiting = shifts(lambda seen, noise: (torch.zeros(len(seen), dtype=torch.long), torch.zeros(len(seen))), simulators)
    assert waiting == [(0.0, 5)] * 8


# ---- row 79: portfolios ----------------------------------------------------------------------------------------------
def test_without_regulation_it_is_ppo() -> None:
    free = esg_portfolio(kappa=0.0)
    assert free.objective == ppo(gamma=0.95, value=0.5, value_clip=0.0).objective
    env = Portfolio(orders=Weights(), days=30, kappa=0.0)
    env.reset(seed=1)
    for _ in range(30):
        _, reward, _, _, info = env.step(env.action_space.sample())
        assert reward == info["base_reward"]


def test_equal_scores_are_not_regulated() -> None:
    assert [regulated(r, 50.0, 50.0, 3.0) for r in (-2.0, 0.0, 2.0)] == [-2.0, 0.0, 2.0]


def test_losses_are_never_granted() -> None:
    for score in (0.0, 40.0, 60.0, 100.0):
        assert regulated(-2.0, score, 50.0, 3.0) <= -2.0
    assert regulated(2.0, 60.0, 50.0, 3.0) == pytest.approx(2.6)
    assert regulated(2.0, 40.0, 50.0, 3.0) == pytest.approx(1.4)
    assert regulated(-2.0, 40.0, 50.0, 3.0) == pytest.approx(-2.6)


def test_the_method_brings_its_regulation_along() -> None:
    recipe = esg_portfolio(kappa=2.0)
    config = control_config(recipe, {}, method="esg-portfolio", task="unipo/PortfolioWeights-v0")
    assert isinstance(config, ControlConfig)
    assert config.env_options == {"kappa": 2.0}
    assert with_settings(recipe.objective, {}).needs == recipe.needs
    assert BatchStd() in [t.advantage.whiten for t in policy_terms(recipe)]  # type: ignore[attr-defined]
