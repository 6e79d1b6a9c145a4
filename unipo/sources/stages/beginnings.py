"""Rollouts that begin somewhere along an answer that is written already, as if an environment were reset to a recorded state.

What an answer begins with are steps of its own, which nobody sampled (column `generated` False): rewards, values and
divergences see them, a policy gradient leaves them out. In `unipo.sources.stages.guidance` such a beginning is context instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from unipo.episodes import Episodes
from unipo.objectives import Knob, number
from unipo.sources.keyed import keyed_generator
from unipo.sources.prompts import Prompt
from unipo.sources.stages.augment import Drawn
from unipo.sources.stages.guidance import trace_of
from unipo.sources.text.encode import encode_completion, encode_prompt


@dataclass(frozen=True)
class Beginning:
    """(prompts [n], drawn) -> what each of n rollouts begins with, tokens. This one: nothing.

    `columns`: what its rollouts have beside the usual ones.
    """

    columns: ClassVar[frozenset[str]] = frozenset()

    def __call__(self, prompts: Sequence[Prompt], drawn: Drawn) -> list[list[int]]:
        return [[] for _ in prompts]

    def lacks(self, prompt: Prompt) -> str:
        """What a prompt must have for it and has not; "" where nothing."""
        return ""


@dataclass(frozen=True)
class Reset(Beginning):
    """With probability `share` the first h tokens of the prompt's demonstration, h uniform over shortest, ..., |y| - 1.

    `column`: of the data, which holds the demonstration. Answers of fewer than two tokens have no such beginning. `shortest` 0
    includes the beginning itself. A function of (seed, step, prompt, number of the sample).
    """

    columns: ClassVar[frozenset[str]] = frozenset({"generated"})

    share: float | Knob = 0.5
    column: str = "demonstration"
    shortest: int = 1

    def lacks(self, prompt: Prompt) -> str:
        return (
            ""
            if trace_of(prompt, self.column) is not None
            else f"a column {self.column!r} with an answer to begin from"
        )

    def __call__(self, prompts: Sequence[Prompt], drawn: Drawn) -> list[list[int]]:
        seen, found, longest = dict[int, int](), [], drawn.source.sampler.settings.max_tokens
        for prompt in prompts:
            sample = seen[prompt.id] = seen.get(prompt.id, -1) + 1
            key = keyed_generator(drawn.seed, "reset", drawn.step, prompt.id, sample)
            text, chance = trace_of(prompt, self.column), float(key.random())
            if text is None:
                raise ValueError(f"prompt {prompt.id} lacks {self.lacks(prompt)}: add it to the data")
            shown = encode_completion(drawn.source.tokenizer, text)[:longest]
            reset = chance < number(self.share) and len(shown) >= 2
            found.append(shown[: int(key.integers(self.shortest, len(shown)))] if reset else [])
        return found


def begun(begin: Beginning, prompts: Sequence[Prompt], drawn: Drawn, by: tuple[str, float] | None = None) -> Episodes:
    """A rollout for each of `prompts` [n], behind what it begins with; neighbours with one prompt form a group. `by`: as of
    `Rollouts.complete`."""
    plain = [encode_prompt(drawn.source.tokenizer, p.text) for p in prompts]
    written = begin(prompts, drawn)
    contexts = [[*context, *first] for context, first in zip(plain, written, strict=True)]
    made = drawn.source.complete(prompts, contexts, drawn.step, drawn.version, written=written, by=by,
                                 number=torch.arange(len(prompts)))  # fmt: skip
    kept = made["number"].tolist()
    made = made.without("number")
    if "generated" not in begin.columns:
        return made
    first = [written[i] for i in kept]
    logp = iter(drawn.source.log_probabilities([plain[i] for i in kept if written[i]], [w for w in first if w]))
    return lengthened(made, [plain[i] for i in kept], first, [next(logp) if w else torch.zeros(0) for w in first])


def lengthened(made: Episodes, contexts: Sequence[Sequence[int]], first: Sequence[Sequence[int]], logp: Sequence[Tensor]
               ) -> Episodes:  # fmt: skip
    """The same answers with the tokens that they begin with, `first` [E] of log-probs `logp` [E], as steps before theirs.

    `generated` [N] bool: which steps were sampled.
    """
    sizes = made.lengths().tolist()
    tokens, own = made["token"].split(sizes), made["behavior_logp"].split(sizes)
    whole = Episodes.build(
        [torch.cat([torch.tensor(w, dtype=torch.long), t]) for w, t in zip(first, tokens, strict=True)], contexts,
        made.index("group", "episode").tolist(),
    )  # fmt: skip
    behavior = torch.cat([torch.cat([x.to(y), y]) for x, y in zip(logp, own, strict=True)])
    generated = torch.cat([torch.arange(len(w) + n) >= len(w) for w, n in zip(first, sizes, strict=True)])
    whole = whole.with_columns("step", behavior_logp=behavior, generated=generated)
    return whole.with_columns("episode", **{n: c for n, c in made.columns.items() if c.level == "episode"})
