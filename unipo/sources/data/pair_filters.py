"""Which comparisons are worth training on: filters of stored pairs and lists, chained as rewards are spelled.

    --keep-pairs "margin(0.5),length(400),quality(3),diverse(0.3)"

Each is a frozen record that says of every group of rows whether it stays, and sees what those before it have left. Of a group:
r_w is the best rating of its chosen answers, r_l the lowest of the others; T the tokens of its longest answer; d_k the distance
of its prompt to the k-th nearest other prompt.
"""

from __future__ import annotations

import ast
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from unipo import functional as F
from unipo.episodes import Episodes
from unipo.rewards import split_rewards
from unipo.rewards.names import unknown
from unipo.sources.data.problems import DataError, Problem
from unipo.sources.stages.arrange import Arrange
from unipo.sources.text.filters import GroupFilter

WIDTH = 512
"""Numbers in the fingerprint of a prompt."""


@dataclass(frozen=True)
class PairFilter(GroupFilter):
    """Which groups of stored comparisons stay: bool [G]. This one keeps all."""

    def lacks(self, rows: Episodes) -> tuple[str, str] | None:
        """(what is missing in the rows, a remedy), None where they can be judged."""
        return None


@dataclass(frozen=True)
class Margin(PairFilter):
    """r_w - r_l >= least. What is chosen against its ratings has a margin below 0."""

    reason: str = "margin too small"
    least: float = 0.5

    def lacks(self, rows: Episodes) -> tuple[str, str] | None:
        return unrated(rows)

    def __call__(self, rows: Episodes) -> Tensor:
        return margins(rows) >= self.least


@dataclass(frozen=True)
class Length(PairFilter):
    """T <= most, in tokens with the end-of-sequence token."""

    reason: str = "an answer too long"
    most: float = 512

    def __call__(self, rows: Episodes) -> Tensor:
        return rows.reduce(rows.lengths(), to="group", how="max", level="episode") <= self.most


@dataclass(frozen=True)
class Quality(PairFilter):
    """min over the chosen answers of r >= least: what is learned from must be good, and not only better."""

    reason: str = "chosen answer too poor"
    least: float = 0.0

    def lacks(self, rows: Episodes) -> tuple[str, str] | None:
        return unrated(rows)

    def __call__(self, rows: Episodes) -> Tensor:
        chosen = torch.where(rows["chosen"], rows["rating"], torch.inf)
        return rows.reduce(chosen, to="group", how="min", level="episode") >= self.least


@dataclass(frozen=True)
class Diverse(PairFilter):
    """The `share` of groups with the largest d_k: prompts that have few like them. Of equal ones the first."""

    reason: str = "prompt like others"
    share: float = 0.5
    k: int = 5

    def __call__(self, rows: Episodes) -> Tensor:
        spacing = F.log_spacing(F.neighbour_distance(prompt_points(rows), self.k))
        return F.largest(spacing, F.share_of(len(spacing), self.share))


@dataclass(frozen=True)
class Important(PairFilter):
    """The `share` of groups with the largest f, at most `per_prompt` to a prompt (0: any number). FiFA (arXiv 2410.10166):

        f = z( |r_w - r_l| ) + alpha z( quality ) + gamma z( log max( d_k, median / 1000 ) ),   z(x) = (x - mean) / std

    quality: the column `quality` of the data, a number for the prompt; without it that term is 0. `cap`: the largest margin that
    counts (extreme ones may be the reward model's mistakes).
    """

    reason: str = "less important"
    share: float = 0.05
    alpha: float = 0.5
    gamma: float = 0.5
    k: int = 5
    per_prompt: int = 1
    cap: float = torch.inf

    def lacks(self, rows: Episodes) -> tuple[str, str] | None:
        return unrated(rows)

    def __call__(self, rows: Episodes) -> Tensor:
        first = _first(rows)
        margin = margins(rows).abs().clamp(max=self.cap)
        quality = rows["quality"][first].to(margin) if "quality" in rows else torch.zeros_like(margin)
        spacing = F.log_spacing(F.neighbour_distance(prompt_points(rows).to(margin), self.k))
        score = F.importance(margin, quality, spacing, self.alpha, self.gamma)
        distinct, prompt = rows["prompt_id"][first].unique(return_inverse=True)
        kept = torch.zeros_like(score, dtype=torch.bool)
        able = (F.places(score, prompt, len(distinct)) < (self.per_prompt or len(score))).nonzero().squeeze(1)
        kept[able[F.largest(score[able], F.share_of(len(score), self.share))]] = True
        return kept


FILTERS: dict[str, PairFilter] = {
    "margin": Margin(), "length": Length(), "quality": Quality(), "diverse": Diverse(), "fifa": Important(),
}  # fmt: skip


@dataclass(frozen=True)
class Keep(Arrange):
    """Of comparisons those that the filters keep, one after the other; other rows stay. DataError where they cannot be judged."""

    filters: tuple[PairFilter, ...]

    def __call__(self, rows: Episodes, tokenizer: Any) -> Episodes:
        return kept_by(rows, self.filters)[0] if bool(rows.category("kind", "pair").all()) else rows

    @property
    def title(self) -> str:
        return ",".join(map(spelled, self.filters))


# ---- what is looked at -----------------------------------------------------------------------------------------------
def _first(rows: Episodes) -> Tensor:
    """The first row of every group [G]."""
    size = rows.lengths("group", "episode")
    return size.cumsum(0) - size


def margins(rows: Episodes) -> Tensor:
    """r_w - r_l of every group [G]; NaN where a rating is unknown."""
    rating, chosen = rows["rating"], rows["chosen"]
    won = rows.reduce(torch.where(chosen, rating, -torch.inf), to="group", how="max", level="episode")
    lost = rows.reduce(torch.where(chosen, torch.inf, rating), to="group", how="min", level="episode")
    return won - lost


def unrated(rows: Episodes) -> tuple[str, str] | None:
    """Told where ratings are unknown."""
    known = ~rows["rating"].isnan() if "rating" in rows else torch.zeros(len(rows), dtype=torch.bool)
    missing = int((~rows.reduce(known, to="group", how="all", level="episode")).sum())
    if not missing:
        return None
    remedy = "rate both sides (columns chosen_rating and rejected_rating), or all answers of a list (ratings)"
    return f"{missing:,} of {rows.count('group'):,} comparisons have no ratings to look at", remedy


def prompt_points(rows: Episodes) -> Tensor:
    """Where the prompt of every group lies [G, d] float64: its column `embedding`, or the fingerprint of its tokens.

    The fingerprint counts tokens and pairs of neighbouring tokens, in `WIDTH` places by a hash, and has length 1. It knows
    words that two prompts share, not what they mean: give embeddings of a model of language for that.
    """
    if "embedding" in rows:
        return rows["embedding"][_first(rows)].double()
    prompt = rows.select(_first(rows)).context()
    assert prompt.offsets is not None
    token, owner = prompt.values, torch.repeat_interleave(prompt.offsets.diff())
    same = owner[1:] == owner[:-1]
    pairs = (token[:-1] * 1_000_003 + token[1:] * 7_919 + 1)[same]
    place = torch.cat([token * 2_654_435_761, pairs * 40_503]).remainder(2_147_483_647).remainder(WIDTH)
    counts = torch.zeros(len(prompt), WIDTH, dtype=torch.float64)
    counts.index_put_((torch.cat([owner, owner[1:][same]]), place), torch.ones(len(place)).double(), accumulate=True)
    return counts / counts.norm(dim=1, keepdim=True).clamp(min=1e-12)


# ---- spelling --------------------------------------------------------------------------------------------------------
def read_filters(text: str) -> tuple[PairFilter, ...]:
    """Filters as they are written: NAME, NAME(NUMBER) for its first setting, NAME(SETTING=NUMBER, ...); comma-separated.

    Raises ValueError with the nearest name or the settings that there are.
    """
    return tuple(_read(part.strip()) for part in split_rewards(text))


def _read(text: str) -> PairFilter:
    name, bracket, inside = text.partition("(")
    if name.strip() not in FILTERS:
        raise ValueError(unknown("filter", name.strip(), FILTERS))
    standard = FILTERS[name.strip()]
    known = [f.name for f in fields(standard) if f.name != "reason"]
    settings: dict[str, Any] = {}
    for i, part in enumerate(p for p in inside.rstrip(")").split(",") if p.strip()):
        key, _, value = part.rpartition("=")
        key = key.strip() or (known[0] if i == 0 else "")
        number = _number(value)
        if key not in known or number is None or not (bracket and text.endswith(")")):
            raise ValueError(
                f"cannot read {text!r}: write {name}({known[0]}=NUMBER); the settings of {name} are {', '.join(known)}"
            )
        settings[key] = number
    made = type(standard)(**settings)
    if not 0 < settings.get("share", 1.0) <= 1:
        raise ValueError(f"{text!r} keeps a share of {settings['share']:g}: expected one above 0 and at most 1")
    return made


def _number(text: str) -> float | int | None:
    try:
        value = ast.literal_eval(text.strip())
    except (ValueError, SyntaxError):
        return None
    return value if type(value) in (int, float) else None


def kept_by(rows: Episodes, filters: Sequence[PairFilter]) -> tuple[Episodes, list[tuple[PairFilter, int, int]]]:
    """What all filters keep, one after the other, and of each (filter, groups before, groups after).

    Raises DataError where one lacks what it asks for, or leaves nothing.
    """
    said = []
    for one in filters:
        before, name = rows.count("group"), spelled(one)
        if lacking := one.lacks(rows):
            raise DataError([Problem(name, *lacking)])
        rows = rows.select(one(rows), "group")
        said.append((one, before, rows.count("group")))
        if not len(rows):
            raise DataError([Problem(name, f"keeps none of {before:,} comparisons", "ask for less, or leave it out")])
    return rows, said


def spelled(one: PairFilter) -> str:
    """A filter as it is written."""
    name = next(n for n, standard in FILTERS.items() if type(standard) is type(one))
    settings = [
        (f.name, getattr(one, f.name)) for f in fields(one) if f.name != "reason" and getattr(one, f.name) != f.default
    ]
    return f"{name}({','.join(f'{k}={v:g}' for k, v in settings)})" if settings else name
