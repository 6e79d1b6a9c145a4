"""Fresh rollouts: prompts -> groups of completions of the current policy, rewarded, filtered and labelled."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from unipo.episodes import Episodes
from unipo.sources.keyed import name_key
from unipo.sources.prompts import Curriculum, Prompt, Prompts
from unipo.sources.spec import RolloutSpec
from unipo.sources.stages.augment import Drawn
from unipo.sources.stages.beginnings import begun
from unipo.sources.text.arms import Arms
from unipo.sources.text.partial import next_windows
from unipo.sources.text.sampler import Completion, Samples

Reward = Callable[[Sequence[Any], Sequence[str], Mapping[str, Sequence[Any]]], "Scored"]
BUDGET = 16384
"""Tokens scored at once."""


@dataclass(frozen=True)
class Scored:
    """Rewards [n] of completions; `kept` [n] False where the row is dropped; `parts`: each reward function's own [n].

    `gold` [n]: what is measured and never trained on, where there is such a reward.
    """

    reward: torch.Tensor
    kept: torch.Tensor
    parts: Mapping[str, torch.Tensor] = field(default_factory=dict)
    gold: torch.Tensor | None = None

    @property
    def columns(self) -> dict[str, torch.Tensor]:
        """Columns of episodes: `reward`, `reward.NAME` of each part, `gold`."""
        gold = {} if self.gold is None else {"gold": self.gold}
        return {"reward": self.reward, **{f"reward.{name}": value for name, value in self.parts.items()}, **gold}


@dataclass
class Rollouts:
    """Samples `prompts_per_step` groups a step, keyed by (seed, step, prompt, sample).

    `kept`: rows that stages of `spec.augment` remember over steps, by name. `policy`: whose samples these are, for stages that
    ask for log-probs. `players`: samplers of other policies by name, for stages that meet them.
    """

    prompts: Prompts | Curriculum | Arms
    sampler: Samples
    tokenizer: Any
    reward: Reward
    spec: RolloutSpec
    prompts_per_step: int
    seed: int
    position: int = 0
    tokens_sampled: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    metrics: dict[str, float] = field(default_factory=dict)
    kept: dict[str, Episodes] = field(default_factory=dict)
    policy: Any = None
    players: Mapping[str, Any] = field(default_factory=dict)

    def draw(self, step: int, version: int) -> Episodes:
        """One batch of groups that the recipe's filter keeps; `dropped` counts the others by reason.

        The filter judges the task's rewards, before any relabelling (DAPO's length penalty must not make a group of wrong
        answers look mixed). Where it drops groups, up to `spec.refill` further rounds are sampled; if nothing at all was
        kept the last round is returned unfiltered, so that a step never has an empty batch.
        """
        self._seen: list[tuple[float, int, bool]] = []
        self._parts: dict[str, list[torch.Tensor]] = {}
        if self.spec.window:
            return self._windows(step, version)
        kept: list[Episodes] = []
        for _ in range(1 + self.spec.refill):
            wanted = self.prompts_per_step - sum(e.count("group") for e in kept)
            prompts = self._next(wanted, step)
            drawn = Drawn({p.id: p for p in prompts}, self, self.seed, step, version)
            fresh = self._augmented(self._sampled(prompts, drawn), drawn, filtered=False)
            keep = self.spec.keep(fresh)
            self.dropped[self.spec.keep.reason] += int((~keep).sum())
            if bool(keep.any()):
                kept.append(self._labelled(fresh.select(keep, "group"), drawn))
            if sum(e.count("group") for e in kept) >= self.prompts_per_step:
                break
        self._measure()
        return Episodes.cat(kept) if kept else self._labelled(fresh, drawn)

    def _windows(self, step: int, version: int) -> Episodes:
        """As many rows, each an answer as far as it is written; measured are those that are finished."""
        count, group = self.prompts_per_step * self.spec.group, self.spec.group
        made, prompts = next_windows(self, count, group, self.spec.window, step, version)
        self._note(made.select(made["finished"]))
        self._measure()
        return self._labelled(made, Drawn(prompts, self, self.seed, step, version))

    def complete(self, prompts: Sequence[Prompt], contexts: Sequence[Sequence[int]], step: int, version: int, *,
                 use: str = "", written: Sequence[Sequence[int]] | None = None, by: tuple[str, float] | None = None,
                 **columns: Any) -> Episodes:  # fmt: skip
        """One more completion behind each of `contexts` [n] (tokens), rewarded as an answer to its prompt of `prompts` [n].

        Neighbours with one prompt form a group. `use` keeps the draws of different uses apart. `written` [n]: what of the
        answer the contexts end with; rewards see it too, and the answer stays within the limit of tokens. `by`: (player, share)
        writes with this share of one of `players` in the logits, 1 for that player alone. `columns`: further columns [n] of
        the episodes. Rows whose reward could not be computed are left out.
        """
        written = [()] * len(prompts) if written is None else written
        limit, seen, rows = self.sampler.settings.max_tokens, Counter[int](), []
        for prompt in prompts:
            rows.append([self.seed, step, prompt.id, seen[prompt.id], *([name_key(use)] if use else [])])
            seen[prompt.id] += 1
        keys = torch.tensor(rows, dtype=torch.long).reshape(len(prompts), -1)
        limits = [limit - len(w) for w in written]
        completions = self._writer(by).sample(contexts, keys, limits)
        self.tokens_sampled += sum(len(c.tokens) for c in completions)
        texts = [[*w, *c.tokens] for w, c in zip(written, completions, strict=True)]
        scored = self.scored(prompts, texts)
        self.dropped["no reward"] += int((~scored.kept).sum())
        made = rollout_episodes(contexts, completions, [p.id for p in prompts], scored, version)
        return made.with_columns("episode", **{**categories_of(prompts), **columns}).select(scored.kept)

    def _writer(self, by: tuple[str, float] | None) -> Samples:
        if by is None:
            return self.sampler
        name, share = by
        if name not in self.players:
            known = sorted(self.players) or "no other player"
            raise ValueError(f"answers of {name!r} are asked for, and these rollouts know {known}")
        player: Samples = self.players[name]
        return player if share == 1.0 else self.sampler.mixed(player, share)

    def _measure(self) -> None:
        """Means over everything that was sampled in this step, before any stage, filter or relabelling."""
        n = len(self._seen) or math.nan
        reward, length, truncated = (sum(float(row[i]) for row in self._seen) / n for i in range(3))
        spread = sum((float(row[0]) - reward) ** 2 for row in self._seen) / n
        self.metrics = {
            "reward": reward,
            "reward_std": math.sqrt(spread),
            "length": length,
            "truncated_share": truncated,
            "rollouts": float(len(self._seen)),
            **{name: float(torch.cat(found).nanmean()) for name, found in self._parts.items()},
            **(self.arms.metrics() if self.arms is not None else {}),
        }

    def _next(self, n: int, step: int) -> list[Prompt]:
        first, self.position = self.position, self.position + n
        if isinstance(self.prompts, Arms):
            return [self.spec.ask(p, self.seed, step) for p in self.prompts.take(n, first)]
        return [self.prompt_at(first + i, step) for i in range(n)]

    def prompt_at(self, number: int, step: int) -> Prompt:
        """The prompt at a place of the stream, as it is in `step`."""
        if isinstance(self.prompts, Arms):
            raise TypeError("prompts that are drawn from arms have no place in a stream")
        prompts = self.prompts.at(step) if isinstance(self.prompts, Curriculum) else self.prompts
        return self.spec.ask(prompts[number], self.seed, step)

    def _sampled(self, prompts: list[Prompt], drawn: Drawn) -> Episodes:
        rows, writer, by = [p for p in prompts for _ in range(self.spec.group)], self.spec.writer, None
        if writer is not None:
            drawn, by = replace(drawn, step=writer.step(drawn.step), version=-1), (writer.player, 1.0)
        made = begun(self.spec.begin, rows, drawn, by)
        self._note(made)
        return made

    def _note(self, made: Episodes) -> None:
        """Rollouts that metrics are of."""
        facts = (made["reward"].tolist(), made.lengths().tolist(), made["truncated"].tolist())
        self._seen += list(zip(*facts, strict=True))
        for name in (n for n in made.columns if n == "gold" or n.startswith("reward.")):
            self._parts.setdefault(name.replace(".", "/", 1), []).append(made[name])

    def _augmented(self, groups: Episodes, drawn: Drawn, filtered: bool) -> Episodes:
        for stage in self.spec.augment:
            if stage.filtered == filtered and len(groups):
                groups = stage(groups, drawn)
        return groups

    def _labelled(self, made: Episodes, drawn: Drawn) -> Episodes:
        for relabel in self.spec.relabel:
            made = relabel(made, self.sampler.settings.max_tokens)
        return self._augmented(made, drawn, filtered=True)

    def scored(self, prompts: Sequence[Prompt], tokens: Sequence[Sequence[int]]) -> Scored:
        """What the reward says of tokens [n] as answers to prompts [n]."""
        texts = [self.tokenizer.decode(list(t), skip_special_tokens=True) for t in tokens]
        names = dict.fromkeys(name for p in prompts for name in p.columns)
        columns = {name: [p.columns.get(name) for p in prompts] for name in names}
        return self.reward([p.text for p in prompts], texts, columns)

    @torch.no_grad()
    def log_probabilities(
        self, contexts: Sequence[Sequence[int]], tokens: Sequence[Sequence[int]]
    ) -> list[torch.Tensor]:
        """log pi of each of `tokens` [n] behind `contexts` [n], token by token, whoever wrote them."""
        rows, made = Episodes.build(tokens, contexts), list[torch.Tensor]()
        for part in rows.split(BUDGET, self.policy.total_lengths(rows)):
            chosen = rows.select(part)
            made += self.policy.signals(chosen, ["logp"])["logp"].split(chosen.lengths().tolist())
        return made

    def state_dict(self) -> dict[str, Any]:
        own = {"position": self.position, "tokens_sampled": self.tokens_sampled, "dropped": dict(self.dropped)}
        return own if self.arms is None else {**own, "arms": self.arms.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.position, self.tokens_sampled = int(state["position"]), int(state["tokens_sampled"])
        self.dropped = Counter(state["dropped"])
        if self.arms is not None:
            self.arms.load_state_dict(state["arms"])

    @property
    def arms(self) -> Arms | None:
        """The arms that prompts are drawn from, if they are: to be told what was learned."""
        return self.prompts if isinstance(self.prompts, Arms) else None

    def save(self, folder: Path) -> None:
        """What stages remember, into the folder of a checkpoint."""
        for name, rows in self.kept.items():
            rows.save(folder / f"kept_{name}.parquet")

    def load(self, folder: Path) -> None:
        self.kept = {path.stem.removeprefix("kept_"): Episodes.load(path) for path in folder.glob("kept_*.parquet")}


def categories_of(prompts: Sequence[Prompt]) -> dict[str, list[str]]:
    """The categories `task` (which of several) and `arm` of episodes, where their prompts have columns of that name."""
    named = {name: [p.columns.get(name) for p in prompts] for name in ("task", "arm")}
    return {
        name: ["" if value is None else str(value) for value in values]
        for name, values in named.items()
        if any(value is not None for value in values)
    }


def rollout_episodes(
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Completion],
    prompt_ids: Sequence[int],
    scored: Scored,
    version: int,
) -> Episodes:
    """Episodes of kind "rollout" from completions; equal neighbouring prompt ids form a group."""
    group = torch.unique_consecutive(torch.tensor(prompt_ids), return_inverse=True)[1]
    made = Episodes.build(
        [c.tokens for c in completions], prompts, group.tolist(),
        behavior_logp=[c.logp for c in completions],
        kind=["rollout"] * len(completions),
        truncated=[c.truncated for c in completions],
        prompt_id=list(prompt_ids),
        policy_version=[version] * len(completions),
    )  # fmt: skip
    return made.with_columns("episode", **scored.columns)
