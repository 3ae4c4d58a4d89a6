"""Positions of pivots relative to the first error: shares and distances by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks.pivot_errors import mass_before_error, pivots_of
from deepgrpo.config import SyntheticData
from deepgrpo.feedback import Score
from deepgrpo.prompts import synthetic
from deepgrpo.prompts.chain_task import ChainTask
from deepgrpo.records import ROOT, Node, Pivot, Prompt, Tree

QUESTION = "3+4*2-5:"
WRONG = "3+4=7;7*2=5;5-5=0;#0"  # wrong from character 6 on
TOKENIZER = synthetic.tokenizer(synthetic.ALPHABET + "!")


def grown(response: str, pivots: list[tuple[int, list[float]]], reward: float = 0.0) -> Tree:
    """A rollout with pivots at (offset, rewards of the branches); every branch has 5 tokens."""
    tokens = tuple(TOKENIZER(response).input_ids)
    tree = Tree(Prompt("p", QUESTION, (2,), QUESTION)).add(
        [Pivot(ROOT, 0, 1, "main")],
        [Node(ROOT, 0, tokens, (-1.0,) * len(tokens), "stop", response, Score(reward), "main", 0)],
    )
    for number, (offset, rewards) in enumerate(pivots, 1):
        nodes = [Node(0, offset, (3,) * 5, (-1.0,) * 5, "stop", "", Score(each), "branch", number) for each in rewards]
        tree = tree.add([Pivot(0, offset, len(rewards), ratio=0.5)], nodes)
    return tree


def test_shares_and_distances_by_hand() -> None:
    """Pivots at 0 and 6 are before the error, 12 behind it: distances 6, 0, 6. Two of three groups are mixed, in 30 tokens.

    The error is in the second step: 1, 0 and -1 steps from them, and 6 is its start.
    """
    task = ChainTask(SyntheticData())
    found = pivots_of([grown(WRONG, [(0, [1.0, 0.0]), (6, [1.0, 1.0]), (12, [0.0, 1.0])])], task)
    low, high = found.pop("before_low"), found.pop("before_high")
    assert low is not None and high is not None and low < 2 / 3 < high
    assert found == {
        "exact": pytest.approx(1 / 3), "steps": 0.0, "pivots": 3.0, "before_error": pytest.approx(2 / 3),
        "distance": 4.0, "rescued_before": 1.0, "rescued_behind": 1.0,
        "mixed": pytest.approx(2 / 3), "mixed_per_1k": pytest.approx(1000 * 2 / 30),
    }  # fmt: skip
    assert pivots_of([grown(WRONG, [(0, [1.0, 0.0])], reward=1.0)], task)["before_error"] is None  # it did not fail


def test_behind_a_correction_no_error_stands() -> None:
    """The first chain is wrong from 6 on and taken back at 20; the second one is wrong from 27 on."""
    response = WRONG + "!" + WRONG
    task = ChainTask(SyntheticData(recovery="after_answer"))
    assert task.first_error(grown(response, []).prompt, response) == 27
    shares = [pivots_of([grown(response, [(at, [0.0, 0.0])])], task)["before_error"] for at in (6, 12, 20, 21, 27, 33)]
    assert shares == [1.0, 0.0, 0.0, 1.0, 1.0, 0.0]


def test_the_mass_of_q_before_the_error(recipe) -> None:  # type: ignore[no-untyped-def]
    """Chain of root, 6, 12, 18, 20: candidates at 0, 6 before the error, 12, 18 behind it; r = .2, .4, .6, .8. With P = 1, Q is
    uniform at gamma 0, r / 2 at gamma 1: .6 / 2 = .3 of it is before."""
    config = recipe(
        data={"chain_length": 3}, explore={"type": "deep", "segments": {"type": "sentence", "extra_ends": [";"]}}
    )
    tree = grown(WRONG, [])
    tree = replace(tree, nodes=(replace(tree.nodes[0], tokens=tuple(synthetic.tokenizer()(WRONG).input_ids)),))
    found = mass_before_error([tree], config)
    assert found["gamma 0, P = 1"] == pytest.approx(0.5) and found["gamma 1, P = 1"] == pytest.approx(0.3)
