"""Corrected, explained and begun answers, each where it is said to help and where it is not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from unipo.episodes import Episodes
from unipo.methods.catalog import build
from unipo.objectives import Likelihood, demonstrations
from unipo.policies.tabular import TabularPolicy
from unipo.recipe import Recipe, RolloutSpec, Snapshot
from unipo.reproduce.claim import Claim, Expectation, Phases
from unipo.reproduce.guided import solved, table
from unipo.reproduce.training import train
from unipo.sources.keyed import keyed_generator
from unipo.sources.prompts import Prompt
from unipo.sources.stages.editing import Corrected
from unipo.sources.text.tabular import TabularPrompts, tabular_rollouts
from unipo.tasks.tabular import TabularTask

# ---- OPA-DPO -----------------------------------------------------------------------------------------------------------
PROMPTS, VOCABULARY, LENGTH, SAMPLES = 8, 6, 3, 12
NEVER, MOSTLY, FOUND = 1e-6, 0.9, 0.7


@dataclass
class CarelessEditor:
    """Replaces wrong tokens by right ones, each of them that it notices: with probability `FOUND`."""

    answers: Sequence[tuple[int, ...]]
    seed: int

    def __call__(self, prompts: Sequence[str], answers: Sequence[str], **columns: Any) -> list[str]:
        generator, made = keyed_generator(self.seed, "editor"), []
        for q, text in zip(prompts, answers, strict=True):
            noticed = generator.random(LENGTH) < FOUND
            pairs = zip(text.split(), self.answers[int(q)], noticed, strict=True)
            made.append(" ".join(str(right) if seen else said for said, right, seen in pairs))
        return made


@lru_cache(maxsize=2)
def corrections(seed: int) -> tuple[TabularPolicy, list[tuple[int, ...]], Episodes]:
    """A policy that never says one of the three right tokens, the right answers, and corrected answers of that policy."""
    draw = keyed_generator(seed, "answers")
    answers = [tuple(draw.integers(VOCABULARY, size=LENGTH).tolist()) for _ in range(PROMPTS)]
    fault = draw.integers(LENGTH, size=PROMPTS).tolist()
    policy = table(
        answers, [[NEVER if t == fault[q] else MOSTLY for t in range(LENGTH)] for q in range(PROMPTS)], VOCABULARY
    )
    with torch.no_grad():  # another token is said instead, nearly always
        for q, t in enumerate(fault):
            policy.logits[q, t, :, (answers[q][t] + 1) % VOCABULARY] += 4.0
    task = TabularTask(PROMPTS, VOCABULARY, LENGTH, lambda q, tokens: float(tokens == answers[q]))
    spec = RolloutSpec(group=SAMPLES, augment=(Corrected(CarelessEditor(answers, seed)),))
    return policy, answers, tabular_rollouts(task, policy, spec, seed, TabularPrompts(task)).draw(0, 0)


def opa_trial(phases: Phases, rate: float, seed: int, steps: int) -> Mapping[str, float]:
    start, answers, data = corrections(seed)
    policy = TabularPolicy(start.logits)
    rows = data.with_columns("episode", source="pairs")
    train(phases, policy, lambda step: rows, steps=steps, rate=rate)
    return {"right": float(solved(policy, answers).mean())}


def opa(steps: int, align: int, **settings: Any) -> Recipe:
    return build("opa-dpo", {"opa-dpo": {"align": min(align, steps), "beta": 0.5, "context": 0.0, **settings}})


OPA_STEPS = 120
TWO_STAGES = opa(OPA_STEPS, OPA_STEPS // 2)
OPA = Claim(
    slug="opa-dpo",
    statement="corrections that the start never says are learned by DPO only after an alignment that makes them the reference's "
    "own; better than by the alignment alone",
    arms={
        "opa-dpo": (TWO_STAGES,),
        "dpo alone": (opa(OPA_STEPS, 0, anchor=0.0),),
        "alignment alone": (opa(OPA_STEPS, OPA_STEPS),),
        "reference of the start": (TWO_STAGES.but(snapshots={"aligned": Snapshot()}),),
    },
    trial=opa_trial,
    steps=OPA_STEPS,
    tune="right",
    grid=(0.1, 0.3),
    expectations=(
        Expectation(arm="opa-dpo", metric="right", than="alignment alone", least=0.0),
        Expectation(arm="opa-dpo", metric="right", than="dpo alone", least=0.0),
        Expectation(arm="alignment alone", metric="right", than="dpo alone", least=0.0),
    ),
    note=f"Tabular policy, {PROMPTS} prompts with one right answer of {LENGTH} tokens, of which the start says one with "
    f"probability {NEVER:g} (another token nearly always) and the others with {MOSTLY:g}; {SAMPLES} of its answers per prompt, "
    f"corrected once by an editor that notices each wrong token with probability {FOUND:g}. beta 0.5, {OPA_STEPS} updates of "
    "the whole data, half of them alignment; exact probability of right answers. Shown, not judged: the same two stages "
    "against the reference of the start.",
)

# ---- DR-PO -------------------------------------------------------------------------------------------------------------
LOCK, DIGITS, BATCH, CARE = 8, 4, 64, 0.85


@dataclass(frozen=True)
class CarelessDemonstrations:
    """A lock of `LOCK` digits; every prompt has another demonstration, each digit of which is right with probability `CARE`."""

    answer: tuple[int, ...]
    seed: int

    def __getitem__(self, index: int) -> Prompt:
        draw = keyed_generator(self.seed, "demonstration", index)
        other = draw.integers(1, DIGITS, size=LOCK) * (draw.random(LOCK) >= CARE)
        shown = " ".join(str((a + o) % DIGITS) for a, o in zip(self.answer, other.tolist(), strict=True))
        return Prompt(id=index, text="0", columns={"prompt_id": 0}, demonstration=shown)


def lock_trial(phases: Phases, rate: float, seed: int, steps: int) -> Mapping[str, float]:
    """Exact probability of opening the lock from its start."""
    answer = tuple(keyed_generator(seed, "lock").integers(DIGITS, size=LOCK).tolist())
    task = TabularTask(1, DIGITS, LOCK, lambda q, tokens: float(tokens == answer))
    policy = TabularPolicy(torch.zeros(1, LOCK, DIGITS + 1, DIGITS, dtype=torch.float64))
    prompts = CarelessDemonstrations(answer, seed)
    if phases[0].samples:
        rollouts = tabular_rollouts(task, policy, phases[0].rollouts, seed, prompts, BATCH)
        train(phases, policy, lambda step: rollouts.draw(step, step), steps=steps, rate=rate)
    else:
        train(phases, policy, lambda step: shown(prompts, step), steps=steps, rate=rate)
    return {"success": float(solved(policy, [answer]).mean())}


def shown(prompts: CarelessDemonstrations, step: int) -> Episodes:
    """A batch of the demonstrations themselves."""
    texts = [str(prompts[step * BATCH + i].demonstration) for i in range(BATCH)]
    tokens = [[int(x) for x in text.split()] for text in texts]
    return Episodes.build(
        tokens, [[0]] * BATCH, kind=["demo"] * BATCH, prompt_id=[0] * BATCH, truncated=[False] * BATCH
    )


def drpo(mix: float) -> Phases:
    settings = {"mix": mix, "kl": 0.0, "rewards": "plain"}
    return (build("drpo-reset", {"drpo-reset": settings}),)


DRPO = Claim(
    slug="drpo-reset",
    statement="where a reward is never found from the start, PPO from resets along demonstrations finds it, and does better than "
    "the demonstrations; with resets alone the first token is never learned",
    arms={
        "ppo": drpo(0.0),
        "mix 0.2": drpo(0.2),
        "mix 0.5": drpo(0.5),
        "mix 1": drpo(1.0),
        "sft": (Recipe(objective=Likelihood(rows=demonstrations)),),
    },
    trial=lock_trial,
    steps=140,
    tune="success",
    grid=(0.04,),
    expectations=(
        Expectation(arm="mix 0.5", metric="success", than="ppo", least=0.5),
        Expectation(arm="mix 0.2", metric="success", than="ppo", least=0.0),
        Expectation(arm="mix 0.5", metric="success", than="sft", least=0.2),
        Expectation(arm="mix 1", metric="success", most=0.3),
    ),
    note=f"Combination lock: one right answer of {LOCK} digits out of {DIGITS}, reward 1 for it alone, a uniform table to begin "
    f"with; batches of {BATCH}, 140 steps of 4 epochs, a tabular critic that sees the position, no KL, one "
    f"learning rate (0.04). Every demonstration has "
    f"each digit right with probability {CARE:g}, so that {CARE**LOCK:.0%} of them open the lock. Exact success from the start. "
    "With batches of 32, 80 steps and rate 0.05 nothing was decided: some seeds were still searching (mix 0.2: 0.44, 0.5: 0.79).",
)

# ---- rationales --------------------------------------------------------------------------------------------------------
WORDS, FEATURES, LONG, WIDTH = 40, 16, 6, 1
VERDICTS = 2
PAIRS, HELD_OUT = 16, 400


@lru_cache(maxsize=8)
def words_of(seed: int) -> tuple[Tensor, Tensor]:
    """Features of words, 1 or -1 [WORDS, FEATURES], and which half of the words is good [WORDS]: the first feature says it."""
    drawn = keyed_generator(seed, "words").integers(2, size=(WORDS, FEATURES))
    drawn[:, 0] = torch.arange(WORDS) % 2
    features = torch.from_numpy(2.0 * drawn - 1.0)
    return features, features[:, 0] > 0


class ReadingPolicy(nn.Module):
    """Answers and rationales from the same few numbers of each word (here one), E = features * W, [WORDS, WIDTH].

    An answer is words drawn from softmax(E u). A rationale stands behind the prompt and two answers and says how many good words
    the first has, how many the second, and which is better: softmax over what it may say of C x + c, where x is the sum of E over
    the answer that it speaks of (of their difference, for the verdict).
    """

    emits = frozenset({"logp"})
    parametric: frozenset[str] = frozenset()

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)

        def normal(*size: int, scale: float = 0.3) -> nn.Parameter:
            return nn.Parameter(scale * torch.randn(size, generator=generator, dtype=torch.float64))

        self.register_buffer("features", words_of(seed)[0])
        self.shared, self.answer = normal(FEATURES, WIDTH), normal(WIDTH)
        self.said, self.shift = normal(2, LONG + 1 + VERDICTS, WIDTH), normal(2, LONG + 1 + VERDICTS)

    @property
    def words(self) -> Tensor:
        return self.get_buffer("features") @ self.shared

    def total_lengths(self, episodes: Episodes) -> Tensor:
        return episodes.lengths()

    def signals(self, episodes: Episodes, names: Sequence[str]) -> dict[str, Tensor]:
        """log-probs [N]."""
        context, token = episodes.context(), episodes["token"]
        assert context.offsets is not None
        sizes = context.offsets.diff()
        explaining = episodes.expand(sizes > 1)
        logp = (self.words @ self.answer).log_softmax(0)[token.clamp(max=WORDS - 1)]
        if not bool(explaining.any()):
            return {"logp": logp}
        both = context.values[(sizes > 1).repeat_interleave(sizes)].reshape(-1, 1 + 2 * LONG)[:, 1:]
        sums = self.words[both].reshape(len(both), 2, LONG, WIDTH).sum(2)
        seen, kind = torch.stack([sums[:, 0], sums[:, 1], sums[:, 0] - sums[:, 1]], 1), torch.tensor([0, 0, 1])
        scores = torch.einsum("kvj,nkj->nkv", self.said[kind], seen) + self.shift[kind]
        said = token[explaining].reshape(-1, 3, 1) - WORDS
        own = scores.log_softmax(-1).gather(2, said).flatten()
        return {"logp": logp.index_put((explaining.nonzero().squeeze(1),), own)}


def judged(seed: int, count: int, name: str) -> tuple[Tensor, Tensor]:
    """Pairs of random answers [n, 2, LONG], the better first, and how many good words either has [n, 2]; no draws."""
    draw, (_, good), found = keyed_generator(seed, name), words_of(seed), list[Tensor]()
    while len(found) < count:
        two = torch.from_numpy(draw.integers(WORDS, size=(2, LONG)))
        first, second = good[two].sum(1).tolist()
        if first != second:
            found.append(two if first > second else two.flip(0))
    pairs = torch.stack(found)
    return pairs, good[pairs].sum(2)


def explained(seed: int, count: int, shuffle: bool) -> Episodes:
    """Pairs with their rationales, in random order; `shuffle`: with the rationales of other pairs."""
    pairs, good = judged(seed, count, "pairs")
    draw = keyed_generator(seed, "order")
    parts = []
    swapped = torch.from_numpy(draw.integers(2, size=count))
    reasons = [[WORDS + int(g) for g in (c.flip(0) if s else c)] + [WORDS + LONG + 1 + int(s)]
               for c, s in zip(good, swapped, strict=True)]  # fmt: skip
    order = draw.permutation(count) if shuffle else range(count)
    for i in range(count):
        won, lost = pairs[i].tolist()
        context = [0, *(lost if swapped[i] else won), *(won if swapped[i] else lost)]
        parts.append(Episodes.build([won, lost, reasons[int(order[i])]], [[0], [0], context], [0] * 3,
                                    kind=["pair", "pair", "rationale"], chosen=[True, False, True], prompt_id=[i] * 3,
                                    truncated=[False] * 3))  # fmt: skip
    return Episodes.cat(parts)


@dataclass(frozen=True)
class Told:
    """What an arm of the claim learns from."""

    recipe: Recipe
    pairs: int = PAIRS
    shuffle: bool = False


def rationale_trial(arm: Told, rate: float, seed: int, steps: int) -> Mapping[str, float]:
    """Accuracy of log pi(better) > log pi(worse) on held-out pairs, and the share of good words that the policy says."""
    policy, reference = ReadingPolicy(seed), ReadingPolicy(seed)
    rows = explained(seed, arm.pairs, arm.shuffle)
    rows = rows.with_columns("step", reference_logp=reference.signals(rows, ["logp"])["logp"].detach())
    train((arm.recipe,), policy, lambda step: rows, steps=steps, rate=rate, reference=reference)  # type: ignore[arg-type]
    pairs, _ = judged(seed, HELD_OUT, "held out")
    with torch.no_grad():
        logp = (policy.words @ policy.answer).log_softmax(0)
        good = float(logp.exp()[words_of(seed)[1]].sum())
        score = (logp - (reference.words @ reference.answer).log_softmax(0))[pairs].sum(2)
    return {"held out": float((score[:, 0] > score[:, 1]).double().mean()), "good words": good}


REASONED = build("rationale-po", {"rationale-po": {"gamma": 1.0}})
BARE = build("dpo", {"dpo": {"beta": 0.1}})
RATIONALES = Claim(
    slug="rationale-po",
    statement="with rationales fewer pairs are needed for the same accuracy on held-out pairs; shuffled rationales do not help",
    arms={
        "rationales": Told(REASONED),
        "dpo": Told(BARE),
        "dpo, twice the pairs": Told(BARE, 2 * PAIRS),
        "shuffled rationales": Told(REASONED, shuffle=True),
    },
    trial=rationale_trial,
    steps=120,
    tune="held out",
    grid=(0.01, 0.03),
    expectations=(
        Expectation(arm="rationales", metric="held out", than="dpo", least=0.0),
        Expectation(arm="rationales", metric="held out", than="dpo, twice the pairs", least=-0.02),
        Expectation(arm="rationales", metric="held out", than="shuffled rationales", least=0.0),
    ),
    note=f"{WORDS} words, half of them good; of two random answers of {LONG} words that with more good words is preferred, and "
    f"the rationale says how many either has, and which is better. {PAIRS} pairs, beta 0.1, gamma 1, 120 updates of all of them. "
    f"Words have {FEATURES} random features, of which one says whether they are good; the policy makes {WIDTH} number of them, "
    "for reading and for saying: what rationales teach about words is there when answers are written. Held-out: "
    f"{HELD_OUT} pairs, by the log-ratio to the start. In a first setting good words were a half-space of normal features, so "
    "that counts are not linear in them: over 48 seeds rationales were better than none by 0.051 [0.022, 0.080], and against "
    "twice the pairs nothing was decided, -0.010 [-0.033, 0.013].",
)

CLAIMS = (OPA, DRPO, RATIONALES)
