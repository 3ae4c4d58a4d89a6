"""Pivots before the step that the policy itself names as the first wrong one."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from surroundings import ROOT as CHECKOUT
from trees import make_tree

from deepgrpo.config import LocatedExplore, RandomExplore, TemplateConfig
from deepgrpo.engines.base import SampleStats, SamplingParams
from deepgrpo.engines.embedded.engine import EmbeddedEngine
from deepgrpo.errors import ConfigError
from deepgrpo.explore.base import LOCATED, UNASKED, UNREAD, Critique, Limits
from deepgrpo.explore.located import LocatedStrategy
from deepgrpo.explore.random import RandomStrategy
from deepgrpo.feedback import Reply
from deepgrpo.model.policy import Policy
from deepgrpo.prompts.chat import build_renderer
from deepgrpo.records import Completion, Prompt, SampleRequest, Tree
from deepgrpo.runs.trees import load_trees
from deepgrpo.train.critique import Critic, read_step
from deepgrpo.train.dry_run import TokenEstimate, dry_run, estimate_tokens
from deepgrpo.train.loop import train

ROOM = Limits(max_new_tokens=100, max_total_tokens=200)


def by_twos(tokens: Any) -> list[int]:
    return [*range(2, len(tokens), 2), len(tokens)]


def _strategy(**changes: Any) -> LocatedStrategy:
    return LocatedStrategy(LocatedExplore.model_validate({"branches_per_pivot": 3, **changes}), by_twos)


def _named(tree: Tree, *steps: int | float) -> Tree:
    """Main rollouts with a named step of two tokens each, or with UNREAD or UNASKED; step 0: none is wrong."""
    for index, step in enumerate(steps):
        count = len(tree.nodes[index].tokens)
        own = (float(step),) * count if step < 0 else tuple(float(i // 2 == step - 1) for i in range(count))
        tree = tree.with_signal(index, LOCATED, own)
    return tree


# ---------------------------------------------------------------- answers


@pytest.mark.parametrize(
    ("answer", "step"),
    [
        ("3", 3), (" Step 3.", 3), ("**Step 2**", 2), ("Step: 4", 4), ("step #4", 4), ("Step no. 2 is wrong.", 2), ("(2)", 2),
        ("The first wrong step is 2, because 3 + 4 is not 8.", 2),
        ("Step 1 is right. Step 2 is right. Step 3 is wrong since 2 * 2 = 4.", 3),
        ("Steps 1 and 2 are fine; \\boxed{4}", 4), ("\\boxed{\\text{Step }3}", 3),
        ("None of the steps is wrong.", 0), ("No wrong step.", 0), ("All the steps are correct.", 0), ("0", 0), ("Step 0", 0),
        ("", None), ("I cannot tell.", None), ("6", None), ("Step 12", None), ("3.5", None), ("-", None), ("\\boxed{9}", None),
    ],
)  # fmt: skip
def test_answers_are_read(answer: str, step: int | None) -> None:
    assert read_step(answer, 5) == step


# ---------------------------------------------------------------- pivots


def test_the_pivot_lies_before_the_named_step() -> None:
    """Four steps of two tokens; the policy names the third of rollout 0, and the first of rollout 1: the prompt."""
    tree = _named(make_tree([(8, 0.0), (8, 0.0), (8, 1.0)]), 3, 1)
    pivots = _strategy().plan(tree, {}, ROOM, np.random.default_rng(0))
    assert [(pivot.parent, pivot.offset, pivot.num_branches) for pivot in pivots] == [(0, 4, 3), (1, 0, 3)]
    assert [pivot.ratio for pivot in pivots] == [3 / 5, 1 / 5]
    assert [pivot.q for pivot in pivots] == [(0.0, 0.0, 1.0, 0.0), (1.0, 0.0, 0.0, 0.0)]


@pytest.mark.parametrize("said", [UNREAD, UNASKED, 0])
def test_without_a_named_step_it_falls_back(said: float) -> None:
    tree = _named(make_tree([(8, 0.0), (8, 1.0)]), said)
    (pivot,) = _strategy().plan(tree, {}, ROOM, np.random.default_rng(4))
    control = RandomStrategy(RandomExplore(branches_per_pivot=3), by_twos)
    assert [pivot] == control.plan(tree, {}, ROOM, np.random.default_rng(4))  # the control's own draw
    (pivot,) = _strategy(fallback="first").plan(tree, {}, ROOM, np.random.default_rng(4))
    assert pivot.offset == 0
    assert _strategy(fallback="none").plan(tree, {}, ROOM, np.random.default_rng(4)) == []


def test_a_named_state_that_is_no_candidate_falls_back() -> None:
    tree = _named(make_tree([(8, 0.0), (8, 1.0)]), 4)
    assert _strategy(fallback="none").plan(tree, {}, ROOM, np.random.default_rng(0))[0].offset == 6
    assert _strategy(fallback="none", max_ratio=0.6).plan(tree, {}, ROOM, np.random.default_rng(0)) == []
    assert _strategy(fallback="none").plan(tree, {}, replace(ROOM, max_new_tokens=6), np.random.default_rng(0)) == []


def test_figures_of_a_step() -> None:
    strategy = _strategy(fallback="first")
    tree = _named(make_tree([(8, 0.0)] * 5 + [(8, 1.0)]), 3, 0, UNREAD, UNASKED, 1)
    grown = tree.add(strategy.plan(tree, {}, ROOM, np.random.default_rng(0)), [])
    state = strategy.observe(strategy.initial_state(), [grown])
    assert strategy.report(state) == {
        "located/asked": 4.0, "located/named": 2.0, "located/none_wrong": 1.0, "located/unread": 1.0, "located/unasked": 1.0,
        "located/fallback": 3.0,
    }  # fmt: skip
    assert json.loads(json.dumps(state)) == state


def test_solved_prompts_are_not_asked_about_when_they_are_not_expanded() -> None:
    assert {signal.unsolved for signal in _strategy(expand="unsolved").signals} == {True}
    assert {signal.most_reward for signal in _strategy(expand="all").signals} == {float("inf")}


# ---------------------------------------------------------------- the question


class Scripted:
    """An engine that gives prepared answers, and records what it is asked."""

    def __init__(self, policy: Policy, answers: Sequence[str]) -> None:
        self.policy, self.answers = policy, list(answers)
        self.asked: list[SampleRequest] = []
        self.params: list[SamplingParams] = []

    def sample(self, requests: Sequence[SampleRequest], params: SamplingParams, *, keep: bool = False) -> Any:
        self.asked += requests
        self.params.append(params)
        tokens = [tuple(self.policy.tokenizer(self.answers.pop(0)).input_ids) for _ in requests]
        cost = SampleStats(sum(map(len, tokens)), sum(len(request.prefix) for request in requests))
        return [[Completion(each, (0.0,) * len(each), "stop")] for each in tokens], cost


CRITIQUE = Critique(LOCATED, by_twos, question="{count}:{question}{steps}#", step="{number}:{text};", answer_tokens=4)


def _critic(policy: Policy, engine: Any, context: int = 96) -> Critic:
    return Critic(build_renderer(TemplateConfig(chat=False), policy.tokenizer), policy.tokenizer, context, engine)


def _written(policy: Policy, *texts: str) -> Tree:
    tree = make_tree([(len(text), 0.0) for text in texts])
    nodes = tuple(
        replace(node, tokens=tuple(policy.tokenizer(text).input_ids)) for node, text in zip(tree.nodes, texts, strict=True)
    )
    return replace(tree, prompt=Prompt("p", "3+4:", tuple(policy.tokenizer("3+4:").input_ids), "3+4:", "7"), nodes=nodes)


def test_the_question_shows_numbered_steps_and_the_answer_marks_one(policy: Policy) -> None:
    """Steps 1+, 2=, 3; the answers: step 2, none wrong, no step 9, nothing."""
    tree = _written(policy, *["1+2=3"] * 4)
    engine = Scripted(policy, ["2", "0", "9", "="])
    found = _critic(policy, engine).measure(CRITIQUE, [(tree, i) for i in range(4)], [10, 11, 12, 13])
    assert policy.tokenizer.decode(engine.asked[0].prefix) == "3:3+4:1:1+;2:2=;3:3;#"
    assert [request.keys for request in engine.asked] == [(10,), (11,), (12,), (13,)]
    assert {request.max_new_tokens for request in engine.asked} == {4}
    assert [values.tolist() for values in found.values] == [[0, 0, 1, 1, 0], [0] * 5, [UNREAD] * 5, [UNREAD] * 5]
    assert (found.forwarded, found.sampled.sampled_tokens, found.sequences) == (4 * 21, 4, 4)
    assert engine.params == [SamplingParams(greedy=True)]


def test_a_step_of_an_episode_ends_with_the_reply(policy: Policy) -> None:
    """Turns of 3 and 1 tokens with the reply "45" between them: steps 1+, 245 and 3."""
    tree = _written(policy, "1+2453")
    tree = replace(tree, nodes=(replace(tree.nodes[0], replies=(Reply(3, 5),)),))
    engine = Scripted(policy, ["2"])
    found = _critic(policy, engine).measure(CRITIQUE, [(tree, 0)], [10])
    assert policy.tokenizer.decode(engine.asked[0].prefix) == "3:3+4:1:1+;2:245;3:3;#"
    assert found.values[0].tolist() == [0, 0, 1, 1, 1, 0]


def test_a_rollout_that_leaves_no_room_is_not_asked_about(policy: Policy) -> None:
    tree = _written(policy, "1+2=3", "1+")
    engine = Scripted(policy, ["1"])
    found = _critic(policy, engine, context=24).measure(replace(CRITIQUE, temperature=0.7), [(tree, 0), (tree, 1)], [1, 2])
    assert [values.tolist() for values in found.values] == [[UNASKED] * 5, [1, 1]]
    assert engine.params == [SamplingParams(0.7)]
    assert _critic(policy, engine, context=5).measure(CRITIQUE, [(tree, 0)], [1]).sequences == 0


def test_an_answer_does_not_depend_on_the_batch(policy: Policy) -> None:
    tree = _written(policy, "1+2=3", "4*4=6;", "1+1", "9-9=0;#0")
    critic, warm = _critic(policy, EmbeddedEngine(policy)), replace(CRITIQUE, temperature=1.0)
    pairs, keys = [(tree, i) for i in range(4)], [5, 6, 7, 8]
    together = critic.measure(warm, pairs, keys)
    alone = [critic.measure(warm, [pair], [key]).values[0] for pair, key in zip(pairs, keys, strict=True)]
    assert all((a == b).all() for a, b in zip(together.values, alone, strict=True))


# ---------------------------------------------------------------- in a run


REWARD = {"type": "user", "function": f"{CHECKOUT / 'tests/golden/reward.py'}:reward", "truncated_value": "none"}
EXPLORE = {
    "type": "located", "question": "{question}{steps}#", "step": "{text}", "answer_tokens": 3, "num_rollouts": 4,
    "answer_temperature": 1.0, "branches_per_pivot": 2, "segments": {"type": "tokens", "size": 2},
}  # fmt: skip


def test_a_run_bills_questions_and_answers(recipe: Any) -> None:
    config = recipe(
        explore=EXPLORE, reward=REWARD, sampling={"max_new_tokens": 10}, data={"chain_length": 1}, run={"steps": 2},
        log={"trees_every": 1},
    )  # fmt: skip
    directory = Path(train(config))
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "located/asked" in row]
    trees = [tree for file in sorted((directory / "trees").iterdir()) for tree in load_trees(file)]
    in_trees = sum(len(node.tokens) for tree in trees for node in tree.nodes)
    answers = sum(row["signals/sampled_tokens"] for row in steps)
    asked = sum(row["located/asked"] for row in steps)
    assert asked == sum(node.reward <= 0 for tree in trees for _, node in tree.stream("main")) > 0
    assert asked <= answers <= 3 * asked
    assert rows[-1]["ledger/sampled_tokens"] == in_trees + answers == sum(row["sampled_tokens"] for row in steps)
    assert rows[-1]["ledger/sampled_sequences"] == sum(len(tree.nodes) for tree in trees) + asked
    # each question: the prompt, the rollout without its end, "#"
    questions = sum(
        len(tree.prompt.tokens) + len(node.text) + 1 for tree in trees for _, node in tree.stream("main") if node.reward <= 0
    )
    assert rows[-1]["ledger/signal_tokens"] == questions
    placed = [
        (pivot.offset, tree.nodes[pivot.parent].signals[LOCATED])
        for tree in trees for pivot in tree.pivots[1:]
    ]  # fmt: skip
    assert any(1.0 in values for _, values in placed)
    assert all(values.index(1.0) == offset for offset, values in placed if 1.0 in values)


def test_a_dry_run_counts_answers_and_refuses_wordings(recipe: Any) -> None:
    """4 prompts x 4 rollouts: 16 x 10 tokens, 32 branches x 10, 16 answers x 3: 528 in a step."""
    config = recipe(explore=EXPLORE, sampling={"max_new_tokens": 10}, run={"steps": 2})
    assert estimate_tokens(config) == TokenEstimate(160, 320, 48) and estimate_tokens(config).total == 528
    out = io.StringIO()
    dry_run(config, Console(file=out, width=120))
    assert re.search(r"answers about rollouts\W+48\b", out.getvalue())
    with pytest.raises(ConfigError, match="which the tokenizer cannot encode"):
        dry_run(recipe(explore={"type": "located"}), Console(file=io.StringIO()))


def test_bad_recipes_are_refused_in_words(recipe: Any) -> None:
    with pytest.raises(ConfigError, match=r"explore.question is 'Here is .*, which the tokenizer cannot encode .*in words"):
        train(recipe(explore={"type": "located"}))
    with pytest.raises(ConfigError, match=r"explore.step is 'Step .*, which the tokenizer cannot encode"):
        train(recipe(explore={"type": "located", "question": "{steps}"}))
    with pytest.raises(ConfigError, match=r"explore.question is 'Which\?' and has no \{steps\}; write \{steps\}"):
        recipe(explore={"type": "located", "question": "Which?"})
    with pytest.raises(ConfigError, match=r"explore.step is '\{number\}' and has no \{text\}"):
        recipe(explore={"type": "located", "step": "{number}"})
    with pytest.raises(ConfigError, match=r"explore.answer_temperature"):
        recipe(explore={"type": "located", "answer_temperature": -1})
