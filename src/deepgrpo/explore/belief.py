"""Belief: resample each failed rollout from the state before the policy lost faith in the right answer.

    B(t)   probability of the reference answer at state t, measured by the policy itself (train/belief.py)
    D(t)   = B(t) - B(t')     t': the next candidate's state; for the last one B is 0, because the rollout failed
    Q(t)   ∝ exp(D(t) / temperature)

A drop says that the segment behind t turned the policy away from the right answer, so the state before it is worth another
try. The drops of a rollout add up to B at its first candidate. The probability at step ends as a source of credit is
GRPO-VPS's (arXiv:2604.20659); that the pivot lies before its largest drop is our inference. Candidates, expanded rollouts,
branches and credit are those of `deep`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from deepgrpo.config import BeliefExplore
from deepgrpo.explore.base import BELIEF, Signal, State
from deepgrpo.explore.pivots import PivotStrategy
from deepgrpo.records import Node, Tree


@dataclass(frozen=True)
class BeliefStrategy(PivotStrategy[BeliefExplore]):
    @property
    def signals(self) -> frozenset[Signal]:  # type: ignore[override]
        config = self.config
        most = config.success_threshold if config.expand != "all" else float("inf")
        return frozenset(
            {
                Signal(
                    BELIEF, self.segment, cue=config.cue, closing=config.closing, most_reward=most,
                    unsolved=config.expand == "unsolved",
                )
            }
        )  # fmt: skip

    def initial_state(self) -> State:
        return {"first": 0.0, "drop": 0.0}

    def log_q(self, node: Node, offsets: Sequence[int], ratios: Sequence[float], state: State) -> np.ndarray:
        return log_softmax(drops([node.signals[BELIEF][offset] for offset in offsets]) / self.config.temperature)

    def observe(self, state: State, trees: Sequence[Tree]) -> State:
        """Mean over the pivots of the step: B at their rollouts' first token, and D at the pivot."""
        first: list[float] = []
        drop: list[float] = []
        for tree in trees:
            for pivot in tree.pivots:
                if pivot.stream != "branch":
                    continue
                signal = tree.nodes[pivot.parent].signals[BELIEF]
                first.append(signal[0])
                drop.append(float(drops([signal[offset] for offset in pivot.candidates])[pivot.candidates.index(pivot.offset)]))
        return {"first": float(np.mean(first)), "drop": float(np.mean(drop))} if first else state

    def report(self, state: State) -> dict[str, float]:
        return {"belief/first": float(state["first"]), "belief/drop": float(state["drop"])}


def drops(beliefs: Sequence[float]) -> np.ndarray:
    """`[n]` beliefs at a rollout's candidates → `[n]` drops to the next one; behind the last the belief is 0.

    >>> drops([0.5, 0.75, 0.25]).tolist()
    [-0.25, 0.5, 0.25]
    """
    return -np.diff(np.append(np.asarray(beliefs, dtype=np.float64), 0.0))


def log_softmax(scores: np.ndarray) -> np.ndarray:
    """Normalise `[n]` scores to log-probabilities."""
    shifted: np.ndarray = scores - np.logaddexp.reduce(scores)
    return shifted
