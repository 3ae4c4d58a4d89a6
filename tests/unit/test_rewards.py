"""Rewards: what they say of a response, and what a bad check or a bad function can do to a run (little)."""

from __future__ import annotations

import json
import multiprocessing
import sys
import textwrap
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from functools import partial

import pebble
import pytest

from deepgrpo.answers.places import find_answer
from deepgrpo.config import ExactReward, MathReward, TaskReward, UserReward
from deepgrpo.errors import ConfigError, RewardError
from deepgrpo.feedback import Score
from deepgrpo.records import Prompt
from deepgrpo.rewards import build_reward
from deepgrpo.rewards.base import Voting, judge, references
from deepgrpo.rewards.math_answer import MathAnswerReward
from deepgrpo.rewards.workers import Workers, limit_memory
from tiny import SHARED_DATA


def prompt(answer=None, name="p", accepted=(), **columns) -> Prompt:
    return Prompt(name, "text of " + name, (1,), "q", answer, columns, tuple(accepted))


def ask(reward, pairs) -> list[Score]:
    prompts = [item if isinstance(item, Prompt) else prompt(item) for item, _ in pairs]
    return reward.score(prompts, [text for _, text in pairs], [(1, 2)] * len(pairs))


class Fixed:
    """A reward that says how it was asked."""

    def __init__(self):
        self.asked: list[str] = []

    def score(self, prompts, completions, completion_ids):
        assert len(prompts) == len(completions) == len(completion_ids)
        self.asked += completions
        return [Score(float(text)) for text in completions]

    def close(self): ...


class TestJudge:
    ROWS = ([prompt()] * 4, ["1", "2", "3", "4"], [()] * 4)

    def test_truncated_responses_are_not_asked_about(self):
        reward = Fixed()
        scores = judge(reward, -0.5, *self.ROWS, ["length", "stop", "length", "stop"])
        assert scores == [Score(-0.5, checked=False), Score(2.0), Score(-0.5, checked=False), Score(4.0)]
        assert scores[0].parsed
        assert reward.asked == ["2", "4"]

    def test_none_scores_them_like_any_other(self):
        scores = judge(Fixed(), None, *self.ROWS, ["length", "stop", "length", "stop"])
        assert [score.value for score in scores] == [1, 2, 3, 4]

    def test_nothing_left_to_ask(self):
        reward = Fixed()
        assert judge(reward, 0.0, *self.ROWS, ["length"] * 4) == [Score(0.0, checked=False)] * 4
        assert judge(reward, 0.0, [], [], [], []) == []
        assert reward.asked == []


def test_references():
    assert references(prompt("5"), "x") == ("5",)
    assert references(prompt("5", accepted=["5", "five"]), "x") == ("5", "five")
    with pytest.raises(RewardError, match=r"prompt 'p' has no reference answer.*set data.columns.answer"):
        references(prompt(), 'reward.type = "exact"')


@pytest.mark.parametrize(
    ("marker", "completion", "value", "parsed"),
    [
        ("####", "so\n#### 4 2 \nbye", 1.0, True),
        ("####", "#### 1\n####  4   2", 1.0, True),
        ("####", "#### 4 2.", 0.0, True),
        ("####", "4 2", 0.0, False),
        ("", " 4\n2 ", 1.0, True),
        ("Answer:", "Answer: 4 2", 1.0, True),
    ],
)
def test_exact(marker, completion, value, parsed):
    reward = build_reward(ExactReward(marker=marker))
    assert ask(reward, [("4 2", completion)]) == [Score(value, parsed)]
    reward.close()


def test_exact_accepts_any_of_several():
    reward = build_reward(ExactReward())
    several = prompt("5", accepted=["5", "five"])
    assert [s.value for s in ask(reward, [(several, "#### five"), (several, "#### 5"), (several, "#### 6")])] == [
        1,
        1,
        0,
    ]


@pytest.mark.parametrize(
    ("tags", "text", "completion", "value"),
    [
        ("auto", "q", "<think>#### 5", 0),
        ("auto", "q", "<think>#### 4</think>#### 5", 1),
        ("auto", "q<think>\n", "#### 5", 0),  # the chat template opens the reasoning
        ("auto", "q<think>\n", "#### 4</think>#### 5", 1),
        ("auto", "q<think></think>", "#### 5", 1),  # the chat template switches it off
        ("auto", "q", "<reason>#### 5", 1),
        (("<reason>", "</reason>"), "q", "<reason>#### 5", 0),
        (("<reason>", "</reason>"), "q", "<think>#### 5", 1),
        (None, "q", "<think>#### 5", 1),
    ],
)
def test_reasoning_tags(tags, text, completion, value):
    asked = Prompt("p", text, (1,), "q", "5", {})

    class Task:
        def verify(self, prompt, completion):
            return Score(float("5" in completion))

    for reward in (
        build_reward(ExactReward(reasoning_tags=tags)),
        build_reward(MathReward(reasoning_tags=tags)),
        build_reward(TaskReward(reasoning_tags=tags), Task()),
    ):
        assert [score.value for score in reward.score([asked], [completion], [(1,)])] == [value]
        assert reward.vote(asked, completion) == ("5" if value else None)


def test_reasoning_tags_in_a_recipe():
    assert MathReward.model_validate({"reasoning_tags": "none"}).reasoning_tags is None
    assert MathReward.model_validate({"reasoning_tags": ["<a>", "</a>"]}).reasoning_tags == ("<a>", "</a>")


class TestTask:
    class Half:
        def verify(self, prompt, completion):
            if completion == "raise":
                raise ValueError("no")
            return Score(0.5, parsed=completion != "nothing")

    def test_threshold(self):
        pairs = [("1", "x"), ("1", "nothing")]
        assert ask(build_reward(TaskReward(), self.Half()), pairs) == [Score(0.0), Score(0.0, parsed=False)]
        assert ask(build_reward(TaskReward(threshold=0.5), self.Half()), pairs)[0] == Score(0.5)

    def test_a_verifier_that_raises_costs_its_sample_only(self):
        scores = ask(build_reward(TaskReward(threshold=0.0), self.Half()), [("1", "raise"), ("1", "x")])
        assert scores == [Score(0.0, problem="raised"), Score(0.5)]

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_a_value_that_is_not_finite_is_a_problem(self, value):
        class Odd:
            def verify(self, prompt, completion):
                return Score(value)

        assert ask(build_reward(TaskReward(), Odd()), [("1", "x")]) == [Score(0.0, problem="not finite")]

    def test_no_task(self):
        with pytest.raises(ConfigError, match=r'reward.type is "task", but the data brings no verifier'):
            build_reward(TaskReward())


def test_find_answer():
    assert find_answer("x \\boxed{ 18. }", "boxed") == "18."
    assert find_answer("x \\boxed{ }", "boxed") is None
    assert find_answer("#### 1\n#### \\$18.\nbecause", "gsm8k") == "\\$18."
    assert find_answer("18", "gsm8k") is find_answer("####\n", "gsm8k") is find_answer(" ", "any") is None
    assert find_answer("18", "any") == "18"


@pytest.fixture(scope="module")
def rewards():
    """One maths reward per format: its workers take half a second to start."""
    made = {each: MathAnswerReward(MathReward(answer_format=each, timeout_s=20)) for each in ("boxed", "gsm8k", "any")}
    yield made
    for reward in made.values():
        reward.close()


@pytest.fixture
def boxed(rewards):
    return rewards["boxed"]


class TestMath:
    @pytest.mark.parametrize(
        ("reference", "answer", "value"),
        [
            ("25", "25", 1.0),
            ("025", "25", 1.0),
            ("25", "025", 1.0),
            ("25", "26", 0.0),
            ("\\frac{1}{2}", "0.5", 1.0),
            ("1/2", "\\dfrac12", 1.0),
            ("$\\frac{1}{2}$", "\\frac{2}{4}", 1.0),
            ("\\left( 3, \\frac{\\pi}{2} \\right)", "(3, \\pi/2)", 1.0),
            ("\\left( 3, \\frac{\\pi}{2} \\right)", "2", 0.0),
            ("18.", "18", 1.0),
            ("18", "18.", 1.0),
            ("\\$18.90", "18.90", 1.0),
            ("1,000", "1000", 1.0),
            ("x+1", "1+x", 1.0),
            ("\\text{east}", "\\text{east}", 1.0),
        ],
    )
    def test_boxed(self, boxed, reference, answer, value):
        assert ask(boxed, [(reference, f"Thus \\boxed{{{answer}}}.")]) == [Score(value)]

    def test_no_box_no_answer(self, boxed):
        assert ask(boxed, [("25", "It is 25."), ("25", "\\boxed{25")]) == [Score(0.0, parsed=False)] * 2

    def test_accepted(self, boxed):
        several = prompt("5", accepted=["5", "6"])
        assert [s.value for s in ask(boxed, [(several, f"\\boxed{{{n}}}") for n in (5, 6, 7)])] == [1, 1, 0]

    @pytest.mark.parametrize(
        ("answer_format", "completion", "score"),
        [
            ("gsm8k", "so\n#### 1,000", Score(1.0)),
            ("gsm8k", "#### 5\n#### $1,000.\nDone, 7.", Score(1.0)),
            ("gsm8k", "#### \\$1000", Score(1.0)),
            ("gsm8k", "#### 1000.00", Score(1.0)),
            ("gsm8k", "#### 1000 apples", Score(1.0)),
            ("gsm8k", "#### 100", Score(0.0)),
            ("gsm8k", "1000", Score(0.0, parsed=False)),
            ("gsm8k", "#### none", Score(0.0, parsed=False)),
            ("any", "The answer is 1000.", Score(1.0)),
            ("any", "The answer is $\\boxed{10^3}$.", Score(1.0)),
            ("any", "I cannot say", Score(0.0, parsed=False)),
            ("any", "$1,3,\\ldots,2n-1$", Score(0.0, problem="not comparable")),
        ],
    )
    def test_other_formats(self, rewards, answer_format, completion, score):
        assert ask(rewards[answer_format], [("1000", completion)]) == [score]

    def test_numbers_need_no_worker(self):
        reward = MathAnswerReward(MathReward(), check=None)
        assert [s.value for s in ask(reward, [("1e-05", "#### 0.00001"), ("3", "it is - 3"), ("x", "x")])] == [1, 0, 1]
        reward.close()

    def test_empty(self, boxed):
        assert boxed.score([], [], []) == []

    def test_no_reference(self, boxed):
        with pytest.raises(RewardError, match="no reference answer"):
            ask(boxed, [(None, "\\boxed{1}")])

    @pytest.mark.skipif(not SHARED_DATA.is_dir(), reason="the shared data sets are not here")
    @pytest.mark.parametrize("name", ["aime24", "amc", "math500", "minerva"])
    def test_every_reference_accepts_itself(self, boxed, name):
        rows = [json.loads(line) for line in (SHARED_DATA / f"{name}.jsonl").open(encoding="utf-8")]
        scores = ask(boxed, [(row["answer"], f"\\boxed{{{row['answer']}}}") for row in rows])
        assert [row["answer"] for row, score in zip(rows, scores, strict=True) if score != Score(1.0)] == []


CHECKS = """
import os, signal, time

def check(text, references):
    if text.startswith("hang"):
        time.sleep(1000)
    if text.startswith("deaf"):  # as C code that runs on whatever the signal
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        while True:
            time.sleep(1000)
    if text.startswith("exit"):
        os._exit(1)
    if text.startswith("big"):
        bytearray(5 << 30)
        return True, True
    if text.startswith("quit"):
        raise SystemExit(0)
    if text.startswith("segfault"):
        os.kill(os.getpid(), signal.SIGSEGV)
    if text.startswith("raise"):
        raise ValueError("no")
    if text.startswith("odd"):
        raise type("LocalError", (Exception,), {})(lambda: 0)  # cannot be pickled
    time.sleep(float(text))
    with open(references[0], "a") as file:
        file.write(text + "\\n")
    return True, True
"""


def make_workers(prepare=limit_memory, **fields) -> Workers:
    # the preloaded module is that of the maths reward: all tests of a process share the server that workers are forked from
    return Workers("the test", prepare, "math_verify", **fields)


class TestIllBehavedChecks:
    @pytest.fixture
    def check(self, tmp_path, monkeypatch):
        # workers import a check by its name, so it needs a module on the path that they inherit
        (tmp_path / "ill_behaved_checks.py").write_text(CHECKS)
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, "ill_behaved_checks", raising=False)
        from ill_behaved_checks import check

        yield check
        sys.modules.pop("ill_behaved_checks", None)

    def run(self, check, tmp_path, texts, **fields):
        workers = make_workers(**{"timeout_s": 2.0, **fields})
        try:
            scores = workers.run([partial(check, text, (str(tmp_path / "log"),)) for text in texts])
            again = workers.run([partial(check, "0.001", (str(tmp_path / "log"),))])
        finally:
            workers.close()
        assert again == [Score(1.0)]  # they go on
        return scores

    def test_each_costs_its_own_sample(self, check, tmp_path):
        texts = ["0", "exit", "0.01", "raise", "0.02", "hang", "0.03", "odd", "segfault", "0.04", "quit", "big"]
        scores = self.run(check, tmp_path, texts)
        assert [score.problem for score in scores] == [
            None, "crash", None, "raised", None, "timeout", None, "raised", "crash", None, "raised", "raised",
        ]  # fmt: skip
        assert [score.value for score in scores] == [1, 0, 1, 0, 1, 0, 1, 0, 0, 1, 0, 0]

    @pytest.mark.parametrize("workers", [1, 2])
    def test_many_crashes_in_a_row(self, check, tmp_path, workers):
        texts = [item for i in range(3) for item in (f"exit {i}", f"0.00{i}")]
        scores = self.run(check, tmp_path, texts, count=workers)
        assert [score.problem for score in scores] == ["crash", None] * 3

    def test_a_worker_that_ignores_the_polite_signal_is_killed(self, check, tmp_path, monkeypatch):
        monkeypatch.setattr(pebble.CONSTS, "term_timeout", 0.2)  # seconds from SIGTERM to SIGKILL: 3 by default
        scores = self.run(check, tmp_path, ["deaf", "0"])
        assert [score.problem for score in scores] == ["timeout", None]

    def test_waiting_behind_others_is_not_counted(self, check, tmp_path):
        # limit 2 s, 8 checks of 0.3 s, one worker: the last one waits 2.1 s, and none needs a quarter of the limit
        scores = self.run(check, tmp_path, [f"0.30{i}" for i in range(8)], count=1)
        assert {score.problem for score in scores} == {None}

    def test_equal_checks_run_once(self, check, tmp_path):
        reward = MathAnswerReward(MathReward(timeout_s=20), check)
        try:
            scores = ask(reward, [(str(tmp_path / "log"), text) for text in ("0", "0", "0.01", "0", "big")])
        finally:
            reward.close()
        assert scores == [Score(1.0)] * 4 + [Score(0.0, problem="raised")]  # 5 GiB are more than a worker may have
        assert (tmp_path / "log").read_text().split() == ["0", "0.01"]

    def test_checks_lost_with_a_broken_pool_run_again(self, monkeypatch):
        class LosesTheFirstBatch:
            """Stands in for pebble's pool, which breaks only if a worker dies at the wrong instant."""

            pools = 0

            def __init__(self, *arguments, **options):
                type(self).pools += 1
                self.active = type(self).pools > 1

            def schedule(self, function, args=(), timeout=None):
                future = Future()
                if self.active:
                    future.set_result(function(*args))
                else:
                    future.set_exception(BrokenProcessPool())
                return future

            def stop(self): ...

            def join(self): ...

        monkeypatch.setattr("deepgrpo.workers.ProcessPool", LosesTheFirstBatch)
        assert make_workers().run([lambda: (1.0, True), lambda: (0.5, True)]) == [Score(1.0), Score(0.5)]

    def test_workers_that_cannot_start_are_an_error(self, check):
        workers = make_workers(prepare=json.loads)  # an initializer that raises
        with pytest.raises(RewardError, match="the worker process of the test cannot start"):
            workers.run([partial(check, "0", ("",))])
        workers.close()

    def test_close_stops_the_workers(self, check, tmp_path):
        before = set(multiprocessing.active_children())
        workers = make_workers()
        workers.run([partial(check, "0", (str(tmp_path / "log"),))])
        started = set(multiprocessing.active_children()) - before
        assert started
        workers.close()
        workers.close()
        assert not started & set(multiprocessing.active_children())


class TestTaskInWorkers:
    """A verifier that brings its checks as functions has them run in processes that can be killed."""

    @pytest.fixture
    def task(self, tmp_path, monkeypatch):
        (tmp_path / "remote_task.py").write_text(REMOTE)
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, "remote_task", raising=False)
        import remote_task

        yield remote_task.Task()
        sys.modules.pop("remote_task", None)

    def test_each_costs_its_own_sample(self, task):
        reward = build_reward(TaskReward(threshold=0.25, timeout_s=2.0), task)
        try:
            texts = ["0.5", "hang", "raise", "nan", "", "0.1", "1"]
            scores = ask(reward, [("1", text) for text in texts])
            assert scores == [
                Score(0.5), Score(0.0, problem="timeout"), Score(0.0, problem="raised"),
                Score(0.0, problem="not finite"), Score(0.0, parsed=False), Score(0.0), Score(1.0),
            ]  # fmt: skip
            assert ask(reward, [("1", "1")]) == [Score(1.0)]  # the reward goes on
        finally:
            reward.close()
            reward.close()


REMOTE = """
import time
from dataclasses import dataclass
from functools import partial

ready = False

def prepare():
    global ready
    ready = True

def check(text):
    assert ready
    if text == "hang":
        time.sleep(1000)
    return float(text), True

class Task:
    def verify(self, prompt, completion):
        raise AssertionError("not in this process")

    def preparation(self):
        return prepare

    def check(self, prompt, completion):
        return partial(check, completion) if completion else None
"""


class TestVotes:
    """maj@k votes over what the reward reads."""

    def votes(self, reward, *texts, answer="7"):
        assert isinstance(reward, Voting)
        return [reward.vote(prompt(answer), text) for text in texts]

    def test_math(self):
        boxed = MathAnswerReward(MathReward(answer_format="boxed"))
        texts = ("\\boxed{1,200} \\boxed{3", "#### 7", "\\boxed{5}\n#### 7")
        assert self.votes(boxed, *texts) == ["1200", None, "5"]
        gsm8k = MathAnswerReward(MathReward(answer_format="gsm8k"))
        assert self.votes(gsm8k, "\\boxed{5}\n#### 7\nbecause", "7") == ["7", None]
        anywhere = MathAnswerReward(MathReward())
        assert self.votes(anywhere, "so 7.", "#### 8", "no idea") == ["7", "8", None]

    def test_exact(self):
        reward = build_reward(ExactReward(marker="Answer:"))
        assert self.votes(reward, "\\boxed{1} Answer: 4  2 \nbye", "42") == ["4 2", None]

    def test_task(self):
        class Spelled:
            def verify(self, prompt, completion):
                return Score(1.0)

            def vote(self, prompt, completion):
                return completion[::-1]

        assert self.votes(build_reward(TaskReward(), Spelled()), "abc") == ["cba"]
        assert self.votes(build_reward(TaskReward(), TestTask.Half()), "so 7") == ["7"]  # a task that does not say

    def test_a_users_function_does_not_say(self):
        assert not isinstance(build_reward(UserReward(function="statistics:mean")), Voting)


class TestUser:
    def make(self, tmp_path, body: str, name="reward", **fields):
        path = tmp_path / "mine.py"
        path.write_text(textwrap.dedent(body))
        return build_reward(UserReward(function=f"{path}:{name}", **fields))

    def test_what_the_function_is_given(self, tmp_path):
        reward = self.make(
            tmp_path,
            """
            import json, pathlib
            def reward(prompts, completions, completion_ids, **columns):
                seen = dict(prompts=prompts, completions=completions, completion_ids=completion_ids, **columns)
                pathlib.Path(__file__).with_name("seen.json").write_text(json.dumps(seen))
                return [len(c) for c in completions]
            """,
        )
        rows = [prompt("1", "a", level=3, question="q"), prompt("2", "b", tag="x", accepted=["2", "two"])]
        assert reward.score(rows, ["x", "yy"], [(1,), (2, 3)]) == [Score(1.0), Score(2.0)]
        assert json.loads((tmp_path / "seen.json").read_text()) == {
            "prompts": ["text of a", "text of b"],
            "completions": ["x", "yy"],
            "completion_ids": [[1], [2, 3]],
            "answer": ["1", ["2", "two"]],
            "level": [3, None],
            "question": ["q", None],
            "tag": [None, "x"],
        }
        assert reward.score([], [], []) == []

    def test_a_column_does_not_hide_the_reference(self, tmp_path):
        # as in GSM8K: the column `answer` is a solution, the reference what follows its last ####
        reward = self.make(tmp_path, "def reward(answer, **columns):\n    return [float(a == '72') for a in answer]")
        row = Prompt("p", "text", (1,), "q", "72", {"answer": "48 + 24 = 72\n#### 72", "prompts": "x"})
        assert reward.score([row], ["x"], [(1,)]) == [Score(1.0)]

    @pytest.mark.parametrize(
        "signature", ["completions, answer", "*, answer, completions", "completions, answer, trainer_state=None"]
    )
    def test_without_kwargs_only_what_is_named(self, tmp_path, signature):
        reward = self.make(
            tmp_path, f"def reward({signature}):\n    return [c == a for c, a in zip(completions, answer)]"
        )
        assert ask(reward, [("1", "1"), ("1", "2")]) == [Score(1.0), Score(0.0)]

    def test_a_parameter_that_the_data_lacks(self, tmp_path):
        reward = self.make(tmp_path, "def reward(completions, solution):\n    return [0]")
        with pytest.raises(
            RewardError, match="asks for 'solution', which the data does not have; it may ask for prompts"
        ):
            ask(reward, [("1", "1")])

    def test_async_none_and_not_finite(self, tmp_path):
        reward = self.make(
            tmp_path,
            """
            import asyncio
            async def reward(completions, **kwargs):
                await asyncio.sleep(0)
                return [None, float("nan"), float("inf"), True, 0.5]
            """,
        )
        assert ask(reward, [("1", "x")] * 5) == [
            Score(0.0, parsed=False),
            Score(0.0, problem="not finite"),
            Score(0.0, problem="not finite"),
            Score(1.0),
            Score(0.5),
        ]

    def test_arrays_are_fine(self, tmp_path):
        reward = self.make(tmp_path, "import numpy as np\ndef reward(completions):\n    return np.float32([0.5, 1])")
        assert ask(reward, [("1", "x")] * 2) == [Score(0.5), Score(1.0)]
        reward = self.make(
            tmp_path, "import numpy as np\ndef reward(completions):\n    return [np.float32(0.5), np.int64(1)]"
        )
        assert ask(reward, [("1", "x")] * 2) == [Score(0.5), Score(1.0)]

    def test_messages(self, tmp_path):
        reward = self.make(
            tmp_path,
            """
            import json, pathlib
            def reward(prompts, completions, answer, **columns):
                pathlib.Path(__file__).with_name("seen.json").write_text(json.dumps([prompts, completions, answer]))
                return [1.0 for _ in completions]
            """,
            format="messages",
        )
        assert ask(reward, [("1", "x")]) == [Score(1.0)]
        assert json.loads((tmp_path / "seen.json").read_text()) == [
            [[{"role": "user", "content": "q"}]], [[{"role": "assistant", "content": "x"}]], ["1"],
        ]  # fmt: skip

    def test_trls_own_functions(self):
        pytest.importorskip("trl")
        completions = ["<think>1/2?</think> \\boxed{\\frac{1}{2}}", "<think>1/2?</think> \\boxed{2}", "\\boxed{0.5}"]
        rows = [prompt("x", solution="$\\frac{1}{2}$")] * 3

        def scores(name):
            reward = build_reward(UserReward(function=f"trl.rewards:{name}", format="messages"))
            return [score.value for score in reward.score(rows, completions, [(1,)] * 3)]

        assert scores("think_format_reward") == [1.0, 1.0, 0.0]
        assert scores("accuracy_reward") == [1.0, 0.0, 1.0]
        assert scores("reasoning_accuracy_reward") == [1.0, 0.0, 0.0]

    @pytest.mark.parametrize(
        ("result", "message"),
        [
            ("[1.0]", "returned 1 rewards for 2 responses; return one per response"),
            ("1.0", r"returned 1.0 \(a float\); return a list"),
            ("None", r"returned None \(a NoneType\)"),
            ("'ab'", r"returned 'ab' \(a str\)"),
            ("[1.0, 'good']", r"returned 'good' \(a str\) for response 1; return a number or None"),
            ("[1.0, [2]]", r"returned \[2\] \(a list\) for response 1"),
            ("[1, int('x')]", r"raised ValueError: invalid literal .*\n.*mine.py"),
            ("exit(3)", "raised SystemExit: 3"),
        ],
    )
    def test_broken_contracts(self, tmp_path, result, message):
        reward = self.make(tmp_path, f"def reward(completions, **kwargs):\n    return {result}")
        with pytest.raises(RewardError, match=r"(?s)the reward function '.*mine.py:reward' " + message):
            ask(reward, [("1", "x")] * 2)

    def test_a_hang_ends_in_an_error(self, tmp_path):
        reward = self.make(tmp_path, "import time\ndef reward(**kwargs):\n    time.sleep(3)", timeout_s=0.2)
        with pytest.raises(RewardError, match=r"did not return within reward.timeout_s = 0.2 s for 1 responses"):
            ask(reward, [("1", "x")])

    @pytest.mark.parametrize(
        ("function", "message"),
        [
            ("reward", 'write "package.module:name"'),
            (":reward", 'write "package.module:name"'),
            ("missing_dir/f.py:reward", "does not exist; a relative path starts where you run"),
            ("no_such_package.sub:reward", "no module 'no_such_package'; install it"),
            ("json.nope:reward", "no module 'json.nope'"),
            ("json:nope", "json does not have it; it has .*loads"),
            ("math:pi", "has it as 3.14159.*which cannot be called"),
        ],
    )
    def test_functions_that_are_not_there(self, function, message):
        with pytest.raises(ConfigError, match=message):
            build_reward(UserReward(function=function))

    @pytest.mark.parametrize(("body", "message"), [("1/0", "ZeroDivisionError.*line 1"), ("def (", "SyntaxError")])
    def test_a_file_that_fails(self, tmp_path, body, message):
        with pytest.raises(ConfigError, match=f"running the file failed: {message}"):
            self.make(tmp_path, body)

    def test_a_module_and_a_method(self):
        reward = build_reward(UserReward(function="statistics:mean"))
        with pytest.raises(RewardError, match="asks for 'data'"):
            ask(reward, [("1", "x")])
        assert build_reward(UserReward(function="collections:Counter.fromkeys")) is not None
