"""Trees of segments: every answer is used along its whole length, and siblings share the prefix that they are compared behind."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from unipo.episodes import Episodes
from unipo.objectives import Scale, Standardised
from unipo.sources.keyed import keyed_generator
from unipo.sources.stages.augment import Augment, Drawn
from unipo.sources.stages.branching import ADVANTAGE, Prefix, contexts_of, continued

KEPT = "edges"
"""The name under which unused edges are remembered."""
Tokens = tuple[int, ...]
Logp = tuple[float, ...]
Node = tuple[int, int]
"""(path, level): the state of a path before its segment of that level; a root is (-1 - group, 0)."""


@dataclass(frozen=True, slots=True)
class Path:
    """A whole answer of a tree, which left the path `parent` behind `level` segments (the first ones: -1 - group, 0)."""

    group: int
    tokens: Tokens
    logp: Logp
    reward: float
    truncated: bool
    parent: int
    level: int = 0

    def reaches(self, level: int, size: int) -> bool:
        """Whether it has a segment of its own at this level."""
        return level >= self.level and len(self.tokens) > level * size


@dataclass(frozen=True)
class SegmentTree(Augment):
    """Each group becomes the edges of a tree: segments of `tokens` tokens, those of the last level to the end of the answer.

    A node has as many children as `branching` says for its level; the group itself is the first level's. A leaf is worth
    its reward, any other node the mean of its children. An edge is a row: its segment behind its prefix, with the value of
    the child as reward and A = V(child) - V(parent), over `scale` of the siblings. Edges with A = 0 are discarded. Of the
    others a random `most` of each prompt are used, and `batch` times as many as there are groups in all; what is left
    may be used later, until it is `keep` steps old.
    """

    filtered: ClassVar[bool] = True
    columns: ClassVar[frozenset[str]] = frozenset({ADVANTAGE})

    branching: tuple[int, ...] = (6, 6, 6)
    tokens: int = 30
    scale: Scale = Scale()
    most: int = 32
    batch: int = 64
    keep: int = 8

    def __call__(self, groups: Episodes, drawn: Drawn) -> Episodes:
        edges = self.edges(groups, drawn)
        old = drawn.source.kept.pop(KEPT, None)
        live = edges.select(edges["advantage"] != 0)
        pool = Episodes.cat([live] if old is None else [old.select(drawn.step - old["begun"] < self.keep), live])
        if not len(pool):
            return self._rows(edges)
        used = self._used(pool, drawn, groups.count("group"))
        if not bool(used.all()):
            drawn.source.kept[KEPT] = pool.select(~used)
        return self._rows(pool.select(used))

    def edges(self, groups: Episodes, drawn: Drawn) -> Episodes:
        """All edges of the groups' trees, siblings in a group."""
        context, prompt_id = contexts_of(groups), groups["prompt_id"].tolist()
        first = (groups.lengths("group", "episode").cumsum(0) - groups.lengths("group", "episode")).tolist()
        paths = self._grown(groups, [(prompt_id[i], context[i], ()) for i in first], drawn)
        found = self._valued(paths)
        rows = [(paths[i], level) for _, i, level, _ in found]
        inner = [self._inner(path, level) for path, level in rows]
        spans = [slice(level * self.tokens, (level + 1) * self.tokens if more else None)
                 for (_, level), more in zip(rows, inner, strict=True)]  # fmt: skip
        nodes = {node: number for number, node in enumerate(dict.fromkeys(node for node, _, _, _ in found))}
        made = Episodes.build(
            [p.tokens[s] for (p, _), s in zip(rows, spans, strict=True)],
            [[*context[first[p.group]], *p.tokens[: s.start]] for (p, _), s in zip(rows, spans, strict=True)],
            [nodes[node] for node, _, _, _ in found],
            behavior_logp=[p.logp[s] for (p, _), s in zip(rows, spans, strict=True)],
            kind=["rollout"] * len(rows), prompt_id=[prompt_id[first[p.group]] for p, _ in rows],
            truncated=[p.truncated and not more for (p, _), more in zip(rows, inner, strict=True)],
            policy_version=[drawn.version] * len(rows), begun=[drawn.step] * len(rows),
        )  # fmt: skip
        value = torch.tensor([v for _, _, _, v in found], dtype=torch.float64)
        made = made.with_columns("episode", reward=value, **_categories(groups, [first[p.group] for p, _ in rows]))
        return made.with_columns("episode", advantage=Standardised(scale=self.scale)(made, {}))

    def _grown(self, groups: Episodes, roots: list[Prefix], drawn: Drawn) -> list[Path]:
        """The paths of all trees: the groups' answers, and further ones behind their inner nodes."""
        group = groups.index("group", "episode").tolist()
        paths = _paths(groups, [((), ())] * len(groups), group, [-1 - g for g in group], 0)
        for level, children in enumerate(self.branching[1:], 1):
            nodes = [i for i, path in enumerate(paths) if path.reaches(level, self.tokens)]
            if not nodes or children < 2:
                continue
            written = [paths[i].tokens[: level * self.tokens] for i in nodes]
            prefixes = [(*roots[paths[i].group][:2], w) for i, w in zip(nodes, written, strict=True)]
            made = continued(prefixes, drawn, children - 1, f"tree {level}")
            parents = [nodes[b] for b in made["branch"].tolist()]
            before = [(paths[i].tokens[: level * self.tokens], paths[i].logp[: level * self.tokens]) for i in parents]
            paths = [*paths, *_paths(made, before, [paths[i].group for i in parents], parents, level)]
        return paths

    def _inner(self, path: Path, level: int) -> bool:
        """Whether the segment of this level leads to a node with children."""
        return level + 1 < len(self.branching) and len(path.tokens) > (level + 1) * self.tokens

    def _valued(self, paths: list[Path]) -> list[tuple[Node, int, int, float]]:
        """(parent node, path, level, value of the child) of every edge, the deepest first, siblings side by side."""
        children: dict[Node, list[tuple[int, int, float]]] = defaultdict(list)
        for level in reversed(range(len(self.branching))):
            for i, path in enumerate(paths):
                if path.reaches(level, self.tokens):
                    below = (
                        [value for _, _, value in children[i, level + 1]] if self._inner(path, level) else [path.reward]
                    )
                    node = (path.parent if level == path.level else i, level)
                    children[node].append((i, level, sum(below) / len(below)))
        return [(node, *edge) for node, edges in children.items() for edge in edges]

    def _used(self, pool: Episodes, drawn: Drawn, groups: int) -> Tensor:
        """[E] bool: the edges of this step."""
        order = keyed_generator(drawn.seed, "edges", drawn.step).permutation(len(pool))
        taken, seen = list[int](), defaultdict[int, int](int)
        prompts = pool["prompt_id"].tolist()
        for i in order.tolist():
            if seen[prompts[i]] < self.most and len(taken) < self.batch * groups:
                taken.append(i)
                seen[prompts[i]] += 1
        return torch.zeros(len(pool), dtype=torch.bool).index_put((torch.tensor(taken),), torch.tensor(True))

    @staticmethod
    def _rows(edges: Episodes) -> Episodes:
        """The edges of a prompt as a group, with the advantage of each step."""
        made = edges.with_columns("step", **{ADVANTAGE: edges.expand("advantage")}).without("advantage", "begun")
        return made.grouped(made["prompt_id"])


def _paths(rows: Episodes, before: Sequence[tuple[Tokens, Logp]], groups: Sequence[int], parents: Sequence[int],
           level: int) -> list[Path]:  # fmt: skip
    """The answers of `rows`, each with the tokens and log-probs that it stands behind."""
    sizes = rows.lengths().tolist()
    tokens, logp = (rows[name].split(sizes) for name in ("token", "behavior_logp"))
    facts = zip(rows["reward"].tolist(), rows["truncated"].tolist(), groups, parents, strict=True)
    return [
        Path(group, (*head[0], *t.tolist()), (*head[1], *x.tolist()), reward, cut, parent, level)
        for head, t, x, (reward, cut, group, parent) in zip(before, tokens, logp, facts, strict=True)
    ]


def _categories(groups: Episodes, rows: list[int]) -> dict[str, list[str]]:
    """The categories of the groups' answers `rows`, kind apart."""
    return {
        name: [column.names[int(column.values[i])] for i in rows]
        for name, column in groups.columns.items()
        if column.level == "episode" and column.names and name != "kind"
    }
