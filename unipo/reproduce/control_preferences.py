"""Contrastive preference learning on a lake that can be solved exactly, from what a policy without a plan did there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

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
from unipo.sources.acting.segment_pairs import Earned, SegmentPairs, labelled, segments
from unipo.sources.keyed import keyed_generator
from unipo.tabular.mdp import KL, FiniteMDP
from unipo.tasks.environments.frozen_lake import PostDecisionFrozenLake

SLIP, DISCOUNT, TEMPERATURE = 0.3, 0.95, 0.05
EPISODES, HORIZON, SEGMENT, COUNT, BATCH = 4000, 50, 4, 2000, 64


@lru_cache(maxsize=1)
def lake() -> tuple[FiniteMDP, Tensor]:
    """The 4x4 lake in tables, and the advantage [S, A] of the policy that is best with entropy."""
    mdp = PostDecisionFrozenLake(slip=SLIP).process().mdp(DISCOUNT)
    every = torch.ones(mdp.states, mdp.actions, dtype=torch.float64)
    best = mdp.optimal(KL(every, TEMPERATURE))
    return mdp, best.q - best.v[:, None]


@lru_cache(maxsize=16)
def wandering(seed: int) -> Episodes:
    """Episodes of a uniform policy that begin anywhere, with the mean rewards of what it did."""
    mdp, _ = lake()
    uniform = torch.full((mdp.states, mdp.actions), 1.0 / mdp.actions, dtype=torch.float64)
    live = (~ending(mdp)).double()
    run = replace(mdp, initial=live / live.sum()).sample(uniform, EPISODES, HORIZON, keyed_generator(seed, "wandering"))
    over = ending(mdp)[run.next_state]
    lengths = torch.where(over.any(1), over.int().argmax(1) + 1, HORIZON)
    kept, last = torch.arange(HORIZON) < lengths[:, None], lengths - 1
    one, every = torch.arange(EPISODES + 1), torch.eye(mdp.states)
    columns = {
        "observation": Column(every[run.state[kept]], "step"),
        "action": Column(run.action[kept], "step"),
        "reward": Column(run.reward[kept], "step"),
        "final_observation": Column(every[run.next_state[torch.arange(EPISODES), last]], "episode"),
        "terminated": Column(over.any(1), "episode"),
        "truncated": Column(~over.any(1), "episode"),
    }
    return Episodes({"turn": offsets_of(lengths), "episode": one, "group": one}, columns)


def ending(mdp: FiniteMDP) -> Tensor:
    """[S] bool: states that lead to themselves, whatever is done."""
    return mdp.transition.diagonal(dim1=0, dim2=2).min(0).values == 1


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
    paid = torch.where(ending(mdp)[:, None], 0.0, reward.detach() - reward.max().detach())
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
    note=f"The post-decision frozen lake (4x4, slip {SLIP:g}, discount {DISCOUNT:g}); {EPISODES} episodes of a uniform policy "
    "that begin anywhere, "
    f"{COUNT} pairs of segments of {SEGMENT} steps, the better one by the advantage of the best policy with entropy (temperature "
    f"{TEMPERATURE:g}) preferred. alpha 0.1, lam 0.5, a network of 32 units, 250 batches of {BATCH} pairs. Returns are exact, "
    "as shares of the best policy's; of the policy as it acts, and of its mode. Planning knows the true dynamics, which no "
    "offline method does. By return most pairs are ties: rewards are rare. After trials on tuning seeds "
    "episodes begin anywhere, in place of the start of the lake, and two parts are asked of lam 1 in place of lam 0.5.",
)
CLAIMS = (CPL,)
