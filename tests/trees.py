"""Trees by hand."""

from __future__ import annotations

from collections.abc import Sequence

from deepgrpo.feedback import Score
from deepgrpo.records import ROOT, Node, Pivot, Prompt, Tree


def make_tree(
    main: Sequence[tuple[int, float]], branches: Sequence[tuple[int, int, Sequence[tuple[int, float]]]] = (),
    prompt_length: int = 3, first_token: int = 4, vocabulary: int = 10,
) -> Tree:  # fmt: skip
    """A tree by hand.

    Args:
        main: (length, reward) of each main rollout.
        branches: (parent, offset, [(length, reward), ...]) of each pivot.
    """
    count = 0

    def tokens(length: int) -> tuple[int, ...]:
        nonlocal count
        count += length
        return tuple(first_token + (count - length + i) % vocabulary for i in range(length))

    prompt = Prompt("p", "text", tokens(prompt_length), "question", "1")
    tree = Tree(prompt)
    groups: list[tuple[Pivot, Sequence[tuple[int, float]]]] = [
        (Pivot(ROOT, 0, len(main), "main"), main),
        *((Pivot(parent, offset, len(kids), ratio=0.5), kids) for parent, offset, kids in branches),
    ]
    for number, (pivot, siblings) in enumerate(groups):
        nodes = [
            Node(
                pivot.parent, pivot.offset, own := tokens(length), (-1.0,) * len(own), "stop", "text", Score(reward),
                pivot.stream, number,
            )
            for length, reward in siblings
        ]  # fmt: skip
        tree = tree.add([pivot], nodes)
    return tree
