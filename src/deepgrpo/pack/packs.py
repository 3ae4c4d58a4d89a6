"""Layout of a step → packs: trees where the model can be packed, rows of paths elsewhere."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from deepgrpo.pack.budget import Pack, pack_rows
from deepgrpo.pack.layout import Layout
from deepgrpo.pack.tree import pack_trees
from deepgrpo.records import Tree


def pack_layout(
    trees: Sequence[Tree], layout: Layout, tokens_per_pack: int, *, tree_packs: bool, window: int | None = None
) -> list[Pack]:
    """Packs of an optimizer step, under a token budget.

    Args:
        tree_packs: the model has proved that it can be packed.
        window: longest path that may be packed, the model's attention window; None: any.
    """
    longest = max((len(row.input_ids) for row in layout.rows), default=0)
    if tree_packs and (window is None or longest <= window):
        packs = pack_trees(trees, layout, tokens_per_pack)
    else:
        packs = pack_rows(layout.rows, tokens_per_pack)
    # a prefix may be in several packs, the terms of a node never are: its sequence ratio depends on it
    sequence_N = layout.terms.sequence_N
    parts = sum(len(np.unique(sequence_N[pack.terms_n])) for pack in packs)
    assert parts == len(np.unique(sequence_N)), "the terms of a node are in more than one pack"
    return packs
