"""reasoning-gym: an answer is read, never run."""

from __future__ import annotations

import importlib
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from deepgrpo.config import ReasoningGymData, TaskReward
from deepgrpo.prompts.gym import build_gym
from deepgrpo.prompts.gym_guard import check_formula, evaluate, parse_expression
from deepgrpo.records import Prompt
from deepgrpo.rewards.task import TaskVerifierReward

pytestmark = pytest.mark.skipif(find_spec("reasoning_gym") is None, reason="reasoning_gym is not installed")

EVALUATING = (
    "countdown", "puzzle24", "polynomial_multiplication", "simple_integration", "intermediate_integration", "spiral_matrix",
    "binary_matrix", "n_queens", "string_insertion",
)  # fmt: skip
"""Tasks of reasoning-gym 0.1.25 whose `score_answer` evaluates the answer."""

INJECTIONS = (
    "__import__('os').system('touch {canary}')", "(open('{canary}', 'w'))", "[open('{canary}', 'w')]",
    "exec(\"open('{canary}', 'w')\")", "1 if open('{canary}', 'w') else 2", "[[__import__('os').mkdir('{canary}')]]",
    "(lambda: open('{canary}', 'w'))()", "print(1) or __import__('pathlib').Path('{canary}').touch()",
    "().__class__.__base__.__subclasses__()[0]", "sympify(\"open('{canary}', 'w')\")", "S(\"open('{canary}', 'w')\")",
    "f'{{open(\"{canary}\", \"w\")}}'", "[x for x in [open('{canary}', 'w')]]",
    "globals()['__builtins__']['open']('{canary}', 'w')",
)  # fmt: skip


@pytest.fixture(scope="module", params=EVALUATING)
def task(request: pytest.FixtureRequest) -> Any:
    return build_gym(ReasoningGymData(task=request.param, size=3, seed=1))


def test_nothing_in_an_answer_runs(task: Any, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    for row in task.rows():
        for injection in INJECTIONS:
            prompt = Prompt(row.id, row.question, (1,), row.question, row.answer, row.columns)
            answer = injection.format(canary=canary)
            try:
                score = task.verify(prompt, f"<answer>{answer}</answer>").value
            except Exception:
                score = 0.0
            assert score < 0.5 and not canary.exists(), answer


def test_right_answers_stay_right(task: Any) -> None:
    for row in task.rows():
        entry = dict(row.columns)
        answer = row.answer if row.answer is not None else entry["metadata"].get("expression")
        if answer is not None:
            assert task.dataset.score_answer(answer=str(answer), entry=entry) == 1.0, answer


def test_expressions_of_countdown() -> None:
    task = build_gym(ReasoningGymData(task="countdown", size=3, seed=1))
    for index in range(3):
        entry = task.dataset[index]
        assert task.dataset.score_answer(answer=entry["metadata"]["expression"], entry=entry) == 1.0


def test_the_worker_is_guarded_as_well(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    task = build_gym(ReasoningGymData(task="countdown", size=1, seed=1))
    (row,) = task.rows()
    reward = TaskVerifierReward(TaskReward(), task)
    try:
        prompt = Prompt(row.id, row.question, (1,), row.question, row.answer, row.columns)
        (score,) = reward.score([prompt], [f"<answer>__import__('os').system('touch {canary}')</answer>"], [(1,)])
    finally:
        reward.close()
    assert score.value < 0.5 and not canary.exists()


def test_no_other_module_evaluates() -> None:
    """A new version of reasoning-gym that evaluates answers elsewhere is noticed here."""
    folder = Path(str(importlib.import_module("reasoning_gym").__file__)).parent
    pattern = re.compile(r"(?<![\w.])(?:eval|exec)\(|parse_expr\(|sympify\(|parse_latex\(|pickle\.loads\(|os\.system\(")
    found = {p.stem for p in folder.rglob("*.py") if pattern.search(p.read_text(encoding="utf-8"))}
    # these evaluate what they generated themselves; propositional_logic has a parser of its own
    trusted = {
        "codeio", "number_sorting", "generators_00_49", "generators_50_99", "bitwise_arithmetic", "basic_arithmetic",
        "propositional_logic",
    }  # fmt: skip
    assert found <= set(EVALUATING) | trusted


def test_formulas() -> None:
    for text in (
        "x**2/2 + C",
        "(1 + 2)*3",
        "sin(x)*exp(-x) + pi",
        "2.5e3*y",
        "sqrt(2)",
        "x^2",
        "abs(-3)",
        "Rational(1, 3)",
    ):
        check_formula(text)
    for text in ("x.diff()", "'a'", "a[0]", "lambda: 1", "x = 2", "a := 3", "__x__", "open(x)", "preview(x)", "{1}", "f'{x}'",
                 "x;y",
                 "test()", "(1", "@x"):  # fmt: skip
        with pytest.raises(ValueError, match=r"formula|x"):
            check_formula(text)
    assert str(parse_expression("x + x")) == "2*x"


def test_literals() -> None:
    assert evaluate("[['Q', '_'], ['_', 'Q']]") == [["Q", "_"], ["_", "Q"]]
    assert evaluate("(1 + 2) * 3 // 2") == 4
    for text in ("x", "f(1)", "a.b", "[i for i in ()]", "f'{1}'", "lambda: 1", "[1][0]"):
        with pytest.raises(ValueError, match="in an answer"):
            evaluate(text)
