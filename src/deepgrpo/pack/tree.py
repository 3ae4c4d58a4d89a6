"""Trees → packs of unique tokens: a shared prefix is forwarded once for all of its branches.

A pack is the depth-first list of the tokens of some trees, cut into segments wherever a node branches off:

    prompt ──┬── A [t0 t1 t2 t3] ──┬── A' [t4 t5]        rest of rollout 0
             │                     ├── C  [b0 b1]        branch
             │                     └── D  [b0 b1 b2]     branch
             └── B [t0 t1 t2 t3 t4]                      rollout 1

    tokens     p p p  A A A A  A' A'  C C  D D D  B B B B B
    positions  0 1 2  3 4 5 6  7  8   7 8  7 8 9  3 4 5 6 7       along each path, as for a row of its own
    segments   prompt [0, 3) until 19 · A [3, 7) until 14 · A' [7, 9) · C [9, 11) · D [11, 14) · B [14, 19)

A token sees its ancestors and itself. In depth-first order the descendants of a segment follow it without a gap, so "until"
suffices for attention (model/tree_attention.py). A node's first token is predicted from the last token before it, which may
be in another segment; one hidden row may predict several targets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from deepgrpo.pack.budget import Pack
from deepgrpo.pack.layout import Layout, Segment, reach
from deepgrpo.records import ROOT, Tree


@dataclass(frozen=True, slots=True)
class _Unit:
    """Nodes of one tree that stay together: a rollout with its descendants."""

    nodes: tuple[int, ...]
    tokens: int
    """Distinct tokens without the prompt."""


def pack_trees(trees: Sequence[Tree], layout: Layout, tokens_per_pack: int) -> list[Pack]:
    """Fill packs of at most `tokens_per_pack` tokens with whole rollouts and their branches.

    First-fit decreasing. The rollouts of a tree may be spread over several packs, and then only the prompt repeats; partly
    filled packs take rollouts of several trees. A rollout too large for a pack is split along its branches, and its prefix
    repeats. A single path longer than the budget gets a pack of its own, as it cannot be split.

    Args:
        layout: layout of the same trees; its rows name the nodes with terms.
    """
    rows_of: dict[int, dict[int, int]] = {}
    for number, row in enumerate(layout.rows):
        rows_of.setdefault(row.tree, {})[row.node] = number
    shares: list[tuple[int, int, tuple[int, ...]]] = []  # (tokens with the prompt, tree, nodes)
    for tree, rows in rows_of.items():
        prompt = len(trees[tree].prompt.tokens)
        bins: list[tuple[int, list[int]]] = []
        for unit in sorted(_units(trees[tree], list(rows), tokens_per_pack - prompt), key=lambda u: -u.tokens):
            for index, (used, nodes) in enumerate(bins):
                if used + unit.tokens <= tokens_per_pack:
                    bins[index] = (used + unit.tokens, [*nodes, *unit.nodes])
                    break
            else:
                bins.append((prompt + unit.tokens, list(unit.nodes)))
        shares += [(used, tree, tuple(sorted(nodes))) for used, nodes in bins]
    packs: list[tuple[int, list[tuple[int, tuple[int, ...]]]]] = []
    for used, tree, members in sorted(shares, key=lambda share: -share[0]):
        for index, (total, content) in enumerate(packs):
            if total + used <= tokens_per_pack:
                packs[index] = (total + used, [*content, (tree, members)])
                break
        else:
            packs.append((used, [(tree, members)]))
    return [_build(trees, layout, rows_of, content) for _, content in packs]


def _units(tree: Tree, nodes: Sequence[int], room: int) -> list[_Unit]:
    """Trained nodes of a tree by main rollout; a rollout larger than `room` is split into several units."""
    by_rollout: dict[int, list[int]] = {}
    for node in nodes:
        by_rollout.setdefault(tree.spans(node)[0][0], []).append(node)
    units: list[_Unit] = []
    for members in by_rollout.values():
        part: list[int] = []
        for node in members:
            if part and sum(reach(tree, [*part, node]).values()) > room:
                units.append(_Unit(tuple(part), sum(reach(tree, part).values())))
                part = []
            part.append(node)
        units.append(_Unit(tuple(part), sum(reach(tree, part).values())))
    return units


class _Builder:
    """Writes the tokens of one pack in depth-first order."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.positions: list[int] = []
        self.segments: list[Segment] = []
        self.place: dict[tuple[int, int], list[tuple[int, int]]] = {}
        """(tree, node) → [(first own token, packed index)] of its segments."""

    def add_tree(self, number: int, tree: Tree, nodes: Sequence[int]) -> None:
        self.number, self.tree, self.reach = number, tree, reach(tree, nodes)
        self.hanging: dict[tuple[int, int], list[int]] = {}
        for node in sorted(node for node, end in self.reach.items() if end):
            self.hanging.setdefault(_origin(tree, node), []).append(node)
        root = self._segment(ROOT, tree.prompt.tokens, 0, -1)
        for node in self.hanging.get((ROOT, 0), ()):
            self._node(node, 0, root)
        self._close(root)

    def _node(self, node: int, start: int, parent: int) -> None:
        """Write a node's own tokens from `start` to the next branching, then everything below."""
        reach = self.reach[node]
        cuts = [offset for (owner, offset) in self.hanging if owner == node and start < offset]
        end = min([*cuts, reach])
        segment = self._segment(node, self.tree.nodes[node].tokens[start:end], start, parent)
        if end < reach:
            self._node(node, end, segment)
        for child in self.hanging.get((node, end), ()):
            self._node(child, 0, segment)
        self._close(segment)

    def _segment(self, node: int, tokens: Sequence[int], start: int, parent: int) -> int:
        above = self.segments[parent] if parent >= 0 else None
        depth = above.depth + above.end - above.start if above else 0
        first = len(self.ids)
        self.place.setdefault((self.number, node), []).append((start, first))
        self.ids += tokens
        self.positions += range(depth, depth + len(tokens))
        self.segments.append(Segment(first, len(self.ids), len(self.ids), parent, depth))
        return len(self.segments) - 1

    def _close(self, segment: int) -> None:
        old = self.segments[segment]
        self.segments[segment] = Segment(old.start, old.end, len(self.ids), old.parent, old.depth)

    def packed(self, number: int, node: int, own: np.ndarray) -> np.ndarray:
        """Packed indices of own tokens of a node."""
        pieces = self.place[number, node]
        starts = np.array([start for start, _ in pieces])
        first = np.array([index for _, index in pieces])
        piece = np.searchsorted(starts, own, side="right") - 1
        packed: np.ndarray = first[piece] + own - starts[piece]
        return packed


def _build(
    trees: Sequence[Tree], layout: Layout, rows_of: dict[int, dict[int, int]],
    content: Sequence[tuple[int, tuple[int, ...]]],
) -> Pack:  # fmt: skip
    builder = _Builder()
    for number, nodes in content:
        builder.add_tree(number, trees[number], nodes)
    rows: list[np.ndarray] = []
    terms: list[np.ndarray] = []
    for number, nodes in content:
        tree = trees[number]
        for node in nodes:
            row = layout.rows[rows_of[number][node]]
            own = row.positions + 1 - (len(row.input_ids) - len(tree.nodes[node].tokens))  # own tokens with a term
            later = own > 0
            where = np.empty(len(own), dtype=np.int64)
            where[later] = builder.packed(number, node, own[later] - 1)
            if not later.all():
                where[~later] = _before(builder, number, tree, node)
            rows.append(where)
            terms.append(row.terms)
    return Pack(
        np.array([builder.ids], dtype=np.int64), np.concatenate(rows), np.concatenate(terms), len(builder.ids),
        positions_BT=np.array([builder.positions], dtype=np.int64), segments=tuple(builder.segments),
    )  # fmt: skip


def _origin(tree: Tree, node: int) -> tuple[int, int]:
    """Parent and offset of a node; a branch at the start of a node continues the text before that node."""
    parent, offset = tree.nodes[node].parent, tree.nodes[node].offset
    while parent != ROOT and offset == 0:
        parent, offset = tree.nodes[parent].parent, tree.nodes[parent].offset
    return parent, offset


def _before(builder: _Builder, number: int, tree: Tree, node: int) -> int:
    """Packed index of the token before a node's first."""
    parent, offset = _origin(tree, node)
    last = len(tree.prompt.tokens) if parent == ROOT else offset
    return int(builder.packed(number, parent, np.array([last - 1]))[0])
