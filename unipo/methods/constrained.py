"""Several rewards at once: how far each is followed is a constraint, or a direction that is asked for.

The rewards of a run (`--reward "helpful.py:f,brief"`) are columns `reward.NAME` of its rollouts; `reward` is their weighted sum.

                     what is maximised            the weights of the rewards
    constrained-rlhf -KL(pi || ref)               multipliers that hold each reward at its threshold
    dpa              v . r                        a direction v, drawn for each prompt and written into it
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

from unipo.methods.method import Method, choice
from unipo.objectives import (
    Advantage,
    BatchStd,
    BestOfGroup,
    ClipMask,
    DivergenceCost,
    GeneralisedAdvantage,
    GroupMean,
    Knob,
    Likelihood,
    LogRatioScore,
    LogRatioToGo,
    Normalised,
    Objective,
    Outcome,
    Pairwise,
    Plus,
    PolicyGradient,
    Regression,
    StepReward,
    Times,
    TokenMean,
    TokenRatio,
    ValueTarget,
    Whitened,
    nothing,
    own_pairs,
    rollouts,
)
from unipo.recipe import Recipe, RolloutSpec
from unipo.sources.controllers import Below, Controller, Lagrangian
from unipo.sources.directions import Along, Directed
from unipo.sources.searching import SimplexSearch
from unipo.sources.stages.preferences import Extremes, Paired, ScoreJudge

Levels = float | str | Mapping[str, float]
"""A number for the reward as a whole, or one for each reward by name: {"math": 0.8}, or "math=0.8,brief=0.5"."""
WHOLE = "reward"
"""The name of the rewards' sum among `Levels`."""
ROUNDING = 1e-3
"""Nats that are added to the spread of the KL stream: at the start it is rounding errors, which must stay small."""


def levels_of(levels: Levels) -> dict[str, float]:
    """By the name of a reward. ValueError for what cannot be read."""
    if isinstance(levels, int | float):
        return {WHOLE: float(levels)}
    if isinstance(levels, Mapping):
        return {name: float(level) for name, level in levels.items()}
    try:
        parts = [part.split("=") for part in levels.split(",")]
        return {name.strip(): float(level) for name, level in parts}
    except ValueError:
        raise ValueError(f"cannot read {levels!r}: expected a number, or NAME=NUMBER,... by reward") from None


def column_of(name: str) -> str:
    """The column of a reward, or of their sum."""
    return name if name == WHOLE else f"reward.{name}"


def metric_of(name: str) -> str:
    """Its mean over what a step sampled."""
    return name if name == WHOLE else f"reward/{name}"


Streams = Mapping[str, Advantage]
"""An advantage by reward, each standardised by itself; that of the divergence is DIVERGENCE."""
DIVERGENCE = "kl"


def _of_groups(names: Iterable[str]) -> tuple[Streams, Objective]:
    """Rewards less their group's mean, the sum to come of -log(pi / ref) less the batch's; nothing to train beside."""
    own: dict[str, Advantage] = {
        name: Whitened(Normalised(center=GroupMean(), outcome=Outcome(column_of(name)))) for name in names
    }
    return own | {DIVERGENCE: Whitened(LogRatioToGo(1.0), BatchStd(ROUNDING))}, nothing


def _of_heads(names: Iterable[str]) -> tuple[Streams, Objective]:
    """GAE of each reward and of -log(mu / ref), with a value head for each, regressed to its own returns."""
    paid: dict[str, StepReward] = {name: StepReward(column=column_of(name)) for name in names}
    paid[DIVERGENCE] = DivergenceCost()
    made: dict[str, Advantage] = {}
    total: Objective = nothing
    for name, reward in paid.items():
        eps, weight = (ROUNDING, 0.4) if name == DIVERGENCE else (1e-8, 1.0)
        made[name] = GeneralisedAdvantage(GAMMA, LAMBDA, BatchStd(eps), reward, f"value.{name}")
        total = total + weight * Regression(
            signal=f"value.{name}", target=ValueTarget(GAMMA, LAMBDA, reward, f"value.{name}")
        )
    return made, total


CRITICS: Mapping[str, Callable[[Iterable[str]], tuple[Streams, Objective]]] = {"group": _of_groups, "heads": _of_heads}
GAMMA, LAMBDA = 0.99, 0.95


def _convex(multipliers: Mapping[str, Knob], streams: Streams) -> Advantage:
    """(N - sum s) A_KL + sum s A = sum over the constraints of (1 - s) A_KL + s A."""
    kl = streams[DIVERGENCE]
    mixed = ([Times(1.0 - s, kl), Times(s, streams[name])] for name, s in multipliers.items())
    return Plus(tuple(advantage for pair in mixed for advantage in pair))


def _added(multipliers: Mapping[str, Knob], streams: Streams) -> Advantage:
    """A_KL + sum mu A."""
    return Plus((streams[DIVERGENCE], *(Times(mu, streams[name]) for name, mu in multipliers.items())))


VARIANTS: Mapping[str, tuple[Callable[[Mapping[str, Knob], Streams], Advantage], str]] = {
    "equality": (_convex, "tanh"), "inequality": (_convex, "sigmoid"), "unsquashed": (_added, "positive"),
    "saturated": (_added, ""), "fixed": (_added, ""),
}  # fmt: skip
"""How streams are mixed, and how multipliers are squashed ("": they are not multipliers)."""


def constrained_rlhf(*, thresholds: Levels = 0.8, variant: str = "equality", critic: str = "group", group: int = 8,
                     clip: float = 0.2, rate: float = 0.1, momentum: float = 0.1, proportional: float = 5.0, decay: float = 0.0,
                     weight: float = 1.0, search: str = "", highest: Levels = 1.0, epochs: int = 1,
                     minibatches: int = 1) -> Recipe:  # fmt: skip
    """Constrained RLHF (arXiv 2310.04373): each reward is driven to a threshold beyond which it is not to be believed.

        maximise -KL(pi || ref)  subject to  J_i = theta_i                      xi-PPO, "equality": s_i = tanh(mu_i)
                                             J_i >= theta_i                     mu-PPO, "inequality": s_i = sigmoid(mu_i)
        A   = (N - sum_i s_i) A_KL + sum_i s_i A_i                              each stream standardised by itself
        L   = - TOK( min(r A, clip(r) A) )                                      mu_i <- mu_i - rate d/dmu s_i (J_i - theta_i)

    J_i: mean reward i of the step (exponential mean with `decay`). A_i: reward i less its group's mean; A_KL: the sum to come
    of -log(pi / ref). Variants: "unsquashed": A_KL + sum mu_i A_i, mu_i >= 0; "fixed": mu_i = `weight`, PPO with a KL;
    "saturated", PPO-SAT: `weight` where J_i < theta_i, else 0. `search` names a metric, such as gold: thresholds are then
    searched for up to `highest` by Nelder and Mead (NM-PPO). `critic` "heads": GAE with a value head for every stream, as the
    paper has it, in place of group means.
    Departs from the paper: mu starts at 0 and makes one step a batch, clipped by itself; s has a `proportional` part (0: the
    paper's): of standardised streams A_KL is as large near the reference as far from it, so that a multiplier that only
    integrates swings about its threshold.
    """
    mixed, squash = choice(VARIANTS, "variant", variant)
    levels = levels_of(thresholds)
    start, own = (weight, 1.0) if variant == "fixed" else (1.0, weight if variant == "saturated" else 1.0)
    knobs = {name: own * Knob(f"multiplier/{name}", start) for name in levels}
    streams, regressions = choice(CRITICS, "critic", critic)(levels)
    gradient = PolicyGradient(
        advantage=mixed(knobs, streams),
        weight=TokenRatio(), mask=ClipMask(clip, clip), aggregate=TokenMean(),
    )  # fmt: skip
    kind: Lagrangian | Below = Below(knob="")
    if squash:
        kind = Lagrangian(knob="", value=0.5 if squash == "positive" else 0.0, squash=squash, learning_rate=rate,
                          momentum=momentum, decay=decay, proportional=proportional)  # fmt: skip
    searches = _searches(levels, highest, search) if search and squash else ()
    constraints = () if variant == "fixed" else _constraints(kind, levels, bool(searches))
    objective: Objective = gradient + regressions if critic == "heads" else gradient
    return Recipe(objective=objective, rollouts=RolloutSpec(group=group), epochs=epochs, minibatches=minibatches,
                  controllers=(*constraints, *searches))  # fmt: skip


def _constraints(kind: Lagrangian | Below, levels: Mapping[str, float], searched: bool) -> tuple[Controller, ...]:
    """One controller for each reward; its target is a knob where it is searched for."""
    return tuple(
        replace(kind, knob=f"multiplier/{name}", metric=metric_of(name),
                target=Knob(f"threshold/{name}", level) if searched else level)
        for name, level in levels.items()
    )  # fmt: skip


def _searches(levels: Mapping[str, float], highest: Levels, score: str) -> tuple[Controller, ...]:
    """One axis of the search for each threshold."""
    given = levels_of(highest)
    high = tuple(given.get(name, given.get(WHOLE, 1.0)) for name in levels)
    metrics, low = tuple(metric_of(name) for name in levels), tuple(levels.values())
    return tuple(
        SimplexSearch(knob=f"threshold/{name}", axis=i, metrics=metrics, score=score, low=low, high=high)
        for i, name in enumerate(levels)
    )


def dpa(*, rewards: Levels = "near=1,length=0.1", learner: str = "sft", group: int = 16, low: float = -45.0, high: float = 0.0,
        rounds: int = 4, beta: float = 0.1, epochs: int = 1, minibatches: int = 1) -> Recipe:  # fmt: skip
    """Directional preference alignment (arXiv 2402.18571): one policy that is told how its rewards are weighed.

        v = (cos a, sin a), a ~ U[low, high] degrees, in the prompt            y* = argmax over the group of v . r
        sft:  L = - TOK( log pi(y* | x, v) )
        dpo:  L = - log sigmoid( h(y*) - h(argmin v . r) )                     h = beta log(pi / pi_t)

    `rewards`: the two by name with their scales, which should make them comparable; the first has weight cos a, the second
    sin a (below 0: there should be less of it). Groups of the last `rounds` - 1 steps are learned from again. Evaluations ask for
    the angle 0. Departs from the paper: every step is a round and goes on from the policy (the paper: four large ones, SFT from
    the base); directions as text before plain prompts; the DPO variant is ours.
    """
    scales = levels_of(rewards)
    if len(scales) != 2:
        raise ValueError(f"rewards are {rewards!r}: expected two, NAME=SCALE,NAME=SCALE")
    names = (first, second) = tuple(scales)
    along = Along(names, tuple(scales.values()))
    pairing = (Paired(ScoreJudge(0.0), Extremes("reward")),) if learner == "dpo" else ()
    learners: Mapping[str, Objective] = {
        "sft": Likelihood(counted=BestOfGroup(), rows=rollouts),
        "dpo": Pairwise(score=LogRatioScore(beta, "old"), rows=own_pairs),
    }
    share = (rounds - 1) / rounds
    spec = RolloutSpec(group=group, ask=Directed((first, second), low, high), augment=(along, *pairing), replay=share,
                       replay_steps=max(rounds - 1, 1))  # fmt: skip
    return Recipe(objective=choice(learners, "learner", learner), rollouts=spec, epochs=epochs, minibatches=minibatches)


_TESTS = "tests/methods/test_constrained.py::"
METHODS = (
    Method(
        slug="constrained-rlhf", build=constrained_rlhf, row=108, family="llm-rl", title="Constrained RLHF",
        paper="Moskovitz et al., Confronting Reward Model Overoptimization with Constrained RLHF, arXiv 2310.04373, 2024",
        equation="A = (N - sum s_i) A_KL + sum s_i A_i,  each stream standardised\nL = - TOK( min(r A, clip(r) A) )\n"
                 "controller: s_i = tanh(mu_i) (=) or sigmoid(mu_i) (>=), mu_i <- mu_i - rate ds_i (J_i - theta_i)",
        claim="Holding each reward model at its proxy point avoids the fall of the gold reward that PPO on their sum ends in.",
        identity_tests=tuple(_TESTS + name for name in (
            "test_multipliers_of_zero_leave_the_kl_alone_and_of_one_the_rewards",
            "test_frozen_multipliers_are_fixed_weights",
            "test_value_heads_that_know_nothing_leave_the_rewards",
            "test_the_multiplier_is_sgd_with_momentum_on_its_loss",
            "test_constraints_hold_at_the_end",
        )) + tuple("tests/sources/test_searching.py::" + name for name in (
            "test_nelder_mead_finds_the_top",
            "test_a_search_in_a_run_finds_the_threshold",
        )),
    ),
    Method(
        slug="dpa", build=dpa, row=93, family="multi-objective", title="Directional Preference Alignment",
        paper="Wang et al., Arithmetic Control of LLMs for Diverse User Preferences, arXiv 2402.18571, 2024",
        equation="v = (cos a, sin a) in the prompt, a ~ U[-45, 0] degrees\n"
                 "L = - TOK( log pi(y* | x, v) ),  y* = argmax_group v . r",
        claim="One policy that is told a direction reaches a front of two rewards that policies with fixed weights do not.",
        identity_tests=tuple(_TESTS + name for name in (
            "test_the_first_direction_is_best_of_n",
            "test_one_answer_has_no_drift",
            "test_scales_and_constants_of_directions",
            "test_directions_are_read_back_from_their_integers",
            "test_best_of_n_stays_near",
        )),
    ),
)  # fmt: skip
