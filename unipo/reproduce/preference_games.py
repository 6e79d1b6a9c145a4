"""The recipes of preference games on games that can be solved exactly, against what they are said to beat."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from unipo.episodes import Episodes
from unipo.methods.preference_games import apo, dno, inpo, nash_md, online_dpo, spo, sppo
from unipo.objectives import (
    EpisodeSum,
    LeaveOneOut,
    Likelihood,
    LogRatioScore,
    LogRatioToGo,
    Marked,
    Normalised,
    Outcome,
    Pairwise,
    Plus,
    PolicyGradient,
    TokenMean,
    own_pairs,
)
from unipo.policies.tabular import TabularPolicy
from unipo.recipe import Recipe, RolloutSpec
from unipo.reproduce.claim import Claim, Expectation
from unipo.reproduce.games import (
    ANSWERS,
    FLOOR,
    HALPERN,
    NASH_MP,
    STATEMENTS,
    TableJudge,
    bandit,
    cyclic,
    tail,
    trained,
)
from unipo.reproduce.network import NetworkPolicy
from unipo.reproduce.training import FreshAndReplayed, train
from unipo.sources.keyed import keyed_generator
from unipo.sources.text.tabular import TabularPrompts, tabular_rollouts
from unipo.tabular import game_solvers as solvers
from unipo.tabular.games import PreferenceGame, RegularisedGame, fitted_scores, mirror_step
from unipo.tasks.tabular import TabularTask

# ---- Nash-MD ---------------------------------------------------------------------------------------------------------
TAU = 0.05


def fitted(game: PreferenceGame, start: Tensor, tau: float) -> tuple[Recipe, TabularTask]:
    """RL with a KL penalty on Bradley-Terry scores of comparisons between answers of the start."""
    advantage = Plus((Normalised(center=LeaveOneOut()), LogRatioToGo(tau)))
    recipe = Recipe(
        objective=PolicyGradient(advantage=advantage, aggregate=EpisodeSum()), rollouts=RolloutSpec(group=32)
    )
    return recipe, bandit(game.answers, fitted_scores(game, start.exp()))


def schedule_trial(seed: int, steps: int) -> Mapping[str, float]:
    """The exact solver with the step sizes of the theorem."""
    game, start = cyclic(seed, ANSWERS)
    soft = RegularisedGame(game, start, 0.3)
    path = solvers.iterate(lambda p, t: solvers.nash_md(soft, p, 2 / (soft.tau * (t + 2))), start, 10 * steps)
    ratio = max(soft.distance(p) * soft.tau**2 * (t + 1) / 8 for t, p in enumerate(path))
    return {"gap": soft.gap(path[-1]), "exploitability": game.exploitability(path[-1].exp()), "of the bound": ratio}


def md_trial(arm: float | str, rate: float, seed: int, steps: int) -> Mapping[str, float]:
    if arm == "exact":
        return schedule_trial(seed, steps)
    game, start = cyclic(seed, ANSWERS, 0.7)
    soft = RegularisedGame(game, start, TAU)
    if isinstance(arm, str):
        recipe, task = fitted(game, start, TAU * float(arm.split()[-1]))
    else:
        task = bandit(ANSWERS)
        recipe = nash_md(group=16, samples=16, mixture=arm, tau=TAU, judge=TableJudge.of(game, task))
    path = trained(recipe, task, start, rate, seed, steps)
    found = tail(path, lambda p: game.exploitability(p.exp()))
    return {"gap": tail(path, soft.gap), "exploitability": found, "of the bound": 0.0}


NASH_MD = Claim(
    slug="nash-md",
    statement=STATEMENTS["nash-md"],
    arms={
        "nash-md": 0.25,
        "self-play": 0.0,
        "best response": 1.0,
        "rlhf": "rlhf 1",
        "rlhf, tau x 4": "rlhf 4",
        "exact": "exact",
    },
    trial=md_trial,
    steps=150,
    tune="gap",
    minimise=True,
    grid=(0.02, 0.05),
    expectations=(
        Expectation(arm="nash-md", metric="exploitability", than="rlhf", most=0.0),
        Expectation(arm="nash-md", metric="exploitability", than="rlhf, tau x 4", most=0.0),
        Expectation(arm="nash-md", metric="exploitability", than="best response", most=0.0),
        Expectation(arm="exact", metric="of the bound", most=1.0),
    ),
    note="Cycles of five answers with random odds and a random reference (normal logits, std 0.7), tau 0.05; groups of 16 "
    "against 16 opponents, 150 steps; means over the last 20 policies of max P(pi > policy) - 1/2 and of the gap of "
    "the regularised game, exact. RLHF: policy gradient in groups of 32 on Bradley-Terry scores fitted to all "
    "comparisons of answers of the reference, with the same KL penalty and with four times of it (a score's slope is "
    "four times a probability's). Exact: mirror descent with eta_t = 2 / (tau (t + 2)), tau 0.3, 1500 steps, "
    "reference of std 1.5. Self-play is shown, not judged: the paper found it nearly as good. Of a first setting (std "
    "1.5, groups of 8, 120 steps) no arm had converged, and nothing was decided.",
)


# ---- INPO ------------------------------------------------------------------------------------------------------------
def inpo_trial(arm: str, rate: float, seed: int, steps: int) -> Mapping[str, float]:
    game, start = cyclic(seed, ANSWERS)
    soft, judge = RegularisedGame(game, start, 0.1), TableJudge.of(game, bandit(ANSWERS))
    built = {
        "inpo": lambda: inpo(group=12, tau=0.1, eta=1.0, epochs=8, judge=judge),
        "iterative dpo": lambda: online_dpo(group=12, beta=1.0, epochs=8, judge=judge),
        "no reference": lambda: inpo(group=12, tau=0.0, eta=1.0, epochs=8, judge=judge),
    }
    if arm == "exact":
        path = solvers.iterate(lambda p, t: solvers.inpo(soft, p, soft.tau * (t + 2) / 2), start, 10 * steps)[1:]
    else:
        path = trained(built[arm](), bandit(ANSWERS), start, rate, seed, steps)
    found = tail(path, lambda p: game.exploitability(p.exp()))
    return {"exploitability": found, "gap": tail(path, soft.gap), "KL to the equilibrium": tail(path, soft.distance)}


INPO = Claim(
    slug="inpo",
    statement=STATEMENTS["inpo"],
    arms={name: name for name in ("inpo", "iterative dpo", "no reference", "exact")},
    trial=inpo_trial,
    steps=80,
    tune="gap",
    minimise=True,
    grid=(0.02, 0.05),
    expectations=(
        Expectation(arm="inpo", metric="exploitability", than="iterative dpo", most=0.0),
        Expectation(arm="inpo", metric="KL to the equilibrium", than="iterative dpo", most=0.0),
        Expectation(arm="inpo", metric="KL to the equilibrium", than="no reference", most=0.0),
        Expectation(arm="exact", metric="gap", most=0.01),
    ),
    note="Cycles of five answers with random odds and a random reference, tau 0.1, eta 1: 80 iterations of 12 fresh "
    "answers, all their pairs with one drawn label each, 8 passes. Means over the last 20 policies, exact. Iterative "
    "DPO has beta = eta and no reference but the policy of the iteration; no reference: INPO with tau 0. Exact: "
    "mirror steps with eta_t = tau (t + 2) / 2, 800 of them. The paper's best-of-tournament pairs are not used: its "
    "equality holds for independent ones. With 5 seeds one of the four parts was undecided, so that 8 were run.",
)


# ---- SPPO ------------------------------------------------------------------------------------------------------------
def step(game: PreferenceGame, size: float, policy: Tensor, t: int) -> Tensor:
    return solvers.multiplicative_weights(game, policy, size)


def sppo_trial(arm: str, rate: float, seed: int, steps: int) -> Mapping[str, float]:
    game, start = cyclic(seed, ANSWERS)
    uniform = torch.full_like(start, 1 / ANSWERS).log()
    apart = []
    for horizon in (4 * steps, 64 * steps):
        size = math.sqrt(8 * math.log(ANSWERS) / horizon)
        path = solvers.iterate(partial(step, game, size), uniform, horizon)
        apart.append(max(game.exploitability(path[:-1].exp().mean(0)), FLOOR))
    slope = math.log(apart[1] / apart[0]) / math.log(16)
    built = {
        "sppo": sppo(group=5, eta=8.0, epochs=16),
        "online dpo": online_dpo(group=5, beta=0.1, pairs="extremes", epochs=16),
    }
    moved = winners(built[arm], 0.02, seed, max(1, steps // 5))
    return {"slope of the average": slope, "exploitability of the average": apart[1], "log-ratio of winners": moved}


def winners(recipe: Recipe, rate: float, seed: int, steps: int) -> float:
    """Mean over iterations of log( pi_{t+1} / pi_t ) of the chosen answers: four words of eight, prompts that share a network."""
    worth = torch.from_numpy(keyed_generator(seed, "worth").normal(size=(4, 4, 8)))
    task = TabularTask(4, 8, 4, lambda prompt, tokens: float(sum(worth[prompt, i, t] for i, t in enumerate(tokens))))
    policy, seen = NetworkPolicy(task, seed), list[float]()
    source = FreshAndReplayed(tabular_rollouts(task, policy, recipe.rollouts, seed), seed)
    before: list[tuple[Episodes, Tensor]] = []

    def log_probability(batch: Episodes) -> Tensor:
        return batch.reduce(policy.signals(batch, ["logp"])["logp"].detach())

    def draw(step: int) -> Episodes:
        batch = source(step)
        before.append((batch, log_probability(batch)))
        return batch

    def watch(step: int) -> None:
        batch, old = before[-1]
        if bool(batch["chosen"].any()):
            seen.append(float((log_probability(batch) - old)[batch["chosen"]].mean()))

    train((recipe,), policy, draw, steps=steps, rate=rate, watch=watch)
    return sum(seen) / max(len(seen), 1)


SPPO = Claim(
    slug="sppo",
    statement=STATEMENTS["sppo"],
    arms={"sppo": "sppo", "online dpo": "online dpo"},
    trial=sppo_trial,
    steps=60,
    tune="log-ratio of winners",
    grid=(0.0,),
    expectations=(
        Expectation(arm="sppo", metric="slope of the average", most=-0.4),
        Expectation(arm="sppo", metric="log-ratio of winners", least=0.0),
        Expectation(arm="sppo", metric="log-ratio of winners", than="online dpo", least=0.0),
    ),
    note="Cycles of five answers with random odds. The slope of log exploitability over log T of the average iterate of "
    "exact steps, T from 240 to 3840, eta sqrt(8 log 5 / T); -1/2 is what is proven. Log-ratio of winners: the "
    "recipes on four prompts with answers of four of eight words whose random worth is judged logistically, a network "
    "of 32 units; 12 iterations of 5 answers per prompt, 16 passes of Adam at 0.02 over the best and the worst; the "
    "mean of log pi_{t+1} / pi_t of the best, eta 8, beta 0.1. On five single-token answers it rose alike with both "
    "losses: a table of a few answers has nowhere else for a loser's mass to go.",
)


# ---- SPO -------------------------------------------------------------------------------------------------------------
def spo_trial(arm: str, rate: float, seed: int, steps: int) -> Mapping[str, float]:
    three, start = cyclic(seed)
    game = three.beside(0.9)
    uniform, n = torch.full((4,), 0.25, dtype=torch.float64).log(), game.answers
    if arm == "fitted reward":
        skew = torch.cat([start, start.mean()[None]]).log_softmax(0)
        best = torch.nn.functional.one_hot(fitted_scores(game, skew.exp()).argmax(), n).double()
        return {"exploitability": game.exploitability(best), "1/4 of the time": game.exploitability(best)}
    if arm == "exponential weights":
        size = math.sqrt(8 * math.log(n) / (10 * steps))
        path = solvers.iterate(lambda p, t: solvers.multiplicative_weights(game, p, size), uniform, 10 * steps)
    else:
        path = trained(spo(group=8, judge=TableJudge.of(game, bandit(n))), bandit(n), uniform, rate, seed, steps)
    average = [game.exploitability(part.exp().mean(0)) for part in (path, path[: max(1, len(path) // 4)])]
    return {"exploitability": average[0], "1/4 of the time": average[1]}


SPO = Claim(
    slug="spo",
    statement=STATEMENTS["spo"],
    arms={name: name for name in ("spo", "exponential weights", "fitted reward")},
    trial=spo_trial,
    steps=300,
    tune="exploitability",
    minimise=True,
    grid=(0.03, 0.1, 0.3),
    expectations=(
        Expectation(arm="exponential weights", metric="exploitability", most=0.02),
        Expectation(arm="spo", metric="exploitability", than="fitted reward", most=0.0),
        Expectation(arm="spo", metric="exploitability", most=0.1),
        Expectation(arm="fitted reward", metric="exploitability", least=0.2),
    ),
    note="A cycle of three answers with random odds, and a fourth that loses to all with 0.9. Exploitability max P(pi > p) "
    "- 1/2 of the average policy: of the recipe (groups of 8, 300 steps of Adam), of exact exponential weights (3000 "
    "steps); of the best answer by Bradley-Terry scores that are fitted to comparisons of a random policy. The "
    "paper's control tasks are left out. With 5 seeds one of the four parts was undecided, so that 8 were run.",
)


# ---- APO -------------------------------------------------------------------------------------------------------------
def apo_trial(arm: float, rate: float, seed: int, steps: int) -> Mapping[str, float]:
    """Iterations until 1 % of the first gap is left, and the reward of the recipe after six rounds."""
    generator = keyed_generator(seed, "bandit")
    score = torch.from_numpy(generator.uniform(0.0, 1.0, size=10))
    start = torch.full((10,), 0.1, dtype=torch.float64).log()
    _, made = solvers.accelerated(lambda p, t: mirror_step(score, ((5.0, p),)), start, arm, 20 * steps)
    gap = float(score.max()) - made.exp() @ score
    reached = (gap <= 0.01 * gap[0]).nonzero()
    iterations = float(reached[0]) if len(reached) else float(len(gap))
    judge = TableJudge.of(PreferenceGame.bradley_terry(4 * score), bandit(10))
    recipe = (
        apo(alpha=arm, every=5, group=6, judge=judge) if arm else online_dpo(every=5, group=6, epochs=1, judge=judge)
    )
    path = trained(recipe, bandit(10), start, rate, seed, steps)
    return {"log iterations": math.log(iterations), "reward": float(path[-1].exp() @ score)}


APO = Claim(
    slug="apo-accelerated",
    statement=STATEMENTS["apo-accelerated"],
    arms={"apo .3": 0.3, "apo .5": 0.5, "apo .8": 0.8, "iterative dpo": 0.0},
    trial=apo_trial,
    steps=30,
    tune="reward",
    grid=(0.03,),
    expectations=(
        Expectation(
            arm="apo .3", metric="log iterations", than="iterative dpo", least=math.log(0.55), most=math.log(0.85)
        ),
        Expectation(
            arm="apo .5", metric="log iterations", than="iterative dpo", least=math.log(0.35), most=math.log(0.65)
        ),
        Expectation(
            arm="apo .8", metric="log iterations", than="iterative dpo", least=math.log(0.1), most=math.log(0.4)
        ),
        Expectation(arm="apo .3", metric="reward", than="iterative dpo", least=0.0),
    ),
    note="Ten arms with uniform rewards. Log iterations: exact steps pi exp(r / 5) until 1 % of the first gap is left; "
    "expected within 0.15 of 1 - alpha, in part 0.1 to 0.4 for 0.8. Reward: the recipe, six rounds of five steps of "
    "Adam at 0.03 with groups of 6 and drawn Bradley-Terry labels, against the same base without momentum.",
)


# ---- DNO -------------------------------------------------------------------------------------------------------------
QUESTIONS, WORDS, LENGTH = 4, 4, 3


@dataclass(frozen=True)
class Quality:
    """Answers of three words; each word is worth something at its place."""

    task: TabularTask
    shown: TabularPrompts

    @classmethod
    def of(cls, seed: int) -> Quality:
        worth = torch.from_numpy(keyed_generator(seed, "worth").normal(size=(QUESTIONS, LENGTH, WORDS)))

        def reward(prompt: int, tokens: tuple[int, ...]) -> float:
            return float(sum(worth[prompt, i, t] for i, t in enumerate(tokens)))

        task = TabularTask(QUESTIONS, WORDS, LENGTH, reward)
        order = task.rewards.argsort(1, descending=True)
        teacher = {q: task.sequences[int(order[q, 12])] for q in range(QUESTIONS)}
        return cls(task, TabularPrompts(task, teacher))


def against_teacher(found: Quality, policy: TabularPolicy) -> float:
    """Exact probability that an answer is preferred to the teacher's, mean over prompts."""
    task = found.task
    place = {s: i for i, s in enumerate(task.sequences)}
    theirs = torch.stack([task.rewards[q, place[tuple(found.shown.demonstrations[q])]] for q in range(QUESTIONS)])
    with torch.no_grad():
        return float((task.log_probability(policy).exp() * torch.sigmoid(task.rewards - theirs[:, None])).sum(1).mean())


def dno_trial(arm: str, rate: float, seed: int, steps: int) -> Mapping[str, float]:
    """DNO's batches come from its policy; the others' from the start, as many of them."""
    found = Quality.of(seed)
    policy = TabularPolicy(0.3 * TabularPolicy.random(QUESTIONS, LENGTH, WORDS, seed).logits)
    start = TabularPolicy(policy.logits)
    online = dno(
        group=5, beta=0.1, replayed=0.3 if arm == "dno" else 0.0, epochs=2, teacher=int(arm != "dno, no teacher")
    )
    offline = online.but(
        objective=Pairwise(score=LogRatioScore(0.1, "reference"), confidence=Outcome("confidence"), rows=own_pairs)
    )
    positives = online.but(objective=Likelihood(rows=own_pairs & Marked("chosen"), aggregate=TokenMean()))
    recipe = {"offline dpo": offline, "sft on positives": positives}.get(arm, online)
    writer = policy if arm.startswith("dno") else start
    source = FreshAndReplayed(tabular_rollouts(found.task, writer, recipe.rollouts, seed, found.shown), seed)
    seen = [against_teacher(found, start)]
    train((recipe,), policy, source, steps=steps, rate=rate, reference=start,
          watch=lambda step: seen.append(against_teacher(found, policy)))  # fmt: skip
    quarter = [seen[(len(seen) - 1) * i // 4] for i in range(5)]
    gains = [after - before for before, after in pairwise(quarter)]
    return {"win rate": seen[-1], "smallest gain of a quarter": min(gains)}


DNO = Claim(
    slug="dno",
    statement=STATEMENTS["dno"],
    arms={name: name for name in ("dno", "dno, no teacher", "offline dpo", "sft on positives")},
    trial=dno_trial,
    steps=40,
    tune="win rate",
    grid=(0.03, 0.1),
    expectations=(
        Expectation(arm="dno", metric="win rate", than="offline dpo", least=0.0),
        Expectation(arm="dno", metric="win rate", than="sft on positives", least=0.0),
        Expectation(arm="dno", metric="win rate", least=0.5),
        Expectation(arm="dno", metric="smallest gain of a quarter", least=0.0),
    ),
    note="Four prompts, answers of three of four words with additive random worth; the judge is a logistic preference for "
    "it, the teacher's answer the 13th best of 64. 40 iterations of 5 answers and the teacher's per prompt, 2 passes; "
    "win rate: the exact probability to be preferred to the teacher. Offline DPO and SFT have as many answers of the "
    "start and the teacher, ranked and filtered alike. The smallest gain is that of the worst of four quarters of the "
    "run. With 5 seeds one of the four parts was undecided, so that 10 were run.",
)


CLAIMS: Sequence[Claim] = (NASH_MP, NASH_MD, INPO, SPPO, SPO, APO, DNO, HALPERN)
