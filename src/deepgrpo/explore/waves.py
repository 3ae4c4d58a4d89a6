"""A batch that grows in waves, so that branches of some prompts are sampled while others still sample their rollouts.

`grow` takes a batch level by level, and a level ends with its longest response: an engine of many workers is idle in part
until then. Two waves fill each other's gaps. What is drawn does not depend on it, as a draw has its place in the batch in its
address. For an engine that takes one call after the other it only makes batches smaller.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import ParamSpec, Protocol, TypeVar

from deepgrpo.engines.base import Engine, SampleStats, SamplingParams
from deepgrpo.explore.base import Signals
from deepgrpo.explore.grow import Growth, Judge, joined
from deepgrpo.records import Completion, Prompt, SampleRequest

P = ParamSpec("P")
T = TypeVar("T")


class GrowsWave(Protocol):
    """`grow` with all but these settled; `first` is the place of the wave's first prompt in the batch."""

    def __call__(
        self, prompts: Sequence[Prompt], first: int, *, engine: Engine, judge: Judge, signals: Signals | None
    ) -> Growth: ...


def grow_in_waves(
    prompts: Sequence[Prompt], waves: int, grow_wave: GrowsWave, *, engine: Engine, judge: Judge, signals: Signals | None = None
) -> Growth:
    """The trees that `grow` would have grown, and what they cost.

    Args:
        prompts: of the whole batch; a wave is a stretch of it.
        waves: how many grow at once, at most one per prompt.
        grow_wave: grows one.
        engine: takes calls of several threads at once.
        judge: is asked by one wave at a time, as `signals` is.

    `stats.seconds` is the time that all of it took, as the waves' own times overlap. Raises what a wave raises, when all
    have ended.
    """
    began = time.perf_counter()
    lock = threading.Lock()
    cuts = [len(prompts) * i // waves for i in range(waves + 1)]
    parts = [(prompts[a:b], a) for a, b in itertools.pairwise(cuts) if b > a]
    shared = _Shared(engine)
    asks = None if signals is None else _in_turn(lock, signals)
    try:
        with ThreadPoolExecutor(len(parts), "wave") as threads:
            running = [
                threads.submit(grow_wave, part, first, engine=shared, judge=_in_turn(lock, judge), signals=asks)
                for part, first in parts
            ]
        growth = joined([each.result() for each in running])
    finally:
        engine.forget()
    return replace(growth, stats=replace(growth.stats, seconds=time.perf_counter() - began))


class _Shared:
    """An engine that forgets when all waves are done, and not when one is."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.exact = engine, engine.exact

    @property
    def remark(self) -> str | None:
        return self.engine.remark

    def sample(
        self, requests: Sequence[SampleRequest], params: SamplingParams, *, keep: bool = False
    ) -> tuple[list[list[Completion]], SampleStats]:
        return self.engine.sample(requests, params, keep=keep)

    def forget(self) -> None:
        pass

    def close(self) -> None:
        pass


def _in_turn(lock: threading.Lock, function: Callable[P, T]) -> Callable[P, T]:
    def called(*args: P.args, **kwargs: P.kwargs) -> T:
        with lock:
            return function(*args, **kwargs)

    return called
