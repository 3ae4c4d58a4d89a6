"""A judge over HTTP against a server of our own: good, slow, overloaded, broken, talking rubbish, dead."""

from __future__ import annotations

import asyncio
import json
import logging
import signal
import sqlite3
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from deepgrpo.config import parse_config, to_toml
from deepgrpo.errors import ConfigError, RewardError
from deepgrpo.feedback import Score
from deepgrpo.records import Prompt
from deepgrpo.rewards import build_reward
from deepgrpo.rewards.base import judge, metrics_of
from deepgrpo.rewards.judge import JudgeReward
from deepgrpo.rewards.judge_answer import read_score
from deepgrpo.rewards.judge_cache import AnswerCache, key_of
from deepgrpo.rewards.judge_client import Counts, JudgeClient, retry_after
from deepgrpo.train.loop import train
from judge_server import DROP, SILENT, Answer, JudgeServer, judge_server, says

KEY = "sk-very-secret-0123456789"
REST: dict[str, Any] = {
    "model": {"type": "pretrained", "path": "some/model"}, "data": {"type": "jsonl", "path": "train.jsonl"},
    "explore": {"type": "root"},
}  # fmt: skip
PROMPT = Prompt("p", "the input", (1, 2), "What is 3 + 4?", "7", {"level": {"name": "easy"}, "notes": ["a", "b"]})


def section(base_url: str = "http://127.0.0.1:9/v1", **keys: Any) -> dict[str, Any]:
    return {
        "type": "judge", "base_url": base_url, "model": "judge-1", "prompt": "Grade {response} for {question}",
        "scale": [0, 10], "backoff_s": 0.001, "cache": "cache", **keys,
    }  # fmt: skip


def reward_of(server: JudgeServer | None = None, **keys: Any) -> Any:
    url = {"base_url": server.base_url} if server else {}
    return build_reward(parse_config({**REST, "reward": section(**url, **keys)}).reward)


def grade(reward: Any, *responses: str) -> list[Score]:
    return reward.score([PROMPT] * len(responses), responses, [(1,)] * len(responses))  # type: ignore[no-any-return]


def taken(reward: Any) -> dict[str, float]:
    """Counts without times."""
    found = metrics_of([reward])
    return {name.removeprefix("reward/judge_"): found[name] for name in sorted(found) if name[-4:] not in ("onds", "ited")}


def counts(calls: int, *, cached: int = 0, failures: int = 0, retries: int = 0) -> dict[str, float]:
    return {"cached": cached, "calls": calls, "failures": failures, "retries": retries}


def test_a_grade_and_what_the_judge_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", f" {KEY}\n")
    with judge_server(lambda *_: says("Fair enough: 8/10.")) as server:
        reward = reward_of(
            server, system="You grade. {level.name} {notes.1}", prompt="{question} | {answer} | {response} | {{x}}",
            api_key_env="JUDGE_KEY", options={"top_p": 0.5},
        )  # fmt: skip
        assert grade(reward, "<think>{answer}</think>It is {answer}") == [Score(0.8)]
        assert server.bodies == [
            {
                "model": "judge-1", "temperature": 0.0, "max_tokens": 512, "top_p": 0.5,
                "messages": [
                    {"role": "system", "content": "You grade. easy b"},
                    # without the reasoning, and not read again as a template
                    {"role": "user", "content": "What is 3 + 4? | 7 | It is {answer} | {x}"},
                ],
            }
        ]  # fmt: skip
        assert server.headers[0]["Authorization"] == f"Bearer {KEY}"


def test_known_answers_are_not_asked_for_again() -> None:
    with judge_server(lambda _, body: says(str(len(body["messages"][0]["content"]) % 10))) as server:
        reward = reward_of(server)
        first = grade(reward, "a", "bb", "a")
        assert server.calls == 2 and first[0] == first[2] != first[1]
        assert taken(reward) == counts(2)
        assert grade(reward, "bb", "a", "ccc", "ccc")[:2] == [first[1], first[0]]
        assert taken(reward) == counts(1, cached=2) and taken(reward) == counts(0)
        reward.close()
        # another run; another model is another judge
        assert grade(reward_of(server), "a") == [first[0]] and server.calls == 3
        assert grade(reward_of(server, model="judge-2"), "a") == [first[0]] and server.calls == 4
        assert grade(reward_of(server, cache=None), "a") == [first[0]] and server.calls == 5


def test_requests_in_flight_reach_the_limit_and_never_more() -> None:
    """Nine requests, three at once: each waits until two others are there, so fewer at once would hang, and then a moment more,
    in which a fourth would come.
    """
    together = threading.Barrier(3)

    def meet(*_: Any) -> Answer:
        together.wait(60)
        server.ends.wait(0.2)
        return says("5")

    with judge_server(meet) as server:
        assert grade(reward_of(server, concurrency=3), *map(str, range(9))) == [Score(0.5)] * 9
        assert (server.calls, server.peak) == (9, 3)


def test_the_limit_holds_while_requests_time_out() -> None:
    """Every second request is never answered: it is given up and its place taken by another."""
    with judge_server(lambda number, _: SILENT if number % 2 else says("5")) as server:
        reward = reward_of(server, concurrency=2, timeout_s=0.5, retries=99)
        assert grade(reward, *map(str, range(6))) == [Score(0.5)] * 6
        assert server.peak <= 2


@pytest.mark.parametrize(
    "bad", [says("busy", 503), says("slow down", 429), (200, {}, b"<html>"), (200, {}, b'{"choices": []}'), DROP]
)
def test_a_failure_is_tried_again(bad: Answer | str) -> None:
    with judge_server(lambda number, _: bad if number < 3 else says("10")) as server:
        reward = reward_of(server, retries=3)
        assert grade(reward, "a") == [Score(1.0)]
        assert taken(reward) == counts(4, retries=3)


@pytest.mark.parametrize(
    ("behave", "problem", "calls"),
    [
        (lambda *_: says("broken", 500), "no answer", 3), (lambda *_: says("slow down", 429), "no answer", 3),
        (lambda *_: (200, {}, b"\xff garbage"), "no answer", 3), (lambda *_: DROP, "no answer", 3),
        (lambda *_: (200, {}, b'{"choices": [{"message": {"content": null}}]}'), "no answer", 3),
        (lambda *_: says("I cannot say."), "unreadable", 1), (lambda *_: says("11"), "unreadable", 1),
        (lambda *_: says("slow down", 429, Retry_After="3600"), "no answer", 1),
    ],
)  # fmt: skip
def test_what_costs_a_sample(behave: Callable[..., Answer | str], problem: str, calls: int) -> None:
    """The second response is graded by the same server: only the first is lost."""

    def one_bad(number: int, body: dict[str, Any]) -> Answer | str:
        return says("4") if "good" in body["messages"][0]["content"] else behave(number, body)

    with judge_server(one_bad) as server:
        reward = reward_of(server, retries=2, failure_value=0.25)
        assert grade(reward, "bad", "good", "bad") == [Score(0.25, problem=problem), Score(0.4), Score(0.25, problem=problem)]
        assert taken(reward) == counts(calls + 1, failures=2, retries=calls - 1)
        # nothing of it is remembered but the good answer
        assert server.calls == calls + 1
        grade(reward, "bad", "good")
        assert server.calls == 2 * calls + 1


def test_a_slow_server_costs_samples() -> None:
    with judge_server(lambda *_: SILENT) as server:
        reward = reward_of(server, retries=1, timeout_s=0.1)
        assert grade(reward, "a", "b") == [Score(0.0, problem="timeout")] * 2
        assert taken(reward) == counts(4, failures=2, retries=2)


def test_a_dead_server_costs_samples() -> None:
    with judge_server(lambda *_: SILENT) as server:
        dead = server.base_url
    reward = reward_of(base_url=dead, retries=2)
    assert grade(reward, "a", "b", "b") == [Score(0.0, problem="no answer")] * 3
    assert taken(reward) == counts(6, failures=3, retries=4)


@pytest.mark.parametrize(
    ("status", "remedy"), [(401, "reward.api_key_env"), (404, "reward.base_url and reward.model"), (400, "reward.options")]
)
def test_a_server_that_refuses_everything_ends_the_run(status: int, remedy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", KEY)
    with judge_server(lambda *_: says(f"Incorrect key: {KEY}", status)) as server:
        with pytest.raises(RewardError) as refused:
            grade(reward_of(server, api_key_env="JUDGE_KEY"), "a", "b")
        assert f"refuses requests: {status}" in str(refused.value) and remedy in str(refused.value)
        assert KEY not in f"{refused.value!r} {refused.value.__cause__!r} {refused.value.__context__!r}"


def test_a_single_refusal_costs_a_sample() -> None:
    """The context of one response is too long; and a key that expires later ends no run."""

    def behave(_: int, body: dict[str, Any]) -> Answer:
        return says("too long", 400) if "long" in body["messages"][0]["content"] else says("5")

    with judge_server(behave) as server:
        reward = reward_of(server)
        assert grade(reward, "long", "b") == [Score(0.0, problem="refused"), Score(0.5)]
        assert taken(reward) == counts(2, failures=1)
        server.behave = lambda *_: says("expired", 401)
        assert grade(reward, "c") == [Score(0.0, problem="refused")]


class Time:
    """A clock that only sleeping moves."""

    def __init__(self) -> None:
        self.now, self.slept = 0.0, []  # type: float, list[float]

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds

    def clock(self) -> float:
        return self.now


def client(server: JudgeServer, time: Time, **keys: Any) -> JudgeClient:
    config = parse_config({**REST, "reward": section(server.base_url, **keys)}).reward
    return JudgeClient(config, None, Counts(), sleep=time.sleep, clock=time.clock)  # type: ignore[arg-type]


def test_waits_before_retries() -> None:
    """1, 2, 4 seconds and then the most, each with up to half taken off; what the server asks for is waited exactly."""
    with judge_server(lambda *_: says("busy", 503)) as server:
        client(server, time := Time(), retries=5, backoff_s=1.0, max_wait_s=5.0, concurrency=1).ask([{}], lambda *_: None)
        for slept, most in zip(time.slept, (1, 2, 4, 5, 5), strict=True):
            assert most / 2 <= slept <= most
    with judge_server(lambda number, _: says("slow down", 429, Retry_After="7") if number == 0 else says("5")) as server:
        client(server, time := Time(), concurrency=1).ask([{}], lambda *_: None)
        assert time.slept == [7.0]


def test_a_pause_that_the_server_asks_for_holds_for_all() -> None:
    arrived: list[float] = []

    class Patient(Time):
        """Others get their turn before the clock moves."""

        async def sleep(self, seconds: float) -> None:
            await asyncio.sleep(0.2)
            await super().sleep(seconds)

    time = Patient()

    def behave(number: int, _: Any) -> Answer:
        arrived.append(time.now)
        return says("slow down", 429, Retry_After="9") if number == 0 else says("5")

    with judge_server(behave) as server:
        client(server, time, concurrency=1).ask([{}, {}, {}], lambda *_: None)
    assert arrived[0] == 0.0 and all(at >= 9.0 for at in arrived[1:]) and len(arrived) == 4


def test_requests_per_minute_are_spaced_also_from_one_round_to_the_next() -> None:
    arrived: list[float] = []
    time = Time()
    with judge_server(lambda *_: (arrived.append(time.now), says("5"))[1]) as server:
        asked = client(server, time, concurrency=1, requests_per_minute=30)
        asked.ask([{}, {}, {}], lambda *_: None)
        asked.ask([{}], lambda *_: None)
    assert arrived == [0.0, 2.0, 4.0, 6.0]


@pytest.mark.parametrize(
    ("header", "seconds"),
    [(None, None), ("3", 3.0), ("0.5", 0.5), ("-1", 0.0), ("soon", None), ("nan", None),
     ("Thu, 01 Jan 2026 00:01:00 GMT", 60.0),
     ("Wed, 31 Dec 2025 00:00:00 GMT", 0.0)],
)  # fmt: skip
def test_retry_after(header: str | None, seconds: float | None) -> None:
    assert retry_after(header, datetime(2026, 1, 1, tzinfo=UTC)) == seconds


@pytest.mark.parametrize(
    ("keys", "answer", "score"),
    [
        ({}, "8", 0.8), ({}, "I give it 8/10", 0.8), ({}, "7.5 out of 10.", 0.75), ({}, "First 3, then 9.", 0.9),
        ({}, "**6**", 0.6), ({}, "7.5x 2", 0.2), ({}, "7.5x", None),
        ({}, "GPT4 says nothing", None), ({}, "11", None), ({}, "-1", None), ({}, "", None),
        ({}, "1e999", None),
        ({"scale": [5, 1]}, "1", 1.0), ({"scale": [5, 1]}, "4", 0.25),
        ({"read": "regex", "pattern": "Grade: (\\d+)"}, "Grade: 3 ... Grade: 5, not 9", 0.5),
        ({"read": "regex", "pattern": "Grade: (\\d+)"}, "5", None),
        ({"read": "regex", "pattern": "(?i)verdict: (yes|no)", "words": {"yes": 10, "no": 0}}, "Verdict: YES", 1.0),
        ({"read": "json"}, '```json\n{"why": "{x}", "score": 4}\n```', 0.4),
        ({"read": "json"}, '{"score": 4} {"a": 1}', 0.4),
        ({"read": "json"}, '{"score": "4"}', 0.4), ({"read": "json"}, '{"scores": 4}', None),
        ({"read": "json"}, "{{{{ 4", None),
        ({"read": "json", "key": "grade.value"}, 'x {"grade": {"value": 2}}', 0.2),
        ({"read": "json", "key": "ok", "scale": [0, 1]}, '{"ok": true}', 1.0),
        ({"read": "json"}, '{"score": NaN}', None), ({"read": "json"}, '{"score": [4]}', None),
        ({"read": "json"}, '{"a":' * 9999, None),
    ],
)  # fmt: skip
def test_reading_the_score(keys: dict[str, Any], answer: str, score: float | None) -> None:
    assert read_score(answer, parse_config({**REST, "reward": section(**keys)}).reward) == score  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("keys", "problem"),
    [
        ({"prompt": "Grade it"}, "reward.prompt has no {response}"),
        ({"base_url": f"https://me:{KEY}@host/v1"}, "reward.base_url holds a name or a password"),
        ({"base_url": "host/v1"}, "reward.base_url is 'host/v1'; it should begin with http:// or https://"),
        ({"base_url": "http://h/v1?key=1"}, "leave out what follows ?"),
        ({"base_url": "http://h:x/v1"}, "reward.base_url is no address"),
        ({"api_key_env": KEY}, "reward.api_key_env is no name of an environment variable"),
        ({"read": "regex"}, "reward.pattern is missing"), ({"pattern": "(a)"}, 'but reward.read is "number"'),
        ({"read": "regex", "pattern": "a"}, "with 0 groups"), ({"read": "regex", "pattern": "(a"}, "no regular expression"),
        ({"words": {"yes": 1}}, "reward.words is set"), ({"scale": [1, 1]}, "its ends, worst and best"),
        ({"options": {"stream": True}}, "reward.options.stream is set"),
    ],
)  # fmt: skip
def test_recipes_that_are_refused(keys: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError) as refused:
        parse_config({**REST, "reward": section(**keys)})
    assert problem in str(refused.value) and KEY not in str(refused.value)


def test_a_key_that_is_missing_or_none(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="no such environment variable; set it: export NO_KEY=…"):
        reward_of(api_key_env="NO_KEY")
    monkeypatch.setenv("NO_KEY", f"{KEY}\nx")
    with pytest.raises(ConfigError, match="holds no key") as refused:
        reward_of(api_key_env="NO_KEY")
    assert KEY not in str(refused.value)


def test_a_placeholder_without_a_value() -> None:
    with pytest.raises(RewardError, match=r"reward.prompt has the placeholder \{rubric\}, .* name level, notes, question"):
        grade(reward_of(prompt="{rubric} {response} x_{i}"), "a")


WRITER = """
import sys
from deepgrpo.rewards.judge_cache import AnswerCache
cache = AnswerCache(sys.argv[1])
for i in range(10**9):
    cache.keep(f"key-{i}", f"{i} " * 500)
    if i == 20:
        print("going", flush=True)
"""


def test_a_killed_process_leaves_whole_answers(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WRITER, str(tmp_path / "cache")]
    writer = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert writer.stdout is not None and writer.stdout.readline() == "going\n"
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    writer.stdout.close()
    cache = AnswerCache(str(tmp_path / "cache"))
    found = cache.find([f"key-{i}" for i in range(2000)])
    assert len(found) >= 21 and all(answer == f"{key.removeprefix('key-')} " * 500 for key, answer in found.items())
    cache.keep("key-0", "new")
    cache.close()
    with sqlite3.connect(tmp_path / "cache" / "answers.sqlite") as file:
        assert file.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    file.close()


def test_a_cache_that_cannot_be_used_costs_no_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "answers.sqlite").write_bytes(b"not a database at all" * 100)
    with judge_server(lambda *_: says("5")) as server:
        reward = reward_of(server)
        assert grade(reward, "a") == grade(reward, "a") == [Score(0.5)] and server.calls == 2
    assert [record.message for record in caplog.records if "the judge is asked every time" in record.message]


def test_keys_of_requests() -> None:
    body = {"model": "m", "messages": [{"role": "user", "content": "é\ud800"}], "temperature": 0.0}
    assert key_of(body) == key_of(dict(reversed(body.items()))) != key_of({**body, "temperature": 1.0})


def test_reward_workers_share_the_limits() -> None:
    """Two workers, four requests at once in all: two each."""
    ray_free = pytest.importorskip("deepgrpo.cluster.rewards")
    meeting = threading.Barrier(4)

    def meet(*_: Any) -> Answer:
        meeting.wait(60)
        server.ends.wait(0.2)
        return says("5")

    with judge_server(meet) as server:
        reward = section(server.base_url, concurrency=5, requests_per_minute=6e6)
        config = parse_config({**REST, "reward": reward, "cluster": {"reward_workers": 2}})
        workers = [ray_free.RewardWorker(config) for _ in range(2)]
        found: list[Any] = []
        threads = [
            threading.Thread(
                target=lambda w=w, n=n: found.append(w.score([PROMPT] * 4, [f"{n}{i}" for i in range(4)], [(1,)] * 4))
            )
            for n, w in enumerate(workers)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert server.peak == 4
        assert [scores for scores, _ in found] == [[Score(0.5)] * 4] * 2
        assert sum(metrics["reward/judge_calls"] for _, metrics in found) == 8
        assert workers[0].reward._client._config.requests_per_minute == 3e6
    with pytest.raises(ConfigError, match=r"reward.concurrency is 1, but cluster.reward_workers = 2 share it"):
        parse_config({**REST, "reward": section(concurrency=1), "cluster": {"reward_workers": 2}})


def test_a_pool_of_workers_knows_parts_and_metrics() -> None:
    """Truncated responses are scored by the driver, and metrics come with the scores of the workers."""
    ray_free = pytest.importorskip("deepgrpo.cluster.rewards")
    parts = {"a": {"type": "exact", "weight": 2.0}, "b": section()}
    pool = object.__new__(ray_free.RewardPool)
    pool._local = build_reward(parse_config({**REST, "reward": {"parts": parts}}).reward)
    pool._metrics = Counter({"reward/judge_calls": 3.0})
    (cut,) = judge(pool, 0.5, [PROMPT], ["x"], [(1,)], ["length"])
    assert (cut.value, cut.judged, list(cut.parts)) == (1.5, 0.5, ["a", "b"])
    assert metrics_of([pool]) == {"reward/judge_calls": 3.0} and metrics_of([pool]) == {}


def test_a_run_with_a_judge_as_a_part(recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    """A judge that is broken in five ways at once: the run takes its steps, counts, and writes the key nowhere."""
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("JUDGE_KEY", KEY)
    mine = "def odd(completion_ids, **_):\n    return [float(sum(ids) % 2) for ids in completion_ids]\n"
    (tmp_path / "mine.py").write_text(mine)
    ways = [says("8"), says("busy", 503), says(KEY, 429), (200, {}, b"garbage"), DROP, says("no idea"), says(KEY, 400)]
    with judge_server(lambda number, _: ways[number % len(ways)]) as server:
        made = recipe(
            run={"name": "judged", "steps": 2, "prompts_per_step": 4}, log={"trees_every": 1},
            explore={"type": "deep", "num_rollouts": 4, "branches_per_pivot": 3, "segments": {"type": "tokens", "size": 2}},
            sampling={"max_new_tokens": 6},
            reward={
                "type": "weighted", "success": "odd", "truncated_value": "none",
                "parts": {
                    "odd": {"type": "user", "function": f"{tmp_path}/mine.py:odd"},
                    "style": {**section(server.base_url, api_key_env="JUDGE_KEY", retries=1), "weight": 0.5},
                },
            },
        )  # fmt: skip
        run = train(made)
        assert KEY not in to_toml(made)
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][-2:]
        assert sum(line["reward/judge_calls"] for line in lines) == server.calls > 20
        assert server.peak <= 8
        for line in lines:
            assert line["reward/judge_failures"] == line["reward/problems"] == line["reward/style_problems"] > 0
            assert line["main/reward"] == pytest.approx(line["reward/odd"] + 0.5 * line["reward/style"])
    for path in [*run.rglob("*"), *Path("cache").rglob("*")]:
        assert path.is_dir() or KEY.encode() not in path.read_bytes()
    assert KEY not in caplog.text


def test_an_interrupt_ends_the_wait() -> None:
    """Ctrl-C while the judge is silent: the exception comes out, and the requests are given up."""
    arrived = threading.Event()

    def behave(*_: Any) -> str:
        arrived.set()
        return SILENT

    with judge_server(behave) as server:
        main = threading.main_thread().ident
        assert main is not None
        threading.Thread(target=lambda: (arrived.wait(60), signal.pthread_kill(main, signal.SIGINT)), daemon=True).start()
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            with pytest.raises(KeyboardInterrupt):
                grade(reward_of(server, timeout_s=600), "a")
        finally:
            signal.signal(signal.SIGINT, before)
    for thread in threading.enumerate():
        if thread.name == "deepgrpo-judge":
            thread.join(60)  # it has been told to end
            assert not thread.is_alive()


def test_a_caller_with_an_event_loop_of_its_own() -> None:
    async def cell() -> list[Score]:
        return grade(reward_of(server), "a")

    with judge_server(lambda *_: says("5")) as server:
        assert asyncio.run(cell()) == [Score(0.5)]
    assert isinstance(reward_of(), JudgeReward)
