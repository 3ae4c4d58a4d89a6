"""Trees → loss terms and rows.

`Terms` is the step as the loss sees it: one entry per trained token, whatever the layout. A `Row` is one path as the
model reads it: the prefix, then the trained tokens. A prefix token never has a term, so a branch cannot train it; nor has a
token that an environment wrote, whatever span of credit it is in.
Shapes: N terms of the step.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from deepgrpo.records import Credit, Tree

STREAM_CODES = {"main": 0, "branch": 1}


@dataclass(frozen=True, slots=True)
class Terms:
    """One entry per trained token. Example: node 2 of records.py (2 tokens) gives two terms of stream 1."""

    target_N: np.ndarray
    """int64; predicted token ids."""
    advantage_N: np.ndarray
    """float32."""
    stream_N: np.ndarray
    """int64; 0 main, 1 branch."""
    sequence_N: np.ndarray
    """int64; terms of one node share a number."""
    sampler_logprob_N: np.ndarray
    """float32; log-probs as the engine reported them."""

    def __len__(self) -> int:
        return len(self.target_N)


@dataclass(frozen=True, slots=True)
class Row:
    """One path through a tree: prefix and trained tokens.

    Example: node 2 of records.py gives 9 input ids; its two terms are predicted at positions 6 and 7.
    """

    input_ids: np.ndarray
    """`[T]` int64. Includes the last token, although it predicts nothing."""
    positions: np.ndarray
    """`[n]` positions in `input_ids` whose output predicts a term."""
    terms: np.ndarray
    """`[n]` indices into `Terms`."""
    tree: int = 0
    """Index of its tree in the step."""
    node: int = 0
    """Index of its node in the tree."""


@dataclass(frozen=True, slots=True)
class Segment:
    """Packed tokens [start, end) of one piece of a path; its descendants are [end, until).

    Example, A of the picture in pack/tree.py: Segment(start=3, end=7, until=14, parent=0, depth=3).
    """

    start: int
    end: int
    until: int
    parent: int
    """Index of the parent segment, or -1."""
    depth: int
    """Position of the first token along the path."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Terms and rows of an optimizer step."""

    terms: Terms
    rows: tuple[Row, ...]
    unique_tokens: int
    """Distinct tokens of the rows: the prompt once per tree, each node's own tokens once."""


def lay_out(trees: Sequence[Tree], credits: Sequence[Credit]) -> Layout:
    """One row per node that has credit, in the order of trees and nodes.

    Spans of one node share a row. Deterministic.
    """
    rows: list[Row] = []
    columns: list[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]] = []
    total = sequence = unique = 0
    for number, (tree, credit) in enumerate(zip(trees, credits, strict=True)):
        spans_of: dict[int, list[tuple[int, int, float, str]]] = {}
        for span in credit.spans:
            spans_of.setdefault(span.node, []).append((span.start, span.end, span.advantage, span.stream))
        unique += sum(reach(tree, spans_of).values()) + (len(tree.prompt.tokens) if spans_of else 0)
        for node, spans in sorted(spans_of.items()):
            tokens = np.array(tree.nodes[node].tokens, dtype=np.int64)
            logprobs = np.array(tree.nodes[node].logprobs, dtype=np.float32)
            path = np.array(tree.path(node), dtype=np.int64)
            first = len(path) - len(tokens)
            positions: list[np.ndarray] = []
            begin = total
            for start, end, advantage, stream in spans:
                own = np.array(tree.nodes[node].sampled_places(start, end), dtype=np.int64)
                count = len(own)
                columns.append(
                    (
                        tokens[own],
                        np.full(count, advantage, dtype=np.float32),
                        np.full(count, STREAM_CODES[stream]),
                        np.full(count, sequence),
                        logprobs[own],
                    )
                )
                positions.append(first + own - 1)
                total += count
            if total == begin:
                continue  # all of it was given
            rows.append(Row(path, np.concatenate(positions), np.arange(begin, total), number, node))
            sequence += 1
    empty = (np.int64, np.float32, np.int64, np.int64, np.float32)
    joined = [np.concatenate([c[i] for c in columns]) if columns else np.zeros(0, d) for i, d in enumerate(empty)]
    return Layout(Terms(*joined), tuple(rows), unique)


def reach(tree: Tree, nodes: Iterable[int]) -> dict[int, int]:
    """Node → number of its own tokens on the paths to `nodes`."""
    found: dict[int, int] = {}
    for node in nodes:
        for index, _, end in tree.spans(node):
            found[index] = max(found.get(index, 0), end)
    return found
