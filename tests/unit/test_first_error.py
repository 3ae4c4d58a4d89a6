"""Places of pivots relative to the first error of their rollout: the arithmetic of benchmarks/first_error.py."""

from __future__ import annotations

from dataclasses import replace

import pytest
from trees import make_tree

from benchmarks.first_error import figures, place_of
from deepgrpo.config import SyntheticData
from deepgrpo.prompts.synthetic import ChainTask
from deepgrpo.records import Prompt, Tree

TASK = ChainTask(SyntheticData(chain_length=3))
TEXT = "3+4=7;7*2=5;5-5=0;#0"
"""The second step is wrong; it starts at 6."""


def _tree(offset: int, rewards: tuple[float, ...]) -> Tree:
    tree = make_tree([(len(TEXT), 0.0)], [(0, offset, [(2, reward) for reward in rewards])])
    nodes = (replace(tree.nodes[0], text=TEXT), *tree.nodes[1:])
    return replace(tree, nodes=nodes, prompt=Prompt("p", "", (1,), "3+4*2-5:", "9"))


@pytest.mark.parametrize(
    ("offset", "before", "exact", "steps"), [(0, 1, 0, 1), (6, 1, 1, 0), (12, 0, 0, -1), (18, 0, 0, -2), (8, 0, 0, 0)]
)
def test_places_by_hand(offset: int, before: float, exact: float, steps: float) -> None:
    tree = _tree(offset, (1.0, 0.0))
    assert place_of(tree, 1, tree.pivots[1], TASK) == {
        "prompt": "p", "before": before, "exact": exact, "steps": steps, "rescued": 1.0, "mixed": 1.0
    }  # fmt: skip


def test_a_rollout_without_an_error_has_no_place() -> None:
    tree = _tree(0, (1.0, 0.0))
    cut = replace(tree, nodes=(replace(tree.nodes[0], text="3+4=7;7*"), *tree.nodes[1:]))
    assert place_of(cut, 1, cut.pivots[1], TASK) is None


def test_figures_by_hand() -> None:
    """Two pivots before the error, of which one is rescued and mixed, and two behind it, one mixed: 2 groups in 400 tokens."""
    row = {"prompt": "p", "before": 1.0, "exact": 0.0, "steps": 1.0, "rescued": 1.0, "mixed": 1.0}
    rows = [
        row, {**row, "exact": 1.0, "steps": 0.0, "rescued": 0.0, "mixed": 0.0}, {**row, "before": 0.0, "steps": -1.0},
        {**row, "prompt": "q", "before": 0.0, "steps": -2.0, "mixed": 0.0, "rescued": 0.0},
    ]  # fmt: skip
    found = figures(rows, 80.0, 40.0, 360.0)
    wanted = {"pivots": 4, "before": 0.5, "exact": 0.25, "steps": -0.5, "rescued_before": 0.5, "rescued_behind": 0.5,
              "forwarded": 20.0, "asked": 10.0, "branch_tokens": 90.0, "mixed_per_1k": 5.0}  # fmt: skip
    assert {key: found[key] for key in wanted} == wanted
    assert found["before_low"] < 0.5 < found["before_high"]
