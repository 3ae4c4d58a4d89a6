"""An upper bound for choosing where: resample each failed rollout from the state just before its first error.

No method can know that state; the synthetic task does, as each of its steps can be checked. What `deep` loses against this
is what a perfect choice of the pivot would be worth (with one pivot per failed rollout, and K branches, as there).

    wrong step or answer        the pivot is where that segment begins
    ended too early, all right  the pivot is before EOS (or the end of the stop string), which was the error
    cut off while still right   no pivot: nothing wrong was written, and there is no room to go on
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from deepgrpo.config import OracleExplore
from deepgrpo.credit.siblings import sibling_credit
from deepgrpo.explore.base import Context, Limits, Scale, Signal, State, main_pivot
from deepgrpo.records import Credit, Node, Pivot, Prompt, Tree

FirstError = Callable[[Prompt, str], int | None]
"""(prompt, response) → where the first wrong segment begins, in characters; None if nothing wrong was written."""


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
            if node.reward > self.config.success_threshold:
                continue
            offset = self._first_error(tree.prompt, node)
            if offset is not None and offset < limits.response(tree):
                ratio = (offset + 1) / (len(node.tokens) + 1)  # as if each token were a segment
                pivots.append(
                    Pivot(index, offset, self.config.branches_per_pivot, ratio=ratio, candidates=(offset,), q=(1.0,))
                )
        return pivots

    def _first_error(self, prompt: Prompt, node: Node) -> int | None:
        """Own tokens of a failed rollout that come before its first error; None if there is none."""
        found = self.first_error(prompt, self.decode(node.tokens))
        if found is None:
            if node.finish == "length":
                return None
            found = len(self.decode(node.tokens))
        # a response that a stop string ended has no EOS behind its text: its last token was the end
        return min(tokens_before(node.tokens, found, self.decode), len(node.tokens) - 1)

    def returns(self, level: int) -> bool:
        return level == 0

    def credit(self, tree: Tree) -> Credit:
        return sibling_credit(tree, self.scale)

    def observe(self, state: State, trees: Sequence[Tree]) -> State:
        """Count the failed rollouts of this step, and those in which no error was found."""
        failed = [
            (tree.prompt, node)
            for tree in trees
            for _, node in tree.stream("main")
            if node.reward <= self.config.success_threshold
        ]
        without = sum(self._first_error(prompt, node) is None for prompt, node in failed)
        return {"failed": len(failed), "without_error": without}

    def report(self, state: State) -> dict[str, float]:
        return {"oracle/failed": float(state["failed"]), "oracle/without_error": float(state["without_error"])}


def tokens_before(tokens: Sequence[int], characters: int, decode: Callable[[Sequence[int]], str]) -> int:
    """How many tokens at the start have a text of at most so many characters, as few as give that text.

    A token that lies across the place is left out, and so are tokens without text (EOS) right before it. With one token
    per character this is `characters`.
    """

    def length(count: int) -> int:
        return len(decode(tokens[:count]))

    counts = range(len(tokens) + 1)
    most = bisect.bisect_right(counts, characters, key=length) - 1
    return bisect.bisect_left(counts, length(most), key=length)
