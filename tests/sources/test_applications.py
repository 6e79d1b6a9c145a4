"""Documents as prompts, and fixed rows that are drawn more often than there are."""

from __future__ import annotations

import pytest
import torch

from unipo.episodes import Episodes
from unipo.sources.data.corpus import WINDOW, corpus_prompts
from unipo.sources.rows import Rows

TEXT = "The first is here. The second is there. Short. The fourth is near. The fifth is last."


def test_prompts_of_a_document_by_hand() -> None:
    made = corpus_prompts([TEXT])
    assert [(p.columns["task"], p.columns["answer"]) for p in made] == [
        ("asr", "The second is there."), ("msr", "The second is there."),
        ("asr", "The fourth is near."), ("msr", "The fourth is near.")]  # fmt: skip
    asr, msr = made[:2]
    assert asr.text == "The first is here.\n\nThe next sentence:\n"
    assert msr.text == "The first is here. [...] Short.\n\nThe sentence in the place of [...]:\n"
    assert asr.columns["reference"] == "The second is there. Short. The fourth is near."
    assert asr.demonstration == "The second is there."
    assert "second" not in asr.text + msr.text
    assert len({p.id for p in made}) == 4


def test_prompts_of_one_document_share_its_number_and_see_a_window() -> None:
    long = " ".join(f"Sentence number {i}." for i in range(20))
    made = corpus_prompts([TEXT, long])
    assert len({p.columns["document"] for p in made}) == 2
    last = made[-2].text
    assert last.count("Sentence number") == WINDOW
    assert "Sentence number 17." in last
    assert not corpus_prompts(["One sentence.", "Two. Three."])


@pytest.mark.parametrize("n", [1, 2, 3])
def test_few_rows_are_drawn_again_as_groups_of_their_own(n: int) -> None:
    """Where an epoch ends with the row that the next begins with, they stay two groups."""
    rows = Rows(Episodes.build([[i] for i in range(n)], prompt_id=list(range(n))), 16, seed=0)
    for step in range(3):
        made = rows.draw(step, 0)
        assert made.count("group") == 16
        assert made["draw"].tolist() == list(range(16 * step, 16 * step + 16))
        assert torch.bincount(made["prompt_id"], minlength=n).min() >= 16 // n - 1
