"""Learners that a test can look into, by the seams that processes of a cluster use."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from deepgrpo.pack.budget import Pack
from deepgrpo.pack.layout import Terms
from deepgrpo.train.learner import Learner
from deepgrpo.train.ranks import SingleRank


class LearnerWithOld(Learner):
    """A learner whose old log-probs are given, which makes any ratio; None: its own."""

    def __init__(self, *args: Any, old_N: Tensor | None, **options: Any) -> None:
        super().__init__(*args, **options)
        self.old_N = old_N

    def old_logprobs(self, terms: Terms, packs: Sequence[Pack]) -> Tensor:
        return super().old_logprobs(terms, packs) if self.old_N is None else self.old_N


class ListeningRank(SingleRank):
    """One process, which keeps the loss of every optimizer step."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.sum = 0.0

    def backward(self, loss: Tensor) -> None:
        self.sum += float(loss.detach())
        super().backward(loss)

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        self.losses.append(self.sum)
        self.sum = 0.0
