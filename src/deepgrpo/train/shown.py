"""Histograms of a step's responses and pivots, and a table of responses, for the trackers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice, zip_longest

from deepgrpo.records import Node, Tree
from deepgrpo.visible import plain

COLUMNS = ("step", "prompt", "stream", "reward", "tokens", "finish", "question", "response")
"""Columns of the table of responses."""

Row = tuple[int, str, str, float, int, str, str, str]


@dataclass(frozen=True, slots=True)
class Shown:
    """Example: Shown({"responses/reward": [0.0, 1.0]}, ((3, "q1", "main", 1.0, 12, "stop", "3+4:", "3+4=7;#7"),))."""

    values: Mapping[str, Sequence[float]] = field(default_factory=dict)
    """Distribution → its values. `responses/reward` and `responses/tokens` are of all whole responses, `pivots/r` of the
    depths of the pivots from which branches were sampled; one without values is left out."""
    rows: tuple[Row, ...] = ()
    """Rows of the table, in the order of `COLUMNS`."""


def shown_of(step: int, trees: Sequence[Tree], count: int) -> Shown:
    """The distributions of a step, and `count` of its responses: one of each tree, then a second one of each, and so on.

    A tree's first response is its first rollout, its second the first branch, if it has any.
    """
    whole = [(tree, i, node) for tree in trees for i, node in enumerate(tree.nodes) if node.complete]
    values = {
        "responses/reward": [node.reward for *_, node in whole],
        "responses/tokens": [float(len(tree.response(i))) for tree, i, _ in whole],
        "pivots/r": [pivot.ratio for tree in trees for pivot in tree.pivots if pivot.stream == "branch"],
    }
    turns = zip_longest(*(_in_turn(tree) for tree in trees))
    chosen = islice((each for turn in turns for each in turn if each is not None), count)
    return Shown(
        {name: each for name, each in values.items() if each}, tuple(_row(step, tree, i, node) for tree, i, node in chosen)
    )


def _in_turn(tree: Tree) -> list[tuple[Tree, int, Node]]:
    """The whole responses of a tree, those of the two streams in turn."""
    streams = [[(tree, i, node) for i, node in tree.stream(stream) if node.complete] for stream in ("main", "branch")]
    return [each for pair in zip_longest(*streams) for each in pair if each is not None]


def _row(step: int, tree: Tree, index: int, node: Node) -> Row:
    tokens = len(tree.response(index))
    return (
        step, tree.prompt.id, node.stream, node.reward, tokens, node.finish, plain(tree.prompt.question), plain(node.text)
    )  # fmt: skip
