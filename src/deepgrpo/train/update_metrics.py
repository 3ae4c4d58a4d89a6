"""Figures of an update: collected per term, pack by pack, and reduced to metrics. Shapes: N terms of an optimizer step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from deepgrpo.loss.streams import BRANCH, MAIN
from deepgrpo.pack.layout import Terms
from deepgrpo.records import Credit
from deepgrpo.train.ranks import Ranks

COLUMNS = ("loss", "entropy", "clipped", "kl", "weight", "drift")
"""Figures of every term: policy loss (importance weight included), entropy, whether a bound acted, KL to the reference,
importance weight, drift (`log π_old - log μ`, the learner's old log-prob minus the sampler's)."""


@dataclass
class Observed:
    """Figures of the terms of one optimizer step; each column is float32 `[N]` on the CPU."""

    stream: np.ndarray
    columns: dict[str, Tensor]

    @classmethod
    def empty(cls, terms: Terms, figures: Sequence[str] = ()) -> Observed:
        """All zero.

        Args:
            figures: names of the policy loss's own figures.
        """
        names = [*COLUMNS, *map(figure_column, figures)]
        return cls(terms.stream_N, {name: torch.zeros(len(terms)) for name in names})

    def note(self, terms_n: Tensor, **values: Tensor) -> None:
        """Set columns at the terms of a pack."""
        for name, values_n in values.items():
            self.columns[name][terms_n] = values_n.detach().float().cpu()

    def gather(self, ranks: Ranks) -> None:
        """Sum the figures over processes. Each term is nonzero in one process only."""
        summed = ranks.add(torch.stack(list(self.columns.values())))
        self.columns = dict(zip(self.columns, summed, strict=True))


def figure_column(name: str) -> str:
    """Column of a figure that a policy loss names itself."""
    return f"figure/{name}"


def summarise(seen: Sequence[Observed], *, reference: bool, importance: bool, masks: bool = False) -> dict[str, float]:
    """Means over the terms of each stream, over all optimizer steps of an update.

    Args:
        reference: a KL was computed; otherwise there is no metric of it, as unmeasured must not look like none.
        importance: importance weights were applied.
        masks: a weight of 0 means that the token was masked.
    """
    metrics: dict[str, float] = {}
    if not seen:
        return metrics
    stream = np.concatenate([o.stream for o in seen])
    columns: dict[str, np.ndarray] = {name: torch.cat([o.columns[name] for o in seen]).numpy() for name in seen[0].columns}
    for label, code in (("main", MAIN), ("branch", BRANCH)):
        here = stream == code
        metrics[f"{label}/terms"] = float(here.sum())
        if here.any():
            metrics |= {
                f"{label}/loss": float(columns["loss"][here].mean()),
                f"{label}/entropy": float(columns["entropy"][here].mean()),
                f"{label}/clip_fraction": float(columns["clipped"][here].mean()),
            }
            if reference:
                metrics[f"{label}/kl"] = float(columns["kl"][here].mean())
            own = [name for name in columns if name not in COLUMNS]
            metrics |= {f"{label}/{name}": float(columns[name][here].mean()) for name in own}
    drift, weight = columns["drift"].astype(np.float64), columns["weight"]
    metrics |= {
        "mismatch/kl": sampler_kl(drift),
        "mismatch/max": float(np.abs(drift).max()),
        "mismatch/weight": float(weight.mean()) if importance else 1.0,
    }
    if masks:
        metrics["mismatch/masked"] = float((weight == 0).mean())
    return metrics


def sampler_kl(drift_N: np.ndarray) -> float:
    """KL(μ || π) of sampler and learner, in nats per token: the mean of k3, `exp(d) - 1 - d` with d = log π - log μ.

    Never negative; unbiased for tokens drawn from μ. Example: d = log 2 and 0 give (1 - log 2) / 2 = 0.1534.
    """
    return float((np.expm1(drift_N) - drift_N).mean())


def count_sequences(credits: Sequence[Credit], stream: str) -> int:
    """Nodes with credit in a stream."""
    return len({(i, s.node) for i, credit in enumerate(credits) for s in credit.spans if s.stream == stream})
