"""How hard a prompt is beside those met lately, and help in proportion (DeepVideo-R1, arXiv 2506.07464)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from unipo.episodes import Episodes
from unipo.sources.keyed import keyed_generator
from unipo.sources.prompts import Prompt
from unipo.sources.stages.augment import Augment, Drawn
from unipo.sources.stages.guidance import Guide, Prefix, guided
from unipo.sources.text.encode import encode_prompt

RECENT = "recent_rewards"
"""The name under which mean rewards of recent groups are remembered."""


@dataclass(frozen=True)
class Disturbed(Guide):
    """The prompt with a share of its tokens, rounded up, written once more before it, in an order of the prompt's own: what
    noise on its frames is to a video. Nothing is shown of the answer."""

    def shown(self, prompt: Prompt, share: float, tokenizer: object, longest: int) -> tuple[list[int], list[int]]:
        tokens = encode_prompt(tokenizer, prompt.text)
        order = keyed_generator("disturbed", prompt.id).permutation(len(tokens)).tolist()
        return [*(tokens[i] for i in order[: math.ceil(share * len(tokens) - 1e-9)]), *tokens], []


@dataclass(frozen=True)
class HelpInProportion(Augment):
    """Groups that are harder than recent ones are sampled anew behind a beginning of the solution, easier ones behind a
    disturbed prompt; both are prompts of their own.

        Delta = mean over the last `window` groups of their mean reward - the group's own
        share shown = clip(Delta / best, 0, most),     share disturbed = noise * clip(-Delta / best, 0, 1)

    `best` is the largest reward there is. A group of neither kind stays as it is.
    """

    guide: Guide = Prefix()
    window: int = 100
    best: float = 1.0
    most: float = 0.5

    noise: float = 0.0
    disturbed: Guide = Disturbed()

    def lacks(self, prompt: Prompt) -> str:
        return self.guide.lacks(prompt) if self.most else ""

    def __call__(self, groups: Episodes, drawn: Drawn) -> Episodes:
        delta = self.difficulty(groups, drawn) / self.best
        shares = {"help": delta.clamp(0.0, self.most), "disturb": self.noise * (-delta).clamp(0.0, 1.0)}
        plain = shares["help"] + shares["disturb"] == 0
        parts = [groups.select(plain.nonzero().squeeze(1), "group")]
        for (use, share), guide in zip(shares.items(), (self.guide, self.disturbed), strict=True):
            parts += self._anew(groups, share, guide, drawn, use)
        return Episodes.cat(parts) if len(parts) > 1 else groups

    def _anew(self, groups: Episodes, share: Tensor, guide: Guide, drawn: Drawn, use: str) -> list[Episodes]:
        """The groups with a share above 0, sampled behind their guide."""
        chosen = (share > 0).nonzero().squeeze(1)
        if not len(chosen):
            return []
        every, sizes = drawn.prompt_of(groups), groups.lengths("group", "episode")[chosen].tolist()
        made, _, _ = guided(guide, [every[g] for g in chosen.tolist()], share[chosen].tolist(), sizes, drawn, use)
        return [made]

    def difficulty(self, groups: Episodes, drawn: Drawn) -> Tensor:
        """[G] Delta of each group; then these groups are recent ones too. 0 where nothing is remembered yet."""
        own, kept = groups.reduce("reward", to="group", how="mean").double(), drawn.source.kept
        new = Episodes.build([[0]] * len(own)).with_columns("episode", mean_reward=own)
        old = kept.get(RECENT)
        together = new if old is None else Episodes.cat([old, new])
        kept[RECENT] = together.select(torch.arange(max(0, len(together) - self.window), len(together)))
        return torch.zeros_like(own) if old is None else old["mean_reward"].mean() - own
