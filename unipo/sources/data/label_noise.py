"""Labels turned round on purpose, to see what a method makes of noise."""

from __future__ import annotations

import torch
from torch import Tensor

from unipo.episodes import Episodes
from unipo.sources.keyed import keyed_generator


def flipped(rows: Episodes, share: float, seed: int) -> tuple[Episodes, int]:
    """Each comparison or labelled answer turned round with probability `share`; and how many were.

    Whether one is depends on `seed`, on its tokens, and on how many equal ones come before it; not on the others, so that
    filters and the order of a file do not change it. Of a comparison chosen and other answers trade places, and ratings r
    become max + min - r (the best of a list is then its worst); what was judged alone is good where it was bad.
    """
    turned = _drawn(rows, share, seed)
    if not bool(turned.any()):
        return rows, 0
    swapped = rows.expand(turned, "episode", "group")
    columns = {"chosen": rows["chosen"] ^ swapped}
    if "rating" in rows:
        high, low = (
            rows.expand(rows.reduce("rating", to="group", how=how), "episode", "group") for how in ("max", "min")
        )
        rating, best = rows["rating"], rows["chosen"] == (rows["rating"] == high)
        listed = rows.expand(rows.reduce(best, to="group", how="all", level="episode"), "episode", "group")
        columns["rating"] = torch.where(swapped, high + low - rating, rating)
        columns["chosen"] = torch.where(swapped & listed, rating == low, columns["chosen"])
    made = rows.with_columns("episode", **columns)
    order = torch.argsort(_place(made), stable=True)
    order = order[torch.argsort(made.index("group", "episode")[order], stable=True)]
    return made.select(order), int(turned.sum())


def _place(rows: Episodes) -> Tensor:
    """Chosen first, then by falling rating where it is known."""
    rating = rows["rating"].nan_to_num() if "rating" in rows else torch.zeros(len(rows))
    _, rank = rating.unique(return_inverse=True)
    return (~rows["chosen"]).long() * (len(rating) + 1) - rank


def _drawn(rows: Episodes, share: float, seed: int) -> Tensor:
    """bool [G]: which are turned."""
    prompt = rows.context()
    assert prompt.offsets is not None
    contexts = prompt.values.split(prompt.offsets.diff().tolist())
    answers = rows["token"].split(rows.lengths().tolist())
    seen: dict[str, int] = {}
    found, start = [], 0
    for size in rows.lengths("group", "episode").tolist():
        parts = [contexts[start], *answers[start : start + size]]
        content = "|".join(" ".join(map(str, part.tolist())) for part in parts)
        seen[content] = seen.get(content, 0) + 1
        found.append(float(keyed_generator(seed, "flip", seen[content], content).random()) < share)
        start += size
    return torch.tensor(found, dtype=torch.bool)
