"""What claims of games share, and those of exact solvers: Nash-MP at its proven rate, Halpern with fewer evaluations."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from unipo.methods.preference_games import METHODS, STUDIES, nash_mp
from unipo.policies.tabular import TabularPolicy
from unipo.recipe import Recipe
from unipo.reproduce.claim import Claim, Expectation
from unipo.reproduce.training import FreshAndReplayed, train
from unipo.sources.keyed import keyed_generator
from unipo.sources.stages.augment import Drawn
from unipo.sources.stages.preferences import Answers, Judge
from unipo.sources.text.tabular import tabular_rollouts
from unipo.tabular import game_solvers as solvers
from unipo.tabular.games import PreferenceGame, RegularisedGame
from unipo.tabular.halpern import AffineSum, always, halpern, refresh_paper
from unipo.tasks.tabular import TabularTask

STATEMENTS = {work.slug: work.claim for work in (*METHODS, *STUDIES)}


@dataclass(frozen=True, eq=False)
class TableJudge(Judge):
    """P(y > y') of a game whose answers are the sequences of a task, in their order."""

    game: PreferenceGame
    place: Mapping[tuple[int, ...], int]

    @classmethod
    def of(cls, game: PreferenceGame, task: TabularTask) -> TableJudge:
        return cls(game, {sequence: i for i, sequence in enumerate(task.sequences)})

    def __call__(self, answers: Answers, others: Answers, drawn: Drawn) -> Tensor:
        first, second = ([self.place[tuple(t)] for t in side.tokens] for side in (answers, others))
        return self.game.preference[torch.tensor(first, dtype=torch.long), torch.tensor(second, dtype=torch.long)]


def bandit(answers: int, score: Tensor | None = None) -> TabularTask:
    """One prompt, answers of one token."""
    return TabularTask(1, answers, 1, lambda prompt, tokens: 0.0 if score is None else float(score[tokens[0]]))


def starting(logp: Tensor) -> TabularPolicy:
    return TabularPolicy(logp.expand(1, 1, len(logp) + 1, len(logp)))


def law(policy: TabularPolicy) -> Tensor:
    """Log-probabilities [A] of a policy over single tokens."""
    return policy.logits[0, 0, -1].detach().log_softmax(0)


def trained(recipe: Recipe, task: TabularTask, start: Tensor, rate: float, seed: int, steps: int) -> Tensor:
    """[steps, A]: log-probabilities after every step of a recipe on single-token answers."""
    policy, path = starting(start), list[Tensor]()
    source = FreshAndReplayed(tabular_rollouts(task, policy, recipe.rollouts, seed), seed)
    train((recipe,), policy, source, steps=steps, rate=rate, reference=starting(start),
          watch=lambda step: path.append(law(policy)))  # fmt: skip
    return torch.stack(path)


ANSWERS = 5


def cyclic(seed: int, answers: int = 3, spread: float = 1.5) -> tuple[PreferenceGame, Tensor]:
    """An odd cycle: each answer beats the next (answers - 1) / 2 with probabilities between .75 and .95. And a start that is
    far from uniform, as log-probabilities."""
    generator = keyed_generator(seed, "cycle", answers)
    P = torch.full((answers, answers), 0.5, dtype=torch.float64)
    for i in range(answers):
        for step in range(1, (answers - 1) // 2 + 1):
            j = (i + step) % answers
            P[i, j] = float(generator.uniform(0.75, 0.95))
            P[j, i] = 1 - P[i, j]
    return PreferenceGame(P), torch.from_numpy(spread * generator.normal(size=answers)).log_softmax(0)


def tail(path: Tensor, measure: Callable[[Tensor], float], last: int = 20) -> float:
    """Mean of a measure over the last policies."""
    values = [measure(p) for p in path[-last:]]
    return sum(values) / len(values)


# ---- Nash-MP ---------------------------------------------------------------------------------------------------------
BETA, FLOOR = 0.02, 1e-16
Stepper = Callable[[RegularisedGame, Tensor, float], Tensor]


@dataclass(frozen=True)
class Exact:
    """A solver with `queries` win rates per step; its step is the grid's, or the `fixed` one."""

    step: Stepper
    queries: int = 1
    fixed: float = 0.0


@dataclass(frozen=True)
class Sampling:
    """The recipe with this `eta`, trained with samples at a large learning rate."""

    eta: float


@lru_cache(maxsize=64)
def sampled_distance(arm: Sampling, seed: int, steps: int) -> float:
    """log10 of the mean KL to the equilibrium over the last 100 steps; its learning rate is not the grid's."""
    game, start = cyclic(seed)
    soft = RegularisedGame(game, start, 0.05)
    recipe = nash_mp(group=16, beta=0.05, eta=arm.eta, kappa=0.03, judge=TableJudge.of(game, bandit(3)))
    path = trained(recipe, bandit(3), start, 0.3, seed, steps)
    return math.log10(max(tail(path, soft.distance, 100), FLOOR))


def prox_trial(arm: Exact | Sampling, rate: float, seed: int, steps: int) -> Mapping[str, float]:
    game, start = cyclic(seed)
    if isinstance(arm, Sampling):
        return {"log10 KL": sampled_distance(arm, seed, min(steps, 200)), "of the bound": 0.0}
    soft = RegularisedGame(game, start, BETA)
    path = solvers.iterate(lambda p, t: arm.step(soft, p, arm.fixed or rate), start, max(1, steps // arm.queries))
    k = torch.arange(len(path)).double()
    far = torch.tensor([soft.distance(p) for p in path]).clamp(min=0.0).double()
    bound = (1 + 2 * BETA) ** -k * far[0]
    within = torch.where(far > 1e-13, far / bound, 0.0)
    return {"log10 KL": math.log10(max(float(far[-1]), FLOOR)), "of the bound": float(within.max())}


NASH_MP = Claim(
    slug="nash-mp",
    statement=STATEMENTS["nash-mp"],
    arms={
        "nash-mp": Exact(solvers.nash_mp, queries=2, fixed=2 * BETA),
        "nash-md": Exact(solvers.nash_md),
        "inpo": Exact(lambda soft, p, rate: solvers.inpo(soft, p, 1 / rate)),
        "sampled, anchor": Sampling(0.2),
        "sampled, no anchor": Sampling(1e9),
    },
    trial=prox_trial,
    steps=400,
    tune="log10 KL",
    minimise=True,
    grid=(0.03, 0.1, 0.3, 1.0, 3.0),
    expectations=(
        Expectation(arm="nash-mp", metric="log10 KL", most=-6.0),
        Expectation(arm="nash-mp", metric="of the bound", most=1.0 + 1e-9),
        Expectation(arm="nash-mp", metric="log10 KL", than="nash-md", most=-3.0),
        Expectation(arm="nash-mp", metric="log10 KL", than="inpo", most=-3.0),
        Expectation(arm="sampled, anchor", metric="log10 KL", than="sampled, no anchor", most=0.0),
    ),
    note="Cycles of three answers with random odds and a random reference, beta 0.02; KL(pi* || pi) after 400 win rates of "
    "all answers against a policy (200 steps of Nash-MP at its own eta = 2 beta, 400 of the others at the best "
    "constant step). Of the bound: the largest KL / ((1 + 2 beta)^-k KL_0), where KL is above 1e-13. Sampled: the "
    "recipe, groups of 16, Adam at 0.3, 200 steps, beta 0.05, mean KL over the last 100.",
)


# ---- Halpern ---------------------------------------------------------------------------------------------------------
def halpern_trial(arm: str, rate: float, seed: int, steps: int) -> Mapping[str, float]:
    generator = keyed_generator(seed, "sum")
    operator = AffineSum.random_cocoercive(400, 20, generator)
    start = torch.from_numpy(generator.normal(size=20))
    refresh = always if arm == "full batch" else refresh_paper(400)
    constant = operator.cocoercivity
    run = halpern(operator, start, steps * 400, keyed_generator(seed, "page"), constant=constant, refresh=refresh)
    residual = run.residuals(operator)
    bound = 16 * constant * float((start - operator.zero).norm()) / (torch.arange(len(residual)) + 4)
    return {"log residual": math.log(float(residual[-1])), "of the bound": float((residual / bound).max())}


HALPERN = Claim(
    slug="vr-halpern",
    statement=STATEMENTS["vr-halpern"],
    arms={"variance-reduced": "variance-reduced", "full batch": "full batch"},
    trial=halpern_trial,
    steps=600,
    tune="log residual",
    minimise=True,
    grid=(0.0,),
    expectations=(
        Expectation(arm="variance-reduced", metric="log residual", than="full batch", most=math.log(0.5)),
        Expectation(arm="variance-reduced", metric="of the bound", most=1.0),
        Expectation(arm="full batch", metric="of the bound", most=1.0),
    ),
    note="Random least squares of 400 components in 20 dimensions, 240,000 component evaluations each; |F(u_k)| of the "
    "last iterate, at least halved is expected, and the largest share of the bound 16 L |u_0 - u*| / (k + 4) along "
    "the way. L is the exact average cocoercivity. The monotone Lipschitz variant is checked by its tests only.",
)
