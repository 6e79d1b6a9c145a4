"""Where every token of a batch is computed: no padding, and a prompt that several episodes share only once.

A batch becomes one row of T tokens, made of *runs*. A run is the beginning of sequences (a shared prompt, or a whole
sequence that shares nothing) or what follows a shared prompt. A token attends to what is before it in its own run and,
behind a shared prompt, to the whole of that prompt::

    prompts  [5 6 7]          episode 0 = 5 6 7 | 1 2        row        5 6 7  8 9  1 2  3 3
             [8 9]            episode 1 = 5 6 7 | 3 3        position   0 1 2  0 1  3 4  3 4
                              episode 2 = 8 9                runs       `---'  `-'  `-'  `-'

Runs of equal length lie side by side, so that attention takes them together as a view, without copies or padding. The
last token of a sequence is no input: nothing is predicted from it.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from unipo.episodes import Episodes, offsets_of, ranges

SHARED_TOKENS = 4
"""A prompt is shared where that saves this many tokens for each run behind it: attention in two parts is not free."""


@dataclass(frozen=True, slots=True)
class Block:
    """`count` runs of `length` tokens each, one after the other from `start` in the row."""

    start: int
    count: int
    length: int

    @property
    def stop(self) -> int:
        return self.start + self.count * self.length


@dataclass(frozen=True, slots=True)
class Tail:
    """The tokens [start, stop) of the row: all runs behind the prompt [first, last)."""

    first: int
    last: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Layout:
    """`tokens`, `positions` [T]; `scored` [N]: the place in the row whose hidden state produced each action.

    `blocks` hold every run once; `tails` what lies behind each shared prompt; `longest` is the longest sequence.
    """

    tokens: Tensor
    positions: Tensor
    scored: Tensor
    blocks: tuple[Block, ...]
    tails: tuple[Tail, ...]
    longest: int


@dataclass(frozen=True, slots=True)
class Sequences:
    """Whole token sequences, one per episode: `tokens` [S] with `bounds` [E + 1], and which of them are actions [S].

    `prompt` [E]: tokens before the first action.
    """

    tokens: Tensor
    bounds: Tensor
    action: Tensor
    prompt: Tensor

    def shared(self) -> tuple[Tensor, Tensor]:
        """([E] the first acting episode with the same prompt, [E] bool whether that prompt is computed once for several).

        An episode that shares nothing, or has no actions, is its own first.
        """
        sizes, starts, prompts = self.bounds.diff().tolist(), self.bounds.tolist(), self.prompt.tolist()
        host, members = self.tokens.cpu().numpy(), dict[bytes, list[int]]()
        for e, (start, prompt) in enumerate(zip(starts[:-1], prompts, strict=True)):
            if sizes[e] > prompt:
                members.setdefault(host[start : start + prompt].tobytes(), []).append(e)
        first, pays = list(range(len(sizes))), [False] * len(sizes)
        for rows in members.values():
            if prompts[rows[0]] * (len(rows) - 1) >= SHARED_TOKENS * len(rows):
                for e in rows:
                    first[e], pays[e] = rows[0], True
        device = self.tokens.device
        return torch.tensor(first, device=device), torch.tensor(pays, dtype=torch.bool, device=device)

    def computed(self, sharing: bool = True) -> Tensor:
        """[E]: tokens computed for each episode; those of a shared prompt count for its first episode."""
        inputs = torch.where(self.bounds.diff() > self.prompt, self.bounds.diff() - 1, 0)
        if not sharing:
            return inputs
        first, pays = self.shared()
        later = pays & (first != torch.arange(len(first), device=first.device))
        return torch.where(later, inputs - self.prompt, inputs)


def sequences(episodes: Episodes, context: str) -> Sequences:
    """Each turn its context and then its actions."""
    column = episodes.context(context)
    assert column.offsets is not None
    before, acted = column.offsets.diff(), episodes.lengths("turn")
    starts = offsets_of(torch.stack([before, acted], 1).reshape(-1))
    tokens = episodes["token"].new_zeros(int(starts[-1]))
    action = torch.zeros_like(tokens, dtype=torch.bool)
    starts = starts[:-1].reshape(-1, 2)
    tokens[ranges(starts[:, 0], before)] = column.values
    where = ranges(starts[:, 1], acted)
    tokens[where], action[where] = episodes["token"], True
    bounds = offsets_of(episodes.reduce(before + acted, level="turn"))
    return Sequences(tokens, bounds, action, _before_acting(action, bounds))


def read_through(episodes: Episodes) -> tuple[Episodes, Tensor]:
    """The episodes with one more step each, so that all their actions are inputs; and at which steps of these [N] a hidden
    state has just read the actions. The last action is there twice: what it is as the last token does not matter."""
    lengths = episodes.lengths()
    last = (lengths.cumsum(0) - 1)[lengths > 0]
    steps = torch.cat([torch.arange(episodes.count("step"), device=last.device), last]).sort().values
    longer = episodes.select(steps, "step")
    return longer, (longer.position() > 0).nonzero().squeeze(1)


def _before_acting(action: Tensor, bounds: Tensor) -> Tensor:
    """[E]: tokens before the first action; all of them where there is none."""
    acted = offsets_of(action.long())
    until = torch.searchsorted(acted, acted[bounds[:-1]], right=True) - 1
    return torch.minimum(until, bounds[1:]) - bounds[:-1]


def probe_of(words: int) -> Sequences:
    """Three short sequences behind one prompt and one alone, with 3, 3, 1 and 4 actions."""
    ids = [[(7 * i + j) % words for j in range(6)] for i in range(4)]
    return sequences(Episodes.build([ids[1][:3], ids[2][:3], ids[0][:1], ids[3][:4]], [ids[0]] * 3 + [ids[3]]), "score")


def layout(found: Sequences) -> Layout:
    """The row of a batch; longest runs first among prompts and behind each prompt."""
    first, pays = found.shared()
    inputs = torch.where(found.bounds.diff() > found.prompt, found.bounds.diff() - 1, 0)
    head = torch.where(pays, found.prompt, inputs)
    own = torch.arange(len(first), device=first.device)
    heads = _longest_first(head, (first == own) & (head > 0))
    behind = inputs - head
    tails = [_longest_first(behind, (first == e) & (behind > 0)) for e in heads[pays[heads]].tolist()]
    rest = torch.cat(tails) if tails else heads[:0]
    starts, counts = offsets_of(torch.cat([head[heads], behind[rest]])), torch.cat([head[heads], behind[rest]])
    at_head, at_rest = torch.zeros_like(head), torch.zeros_like(head)
    at_head[heads], at_rest[rest] = starts[:-1][: len(heads)], starts[:-1][len(heads) :]
    source = torch.cat([found.bounds[heads], (found.bounds[:-1] + head)[rest]])
    offset = torch.cat([torch.zeros_like(heads), head[rest]])
    where = found.action.nonzero().squeeze(1)
    episode = torch.searchsorted(found.bounds, where, right=True) - 1
    place = where - found.bounds[episode] - 1
    scored = torch.where(place < head[episode], at_head[first[episode]] + place,
                         at_rest[episode] + place - head[episode])  # fmt: skip
    parts = [counts[: len(heads)].tolist(), *(behind[t].tolist() for t in tails)]
    return Layout(found.tokens[ranges(source, counts)], ranges(offset, counts), scored, _blocks(parts),
                  _tails(heads[pays[heads]], head, at_head, tails, behind, int(head[heads].sum())),
                  int(inputs.max()) if len(inputs) else 0)  # fmt: skip


def _longest_first(length: Tensor, chosen: Tensor) -> Tensor:
    rows = chosen.nonzero().squeeze(1)
    return rows[torch.argsort(length[rows], descending=True, stable=True)]


def _blocks(parts: list[list[int]]) -> tuple[Block, ...]:
    found, start = [], 0
    for lengths in parts:
        for length, same in groupby(lengths):
            found.append(Block(start, len(list(same)), length))
            start = found[-1].stop
    return tuple(found)


def _tails(
    owners: Tensor, head: Tensor, at_head: Tensor, tails: list[Tensor], behind: Tensor, start: int
) -> tuple[Tail, ...]:
    found = []
    for owner, rows in zip(owners.tolist(), tails, strict=True):
        stop = start + int(behind[rows].sum())
        if stop > start:
            found.append(Tail(int(at_head[owner]), int(at_head[owner] + head[owner]), start, stop))
        start = stop
    return tuple(found)
