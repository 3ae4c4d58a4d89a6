"""Episodes: turns of the model and replies of an environment, between strategy and engine.

    prefix ─► sample until the turn ends ─► the environments of the whole batch reply ─► observation appended ─► ...
                        ▲                                                                        │
                        └────────────────── until done, or a limit is reached ───────────────────┘

To a strategy an episode is one rollout: a completion whose replies are given tokens. A round of growth is one `sample` of
episodes, which calls the engine once per turn for all of them. Token in, token out: sampled tokens are never encoded again.

Branches go on from the state that the tree holds at their pivot. An environment that cannot give its states is replayed: the
recorded turns in a fresh instance per branch. If an observation differs from the recorded one, the pivot is dropped.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace

from deepgrpo import rng
from deepgrpo.engines.base import Engine, SampleStats, SamplingParams
from deepgrpo.envs.base import Environment, State, Turn
from deepgrpo.feedback import Reply
from deepgrpo.records import Completion, FinishReason, Pivot, Prompt, SampleRequest, Tree

Between = Callable[[str, bool], tuple[int, ...]]
"""(observation, the turn ended with an end-of-turn token) → tokens up to the model's next turn (prompts/between.py)."""


@dataclass(frozen=True, slots=True)
class EpisodeStats:
    """Cost of episodes besides sampling. `a + b` adds field by field."""

    turns: int = 0
    """Turns of the model to which an environment replied."""
    calls: int = 0
    failed_calls: int = 0
    given_tokens: int = 0
    """Tokens of observations, with what the chat template puts around them."""
    tool_seconds: float = 0.0
    """Time in tools, as the environment reports it: of tools side by side, their sum."""
    seconds: float = 0.0
    """Time in which the environment replied."""
    replayed: int = 0
    """Turns replayed at pivots."""
    differing: int = 0
    """Pivots dropped because a replay differed."""

    def __add__(self, other: EpisodeStats) -> EpisodeStats:
        return EpisodeStats(*(getattr(self, each.name) + getattr(other, each.name) for each in fields(self)))


@dataclass(frozen=True, slots=True)
class Place:
    """State of an episode before the model's next turn: that of the environment, and what came before."""

    state: State
    begins: int
    """Tokens of the path before the present turn."""
    turns: int = 0
    """Turns before the present one."""


@dataclass(slots=True)
class _Episode:
    """An episode that is being played."""

    request: SampleRequest
    key: int
    place: Place
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    replies: list[Reply] = field(default_factory=list)
    finish: FinishReason | None = None
    state: State = None
    begins: int = 0
    """Start of the present turn along the path, in tokens."""

    @property
    def path(self) -> tuple[int, ...]:
        return (*self.request.prefix, *self.tokens)


@dataclass(frozen=True)
class Episodes:
    """The rules of a recipe's episodes.

    Args:
        decode: text of tokens, special ones included.
        eos_ids: tokens that end a turn.
        max_turns, max_turn_tokens: as in the section `env`.
    """

    environment: Environment
    between: Between
    decode: Callable[[Sequence[int]], str]
    eos_ids: frozenset[int]
    max_turns: int
    max_turn_tokens: int | None = None

    def params(self, params: SamplingParams) -> SamplingParams:
        """The parameters with the strings that end a turn."""
        return replace(params, stop=(*params.stop, *self.environment.turn_ends))

    def start(self, prompts: Sequence[Prompt]) -> list[State]:
        """State of each prompt before the first turn; None where states cannot be given."""
        if not self.environment.rewinds:
            return [None] * len(prompts)
        return [self.environment.start(prompt) for prompt in prompts]

    def close(self) -> None:
        """Release what the environment has started."""
        self.environment.close()

    # ------------------------------------------------------------ places

    def begin(self, prompt: Prompt, state: State, count: int) -> list[Place]:
        """Places of `count` episodes from the prompt on."""
        live = self.environment.rewinds
        return [
            Place(state if live else self.environment.start(prompt), len(prompt.tokens)) for _ in range(count)
        ]

    def places(self, tree: Tree, pivots: Sequence[Pivot]) -> tuple[list[list[Place] | None], EpisodeStats]:
        """Places of each pivot's branches; None for a pivot whose replay differs. The caller plays or ends every place."""
        before = [tree.replies(pivot.parent, pivot.offset) for pivot in pivots]
        if self.environment.rewinds:
            return [
                [self._place(tree, replies, replies[-1].state if replies else tree.start)] * pivot.num_branches
                for pivot, replies in zip(pivots, before, strict=True)
            ], EpisodeStats()
        stats = EpisodeStats()
        found: list[list[Place] | None] = []
        for pivot, replies in zip(pivots, before, strict=True):
            texts = self._texts(tree.response(pivot.parent, pivot.offset), replies)
            states, cost, same = self._replay(tree.prompt, texts, replies, pivot.num_branches)
            stats += cost
            if not same:
                self.end(states)
            found.append([self._place(tree, replies, state) for state in states] if same else None)
        return found, stats

    def _place(self, tree: Tree, replies: Sequence[Reply], state: State) -> Place:
        return Place(state, len(tree.prompt.tokens) + (replies[-1].end if replies else 0), len(replies))

    def _texts(self, response: Sequence[int], replies: Sequence[Reply]) -> list[str]:
        """Text of each turn that has a reply."""
        starts = [0, *(reply.end for reply in replies)]
        return [self._text(response[start : reply.start]) for start, reply in zip(starts, replies, strict=False)]

    def _replay(
        self, prompt: Prompt, texts: Sequence[str], replies: Sequence[Reply], count: int
    ) -> tuple[list[State], EpisodeStats, bool]:
        """Play recorded turns in `count` fresh instances, side by side; False if a reply differs from the recorded one."""
        states = [self.environment.start(prompt) for _ in range(count)]
        stats, same = EpisodeStats(), True
        for text, reply in zip(texts, replies, strict=True):
            turns, cost = self._ask([(state, text) for state in states])
            states = [turn.state for turn in turns]
            stats += replace(cost, turns=0, replayed=len(turns))
            if any(turn.done or turn.observation != reply.observation for turn in turns):
                same = False
                break
        return states, replace(stats, differing=int(not same)), same

    def end(self, states: Sequence[State]) -> None:
        """Release instances that are not played to their end."""
        if not self.environment.rewinds:
            for state in states:
                self.environment.finish(state)

    # ------------------------------------------------------------ play

    def sample(
        self, engine: Engine, requests: Sequence[SampleRequest], places: Sequence[Sequence[Place]], params: SamplingParams
    ) -> tuple[list[list[Completion]], SampleStats, EpisodeStats]:
        """Play one episode per key, as `Engine.sample`: `max_new_tokens` bounds all tokens, those of replies included.

        Args:
            places: where the episode of each key goes on.
        """
        params = self.params(params)
        groups = [
            [_Episode(request, key, place, state=place.state, begins=place.begins)
             for key, place in zip(request.keys, own, strict=True)]
            for request, own in zip(requests, places, strict=True)
        ]  # fmt: skip
        everything = [episode for group in groups for episode in group]
        cost, stats = SampleStats(), EpisodeStats()
        try:
            first = True
            while playing := [each for each in everything if each.finish is None]:
                if first:  # siblings share one request
                    asked = [self._first(group[0], request) for group, request in zip(groups, requests, strict=True)]
                else:
                    asked = [self._next(episode) for episode in playing]
                found, spent = engine.sample(asked, params, keep=True)
                cost += spent
                stats += self._reply(playing, [completion for group in found for completion in group])
                first = False
        finally:
            self.end([each.state for each in everything])
        return [[_completion(episode) for episode in group] for group in groups], cost, stats

    def answer(
        self, engine: Engine, prompts: Sequence[Prompt], requests: Sequence[SampleRequest], params: SamplingParams
    ) -> tuple[list[list[Completion]], SampleStats, EpisodeStats]:
        """Play episodes from the prompt on, one request each; for evaluations. The engine keeps nothing afterwards."""
        places = [
            self.begin(prompt, state, len(request.keys))
            for prompt, state, request in zip(prompts, self.start(prompts), requests, strict=True)
        ]
        try:
            return self.sample(engine, requests, places, params)
        finally:
            engine.forget()

    def _first(self, episode: _Episode, request: SampleRequest) -> SampleRequest:
        known = len(request.prefix) if episode.place.turns else 0
        return replace(request, max_new_tokens=self._turn_limit(episode), response_start=episode.begins, known=known)

    def _next(self, episode: _Episode) -> SampleRequest:
        path, last = episode.path, episode.replies[-1]
        key = rng.key(episode.key, "turn", len(episode.replies))
        known = len(path) - (last.end - last.start)
        return SampleRequest(path, (key,), self._turn_limit(episode), episode.begins, known)

    def _turn_limit(self, episode: _Episode) -> int:
        room = episode.request.max_new_tokens - len(episode.tokens)
        if self.max_turn_tokens is None:
            return room
        return max(1, min(room, self.max_turn_tokens - (len(episode.path) - episode.begins)))

    def _reply(self, playing: Sequence[_Episode], completions: Sequence[Completion]) -> EpisodeStats:
        """Append a turn to each episode, and the environment's reply where the turn has ended."""
        for episode, completion in zip(playing, completions, strict=True):
            episode.tokens += completion.tokens
            episode.logprobs += completion.logprobs
            if completion.finish != "stop":
                episode.finish = "length"
        ended = [episode for episode in playing if episode.finish is None]
        turns, stats = self._ask([(each.state, self._text(each.path[each.begins :])) for each in ended])
        given = sum(self._append(episode, turn) for episode, turn in zip(ended, turns, strict=True))
        return stats + EpisodeStats(given_tokens=given)

    def _append(self, episode: _Episode, turn: Turn) -> int:
        """Append a reply; returns the number of its tokens."""
        episode.state = turn.state
        start = len(episode.tokens)
        shown: tuple[int, ...] = ()
        if turn.done:
            episode.finish = "stop"
        elif episode.place.turns + len(episode.replies) + 1 >= self.max_turns:
            episode.finish = "length"
        else:
            shown = self.between(turn.observation, episode.tokens[-1] in self.eos_ids)
            if start + len(shown) >= episode.request.max_new_tokens:
                episode.finish, shown = "length", ()
        episode.tokens += shown
        episode.logprobs += [0.0] * len(shown)
        episode.begins = len(episode.path)
        kept = turn.state if self.environment.rewinds else None
        episode.replies.append(
            Reply(start, len(episode.tokens), turn.observation, kept, turn.reward, turn.calls, turn.failed_calls)
        )
        return len(shown)

    def _ask(self, items: Sequence[tuple[State, str]]) -> tuple[list[Turn], EpisodeStats]:
        if not items:
            return [], EpisodeStats()
        began = time.perf_counter()
        turns = self.environment.step_all(items)
        assert len(turns) == len(items), f"{len(turns)} turns for {len(items)} states"
        return turns, EpisodeStats(
            len(turns), sum(turn.calls for turn in turns), sum(turn.failed_calls for turn in turns),
            tool_seconds=sum(turn.seconds for turn in turns), seconds=time.perf_counter() - began,
        )  # fmt: skip

    def _text(self, tokens: Sequence[int]) -> str:
        """Text of a turn, without the token that ends it."""
        return self.decode(tokens[:-1] if tokens and tokens[-1] in self.eos_ids else tokens)


def _completion(episode: _Episode) -> Completion:
    assert episode.finish is not None
    return Completion(tuple(episode.tokens), tuple(episode.logprobs), episode.finish, tuple(episode.replies))
