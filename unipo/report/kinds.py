"""What a run is measured by, drawn along and counted in: one record per kind of run, which the rest of the report reads."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from unipo.report.aggregate import INTERQUARTILE, MEANS, Aggregate
from unipo.report.text import between, number, number_span, percent


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """A column of the metrics as a panel; `note` says in a few words how to read it."""

    title: str
    column: str
    note: str
    percent: bool = False
    log: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Measure:
    """What tells how good a policy is; higher is better.

    curve: its column and title; the run's own interval is in `<column>_low` and `<column>_high`.
    value, span: a value, and an interval, as text.
    over: what the run's own interval is over.
    scored: the `source` of the rows in samples.jsonl whose rewards are all the scores of an evaluation; "": not kept.
    """

    curve: Curve
    value: Callable[[float], str]
    span: Callable[[float, float], str]
    over: str
    scored: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Words:
    """What the page calls things.

    unit: what the policy acts. step: a step of the loop. at: "... {} ..." with a place on the axis.
    work: what is counted (`counted`: in short), with `details`, (column, words) of it. facts: (words, setting) under the title.
    reward: what an episode earns. cut: a badge for a sample that was cut, "" for none. pairs, trained_on: headings of the
    samples. layout: of a sample, a CSS class. unshown: sources of samples that say nothing to a reader.
    """

    unit: str
    step: str
    at: str
    work: str
    counted: str
    reward: str
    cut: str
    layout: str
    pairs: str
    trained_on: str
    details: tuple[tuple[str, str], ...]
    facts: tuple[tuple[str, str], ...]
    unshown: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """A kind of run.

    axis, axis_title: the column along which curves are drawn.
    work: cumulative columns whose sum is the work done; per second it is the speed.
    planned: the steps of the loop that a configuration asks for, or None where it does not say.
    """

    measure: Measure
    reward: Curve
    curves: tuple[Curve, ...]
    aggregate: Aggregate
    words: Words
    axis: str
    axis_title: str
    work: tuple[str, ...]
    planned: Callable[[Mapping[str, Any]], int | None]

    @property
    def all_curves(self) -> tuple[Curve, ...]:
        return (self.measure.curve, self.reward, *self.curves)


SPEED = "speed"
"""The column of a curve that is the work done per second."""


def kind_of(config: Mapping[str, Any]) -> Kind:
    """The kind of run that a configuration describes."""
    if "total_timesteps" not in config:
        return TEXT
    return RECORDED if config.get("dataset") else CONTROL


def _rollouts(config: Mapping[str, Any]) -> int | None:
    """Whole rollouts of every copy that it takes to make the environment steps asked for."""
    asked, copies, rollout = (config.get(n) for n in ("total_timesteps", "num_envs", "rollout"))
    known = isinstance(asked, int) and isinstance(copies, int) and isinstance(rollout, int) and copies * rollout > 0
    return -(-asked // (copies * rollout)) if known else None  # type: ignore[operator]


def _steps(config: Mapping[str, Any]) -> int | None:
    asked = config.get("steps")
    return asked if isinstance(asked, int) else None


def _common(unit: str) -> tuple[Curve, ...]:
    """Curves of whatever is trained, per `unit` that was acted."""
    return (
        Curve(title="Entropy", column="entropy", note=f"nats per {unit}; near 0: it no longer explores"),
        Curve(title="KL to the sampler", column="kl", note="k3 estimate, at the last update of the step", log=True),
        Curve(title="Effective sample size", column="ess", note="of the importance weights; 100 %: on-policy", percent=True),
        Curve(title="Clipped share", column="clipped_share", note=f"{unit}s that the clip cut off", percent=True),
        Curve(title="Gradient norm", column="grad_norm", note="before clipping", log=True),
        Curve(title="Loss", column="loss", note="a surrogate: its value is no measure of progress"),
        Curve(title="KL to the reference", column="kl_reference", note=f"nats per {unit}", log=True),
        Curve(title="Value error", column="value_error", note="of the critic", log=True),
    )  # fmt: skip


TEXT = Kind(
    measure=Measure(
        curve=Curve(title="Held-out accuracy", column="accuracy", note="full reward, or pairs in order; band: 95 % interval",
                    percent=True),
        value=percent, span=between, over="held-out prompts",
    ),
    reward=Curve(title="Reward", column="reward", note="mean over everything sampled in the step"),
    curves=(
        Curve(title="Completion length", column="length", note="tokens"),
        Curve(title="Gold reward", column="gold", note="measured, never trained on"),
        *_common("token"),
        Curve(title="KL of answers", column="kl_answer", note="to the start, nats per answer"),
        Curve(title="Truncated share", column="truncated_share", note="completions that ran out of tokens", percent=True),
        Curve(title="Accuracy on the closest pairs", column="accuracy_closest",
              note="the quarter whose answers differ least, by rating or by score", percent=True),
        Curve(title="Accuracy on the clearest pairs", column="accuracy_clearest", note="the quarter whose answers differ most",
              percent=True),
        Curve(title="Expected accuracy", column="predicted", note="by the judge itself; above its accuracy: too sure",
              percent=True),
        Curve(title="Preferred", column="preferred", note="pairs whose chosen side scores higher", percent=True),
        Curve(title="Tokens per second", column=SPEED, note="sampled and trained"),
    ),
    aggregate=MEANS,
    words=Words(
        unit="token", step="step", at="step {}", work="tokens", counted="tokens", reward="reward", cut="truncated",
        layout="blocks",
        pairs="The same held-out prompts, before and after",
        trained_on="What it was trained on, early and late",
        details=(("tokens_sampled", "sampled"), ("tokens_trained", "trained")),
        facts=(("model", "model"), ("seed", "seed"), ("reward", "reward")),
    ),
    axis="step", axis_title="step", work=("tokens_sampled", "tokens_trained"), planned=_steps,
)  # fmt: skip

CONTROL = Kind(
    measure=Measure(
        curve=Curve(title="Return", column="eval_return", note="evaluation episodes, the policy's mode; band: 95 % interval"),
        value=number, span=number_span, over="evaluation episodes", scored="held_out",
    ),
    reward=Curve(title="Training return", column="reward", note="mean over the episodes that ended in the step"),
    curves=(
        Curve(title="Episode length", column="length", note="steps; episodes that ended in the step"),
        Curve(title="Evaluated episode length", column="eval_length", note="steps"),
        *_common("action"),
        Curve(title="Steps per second", column=SPEED, note="of the environment, training and evaluation included"),
    ),
    aggregate=INTERQUARTILE,
    words=Words(
        unit="step", step="rollout", at="after {} environment steps", work="environment steps", counted="env steps",
        reward="return", cut="", layout="rows", pairs="The same evaluation episodes, before and after",
        trained_on="Fragments of episodes it was trained on, early and late",
        details=(("tokens_trained", "trained on"),),
        facts=(("seed", "seed"), ("environments", "num_envs")), unshown=("replay",),
    ),
    axis="env_steps", axis_title="environment steps", work=("env_steps",), planned=_rollouts,
)  # fmt: skip

RECORDED = replace(
    CONTROL,
    curves=(*CONTROL.curves[:-1], replace(CONTROL.curves[-1], title="Transitions per second", note="trained on")),
    words=replace(CONTROL.words, step="step", at="step {}", work="transitions", counted="transitions", details=(),
                  facts=(("seed", "seed"), ("data", "dataset"))),
    axis="step", axis_title="step", work=("tokens_trained",),
)  # fmt: skip
"""Trained on recorded data alone: nothing is acted, so there are no environment steps to draw along."""
