"""SPO-tree: which states are continued, what a segment is, and values along a tree by hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepgrpo.config import RootExplore, SPOTreeExplore
from deepgrpo.credit.siblings import sibling_credit
from deepgrpo.engines.base import SampleStats, SamplingParams
from deepgrpo.errors import ConfigError
from deepgrpo.explore.base import Limits
from deepgrpo.explore.grow import Growth, grow
from deepgrpo.explore.root import RootStrategy
from deepgrpo.explore.spo_tree import SPOTreeStrategy, segment_credit
from deepgrpo.feedback import Score
from deepgrpo.records import ROOT, Completion, Node, Pivot, Prompt, SampleRequest, Tree
from deepgrpo.runs.trees import load_trees, save_trees
from deepgrpo.train.loop import train
from deepgrpo.train.metrics import tree_metrics

LIMITS = Limits(max_new_tokens=20, max_total_tokens=40)
PROMPT = Prompt("p", "text", (1, 2, 3), "question", "1")
STOP = 99


class Scripted:
    """An engine that never ends a response, but where it is told to: (length of the response, key in its request)."""

    exact = True
    remark = None

    def __init__(self, stops: Sequence[tuple[int, int]] = ()) -> None:
        self.stops, self.kept, self.rounds = set(stops), [], 0  # type: ignore[var-annotated]

    def sample(
        self, requests: Sequence[SampleRequest], params: SamplingParams, *, keep: bool = False
    ) -> tuple[list[list[Completion]], SampleStats]:
        self.rounds += 1
        self.kept.append(keep)
        groups = []
        for request in requests:
            done = len(request.prefix) - (request.response_start or 0)
            group = []
            for number in range(len(request.keys)):
                tokens = []
                while len(tokens) < request.max_new_tokens and (not tokens or tokens[-1] != STOP):
                    tokens.append(STOP if (done + len(tokens) + 1, number) in self.stops else 10 + number)
                group.append(Completion(tuple(tokens), (-1.0,) * len(tokens), "stop" if tokens[-1] == STOP else "length"))
            groups.append(group)
        return groups, SampleStats(sampled_tokens=sum(len(c.tokens) for g in groups for c in g))

    def forget(self) -> None:
        pass


def _grow(strategy: Any, engine: Any, limits: Limits = LIMITS) -> tuple[Growth, list[str]]:
    asked: list[str] = []

    def judge(prompts: Any, texts: Any, tokens: Any, finishes: Any) -> list[Score]:
        asked.extend(finishes)
        assert all(len(p) == len(texts) for p in (prompts, tokens, finishes))
        return [Score(float(len(t)), checked=f != "length") for t, f in zip(tokens, finishes, strict=True)]

    growth = grow(
        [PROMPT], strategy, strategy.initial_state(), engine, judge, decode=lambda tokens: " ".join(map(str, tokens)),
        params=SamplingParams(), limits=limits, seed=0, step=1,
    )  # fmt: skip
    return growth, asked


def _strategy(**changes: Any) -> SPOTreeStrategy:
    return SPOTreeStrategy(SPOTreeExplore.model_validate({"branching": (2, 3, 2), "segment_tokens": 4, **changes}))


# ---------------------------------------------------------------- growing


def test_a_full_tree_has_a_level_per_number_and_the_last_one_runs_to_the_end() -> None:
    engine = Scripted()
    growth, asked = _grow(_strategy(), engine)
    (tree,) = growth.trees
    assert engine.rounds == 3 and engine.kept == [True, True, False]
    depth = [len(tree.spans(i)) for i in range(len(tree.nodes))]
    assert [depth.count(level) for level in (1, 2, 3)] == [2, 6, 12]
    assert {(d, len(n.tokens), n.finish) for d, n in zip(depth, tree.nodes, strict=True)} == {
        (1, 4, "segment"), (2, 4, "segment"), (3, 12, "length")  # 4 + 4 + 12 = 20, the longest response
    }  # fmt: skip
    assert asked == ["length"] * 12
    assert growth.verifier_calls == 0
    # each token is stored and billed once: 2 · 4 + 6 · 4 + 12 · 12
    assert growth.stats.sampled_tokens == sum(len(n.tokens) for n in tree.nodes) == 176
    assert all(n.stream == "main" for n in tree.nodes)
    assert tree.nodes[0].score == Score(0.0, parsed=False, checked=False)


def test_what_ends_early_is_a_response_and_nothing_hangs_below_it() -> None:
    # the second of the first segments ends at its third token, and the first ones of the second level at the very last
    growth, asked = _grow(_strategy(), Scripted(stops=[(3, 1), (8, 0)]))
    (tree,) = growth.trees
    assert (tree.nodes[1].finish, len(tree.nodes[1].tokens)) == ("stop", 3)
    assert [p.parent for p in tree.pivots] == [ROOT, 0, 3, 4]  # node 2 ended with its segment: complete
    assert (tree.nodes[2].finish, len(tree.nodes[2].tokens)) == ("stop", 4)
    assert asked == ["stop", "stop", "length", "length", "length", "length"]
    assert growth.verifier_calls == 2


def test_the_response_limit_is_no_segment() -> None:
    # 3 + 5 = 8 leaves room for 5: the second level reaches the limit of the response within its segment
    growth, asked = _grow(_strategy(), Scripted(), Limits(max_new_tokens=20, max_total_tokens=8))
    (tree,) = growth.trees
    assert [n.finish for n in tree.nodes] == ["segment"] * 2 + ["length"] * 6
    assert asked == ["length"] * 6
    assert max(len(tree.response(i)) for i in range(8)) == 5
    # and exactly at the end of a segment: nothing could follow, so it is a truncation
    growth, asked = _grow(_strategy(), Scripted(), Limits(max_new_tokens=4, max_total_tokens=40))
    assert [n.finish for n in growth.trees[0].nodes] == ["length"] * 2 == asked


def test_one_level_is_root() -> None:
    ours, theirs = _strategy(branching=(3,)), RootStrategy(RootExplore(num_rollouts=3))
    engine = Scripted(stops=[(2, 1), (9, 2)])
    (tree,), (root,) = _grow(ours, engine)[0].trees, _grow(theirs, engine)[0].trees
    assert tree == root
    assert ours.credit(tree) == theirs.credit(root)
    assert not ours.returns(0)


# ---------------------------------------------------------------- values


def _tree(levels: Sequence[tuple[int, Sequence[tuple[int, float | None]]]]) -> Tree:
    """(parent, [(length, reward or None for a segment), ...]) of each pivot, at the parent's end."""
    tree = Tree(PROMPT)
    for number, (parent, children) in enumerate(levels):
        offset = 0 if parent == ROOT else len(tree.nodes[parent].tokens)
        nodes = [
            Node(
                parent, offset, tuple(range(n)), (-1.0,) * n, "segment" if reward is None else "stop", "",
                Score(0.0, parsed=False, checked=False) if reward is None else Score(reward), "main", number,
            )
            for n, reward in children
        ]  # fmt: skip
        tree = tree.add([Pivot(parent, offset, len(children), "main")], nodes)
    return tree


UNEVEN = _tree([
    (ROOT, [(4, None), (4, None), (2, 1.0)]),  # nodes 0, 1, 2
    (0, [(4, None), (3, 0.0)]),  # 3, 4
    (1, [(4, None), (4, None)]),  # 5, 6
    (3, [(5, 1.0), (5, 0.0)]),  # 7, 8
    (5, [(5, 0.0), (5, 0.0)]),  # 9, 10
    (6, [(5, 1.0), (5, 1.0)]),  # 11, 12
])  # fmt: skip


def test_three_levels_by_hand() -> None:
    """Responses: 2 (1), 4 (0), 7 (1), 8 (0), 9 (0), 10 (0), 11 (1), 12 (1): V(prompt) = 4/8.

    V(3) = 1/2, V(0) = (1 + 0 + 0)/3 = 1/3; V(5) = 0, V(6) = 1, V(1) = 2/4.
    A(0) = 1/3 - 1/2 = -1/6   A(1) = 0   A(2) = 1/2
    A(3) = 1/2 - 1/3 = 1/6    A(4) = -1/3
    A(5) = -1/2               A(6) = 1/2
    A(7) = 1/2  A(8) = -1/2   A(9) = A(10) = 0   A(11) = A(12) = 0
    """
    credit = segment_credit(UNEVEN)
    assert [s.node for s in credit.spans] == list(range(13))
    assert [s.advantage for s in credit.spans] == pytest.approx(
        [-1 / 6, 0, 1 / 2, 1 / 6, -1 / 3, -1 / 2, 1 / 2, 1 / 2, -1 / 2, 0, 0, 0, 0]
    )
    assert [(s.start, s.end) for s in credit.spans] == [(0, len(n.tokens)) for n in UNEVEN.nodes]
    assert {s.stream for s in credit.spans} == {"main"}
    assert credit.groups[0].rewards == pytest.approx((1 / 3, 1 / 2, 1.0))
    assert [g.mixed for g in credit.groups] == [True, True, True, True, False, False]


def test_siblings_by_hand() -> None:
    """Bottom up: V(3) = 1/2, V(0) = (1/2 + 0)/2 = 1/4, V(5) = 0, V(6) = 1, V(1) = 1/2, V(2) = 1.

    The mean of V(0), V(1), V(2) is 7/12.
    """
    credit = segment_credit(UNEVEN, "siblings")
    assert [s.advantage for s in credit.spans] == pytest.approx(
        [1 / 4 - 7 / 12, 1 / 2 - 7 / 12, 1 - 7 / 12, 1 / 4, -1 / 4, -1 / 2, 1 / 2, 1 / 2, -1 / 2, 0, 0, 0, 0]
    )
    # scaled by the sample deviation of the group plus 1e-4: of (1/2, 0) it is sqrt(1/8)
    scaled = segment_credit(UNEVEN, "siblings", "std").spans[3].advantage
    assert scaled == pytest.approx(0.25 / (0.125**0.5 + 1e-4))


def test_a_segment_that_nobody_continued_is_our_bug() -> None:
    with pytest.raises(AssertionError, match="never continued"):
        segment_credit(_tree([(ROOT, [(4, None), (4, 1.0)])]))


@st.composite
def _trees(draw: st.DrawFn) -> Tree:
    levels: list[tuple[int, list[tuple[int, float | None]]]] = []
    frontier, count = [(ROOT, 0)], 0
    while frontier:
        parent, level = frontier.pop(0)
        children: list[tuple[int, float | None]] = []
        for _ in range(draw(st.integers(2, 3))):
            goes_on = level < 2 and draw(st.booleans())
            children.append((draw(st.integers(1, 4)), None if goes_on else draw(st.sampled_from([0.0, 0.3, 1.0]))))
            if goes_on:
                frontier.append((count, level + 1))
            count += 1
        levels.append((parent, children))
    return _tree(levels)


@given(_trees())
def test_gains_along_a_path_add_up_to_its_reward_minus_the_value_of_the_prompt(tree: Tree) -> None:
    gains = {s.node: s.advantage for s in segment_credit(tree).spans}
    responses = [i for i, node in enumerate(tree.nodes) if node.complete]
    start = np.mean([tree.nodes[i].reward for i in responses])
    for i in responses:
        assert sum(gains[node] for node, _, _ in tree.spans(i)) == pytest.approx(tree.nodes[i].reward - start)


@given(_trees())
def test_relative_gains_of_siblings_sum_to_zero_and_every_node_is_trained_once(tree: Tree) -> None:
    credit = segment_credit(tree, "siblings")
    gains = {s.node: s.advantage for s in credit.spans}
    assert sorted(s.node for s in credit.spans) == list(range(len(tree.nodes)))
    for pivot in range(len(tree.pivots)):
        assert sum(gains[node] for node in tree.children(pivot)) == pytest.approx(0.0)


@given(st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=2, max_size=5))
def test_without_segments_both_are_the_group_advantage(rewards: list[float]) -> None:
    tree = _tree([(ROOT, [(3, r) for r in rewards])])
    plain = [s.advantage for s in sibling_credit(tree).spans]
    assert [s.advantage for s in segment_credit(tree).spans] == pytest.approx(plain)
    assert [s.advantage for s in segment_credit(tree, "siblings").spans] == plain


# ---------------------------------------------------------------- around it


def test_metrics_leave_segments_out() -> None:
    metrics = tree_metrics([UNEVEN], [segment_credit(UNEVEN)])
    assert (metrics["main/rollouts"], metrics["main/segments"]) == (8, 5)
    assert metrics["main/reward"] == 0.5
    assert metrics["main/unparsed"] == metrics["main/truncated"] == 0.0
    # 2, 4 + 3, and 4 + 4 + 5 six times
    assert metrics["main/length"] == pytest.approx((2 + 7 + 6 * 13) / 8)
    assert metrics["main/mixed"] == pytest.approx(4 / 6)


def test_saved_trees_come_back(tmp_path: Any) -> None:
    tree = UNEVEN.with_signal(0, "attention", (0.5, 0.25, 0.0, 0.0))
    tree = tree.add([Pivot(0, 1, 2, max_tokens=7)], [])
    save_trees(tmp_path / "t.jsonl.gz", [tree], [segment_credit(UNEVEN)])
    assert list(load_trees(tmp_path / "t.jsonl.gz")) == [tree]


def test_a_run_learns_from_segments_and_the_ledger_knows_them(recipe: Any) -> None:
    config = recipe(
        explore={"type": "spo_tree", "branching": [3, 2], "segment_tokens": 5},
        run={"steps": 2}, log={"trees_every": 1},
    )  # fmt: skip
    directory = train(config)
    trees = list(load_trees(directory / "trees" / "step-000002.jsonl.gz"))
    assert any(not node.complete for tree in trees for node in tree.nodes)
    for tree in trees:
        for pivot, node in ((tree.pivots[n.pivot], n) for n in tree.nodes):
            assert node.complete or len(node.tokens) == pivot.max_tokens == 5
        continued = {pivot.parent for pivot in tree.pivots[1:]}
        assert continued == {i for i, node in enumerate(tree.nodes) if not node.complete}


@pytest.mark.parametrize(
    ("explore", "credit", "words"),
    [
        ({"branching": [6, 6, 6], "segment_tokens": 12}, {}, "3 levels .* = 12, .*max_new_tokens = 24"),
        ({"branching": [6], "segment_tokens": 30}, {"scale": "std"}, 'credit.scale is "std", .* "spo_tree"'),
        ({"branching": []}, {}, "explore.branching"),
        ({"branching": [6, 1], "segment_tokens": 4}, {}, "explore.branching.1 is 1"),
    ],
)
def test_what_cannot_be_is_refused_in_words(recipe: Any, explore: Any, credit: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        recipe(explore={"type": "spo_tree", **explore}, credit=credit)
