"""The one loop in which trees grow, for every strategy: level by level, the whole batch at once.

GRPO takes one round, DEEP-GRPO two. A round is one `sample()` call and one pass of the reward, so the core needs no
concurrency of its own: an engine may be as parallel as it likes inside the call.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from deepgrpo import rng
from deepgrpo.engines.base import Engine, SampleStats, SamplingParams
from deepgrpo.errors import EngineError
from deepgrpo.explore.base import Limits, State, Strategy
from deepgrpo.records import Completion, Node, Pivot, Prompt, SampleRequest, Score, Tree

Judge = Callable[[Sequence[Prompt], Sequence[str], Sequence[tuple[int, ...]], Sequence[str]], list[Score]]
"""(prompts, responses, response tokens, finish reasons) → scores, one per response."""


@dataclass(frozen=True, slots=True)
class Growth:
    """Grown trees, in prompt order, and what they cost."""

    trees: tuple[Tree, ...]
    stats: SampleStats
    verifier_calls: int
    seconds_reward: float


def grow(
    prompts: Sequence[Prompt], strategy: Strategy, state: State, engine: Engine, judge: Judge, *,
    decode: Callable[[Sequence[int]], str], params: SamplingParams, limits: Limits, seed: int, step: int,
    version: int = 0,
) -> Growth:  # fmt: skip
    """Sample one tree per prompt until the strategy plans nothing more.

    Every draw has an address (seed, step, place in the batch, prompt, node), so trees do not depend on batching, on the
    number of workers, or on each other.
    """
    try:
        trees = [Tree(prompt) for prompt in prompts]
        stats, calls, seconds = SampleStats(), 0, 0.0
        grown: set[int] = set()
        level = 0
        while len(grown) < len(trees):
            plans: list[tuple[int, list[Pivot]]] = []
            for index, tree in enumerate(trees):
                if index in grown:
                    continue
                random = rng.generator(seed, step, index, tree.prompt.id, "plan", level)
                pivots = strategy.plan(tree, state, limits, random)
                if pivots:
                    plans.append((index, pivots))
                else:
                    grown.add(index)
            requests = [r for index, pivots in plans for r in _requests(trees[index], pivots, limits, (seed, step, index))]
            if not requests:
                continue
            completions, cost = engine.sample(requests, params, keep=strategy.returns(level))
            stats += cost
            began = time.perf_counter()
            nodes_of = _score(trees, plans, completions, judge, decode, version)
            seconds += time.perf_counter() - began
            for (index, pivots), nodes in zip(plans, nodes_of, strict=True):
                calls += sum(node.score.checked for node in nodes)
                trees[index] = trees[index].add(pivots, nodes)
            level += 1
    finally:
        engine.forget()
    return Growth(tuple(trees), stats, calls, seconds)


def _requests(tree: Tree, pivots: Sequence[Pivot], limits: Limits, address: tuple[int, int, int]) -> list[SampleRequest]:
    requests: list[SampleRequest] = []
    node = len(tree.nodes)
    for pivot in pivots:
        prefix = tree.path(pivot.parent, pivot.offset)
        room = limits.response(tree) - (len(prefix) - len(tree.prompt.tokens))
        if room < 1:
            raise EngineError(
                f"prompt {tree.prompt.id!r} has {len(tree.prompt.tokens)} tokens and leaves no room for a response within "
                f"{limits.max_total_tokens} tokens; lower data.max_prompt_tokens or raise sampling.max_total_tokens"
            )
        keys = tuple(rng.key(*address, tree.prompt.id, node + i) for i in range(pivot.num_branches))
        requests.append(SampleRequest(prefix, keys, room, len(tree.prompt.tokens)))
        node += pivot.num_branches
    return requests


def _score(
    trees: Sequence[Tree], plans: Sequence[tuple[int, list[Pivot]]], completions: Sequence[Sequence[Completion]],
    judge: Judge, decode: Callable[[Sequence[int]], str], version: int,
) -> list[list[Node]]:  # fmt: skip
    """Nodes of each planned tree; one call of the reward for all of them."""
    remaining = iter(completions)
    drafts: list[tuple[Tree, int, Pivot, Completion, tuple[int, ...]]] = []
    sizes: list[int] = []
    for index, pivots in plans:
        tree = trees[index]
        before = len(drafts)
        for number, pivot in enumerate(pivots, start=len(tree.pivots)):
            prefix = tree.response(pivot.parent, pivot.offset)
            drafts += [(tree, number, pivot, c, prefix + c.tokens) for c in next(remaining)]
        sizes.append(len(drafts) - before)
    texts = [decode(response) for *_, response in drafts]
    scores = judge(
        [tree.prompt for tree, *_ in drafts], texts, [response for *_, response in drafts],
        [completion.finish for *_, completion, _ in drafts],
    )  # fmt: skip
    nodes = [
        Node(pivot.parent, pivot.offset, c.tokens, c.logprobs, c.finish, text, score, pivot.stream, number, version)
        for (_, number, pivot, c, _), text, score in zip(drafts, texts, scores, strict=True)
    ]
    cut = [sum(sizes[:i]) for i in range(len(sizes) + 1)]
    return [nodes[a:b] for a, b in itertools.pairwise(cut)]

