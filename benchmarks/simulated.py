"""A simulated engine that only sleeps for a known time, so any extra time measured is cluster overhead.

    requests ─► lengths by key ─► schedule(lengths, rows) tokens × latency ─► sleep until then ─► tokens by key
                                                                         └─► a note: what was asked, when it was done

It decodes `max_rows` rows at once, a token of each in `latency_s`, and the next waiting row takes the place of one that
ends, as in our own engines. Prefixes cost nothing. It samples the same tokens wherever it runs.
"""

from __future__ import annotations

import heapq
import json
import math
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from deepgrpo import rng
from deepgrpo.config import Config
from deepgrpo.engines.base import SampleStats, SamplingParams
from deepgrpo.model.policy import Policy
from deepgrpo.records import Completion, FinishReason, SampleRequest

SUCCESS = 0.375
"""Chance of a response under the reward `coin`: three of eight, as in the workloads."""


def schedule(lengths: Sequence[int], rows: int) -> int:
    """Tokens that an engine of so many rows decodes one after the other until all lengths are done, in their order.

    >>> schedule([5, 5, 5], 2)   # two rows at once, then the third alone
    10
    >>> schedule([9, 2, 3, 4], 2)   # 2, 3 and 4 follow each other beside the 9
    9
    """
    if not lengths:
        return 0
    ends = [0] * min(rows, len(lengths))
    for length in lengths:
        heapq.heapreplace(ends, ends[0] + length)
    return max(ends)


@dataclass(frozen=True, slots=True)
class Note:
    """One call of a simulated engine. Times are seconds of the clock that all processes of a machine share."""

    pid: int
    arrived: float
    """A rollout worker had the requests; before `began` where it took over new weights first."""
    began: float
    asked_s: float
    """Intended seconds."""
    ended: float


@dataclass(frozen=True, slots=True)
class Simulation:
    """Settings of the simulation; called in the sampling process, it makes the engine (`train.build.SamplerBuilder`).

    Example: Simulation("/tmp/notes", latency_s=0.002, max_rows=16, ends=0.02, vocabulary=64).
    """

    notes: str
    """Directory for notes, on the machine where all of them run."""
    latency_s: float
    """Seconds for a token of all rows."""
    max_rows: int
    ends: float
    """Chance that a text ends with a token, if there is a stop string: lengths are then geometric, with the mean 1 / ends
    before they are cut off. Without stop strings every text is as long as it may be."""
    vocabulary: int

    def __call__(self, config: Config, policy: Policy) -> SimulatedEngine:
        return SimulatedEngine(self, policy)

    def lengths(self, requests: Sequence[SampleRequest], params: SamplingParams) -> list[int]:
        """Lengths of all continuations, in order."""
        longest = [request.max_new_tokens for request in requests for _ in request.keys]
        if not params.stop:
            return longest
        draws = rng.uniforms([key for request in requests for key in request.keys], [0] * len(longest))
        wanted = 1 + np.floor(np.log1p(-draws) / math.log1p(-self.ends)).astype(int)
        return [min(int(each), most) for each, most in zip(wanted, longest, strict=True)]


class SimulatedEngine:
    """See `engines.base.Engine`."""

    exact = False
    remark = None

    def __init__(self, simulation: Simulation, policy: Policy) -> None:
        self.simulation = simulation
        self._watched = next(iter(policy.trainable().values()))
        self._weights = self._watched._version
        self._forgot = 0.0

    def sample(
        self, requests: Sequence[SampleRequest], params: SamplingParams, *, keep: bool = False
    ) -> tuple[list[list[Completion]], SampleStats]:
        """See `engines.base.Engine.sample`."""
        began = time.monotonic()
        # a worker forgets, takes over new weights and samples, in this order; torch counts what is written into a tensor
        new, self._weights = self._watched._version != self._weights, self._watched._version
        lengths = self.simulation.lengths(requests, params)
        asked = schedule(lengths, self.simulation.max_rows) * self.simulation.latency_s
        groups = self._texts(requests, lengths, params)
        time.sleep(max(0.0, began + asked - time.monotonic()))
        note = Note(os.getpid(), self._forgot if new else began, began, asked, time.monotonic())
        with (Path(self.simulation.notes) / f"{note.pid}.jsonl").open("a") as file:
            file.write(json.dumps(asdict(note)) + "\n")
        prefixes = sum(len(request.prefix) * len(request.keys) for request in requests)
        return groups, SampleStats(sum(lengths), prefixes, 0, note.ended - began)

    def _texts(
        self, requests: Sequence[SampleRequest], lengths: Sequence[int], params: SamplingParams
    ) -> list[list[Completion]]:
        """Uniform tokens, with log-probs about those of a model that knows nothing."""
        keys = [key for request in requests for key in request.keys]
        counters = np.concatenate([np.arange(1, length + 1) for length in lengths]) if keys else np.zeros(0)
        draws = rng.uniforms(np.repeat(np.asarray(keys, dtype=np.uint64), lengths), counters)
        tokens = (draws * self.simulation.vocabulary).astype(int).tolist()
        logprobs = (-math.log(self.simulation.vocabulary) + 0.01 * (draws - 0.5)).tolist()
        groups: list[list[Completion]] = []
        place = row = 0
        for request in requests:
            group: list[Completion] = []
            for _ in request.keys:
                end = place + lengths[row]
                cut = bool(params.stop) and lengths[row] == request.max_new_tokens
                finish: FinishReason = "length" if cut else "stop"
                group.append(Completion(tuple(tokens[place:end]), tuple(logprobs[place:end]), finish))
                place, row = end, row + 1
            groups.append(group)
        return groups

    def forget(self) -> None:
        """See `engines.base.Engine.forget`."""
        self._forgot = time.monotonic()

    def close(self) -> None:
        """See `engines.base.Engine.close`."""


def take_notes(directory: Path) -> list[Note]:
    """Notes since the last call. Call it only between samples."""
    notes: list[Note] = []
    for path in sorted(directory.glob("*.jsonl")):
        notes += [Note(**json.loads(line)) for line in path.read_text().splitlines()]
        path.unlink()
    return notes


def coin(completions: Sequence[str], completion_ids: Sequence[Sequence[int]]) -> list[float]:
    """A reward by the tokens of a response alone: 1 with the chance `SUCCESS`."""
    return [float(rng.uniforms([rng.key("coin", *ids)], [0])[0] < SUCCESS) for ids in completion_ids]
