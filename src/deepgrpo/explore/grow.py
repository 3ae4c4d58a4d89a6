"""The loop that grows trees, for every strategy: round by round, for the whole batch.

GRPO takes one round, DEEP-GRPO two. A round is one `sample()` call and one pass of the reward, so the core needs no
concurrency: an engine may parallelise inside the call. With an environment, a round plays episodes (episodes.py), and the
engine samples once per turn.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace

from deepgrpo import rng
from deepgrpo.engines.base import Engine, SampleStats, SamplingParams
from deepgrpo.errors import EngineError, StrategyError
from deepgrpo.explore.base import Limits, Measured, Signal, Signals, State, Strategy
from deepgrpo.explore.episodes import Episodes, EpisodeStats, Place
from deepgrpo.feedback import Score
from deepgrpo.records import NO_PIVOT, ROOT, Completion, FinishReason, Given, Node, Pivot, Prompt, SampleRequest, Tree
from deepgrpo.rewards.base import for_reward

Judge = Callable[[Sequence[Prompt], Sequence[str], Sequence[tuple[int, ...]], Sequence[FinishReason]], list[Score]]
"""(prompts, responses, response tokens, finish reasons) → scores, one per response."""

UNJUDGED = Score(0.0, parsed=False, checked=False)
"""Score of a segment, which is not a response and is never judged."""


@dataclass(frozen=True, slots=True)
class Growth:
    """Grown trees in prompt order, and their cost."""

    trees: tuple[Tree, ...]
    stats: SampleStats
    verifier_calls: int
    seconds_reward: float
    signal_tokens: int = 0
    """Tokens forwarded for the strategy's signals."""
    seconds_signals: float = 0.0
    branches: SampleStats = field(default_factory=SampleStats)
    """Part of `stats` from all rounds but the first, which continue sampled tokens."""
    signal_stats: SampleStats = field(default_factory=SampleStats)
    """Text sampled for the strategy's signals, in no tree; not part of `stats`."""
    signal_sequences: int = 0
    episodes: EpisodeStats = field(default_factory=EpisodeStats)
    """Cost of an environment."""

    @property
    def sampled_tokens(self) -> int:
        """All sampled tokens, those for signals included."""
        return self.stats.sampled_tokens + self.signal_stats.sampled_tokens

    def __add__(self, other: Growth) -> Growth:
        """Concatenate trees and sum costs."""
        return Growth(**{each.name: getattr(self, each.name) + getattr(other, each.name) for each in fields(Growth)})


def grow(
    prompts: Sequence[Prompt], strategy: Strategy, state: State, engine: Engine, judge: Judge, *,
    decode: Callable[[Sequence[int]], str], params: SamplingParams, limits: Limits, seed: int, step: int,
    version: int = 0, signals: Signals | None = None, episodes: Episodes | None = None,
) -> Growth:  # fmt: skip
    """Sample one tree per prompt until the strategy plans nothing more.

    Every draw has an address (seed, step, place in the batch, prompt, node), so trees do not depend on batching, on the
    number of workers, or on each other.

    Args:
        signals: measures the strategy's signals of new nodes, needed if `strategy.signals` is not empty. Called after a round
            that the strategy returns to, before the next plan.
        episodes: plays episodes with an environment; None: every rollout is one turn.
    """
    assert signals is not None or not strategy.signals, f"no one measures {sorted(s.name for s in strategy.signals)}"
    try:
        starts = episodes.start(prompts) if episodes else [None] * len(prompts)
        trees = [Tree(prompt, start=start) for prompt, start in zip(prompts, starts, strict=True)]
        played = EpisodeStats()
        stats, branches, calls, seconds = SampleStats(), SampleStats(), 0, 0.0
        measured, seconds_signals = Measured([], 0), 0.0
        grown: set[int] = set()
        level = 0
        while len(grown) < len(trees):
            plans: list[tuple[int, list[Pivot]]] = []
            placed: list[list[Place]] = []
            for index, tree in enumerate(trees):
                if index in grown:
                    continue
                random = rng.generator(seed, step, index, tree.prompt.id, "plan", level)
                pivots = strategy.plan(tree, state, limits, random)
                places: list[list[Place]] = []
                if pivots and episodes:
                    pivots, places, spent = _with_places(tree, pivots, episodes)
                    played += spent
                if pivots:
                    trees[index], pivots = _with_given(tree, pivots, decode)
                    plans.append((index, pivots))
                    placed += places
                else:
                    grown.add(index)
            requests = [r for index, pivots in plans for r in _requests(trees[index], pivots, limits, (seed, step, index))]
            if not requests:
                continue
            if episodes is None:
                completions, cost = engine.sample(requests, params, keep=strategy.returns(level))
            else:
                completions, cost, spent = episodes.sample(engine, requests, placed, params)
                played += spent
            stats += cost
            branches += cost if level else SampleStats()
            began = time.perf_counter()
            nodes_of = _score(trees, plans, completions, judge, decode, limits, version, episodes is not None)
            seconds += time.perf_counter() - began
            began = time.perf_counter()
            new: list[tuple[int, int]] = []
            for (index, pivots), nodes in zip(plans, nodes_of, strict=True):
                calls += sum(node.score.checked for node in nodes)
                new += [(index, len(trees[index].nodes) + i) for i in range(len(nodes))]
                trees[index] = trees[index].add(pivots, nodes)
            if signals is not None and strategy.returns(level):
                measured = _measure(trees, new, strategy, signals, (seed, step), measured)
                seconds_signals += time.perf_counter() - began
            level += 1
    finally:
        engine.forget()
    return Growth(
        tuple(trees), stats, calls, seconds, measured.forwarded, seconds_signals, branches, measured.sampled,
        measured.sequences, played,
    )  # fmt: skip


def _with_places(
    tree: Tree, pivots: list[Pivot], episodes: Episodes
) -> tuple[list[Pivot], list[list[Place]], EpisodeStats]:
    """Pivots with the places where their episodes go on, without those whose replay differs."""
    for pivot in pivots:
        node = tree.nodes[pivot.parent] if pivot.parent != ROOT else None
        if pivot.given is not None or pivot.max_tokens is not None:
            raise StrategyError(
                "a strategy asks for segments or gives tokens, but the recipe has an environment, whose episodes are cut into "
                "turns; leave out Pivot.max_tokens and Pivot.given"
            )
        if node and any(reply.start <= pivot.offset < reply.end for reply in node.replies):
            raise StrategyError(
                f"a pivot is at token {pivot.offset} of node {pivot.parent}, inside a reply of the environment, which the "
                "model does not write; cut with deepgrpo.explore.segments.node_ends, which ends no segment there"
            )
    found, stats = episodes.places(tree, pivots)
    kept = [(pivot, places) for pivot, places in zip(pivots, found, strict=True) if places is not None]
    return [pivot for pivot, _ in kept], [places for _, places in kept], stats


def _with_given(tree: Tree, pivots: list[Pivot], decode: Callable[[Sequence[int]], str]) -> tuple[Tree, list[Pivot]]:
    """Make a node of every piece of earlier text that pivots start from, and move the pivots to its end.

    Pivots that start from the same piece share its node.
    """
    if all(pivot.given is None for pivot in pivots):
        return tree, pivots
    places: dict[tuple[int, int, Given], int] = {}
    moved: list[Pivot] = []
    for pivot in pivots:
        if (given := pivot.given) is None:
            moved.append(pivot)
            continue
        place = (pivot.parent, pivot.offset, given)
        if place not in places:
            places[place] = len(tree.nodes)
            text = decode(tree.response(pivot.parent, pivot.offset) + given.tokens)
            node = Node(
                pivot.parent, pivot.offset, given.tokens, (0.0,) * len(given.tokens), "segment", text, UNJUDGED, "given",
                NO_PIVOT, given.version,
            )  # fmt: skip
            tree = tree.add([], [node])
        moved.append(replace(pivot, parent=places[place], offset=len(given.tokens), given=None))
    return tree, moved


def _requests(tree: Tree, pivots: Sequence[Pivot], limits: Limits, address: tuple[int, int, int]) -> list[SampleRequest]:
    requests: list[SampleRequest] = []
    node = len(tree.nodes)
    for pivot in pivots:
        prefix = tree.path(pivot.parent, pivot.offset)
        room = _room(tree, pivot, limits)
        if room < 1:
            raise EngineError(
                f"prompt {tree.prompt.id!r} has {len(tree.prompt.tokens)} tokens and leaves no room for a response within "
                f"{limits.max_total_tokens} tokens; lower data.max_prompt_tokens or raise sampling.max_total_tokens"
            )
        keys = tuple(rng.key(*address, tree.prompt.id, node + i) for i in range(pivot.num_branches))
        requests.append(SampleRequest(prefix, keys, min(room, pivot.max_tokens or room), len(tree.prompt.tokens)))
        node += pivot.num_branches
    return requests


def _room(tree: Tree, pivot: Pivot, limits: Limits) -> int:
    """Most tokens of a continuation at this pivot within the response limit."""
    return limits.response(tree) - len(tree.response(pivot.parent, pivot.offset))


def _score(
    trees: Sequence[Tree], plans: Sequence[tuple[int, list[Pivot]]], completions: Sequence[Sequence[Completion]],
    judge: Judge, decode: Callable[[Sequence[int]], str], limits: Limits, version: int, played: bool,
) -> list[list[Node]]:  # fmt: skip
    """Nodes of each planned tree; one call of the reward for all responses, of episodes (`played`) for their last turns."""
    remaining = iter(completions)
    drafts: list[tuple[Tree, int, Pivot, Completion, tuple[int, ...]]] = []
    sizes: list[int] = []
    for index, pivots in plans:
        tree = trees[index]
        before = len(drafts)
        for number, pivot in enumerate(pivots, start=len(tree.pivots)):
            prefix = tree.response(pivot.parent, pivot.offset)
            # a continuation that reaches the pivot's own limit, not the response's, goes on in a later round
            goes_on = pivot.max_tokens is not None and pivot.max_tokens < _room(tree, pivot, limits)
            for completion in next(remaining):
                if goes_on and completion.finish == "length":
                    completion = replace(completion, finish="segment")
                drafts.append((tree, number, pivot, completion, prefix + completion.tokens))
        sizes.append(len(drafts) - before)
    texts = [decode(response) for *_, response in drafts]
    asked = [i for i, (*_, completion, _) in enumerate(drafts) if completion.finish != "segment"]
    scores = [UNJUDGED] * len(drafts)
    if asked:
        seen = [
            _last_turn(*drafts[i], decode) if played else (drafts[i][0].prompt, texts[i]) for i in asked
        ]
        found = judge(
            [prompt for prompt, _ in seen], [text for _, text in seen], [drafts[i][4] for i in asked],
            [drafts[i][3].finish for i in asked],
        )  # fmt: skip
        for i, score in zip(asked, found, strict=True):
            scores[i] = score
    nodes = [
        Node(
            pivot.parent, pivot.offset, c.tokens, c.logprobs, c.finish, text, score, pivot.stream, number, version,
            replies=c.replies,
        )
        for (_, number, pivot, c, _), text, score in zip(drafts, texts, scores, strict=True)
    ]
    cut = [sum(sizes[:i]) for i in range(len(sizes) + 1)]
    return [nodes[a:b] for a, b in itertools.pairwise(cut)]


def _last_turn(
    tree: Tree, number: int, pivot: Pivot, completion: Completion, response: tuple[int, ...],
    decode: Callable[[Sequence[int]], str],
) -> tuple[Prompt, str]:  # fmt: skip
    """Prompt and text for the reward of an episode."""
    before = len(response) - len(completion.tokens)
    own = [replace(reply, start=before + reply.start, end=before + reply.end) for reply in completion.replies]
    prompt, last = for_reward(tree.prompt, [*tree.replies(pivot.parent, pivot.offset), *own], response)
    return prompt, decode(last)


def _measure(
    trees: list[Tree], new: Sequence[tuple[int, int]], strategy: Strategy, signals: Signals, address: tuple[int, int],
    before: Measured,
) -> Measured:  # fmt: skip
    """Add the strategy's signals to new nodes, given as (tree, node).

    Args:
        address: seed and step of the draws.
        before: cost so far.

    Returns the cost, without values.
    """
    cost = before
    for signal in sorted(strategy.signals, key=lambda signal: signal.name):
        wanted = [(index, node) for index, node in new if _is_measured(signal, trees[index], node)]
        keys = [rng.key(*address, index, trees[index].prompt.id, node, signal.name) for index, node in wanted]
        found = signals(signal, [(trees[index], node) for index, node in wanted], keys)
        cost = Measured(
            [], cost.forwarded + found.forwarded, cost.sampled + found.sampled, cost.sequences + found.sequences
        )
        for (index, node), value in zip(wanted, found.values, strict=True):
            trees[index] = trees[index].with_signal(node, signal.name, tuple(map(float, value)))
    return cost


def _is_measured(signal: Signal, tree: Tree, node: int) -> bool:
    if signal.unsolved and any(each.outcome > signal.most_reward for _, each in tree.stream("main")):
        return False
    return tree.nodes[node].outcome <= signal.most_reward
