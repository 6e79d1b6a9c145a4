"""Which rollouts and tokens of a group count, and how much: the claims of BAPO, D3S, ADORA, Lite PPO and PF-PPO."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

from unipo.episodes import Episodes
from unipo.methods.catalog import build
from unipo.methods.group_variants import filter_r2
from unipo.objectives import AdvantageMask, MostVaried, PolicyGradient, Signals, TokenMean, number, with_settings
from unipo.policies.tabular import TabularPolicy
from unipo.recipe import Recipe
from unipo.reproduce.claim import Claim, Expectation, Phases
from unipo.reproduce.network import NetworkPolicy
from unipo.reproduce.progressions import PER_STEP, TERMS, WARM, difficulty_trial
from unipo.reproduce.progressions import PROMPTS as PROGRESSIONS
from unipo.reproduce.training import Draw, entropy, fresh, key, near_uniform, success, train
from unipo.sources.keyed import keyed_generator
from unipo.tasks.tabular import TabularTask

PROMPTS, VOCABULARY, LENGTH, GROUP = 10, 6, 4, 8
RATES = (0.003, 0.01, 0.03, 0.1)
Answer = tuple[int, ...]
TOKEN_MEAN_GRPO = build("grpo", {}).but(aggregate=TokenMean())


def _of(slug: str, **settings: object) -> tuple[Recipe]:
    return (build(slug, {slug: settings} if settings else {}),)


def _tail(curve: Sequence[float]) -> float:
    """Mean of the last fifth."""
    last = curve[-max(1, len(curve) // 5) :]
    return sum(last) / len(last)


# ---- BAPO ------------------------------------------------------------------------------------------------------------
SYNC, LONGEST = 8, 5


@lru_cache(64)
def walks(seed: int) -> TabularTask:
    """Right are answers of two or three tokens and the end, each token one of the prompt's two steps from the one before.

    Wrong answers are longer in the mean, so that lowering outweighs raising, token by token. A policy that is always right
    can keep an entropy of log 5 + log 2 and more: 3 nats.
    """
    end = VOCABULARY - 1
    steps = [set((1 + keyed_generator(seed, "steps", q).permutation(end - 1)[:2]).tolist()) for q in range(PROMPTS)]

    def right(q: int, tokens: Answer) -> float:
        written = tokens[:-1]
        walked = all((b - a) % end in steps[q] for a, b in pairwise(written))
        return float(tokens[-1] == end and len(written) in (2, 3) and walked)

    return TabularTask(PROMPTS, VOCABULARY, LONGEST, right, end=end)


def stale_trial(phases: Phases, rate: float, seed: int, steps: int) -> Mapping[str, float]:
    """Rollouts of weights up to `SYNC` updates old; exact success in the mean of the run, and entropy at its end and half-way:
    when success was a half, interpolated between updates."""
    task = walks(seed)
    policy = NetworkPolicy(task, seed)
    solved, left = [success(task, policy)], [entropy(task, policy)]

    def watch(step: int) -> None:
        solved.append(success(task, policy))
        left.append(entropy(task, policy))

    train(phases, policy, fresh(task, policy, GROUP, seed, SYNC), steps=steps, rate=rate, watch=watch)
    crossed = next((k for k in range(1, len(solved)) if solved[k] >= 0.5), len(solved) - 1)
    part = min((0.5 - solved[crossed - 1]) / max(solved[crossed] - solved[crossed - 1], 1e-9), 1.0)
    halfway = left[crossed - 1] + part * (left[crossed] - left[crossed - 1])
    return {"mean success": sum(solved) / len(solved), "entropy half-way": halfway, "entropy": left[-1]}


# ---- D3S -------------------------------------------------------------------------------------------------------------
MANY, KEPT, RIGHT = 32, 0.25, 0.01
BUDGET = 0.158
"""Share of all sampled tokens that D3S trains on over a run."""


@dataclass(frozen=True)
class FirstOfGroup(AdvantageMask):
    """The first rollouts of each group, a share of it: a random subset, since rollouts are drawn alike."""

    share: float = KEPT

    def of(self, advantage: Tensor, episodes: Episodes, signals: Signals) -> Tensor:
        size = episodes.lengths("group", "episode")
        place = torch.cat([torch.arange(n) for n in size.tolist()])
        return episodes.expand(place < (self.share * size)[episodes.index("group", "episode")])


@lru_cache(64)
def scattered(seed: int) -> TabularTask:
    """A random 1 % of the 1,296 answers to each prompt are right."""
    right = keyed_generator(seed, "right answers").uniform(size=(PROMPTS, *[VOCABULARY] * LENGTH)) < RIGHT
    return TabularTask(PROMPTS, VOCABULARY, LENGTH, lambda prompt, tokens: float(right[(prompt, *tokens)]))


def trained_share(recipe: Recipe, step: int, steps: int) -> float:
    """The share of the sampled tokens that a step trains on: of all that the recipe's selections leave."""
    settings = {c.knob: c.lasting(steps).setting({}, step) for c in recipe.controllers}
    term = with_settings(recipe.objective, settings).terms()[0][1]
    assert isinstance(term, PolicyGradient)
    mask, share = term.counted, 1.0
    while mask is not None:
        share *= number(getattr(mask, "share", 1.0))
        mask = getattr(mask, "among", None)
    return share


def selected_trial(phases: Phases, rate: float, seed: int, steps: int) -> Mapping[str, float]:
    """Groups of `MANY`; success early (first third), late (last fifth), and when `BUDGET` of the tokens were trained on."""
    task = scattered(seed)
    policy = NetworkPolicy(task, seed)
    curve, spent, at_budget = [success(task, policy)], 0.0, 0.0

    def watch(step: int) -> None:
        nonlocal spent, at_budget
        spent += trained_share(phases[0], step - 1, steps)
        if step % 4 == 0 or step == steps:
            curve.append(success(task, policy))
            if spent <= 1.02 * BUDGET * steps or len(curve) == 2:
                at_budget = curve[-1]

    train(phases, policy, fresh(task, policy, MANY, seed), steps=steps, rate=rate, watch=watch)
    early = curve[: len(curve) // 3 + 1]
    return {"success": _tail(curve), "early success": sum(early) / len(early), "success at equal tokens": at_budget}


# ---- ADORA -----------------------------------------------------------------------------------------------------------
DIGITS, WRITTEN, GUESS, PAGES = 3, 6, 0.2, 40


@lru_cache(64)
def scratchpads(seed: int, longer: bool) -> TabularTask:
    """Answers of up to six tokens, ended by a token of its own; the reward is how likely an answer is right.

    A guess is right one time in five. Where `longer`, every written token that is the prompt's step on from the one before
    adds 0.16, so that a whole scratchpad is right; else the prompt's own first token adds 0.6 and every further one costs
    0.03.
    """
    own = keyed_generator(seed, "scratchpad").integers(1, DIGITS, size=PAGES).tolist()

    def right(q: int, tokens: Answer) -> float:
        written = [t for t in tokens if t != DIGITS]
        if not longer:
            return GUESS + 0.6 * float(written[:1] == own[q : q + 1]) - 0.03 * max(len(written) - 1, 0)
        return GUESS + 0.16 * sum((b - a) % DIGITS == own[q] for a, b in pairwise(written))

    return TabularTask(PAGES, DIGITS + 1, WRITTEN, right, end=DIGITS)


def terse(task: TabularTask, seed: int) -> TabularPolicy:
    """A table of logits whose answers are short: about one and a half tokens and the end."""
    policy = near_uniform(task, seed)
    with torch.no_grad():
        policy.logits[..., DIGITS] += 1.5
    return policy


def verified(draw: Draw, seed: int) -> Draw:
    """Each answer is right or wrong, by the probability that its reward was."""

    def drawn(step: int) -> Episodes:
        batch = draw(step)
        luck = torch.rand(len(batch), generator=torch.Generator().manual_seed(key(seed, "verifier", step)))
        return batch.with_columns("episode", reward=(luck < batch["reward"]).double())

    return drawn


def mean_length(task: TabularTask, policy: TabularPolicy) -> float:
    """Exact mean number of tokens of an answer."""
    with torch.no_grad():
        lengths = torch.tensor([len(s) for s in task.sequences], dtype=torch.float64)
        return float((task.log_probability(policy).exp() @ lengths).mean())


def length_trial(phases: Phases, rate: float, seed: int, steps: int) -> Mapping[str, float]:
    """Exact success at the end and mean length on the way where longer answers are better; success where they are worse."""
    solved, length = on_scratchpads(phases, rate, seed, steps, longer=True)
    short, _ = on_scratchpads(phases, rate, seed, steps, longer=False)
    return {"success": solved, "length": length, "success where short is right": short}


def on_scratchpads(phases: Phases, rate: float, seed: int, steps: int, longer: bool) -> tuple[float, float]:
    """Success over the last fifth, mean length on the way."""
    task = scratchpads(seed, longer)
    policy, lengths, solved = terse(task, seed), list[float](), list[float]()

    def watch(step: int) -> None:
        if step % 4 == 0 or step == steps:
            lengths.append(mean_length(task, policy))
            solved.append(success(task, policy))

    train(phases, policy, verified(fresh(task, policy, GROUP, seed), seed), steps=steps, rate=rate, watch=watch)
    return _tail(solved), sum(lengths) / len(lengths)


# ---- PF-PPO ----------------------------------------------------------------------------------------------------------
ANSWERS, NOISE, JUDGED = 5, 0.15, 30


@lru_cache(64)
def judged(seed: int) -> tuple[TabularTask, Tensor]:
    """A task whose reward is a model's, and the actual scores [P, S], evenly spread over 0 to 1.

    The actual score is the normal probability of a sum of utilities of the tokens in their places; the model's error is
    normal, of standard deviation `NOISE` * 4 s (1 - s) for a score s, one draw per answer.
    """
    shape = (JUDGED, *[VOCABULARY] * LENGTH)
    utility = torch.from_numpy(keyed_generator(seed, "utility").normal(size=(JUDGED, LENGTH, VOCABULARY)))
    total = sum(
        utility[:, k].reshape(JUDGED, *[VOCABULARY if i == k else 1 for i in range(LENGTH)]) for k in range(LENGTH)
    )
    actual = torch.special.ndtr(total / LENGTH**0.5)
    error = torch.from_numpy(keyed_generator(seed, "reward model").normal(size=shape))
    model = actual + NOISE * 4 * actual * (1 - actual) * error
    task = TabularTask(JUDGED, VOCABULARY, LENGTH, lambda q, tokens: float(model[(q, *tokens)]))
    return task, actual.reshape(JUDGED, -1)


def filtered_trial(phases: tuple[str], rate: float, seed: int, steps: int) -> Mapping[str, float]:
    """PPO with a critic under the filter `phases[0]`; the actual score at the end (exact), the model's, and R^2 at the start."""
    task, scores = judged(seed)
    policy, curve = near_uniform(task, seed), list[float]()
    batch = task.sample(policy, 20 * ANSWERS, key(seed, "validation"))
    index = torch.arange(len(batch)) // ANSWERS
    digits = batch["token"].reshape(-1, LENGTH) @ VOCABULARY ** torch.arange(LENGTH - 1, -1, -1)
    actual = scores[batch["prompt_id"], digits]
    r2 = filter_r2(actual, batch["reward"], index, len(batch) // ANSWERS, phases[0])

    def watch(step: int) -> None:
        if step % 5 == 0 or step == steps:
            with torch.no_grad():
                curve.append(float((task.log_probability(policy).exp() * scores).sum(1).mean()))

    recipe = _of("pf-ppo", group=ANSWERS, filter=phases[0])
    train(recipe, policy, fresh(task, policy, ANSWERS, seed), steps=steps, rate=rate, watch=watch,
          reference=near_uniform(task, seed))  # fmt: skip
    return {"actual score": _tail(curve), "model's score": success(task, policy), "R^2": r2}


# ---- the claims ------------------------------------------------------------------------------------------------------
NETWORK = f"A network of one hidden layer, {PROMPTS} prompts, exact success."
SMALL, LARGE, RANDOM, POOLED, FIXED = (
    "max variance 8",
    "all 32",
    "random 8",
    "max variance, pooled",
    "d3s, fixed shares",
)
LONGER = "adora, length"
DAPO = {"group": GROUP, "overlong": 0.0, "minibatches": 1}
CLAIMS = (
    Claim(
        slug="bapo-balanced",
        statement="on rollouts up to 8 updates old BAPO keeps more entropy at equal success than GRPO's fixed clip, and "
        "learns faster",
        arms={
            "bapo": _of("bapo-balanced"),
            "bapo, value sums": _of("bapo-balanced", balance="value"),
            "grpo": (TOKEN_MEAN_GRPO,),
            "clip higher": _of("bapo-balanced", low=(0.8, 0.8), high=(1.28, 1.28)),
        },
        trial=stale_trial,
        steps=40,
        tune="mean success",
        grid=RATES,
        expectations=(
            Expectation(arm="bapo", metric="entropy half-way", than="grpo", least=0.0),
            Expectation(arm="bapo", metric="mean success", than="grpo", least=0.0),
        ),
        note=f"{NETWORK} Right answers walk by one of two steps per prompt, so that entropy need not be lost, and are shorter "
        f"than wrong ones. Groups of {GROUP} from weights renewed every {SYNC} updates, 40 updates; success is the "
        "mean of the run, entropy that when success was a half, and at the end. All arms have the token mean; clip "
        "higher is .8 to 1.28. With answers of one length both signs weigh the same and the search hardly moves: no "
        "difference was seen. Here BAPO learns faster, as every wider clip does, at the price of entropy: among six tokens few "
        "are rare, and raising rare ones is what would have added some. "
        "Also looked at, seeds 2000 and 2001: 32 tokens of which few are likely, tables and networks, 3 and 20 % right "
        "answers, rates of 0.01 to 0.5. At equal success BAPO's entropy was never above GRPO's: in a softmax a log-ratio grows "
        "by pi A, so that a bound on it holds back likely right tokens first, and loosening it costs entropy.",
    ),
    Claim(
        slug="d3s",
        statement="choosing rollouts by the variance of advantages beats choosing at random and, per trained token, training on "
        "all; a fixed small selection is faster early and overtaken late",
        arms={
            "d3s": _of("d3s", group=MANY),
            FIXED: _of("d3s", group=MANY, rollouts=(0.25, 0.25), tokens=(0.2, 0.2)),
            POOLED: _of("d3s", group=MANY, rollouts=(KEPT, KEPT), tokens=(1.0, 1.0)),
            SMALL: (TOKEN_MEAN_GRPO.but(counted=MostVaried(KEPT, within="group")),),
            RANDOM: (TOKEN_MEAN_GRPO.but(counted=FirstOfGroup()),),
            LARGE: (TOKEN_MEAN_GRPO,),
        },
        trial=selected_trial,
        steps=80,
        tune="success",
        grid=RATES[1:],
        expectations=(
            Expectation(arm=SMALL, metric="success", than=RANDOM, least=0.0),
            Expectation(arm="d3s", metric="success at equal tokens", than=LARGE, least=0.0),
            Expectation(arm="d3s", metric="success", than=LARGE, least=0.0),
            Expectation(arm=FIXED, metric="early success", than="d3s", least=0.0),
            Expectation(arm="d3s", metric="success", than=FIXED, least=0.0),
        ),
        note=f"{NETWORK} A random 1 % of 1,296 answers is right; groups of {MANY}, 80 updates, token means. Success is the "
        "mean of the last fifth, early success of the first third; at equal tokens: when 16 % of all sampled tokens, which "
        "is what D3S needs in all, were trained on. With 5 % right answers every arm reached a success of 1. Seen: choice "
        "by variance pays, per token by far; whether the shares grow made no difference in 80 updates, which may be too "
        "few for it. Looked at since, on two other seeds, in a table of 20 prompts, 30 updates: fixed shares and D3S are "
        "equal early (to 0.001: both start from the same shares, and with Adam fewer tokens make no larger step), D3S is "
        "ahead at the end by 0.02 [-0.06, 0.10], and training on all is as good as D3S, with six times the tokens. The "
        "network is kept, since the table has none of the interference between prompts that choosing saves.",
    ),
    Claim(
        slug="adora",
        statement="where right answers need more steps, ADORA by length has longer answers and a higher success than GRPO after "
        "equal steps",
        arms={
            LONGER: _of("adora", criteria="length"),
            "adora": _of("adora"),
            "adora, verl's rule": _of("adora", rule="verl"),
            "grpo": _of("grpo"),
        },
        trial=length_trial,
        steps=80,
        tune="success",
        grid=(0.06, 0.2, 0.6),
        expectations=(
            Expectation(arm=LONGER, metric="length", than="grpo", least=0.0),
            Expectation(arm=LONGER, metric="success", than="grpo", least=0.0),
            Expectation(arm="adora", metric="success", than="grpo", least=0.0),
        ),
        note=f"A table of logits, {PAGES} prompts, exact numbers. Answers of up to {WRITTEN} tokens, two in the mean at the "
        "start; a guess is right one time in five, a whole scratchpad nearly always, by chance where in between. Groups of "
        f"{GROUP}, 80 updates: success is the mean of the last fifth, length that of the run. The last metric is of another "
        "task, where every further token makes an answer worse. Adam makes the arms' step sizes alike: a factor of all weights "
        "changes nothing. Changed: it was a network over 10 prompts, in which length was one decision for all prompts, made "
        "by the luck of the first steps (40 seeds left success open; with 40 prompts all arms wrote at full length after ten "
        "steps). In a table each prompt decides for itself, and 40 of them make one seed's mean steady.",
    ),
    Claim(
        slug="lite-ppo",
        statement="on prompts of mixed difficulty Lite PPO is as good as GRPO and DAPO or better, at equal rollouts",
        arms={
            "lite-ppo": _of("lite-ppo"),
            "grpo": _of("grpo"),
            "dapo": _of("dapo-bytedance", **DAPO),
            "dapo, no refill": _of("dapo-bytedance", **DAPO, refill=0),
            "token mean, group std": _of("lite-ppo", std="group"),
        },
        trial=difficulty_trial,
        steps=100,
        tune="success",
        grid=(0.01, 0.03),
        expectations=(
            Expectation(arm="lite-ppo", metric="success", than="grpo", least=-0.03),
            Expectation(arm="lite-ppo", metric="success", than="dapo", least=-0.03),
        ),
        note=f"{PROGRESSIONS} arithmetic progressions of one to {TERMS} terms; start, step and number of terms are seen by "
        f"a network of one hidden layer that is right {WARM:.0%} of the time at first: short ones half of the time, long "
        f"ones hardly. {PER_STEP} prompts a step, groups of {GROUP}, 100 steps; exact success over the last fifth. DAPO "
        "with its resampling of equal groups, and as many rollouts as all others, so fewer updates, and without "
        "resampling; without its length penalty. Changed: it was ten prompts of unrelated answers, where whether one was "
        "ever found decided (16 seeds left it open); there, with 60 prompts and other seeds, Lite PPO was below GRPO by "
        "0.10 [0.02, 0.18], whose std lifts prompts that are hardly ever solved. Here hard prompts are reached by what "
        "easy ones teach, as in arithmetic; with all 60 prompts in each of 60 steps, on other seeds, DAPO without refill "
        "was above by 0.046 [0.003, 0.089], GRPO even. Seen: as good as GRPO or better; DAPO is ahead by 0.02, about as "
        "much as is tolerated, so that 14 seeds leave it open. What is gained on GRPO comes from the token mean, whichever "
        "std; DAPO has it too, and equal groups do not count in it, which is what else helps.",
    ),
    Claim(
        slug="pf-ppo",
        statement="with a reward model that errs most in the middle, best-random and best-worst filters beat PPO on all answers "
        "in actual score, and best-of-N is worst",
        arms={"best-random": ("br",), "best-worst": ("bw",), "all answers": ("none",), "best of N": ("bon",)},
        trial=filtered_trial,
        steps=40,
        tune="actual score",
        grid=(0.03, 0.1, 0.3),
        expectations=(
            Expectation(arm="best-random", metric="actual score", than="all answers", least=0.0),
            Expectation(arm="best-worst", metric="actual score", than="all answers", least=0.0),
            Expectation(arm="best of N", metric="actual score", than="all answers", most=0.0),
            Expectation(arm="best-random", metric="R^2", than="all answers", least=0.0),
            Expectation(arm="best-worst", metric="R^2", than="all answers", least=0.0),
            Expectation(arm="best of N", metric="R^2", than="all answers", most=0.0),
        ),
        note=f"A table of logits, {JUDGED} prompts, 1,296 answers each, whose actual scores s are spread evenly over 0 to "
        f"1; the reward model errs by {NOISE} * 4 s (1 - s) standard deviations, once per answer. {ANSWERS} answers per "
        "prompt, 40 updates of PPO with a critic and the paper's KL of 0.01 in the reward, whitened before the filter. R^2 "
        f"is that of the answers a filter leaves of {20 * JUDGED} groups sampled at the start. Changed: it was a network "
        "over ten prompts, whose intervals left both filters open, at -0.02. Seen: best of N is worst and R^2 ranks the "
        "filters as the paper says, but both filters lose to all answers; the middle's whitened advantages are near 0 "
        "already, so that a filter takes little noise away and leaves two to three answers' worth of five, while the best "
        "of five by a model that errs is sampled too often. Looked at on other seeds, three each, with 216 answers and the "
        "rate 0.1, at which all arms are slower: best-random was ahead by 0.01, and by 0.02 where the middle says nothing "
        "at all (actual scores 0 or 1, at random in the middle); best-worst was behind in both.",
    ),
)
