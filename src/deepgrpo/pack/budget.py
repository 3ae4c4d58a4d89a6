"""Rows → micro-batches under a token budget. Shapes: B rows of a micro-batch, T its longest row, n its terms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from deepgrpo.pack.layout import Row, Segment


@dataclass(frozen=True, slots=True)
class Pack:
    """Input of one forward pass."""

    input_ids_BT: np.ndarray
    """int64, right-padded with 0."""
    rows_n: np.ndarray
    """Positions in the flattened `[B * T]` input whose output predicts a term."""
    terms_n: np.ndarray
    """Indices into `Terms`."""
    num_tokens: int
    """Tokens without padding."""
    positions_BT: np.ndarray | None = None
    """Position of each token along its path; absent: 0, 1, 2, ... in every row."""
    segments: tuple[Segment, ...] = ()
    """Tree packs: visibility among tokens (pack/tree.py). Empty: each row is one path."""


def pack_rows(rows: Sequence[Row], tokens_per_pack: int) -> list[Pack]:
    """Sort rows by length and fill micro-batches of at most `tokens_per_pack` tokens, padding included.

    A row longer than the budget gets a micro-batch of its own, as it cannot be split.
    """
    packs: list[Pack] = []
    batch: list[Row] = []
    for row in sorted(rows, key=lambda row: len(row.input_ids)):  # stable: equal lengths keep their order
        if batch and (len(batch) + 1) * len(row.input_ids) > tokens_per_pack:
            packs.append(_stack(batch))
            batch = []
        batch.append(row)
    return [*packs, _stack(batch)] if batch else packs


def _stack(rows: Sequence[Row]) -> Pack:
    width = max(len(row.input_ids) for row in rows)
    input_ids_BT = np.zeros((len(rows), width), dtype=np.int64)
    for i, row in enumerate(rows):
        input_ids_BT[i, : len(row.input_ids)] = row.input_ids
    return Pack(
        input_ids_BT,
        np.concatenate([i * width + row.positions for i, row in enumerate(rows)]),
        np.concatenate([row.terms for row in rows]),
        sum(len(row.input_ids) for row in rows),
    )
