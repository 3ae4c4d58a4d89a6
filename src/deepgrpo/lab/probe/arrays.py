"""A probe's samples as arrays: one row per failed rollout, one column per band of depth.

Shapes: N failed rollouts, S bands, M candidates of a rollout at most.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from deepgrpo.explore.deep import log_q
from deepgrpo.explore.recoverability import Recoverability
from deepgrpo.lab.probe.sampling import FailedRollout, band_of


class ProbeArrays:
    """Samples as arrays; column 0 is the prompt, columns 1..S are the bands."""

    def __init__(self, failed: Sequence[FailedRollout], bands: int, root_pivot: bool) -> None:
        shape = (len(failed), bands + 1)
        self.there = np.zeros(shape)
        self.mixed, self.tokens, self.trials = np.zeros(shape), np.zeros(shape), np.zeros(shape)
        self.successes, self.rescued = np.zeros(shape), np.zeros(shape)
        self.ratio, self.stands_for = np.ones(shape), np.zeros(shape)
        self.place = np.zeros(shape, dtype=int)
        """Index of the measured state among the rollout's candidates."""
        self.every_ratio = np.full((len(failed), max(len(each.ratios) for each in failed)), np.nan)
        """`[N, M]` depths of all candidates; nan pads short rows and marks a prompt that may not be a pivot."""
        self.every_band = np.zeros(self.every_ratio.shape, dtype=int)
        skip = 0 if root_pivot else 1
        for i, rollout in enumerate(failed):
            for state in rollout.states:
                at = (i, state.band)
                self.there[at], self.mixed[at], self.tokens[at] = 1, state.mixed, state.tokens
                self.successes[at], self.rescued[at] = state.successes, state.successes > 0
                self.trials[at], self.ratio[at] = len(state.rewards), state.ratio
                self.place[at] = np.argmin(np.abs(np.array(rollout.ratios) - state.ratio))
                self.stands_for[at] = 0 if state.band == 0 and not root_pivot else state.stands_for
            self.every_ratio[i, skip : len(rollout.ratios)] = rollout.ratios[skip:]
            self.every_band[i, 1 : len(rollout.ratios)] = [band_of(ratio, bands) for ratio in rollout.ratios[1:]]
        self.prompts = [rollout.prompt for rollout in failed]
        self.cluster = np.unique(np.asarray(self.prompts), return_inverse=True)[1].reshape(-1)
        # a rollout whose only candidate is an excluded prompt gets no pivot
        self.has_pivot = np.isfinite(self.every_ratio).any(axis=1)

    def pair(self, band: int) -> np.ndarray:
        """`[N, 2]` mixed groups and tokens of the states in a band."""
        return np.stack([self.mixed[:, band], self.tokens[:, band]], axis=1)

    def q(self, estimate: Recoverability, gamma: float) -> np.ndarray:
        """`[N, M]` Q of every candidate."""
        q: np.ndarray = np.exp(log_q(self.every_ratio, estimate, gamma))
        return q

    def expected(self, estimate: Recoverability, gamma: float) -> np.ndarray:
        """`[N, 2]` expected mixed groups and tokens of one pivot with this gamma in each rollout."""
        weight = self.stands_for * np.exp(np.take_along_axis(log_q(self.every_ratio, estimate, gamma), self.place, axis=1))
        return np.stack([(weight * self.mixed).sum(axis=1), (weight * self.tokens).sum(axis=1)], axis=1)
