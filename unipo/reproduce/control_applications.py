"""Claims of applications: sampling error of who acts, lot-sizing after the decision, fleets, regulated portfolios."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from unipo.methods import control_applications, props
from unipo.methods.control_applications import esg_portfolio, fleet_ppo, grpo_ride, ospo, pdppo, pdppo_q
from unipo.methods.policy_gradients import ppo
from unipo.methods.props import undersampled
from unipo.policies.control import ControlPolicy
from unipo.policies.distributions import Categorical
from unipo.recipe import Recipe
from unipo.reproduce.claim import Claim, Expectation
from unipo.reproduce.control import area, final, trained
from unipo.sources.acting.behaviour import Behaviour
from unipo.sources.acting.environments import make_environment
from unipo.sources.keyed import keyed_generator
from unipo.tasks.environments import performance
from unipo.training.adapted import Adapted
from unipo.training.build_control import build_control
from unipo.training.presets import control_config

CLAIMED = {m.slug: m.claim for page in (props, control_applications) for m in page.METHODS if m.claim}

# ---- row 4: sampling error of a fixed policy -------------------------------------------------------------------------
SIDE, ARMS, EVERY = 5, 10, 16
Behaves = Callable[[float], Behaviour | None]
MOVES = ((0, -1), (1, 0), (0, 1), (-1, 0))


def softmax_table(states: int, actions: int, seed: int) -> ControlPolicy:
    """A fixed random policy: independent standard normal logits in each of `states`, which are seen as one-hot vectors."""
    policy = ControlPolicy(states, Categorical(actions), hidden=())
    generator = keyed_generator(seed, "fixed policy", states)
    with torch.no_grad():
        policy.network.head.weight.copy_(torch.from_numpy(generator.standard_normal((actions, states))))
    return policy


def walked(cell: int, action: int) -> int:
    """The 5x5 grid: from the last cell back to the first, else a step; walls hold."""
    if cell == SIDE * SIDE - 1:
        return 0
    row, column = divmod(cell, SIDE)
    down, right = MOVES[action]
    return min(max(row + down, 0), SIDE - 1) * SIDE + min(max(column + right, 0), SIDE - 1)


def collected(policy: ControlPolicy, behaviour: Behaviour | None, follow: Callable[[int, int], int], steps: int,
              seed: int) -> Tensor:  # fmt: skip
    """Counts [S, A] of what was done in `steps` steps."""
    states = policy.observation_size
    counts, state = torch.zeros(states, policy.distribution.parameters), 0
    noise = torch.from_numpy(keyed_generator(seed, "acting", states).standard_normal((steps, 1, 1), dtype=np.float32))
    act = policy.act
    if behaviour is not None:
        who = Adapted(behaviour, policy, steps, seed)
        who.begin([], 0)
        act = who.act  # type: ignore[assignment]
    for t in range(steps):
        action = int(act(torch.eye(states)[state : state + 1], noise[t])[0])
        counts[state, action] += 1
        state = follow(state, action)
    return counts


def sampling_error(counts: Tensor, policy: ControlPolicy) -> float:
    """sum_s d_D(s) KL(pi_D || pi): how far what was done is from the policy, in nats per step."""
    logp = policy.raw(torch.eye(len(counts))).detach().log_softmax(-1)
    empirical = counts / counts.sum(1, keepdim=True).clamp(min=1)
    divergence = (torch.xlogy(empirical, empirical) - empirical * logp).sum(1)
    return float((counts.sum(1) * divergence).sum() / counts.sum())


def sampling_trial(arm: Behaves, rate: float, seed: int, steps: int) -> Mapping[str, float]:
    bandit, grid = softmax_table(1, ARMS, seed), softmax_table(SIDE * SIDE, len(MOVES), seed)
    behaviour = arm(rate)
    return {
        "error on the grid": sampling_error(collected(grid, behaviour, walked, steps, seed), grid),
        "error on the bandit": sampling_error(collected(bandit, behaviour, lambda s, a: 0, steps, seed), bandit),
    }


def adapting(rate: float) -> Behaviour:
    return Behaviour(objective=undersampled(0.3), every=EVERY, epochs=8, minibatches=2, learning_rate=rate,
                     stop=0.1)  # fmt: skip


def one_step(rate: float) -> Behaviour:
    return Behaviour(objective=undersampled(None), every=1, epochs=1, minibatches=1, learning_rate=100 * rate, eps=1.0)


# ---- row 172: lot-sizing ---------------------------------------------------------------------------------------------
MONEY = 10.0
COSTS = {"setup_cost": 1.0 / MONEY, "holding_cost": 0.1 / MONEY, "lost_sales_cost": 2.0 / MONEY}
"""The environment's own costs in tens of money, which critics learn sooner."""


def lot_sizing(arm: Recipe, rate: float, seed: int, steps: int) -> Mapping[str, float]:
    settings: dict[str, Any] = {
        "num_envs": min(8, 1 + steps // 128),
        "rollout": 128,
        "batch_size": 128,
        "learning_rate": rate,
        "eval_episodes": min(20, 1 + steps // 128),
    }
    rows = trained(arm, "unipo/LotSizing-v0", seed, max(steps, settings["rollout"]), env_options=COSTS, **settings)
    return {"return while learning": MONEY * area(rows), "final return": MONEY * final(rows)}


# ---- row 31: a fleet -------------------------------------------------------------------------------------------------
SHIFT = 30


def dispatch(arm: Recipe, rate: float, seed: int, steps: int) -> Mapping[str, float]:
    rows = trained(
        arm,
        "unipo/RideDispatch-v0",
        seed,
        max(steps, SHIFT),
        learning_rate=rate,
        eval_episodes=min(10, 1 + steps // SHIFT),
    )
    half = len(rows) // 2
    return {
        "reward while learning": area(rows),
        "reward of the second half": area(rows[half:]),
        "final reward": final(rows),
    }


# ---- row 79: portfolios ----------------------------------------------------------------------------------------------
MARKETS, DAYS = 8, 250


def invested(arm: Recipe, rate: float, seed: int, steps: int) -> Mapping[str, float]:
    """What the trained policy's mode earns on paths of the market that it has not seen, told without the regulation."""
    with tempfile.TemporaryDirectory() as folder:
        config = control_config(arm, {}, method="claim", task="unipo/PortfolioWeights-v0", seed=seed, out=folder,
                                total_timesteps=steps, learning_rate=rate, tensorboard=False, evaluations=0, checkpoints=1,
                                num_envs=min(4, 1 + steps // DAYS),
                                threads=1)  # fmt: skip
        run = build_control(config, arm, Console(quiet=True))
        run.train()
        run.data.close()
    told = [one_year(run.policy, 10_000 + 100 * seed + k) for k in range(min(MARKETS, 1 + steps // DAYS))]
    return {name: float(np.mean([year[name] for year in told])) for name in told[0]}


def one_year(policy: ControlPolicy, seed: int) -> Mapping[str, float]:
    env = make_environment("unipo/PortfolioWeights-v0")
    observation, info = env.reset(seed=seed)
    wealth, esg = [info["wealth"]], []
    for _ in range(DAYS):
        seen = torch.from_numpy(observation)[None]
        action = policy.act(seen, torch.zeros(1, 1), deterministic=True)[0][0].clamp(-1, 1)
        observation, _, _, _, info = env.step(action.numpy())
        wealth.append(info["wealth"])
        esg.append(info["esg"])
    year = performance(np.array(wealth), np.array(esg))
    return {"E_p": year.mean_esg, "return, %": 100 * year.cumulative_return, "Sharpe": year.sharpe,
            "drawdown, %": 100 * year.max_drawdown}  # fmt: skip


KAPPA = 5.0
CLAIMS = (
    Claim(
        slug="props",
        statement=CLAIMED["props"],
        arms={"props": adapting, "ros": one_step, "sampling": lambda rate: None},
        trial=sampling_trial,
        steps=512,
        tune="error on the grid",
        minimise=True,
        grid=(1e-3, 1e-2, 1e-1),
        expectations=(
            Expectation(arm="props", metric="error on the bandit", than="sampling", most=0.0),
            Expectation(arm="props", metric="error on the grid", than="sampling", most=0.0),
        ),
        note="A fixed policy with standard normal logits acts 512 times on a 10-armed bandit and on a 5x5 grid; error is "
        "sum_s d_D(s) KL(pi_D || pi), in nats. PROPS adapts every 16 steps, at most 8 epochs of 2 minibatches, clip .3, "
        "stop .1; ROS takes a gradient step after every step (its rate is 100 times the one shown). The target does not learn "
        "here: whether lower sampling error helps PPO is not measured.",
    ),
    Claim(
        slug="pdppo",
        statement=CLAIMED["pdppo"],
        arms={"pdppo": pdppo(), "pdppo-q": pdppo_q(), "ppo": ppo(gamma=0.99, value=1.0, value_clip=0.0, entropy=0.005,
                                                                epochs=10)},
        trial=lot_sizing,
        steps=16_384,
        tune="return while learning",
        grid=(1e-3, 3e-3),
        expectations=(
            Expectation(arm="pdppo", metric="return while learning", than="ppo", least=0.0),
            Expectation(arm="pdppo", metric="final return", than="ppo", least=0.0),
        ),
        note="unipo/LotSizing-v0: 2 items, 1 machine, Poisson demand, 100 periods, returns in money (costs in tens while "
        "training). 8 environments x 128 steps, minibatches of 128, 10 epochs, two layers of 64 units, entropy .005, advantages "
        "whitened, for all arms. pdppo-q replaces the maximum by r^x + V_x(s^x) - V(s); PPO has GAE .95, PDPPO Monte-Carlo "
        "returns, as its paper has them. The paper trains far longer and on larger plants; its lake is not measured.",
    ),
    Claim(
        slug="ospo",
        statement=CLAIMED["ospo"],
        arms={"ospo": ospo(), "grpo-ride": grpo_ride(), "ppo": fleet_ppo()},
        trial=dispatch,
        steps=4_500,
        tune="reward of the second half",
        grid=(1e-3, 3e-3),
        expectations=(
            Expectation(arm="ospo", metric="reward of the second half", than="grpo-ride", least=-0.5),
            Expectation(arm="ospo", metric="reward of the second half", than="ppo", least=0.0),
            Expectation(arm="grpo-ride", metric="reward of the second half", than="ppo", least=0.0),
        ),
        note="20 vehicles on a 5x5 grid, 150 shifts of 30 times, reward in money per vehicle and shift, of the policy while it "
        "explores. 4 epochs of minibatches of 256 decisions after every shift, two layers of 64 units, entropy .05 for all; "
        "choices that are not there are masked. OSPO and GRPO have clip (.2, .28) and the KL to the best policy so far, PPO "
        "clip .2 and a critic on G. As good as: within .5. Conflicts go to the nearest vehicle, without bipartite matching.",
    ),
    Claim(
        slug="esg-portfolio",
        statement=CLAIMED["esg-portfolio"],
        arms={"regulated": esg_portfolio(kappa=KAPPA), "free": esg_portfolio(kappa=0.0)},
        trial=invested,
        steps=32_000,
        tune="return, %",
        grid=(1e-3,),
        expectations=(
            Expectation(arm="regulated", metric="E_p", than="free", least=0.0),
            Expectation(arm="regulated", metric="return, %", than="free", least=-5.0),
        ),
        note=f"unipo/PortfolioWeights-v0, 5 synthetic assets, PPO for 32,000 days, kappa {KAPPA:g}; the mode of the trained "
        "policy on 8 paths of 250 days that it has not seen, without regulation: E_p is the mean ESG score of what is held, "
        "the return that of one year. Comparable: not more than 5 points a year less. Synthetic markets, one set of assets.",
    ),
)  # fmt: skip
