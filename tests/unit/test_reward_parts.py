"""A reward of several parts: the sum, the part that says success, the advantages, and what is written about the parts."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from trees import make_tree

from deepgrpo.config import OverlongConfig, load_recipe, parse_config, to_toml
from deepgrpo.config.explain import describe_keys
from deepgrpo.credit.group import STD_EPSILON, centre, centre_parts
from deepgrpo.credit.siblings import pooled_credit, sibling_credit
from deepgrpo.errors import ConfigError, RewardError
from deepgrpo.eval.evaluate import evaluate
from deepgrpo.explore.base import Context, Limits
from deepgrpo.explore.root import RootStrategy
from deepgrpo.feedback import PartScore, Score
from deepgrpo.records import Prompt, Tree
from deepgrpo.report.blocks import tree_json
from deepgrpo.report.tree_text import draw_tree
from deepgrpo.rewards import build_reward
from deepgrpo.rewards.base import judge
from deepgrpo.rewards.overlong import OverlongPenalty
from deepgrpo.rewards.parts import WeightedReward
from deepgrpo.runs.facts import is_rescued, tree_facts
from deepgrpo.runs.trees import SavedTree, tree_from_json, tree_to_json
from deepgrpo.train.loop import train
from deepgrpo.train.metrics import tree_metrics

REST: dict[str, Any] = {
    "model": {"type": "pretrained", "path": "some/model"}, "data": {"type": "jsonl", "path": "train.jsonl"},
    "explore": {"type": "root"},
}  # fmt: skip
EXACT = {"type": "exact", "marker": "#"}
JUDGE = {"type": "judge", "base_url": "http://127.0.0.1:9/v1", "model": "m", "prompt": "Grade {response}"}
PROMPT = Prompt("p", "text", (1, 2, 3), "question", "7")


class Says:
    """A reward with one number for each text."""

    def __init__(self, **values: float | None) -> None:
        self.values, self.closed = values, False

    def score(self, prompts: Any, completions: Sequence[str], completion_ids: Any) -> list[Score]:
        found = [self.values[text] for text in completions]
        return [Score(0.0, parsed=False, problem="raised") if value is None else Score(value) for value in found]

    def close(self) -> None:
        self.closed = True


def config(reward: dict[str, Any], **sections: Any) -> Any:
    return parse_config({**REST, **sections, "reward": reward})


def with_parts(tree: Tree, **values: Sequence[float]) -> Tree:
    """The tree with parts: `correct` weighs 1 and says success, `form` weighs 1/2."""
    weights = {"correct": 1.0, "form": 0.5}
    nodes = []
    for i, node in enumerate(tree.nodes):
        parts = {name: PartScore(values[name][i], weights[name]) for name in weights}
        total = sum(part.weight * part.value for part in parts.values())
        nodes.append(replace(node, score=Score(total, outcome=values["correct"][i], parts=parts)))
    return replace(tree, nodes=tuple(nodes))


# two rollouts; two branches off the first
TREE = with_parts(
    make_tree([(4, 0.0), (3, 0.0)], [(0, 2, [(2, 0.0), (1, 0.0)])]), correct=[0, 1, 1, 0], form=[1, 0, 0, 0]
)


def test_the_sum_by_hand() -> None:
    correct, form = Says(a=1.0, b=0.0, c=0.0), Says(a=0.5, b=1.0, c=None)
    reward = WeightedReward({"correct": correct, "form": form}, {"correct": 1.0, "form": -0.2}, "correct")
    a, b, c = reward.score([PROMPT] * 3, ["a", "b", "c"], [(1,)] * 3)
    assert (a.value, b.value, c.value) == pytest.approx((1 - 0.1, -0.2, 0.0))
    assert (a.judged, b.judged, c.judged) == (1.0, 0.0, 0.0)
    assert a.parts == {"correct": PartScore(1.0, 1.0), "form": PartScore(0.5, -0.2)}
    # a part that fails says so, and does not hide that the other found an answer
    assert (c.problem, c.parsed, c.parts["form"].problem) == ("raised", True, "raised")
    reward.close()
    assert correct.closed and form.closed


def test_the_sum_says_success_if_it_is_chosen() -> None:
    reward = WeightedReward({"a": Says(x=0.0), "b": Says(x=None)}, {"a": 1.0, "b": 1.0}, None)
    (only,) = reward.score([PROMPT], ["x"], [(1,)])
    assert only.outcome is None and only.judged == only.value and only.parsed
    large = WeightedReward({"a": Says(x=3e38), "b": Says(x=3e38)}, {"a": 1.0, "b": 1.0}, None)
    assert large.score([PROMPT], ["x"], [(1,)])[0].problem == "not finite"


def test_a_truncated_response_has_the_same_parts() -> None:
    reward = WeightedReward({"a": Says(x=1.0), "b": Says(x=1.0)}, {"a": 1.0, "b": 0.5}, "a")
    whole, cut = judge(reward, -1.0, [PROMPT] * 2, ["x", "x"], [(1,), (1, 2)], ["stop", "length"])
    assert (whole.value, cut.value, cut.judged, cut.checked) == (1.5, -1.5, -1.0, False)
    assert {name: part.value for name, part in cut.parts.items()} == {"a": -1.0, "b": -1.0}


def test_the_length_penalty_is_a_part_and_leaves_success_alone() -> None:
    reward = WeightedReward({"a": Says(x=1.0)}, {"a": 1.0}, "a")
    penalty = OverlongPenalty(OverlongConfig(cache=4), max_new_tokens=4, max_total_tokens=100)
    (score,) = judge(reward, 0.0, [PROMPT], ["x"], [(1, 2, 3)], ["stop"], penalty=penalty)
    assert (score.value, score.judged, score.parts["overlong"]) == (1 - 0.75, 1.0, PartScore(-0.75))


def test_advantages_of_the_sum_by_hand() -> None:
    """Main: 1/2 and 1, mean 3/4. Branches: 1 and 0, mean 1/2."""
    credit = sibling_credit(TREE, "none")
    assert [span.advantage for span in credit.spans] == [-0.25, 0.25, 0.5, -0.5]
    assert [span.stream for span in credit.spans] == ["main", "main", "branch", "branch"]


def test_advantages_of_normalised_parts_by_hand() -> None:
    """The standard deviation of 0 and 1 is sqrt(1/2): one part gives ±u with u = 1/2 / (sqrt(1/2) + 1e-4).

    Main: `correct` is 0 and 1, `form` 1 and 0 at half the weight: -u + u/2 and u - u/2.
    Branches: `correct` is 1 and 0; all agree on `form`, which adds nothing.
    """
    unit = 0.5 / (0.5**0.5 + 1e-4)
    credit = sibling_credit(TREE, "part_std")
    assert [span.advantage for span in credit.spans] == pytest.approx([-unit / 2, unit / 2, unit, -unit])
    main = pooled_credit(TREE, "part_std")
    assert [span.advantage for span in main.spans] == pytest.approx([-unit / 2, unit / 2])
    assert credit.groups[0].rewards == (0.5, 1.0)


def test_what_the_sum_cannot_tell_apart() -> None:
    """The example of the GDPO paper: of two rewards of 0 and 1, siblings with sums (0, 1) and (0, 2) get equal advantages from
    a sum that is divided by its standard deviation, and advantages of 1 to 2 from parts.
    """
    one, two = {"a": (0, 1), "b": (0, 0)}, {"a": (0, 1), "b": (0, 1)}
    weights = {"a": 1.0, "b": 1.0}
    assert centre((0, 1), "std")[1] == pytest.approx(centre((0, 2), "std")[1], abs=1e-4) == pytest.approx(0.5**0.5, abs=2e-4)
    assert centre_parts(two, weights)[1] == pytest.approx(2 * centre_parts(one, weights)[1]) == pytest.approx(2**0.5, abs=4e-4)


@settings(max_examples=30)
@given(st.data(), st.integers(2, 6), st.integers(1, 4))
def test_normalised_parts_as_a_slow_version_has_them(data: st.DataObject, siblings: int, parts: int) -> None:
    numbers = st.floats(-5, 5, allow_subnormal=False).map(lambda x: round(x, 3))
    table = data.draw(st.lists(st.lists(numbers, min_size=siblings, max_size=siblings), min_size=parts, max_size=parts))
    weights = data.draw(st.lists(numbers, min_size=parts, max_size=parts))
    slow = [0.0] * siblings
    for row, weight in zip(table, weights, strict=True):
        mean = sum(row) / siblings
        deviation = (sum((r - mean) ** 2 for r in row) / (siblings - 1)) ** 0.5
        for i, r in enumerate(row):
            slow[i] += weight * (r - mean) / (deviation + STD_EPSILON)
    named = {str(i): row for i, row in enumerate(table)}
    found = centre_parts(named, {str(i): weight for i, weight in enumerate(weights)})
    assert found == pytest.approx(slow, abs=1e-6)
    assert abs(found.sum()) < 1e-6


def test_a_reward_without_parts_is_one_part() -> None:
    tree = make_tree([(4, 0.0), (3, 1.0), (2, 0.5)])
    assert sibling_credit(tree, "part_std") == sibling_credit(tree, "std")


def test_the_chosen_part_says_what_is_rescued() -> None:
    """The first branch beats the rollout it left by `correct`; in the other tree the branches do by the sum alone."""
    assert is_rescued(TREE, 1) and tree_facts(TREE).successes == 1
    other = with_parts(make_tree([(4, 0.0), (3, 0.0)], [(0, 2, [(2, 0.0), (1, 0.0)])]), correct=[0] * 4, form=[0, 0, 1, 1])
    assert not is_rescued(other, 1) and tree_facts(other).flags == {"unrecoverable", "failed"}


def test_metrics_of_the_parts() -> None:
    nodes = [*TREE.nodes]
    broken = {**nodes[3].score.parts, "form": PartScore(0.0, 0.5, problem="timeout")}
    nodes[3] = replace(nodes[3], score=replace(nodes[3].score, parts=broken, problem="timeout"))
    tree = replace(TREE, nodes=tuple(nodes))
    found = tree_metrics([tree], [sibling_credit(tree)])
    assert {key: value for key, value in found.items() if "reward/" in key} == {
        "reward/correct": 0.5, "reward/form": 0.5, "branch/reward/correct": 0.5, "branch/reward/form": 0.0,
        "reward/problems": 1.0, "reward/problem_timeout": 1.0, "reward/form_problems": 1.0,
    }  # fmt: skip
    assert found["main/reward"] == 0.75


def test_saved_trees_and_their_readers_have_the_parts() -> None:
    credit = sibling_credit(TREE)
    back, spans = tree_from_json(tree_to_json(TREE, credit.spans))
    assert back == TREE and [node.score for node in back.nodes] == [node.score for node in TREE.nodes]
    saved = SavedTree(1, 0, back, spans)
    first = tree_json(saved, None)["nodes"][0]
    assert (first["r"], first["u"], first["t"]) == (0.5, 0.0, {"correct": 0.0, "form": 1.0})
    console = Console(file=io.StringIO(), width=100)
    draw_tree(console, saved, None, 0.0)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "✗ 0.5 (correct 0, form 1)" in shown and "✓ 1 (correct 1, form 0)" in shown


def test_evaluation_measures_the_part_that_says_success() -> None:
    from deepgrpo.config import SamplingConfig
    from deepgrpo.explore.toy import FakeEngine, decode

    class Half:
        def score(self, prompts: Any, completions: Any, ids: Sequence[tuple[int, ...]]) -> list[Score]:
            return [Score(float(len(own) % 2)) for own in ids]

        def close(self) -> None: ...

    class Tokenizer:
        def decode(self, tokens: Sequence[int], skip_special_tokens: bool) -> str:
            return decode(tokens)

    class All(Half):
        def score(self, prompts: Any, completions: Any, ids: Any) -> list[Score]:
            return [Score(1.0) for _ in ids]

    reward = WeightedReward({"odd": Half(), "form": All()}, {"odd": 1.0, "form": 0.5}, "odd")
    prompts = [replace(PROMPT, id=str(i)) for i in range(5)]
    args = {"sampling": SamplingConfig(max_new_tokens=8), "samples": 4, "k": (2,), "truncated_value": None}
    found = evaluate(FakeEngine(), reward, prompts, Tokenizer(), **args)  # type: ignore[arg-type]
    alone = evaluate(FakeEngine(), Half(), prompts, Tokenizer(), **args)  # type: ignore[arg-type]
    for key in ("eval/greedy", "eval/sampled", "eval/pass@2"):
        assert found.metrics[key] == alone.metrics[key], key
    assert found.metrics["eval/reward/form"] == 1.0 and found.metrics["eval/reward/odd"] == found.metrics["eval/greedy"]
    assert found.rows[0].greedy_parts == {"odd": found.rows[0].greedy_reward, "form": 1.0}


def test_a_recipe_and_back(tmp_path: Path) -> None:
    given = config(
        {"parts": {"math": {"type": "math"}, "form": {"type": "user", "function": "form.py:form", "weight": 0.2}}},
        credit={"scale": "part_std"},
    )
    assert given.reward.type == "weighted" and given.reward.success_part == "math"
    (tmp_path / "recipe.toml").write_text(to_toml(given))
    assert load_recipe(tmp_path / "recipe.toml") == given
    # overrides know the types of keys in tables with free names
    overrides = [("reward.parts.form.weight", "2"), ("reward.parts.math.type", "exact"), ("reward.success", "sum")]
    changed = load_recipe(tmp_path / "recipe.toml", overrides)
    assert changed.reward.parts["form"].weight == 2.0 and changed.reward.success_part is None  # type: ignore[union-attr]
    assert changed.reward.parts["math"].type == "exact"  # type: ignore[union-attr]
    assert '[reward.parts.NAME] with type = "user"' in describe_keys("reward.parts")


@pytest.mark.parametrize(
    ("reward", "problem"),
    [
        ({"parts": {"a": {"type": "user", "function": "f:g"}, "b": {"type": "user", "function": "f:h"}}},
         'reward.success is missing, and no part checks an answer by itself ("a", "b")'),
        ({"parts": {"a": {"type": "math"}, "b": EXACT}}, "reward.success is missing, and several parts check"),
        ({"parts": {"a": EXACT}, "success": "b"}, 'reward.success is "b", but the parts are "a"'),
        ({"parts": {"a": {**EXACT, "truncated_value": 0.5}}}, "truncated_value = 0.5 stands in a part of the reward"),
        ({"parts": {"sum": EXACT}}, "'sum' cannot name a part"),
        ({"parts": {"a": {**EXACT, "wieght": 2}}}, "'reward.parts.a.wieght' (value 2); did you mean 'reward.parts.a.weight'"),
        ({"parts": {"a": {"type": "exakt"}}}, "reward.parts.a.type is 'exakt'; choose one of"),
        ({"parts": {"a": {"type": "task"}}}, 'reward.parts.a.type is "task", but data.type is "jsonl"'),
        ({"parts": {}}, "reward.parts is {}"),
        ({"parts": {"a": EXACT, "b": {**JUDGE, "prompt": "!"}}, "success": "a"}, "reward.parts.b.prompt has no {response}"),
        ({"parts": {"a": EXACT, "b": {**JUDGE, "base_url": "ftp://x"}}, "success": "a"}, "reward.parts.b.base_url is 'ftp://x'"),
        ({"type": "math", "parts": {"a": EXACT}}, "unknown key 'reward.parts'"),
    ],
)  # fmt: skip
def test_what_is_refused(reward: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError) as refused:
        config(reward)
    assert problem in str(refused.value)


@pytest.mark.parametrize(
    ("sections", "problem"),
    [
        ({"reward": {"type": "math"}, "credit": {"scale": "part_std"}}, 'is "part_std", but reward.type is "math"'),
        ({"reward": {"parts": {"a": EXACT}}, "credit": {"scale": "part_std"},
          "explore": {"type": "spo_tree", "advantage": "siblings"}},
         'credit.scale is "part_std", but explore.type = "spo_tree"'),
        ({"reward": {"parts": {"a": {**EXACT, "weight": -1}}}, "credit": {"scale": "mean"}}, "reward.parts.a.weight is -1"),
    ],
)  # fmt: skip
def test_credit_that_does_not_fit(sections: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError) as refused:
        parse_config({**REST, **sections})
    assert problem in str(refused.value)


def test_errors_of_a_part_name_its_keys(tmp_path: Path) -> None:
    """When it is built, when it scores, and where its limits are shared; also in the reward of an evaluation."""
    odd = {"type": "user", "function": "odd.py:odd"}
    with pytest.raises(ConfigError, match=r"reward\.parts\.odd\.function is 'odd\.py:odd'"):
        build_reward(config({"parts": {"a": EXACT, "odd": odd}, "success": "a"}).reward)
    (tmp_path / "odd.py").write_text("def odd(completions, **_):\n    return [1.0]\n")
    reward = build_reward(config({"parts": {"a": {**EXACT, "marker": ""}, "odd": odd}, "success": "a"}).reward)
    with pytest.raises(RewardError, match=r'choose reward\.parts\.a\.type = "user"'):
        reward.score([replace(PROMPT, answer=None)], ["x"], [(1,)])
    parts = {"a": EXACT, "b": {**JUDGE, "concurrency": 1}}
    with pytest.raises(ConfigError, match=r"^recipe: reward\.parts\.b\.concurrency is 1, but cluster.reward_workers = 2"):
        parse_config({**REST, "reward": {"parts": parts, "success": "a"}, "cluster": {"reward_workers": 2}}, "recipe")
    with pytest.raises(ConfigError, match=r"eval\.reward\.scale is \[1\.0, 1\.0\]"):
        parse_config({**REST, "reward": EXACT, "eval": {"reward": {**JUDGE, "scale": [1.0, 1.0]}}})


def test_building_from_a_recipe() -> None:
    parts = {"hash": EXACT, "whole": {"type": "exact", "marker": ""}}
    reward = build_reward(config({"parts": parts, "success": "hash"}).reward)
    one, other = reward.score([PROMPT] * 2, ["so #7", "7"], [(1,)] * 2)
    assert ([part.value for part in one.parts.values()], one.judged) == ([1.0, 0.0], 1.0)
    assert ([part.value for part in other.parts.values()], other.judged, other.parsed) == ([0.0, 1.0], 0.0, False)


LENGTHS = "def short(completion_ids, **_):\n    return [1.0 - len(ids) / 8 for ids in completion_ids]\n"
ODD = "def odd(completion_ids, **_):\n    return [float(sum(ids) % 2) for ids in completion_ids]\n"


def test_a_run_branches_where_the_chosen_part_fails(recipe: Any, tmp_path: Path) -> None:
    """Every rollout has a sum above 0 (it is short), so by the sum none would fail and nothing would be branched."""
    (tmp_path / "mine.py").write_text(LENGTHS + ODD)
    made = recipe(
        run={"name": "parts", "steps": 2, "prompts_per_step": 4},
        explore={"type": "deep", "num_rollouts": 4, "branches_per_pivot": 3, "segments": {"type": "tokens", "size": 2}},
        sampling={"max_new_tokens": 6}, credit={"scale": "part_std"}, log={"trees_every": 1},
        reward={
            "type": "weighted", "success": "odd", "truncated_value": "none",
            "parts": {
                "odd": {"type": "user", "function": f"{tmp_path}/mine.py:odd"},
                "short": {"type": "user", "function": f"{tmp_path}/mine.py:short", "weight": 0.1},
            },
        },
    )  # fmt: skip
    run = train(made)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line in lines[-2:]:
        assert line["pivots/count"] > 0
        assert line["main/reward"] == pytest.approx(line["reward/odd"] + 0.1 * line["reward/short"])
        assert line["branch/reward"] == pytest.approx(line["branch/reward/odd"] + 0.1 * line["branch/reward/short"])
    from deepgrpo.runs.saved import SavedRun

    for each in SavedRun(run).trees(2):
        for pivot in each.tree.pivots[1:]:
            assert each.tree.nodes[pivot.parent].outcome == 0.0 < each.tree.nodes[pivot.parent].reward
        again = sibling_credit(each.tree, "part_std").spans
        assert np.allclose([span.advantage for span in each.spans], [span.advantage for span in again])


def test_a_strategy_gets_the_scale() -> None:
    explore = config({"parts": {"a": EXACT}}).explore
    strategy = RootStrategy.build(explore, Context("part_std"))
    assert strategy.credit(replace(TREE, nodes=TREE.nodes[:2], pivots=TREE.pivots[:1])).spans[1].advantage > 0
    assert strategy.plan(TREE, {}, Limits(8, 64), np.random.default_rng(0)) == []
