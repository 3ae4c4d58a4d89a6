"""Curriculum: prompts are drawn by weight, from a memory of how often each was solved.

    p          = (successes + prior_rate · prior_tries) / (tries + prior_tries), earlier tries decayed
    weight     frontier: p · (1 - p)        difficulty: 1 - p
    rest       a prompt solved `rest_tries` times in a row has weight 0 for `rest_steps` steps, then that of a new prompt
    a step     draws without replacement: the order of log weight + Gumbel noise, from the top

The memory is a value: plain JSON, passed in and returned, and saved in the checkpoint. The noise of a step has the address
(seed, step), and the order is that of the whole step, so rounds of dynamic sampling take consecutive pieces of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from deepgrpo import rng
from deepgrpo.config.curriculum import CurriculumConfig, Sampling
from deepgrpo.prompts.base import Cursor
from deepgrpo.records import Prompt, Tree

Memory = Mapping[str, Any]
"""{index of the prompt: [successes, tries, tries solved in a row, step of the last draw]}, in the order of the last draws."""


class Indexed(Protocol):
    """A finite source whose prompts have numbers."""

    def __len__(self) -> int: ...

    def at(self, indices: Sequence[int]) -> tuple[Prompt, ...]: ...


@dataclass(frozen=True)
class Curriculum:
    """Rule of the draws. It never changes; the memory does."""

    source: Indexed
    sampling: Sampling
    config: CurriculumConfig
    seed: int

    def draw(self, memory: Memory, step: int, start: Cursor) -> StepDraw:
        """The prompts of a step, in the order in which they are taken.

        Args:
            memory: before the step.
            step: from 1.
            start: cursor before the step.
        """
        return StepDraw(self, memory, step, start)

    def weights(self, memory: Memory, step: int) -> np.ndarray:
        """`[N]` weight of each prompt at a step; all equal if all rest."""
        config, count = self.config, len(self.source)
        rates = np.full(count, config.prior_rate)
        resting = np.zeros(count, dtype=bool)
        if memory:
            index = np.array([int(key) for key in memory])
            successes, tries, row, last = np.array(list(memory.values()), dtype=np.float64).T
            seen = (successes + config.prior_rate * config.prior_tries) / (tries + config.prior_tries)
            solved = row >= config.rest_tries
            rested = last + config.rest_steps < step
            rates[index] = np.where(solved & rested, config.prior_rate, seen)
            resting[index] = solved & ~rested
        weights = rates * (1 - rates) if self.sampling == "frontier" else 1 - rates
        weights[resting] = 0.0
        return weights if weights.any() else np.ones(count)

    def order(self, memory: Memory, step: int, turn: int = 0) -> np.ndarray:
        """`[N]` indices of all prompts in the order of a step; those that rest come last.

        Args:
            turn: 0; a step that takes more prompts than there are goes on with turn 1.
        """
        weights = self.weights(memory, step)
        noise = rng.generator(self.seed, "curriculum", step, turn).gumbel(size=len(weights))
        with np.errstate(divide="ignore"):
            keys = np.where(weights > 0, np.log(weights), -np.inf) + noise
        # prompts that rest follow in a random order too, for a step that takes them all
        return np.lexsort((-noise, -keys))

    def observe(self, memory: Memory, step: int, indices: Sequence[int], trees: Sequence[Tree], threshold: float) -> Memory:
        """The memory after a step.

        Args:
            indices: of the prompts of the trees.
            threshold: an outcome above it is a success.
        """
        found = {key: list(value) for key, value in memory.items()}
        for index, tree in zip(indices, trees, strict=True):
            outcomes = [outcome > threshold for outcome in _outcomes(tree)]
            if not outcomes:
                continue
            successes, tries, row, _ = found.pop(str(int(index)), [0.0, 0.0, 0, 0])  # and to the end, as the newest
            decay = self.config.memory
            row = row + len(outcomes) if all(outcomes) else 0
            found[str(int(index))] = [decay * successes + sum(outcomes), decay * tries + len(outcomes), row, step]
        for key in list(found)[: max(0, len(found) - self.config.window)]:
            del found[key]
        return found

    def metrics(self, memory: Memory, step: int, indices: Sequence[int]) -> dict[str, float]:
        """Metrics of the memory before a step, and of the prompts that the step drew.

        Args:
            indices: of the prompts drawn.
        """
        weights = self.weights(memory, step)
        share = weights / weights.sum()
        config = self.config
        known = [memory[key] for index in indices if (key := str(int(index))) in memory]
        found = {
            "curriculum/seen": len(memory) / len(weights),
            "curriculum/resting": float(
                sum(row >= config.rest_tries and last + config.rest_steps >= step for _, _, row, last in memory.values())
            ),
            # of equal weights, the number of prompts
            "curriculum/effective_prompts": float(1.0 / np.square(share).sum()),
            "curriculum/new": float(len(indices) - len(known)),
            "curriculum/looked_at_again": float(sum(row >= config.rest_tries for _, _, row, _ in known)),
        }
        if memory:
            found["curriculum/rate"] = float(np.mean([successes / tries for successes, tries, _, _ in memory.values()]))
        if known:
            found["curriculum/rate_drawn"] = float(np.mean([successes / tries for successes, tries, _, _ in known]))
        return found


@dataclass(frozen=True)
class StepDraw:
    """The prompts of one step, with the `take` of a source: a pure function of the cursor.

    An epoch is as many draws as there are prompts.
    """

    curriculum: Curriculum
    memory: Memory
    step: int
    start: Cursor

    def take(self, cursor: Cursor, num_prompts: int) -> tuple[tuple[Prompt, ...], Cursor]:
        """See `PromptSource.take`."""
        size = len(self.curriculum.source)
        indices = self.indices(cursor, num_prompts)
        place = cursor.epoch * size + cursor.position + num_prompts
        return self.curriculum.source.at(indices), Cursor(place // size, place % size)

    def indices(self, cursor: Cursor, num_prompts: int) -> list[int]:
        """Indices of the prompts that `take` returns."""
        size = len(self.curriculum.source)
        first = (cursor.epoch - self.start.epoch) * size + cursor.position - self.start.position
        last = first + num_prompts
        turns = [self.curriculum.order(self.memory, self.step, turn) for turn in range(first // size, (last - 1) // size + 1)]
        begin = first - first // size * size
        return [int(index) for index in np.concatenate(turns)[begin : begin + num_prompts]]


def _outcomes(tree: Tree) -> list[float]:
    """Outcomes of the responses to the prompt itself; of all responses if there are none in the main stream."""
    main = [node.outcome for _, node in tree.stream("main") if node.complete]
    return main or [node.outcome for node in tree.nodes if node.complete]


def check_memory(memory: Memory, size: int) -> None:
    """Raises ValueError if a saved memory is none, or that of another data set."""
    for key, value in memory.items():
        if not key.isdigit() or int(key) >= size:
            raise ValueError(f"curriculum.{key} is no prompt of the data")
        if not isinstance(value, list) or len(value) != 4 or not all(isinstance(number, int | float) for number in value):
            raise ValueError(f"curriculum.{key} is {value!r}; it should be four numbers")
