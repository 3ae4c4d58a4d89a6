"""A toy world: engine, tokenizer, reward and task without a model, for growing trees with the real loop.

All are pure functions of addresses, so the same seed gives the same tree.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np

from deepgrpo import rng
from deepgrpo.engines.base import SampleStats, SamplingParams
from deepgrpo.errors import EngineError
from deepgrpo.explore.base import UNREAD, Critique, Measured, Signal
from deepgrpo.explore.grow import Judge
from deepgrpo.feedback import Score
from deepgrpo.records import Completion, FinishReason, Node, Prompt, SampleRequest, Tree

EOS = 1
FIRST_LETTER = 10

MOST_ROUNDS = 20

Lengths = Literal["any", "one", "endless"]
Rewards = Literal["mixed", "graded", "all right", "all wrong"]


class Letters:
    """Tokenizer whose tokens 10 to 35 are the letters; EOS is text unless special tokens are skipped."""

    def decode(self, tokens: Sequence[int], skip_special_tokens: bool = False) -> str:
        ends = "" if skip_special_tokens else "<eos>"
        return "".join(ends if token == EOS else chr(ord("a") + token - FIRST_LETTER) for token in tokens)


class FakeEngine:
    """Draws each continuation from its key alone, so the rest of the batch cannot matter.

    Lengths: "any": 1 to 24 tokens, so some are cut off by a limit of 16; "one": EOS at once; "endless": never EOS.
    """

    exact = True
    remark = None

    def __init__(self, lengths: Lengths = "any") -> None:
        self.lengths = lengths
        self.kept: list[bool] = []
        """`keep` of each call."""
        self.keys: list[int] = []
        """Keys of all continuations, in order."""

    def sample(
        self, requests: Sequence[SampleRequest], params: SamplingParams, *, keep: bool = False
    ) -> tuple[list[list[Completion]], SampleStats]:
        if len(self.kept) == MOST_ROUNDS:
            raise EngineError(f"plan has not returned an empty list after {MOST_ROUNDS} rounds; a tree must be complete")
        self.kept.append(keep)
        groups = [[self._continue(key, request.max_new_tokens) for key in request.keys] for request in requests]
        self.keys += [key for request in requests for key in request.keys]
        return groups, SampleStats(
            sampled_tokens=sum(len(c.tokens) for group in groups for c in group),
            prefix_tokens=sum(len(request.prefix) * len(request.keys) for request in requests),
        )

    def _continue(self, key: int, longest: int) -> Completion:
        wanted = {"any": 1 + int(24 * rng.uniforms([key], [0])[0]), "one": 1, "endless": longest + 1}[self.lengths]
        count = min(wanted, longest)
        draws = rng.uniforms([key] * count, range(1, count + 1))
        tokens = [FIRST_LETTER + int(26 * draw) for draw in draws]
        if wanted <= longest:
            tokens[-1] = EOS
        finish: FinishReason = "stop" if wanted <= longest else "length"
        # not monotonous in the token, so that places of low probability are spread out
        return Completion(tuple(tokens), tuple(float(-10 * ((7 * draw) % 1)) for draw in draws), finish)

    def forget(self) -> None:
        pass

    def close(self) -> None:
        pass


def make_judge(rewards: Rewards = "mixed", seed: int = 0) -> Judge:
    """Reward by the response's tokens: a coin flip, one of five grades, or a constant."""

    def value(tokens: tuple[int, ...]) -> float:
        draw = float(rng.uniforms([rng.key("reward", seed, *tokens)], [0])[0])
        return {"mixed": float(draw < 0.5), "graded": int(5 * draw) / 4, "all right": 1.0, "all wrong": 0.0}[rewards]

    def judge(
        prompts: Sequence[Prompt], texts: Sequence[str], responses: Sequence[tuple[int, ...]], ends: Sequence[FinishReason]
    ) -> list[Score]:
        return [Score(value(response)) for response in responses]

    return judge


class ToyTask:
    """Finds a first error in most responses, at a place drawn from their text."""

    def first_error(self, prompt: Prompt, response: str) -> int | None:
        place = rng.key("first error", response) % (len(response) + 2)
        return None if place > len(response) else place


def toy_signals(signal: Signal, nodes: Sequence[tuple[Tree, int]], keys: Sequence[int]) -> Measured:
    """Uniform draws by the response, one per token; for a critique, a step drawn from the key, or no answer."""
    if isinstance(signal, Critique):
        rollouts = [tree.nodes[index] for tree, index in nodes]
        return Measured([_toy_critique(signal, *pair) for pair in zip(rollouts, keys, strict=True)], 0)
    draws = [rng.key(signal.name, *tree.response(index)) for tree, index in nodes]
    counts = [len(tree.nodes[index].tokens) for tree, index in nodes]
    values = [rng.uniforms([key] * count, range(count)) for key, count in zip(draws, counts, strict=True)]
    return Measured(values, sum(counts))


def _toy_critique(signal: Critique, node: Node, key: int) -> np.ndarray:
    ends = signal.segment(node.tokens)
    named = key % (len(ends) + 2)  # the last two: no wrong step, no answer
    if named >= len(ends):
        return np.full(len(node.tokens), 0.0 if named == len(ends) else UNREAD)
    return np.repeat(np.arange(len(ends)) == named, np.diff([0, *ends])).astype(float)


def make_prompt(name: str, length: int = 3) -> Prompt:
    return Prompt(name, "text", tuple(range(100, 100 + length)), "question", "1")


decode: Callable[[Sequence[int]], str] = Letters().decode
