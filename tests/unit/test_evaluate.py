"""Evaluation worked by hand: a scripted engine says what is sampled, so every figure can be counted on fingers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pytest

from deepgrpo import rng
from deepgrpo.config import SamplingConfig
from deepgrpo.engines.base import SampleStats, SamplingParams
from deepgrpo.errors import ConfigError, DataError
from deepgrpo.eval.evaluate import evaluate
from deepgrpo.feedback import Score
from deepgrpo.records import Completion, FinishReason, Prompt, SampleRequest


class Characters:
    """A tokenizer whose tokens are code points; 0 is the end."""

    def decode(self, tokens: Sequence[int], skip_special_tokens: bool) -> str:
        assert skip_special_tokens
        return "".join(chr(token) for token in tokens if token)


@dataclass
class Scripted:
    """Continues a prompt with the texts written for it: the first greedily, the others in the order of the keys."""

    texts: dict[tuple[int, ...], list[str]]
    exact: bool = True
    calls: list[tuple[list[SampleRequest], SamplingParams]] = field(default_factory=list)

    def sample(
        self, requests: Sequence[SampleRequest], params: SamplingParams
    ) -> tuple[list[list[Completion]], SampleStats]:
        self.calls.append((list(requests), params))
        groups = []
        for request in requests:
            script = self.texts[request.prefix]
            texts = script[:1] if params.greedy else script[1 : 1 + len(request.keys)]
            groups.append([completion(text, request.max_new_tokens) for text in texts])
        tokens = sum(len(each.tokens) for group in groups for each in group)
        return groups, SampleStats(sampled_tokens=tokens, seconds=0.5)


def completion(text: str, room: int) -> Completion:
    tokens = (*(ord(c) for c in text), 0)
    finish: FinishReason = "stop" if len(tokens) <= room else "length"
    return Completion(tokens[:room], (0.0,) * min(len(tokens), room), finish)


class LastWord:
    """1 if the last word is the answer; a text that ends in '?' has no answer, one with '!' breaks the check."""

    def score(
        self, prompts: Sequence[Prompt], completions: Sequence[str], completion_ids: Sequence[tuple[int, ...]]
    ) -> list[Score]:
        assert len(prompts) == len(completions) == len(completion_ids)
        return [self._one(prompt, text) for prompt, text in zip(prompts, completions, strict=True)]

    def _one(self, prompt: Prompt, text: str) -> Score:
        if text.endswith("?"):
            return Score(0.0, parsed=False)
        if text.endswith("!"):
            return Score(0.0, problem="timeout")
        return Score(float(text.split()[-1] == prompt.answer))

    def close(self) -> None:
        pass


def prompt(name: str, answer: str) -> Prompt:
    return Prompt(name, name, tuple(map(ord, name)), name, answer)


P, Q = prompt("p", "7"), prompt("qq", "9")
SCRIPT = {
    # greedy, then four samples
    P.tokens: ["is 7", "is 7", "is 3", "is 3", "is 7"],
    Q.tokens: ["is 8", "is 9", "is 4", "why 4?", "is 4"],
}
ROOM = SamplingConfig(max_new_tokens=20)


def test_greedy_only() -> None:
    engine = Scripted(SCRIPT)
    result = evaluate(engine, LastWord(), [P, Q], Characters(), sampling=ROOM)
    # rewards 1 and 0: mean 1/2, standard error sqrt((1/4 + 1/4) / 2) = 1/2; both texts have 4 characters and the end
    assert dict(result.metrics) == {
        "eval/greedy": 0.5,
        "eval/greedy_se": pytest.approx(0.5),
        "eval/length": 5.0,
        "eval/truncated": 0.0,
        "eval/unparsed": 0.0,
        "eval/problems": 0.0,
        "eval/prompts": 2.0,
    }
    assert result.stats == SampleStats(sampled_tokens=10, seconds=0.5)
    assert [row.greedy_text for row in result.rows] == ["is 7", "is 8"]
    assert [params.greedy for _, params in engine.calls] == [True]


def test_samples_pass_and_majority() -> None:
    result = evaluate(Scripted(SCRIPT), LastWord(), [P, Q], Characters(), sampling=ROOM, samples=4, k=(1, 2, 3, 4))
    m = result.metrics
    # p: 2 of 4 correct, q: 1 of 4
    assert m["eval/sampled"] == pytest.approx((2 / 4 + 1 / 4) / 2)
    assert m["eval/pass@1"] == pytest.approx(m["eval/sampled"])
    # pass@2: p 1 - C(2,2)/C(4,2) = 5/6, q 1 - C(3,2)/C(4,2) = 1/2
    assert m["eval/pass@2"] == pytest.approx((5 / 6 + 1 / 2) / 2)
    assert m["eval/pass@4"] == 1.0
    # maj: p 7 | 7,3 tie: 7 | 7,3,3: 3 | 2:2 tie: 7.  q 9 | 9,4 tie: 9 | the third has no vote: 9 | 9,4,4: 4
    assert [m[f"eval/maj@{k}"] for k in (1, 2, 3, 4)] == [1.0, 1.0, 0.5, 0.5]
    # one of eight samples had no answer
    assert m["eval/sampled_unparsed"] == pytest.approx(1 / 8)
    assert result.rows[1].sampled_rewards == (1.0, 0.0, 0.0, 0.0)
    assert result.rows[1].sampled_answers == ("9", "4", None, "4")
    # standard error over the two prompts' means 1/2 and 1/4: half their difference
    assert m["eval/sampled_se"] == pytest.approx(1 / 8)


@pytest.mark.parametrize(("truncated_value", "greedy"), [(0.0, 0.0), (-0.5, -0.5), (None, 1.0)])
def test_truncated_completions(truncated_value: float | None, greedy: float) -> None:
    # five tokens of room: "is 7" and the end fit, "is 7 7" is cut after "is 7 "
    script = {P.tokens: ["is 7 7", "is 7 7", "is 3", "is 7 7"]}
    result = evaluate(
        Scripted(script), LastWord(), [P], Characters(), sampling=SamplingConfig(max_new_tokens=5),
        samples=3, k=(3,), truncated_value=truncated_value,
    )  # fmt: skip
    m = result.metrics
    assert m["eval/truncated"] == 1.0
    assert m["eval/length"] == 5.0
    assert m["eval/greedy"] == greedy
    assert m["eval/sampled_truncated"] == pytest.approx(2 / 3)
    # cut-off completions vote only where they are scored like any other
    assert result.rows[0].sampled_answers == (("7", "3", "7") if truncated_value is None else (None, "3", None))
    assert m["eval/maj@3"] == (1.0 if truncated_value is None else 0.0)


def test_problems_are_counted() -> None:
    script = {P.tokens: ["hm!", "is 7", "hm!"]}
    result = evaluate(Scripted(script), LastWord(), [P], Characters(), sampling=ROOM, samples=2)
    assert result.metrics["eval/problems"] == 2.0


def test_nobody_votes() -> None:
    script = {P.tokens: ["a?", "b?", "c?"]}
    result = evaluate(Scripted(script), LastWord(), [P], Characters(), sampling=ROOM, samples=2, k=(2,))
    assert result.metrics["eval/maj@2"] == 0.0


class Graded(LastWord):
    """Part of the credit for a wrong answer, as some tasks of reasoning-gym give it; it reads the first word."""

    def _one(self, prompt: Prompt, text: str) -> Score:
        return Score(1.0 if text.split()[0] == prompt.answer else 0.2)

    def vote(self, prompt: Prompt, completion: str) -> str | None:
        return completion.split()[0]


def test_only_a_reward_above_the_threshold_is_correct() -> None:
    script = {P.tokens: ["7 is", "7 is", "3 is", "3 is", "3 is"]}

    def measured(threshold: float) -> list[float]:
        m = evaluate(
            Scripted(script), Graded(), [P], Characters(), sampling=ROOM, samples=4, k=(1, 3),
            success_threshold=threshold,
        ).metrics  # fmt: skip
        assert m["eval/sampled"] == pytest.approx((1 + 3 * 0.2) / 4)
        return [m["eval/pass@1"], m["eval/maj@1"], m["eval/maj@3"]]

    # 1 of 4 samples is right; of the first three votes, 7 3 3, the wrong answer wins with its reward of 0.2
    assert measured(0.5) == pytest.approx([1 / 4, 1.0, 0.0])
    assert measured(0.1) == pytest.approx([1.0, 1.0, 1.0])


def test_the_vote_is_over_what_the_reward_reads() -> None:
    # by its last number the first response would say 3, and 3 would win; the reward reads first words
    script = {P.tokens: ["7", "7 not 3", "3 not 7", "7 not 3"]}
    result = evaluate(Scripted(script), Graded(), [P], Characters(), sampling=ROOM, samples=3, k=(3,))
    assert result.rows[0].sampled_answers == ("7", "3", "7")
    assert result.metrics["eval/maj@3"] == 1.0


def requests_of(seed: int, chunk: int | None = None) -> list[SampleRequest]:
    engine = Scripted(SCRIPT)
    evaluate(
        engine, LastWord(), [P, Q], Characters(), sampling=ROOM, samples=4, seed=seed, chunk=chunk
    )  # fmt: skip
    return [request for requests, params in engine.calls if not params.greedy for request in requests]


def test_the_same_random_numbers_at_every_evaluation() -> None:
    assert requests_of(seed=1) == requests_of(seed=1)
    assert requests_of(seed=1) != requests_of(seed=2)
    first = requests_of(seed=1)[0]
    assert first.keys == tuple(rng.key(1, "eval", "p", i) for i in range(4))
    assert first.prefix == P.tokens


def test_a_chunk_counts_completions() -> None:
    engine = Scripted(SCRIPT)
    evaluate(engine, LastWord(), [P, Q], Characters(), sampling=ROOM, samples=4, chunk=4)
    # 2 greedy completions are one chunk of up to 4; 4 samples of each prompt are one chunk per prompt
    assert [len(requests) for requests, _ in engine.calls] == [2, 1, 1]


def test_chunks_change_nothing_but_the_progress() -> None:
    assert requests_of(seed=1) == requests_of(seed=1, chunk=1)
    heard: list[int] = []
    add: Callable[[int], None] = heard.append
    whole = evaluate(Scripted(SCRIPT), LastWord(), [P, Q], Characters(), sampling=ROOM, samples=4, k=(2,))
    parts = evaluate(
        Scripted(SCRIPT), LastWord(), [P, Q], Characters(), sampling=ROOM, samples=4, k=(2,), chunk=1, progress=add
    )
    assert heard == [1, 1, 4, 4]
    assert parts.metrics == whole.metrics
    assert parts.rows == whole.rows


def test_the_response_fits_beside_the_prompt() -> None:
    engine = Scripted(SCRIPT)
    evaluate(engine, LastWord(), [P, Q], Characters(), sampling=SamplingConfig(max_new_tokens=20, max_total_tokens=12))
    assert [request.max_new_tokens for request in engine.calls[0][0]] == [11, 10]
    with pytest.raises(DataError, match=r"'qq' has 2 tokens.*within 2 tokens"):
        evaluate(engine, LastWord(), [Q], Characters(), sampling=SamplingConfig(max_total_tokens=2))


def test_the_distribution_is_the_configs() -> None:
    engine = Scripted(SCRIPT)
    sampling = SamplingConfig(temperature=0.6, top_p=0.9, stop=("\n",), max_new_tokens=9)
    evaluate(engine, LastWord(), [P], Characters(), sampling=sampling, samples=2)
    assert [params for _, params in engine.calls] == [
        SamplingParams(greedy=True, stop=("\n",)),
        SamplingParams(temperature=0.6, top_p=0.9, stop=("\n",)),
    ]


def test_impossible_questions() -> None:
    with pytest.raises(ConfigError, match="pass@4 needs at least 4 samples per prompt, but samples is 2"):
        evaluate(Scripted(SCRIPT), LastWord(), [P], Characters(), sampling=ROOM, samples=2, k=(4,))
    with pytest.raises(DataError, match="no prompts"):
        evaluate(Scripted(SCRIPT), LastWord(), [], Characters(), sampling=ROOM)


def test_every_metric_is_finite_for_one_prompt() -> None:
    result = evaluate(Scripted(SCRIPT), LastWord(), [P], Characters(), sampling=ROOM, samples=1, k=(1,))
    assert all(math.isfinite(value) for value in result.metrics.values())
