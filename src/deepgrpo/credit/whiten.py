"""Whitening of advantages over the tokens of a stream."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from deepgrpo.records import Credit, Tree


def whiten(trees: Sequence[Tree], credits: Sequence[Credit]) -> list[Credit]:
    """Shift and scale advantages to mean 0 and variance 1 over all tokens of each stream in the step.

    `A' = (A - mean) / (std + 1e-8)`, each span weighted by its sampled tokens. A stream whose advantages are all equal stays
    unchanged. The reference code has this switch, off in all of its scripts (docs/details.md 26).
    """
    scaling: dict[str, tuple[float, float]] = {}
    for stream in ("main", "branch"):
        found = [(tree, s) for tree, credit in zip(trees, credits, strict=True) for s in credit.spans if s.stream == stream]
        if not found:
            continue
        values = np.array([s.advantage for _, s in found])
        tokens = np.array([len(tree.nodes[s.node].sampled_places(s.start, s.end)) for tree, s in found], dtype=np.float64)
        mean = float(np.average(values, weights=tokens))
        std = float(np.sqrt(np.average((values - mean) ** 2, weights=tokens)))
        scaling[stream] = (mean, std) if std > 1e-8 else (0.0, 1.0)
    return [
        replace(
            credit,
            spans=tuple(
                replace(s, advantage=(s.advantage - scaling[s.stream][0]) / (scaling[s.stream][1] + 1e-8))
                for s in credit.spans
            ),
        )
        for credit in credits
    ]
