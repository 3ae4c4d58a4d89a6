"""The metrics and the cost of a step, worked by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
from trees import make_tree

from deepgrpo.credit.siblings import sibling_credit
from deepgrpo.engines.base import SampleStats
from deepgrpo.explore.grow import Growth
from deepgrpo.feedback import Score
from deepgrpo.records import Tree
from deepgrpo.train.metrics import sampling_cost, staleness, step_metrics

# rollouts of 6 and 5 tokens with rewards 0 and 1; branches of 2 and 3 tokens from the failed one, the first succeeds
TREE = make_tree([(6, 0.0), (5, 1.0)], [(0, 4, [(2, 1.0), (3, 0.0)])])
# all rollouts fail, and so do their branches
HOPELESS = make_tree([(4, 0.0), (8, 0.0)], [(1, 2, [(2, 0.0), (2, 0.0)])])


def growth(*trees: Tree) -> Growth:
    return Growth(
        trees, SampleStats(40, 100, 25, 8.0), verifier_calls=7, seconds_reward=0.5, branches=SampleStats(9, 60, 15, 3.0)
    )


def test_a_step_by_hand() -> None:
    trees = [TREE, HOPELESS]
    found = step_metrics(growth(*trees), [sibling_credit(tree) for tree in trees], 2.5)
    assert {key: found[key] for key in found if not key.startswith(("main/", "branch/", "pivots/", "reward/"))} == {
        "tokens_per_s": 5.0, "sampled_tokens": 40.0, "prefix/reused": 0.75, "time/sample": 8.0, "time/reward": 0.5,
        "time/learn": 2.5,
    }  # fmt: skip
    # rewards 0, 1, 0, 0; lengths 6, 5, 4, 8; one of two groups is mixed
    assert {key: found[key] for key in found if key.startswith("main/")} == {
        "main/rollouts": 4.0, "main/surprisal": 1.0, "main/reward": 0.25, "main/truncated": 0.0, "main/length": 5.75,
        "main/unparsed": 0.0, "main/groups": 2.0, "main/mixed": 0.5, "main/zero_variance": 0.5,
    }  # fmt: skip
    # rewards 1, 0, 0, 0; lengths 2, 3, 2, 2, without the prefix; 15 of 60 prefix tokens were encoded
    assert {key: found[key] for key in found if key.startswith("branch/")} == {
        "branch/rollouts": 4.0, "branch/surprisal": 1.0, "branch/reward": 0.25, "branch/truncated": 0.0,
        "branch/length": 2.25, "branch/unparsed": 0.0, "branch/groups": 2.0, "branch/mixed": 0.5,
        "branch/zero_variance": 0.5, "branch/prefix_reused": 0.75,
    }  # fmt: skip
    # two pivots at r = 0.5, which is the upper end of bin 4; one of them is rescued
    assert {key: found[key] for key in found if key.startswith("pivots/")} == {
        "pivots/count": 2.0, "pivots/rescue_rate": 0.5, "pivots/unrecoverable": 1.0, "pivots/ratio": 0.5,
        "pivots/ratio_histogram": [0.0, 0.0, 0.0, 0.0, 2.0, 0.0, 0.0, 0.0, 0.0, 0.0],
        "pivots/rescue_by_ratio": [None, None, None, None, 0.5, None, None, None, None, None],
    }  # fmt: skip


def test_a_rescue_is_a_success_by_the_threshold() -> None:
    tree = make_tree([(6, -0.15), (5, 1.0)], [(0, 4, [(2, -0.05), (3, 0.8)])])
    rates = [step_metrics(growth(tree), [], 0.0, threshold)["pivots/rescue_rate"] for threshold in (-0.1, 0.0, 0.8)]
    assert rates == [1.0, 1.0, 0.0]


def test_signals_and_branches_are_listed_only_where_there_are_any() -> None:
    plain = replace(growth(make_tree([(4, 0.0)])), branches=SampleStats())
    found = step_metrics(plain, [], 0.0)
    assert "time/signals" not in found and "branch/prefix_reused" not in found and found["pivots/count"] == 0.0
    assert step_metrics(replace(plain, signal_tokens=12, seconds_signals=0.75), [], 0.0)["time/signals"] == 0.75


def test_a_truncated_response_says_nothing_about_its_format() -> None:
    tree = make_tree([(4, 0.0), (4, 0.0), (4, 1.0), (4, 1.0)])
    nodes = list(tree.nodes)
    nodes[0] = replace(nodes[0], finish="length", score=Score(0.0, parsed=False))
    nodes[1] = replace(nodes[1], score=Score(0.0, parsed=False, problem="time out"))
    found = step_metrics(growth(replace(tree, nodes=tuple(nodes))), [], 0.0)
    # one of four is truncated; of the other three one has no answer
    assert found["main/truncated"] == 0.25 and found["main/unparsed"] == pytest.approx(1 / 3)
    assert found["reward/problems"] == found["reward/problem_time_out"] == 1.0


def test_the_ledger_pays_for_every_node() -> None:
    cost = sampling_cost(replace(growth(TREE, HOPELESS), signal_tokens=12, seconds_signals=0.75))
    assert {key: value for key, value in cost.as_dict().items() if value} == {
        "sampled_tokens": 40, "sampled_sequences": 8, "prefix_tokens": 100, "prefix_tokens_encoded": 25,
        "signal_tokens": 12, "verifier_calls": 7, "seconds_sample": 8.0, "seconds_signals": 0.75, "seconds_reward": 0.5,
    }  # fmt: skip


def test_staleness_is_how_far_the_learner_is_ahead() -> None:
    """Four nodes by version 5 and four by version 3, the learner at 6: (1 · 4 + 3 · 4) / 8 = 2."""
    old, new = (replace(tree, nodes=tuple(replace(n, version=v) for n in tree.nodes)) for tree, v in ((TREE, 3), (TREE, 5)))
    assert staleness([old, new], 6) == 2.0
    assert staleness([new], 5) == 0.0
