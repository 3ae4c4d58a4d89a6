"""Packs of trees for other trainers: a shared prefix is in a pack once, and a mask says which tokens see which."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from deepgrpo.pack.budget import Pack, pack_rows
from deepgrpo.pack.layout import Terms, lay_out
from deepgrpo.pack.tree import pack_trees as pack_layout
from deepgrpo.records import Credit, Tree


@dataclass(frozen=True, slots=True)
class Packed:
    """The trained tokens of a step, and the packs in which a model reads them.

    For each pack: run the model on `input_ids_BT` with `positions_BT` and `tree_mask(pack)`; the flattened output at `rows_n`
    predicts the tokens `terms.target_N[terms_n]`.
    """

    terms: Terms
    packs: tuple[Pack, ...]


def pack_trees(
    trees: Sequence[Tree], credits: Sequence[Credit], *, tokens_per_pack: int = 8192, share_prefixes: bool = True
) -> Packed:
    """Pack trees with their credit: one term per trained token.

    Args:
        credits: one per tree, such as `sibling_credit(tree)`; a branch trains its own tokens, never its prefix.
        tokens_per_pack: most tokens of a pack; a longer path gets one of its own.
        share_prefixes: packs of trees, each token once, which need `tree_mask`. False: padded rows, one per trained node, which
            any causal model reads as they are.
    """
    layout = lay_out(trees, credits)
    packs = pack_layout(trees, layout, tokens_per_pack) if share_prefixes else pack_rows(layout.rows, tokens_per_pack)
    return Packed(layout.terms, tuple(packs))


def tree_mask(pack: Pack) -> np.ndarray:
    """Mask `[S, S]` of a pack of trees: True where token j is visible to token i, an ancestor or i itself.

    As `attention_mask` of a model of transformers: `torch.from_numpy(tree_mask(pack))[None, None]`, with
    `position_ids = pack.positions_BT`.
    """
    if not pack.segments:
        raise ValueError("this pack has rows of paths and no trees: causal attention is all that it needs")
    size = pack.input_ids_BT.shape[1]
    until = np.concatenate([np.full(segment.end - segment.start, segment.until) for segment in pack.segments])
    token = np.arange(size)
    mask: np.ndarray = (token[None, :] <= token[:, None]) & (token[:, None] < until[None, :])
    return mask
