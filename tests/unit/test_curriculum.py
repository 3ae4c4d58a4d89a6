"""The curriculum: weights by hand, draws by weight, rests, the memory, a run with it that is resumed; epochs as a stop."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from trees import make_tree

from deepgrpo import rng
from deepgrpo.config import Config, parse_config, to_toml
from deepgrpo.config.curriculum import CurriculumConfig
from deepgrpo.engines.base import SampleStats, SamplingParams
from deepgrpo.errors import ConfigError
from deepgrpo.explore.toy import FakeEngine
from deepgrpo.model.policy import Policy
from deepgrpo.prompts.curriculum import Curriculum, check_memory
from deepgrpo.prompts.source import Cursor
from deepgrpo.records import Completion, Prompt, SampleRequest, Tree
from deepgrpo.runs.saved import SavedRun
from deepgrpo.train.backend import LocalBackend, Parts
from deepgrpo.train.loop import train


@dataclass(frozen=True)
class Numbers:
    """Prompts that are called by their numbers."""

    size: int

    def __len__(self) -> int:
        return self.size

    def at(self, indices: Sequence[int]) -> tuple[Prompt, ...]:
        return tuple(Prompt(str(i), str(i), (1,), str(i)) for i in indices)


def curriculum(size: int = 4, sampling: Any = "frontier", seed: int = 0, **keys: Any) -> Curriculum:
    return Curriculum(Numbers(size), sampling, CurriculumConfig(**keys), seed)


def test_weights_by_hand() -> None:
    """Prior 1/2 as of 2 tries. 6 of 8 solved: p = (6 + 1) / 10; none of 8: 1/10; never drawn: 1/2."""
    memory = {"2": [6.0, 8.0, 0, 1], "0": [0.0, 8.0, 0, 2]}
    assert curriculum().weights(memory, 3) == pytest.approx([0.1 * 0.9, 0.25, 0.7 * 0.3, 0.25])
    assert curriculum(sampling="difficulty").weights(memory, 3) == pytest.approx([0.9, 0.5, 0.3, 0.5])
    assert curriculum(prior_rate=0.8, prior_tries=8).weights(memory, 3)[2] == pytest.approx((12.4 / 16) * (3.6 / 16))


def test_rests_by_hand() -> None:
    """Solved 8 times in a row at step 10, with a rest of 5 steps: none at 11 to 15, as a new prompt from 16 on."""
    memory, rule = {"1": [8.0, 8.0, 8, 10]}, curriculum(2, rest_tries=8, rest_steps=5)
    assert [rule.weights(memory, step)[1] for step in range(11, 18)] == [0.0] * 5 + [0.25] * 2
    # 7 in a row are no rest
    assert curriculum(2, rest_tries=8).weights({"1": [7.0, 7.0, 7, 10]}, 11)[1] == pytest.approx((8 / 9) * (1 / 9))
    # if all rest, all are drawn alike
    assert list(rule.weights({key: [8.0, 8.0, 8, 10] for key in "01"}, 11)) == [1.0, 1.0]


def test_the_memory_by_hand() -> None:
    """Tries of a prompt count half when it is drawn again. Branches start where a rollout failed, so they do not count."""
    rule = curriculum(rest_tries=2)
    trees = [make_tree([(2, 1.0), (2, 0.0)], [(1, 1, [(1, 1.0), (1, 1.0)])]), make_tree([(2, 1.0)] * 2)]
    first = rule.observe({}, 1, [3, 0], trees, 0.0)
    assert first == {"3": [1.0, 2.0, 0, 1], "0": [2.0, 2.0, 2, 1]}
    second = rule.observe(first, 5, [3], [make_tree([(2, 0.5), (2, 1.0)])], 0.0)
    assert second == {"0": [2.0, 2.0, 2, 1], "3": [2.5, 3.0, 2, 5]} and list(second) == ["0", "3"]
    assert rule.observe(second, 6, [3], [make_tree([(2, 0.5), (2, 1.0)])], 0.5)["3"] == [2.25, 3.5, 0, 6]
    assert first == {"3": [1.0, 2.0, 0, 1], "0": [2.0, 2.0, 2, 1]}  # a value, not changed
    assert json.loads(json.dumps(second)) == second


def test_the_memory_is_bounded() -> None:
    rule, memory = curriculum(10, window=3), {}
    for step, index in enumerate([5, 1, 2, 5, 7], start=1):
        memory = dict(rule.observe(memory, step, [index], [make_tree([(1, 1.0), (1, 0.0)])], 0.0))
    assert list(memory) == ["2", "5", "7"]


def test_draws_follow_the_weights() -> None:
    """First draws of 1,500 steps: shares within four standard errors of the weights, for fixed seeds."""
    rule, memory = curriculum(), {"2": [6.0, 8.0, 0, 1], "0": [0.0, 8.0, 0, 2]}
    share = rule.weights(memory, 3) / rule.weights(memory, 3).sum()
    counts = Counter(int(rule.order(memory, step)[0]) for step in range(3, 1503))
    for index, expected in enumerate(share):
        assert abs(counts[index] / 1500 - expected) < 4 * np.sqrt(expected * (1 - expected) / 1500)


def test_prompts_that_rest_are_drawn_only_when_no_other_is_left() -> None:
    rule, memory = curriculum(5, rest_steps=9), {"1": [8.0, 8.0, 8, 1], "4": [8.0, 8.0, 8, 1]}
    orders = [list(rule.order(memory, step)) for step in range(2, 11)]
    assert all(sorted(order[:3]) == [0, 2, 3] for order in orders) and len({tuple(order) for order in orders}) > 3
    assert any(1 in list(rule.order(memory, step))[:3] for step in range(11, 21))


@settings(max_examples=30)
@given(st.integers(1, 9), st.integers(0, 20), st.lists(st.integers(1, 7), min_size=1, max_size=5), st.integers(1, 99))
def test_pieces_of_a_step_are_the_step(size: int, before: int, pieces: list[int], step: int) -> None:
    """Rounds of dynamic sampling take further prompts of the same order; no prompt comes twice before all have come."""
    rule, memory = curriculum(size), {"0": [8.0, 8.0, 8, step - 1]}
    start = Cursor(before // size, before % size)
    draw = rule.draw(memory, step, start)
    cursor, found = start, []
    for count in pieces:
        prompts, cursor = draw.take(cursor, count)
        found += [int(prompt.id) for prompt in prompts]
    whole, end = draw.take(start, sum(pieces))
    assert found == [int(prompt.id) for prompt in whole] == draw.indices(start, sum(pieces)) and end == cursor
    assert cursor.epoch * size + cursor.position == before + sum(pieces)
    for first in range(0, len(found) - size + 1, size):
        assert sorted(found[first : first + size]) == list(range(size))


def test_seeds_and_steps_draw_differently() -> None:
    orders = {tuple(curriculum(9, seed=seed).order({}, step)) for seed in (0, 1) for step in (1, 2)}
    assert len(orders) == 4


def test_metrics_by_hand() -> None:
    rule, memory = curriculum(4, rest_steps=5), {"2": [6.0, 8.0, 0, 1], "0": [8.0, 8.0, 8, 2]}
    found = rule.metrics(memory, 3, [2, 1])
    # weights 0, 1/4, 0.21, 1/4: (Σ w)² / Σ w²
    assert found.pop("curriculum/effective_prompts") == pytest.approx(0.71**2 / (2 * 0.25**2 + 0.21**2))
    assert found == {
        "curriculum/seen": 0.5, "curriculum/resting": 1.0, "curriculum/new": 1.0, "curriculum/looked_at_again": 0.0,
        "curriculum/rate": 0.875, "curriculum/rate_drawn": 0.75,
    }  # fmt: skip
    again = rule.metrics(memory, 8, [0])
    assert (again["curriculum/resting"], again["curriculum/looked_at_again"]) == (0.0, 1.0)


@pytest.mark.parametrize(
    "memory", [{"9": [1, 1, 1, 1]}, {"x": [1, 1, 1, 1]}, {"1": [1, 1, 1]}, {"1": 3}, {"1": [1, 1, 1, None]}]
)
def test_a_memory_that_does_not_fit(memory: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf"curriculum\.{next(iter(memory))} is"):
        check_memory(memory, 4)


# ---------------------------------------------------------------- runs

REWARD = '''
def solved(prompts, completion_ids, **_):
    """Always for an even prompt, else by the tokens."""
    return [1.0 if sum(map(ord, text)) % 2 == 0 else float(sum(ids) % 2) for text, ids in zip(prompts, completion_ids)]
'''


class Digits(FakeEngine):
    """Four tokens out of the characters of the synthetic task, drawn from the key alone."""

    exact = False

    def sample(
        self, requests: Sequence[SampleRequest], params: SamplingParams, *, keep: bool = False
    ) -> tuple[list[list[Completion]], SampleStats]:
        groups = [[self._one(key) for key in request.keys] for request in requests]
        return groups, SampleStats(sampled_tokens=sum(len(c.tokens) for group in groups for c in group))

    def _one(self, key: int) -> Completion:
        return Completion(tuple(4 + int(14 * draw) for draw in rng.uniforms([key] * 4, range(4))), (-2.5,) * 4, "length")


class Backend(LocalBackend):
    def __init__(self, **flags: Any) -> None:
        super().__init__(lambda config, policy: Digits())
        self.flags = flags

    def open(self, config: Config, policy: Policy, task: Any) -> Parts:
        return replace(super().open(config, policy, task), **self.flags)


@pytest.fixture
def short(recipe: Any, tmp_path: Path) -> Any:
    (tmp_path / "mine.py").write_text(REWARD)

    def make(name: str, draws: str = "frontier", **sections: Any) -> Config:
        rest = {"curriculum": {"rest_tries": 4, "rest_steps": 3}} if draws != "uniform" else {}
        return recipe(  # type: ignore[no-any-return]
            run={"name": name, "prompts_per_step": 4, **sections.pop("run", {})},
            data={"type": "synthetic", "chain_length": 2, "size": 10, "sampling": draws, **rest},
            explore={"type": "root", "num_rollouts": 4},
            sampling={"max_new_tokens": 4, **sections.pop("sampling", {})}, log={"trees_every": 1},
            reward={"type": "user", "function": f"{tmp_path}/mine.py:solved", "truncated_value": "none"}, **sections,
        )  # fmt: skip

    return make


def trees_of(run: Path) -> list[list[Tree]]:
    """Trees of each step."""
    saved = SavedRun(run)
    return [[each.tree for each in saved.trees(step)] for step in saved.tree_files]


def drawn(run: Path) -> list[list[str]]:
    """Prompts of each step, by their texts."""
    return [[tree.prompt.text for tree in trees] for trees in trees_of(run)]


def lines(run: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if not re.search("time|second|tokens_per_s", key)} for line in found]


def test_solved_prompts_rest_and_a_resumed_run_draws_the_same(short: Any) -> None:
    """With dynamic sampling, whose rounds draw on."""
    sections = {"sampling": {"dynamic": True, "max_rounds": 2}}
    whole = train(short("whole", run={"steps": 6}, **sections), backend=Backend())
    train(short("parts", run={"steps": 3}, **sections), backend=Backend())
    again = train(short("parts", run={"steps": 6}, **sections), resume=whole.parent / "parts", backend=Backend())
    assert drawn(again) == drawn(whole) and lines(again) == lines(whole)
    states = [json.loads((run / "checkpoints" / "step-000006" / "state.json").read_text()) for run in (whole, again)]
    assert states[0]["curriculum"] == states[1]["curriculum"] != {} and states[0]["cursor"] == states[1]["cursor"]
    # a prompt that was solved by all of its rollouts is not drawn in the next three steps, as long as enough others are left
    last: dict[str, int] = {}
    for step, trees in enumerate(trees_of(whole), start=1):
        prompts = [tree.prompt.text for tree in trees]
        assert len(set(prompts)) == len(prompts)
        resting = {text for text in last if step - last[text] <= 3}
        if 10 - len(resting) >= len(prompts):
            assert not resting & set(prompts)
        for tree in trees:
            last.pop(tree.prompt.text, None)
            if all(node.reward for node in tree.nodes):
                last[tree.prompt.text] = step
    assert sum(line["curriculum/resting"] for line in lines(whole)) > 0
    assert lines(whole)[0]["curriculum/new"] == len(drawn(whole)[0])


def test_a_batch_that_is_sampled_ahead_is_drawn_from_the_same_memory(short: Any) -> None:
    plain = train(short("plain", run={"steps": 4}), backend=Backend())
    ahead = train(short("ahead", run={"steps": 4}), backend=Backend(overlaps=True))
    assert drawn(ahead) == drawn(plain)


@pytest.mark.parametrize("sampling", ["uniform", "difficulty"])
def test_epochs_are_a_stop(short: Any, sampling: str) -> None:
    """Two passes over 10 prompts at 4 a step are 5 steps; with steps given, the run ends by what comes first."""
    made = short("epochs", sampling, run={"epochs": 2})
    raw = {name: section for name, section in made.run.model_dump().items() if name != "steps"}
    made = made.model_copy(update={"run": type(made.run).model_validate(raw)})
    run = train(made, backend=Backend())
    assert len(lines(run)) == 5 and "steps = 5\n" in (run / "config.toml").read_text()
    if sampling == "uniform":
        assert sorted(Counter(text for prompts in drawn(run) for text in prompts).values()) == [2] * 10
    if sampling == "difficulty":
        return
    assert len(lines(train(short("steps", sampling, run={"epochs": 2, "steps": 2}), backend=Backend()))) == 2
    # 3 steps of 4 end the first pass over 10
    assert len(lines(train(short("one", sampling, run={"epochs": 1, "steps": 9}), backend=Backend()))) == 3


def test_a_written_recipe_leaves_open_what_epochs_decide() -> None:
    rest = {**REST, "data": {"type": "jsonl", "path": "x"}}
    assert "steps" not in to_toml(parse_config({**rest, "run": {"epochs": 2}})).split("[model]")[0]
    assert "steps = 7" in to_toml(parse_config({**rest, "run": {"epochs": 2, "steps": 7}}))


REST: dict[str, Any] = {"model": {"type": "pretrained", "path": "m"}, "reward": {"type": "exact"}, "explore": {"type": "root"}}


@pytest.mark.parametrize(
    ("sections", "problem"),
    [
        ({"data": {"type": "synthetic", "sampling": "frontier"}}, 'data.sampling is "frontier", but data.type = "synthetic"'),
        ({"data": {"type": "synthetic"}, "run": {"epochs": 2}}, "run.epochs is 2, but data.type"),
        ({"data": {"type": "jsonl", "path": "x", "curriculum": {"rest_steps": 3}}}, "[data.curriculum] is set, but"),
        ({"data": {"type": "jsonl", "path": "x"}, "eval": {"data": {"type": "jsonl", "path": "x", "sampling": "frontier"}}},
         'eval.data.sampling is "frontier"'),
        ({"data": {"type": "jsonl", "path": "x", "sampling": "frontier", "curriculum": {"memory": 1.0}}},
         "data.curriculum.memory is 1.0"),
        ({"data": {"type": "jsonl", "path": "x", "sampling": "front"}}, "data.sampling is 'front'"),
    ],
)  # fmt: skip
def test_what_is_refused(sections: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError) as refused:
        parse_config({**REST, **sections})
    assert problem in str(refused.value)


def test_a_recipe_and_back(tmp_path: Path) -> None:
    from deepgrpo.config import load_recipe

    data = {"type": "jsonl", "path": "x", "sampling": "frontier", "curriculum": {"rest_steps": 7}}
    made = parse_config({**REST, "data": data})
    (tmp_path / "recipe.toml").write_text(to_toml(made))
    assert load_recipe(tmp_path / "recipe.toml") == made
