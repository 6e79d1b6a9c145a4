"""The papers' claims as small experiments with the library's own recipes; each writes a verdict with its numbers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from rich.console import Console, RenderableType

from unipo.reproduce import (
    actor_critic,
    bandits,
    constrained,
    control_applications,
    control_preferences,
    edited_answers,
    estimation_theory,
    gradients,
    group_variants,
    guided,
    mixed,
    offline,
    on_policy_control,
    online,
    optimizers,
    preference_data,
    preference_games,
    preference_lists,
    preferences,
    regressions,
    reward_models,
    segments,
    self_tuning,
    stale_data,
    supervised,
    tabular_theory,
    text_applications,
    token_rewards,
)
from unipo.reproduce.claim import Claim, Expectation, combined
from unipo.reproduce.picture import picture
from unipo.reproduce.run import VERDICTS, run_claim, shown, write

PAGES = (bandits, gradients, group_variants, offline, online, mixed, stale_data, optimizers, tabular_theory, estimation_theory,
         on_policy_control, actor_critic, control_applications, regressions, supervised, guided, self_tuning, token_rewards,
         segments, text_applications, preference_data, preferences, preference_games, constrained, reward_models,
         preference_lists, edited_answers, control_preferences)  # fmt: skip
CLAIMS: Mapping[str, Claim] = {claim.slug: claim for page in PAGES for claim in page.CLAIMS}
"""The claim of every method that has one, by slug."""


def reproduce_claim(slug: str, seeds: int = 5, console: Console | None = None, *, steps: int | None = None,
                    folder: Path = VERDICTS) -> RenderableType:  # fmt: skip
    """Run the experiment of `slug`, write `folder/<slug>.json` and `.png`, and return the table of what came out.

    `steps` shortens every trial. Raises KeyError for a slug without a claim.
    """
    if slug not in CLAIMS:
        raise KeyError(f"no claim is written down for {slug!r}; there are: {', '.join(CLAIMS)}")
    verdict = run_claim(CLAIMS[slug], seeds, console or Console(), steps)
    picture(verdict, write(verdict, folder).with_suffix(".png"))
    return shown(verdict)


__all__ = ["CLAIMS", "Claim", "Expectation", "combined", "reproduce_claim"]
