"""The ledger: who moved the policy. The same columns for every method, from the coefficients of its update.

The *gradient mass* of a step is half the L1 norm of the gradient that its `logp` coefficient c sends to the logits,
|c| * (1 - p): c * (onehot - pi) has L1 norm 2 |c| (1 - p). A token that is already certain moves nothing, however large its
coefficient. For other signals the mass is |c|, summed over an ensemble.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from unipo import functional as F
from unipo.learner.coefficients import per_step
from unipo.learner.learner import Update

STALENESS = ((0, 0, "0"), (1, 2, "1-2"), (3, 8, "3-8"), (9, 32, "9-32"), (33, 1 << 60, "33+"))


def ledger(update: Update, version: int) -> dict[str, float]:
    """Columns `ledger/<axis>/<name>/<quantity>` of one update; axes source, kind, sign, staleness, term.

    `version` is the policy version that was updated: staleness is the number of versions since the row was sampled.
    Quantities: gradient_share (of the mass), rows, tokens, ess (effective sample size of the weights, as a fraction),
    clipped_share (steps masked out), kl (mean k3 estimate between behavior and current policy).
    """
    mass = gradient_mass(update)
    total = float(mass.sum())
    columns: dict[str, float] = {}
    for axis, name, steps in _strata(update, version):
        share = float(mass[steps].sum()) / total if total > 0 else 0.0
        columns[f"ledger/{axis}/{name}/gradient_share"] = share
        columns[f"ledger/{axis}/{name}/tokens"] = float(steps.sum())
        rows = update.episodes.reduce(steps, how="any")
        columns[f"ledger/{axis}/{name}/rows"] = float(rows.sum())
        if axis != "sign":
            columns.update({f"ledger/{axis}/{name}/{k}": v for k, v in _quality(update, steps).items()})
    masses = {t.title: float(_mass(update, t.gradient).sum()) for t in update.coefficients.terms}
    for share_of in update.coefficients.terms:
        claimed = torch.stack([per_step(g != 0).any(-1) for g in share_of.gradient.values()]).any(0)
        key = f"ledger/term/{share_of.title}"
        columns[f"{key}/gradient_share"] = masses[share_of.title] / max(sum(masses.values()), 1e-300)
        columns[f"{key}/tokens"] = float(claimed.sum())
        columns[f"{key}/loss"] = float(share_of.loss)
        columns[f"{key}/coefficient"] = share_of.coefficient
    return columns


def gradient_mass(update: Update) -> Tensor:
    """[N]: how hard each step pulls at the logits, all terms together."""
    return _mass(update, update.coefficients.total)


def _mass(update: Update, gradient: object) -> Tensor:
    mass = torch.zeros(update.episodes.count("step"), device=update.episodes.device)
    for name, c in dict(gradient).items():  # type: ignore[call-overload]
        size = per_step(c.abs()).sum(-1)
        if name == "logp":
            size = size * (1.0 - torch.nan_to_num(update.signals[name]).exp().clamp(max=1.0))
        mass = mass + size.to(mass)
    return mass


def _strata(update: Update, version: int) -> Iterator[tuple[str, str, Tensor]]:
    episodes = update.episodes
    for axis in ("source", "kind"):
        if axis in episodes:
            for name in episodes.column(axis).names:
                steps = episodes.expand(episodes.category(axis, name))
                if bool(steps.any()):
                    yield axis, name or "unknown", steps
    coefficient = update.coefficients.total.get("logp")
    if coefficient is not None:
        yield "sign", "raised", coefficient < 0
        yield "sign", "lowered", coefficient > 0
    if "policy_version" in episodes:
        age = version - episodes["policy_version"]
        known = episodes["policy_version"] >= 0
        for low, high, name in STALENESS:
            rows = known & (age >= low) & (age <= high)
            if bool(rows.any()):
                yield "staleness", name, episodes.expand(rows)


def _quality(update: Update, steps: Tensor) -> dict[str, float]:
    found: dict[str, float] = {}
    weight, clipped = update.fact("weight")[steps], update.fact("clipped")[steps]
    if bool((~weight.isnan()).any()):
        found["ess"] = float(F.effective_sample_size(weight[~weight.isnan()]))
        found["clipped_share"] = float(clipped[~clipped.isnan()].mean())
    logp = update.signals.get("logp")
    if logp is not None and "behavior_logp" in update.episodes:
        log_ratio = (logp - update.episodes["behavior_logp"].to(logp))[steps]
        log_ratio = log_ratio[log_ratio.isfinite()]
        if len(log_ratio):
            found["kl"] = float(F.k3(-log_ratio).mean())
    return found


def summary(update: Update) -> dict[str, float]:
    """Columns of the whole batch: loss, grad_norm, entropy, kl, ess, clipped_share, and means of term facts."""
    everything = torch.ones(update.episodes.count("step"), dtype=torch.bool, device=update.episodes.device)
    found = {"loss": float(update.coefficients.loss), "grad_norm": update.grad_norm,
             "tokens_computed": update.tokens_computed,
             "learning_rate": update.learning_rate, **_quality(update, everything)}  # fmt: skip
    if math.isfinite(update.gradient_noise):
        found["gradient_noise"] = update.gradient_noise
    if "entropy" in update.signals:
        found["entropy"] = float(update.signals["entropy"].nanmean())
    for name in ("preferred", "margin", "value_error", "kl_reference", "clip_low", "clip_high", "positive_share"):
        fact = update.fact(name)
        if bool((~fact.isnan()).any()):
            found[name] = float(fact.nanmean())
    return found
