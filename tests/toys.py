"""A small differentiable policy and batches with every kind of row, in float64."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from unipo.episodes import Episodes
from unipo.functional.quantities import PLAIN, measured, parametric
from unipo.learner.coefficients import coefficients
from unipo.objectives import Objective, with_settings

VOCABULARY = 7


class ToyPolicy(nn.Module):
    """Logits and a value from (mean of the context, previous token, position); implements the Player protocol."""

    def __init__(self, seed: int = 0, width: int = 6) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.embedding = nn.Parameter(torch.randn(VOCABULARY, width, generator=generator, dtype=torch.float64))
        self.position = nn.Parameter(torch.randn(16, width, generator=generator, dtype=torch.float64))
        self.output = nn.Parameter(torch.randn(width, VOCABULARY, generator=generator, dtype=torch.float64))
        self.value_head = nn.Parameter(torch.randn(width, generator=generator, dtype=torch.float64))

    emits = PLAIN | {"value"} | parametric(["tempered:1.3", "tempered_share:1.3"])

    def total_lengths(self, episodes: Episodes) -> Tensor:
        offsets = episodes.context().offsets
        assert offsets is not None
        return episodes.lengths() + offsets.diff()

    def signals(self, episodes: Episodes, names: Sequence[str]) -> dict[str, Tensor]:
        context, token = episodes.context(), episodes["token"]
        assert context.offsets is not None
        owner = torch.repeat_interleave(context.offsets.diff())
        first = torch.zeros(len(episodes), self.embedding.shape[1], dtype=torch.float64)
        first = first.index_add(0, owner, self.embedding[context.values])
        position = episodes.position()
        before = torch.where(position[:, None] > 0, self.embedding[token.roll(1)], first[episodes.index("episode")])
        hidden = torch.tanh(before + first[episodes.index("episode")] + self.position[position])
        logits = torch.log_softmax(hidden @ self.output, -1)
        made = {
            "logp": logits.gather(1, token[:, None]).squeeze(1),
            "entropy": -(logits.exp() * logits).sum(1),
            "value": hidden @ self.value_head,
        }
        others = [name for name in names if name not in made]
        made |= measured(others, hidden @ self.output, episodes) if others else {}
        return {name: made[name] for name in names}

    def named_parameters(self, *arguments: object, **keywords: object) -> Iterator[tuple[str, nn.Parameter]]:  # type: ignore[override]
        return super().named_parameters()


def toy_batch(
    seed: int = 0, groups: int = 4, group: int = 4, rewards: Sequence[float] | None = None, demos: bool = True
) -> Episodes:
    """Fresh and replayed groups of rollouts (each with its prompt's demonstration where `demos`), demonstrations, pairs,
    a preference group of two winners and three losers, pairs of own answers (with rewards), and labelled answers."""
    generator = torch.Generator().manual_seed(seed)

    def numbers(n: int, high: int) -> list[int]:
        return torch.randint(high, (n,), generator=generator).tolist()

    parts = []
    for g in range(groups):
        prompt = numbers(1 + g % 3, VOCABULARY)
        lengths = [1 + x for x in numbers(group, 6)]
        won = numbers(group, 2) if rewards is None else list(rewards)
        if rewards is None and g == 0:
            won = [1, 0, *won[2:]]
        rows = Episodes.build(
            [numbers(n, VOCABULARY) for n in lengths], [prompt] * group, [0] * group, kind=["rollout"] * group,
            task=[("asr", "msr")[(g // 2) % 2]] * group, policy_version=[5 - 3 * (g % 2)] * group,
            source=["fresh" if g % 2 == 0 else "replay"] * group, prompt_id=[g] * group, truncated=[False] * group,
        )  # fmt: skip
        rows = rows.with_columns("episode", reward=torch.tensor(won, dtype=torch.float64))
        if demos:
            shown = Episodes.build([numbers(3, VOCABULARY)], [prompt], kind=["demo"], source=["demos"], prompt_id=[g],
                                   truncated=[False], policy_version=[-1])  # fmt: skip
            rows = Episodes.cat([rows, shown]).as_one_group()
        parts.append(rows)
    for p in range(3):
        prompt = numbers(2, VOCABULARY)
        parts.append(Episodes.build([numbers(2, VOCABULARY), numbers(3, VOCABULARY)], [prompt] * 2, [0, 0], kind=["pair"] * 2,
                                    source=["pairs"] * 2, chosen=[True, False], prompt_id=[100 + p] * 2,
                                    truncated=[False] * 2, policy_version=[-1] * 2))  # fmt: skip
    parts.append(Episodes.build([numbers(n, VOCABULARY) for n in (2, 1, 3, 2, 1)], [numbers(2, VOCABULARY)] * 5, [0] * 5,
                                kind=["pair"] * 5, source=["pairs"] * 5, chosen=[True, True, False, False, False],
                                prompt_id=[200] * 5, truncated=[False] * 5, policy_version=[-1] * 5))  # fmt: skip
    for p in range(2):
        own = Episodes.build([numbers(2 + p, VOCABULARY), numbers(1, VOCABULARY)], [numbers(2, VOCABULARY)] * 2, [0, 0],
                             kind=["pair"] * 2, source=["fresh"] * 2, chosen=[True, False], prompt_id=[400 + p] * 2,
                             truncated=[False] * 2, policy_version=[5] * 2)  # fmt: skip
        parts.append(own.with_columns("episode", reward=torch.tensor([1.0, 0.0], dtype=torch.float64)))
    for p in range(4):
        parts.append(Episodes.build([numbers(1 + p, VOCABULARY)], [numbers(2, VOCABULARY)], kind=["label"], source=["labels"],
                                    chosen=[p % 2 == 0], prompt_id=[300 + p], truncated=[False],
                                    policy_version=[-1]))  # fmt: skip
    for p in range(3):
        kind, prompts = (
            ("context", [numbers(2, VOCABULARY), numbers(2, VOCABULARY)]) if p else ("rationale", [[1, 2, 3]])
        )
        n, said = len(prompts), numbers(3, VOCABULARY)
        parts.append(Episodes.build([said] * n, prompts, [0] * n, kind=[kind] * n, source=[kind] * n, truncated=[False] * n,
                                    chosen=[True, False][:n], prompt_id=[500 + p] * n, policy_version=[-1] * n))  # fmt: skip
    return annotated(Episodes.cat(parts), generator)


def annotated(batch: Episodes, generator: torch.Generator, drift: float = 0.3) -> Episodes:
    """With log-probs of older policies near the toy policy's own, values of the critic before the update, what companions say
    of tokens, and marks of partial rollouts: the second half of each episode is new, every other one is finished."""
    signals = ToyPolicy().signals(batch, ["logp", "value"])
    acted = batch.expand(batch.category("kind", "rollout"))

    def near(x: Tensor) -> Tensor:
        return x.detach() + drift * torch.randn(len(x), generator=generator, dtype=torch.float64)

    behavior = torch.where(acted, near(signals["logp"]), torch.nan)
    batch = batch.with_columns("step", behavior_logp=behavior, reference_logp=near(signals["logp"]),
                               old_logp=near(signals["logp"]), old_value=near(signals["value"]),
                               previous_logp=near(signals["logp"]), anchor_logp=near(signals["logp"]),
                               old_mismatched_logp=near(signals["logp"] - 1.0),
                               reference_mismatched_logp=near(signals["logp"] - 1.2))  # fmt: skip
    group = batch.index("group", "episode")
    first = torch.cat([torch.ones(1, dtype=torch.bool), group[1:] != group[:-1]])
    preferred = batch["chosen"] | (first & batch.category("kind", "rollout"))
    win, sure = torch.rand((2, len(batch)), generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    rating = torch.where(batch.category("kind", "pair"), 1 + 9 * win, torch.nan)
    batch = batch.with_columns("episode", chosen=preferred, win_rate=win, confidence=0.5 + sure / 2, rating=rating)
    collision, weight, reward = torch.rand((3, len(acted)), generator=generator, dtype=torch.float64)
    batch = batch.with_columns("step", old_collision=collision, token_weight=weight, token_reward=-0.1 * reward)
    added = torch.randn(len(acted), generator=generator, dtype=torch.float64)
    current = 2 * batch.position() + 2 > batch.expand(batch.lengths())
    batch = batch.with_columns("step", segment_advantage=added, current=current, edit_weight=1 + weight,
                               context_weight=2 - weight, aligned_logp=near(signals["logp"]),
                               generated=current | (batch.position() > 0))  # fmt: skip
    batch = batch.with_columns("episode", made="edited")
    return batch.with_columns("episode", finished=torch.arange(len(batch)) % 2 == 0)


def gradient(
    objective: Objective, episodes: Episodes, logp: Tensor, settings: Mapping[str, float] | None = None
) -> Tensor:
    """dL/dlogp [N] of an objective that needs no other signal."""
    return coefficients(with_settings(objective, settings or {}), episodes, {"logp": logp}).total["logp"]


def rollouts_of(rewards: Sequence[Sequence[float]], lengths: Sequence[Sequence[int]], seed: int = 0, drift: float = 0.0
                ) -> tuple[Episodes, Tensor]:  # fmt: skip
    """Groups of rollouts with given rewards and lengths, and log-probs [N] at a distance `drift` from the behavior's."""
    generator = torch.Generator().manual_seed(seed)
    flat = [n for g in lengths for n in g]
    group = [i for i, g in enumerate(lengths) for _ in g]
    e = Episodes.build([[0] * n for n in flat], [[0]] * len(flat), group, kind=["rollout"] * len(flat), prompt_id=group,
                       truncated=[False] * len(flat))  # fmt: skip
    n = e.count("step")
    behavior = -torch.rand(n, generator=generator, dtype=torch.float64) - 0.1
    logp = behavior + drift * torch.randn(n, generator=generator, dtype=torch.float64)
    won = torch.tensor([r for g in rewards for r in g], dtype=torch.float64)
    e = e.with_columns("episode", reward=won)
    return e.with_columns(
        "step", behavior_logp=behavior, reference_logp=behavior.clone(), old_logp=behavior.clone()
    ), logp
