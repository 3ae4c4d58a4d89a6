"""Upper bound for the choice of pivots: resample each failed rollout from the state just before its first error.

No method knows that state; the synthetic task does, because each of its steps can be checked. The gap between `deep` and
`oracle` is the value of a perfect choice (one pivot per failed rollout and K branches in both).

    wrong step or answer        pivot at the start of that segment
    correct but ended early     pivot before EOS (or the end of the stop string), which was the error
    cut off while correct       no pivot: there is no error, and no room to continue
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from deepgrpo.config import OracleExplore
from deepgrpo.credit.group import Scale
from deepgrpo.credit.siblings import sibling_credit
from deepgrpo.explore.base import Context, Limits, Signal, State, main_pivot
from deepgrpo.records import Credit, Node, Pivot, Prompt, Tree

FirstError = Callable[[Prompt, str], int | None]
"""(prompt, response) → start of the first wrong segment, in characters; None if there is no error."""


@dataclass(frozen=True)
class OracleStrategy:
    config: OracleExplore
    first_error: FirstError
    decode: Callable[[Sequence[int]], str]
    """Tokens → text without special tokens."""
    scale: Scale = "none"
    signals: frozenset[Signal] = frozenset()

    @classmethod
    def build(cls, config: OracleExplore, context: Context) -> OracleStrategy:
        def decode(tokens: Sequence[int]) -> str:
            return str(context.tokenizer.decode(tokens, skip_special_tokens=True))

        # only the synthetic task knows first errors; the recipe is checked for it
        return cls(config, context.task.first_error, decode, context.scale)

    def initial_state(self) -> State:
        return {"failed": 0, "without_error": 0}

    def plan(self, tree: Tree, state: State, limits: Limits, random: np.random.Generator) -> list[Pivot]:
        if not tree.pivots:
            return [main_pivot(self.config.num_rollouts)]
        if len(tree.pivots) > 1:
            return []
        pivots: list[Pivot] = []
        for index, node in tree.stream("main"):
            if node.outcome > self.config.success_threshold:
                continue
            offset = self._first_error(tree.prompt, node)
            if offset is not None and offset < limits.response(tree):
                ratio = (offset + 1) / (len(node.tokens) + 1)  # as if each token were a segment
                pivots.append(
                    Pivot(index, offset, self.config.branches_per_pivot, ratio=ratio, candidates=(offset,), q=(1.0,))
                )
        return pivots

    def _first_error(self, prompt: Prompt, node: Node) -> int | None:
        """Number of own tokens of a failed rollout before its first error; None if there is no error."""
        found = self.first_error(prompt, self.decode(node.tokens))
        if found is None:
            if node.finish == "length":
                return None
            found = len(self.decode(node.tokens))
        # a response ended by a stop string has no EOS: its last token is the end
        return min(tokens_before(node.tokens, found, self.decode), len(node.tokens) - 1)

    def returns(self, level: int) -> bool:
        return level == 0

    def credit(self, tree: Tree) -> Credit:
        return sibling_credit(tree, self.scale)

    def observe(self, state: State, trees: Sequence[Tree]) -> State:
        """Count the failed rollouts of this step, and those without a detected error."""
        failed = [
            (tree.prompt, node)
            for tree in trees
            for _, node in tree.stream("main")
            if node.outcome <= self.config.success_threshold
        ]
        without = sum(self._first_error(prompt, node) is None for prompt, node in failed)
        return {"failed": len(failed), "without_error": without}

    def report(self, state: State) -> dict[str, float]:
        return {"oracle/failed": float(state["failed"]), "oracle/without_error": float(state["without_error"])}


def tokens_before(tokens: Sequence[int], characters: int, decode: Callable[[Sequence[int]], str]) -> int:
    """Number of leading tokens whose text has at most `characters` characters.

    A token across that place is excluded, and so are tokens without text (EOS) just before it. With one token per character
    this is `characters`.
    """

    def length(count: int) -> int:
        return len(decode(tokens[:count]))

    counts = range(len(tokens) + 1)
    most = bisect.bisect_right(counts, characters, key=length) - 1
    return bisect.bisect_left(counts, length(most), key=length)
