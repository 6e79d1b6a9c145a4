"""Contrastive preference learning on a lake that can be solved exactly, from what a policy without a plan did there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from unipo.episodes import Column, Episodes, offsets_of
from unipo.learner import Learner, LearnerSettings
from unipo.methods.catalog import build
from unipo.objectives import EpisodeMean, Likelihood, Marked, pairs
from unipo.policies.control import ControlPolicy
from unipo.policies.distributions import Categorical
from unipo.recipe import Recipe
from unipo.reproduce.claim import Claim, Expectation
from unipo.sources.keyed import keyed_generator
from unipo.sources.segment_pairs import Earned, SegmentPairs, labelled, segments
from unipo.tabular.mdp import KL, FiniteMDP
from unipo.tasks.environments.frozen_lake import PostDecisionFrozenLake

SLIP, DISCOUNT, TEMPERATURE = 0.3, 0.95, 0.05
EPISODES, SEGMENT, COUNT, BATCH = 4000, 4, 2000, 64


@lru_cache(maxsize=1)
def lake() -> tuple[FiniteMDP, Tensor]:
    """The 4x4 lake in tables, and the advantage [S, A] of the policy that is best with entropy."""
    mdp = PostDecisionFrozenLake(slip=SLIP).process().mdp(DISCOUNT)
    every = torch.ones(mdp.states, mdp.actions, dtype=torch.float64)
    best = mdp.optimal(KL(every, TEMPERATURE))
    return mdp, best.q - best.v[:, None]


@lru_cache(maxsize=16)
def wandering(seed: int) -> Episodes:
    """Episodes of a uniform policy."""
    env, draw = PostDecisionFrozenLake(slip=SLIP), keyed_generator(seed, "wandering")
    seen, acted, paid, lengths, finals, ended = [], [], [], [], [], []
    observation, _ = env.reset(seed=int(draw.integers(2**31)))
    for _ in range(EPISODES):
        begun = len(paid)
        while True:
            action = int(draw.integers(4))
            seen.append(observation)
            observation, reward, over, cut, _ = env.step(action)
            acted.append(action)
            paid.append(reward)
            if over or cut:
                break
        lengths.append(len(paid) - begun)
        finals.append(observation)
        ended.append(over)
        observation, _ = env.reset()
    one = torch.arange(EPISODES + 1)
    columns = {
        "observation": Column(torch.from_numpy(np.stack(seen)), "step"),
        "action": Column(torch.tensor(acted), "step"),
        "reward": Column(torch.tensor(paid, dtype=torch.float64), "step"),
        "final_observation": Column(torch.from_numpy(np.stack(finals)), "episode"),
        "terminated": Column(torch.tensor(ended), "episode"),
        "truncated": Column(~torch.tensor(ended), "episode"),
    }
    return Episodes({"turn": offsets_of(torch.tensor(lengths)), "episode": one, "group": one}, columns)


def by_regret(parts: Episodes) -> Tensor:
    """[E]: the sum of the best policy's advantages along each segment."""
    _, advantage = lake()
    return parts.reduce(advantage[parts["observation"].argmax(1), parts["action"]])


@dataclass(frozen=True)
class Learned:
    """An arm: a recipe (None: a reward model, and planning with it), and what preferences are by."""

    recipe: Recipe | None
    regret: bool = True


def cpl_trial(arm: Learned, rate: float, seed: int, steps: int) -> Mapping[str, float]:
    """Exact expected return of the policy as it acts, and of its mode, as shares of the best there is."""
    parts = segments(wandering(seed), SEGMENT, 2 * COUNT, seed)
    data = labelled(parts, by_regret(parts) if arm.regret else Earned()(parts))
    mdp, _ = lake()
    best = float(mdp.expected_return(mdp.optimal().policy))
    if arm.recipe is None:
        chosen = planned(mdp, data, rate, steps)
        found = float(mdp.expected_return(chosen)) / best
        return {"return": found, "return of the mode": found}
    chances = trained(arm.recipe, data, rate, seed, steps)
    mode = torch.nn.functional.one_hot(chances.argmax(1), mdp.actions).double()
    return {"return": float(mdp.expected_return(chances)) / best,
            "return of the mode": float(mdp.expected_return(mode)) / best}  # fmt: skip


def trained(recipe: Recipe, data: Episodes, rate: float, seed: int, steps: int) -> Tensor:
    """[S, A]: probabilities of a network's actions after `steps` updates."""
    mdp, _ = lake()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        policy = ControlPolicy(mdp.states, Categorical(mdp.actions), hidden=(32,))
    learner = Learner({"policy": policy}, LearnerSettings(learning_rate=rate, betas=(0.9, 0.999)))
    source = SegmentPairs(seed)
    source.add(data)
    for batch in source.samples(BATCH, 0, steps):
        learner.update(batch, recipe.objective)
    with torch.no_grad():
        return policy.raw(torch.eye(mdp.states)).double().softmax(-1)


def planned(mdp: FiniteMDP, data: Episodes, rate: float, steps: int) -> Tensor:
    """[S, A]: the best policy in the true dynamics for a reward of every state and action that explains the preferences.

    Bradley-Terry on the sums over segments, with a small weight decay. They leave a constant free, which is not free where
    episodes end: the best reward is made 0, as the best advantage is.
    """
    reward = torch.zeros(mdp.states, mdp.actions, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([reward], lr=rate)
    where = (data["observation"].argmax(1), data["action"])
    for _ in range(steps):
        score = data.reduce(reward[where])
        loss = torch.nn.functional.softplus(score[1::2] - score[::2]).mean() + 1e-4 * reward.square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    ends = mdp.transition.diagonal(dim1=0, dim2=2).T.min(1).values == 1
    paid = torch.where(ends[:, None], 0.0, reward.detach() - reward.max().detach())
    return (
        FiniteMDP(transition=mdp.transition, reward=paid, initial=mdp.initial, discount=mdp.discount).optimal().policy
    )


def cpl(**settings: float) -> Recipe:
    return build("cpl", {"cpl": settings}, environment=True)


CPL = Claim(
    slug="cpl",
    statement="from pairs of segments labelled by regret CPL finds better policies than imitation of the preferred segments, and "
    "no worse ones than a reward model and planning; with labels by return it does not",
    arms={
        "cpl": Learned(cpl()),
        "cpl, lam 1": Learned(cpl(lam=1.0)),
        "imitation of the preferred": Learned(
            Recipe(objective=Likelihood(rows=pairs & Marked(), aggregate=EpisodeMean()))
        ),
        "imitation of all": Learned(Recipe(objective=Likelihood(rows=pairs, aggregate=EpisodeMean()))),
        "reward model and planning": Learned(None),
        "cpl, labels by return": Learned(cpl(), regret=False),
    },
    trial=cpl_trial,
    steps=250,
    tune="return",
    grid=(0.01, 0.03),
    expectations=(
        Expectation(arm="cpl", metric="return", than="imitation of the preferred", least=0.0),
        Expectation(arm="cpl, lam 1", metric="return of the mode", than="imitation of the preferred", least=0.0),
        Expectation(arm="cpl, lam 1", metric="return", than="reward model and planning", least=-0.05),
        Expectation(arm="cpl", metric="return", than="cpl, labels by return", least=0.0),
    ),
    note=f"The post-decision frozen lake (4x4, slip {SLIP:g}, discount {DISCOUNT:g}); {EPISODES} episodes of a uniform policy, "
    f"{COUNT} pairs of segments of {SEGMENT} steps, the better one by the advantage of the best policy with entropy (temperature "
    f"{TEMPERATURE:g}) preferred. alpha 0.1, lam 0.5, a network of 32 units, 250 batches of {BATCH} pairs. Returns are exact, "
    "as shares of the best policy's; of the policy as it acts, and of its mode. Planning knows the true dynamics, which no "
    "offline method does. By return most pairs are ties: rewards are rare.",
)
CLAIMS = (CPL,)
