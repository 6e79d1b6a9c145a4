"""DRPO: length against accuracy. Reg-GRPO: many passes over a batch. Direct advantages offline. GEPO: equivalent answers."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch

from unipo.episodes import Episodes
from unipo.methods.catalog import build, find
from unipo.objectives import AdvantageMask
from unipo.recipe import Recipe
from unipo.reproduce.claim import Claim, Expectation, Phases
from unipo.reproduce.network import NetworkPolicy
from unipo.reproduce.online import scattered
from unipo.reproduce.training import Draw, entropy, key, success, train
from unipo.sources.keyed import keyed_generator
from unipo.sources.stages.branching import Every, StepCandidates
from unipo.sources.text.filters import LengthPenalty, MixedOutcomes
from unipo.sources.text.rollouts import Rollouts, Scored
from unipo.sources.text.tabular import TabularPrompts, tabular_rollouts
from unipo.tasks.tabular import TabularTask

SFT = build("sft", {})

# ---- DRPO ------------------------------------------------------------------------------------------------------------
THINK, END, LONGEST, QUESTIONS = 0, 1, 10, 8
CEILING, SHARPNESS, TOLERATED = 0.95, 1.5, 0.02


@lru_cache(maxsize=16)
def thinking(seed: int) -> TabularTask:
    """Thoughts and an end; the reward is the chance to be right, which rises with thoughts around what the prompt needs."""
    need = keyed_generator(seed, "thoughts").uniform(0.0, 6.0, size=QUESTIONS)

    def chance(prompt: int, tokens: tuple[int, ...]) -> float:
        thoughts = len(tokens) - 1
        return CEILING / (1.0 + math.exp(-SHARPNESS * (thoughts - need[prompt]))) if tokens[-1] == END else 0.0

    return TabularTask(QUESTIONS, 2, LONGEST, chance, end=END)


@lru_cache(maxsize=16)
def thinker(seed: int) -> NetworkPolicy:
    """A policy that was shown answers of every length to every prompt."""
    lengths = [n for _ in range(QUESTIONS) for n in range(LONGEST)]
    prompts = [[q] for q in range(QUESTIONS) for _ in range(LONGEST)]
    shown = Episodes.build([[THINK] * n + [END] for n in lengths], prompts, kind=["demo"] * len(prompts))
    policy = NetworkPolicy(thinking(seed), seed)
    train((SFT,), policy, lambda step: shown, steps=60, rate=0.03)
    return policy


def judged(rollouts: Rollouts, seed: int) -> Draw:
    """Batches of `rollouts` whose rewards are 1 with the task's chance, else 0."""
    chance, coins = rollouts.reward, torch.Generator().manual_seed(key(seed, "coins"))

    def score(prompts: Any, completions: Any, columns: Any) -> Scored:
        found = chance(prompts, completions, columns)
        won = torch.rand(len(found.reward), generator=coins, dtype=torch.float64) < found.reward
        return replace(found, reward=won.double())

    rollouts.reward = score
    return lambda step: rollouts.draw(step, step)


def length(task: TabularTask, policy: NetworkPolicy) -> float:
    """Exact mean number of tokens."""
    tokens = torch.tensor([len(s) for s in task.sequences], dtype=torch.float64)
    with torch.no_grad():
        return float((task.log_probability(policy).exp() * tokens).sum(1).mean())


def at_length(points: Sequence[tuple[float, float]], allowed: float) -> float:
    """The best accuracy of mean length `allowed`, by a policy of the sweep or a mixture of two."""
    best = max((accuracy for size, accuracy in points if size <= allowed), default=0.0)
    for (short, low), (long, high) in itertools.combinations(sorted(points), 2):
        if short <= allowed <= long and short < long:
            best = max(best, low + (high - low) * (allowed - short) / (long - short))
    return best


def length_trial(sweep: Phases, rate: float, seed: int, steps: int) -> Mapping[str, float]:
    """Exact (mean length, accuracy) of a policy trained with each recipe of the sweep; what the best of them reach."""
    task, points = thinking(seed), []
    for recipe in sweep:
        policy = copy.deepcopy(thinker(seed))
        draw = judged(tabular_rollouts(task, policy, recipe.rollouts, seed), seed)
        train((recipe,), policy, draw, steps=steps, rate=rate)
        points.append((length(task, policy), success(task, policy)))
    sizes = [1.0 + i / 10 for i in range(10 * LONGEST - 9)]
    enough = [x for x in sizes if at_length(points, x) >= CEILING - TOLERATED]
    return {"length": min(enough, default=float(LONGEST)), "accuracy at 8": at_length(points, 8.0),
            "accuracy at 6": at_length(points, 6.0)}  # fmt: skip


def _shortened(slug: str) -> Phases:
    return tuple(build(slug, {}).but(relabel=(LengthPenalty(a),)) for a in (0.0, 0.02, 0.1, 0.3, 0.9))


DRPO = tuple(
    build("drpo-decoupled", {"drpo-decoupled": {"temper": t, "longest": float(LONGEST)}})
    for t in (math.inf, 1.0, 0.3, 0.1, 0.03)
)
PENALISED, UNSCALED = "grpo, length penalty", "dr-grpo, length penalty"
DRPO_CLAIM = Claim(
    slug="drpo-decoupled",
    statement="the same accuracy at a smaller mean length, and more at an equal one, than GRPO with a length penalty inside the "
    "reward",
    arms={"drpo": DRPO, PENALISED: _shortened("grpo"), UNSCALED: _shortened("dr-grpo")},
    trial=length_trial,
    steps=60,
    tune="accuracy at 8",
    grid=(0.01, 0.03),
    expectations=(
        Expectation(arm="drpo", metric="length", than=PENALISED, most=0.0),
        Expectation(arm="drpo", metric="accuracy at 8", than=PENALISED, least=0.0),
    ),
    note=f"Answers are thoughts and an end; the chance to be right rises with thoughts to {CEILING} around a number "
    f"of them that the prompt needs; {QUESTIONS} prompts, a network of one hidden layer that first thinks at "
    "every length, 60 updates. Each arm is a sweep of five policies (no pressure on length up to the strongest: "
    "temper inf to 0.03, penalty 0 to 0.9); numbers are exact, on mixtures of two policies of the sweep. "
    f"Length: the smallest with an accuracy within {TOLERATED} of the ceiling. Accuracy at 6: 0 where no policy "
    "of a sweep was that short. Division by the group's std makes GRPO's penalty the same at 0.02 and 0.3: "
    "where all answers are right only length is left, and the policy falls to about 5 tokens whatever the "
    "strength. Without that division (Dr. GRPO) the penalty works as well as DRPO. The fourth task that was tried, and "
    "its metrics, were chosen on the tuning seeds: on the first the penalty had the better frontier, two saturated; "
    "answers of about 5 tokens are as good or better with the penalty.",
)

# ---- Reg-GRPO --------------------------------------------------------------------------------------------------------
PROMPTS, EPOCHS, KL = 32, 8, 0.1


def epochs_trial(phases: Phases, rate: float, seed: int, steps: int) -> Mapping[str, float]:
    """Exact success, mean of the last fifth of `steps` batches, `EPOCHS` updates each; silent: groups of equal rewards."""
    (recipe,), task, silent, curve = phases, scattered(seed, PROMPTS), list[float](), list[float]()
    policy = NetworkPolicy(task, seed)
    known = {q: task.sequences[int(task.rewards[q].argmax())] for q in range(PROMPTS)}
    rollouts = tabular_rollouts(task, policy, recipe.rollouts, seed, TabularPrompts(task, known))

    def draw(step: int) -> Episodes:
        batch = rollouts.draw(step, step)
        silent.append(float((~MixedOutcomes()(batch)).double().mean()))
        return batch

    def watch(step: int) -> None:
        if step > 0.8 * steps:
            curve.append(success(task, policy))

    train((recipe,), policy, draw, steps=steps, rate=rate, reference=copy.deepcopy(policy), watch=watch)
    return {"success": sum(curve) / len(curve), "silent": sum(silent) / len(silent), "entropy": entropy(task, policy)}


def _passes(slug: str, **settings: float) -> Recipe:
    return build(slug, {slug: {"epochs": EPOCHS, **settings}})


REG, HINTS, UNCLIPPED = "reg-grpo", "reg-grpo, hints", "grpo, no clip"
REG_CLAIM = Claim(
    slug="reg-grpo",
    statement=find("reg-grpo").claim,
    arms={
        REG: (_passes("reg-grpo", kl=KL),),
        HINTS: (_passes("reg-grpo", kl=KL, hints=0.5),),
        "grpo": (_passes("grpo"),),
        UNCLIPPED: (_passes("grpo").but(mask=AdvantageMask()),),
        "rebel": (_passes("rebel"),),
    },
    trial=epochs_trial,
    steps=28,
    tune="success",
    grid=(0.02, 0.04),
    expectations=(
        Expectation(arm=REG, metric="success", than="grpo", least=0.0),
        Expectation(arm=REG, metric="success", than=UNCLIPPED, least=0.0),
        Expectation(arm=REG, metric="success", than="rebel", least=0.0),
        Expectation(arm=HINTS, metric="silent", than=REG, most=0.0),
    ),
    note=f"A random 5 % of the 1,296 answers to each of {PROMPTS} prompts are right; a network of one hidden layer, "
    f"28 batches of groups of 8, {EPOCHS} updates on each, exact success (last fifth). Reg-GRPO has its KL of {KL} to the "
    "policy of the start, the others none. The KL matters: without it, in 20 batches of 20 prompts, Reg-GRPO ended at "
    "0.69 [0.63, 0.74], below GRPO with a clip and below REBEL (the z-score of the log-ratio stays below its "
    "target, so that nothing else stops it), and with the same KL GRPO ended at 0.12. Silent: groups of equal rewards. Hints "
    "show beginnings of a right answer to prompts harder than recent ones. After 20 batches of 20 prompts, tried first on seeds "
    "0 to 7, the interval against GRPO with a clip held 0 (prompts lost for good make its runs differ), and fewer groups "
    "were silent with hints (-0.14 to -0.06); more prompts, more batches and smaller rates, 0.01 and 0.03 to 0.1 before, were "
    "chosen on seeds 2000 to 2002 without a look at hints. Seen: what the paper says of its loss holds; hints do not pay here "
    "and, later in a run, leave more groups silent, not fewer. We think because an answer of four tokens, of which a hint is at "
    "least one, is too short for a hint in proportion: what is learned behind it does not carry over to the plain prompt, which "
    "then stays hard.",
)

# ---- direct advantages -----------------------------------------------------------------------------------------------
CHAINS, STEPS, CHOICES, START, DIRECT_BETA = 8, 5, 4, 0.1, 0.1
ANSWERS = 230
"""Whole answers per prompt: as many tokens as the candidate steps and their values take, or a few more."""


@lru_cache(maxsize=16)
def chains(seed: int) -> TabularTask:
    """Five choices of four; right where at most one differs from the prompt's own (16 of 1,024)."""
    best = keyed_generator(seed, "chains").integers(CHOICES, size=(CHAINS, STEPS))
    return TabularTask(CHAINS, CHOICES, STEPS, lambda q, tokens: float((best[q] == tokens).sum() >= STEPS - 1))


@lru_cache(maxsize=16)
def beginner(seed: int) -> NetworkPolicy:
    """A policy that is right `START` of the time, by likelihood of one right answer to each prompt."""
    task = chains(seed)
    right = [task.sequences[int(task.rewards[q].argmax())] for q in range(CHAINS)]
    shown = Episodes.build(right, [[q] for q in range(CHAINS)], kind=["demo"] * CHAINS)
    policy = NetworkPolicy(task, seed)
    while success(task, policy) < START:
        train((SFT,), policy, lambda step: shown, steps=5, rate=0.003)
    return policy


@dataclass(frozen=True)
class Offline:
    """`recipe` on data that the policy sampled before training, or before each of `rounds` with a share of the budget."""

    recipe: Recipe
    rounds: int = 1

    def collected(self, task: TabularTask, policy: NetworkPolicy, seed: int, most: int) -> tuple[Episodes, int]:
        """(data of one round, of at most so many answers a prompt; tokens sampled for it)"""
        spec = replace(self.recipe.rollouts, group=min(self.recipe.rollouts.group, most))
        rollouts = tabular_rollouts(task, policy, spec, seed)
        return rollouts.draw(0, 0), rollouts.tokens_sampled


def paired(groups: Episodes, seed: int) -> Episodes:
    """Every right answer of a group with a wrong one of it, at random, as a preference pair."""
    drawn, rows = keyed_generator(seed, "pairs"), list[int]()
    for members in torch.arange(len(groups)).split(groups.lengths("group", "episode").tolist()):
        right, wrong = (members[groups["reward"][members] == kind].tolist() for kind in (1.0, 0.0))
        if right and wrong:
            rows += [i for r in right for i in (r, wrong[int(drawn.integers(len(wrong)))])]
    made = groups.select(torch.tensor(rows, dtype=torch.long)).grouped(torch.arange(len(rows)) // 2)
    return made.with_columns("episode", kind="pair", chosen=torch.arange(len(rows)) % 2 == 0)


def offline_trial(arm: Offline, rate: float, seed: int, steps: int) -> Mapping[str, float]:
    """Exact success after `steps` updates in all, and the tokens that were sampled for the data."""
    task, policy, tokens = chains(seed), copy.deepcopy(beginner(seed)), 0
    for round_ in range(arm.rounds):
        reference = copy.deepcopy(policy)
        data, used = arm.collected(task, reference, key(seed, "round", round_) % 2**31, 4 * steps)
        data, tokens = paired(data, seed) if arm.recipe.kinds == ("pair",) else data, tokens + used
        share = max(1, steps // arm.rounds)
        train((arm.recipe,), policy, lambda step, data=data: data, steps=share, rate=rate, reference=reference)  # type: ignore[misc]
    return {"success": success(task, policy), "tokens": float(tokens)}


def _direct(completions: int, rounds: int, gap: float = 0.1) -> Offline:
    recipe = build("dapo-direct-advantage", {"dapo-direct-advantage": {"beta": DIRECT_BETA, "gap": gap}})
    candidates = StepCandidates(Every(1), 6, completions, completions)
    return Offline(recipe.but(augment=(candidates,)), rounds)


def _whole(slug: str, rounds: int) -> Offline:
    recipe = build(slug, {slug: {"beta": DIRECT_BETA}})
    return Offline(recipe.but(group=ANSWERS // rounds, augment=()), rounds)


STEPWISE, TWICE, WHOLE, PAIRS = "step advantages", "step advantages, twice", "whole answers", "dpo on whole answers"
DIRECT_CLAIM = Claim(
    slug="dapo-direct-advantage",
    statement=find("dapo-direct-advantage").claim,
    arms={
        STEPWISE: _direct(12, 1),
        TWICE: _direct(6, 2),
        "step advantages, all states": _direct(12, 1, 0.0),
        "step advantages, all states, twice": _direct(6, 2, 0.0),
        WHOLE: _whole("dapo-direct-advantage", 1),
        "whole answers, twice": _whole("dapo-direct-advantage", 2),
        PAIRS: _whole("dpo", 1),
    },
    trial=offline_trial,
    steps=100,
    tune="success",
    grid=(0.01, 0.03, 0.1),
    expectations=(
        Expectation(arm=STEPWISE, metric="success", than=WHOLE, least=0.0),
        Expectation(arm=STEPWISE, metric="success", than=PAIRS, least=0.0),
        Expectation(arm=TWICE, metric="success", than=STEPWISE, least=0.0),
    ),
    note=f"Five choices of four, right where at most one differs from the prompt's own; {CHAINS} prompts, a network "
    f"of one hidden layer that is right {START:.0%} of the time, beta {DIRECT_BETA}, 100 updates in all on data "
    "sampled beforehand, all with about as many sampled tokens, those of the Monte-Carlo values included. "
    "States: every prefix of six answers; 12 candidates and 12 values each (twice: 6 and 6). What we saw: the "
    "paper's filter of states (values at least 0.1 apart) costs more than it saves, since nothing holds a "
    "policy with shared parameters at the states that it drops, and the second round then starts from a policy "
    "that has drifted. With all states step advantages beat whole answers and pairs, and a second round "
    "improves again; but two rounds on whole answers are better still: with five short steps outcomes are "
    "cheap, and rounds matter more than where credit is assigned. "
    "Also looked at, seed 2000, 16 prompts, values by the state's own 12 completions: 0.55 against 0.44 of whole answers and "
    "0.25 of pairs, and a second round with as much data ends at 0.33 with the filter, 0.67 without; with a beta of 0.03 whole "
    "answers are ahead (0.65 against 0.57). A critic fitted to the states' success rates, the paper's, gave 0.26: so small a "
    "network does not tell prefixes apart.",
)

# ---- OORL ------------------------------------------------------------------------------------------------------------
PLUS, EXPRESSIONS, DIGITS = 0, 24, 4
FLUENT, WEIGHT, ROLLOUTS = 0.2, 0.01, 8
Form = tuple[int, ...]


def forms(a: int, b: int, c: int, d: int) -> list[Form]:
    """The factors of (a + b) (c + d), each in prefix notation, terms in any order: four equivalent answers."""
    return [(PLUS, *first, PLUS, *second) for first in ((a, b), (b, a)) for second in ((c, d), (d, c))]


@lru_cache(maxsize=32)
def expressions(seed: int) -> tuple[TabularTask, tuple[tuple[Form, ...], ...]]:
    """Prompts that each ask for one expression, and the equivalent right answers to each."""
    drawn = keyed_generator(seed, "expressions")
    asked = [tuple(1 + drawn.permutation(DIGITS)) for _ in range(EXPRESSIONS)]
    right = tuple(tuple(tuple(int(t) for t in f) for f in forms(*digits)) for digits in asked)
    return TabularTask(EXPRESSIONS, 1 + DIGITS, 6, lambda q, tokens: float(tokens in right[q])), right


def equivalents(policy: NetworkPolicy, right: Sequence[Sequence[Form]]) -> torch.Tensor:
    """[P, 4] the exact log-probabilities of the right answers."""
    shown = Episodes.build([f for own in right for f in own], [[q] for q, own in enumerate(right) for _ in own])
    with torch.no_grad():
        return shown.reduce(policy.signals(shown, ["logp"])["logp"]).reshape(len(right), -1)


@lru_cache(maxsize=32)
def translator(seed: int) -> NetworkPolicy:
    """A policy that is right `FLUENT` of the time, by likelihood of all forms, the first one shown four times as often."""
    task, right = expressions(seed)
    rows = [(q, f) for q, own in enumerate(right) for f in (*own, own[0], own[0], own[0])]
    shown = Episodes.build([f for _, f in rows], [[q] for q, _ in rows], kind=["demo"] * len(rows))
    policy = NetworkPolicy(task, seed)
    while float(equivalents(policy, right).exp().sum(1).mean()) < FLUENT:
        train((SFT,), policy, lambda step: shown, steps=2, rate=0.01)
    return policy


def preferences(right: Sequence[Sequence[Form]], seed: int, pairs: bool) -> Episodes:
    """A group per expression: its forms, and each with one token changed; or as many random pairs of the two kinds."""
    drawn, rows = keyed_generator(seed, "preferences"), list[tuple[int, int, Form, bool]]()
    for q, own in enumerate(right):
        wrong: list[Form] = []
        while len(wrong) < len(own):
            made = list(own[len(wrong)])
            place = int(drawn.integers(len(made)))
            made[place] = int((made[place] + drawn.integers(1, 1 + DIGITS)) % (1 + DIGITS))
            wrong += [tuple(made)] if tuple(made) not in own else []
        if pairs:
            mates = drawn.permutation(len(wrong))
            for i, mate in enumerate(mates.tolist()):
                rows += [(len(own) * q + i, q, own[i], True), (len(own) * q + i, q, wrong[mate], False)]
        else:
            rows += [(q, q, f, True) for f in own] + [(q, q, f, False) for f in wrong]
    return Episodes.build([f for _, _, f, _ in rows], [[q] for _, q, _, _ in rows], [g for g, _, _, _ in rows],
                          kind=["pair"] * len(rows), chosen=[won for _, _, _, won in rows], truncated=[False] * len(rows),
                          prompt_id=[q for _, q, _, _ in rows])  # fmt: skip


def equivalence_trial(phases: Phases, rate: float, seed: int, steps: int) -> Mapping[str, float]:
    """Exact pass rate, and the standard deviation over equivalent answers of their log-probs, mean over prompts."""
    (recipe,), (task, right) = phases, expressions(seed)
    policy, live = copy.deepcopy(translator(seed)), {t.title for c, t in recipe.objective.terms() if c != 0.0}
    shown = preferences(right, seed, pairs="spread" not in live)
    rollouts = tabular_rollouts(task, policy, recipe.rollouts, seed)
    train((recipe,), policy, lambda step: Episodes.cat([rollouts.draw(step, step), shown]), steps=steps, rate=rate,
          reference=copy.deepcopy(policy))  # fmt: skip
    logp = equivalents(policy, right)
    return {"pass rate": float(logp.exp().sum(1).mean()), "spread": float(logp.std(1, correction=0).mean())}


def _oorl(preference: float) -> Recipe:
    return build("oorl-gepo", {"oorl-gepo": {"group": ROLLOUTS, "preference": preference}})


GEPO, DPO, ALONE = "rl + gepo", "rl + dpo on pairs", "rl alone"
OORL_CLAIM = Claim(
    slug="oorl-gepo",
    statement=find("oorl-gepo").claim,
    arms={GEPO: (_oorl(WEIGHT),), DPO: (_oorl(0.0) + WEIGHT * build("dpo", {}),), ALONE: (_oorl(0.0),)},
    trial=equivalence_trial,
    steps=60,
    tune="pass rate",
    grid=(0.01, 0.03),
    expectations=(
        Expectation(arm=GEPO, metric="spread", than=ALONE, most=0.0),
        Expectation(arm=GEPO, metric="spread", than=DPO, most=0.0),
        Expectation(arm=GEPO, metric="pass rate", than=ALONE, least=-0.03),
    ),
    note=f"The factors of (a + b) (c + d) in prefix notation: {EXPRESSIONS} prompts of which each has four equivalent right "
    f"answers of 15,625; a network of one hidden layer that is right {FLUENT:.0%} of the time and prefers one form; 60 "
    f"updates on {ROLLOUTS} rollouts per prompt and, with weight {WEIGHT}, a preference group of the four forms "
    "and four answers with one token changed, or four random pairs of these. Spread: standard deviation over "
    "the equivalent answers of their log-probs. Exact numbers. Changed: the forms were those of a + b c, which our policies, "
    "that see a position and one token back, cannot all say with certainty (behind c comes b in one form and a in another), so "
    "that keeping four forms cost pass rate by construction (-0.015 [-0.059, 0.030] in 20 seeds with 24 prompts; 16 "
    "seeds with 8 prompts had left it open too). The bounds are the same; on other seeds a table of logits had -0.003 there, "
    "the network +0.01.",
)

CLAIMS = (DRPO_CLAIM, REG_CLAIM, DIRECT_CLAIM, OORL_CLAIM)
