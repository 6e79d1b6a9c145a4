"""How hard a prompt is beside those met lately, and help in proportion (DeepVideo-R1, arXiv 2506.07464)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from unipo.episodes import Episodes
from unipo.sources.augment import Augment, Drawn
from unipo.sources.guidance import Guide, Prefix, guided
from unipo.sources.prompts import Prompt

RECENT = "recent_rewards"
"""The name under which mean rewards of recent groups are remembered."""


@dataclass(frozen=True)
class HelpInProportion(Augment):
    """Groups that are harder than recent ones are sampled anew behind a beginning of the solution, a prompt of their own.

    Delta = mean over the last `window` groups of their mean reward - the group's own;  share shown = clip(Delta / best, 0, most).
    `best` is the largest reward there is. A group without help stays as it is.
    """

    guide: Guide = Prefix()
    window: int = 100
    best: float = 1.0
    most: float = 0.5

    def lacks(self, prompt: Prompt) -> str:
        return self.guide.lacks(prompt)

    def __call__(self, groups: Episodes, drawn: Drawn) -> Episodes:
        share = (self.difficulty(groups, drawn) / self.best).clamp(0.0, self.most)
        hard = (share > 0).nonzero().squeeze(1)
        if not len(hard):
            return groups
        every, sizes = drawn.prompt_of(groups), groups.lengths("group", "episode")[hard].tolist()
        prompts = [every[g] for g in hard.tolist()]
        made, _, _ = guided(self.guide, prompts, share[hard].tolist(), sizes, drawn, "help")
        return Episodes.cat([groups.select((share == 0).nonzero().squeeze(1), "group"), made])

    def difficulty(self, groups: Episodes, drawn: Drawn) -> Tensor:
        """[G] Delta of each group; then these groups are recent ones too. 0 where nothing is remembered yet."""
        own, kept = groups.reduce("reward", to="group", how="mean").double(), drawn.source.kept
        new = Episodes.build([[0]] * len(own)).with_columns("episode", mean_reward=own)
        old = kept.get(RECENT)
        together = new if old is None else Episodes.cat([old, new])
        kept[RECENT] = together.select(torch.arange(max(0, len(together) - self.window), len(together)))
        return torch.zeros_like(own) if old is None else old["mean_reward"].mean() - own
