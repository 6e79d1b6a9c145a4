"""Rates that are proven of game solvers, measured beside their bounds: curves, and a figure of them.

python -m unipo.reproduce.game_rates docs/games.png
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor

from unipo.reproduce.games import ANSWERS, BETA, cyclic
from unipo.sources.keyed import keyed_generator
from unipo.tabular.game_solvers import inpo, iterate, multiplicative_weights, nash_md, nash_mp
from unipo.tabular.games import RegularisedGame
from unipo.tabular.halpern import AffineSum, halpern, refresh_paper


@dataclass(frozen=True, slots=True)
class Rate:
    """`measured` [K] never above `bound` [K] at `cost` [K]; `what` is measured of `title`, and what the bound is."""

    title: str
    what: str
    bound_is: str
    cost: Tensor
    measured: Tensor
    bound: Tensor


def rates(seed: int = 0, steps: int = 400) -> list[Rate]:
    """Nash-MP, Nash-MD, INPO, exponential weights and Halpern on one game or sum each."""
    game, reference = cyclic(seed)
    soft, softer = RegularisedGame(game, reference, BETA), RegularisedGame(game, reference, 0.3)
    k, first = torch.arange(steps + 1).double(), soft.distance(reference)
    prox = iterate(lambda p, t: nash_mp(soft, p, 2 * BETA), reference, steps)
    descent = iterate(lambda p, t: nash_md(softer, p, 2 / (softer.tau * (t + 2))), reference, steps)
    online = iterate(lambda p, t: inpo(softer, p, softer.tau * (t + 2) / 2), reference, steps)
    largest = max(float((p - reference).abs().max()) for p in (*online, softer.solution))
    constant = max(largest * softer.tau, 1.0)
    found = [
        Rate("Nash-MP", "KL(pi* || pi)", "(1 + 2 tau)^-k KL_0", 2 * k, kls(soft, prox), (1 + 2 * BETA) ** -k * first),
        Rate("Nash-MD", "KL(pi* || pi)", "8 / (tau^2 (T + 1))", k, kls(softer, descent), 8 / softer.tau**2 / (k + 1)),
        Rate("INPO", "KL(pi* || pi)", "32 C^2 / (tau^2 (T + 1))", k, kls(softer, online),
             32 * constant**2 / softer.tau**2 / (k + 1)),
    ]  # fmt: skip
    return [*found, average_rate(seed, steps), halpern_rate(seed, steps)]


def kls(soft: RegularisedGame, path: Tensor) -> Tensor:
    return torch.tensor([max(soft.distance(p), 1e-16) for p in path], dtype=torch.float64)


def average_rate(seed: int, steps: int) -> Rate:
    """Exploitability of the average after T steps of rate sqrt(8 log A / T), against sqrt(log A / (2 T))."""
    game, _ = cyclic(seed, ANSWERS)
    start = torch.full((ANSWERS,), 1 / ANSWERS, dtype=torch.float64).log()
    horizons = sorted({round(steps ** (i / 12)) for i in range(1, 13)})
    measured = []
    for T in horizons:
        rate = math.sqrt(8 * math.log(ANSWERS) / T)
        path = iterate(lambda p, t, rate=rate: multiplicative_weights(game, p, rate), start, T)  # type: ignore[misc]
        measured.append(max(game.exploitability(path[:-1].exp().mean(0)), 1e-16))
    cost = torch.tensor(horizons, dtype=torch.float64)
    bound = (math.log(ANSWERS) / 2 / cost).sqrt()
    return Rate("SPO, SPPO, DNO: exponential weights", "exploitability of the average", "sqrt(log A / (2 T))", cost,
                torch.tensor(measured, dtype=torch.float64), bound)  # fmt: skip


def halpern_rate(seed: int, steps: int) -> Rate:
    """|F(u_k)| with PAGE against component evaluations."""
    generator = keyed_generator(seed, "sum")
    operator = AffineSum.random_cocoercive(100, 10, generator)
    start = torch.from_numpy(generator.normal(size=10))
    L = operator.cocoercivity
    run = halpern(operator, start, 50 * steps, keyed_generator(seed, "page"), constant=L, refresh=refresh_paper(100))
    bound = 16 * L * float((start - operator.zero).norm()) / (torch.arange(len(run.calls)) + 4)
    return Rate(
        "Halpern with PAGE", "|F(u_k)|", "16 L |u_0 - u*| / (k + 4)", run.calls.double(), run.residuals(operator), bound
    )


def draw(path: Path, found: list[Rate]) -> None:
    """A panel per rate: what was measured, and the bound dashed."""
    figure = Figure(figsize=(3.2 * len(found), 2.8), layout="constrained")
    axes = figure.subplots(1, len(found))
    for axis, rate in zip(axes, found, strict=True):
        axis.plot(rate.cost, rate.measured, label=rate.what)
        axis.plot(rate.cost, rate.bound, "--", color="grey", label=rate.bound_is)
        axis.set(
            title=rate.title,
            xlabel="win rates asked for" if rate.title[:7] != "Halpern" else "evaluations",
            yscale="log",
        )
        axis.set_xscale("linear" if rate.title == "Nash-MP" else "log")
        axis.title.set_size(9)
        axis.legend(fontsize=7)
    figure.savefig(path, dpi=80)


if __name__ == "__main__":
    draw(Path(sys.argv[1]), rates())
