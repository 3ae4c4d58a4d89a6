"""Episodes of several turns on the real vLLM: those of the embedded engine, token by token. `make test-vllm` runs these."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from vllm_here import needs_vllm, vllm_engine

from deepgrpo import rng
from deepgrpo.config import Config, WarmstartConfig, parse_config
from deepgrpo.engines.base import Engine, SampleStats, SamplingParams
from deepgrpo.explore.grow import Growth, grow
from deepgrpo.feedback import Reply
from deepgrpo.prompts.source import Cursor
from deepgrpo.records import ROOT, Completion, Pivot, Prompt, SampleRequest
from deepgrpo.runs.layout import RunDir
from deepgrpo.train.loop import train
from deepgrpo.train.setup import Run, open_run
from deepgrpo.train.stop import Stop
from deepgrpo.train.warmstart import Example, imitate, warm_start
from tiny import byte_tokenizer, save_model, write_jsonl

pytestmark = needs_vllm

GREEDY = SamplingParams(greedy=True)
BLOCK = 32
"""Tokens of a block of vLLM's cache on a CPU."""

DEEP = {"type": "deep", "num_rollouts": 2, "branches_per_pivot": 2, "segments": {"type": "turn"}, "success_threshold": 9.0}
LOOKUP: dict[str, Any] = {
    "model": {"type": "scratch", "num_heads": 3},  # heads of 32, which vLLM knows on a CPU
    "warmstart": {"steps": 80, "batch_size": 16, "lr": 5e-3},
    "data": {"type": "lookup", "hops": 5, "functions": 6, "errors": 0.3},
    "env": {"type": "lookup", "max_turns": 12, "price": 0.01},
    "reward": {"type": "env"},
    "sampling": {"max_new_tokens": 80},
}
TOOLS = '''
PRICES = {"apple": 3, "pear": 4, "plum": 2}


def price(fruit: str) -> int:
    """Price of a fruit.

    Args:
        fruit: name of the fruit.
    """
    return PRICES[fruit]


def double(number: int) -> int:
    """Twice a number.

    Args:
        number: the number.
    """
    return 2 * number
'''
FRUITS = {"apple": 3, "pear": 4, "plum": 2, "kiwi": None}
"""Prices; a call for a kiwi fails."""
SHOWN = "Tools:{% for tool in tools or [] %} {{ tool.function.name }}{% endfor %}\n"
"""Beginning of a chat template that has a place for tools."""


def recipe(folder: Path, sections: dict[str, Any], **more: Any) -> Config:
    run = {"dir": str(folder), "name": more.pop("name", "run"), "steps": 2, "prompts_per_step": 8, "device": "cpu"}
    return parse_config({**sections, "run": run, "explore": DEEP, "loss": {"beta": 0.0}, **more})


def lookup_run(folder: Path) -> Run:
    """Questions of five hops. The policy has learned to ask, and to answer many."""
    run = open_run(recipe(folder, LOOKUP), None)
    run.open_log(show=False)
    warm_start(run, Stop())
    return run


def tools_run(folder: Path) -> Run:
    """Two tools, shown by a chat template. The policy has learned episodes by heart, one of them with a call that fails."""
    (folder / "shop.py").write_text(TOOLS)
    path = save_model(folder / "model", width=128)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = SHOWN + tokenizer.chat_template
    tokenizer.save_pretrained(path)
    rows = [{"question": f"Twice the price of: {fruit}", "answer": answer(fruit)} for fruit in FRUITS]
    sections = {
        "model": {"type": "pretrained", "path": path},
        "data": {"type": "jsonl", "path": write_jsonl(folder / "rows.jsonl", rows)},
        "env": {"type": "tools", "functions": f"{folder}/shop.py:[price, double]", "max_turns": 4, "timeout_s": 250},
        "reward": {"type": "exact", "marker": ""},
        "sampling": {"max_new_tokens": 300, "max_total_tokens": 400},
    }
    run = open_run(recipe(folder, sections), None)
    examples = [written(run, prompt) for prompt in run.source.take(Cursor(), len(FRUITS))[0]]
    warm = WarmstartConfig(steps=120, batch_size=len(examples), lr=5e-3)
    imitate(run.policy, warm, lambda start, count: examples, tokens_per_pack=8192)
    return run


def written(run: Run, prompt: Prompt) -> Example:
    """An episode with two calls, or with one that fails."""
    assert run.episodes
    tokenizer, environment = run.policy.tokenizer, run.episodes.environment
    fruit = prompt.question.split()[-1]
    cost = FRUITS[fruit]
    texts = [call("price", fruit=fruit), *([call("double", number=cost)] if cost else []), answer(fruit)]
    state, target, given = environment.start(prompt), list[int](), set[int]()
    for text in texts:
        target += [*tokenizer(text, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        turn = environment.step(state, text)
        state, shown = turn.state, () if turn.done else run.episodes.between(turn.observation, True)
        given |= {*range(len(target), len(target) + len(shown))}
        target += shown
    return Example(prompt.tokens, tuple(target), frozenset(given))


def answer(fruit: str) -> str:
    cost = FRUITS[fruit]
    return str(2 * cost) if cost else f"no {fruit}"


def call(name: str, **arguments: Any) -> str:
    return f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"


@dataclass
class Heard:
    """An engine that remembers its calls."""

    engine: Engine
    exact: bool = False
    remark: str | None = None
    calls: list[tuple[Sequence[SampleRequest], list[list[Completion]]]] = field(default_factory=list)
    stats: SampleStats = field(default_factory=SampleStats)

    def sample(
        self, requests: Sequence[SampleRequest], params: SamplingParams, *, keep: bool = False
    ) -> tuple[list[list[Completion]], SampleStats]:
        groups, stats = self.engine.sample(requests, params, keep=keep)
        self.calls.append((requests, groups))
        self.stats += stats
        return groups, stats

    def forget(self) -> None:
        self.engine.forget()

    def close(self) -> None:
        pass


@dataclass(frozen=True)
class World:
    """A run with the embedded engine, and a vLLM engine on its policy."""

    run: Run
    vllm: Engine
    prompts: list[Prompt]

    def grow(self, engine: Engine, params: SamplingParams) -> Growth:
        run = self.run
        return grow(
            self.prompts, run.strategy, run.strategy.initial_state(), engine, run.judge, decode=run.decode, params=params,
            limits=run.limits, seed=1, step=1, episodes=run.episodes,
        )  # fmt: skip


@pytest.fixture(scope="module", params=[lookup_run, tools_run])
def world(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    run = request.param(tmp_path_factory.mktemp("world"))
    engine = vllm_engine(run.policy, longest=run.limits.max_total_tokens)
    yield World(run, engine, run.source.take(Cursor(), len(FRUITS))[0])
    engine.close()
    run.close()


@pytest.fixture(scope="module")
def grown(world: World) -> tuple[Growth, Heard]:
    heard = Heard(world.vllm)
    return world.grow(heard, GREEDY), heard


def turns(tokens: Sequence[int], replies: Sequence[Reply]) -> list[tuple[tuple[int, ...], tuple[int, ...], str, Any]]:
    """Tokens of each turn of the model, the tokens given behind it, and the environment's observation and state."""
    starts = [0, *(reply.end for reply in replies)]
    found = [
        (tuple(tokens[start : reply.start]), tuple(tokens[reply.start : reply.end]), reply.observation, reply.state)
        for start, reply in zip(starts, replies, strict=False)
    ]
    return [*found, (tuple(tokens[starts[-1] :]), (), "", None)]


def test_greedy_trees_are_those_of_the_embedded_engine(world: World, grown: tuple[Growth, Heard]) -> None:
    """Turn by turn, with the environment's states, the pivots and the branches, which go on as the rollout itself does."""
    ours, theirs = grown[0], world.grow(world.run.engine, GREEDY)
    deep = 0
    for one, other in zip(ours.trees, theirs.trees, strict=True):
        assert one.pivots == other.pivots
        for a, b in zip(one.nodes, other.nodes, strict=True):
            assert turns(a.tokens, a.replies) == turns(b.tokens, b.replies)
            assert (a.finish, a.score, a.text) == (b.finish, b.score, b.text)
            assert a.logprobs == pytest.approx(b.logprobs, abs=2e-4)
            pivot = one.pivots[a.pivot]
            if pivot.parent != ROOT:
                assert a.tokens == one.nodes[pivot.parent].tokens[pivot.offset :]
                deep += pivot.offset > 0
    assert deep > 3
    cost = ours.episodes
    assert (cost.turns, cost.calls, cost.given_tokens) == (
        theirs.episodes.turns, theirs.episodes.calls, theirs.episodes.given_tokens
    )
    assert cost.calls > 2 * len(world.prompts) and {node.finish for tree in ours.trees for node in tree.nodes} >= {"stop"}
    assert ours.stats.sampled_tokens == theirs.stats.sampled_tokens
    print(f"{cost.turns} turns, {cost.calls} calls, {cost.given_tokens} given, {ours.stats}, embedded {theirs.stats}")


def test_only_what_is_in_no_whole_block_is_encoded_again(grown: tuple[Growth, Heard]) -> None:
    """The ledger against the obvious count: blocks of all paths so far, and the rest of each prefix encoded, turn by turn."""
    growth, heard = grown
    blocks: set[tuple[int, ...]] = set()
    encoded = again = 0
    for requests, groups in heard.calls:
        for request, group in zip(requests, groups, strict=True):
            for _ in group:
                length = len(request.prefix)
                # one token at least is encoded, as the next one is drawn from its hidden state
                known = [end for end in range(BLOCK, length, BLOCK) if request.prefix[:end] in blocks]
                encoded += length - max(known, default=0)
                again += max(0, (request.known or 0) - max(known, default=0))
                path = request.prefix
                blocks |= {path[:end] for end in range(BLOCK, length + 1, BLOCK)}
        for request, group in zip(requests, groups, strict=True):
            for completion in group:
                path = request.prefix + completion.tokens[:-1]  # the last one was never fed
                blocks |= {path[:end] for end in range(BLOCK, len(path) + 1, BLOCK)}
    assert heard.stats == growth.stats
    assert heard.stats.prefix_tokens_encoded == encoded
    print(f"{len(heard.calls)} calls; of {growth.stats.prefix_tokens} prefix tokens {encoded} encoded, {again} again")


def test_branches_of_sampled_episodes_go_on_alike(world: World) -> None:
    """Greedy, from the state before every turn of sampled episodes, wrong ones and failed calls included."""
    run = world.run
    assert run.episodes
    trees = world.grow(run.engine, SamplingParams(temperature=1.3)).trees
    requests, places = [], []
    for tree in trees:
        pivots = [
            Pivot(index, offset, 1) for index, node in enumerate(tree.nodes)
            for offset in sorted({0, *(reply.end for reply in node.replies if reply.end < len(node.tokens))})
        ]  # fmt: skip
        for pivot, own in zip(pivots, run.episodes.places(tree, pivots)[0], strict=True):
            response, begins = tree.response(pivot.parent, pivot.offset), len(tree.prompt.tokens)
            room = run.limits.response(tree) - len(response)
            requests.append(SampleRequest(tree.path(pivot.parent, pivot.offset), (rng.key(len(requests)),), room, begins))
            places.append(own or [])
    assert len(requests) > 30
    ours, cost, stats = run.episodes.sample(world.vllm, requests, places, GREEDY)
    theirs, _, _ = run.episodes.sample(run.engine, requests, places, GREEDY)
    run.engine.forget()
    for (a,), (b,) in zip(ours, theirs, strict=True):
        assert turns(a.tokens, a.replies) == turns(b.tokens, b.replies) and a.finish == b.finish
    assert stats.failed_calls > 0 and len({a.tokens for (a,) in ours}) > 10
    print(f"{len(requests)} branches, {stats.turns} turns, {stats.failed_calls} of {stats.calls} calls failed, {cost}")


def test_a_run_of_lookups(tmp_path: Path) -> None:
    """After an update vLLM samples from the new weights, as far as rounding; branches at turns find blocks in the cache."""
    engine = {"type": "vllm", "eager": True, "kv_cache_gb": 0.25, "dtype": "float32", "start_timeout_s": 3000}
    run = train(recipe(tmp_path, LOOKUP, engine=engine, optim={"lr": 1e-3}))
    lines = [json.loads(line) for line in RunDir(run).metrics.read_text().splitlines()]
    for line in lines[-2:]:
        print({key: value for key, value in line.items() if key.startswith(("mismatch", "prefix", "branch/prefix", "env"))})
        assert line["mismatch/kl"] < 1e-8 and line["mismatch/max"] < 1e-3
        assert line["mismatch/weight"] == pytest.approx(1, abs=1e-4)
        assert line["grad_norm"] > 0 and line["pivots/count"] > 0 and line["env/turns"] > 3
        assert 0 < line["prefix/reused"] < 1
    assert lines[-1]["ledger/given_tokens"] > 0 and lines[-1]["ledger/tool_calls"] > 0
