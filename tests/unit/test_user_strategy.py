"""A user's strategy and segmenter: the page's example from end to end, and every mistake refused in a sentence."""

from __future__ import annotations

import io
import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from surroundings import ROOT

from deepgrpo.cli import main
from deepgrpo.config import SegmentConfig, UserExplore, load_recipe, parse_config, to_toml
from deepgrpo.errors import ConfigError, DeepGRPOError, StrategyError
from deepgrpo.explore import build_strategy
from deepgrpo.explore.base import Limits
from deepgrpo.explore.contract import CONTEXT, World, grow_toy
from deepgrpo.explore.segments import build_segmenter
from deepgrpo.explore.toy import Letters
from deepgrpo.explore.user import PARAMETERS
from deepgrpo.feedback import Score
from deepgrpo.lab.doctor import run_doctor
from deepgrpo.lab.options import DoctorOptions
from deepgrpo.records import Node, Pivot, Prompt, Tree

PAGE = (ROOT / "docs" / "algorithms" / "your_own.md").read_text(encoding="utf-8")
(FILE,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
(RECIPE,) = re.findall(r"```toml\n(.*?)```", PAGE, re.DOTALL)
OUTPUTS = dict(re.findall(r"```console\n\$ (.*?)\n(.*?)```", PAGE, re.DOTALL))
LIMITS = Limits(16, 24)


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(FILE, encoding="utf-8")
    return tmp_path


def trace(run: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what a clock measured."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    timed = ("time/", "ledger/seconds_", "tokens_per_s")
    return [{key: value for key, value in line.items() if not key.startswith(timed)} for line in lines]


def state(run: Path) -> Any:
    newest = max((run / "checkpoints").glob("step-*"))
    return json.loads((newest / "state.json").read_text())["strategy"], (
        newest / "model" / "model.safetensors"
    ).read_bytes()


# ---------------------------------------------------------------- the page


def test_the_example_trains_and_a_resumed_run_equals_an_uninterrupted_one(recipe: Any) -> None:
    from deepgrpo.train.loop import train

    explore = tomllib.loads(RECIPE)["explore"]
    whole = train(recipe(explore=explore, run={"steps": 3, "name": "whole"}))
    stopped = train(recipe(explore=explore, run={"steps": 2, "name": "stopped"}))
    train(load_recipe(stopped / "config.toml", [("run.steps", "3")]), resume=stopped)
    assert trace(stopped) == trace(whole)
    assert state(stopped) == state(whole)
    (tried, rescued), lines = state(whole)[0].values(), trace(whole)
    assert tried > 10 and lines[-1]["middle/rescued_share"] == rescued / tried
    assert all(line["pivots/count"] > 0 for line in lines if line["step"])


def test_the_recipe_reads_back(recipe: Any, here: Path) -> None:
    config = recipe(explore=tomllib.loads(RECIPE)["explore"])
    assert parse_config(tomllib.loads(to_toml(config))) == config
    assert (config.explore.num_rollouts, config.explore.most_branches) == (4, 2)


UNSEEDED = """
import numpy as np
from mine import Middle

GENERATOR = np.random.default_rng(0)

class Unseeded(Middle):
    def plan(self, tree, state, limits, random):
        return super().plan(tree, state, limits, random) if not tree.pivots or GENERATOR.random() < 0.5 else []
"""


def test_doctor_prints_what_the_page_shows(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.syspath_prepend(".")
    Path("unseeded.py").write_text(UNSEEDED)
    assert len(OUTPUTS) == 2
    for command, output in OUTPUTS.items():
        assert main(command.split()[1:]) == int("unseeded" in command)
        assert capsys.readouterr().out == output


# ---------------------------------------------------------------- mistakes

GOOD = {
    "signals": "    signals = frozenset()",
    "build": "cls()",
    "initial_state": "{}",
    "plan": "[] if tree.pivots else [Pivot(-1, 0, 2, 'main')]",
    "returns": "False",
    "credit": "sibling_credit(tree)",
    "observe": "state",
    "report": "{}",
}


def method(name: str, answer: str) -> str:
    """A method that returns this; an answer that begins with blanks is the method itself."""
    if answer.startswith("    "):
        return answer
    parameters = ", ".join(["cls" if name == "build" else "self", *PARAMETERS[name]])
    return ("    @classmethod\n" if name == "build" else "") + f"    def {name}({parameters}): return {answer}"


def write(**changes: str | None) -> None:
    lines = ["from deepgrpo.credit.siblings import sibling_credit", "from deepgrpo.records import *", "import math"]
    lines += ["import numpy as np", "class Bad:"]
    lines += [method(name, answer) for name, answer in {**GOOD, **changes}.items() if answer is not None]
    Path("bad.py").write_text("\n".join(lines) + "\n")


def build(reference: str = "bad.py:Bad", **changes: Any) -> Any:
    return build_strategy(UserExplore(strategy=reference, num_rollouts=2, most_branches=1, **changes), CONTEXT)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"plan": None}, r"has no method plan; add `def plan\(self, tree, state, limits, random\)`"),
        ({"build": None}, r"has no method build; add `def build\(cls, config, context\)`"),
        ({"signals": None}, "has no signals; add `signals = frozenset"),
        ({"build": "    def build(self, config, context): return self"}, "build is no class method; put @classmethod"),
        ({"plan": "    def plan(self, tree): return []"}, r"plan\(self, tree\) does not take \(tree, state, limits, random\)"),
        ({"report": "    report = 3"}, "report cannot be called"),
        ({"build": "    @classmethod\n    def build(cls, config): return cls()"}, r"build\(config\) does not take \("),
    ],
)  # fmt: skip
def test_a_class_that_is_no_strategy_is_refused_before_training(changes: dict[str, Any], message: str) -> None:
    write(**changes)
    with pytest.raises(ConfigError, match=f"^explore.strategy is 'bad.py:Bad', (which|whose) (method )?{message}"):
        build()


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("gone.py:Bad", r"the file '.*gone.py' does not exist; a relative path starts where you run"),
        ("bad.py:Bda", r"bad.py does not have it; it has .*Bad"),
        ("bad.py", "with a colon before the name"),
        ("nothing.here:Bad", "there is no module 'nothing'"),
        ("bad.py:sibling_credit", "no class; name a class"),
    ],
)
def test_a_reference_that_leads_nowhere_is_refused(reference: str, message: str) -> None:
    write()
    with pytest.raises(ConfigError, match=f"^explore.strategy is '{reference}'.*{message}"):
        build(reference)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"build": "None"}, "build returned None; return an instance"),
        ({"build": "config.options['x']"}, r"build raised KeyError: 'x' \(.*bad.py, line 8\)"),
        ({"signals": "    signals = ['attention']"}, r"signals is \['attention'\] .* make it a frozenset of Signal"),
        ({"initial_state": "[1]"}, r"initial_state returned \[1\] \(a list\); return the state as a dict"),
        ({"initial_state": "{'seen': {1}}"}, r"state\['seen'\] is \{1\} \(a set\)"),
        ({"initial_state": "{'a': [0.0, math.nan]}"}, r"state\['a'\]\[1\] is nan"),
        ({"initial_state": "{'a': {1: 2}}"}, r"state\['a'\] has the key 1 \(a int\)"),
        ({"initial_state": "{'n': np.int64(1)}"}, r"state\['n'\] is .*1.* \(a int64\)"),
    ],
)  # fmt: skip
def test_what_build_gives_is_refused_before_training(changes: dict[str, Any], message: str) -> None:
    write(**changes)
    with pytest.raises(StrategyError, match=rf"^the strategy 'bad.py:Bad': .*{message}"):
        build()


def tree() -> Tree:
    """Two rollouts of 3 and 4 tokens, and a segment of 2 tokens."""
    prompt = Prompt("p", "p", (1, 2, 3), "p")
    lengths = [(3, "stop"), (4, "length"), (2, "segment")]
    nodes = tuple(
        Node(-1, 0, tuple(range(10, 10 + n)), (-1.0,) * n, finish, "", Score(float(n == 3)), "main", 0)  # type: ignore[arg-type]
        for n, finish in lengths
    )
    return Tree(prompt, nodes, (Pivot(-1, 0, 3, "main", max_tokens=4),))


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ("None", "plan returned None .* return a list of Pivot"),
        ("[(0, 1, 2)]", r"pivot 0 of plan is \(0, 1, 2\) \(a tuple\); make it a deepgrpo.records.Pivot"),
        ("[Pivot(0, 1, 1), Pivot(9, 0, 1)]", "pivot 1 of plan: parent is 9, outside the tree, which has 3 nodes"),
        ("[Pivot(-2, 0, 1)]", "parent is -2, outside the tree"),
        ("[Pivot(0, 3, 1)]", "offset is 3, but node 0 is a response of 3 tokens; choose an offset from 0 to 2"),
        ("[Pivot(2, 1, 1)]", "offset is 1, but node 2 is a segment, which goes on at its end; use offset 2"),
        ("[Pivot(-1, 2, 1)]", "offset is 2, but a pivot at the prompt"),
        ("[Pivot(0, 1, 0)]", "num_branches is 0; sample at least one"),
        ("[Pivot(0, 1.5, 1)]", r"offset is 1.5 \(a float\); make it an int"),
        ("[Pivot(0, 1, 1, 'side')]", "stream is 'side'"),
        ("[Pivot(0, 1, 1, ratio=math.nan)]", "ratio is nan; it must be finite"),
        ("[Pivot(0, 1, 1, ratio=2)]", "ratio is 2; a depth ratio is between 0 and 1"),
        ("[Pivot(0, 1, 1, max_tokens=0)]", "max_tokens is 0; use 1 or more"),
        ("[Pivot(0, 1, 5)]", r"plan has 5 continuations for prompt 'p', but .* is 2 · \(1 \+ 1\) = 4; raise one"),
        ("exit(3)", r"plan raised SystemExit: 3 \(.*line"),
        ("1 / 0", r"plan raised ZeroDivisionError: division by zero \(.*bad.py, line 10\)"),
    ],
)
def test_a_plan_that_cannot_be_grown_is_refused(answer: str, message: str) -> None:
    write(plan=f"{answer}")
    with pytest.raises(StrategyError, match=f"^the strategy 'bad.py:Bad': .*{message}"):
        build().plan(tree(), {}, LIMITS, None)


def test_a_pivot_behind_the_limit_is_refused() -> None:
    write(plan="[Pivot(1, 3, 1)]")
    with pytest.raises(StrategyError, match="3 tokens of the response come before it, and a response has at most 3"):
        build().plan(tree(), {}, Limits(3, 24), None)


def test_segments_without_end_are_refused() -> None:
    """Four responses of at most three tokens have at most twelve segments; three are there."""
    write(plan="[Pivot(-1, 0, 9, 'main', max_tokens=1)]")
    assert len(build().plan(tree(), {}, Limits(3, 24), None)) == 1
    write(plan="[Pivot(-1, 0, 10, 'main', max_tokens=1)]")
    with pytest.raises(StrategyError, match=r"plan has 13 segments for prompt 'p', more than 4 responses .* = 3 can have"):
        build().plan(tree(), {}, Limits(3, 24), None)


def test_the_first_plan_has_rollouts() -> None:
    for answer, message in (
        ("[]", "no pivot for a tree without rollouts"),
        ("[Pivot(0, 0, 1)]", "outside the tree, which has 0"),
    ):
        write(plan=f"{answer}")
        with pytest.raises(StrategyError, match=message):
            build().plan(Tree(tree().prompt), {}, LIMITS, None)


@pytest.mark.parametrize(
    ("name", "answer", "message"),
    [
        ("credit", "[]", r"credit returned \[\] \(a list\); return a deepgrpo.records.Credit"),
        ("credit", "Credit((CreditSpan(0, 0, 4, 1.0, 'main'),), ())", r"span 0 .* \[0, 4\) is not inside node 0, which has 3"),
        ("credit", "Credit((CreditSpan(5, 0, 1, 1.0, 'main'),), ())", "node is 5, but the tree has 3 nodes"),
        ("credit", "Credit((CreditSpan(0, 2, 2, 1.0, 'main'),), ())", r"\[2, 2\) is not inside node 0"),
        ("credit", "Credit((CreditSpan(0, 0, 1, math.nan, 'main'),), ())", "advantage is nan; it must be finite"),
        ("credit", "Credit((CreditSpan(0, 0, 2, 1.0, 'main'), CreditSpan(0, 1, 3, 1.0, 'main')), ())", "node 0 in two spans"),
        ("credit", "Credit((CreditSpan(0, 0, 1, 1.0, 'x'),), ())", "stream is 'x'"),
        ("credit", "Credit((), (Group('main', ()),))", "group 0 of credit is .* with a reward"),
        ("observe", "None", "observe returned None .* return the state as a dict"),
        ("observe", "{'seen': {1}}", r"observe returned a state that is not plain JSON: state\['seen'\] is \{1\} \(a set\)"),
        ("report", "{'mine/x': 'high'}", "report: mine/x is 'high' .* make it a float"),
        ("report", "{3: 1.0}", "report has the key 3"),
        ("returns", "None", "returns returned None .* return True or False"),
    ],
)  # fmt: skip
def test_other_answers_are_refused(name: str, answer: str, message: str) -> None:
    write(**{name: answer})
    arguments = {"credit": (tree(),), "observe": ({}, []), "report": ({},), "returns": (0,)}[name]
    with pytest.raises(StrategyError, match=f"^the strategy 'bad.py:Bad': .*{message}"):
        getattr(build(), name)(*arguments)


def test_numbers_of_numpy_become_plain_and_tuples_lists() -> None:
    write(
        plan="(Pivot(np.int64(0), np.int64(1), np.int64(1), ratio=np.float32(0.5)),)",
        credit="Credit((CreditSpan(0, 0, 1, np.float64(0.5), 'main'),), (Group('main', (1, 0)),))",
        observe="{'last': (1, 2)}",
        report="{'mine/x': np.int64(2)}",
    )  # fmt: skip
    strategy = build()
    (pivot,) = strategy.plan(tree(), {}, LIMITS, None)
    assert pivot == Pivot(0, 1, 1, ratio=0.5) and {type(pivot.parent), type(pivot.offset)} == {int}
    assert type(strategy.credit(tree()).spans[0].advantage) is float
    assert strategy.observe({}, []) == {"last": [1, 2]}
    assert strategy.report({}) == {"mine/x": 2.0} and type(strategy.report({})["mine/x"]) is float


def test_a_strategy_that_fails_in_training_ends_the_run_with_its_traceback_on_request(
    recipe: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write(credit="tree.nodes[99]")
    Path("recipe.toml").write_text(to_toml(recipe(explore={"type": "user", "strategy": "bad.py:Bad"})))
    assert main(["train", "recipe.toml"]) == 1
    assert re.search(
        r"error: the strategy 'bad.py:Bad': credit raised IndexError: tuple index out of range \(.*bad.py, line 12\)",
        capsys.readouterr().err,
    )
    write(plan=None)
    assert main(["train", "recipe.toml", "--run.name", "other"]) == 2
    assert "has no method plan" in capsys.readouterr().err and not Path("runs/other").exists()
    monkeypatch.setenv("DEEPGRPO_DEBUG", "1")
    write(credit="tree.nodes[99]")
    with pytest.raises(StrategyError) as refused:
        main(["train", "recipe.toml", "--run.name", "third"])
    assert isinstance(refused.value.__cause__, IndexError)


# ---------------------------------------------------------------- doctor


def test_doctor_names_the_broken_rule_and_its_reason() -> None:
    write(
        observe="    def observe(self, state, trees):\n        state['n'] = state.get('n', 0) + 1\n        return state",
        credit="Credit(tuple(CreditSpan(i, 0, 1, 1.0, 'main') for i in range(2)), (Group('main', (1.0, 1.0)),))",
    )
    out = Console(file=io.StringIO(), width=200)
    assert run_doctor(DoctorOptions(strategy="bad.py:Bad"), out) == 1
    lines = out.file.getvalue().splitlines()  # type: ignore[attr-defined]
    failed = [line.split()[0] for line in lines if line.startswith("  ") and not line.startswith("   ")]
    assert failed == ["passed"] * 5 + ["failed", "differs", "differs"]
    assert "observe changes the state that it is given" in "".join(lines)
    assert "all responses have the same reward, but a token has the advantage 1" in "".join(lines)


def test_doctor_wants_a_model_or_a_strategy_and_a_table() -> None:
    out = Console(file=io.StringIO())
    with pytest.raises(ConfigError, match="needs a model, a run or a strategy"):
        run_doctor(DoctorOptions(), out)
    write()
    with pytest.raises(ConfigError, match="--explore is 'most', which is not TOML"):
        run_doctor(DoctorOptions(strategy="bad.py:Bad", explore="most"), out)
    with pytest.raises(ConfigError, match="unknown key 'mots_branches'"):
        run_doctor(DoctorOptions(strategy="bad.py:Bad", explore="{ mots_branches = 1 }"), out)


def test_an_endless_strategy_is_stopped() -> None:
    write(plan="[Pivot(-1, 0, 1, max_tokens=1)]")
    strategy = build()
    with pytest.raises(DeepGRPOError, match="plan has not returned an empty list after 20 rounds"):
        grow_toy(lambda: strategy, World())


# ---------------------------------------------------------------- segments


def segment(body: str, count: int = 4) -> list[int]:
    Path("cut.py").write_text(f"def ends(texts):\n    {body}\n")
    return build_segmenter(SegmentConfig(type="user", function="cut.py:ends"), Letters())(list(range(10, 10 + count)))


def test_a_users_segmenter_gets_texts_and_its_last_end_is_added() -> None:
    assert segment("return [i + 1 for i, text in enumerate(texts) if text == 'b']") == [2, 4]
    assert segment("return [1, 4]") == [1, 4]
    assert segment("return ()") == [4]
    assert segment("import numpy; return numpy.array([1, 3])") == [1, 3, 4]
    assert segment("raise ValueError", count=0) == []


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return [5]", "returned the end 5 for 4 tokens; an end is from 1 to 4"),
        ("return [0, 2]", "returned the end 0 for 4 tokens"),
        ("return [3, 2]", "returned 2 after 3; return ascending ends, each once"),
        ("return [2, 2]", "returned 2 after 2"),
        ("return ['2']", r"returned '2' \(a str\) as an end; return a list of ints"),
        ("return [True]", r"returned True \(a bool\) as an end; return a list of ints"),
        ("return None", r"returned None \(a NoneType\); let it return a list of ints"),
        ("raise SystemExit(3)", r"raised SystemExit: 3 \(.*cut.py, line 2\)"),
        ("return texts[9]", r"raised IndexError: list index out of range \(.*cut.py, line 2\)"),
    ],
)
def test_ends_that_are_none_are_refused(body: str, message: str) -> None:
    with pytest.raises(StrategyError, match=f"^the segmenter 'cut.py:ends' {message}"):
        segment(body)


def test_a_segmenter_is_named_where_it_belongs(recipe: Any) -> None:
    with pytest.raises(
        ConfigError, match=r'segments.type is "user", but segments.function is missing; name your function'
    ):
        recipe(explore={"segments": {"type": "user"}})
    with pytest.raises(ConfigError, match=r"segments.function is 'a.py:b', but segments.type is \"sentence\"; set"):
        recipe(explore={"segments": {"type": "sentence", "function": "a.py:b"}})
    with pytest.raises(
        ConfigError, match=r"explore.segments.function is 'gone.py:ends', but the file '.*' does not exist"
    ):
        build_segmenter(SegmentConfig(type="user", function="gone.py:ends"), Letters())
