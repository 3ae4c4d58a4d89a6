"""Prefixes of earlier successes: the store, the bisection, given nodes in growth, learning and saved trees."""

from __future__ import annotations

import io
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from surroundings import ROOT as CHECKOUT
from trees import make_tree

from deepgrpo.config import PrefixExplore
from deepgrpo.errors import ConfigError
from deepgrpo.explore.base import Limits, main_pivot
from deepgrpo.explore.checks import BrokenRuleError, check_credit, check_pivots
from deepgrpo.explore.contract import LIMITS, World, grow_toy
from deepgrpo.explore.prefix import PrefixStrategy
from deepgrpo.explore.prefix_store import Entry, Store, bisect, entries_of, key_of
from deepgrpo.pack.layout import lay_out
from deepgrpo.pack.tree import pack_trees
from deepgrpo.records import NO_PIVOT, ROOT, Credit, CreditSpan, Given, Pivot, Prompt, Tree
from deepgrpo.report.blocks import tree_json
from deepgrpo.report.tree_text import draw_tree
from deepgrpo.runs.facts import tree_facts
from deepgrpo.runs.trees import SavedTree, check_structure, load_trees
from deepgrpo.train.loop import train

PROMPT = Prompt("p", "text", (1, 2, 3), "question", "1")
ROOM = Limits(max_new_tokens=100, max_total_tokens=200)


def by_twos(tokens: Any) -> list[int]:
    return [*range(2, len(tokens), 2), len(tokens)]


def _strategy(**changes: Any) -> PrefixStrategy:
    return PrefixStrategy(PrefixExplore.model_validate({"num_rollouts": 2, "branches_per_pivot": 2, **changes}), by_twos)


def _entry(first: int = 0, length: int = 6, step: int = 0) -> Entry:
    """A success of `length` + 2 tokens, whose last two are not stored."""
    return Entry(tuple(range(first, first + length)), tuple(range(2, length + 1, 2)), 0, length // 2 + 1, step, step)


# ---------------------------------------------------------------- bisection


def test_bisection_by_hand() -> None:
    """Eight segments: 4 fails, 6 succeeds, 5 is mixed, then solved: 4 failed long ago, so the search starts anew.

    From (0, 5): 2 succeeds, 1 succeeds: nothing is left to learn from this success.
    """
    low, high, seen = 0, 8, []
    for outcomes in ([0, 0], [1, 1], [1, 0], [1, 1], [1, 1], [1, 1]):
        depth = (low + high) // 2
        seen.append(depth)
        low, high = bisect(low, high, depth, 8, [bool(each) for each in outcomes])
    assert seen == [4, 6, 5, 5, 2, 1]
    assert (low, high) == (0, 1)  # no depth between: done


def test_bisection_settles_where_outcomes_differ() -> None:
    """All succeed from depth 5 on, all fail before 5; wherever the bounds stand, the search stays within 4 and 5 of 9."""
    for start in range(1, 9):
        low, high, depth = 0, 9, start
        for _ in range(12):
            low, high = bisect(low, high, depth, 9, [depth >= 5] * 3)
            assert high - low > 1
            depth = (low + high) // 2
        # the opposite bound opens again whenever they meet, so it wanders, but it does come back
        visited = set()
        for _ in range(12):
            low, high = bisect(low, high, depth, 9, [depth >= 5] * 3)
            depth = (low + high) // 2
            visited.add(depth)
        assert {4, 5} <= visited


# ---------------------------------------------------------------- the store


def test_a_success_is_stored_without_its_last_segment() -> None:
    (node, *_) = make_tree([(7, 1.0)]).nodes
    entry = Entry.of(replace(node, version=5), by_twos(node.tokens), step=3)
    assert entry == Entry(node.tokens[:6], (2, 4, 6), 0, 4, version=5, step=3)
    assert (entry.length, entry.depth, entry.prefix) == (4, 2, node.tokens[:4])
    assert Entry.of(node, [7], step=3) is None  # one segment has no prefix


def test_the_oldest_success_of_a_prompt_makes_room() -> None:
    store = Store({})
    assert store.add(PROMPT, _entry(0), 2) == ["added"]
    assert store.add(PROMPT, _entry(10), 2) == ["added"]
    assert store.add(PROMPT, _entry(20), 2) == ["added", "crowded"]
    assert [entry.tokens[0] for entry in store.entries()] == [10, 20]


def test_the_same_success_again_keeps_its_bisection() -> None:
    store = Store({})
    store.add(PROMPT, _entry(), 1)
    assert store.learn(PROMPT, _entry().tokens[:4], [False, False]) == []
    assert store.add(PROMPT, _entry(step=9), 1) == []
    assert store.entries() == [replace(_entry(step=9), low=2)]


def test_the_store_is_bounded_in_tokens_and_age() -> None:
    """Four prompts, 6 tokens each. At step 10 with an age of at most 5, that of step 4 leaves; of 18 tokens 12 may stay."""
    store = Store({})
    for step in (7, 4, 9, 8):
        store.add(replace(PROMPT, id=str(step)), _entry(step=step), 1)
    assert store.forget(10, 5, 12) == ["old", "crowded"]
    assert sorted(entry.step for entry in store.entries()) == [8, 9]
    assert store.forget(10, None, 12) == []
    assert Store.read(json.loads(json.dumps(store.to_json()))).to_json() == store.to_json()


def test_a_row_whose_text_has_changed_is_another_prompt() -> None:
    assert key_of(PROMPT) != key_of(replace(PROMPT, tokens=(1, 2, 4)))


def test_an_entry_leaves_when_mastered_or_hopeless() -> None:
    for outcomes, depths, reason in (([True] * 2, (2, 1), "mastered"), ([False] * 2, (2, 3), "hopeless")):
        store = Store({})
        store.add(PROMPT, _entry(), 1)
        assert store.learn(PROMPT, _entry().tokens[: 2 * depths[0]], outcomes) == []
        assert store.learn(PROMPT, _entry().tokens[: 2 * depths[1]], outcomes) == [reason]
        assert store.to_json() == {}
        assert store.learn(PROMPT, _entry().tokens[:4], outcomes) == []  # the prompt was twice in the batch


# ---------------------------------------------------------------- plan and observe


def _rolled(*rewards: float) -> Tree:
    """The prompt of make_tree, which it draws from its tokens, with rollouts of 8 tokens."""
    return make_tree([(8, reward) for reward in rewards])


def _state(strategy: PrefixStrategy) -> Any:
    """After a step in which one rollout succeeded."""
    return strategy.observe(strategy.initial_state(), [_rolled(0.0, 1.0)])


@pytest.mark.parametrize(
    ("expand", "rewards", "continued"),
    [("unsolved", (0, 0), True), ("unsolved", (1, 0), False), ("failed", (1, 0), True), ("failed", (1, 1), False),
     ("all", (1, 1), True)],
)  # fmt: skip
def test_a_prompt_is_continued_from_half_of_its_success(expand: str, rewards: tuple[int, int], continued: bool) -> None:
    strategy = _strategy(expand=expand)
    state = _state(strategy)
    tree = _rolled(*map(float, rewards))
    pivots = strategy.plan(tree, state, ROOM, np.random.default_rng(0))
    if not continued:
        assert pivots == []
        return
    (pivot,) = pivots
    stored = _rolled(0.0, 1.0).nodes[1].tokens  # 4 segments of two tokens: depth 2 of 4
    assert pivot.given == Given(stored[:4], 0)
    assert (pivot.parent, pivot.offset, pivot.num_branches, pivot.stream) == (ROOT, 0, 2, "branch")
    assert pivot.ratio == 3 / 5  # the third state of a chain of five


def test_without_a_success_or_room_it_is_root() -> None:
    strategy = _strategy()
    draw = np.random.default_rng(0)
    assert strategy.plan(Tree(PROMPT), strategy.initial_state(), ROOM, draw) == [main_pivot(2)]
    assert strategy.plan(_rolled(0.0, 0.0), strategy.initial_state(), ROOM, draw) == []
    assert strategy.plan(_rolled(0.0, 0.0), _state(strategy), replace(ROOM, max_new_tokens=4), draw) == []


def test_figures_of_a_step() -> None:
    strategy = _strategy(expand="all")
    state = _state(strategy)
    grown = _rolled(0.0, 0.0)
    given = _rolled(0.0, 1.0).nodes[1].tokens[:4]
    with_given = replace(
        grown, nodes=(*grown.nodes, replace(grown.nodes[0], tokens=given, stream="given", pivot=NO_PIVOT, finish="segment"))
    )
    branched = with_given.add(
        [Pivot(2, 4, 2, ratio=0.6)],
        [replace(grown.nodes[0], parent=2, offset=4, stream="branch", pivot=1) for _ in range(2)],
    )  # both fail
    after = strategy.observe(state, [branched])
    (entry,) = entries_of(after["store"], grown.prompt)
    assert (entry.low, entry.high, entry.depth) == (2, 4, 3)
    assert strategy.report(after) == {
        "store/prompts": 1.0, "store/tokens": 6.0, "store/depth": 0.75, "store/age": 1.0, "store/used": 1.0,
        "store/mixed": 0.0, "store/added": 0.0, "store/mastered": 0.0, "store/hopeless": 0.0, "store/old": 0.0,
        "store/crowded": 0.0,
    }  # fmt: skip


# ---------------------------------------------------------------- given nodes


def _grown() -> list[Any]:
    strategy = _strategy(expand="all", num_rollouts=3)
    build = lambda: strategy  # noqa: E731
    first = grow_toy(build, World(1))
    return [first, grow_toy(build, World(1), state=strategy.observe(strategy.initial_state(), first.trees), step=2)]


def test_growth_makes_a_given_node_and_bills_its_prefix_alone() -> None:
    first, second = _grown()
    with_given = [tree for tree in second.trees if any(not node.sampled for node in tree.nodes)]
    assert with_given
    for tree in with_given:
        (at, given) = next(tree.stream("given"))
        assert (given.parent, given.offset, given.pivot, given.finish) == (ROOT, 0, NO_PIVOT, "segment")
        before = next(each for each in first.trees if each.prompt == tree.prompt)
        assert any(node.tokens[: len(given.tokens)] == given.tokens for node in before.nodes if node.reward > 0)
        pivot = tree.pivots[1]
        assert (pivot.parent, pivot.offset, pivot.given) == (at, len(given.tokens), None)
        for child in tree.children(1):
            assert tree.path(child) == tree.prompt.tokens + given.tokens + tree.nodes[child].tokens
            assert len(tree.response(child)) <= LIMITS.response(tree)
    sampled = sum(len(node.tokens) for tree in second.trees for node in tree.nodes if node.sampled)
    assert second.growth.stats.sampled_tokens == sampled == sum(tree_facts(tree).tokens for tree in second.trees)
    prefixes = sum(
        len(tree.prompt.tokens) * 3 + sum(len(n.tokens) + len(tree.prompt.tokens) for _, n in tree.stream("given")) * 2
        for tree in second.trees
    )
    assert second.growth.stats.prefix_tokens == prefixes


def test_two_pivots_behind_the_same_text_share_its_node() -> None:
    class Twice(PrefixStrategy):
        def plan(self, *arguments: Any) -> list[Pivot]:
            return [each for pivot in super().plan(*arguments) for each in ([pivot, pivot] if pivot.given else [pivot])]

    strategy = Twice(_strategy(expand="all").config, by_twos)
    first = grow_toy(lambda: strategy, World(1)).trees
    trees = grow_toy(lambda: strategy, World(1), state=strategy.observe(strategy.initial_state(), first), step=2).trees
    assert {(len(list(tree.stream("given"))), len(tree.pivots)) for tree in trees} == {(0, 1), (1, 3)}


def test_a_pack_forwards_given_text_once_and_trains_none_of_it() -> None:
    _, second = _grown()
    tree = next(each for each in second.trees if any(not node.sampled for node in each.nodes))
    credit = second.strategy.credit(tree)
    ((at, _),) = tree.stream("given")
    assert at not in {span.node for span in credit.spans}
    layout = lay_out([tree], [credit])
    (pack,) = pack_trees([tree], layout, 10_000)
    assert pack.num_tokens == len(tree.prompt.tokens) + sum(len(node.tokens) for node in tree.nodes)
    assert len(layout.terms) == sum(len(node.tokens) for node in tree.nodes if node.sampled)


def test_given_text_is_shown_as_such() -> None:
    _, second = _grown()
    tree = next(each for each in second.trees if any(not node.sampled for node in each.nodes))
    saved = SavedTree(2, 0, tree, second.strategy.credit(tree).spans)
    console = Console(record=True, width=100, file=io.StringIO())
    draw_tree(console, saved, None, 0.0)
    assert "earlier rollout  given  not trained" in console.export_text()
    check_structure(tree, saved.spans)
    ((at, _),) = tree.stream("given")
    assert tree_json(saved, None)["nodes"][at]["w"] == "from an earlier step, continued below"


def test_checks_know_given_text() -> None:
    tree = _rolled(0.0, 0.0)
    good = Pivot(ROOT, 0, 2, given=Given((4, 5), 1))
    assert check_pivots([good], tree, ROOM) == [good]
    bad: list[tuple[Any, str]] = [
        (Given(()), "make it a deepgrpo.records.Given with tokens"), ((4, 5), "make it a"),
        (Given((4.5,)), "a token is 4.5"),  # type: ignore[arg-type]
        (Given(tuple(range(100))), "100 tokens of the response come"),
    ]  # fmt: skip
    for given, reason in bad:
        with pytest.raises(BrokenRuleError, match=reason):
            check_pivots([replace(good, given=given)], tree, ROOM)
    with_given = replace(tree, nodes=(*tree.nodes, replace(tree.nodes[0], stream="given", pivot=NO_PIVOT)))
    with pytest.raises(BrokenRuleError, match="trains node 2, which is given"):
        check_credit(Credit((CreditSpan(2, 0, 2, 1.0, "branch"),), ()), with_given)


# ---------------------------------------------------------------- in a run


EXPLORE = {"type": "prefix", "expand": "all", "num_rollouts": 4, "branches_per_pivot": 3, "per_prompt": 2,
           "segments": {"type": "tokens", "size": 2}}  # fmt: skip


REWARD = {"type": "user", "function": f"{CHECKOUT / 'tests/golden/reward.py'}:reward", "truncated_value": "none"}
"""One that a random model gets about half of the time."""


def test_a_run_continues_successes_of_earlier_epochs_and_resumes_with_its_store(recipe: Any, tmp_path: Path) -> None:
    config = recipe(
        explore=EXPLORE, reward=REWARD, data={"size": 3, "chain_length": 1}, sampling={"max_new_tokens": 10},
        run={"steps": 4, "prompts_per_step": 3}, log={"trees_every": 1}, checkpoint={"every": 2, "keep_last": 2},
    )  # fmt: skip
    directory = train(config)
    rows = _rows(directory)
    steps = [row for row in rows if "store/used" in row]
    assert steps[0]["store/used"] == 0 < steps[0]["store/added"]
    used = [row for row in steps if row["store/used"]]
    assert used and all(row["given/tokens"] > 0 for row in used) and max(row["given/age"] for row in used) > 0
    trees = [tree for file in sorted((directory / "trees").iterdir()) for tree in load_trees(file)]
    assert sum(len(node.tokens) for tree in trees for node in tree.nodes if node.sampled) == rows[-1]["ledger/sampled_tokens"]
    assert sum(node.sampled for tree in trees for node in tree.nodes) == rows[-1]["ledger/sampled_sequences"]
    train(config, resume=Path(shutil.copytree(directory, tmp_path / "again")), step=2)
    assert _rows(tmp_path / "again") == rows


def _rows(directory: Path) -> list[dict[str, Any]]:
    timed = ("time/", "ledger/seconds_", "tokens_per_s")
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if not key.startswith(timed)} for row in rows]


def test_a_run_of_one_epoch_is_told_so(recipe: Any) -> None:
    config = recipe(explore=EXPLORE, data={"size": 8, "chain_length": 1}, run={"steps": 1}, sampling={"max_new_tokens": 4})
    assert "the run takes 4 prompts of 8, each once: raise run.steps" in (train(config) / "log.txt").read_text()


def test_bad_recipes_are_refused_in_words(recipe: Any) -> None:
    with pytest.raises(ConfigError, match=r"data.type = .synthetic. without data.size has .*without end.*set data.size"):
        recipe(explore={"type": "prefix"})
    with pytest.raises(ConfigError, match=r"explore.per_prompt"):
        recipe(explore={"type": "prefix", "per_prompt": 0}, data={"size": 8})
