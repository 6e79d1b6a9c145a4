"""Documents of plain text as prompts: write the next segment, or the one that is hidden (`unipo.tasks.corpus`)."""

from __future__ import annotations

from collections.abc import Iterable

from unipo.sources.prompts import Prompt, prompt_identity
from unipo.tasks.corpus import hidden_segments, segments

SHORTEST = 8
"""Characters that a segment must have to be asked for: shorter ones say too little."""
WINDOW = 8
"""Segments that are shown before the one that is asked for, at most."""
WORDING = {
    "asr": "{before}\n\nThe next sentence:\n",
    "msr": "{before} [...] {after}\n\nThe sentence in the place of [...]:\n",
}


def corpus_prompts(documents: Iterable[str]) -> list[Prompt]:
    """Both tasks about every segment of every document that has a neighbour on either side, ASR and MSR in turn.

    Columns: `task` (asr or msr), `answer` (the segment), `reference` (it and the segments behind it), `document` (a number
    that prompts of one text share, by which they are divided into train and held-out).
    """
    found = []
    for text in documents:
        document = prompt_identity(text)
        for hidden in hidden_segments(segments(text), SHORTEST, window=WINDOW):
            asked = WORDING[hidden.task].format(before=hidden.before, after=hidden.after)
            columns = {
                "task": hidden.task,
                "answer": hidden.target,
                "reference": hidden.reference,
                "document": document,
            }
            found.append(Prompt(id=prompt_identity(asked), text=asked, columns=columns, demonstration=hidden.target))
    return found
