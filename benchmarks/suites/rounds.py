"""One `sample()` call on a cluster, taken apart.

    seconds of the call = ideal     tokens × latency / (workers × rows): no row ever waits
                        + tail      excess over that of one engine with all the rows: its last rows end alone
                        + routing   excess of the last worker's share over that
                        + engine    excess of the last worker's sleep over the requested one
                        + weights   loading new weights in the last worker
                        + spread    assigning requests to workers             (timed beside, on the same requests)
                        + pickle    requests there, completions back          (timed beside, on the same objects)
                        + ray       all other time between the caller and the last worker, there and back

The first three follow from the lengths and the shares alone; where all lengths are equal the tail is rounding to whole waves.
Routing may be below zero, as the shares are in another order than the requests. All but the first two is lost to distribution.
"""

from __future__ import annotations

import pickle
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.simulated import Note, Simulation, schedule, take_notes
from deepgrpo.cluster.routing import assign_requests
from deepgrpo.engines.base import Engine, SampleStats, SamplingParams
from deepgrpo.records import Completion, SampleRequest

if TYPE_CHECKING:
    from deepgrpo.cluster.pool import WorkerPool

PARTS = ("ideal", "tail", "routing", "engine", "weights", "spread", "pickle", "ray")


@dataclass(frozen=True, slots=True)
class Round:
    """Seconds of one call by part (`PARTS`), which add up to `seconds`. Example: the rollouts of a step."""

    seconds: float
    parts: dict[str, float]
    sent_bytes: int
    """Requests and completions, pickled."""


class Watched:
    """An engine whose calls are taken apart (`engines.base.Engine`)."""

    exact, remark = False, None

    def __init__(self, engine: Engine, simulation: Simulation, pool: WorkerPool | None) -> None:
        self.engine, self.simulation, self.pool = engine, simulation, pool
        self.rounds: list[Round] = []
        self.beside_s = 0.0
        """Seconds spent on the analysis itself, for a caller to subtract."""

    def sample(
        self, requests: Sequence[SampleRequest], params: SamplingParams, *, keep: bool = False
    ) -> tuple[list[list[Completion]], SampleStats]:
        """See `engines.base.Engine.sample`."""
        before = time.monotonic()
        workers = list(self.pool.workers) if self.pool else []
        if self.pool:
            assign_requests(requests, workers, self.pool.rollouts)  # as the pool does next
        began = time.monotonic()
        done, stats = self.engine.sample(requests, params, keep=keep)
        ended = time.monotonic()
        notes = take_notes(Path(self.simulation.notes))
        lengths = self.simulation.lengths(requests, params)
        self.rounds.append(self._round(requests, done, lengths, notes, began, ended, began - before))
        self.beside_s += began - before + time.monotonic() - ended
        return done, stats

    def _round(
        self, requests: Sequence[SampleRequest], done: Sequence[Sequence[Completion]], lengths: Sequence[int],
        notes: Sequence[Note], began: float, ended: float, spread_s: float,
    ) -> Round:  # fmt: skip
        simulation, count = self.simulation, len(self.pool.workers) if self.pool else 1
        last = max(notes, key=lambda note: note.ended)
        ideal = sum(lengths) * simulation.latency_s / (count * simulation.max_rows)
        one = schedule(lengths, count * simulation.max_rows) * simulation.latency_s
        parts = dict.fromkeys(PARTS, 0.0) | {
            "ideal": ideal, "tail": one - ideal, "routing": last.asked_s - one,
            "engine": last.ended - last.began - last.asked_s,
        }  # fmt: skip
        sent = 0
        if self.pool:
            out_s, in_s, asked_bytes = pickled(requests)
            back_s, home_s, told_bytes = pickled(done)
            # the caller packs and unpacks all shares, a worker its own
            wire = out_s + in_s / count + back_s / count + home_s
            there_and_back = last.arrived - began + ended - last.ended
            parts |= {
                "weights": last.began - last.arrived, "spread": spread_s, "pickle": wire,
                "ray": there_and_back - spread_s - wire,
            }  # fmt: skip
            sent = asked_bytes + told_bytes
        else:
            parts["engine"] += last.began - began + ended - last.ended
        return Round(ended - began, parts, sent)

    def forget(self) -> None:
        """See `engines.base.Engine.forget`."""
        self.engine.forget()

    def close(self) -> None:
        """See `engines.base.Engine.close`."""
        self.engine.close()


def pickled(what: Any) -> tuple[float, float, int]:
    """Seconds to pickle it as Ray does (protocol 5) and back, and its bytes."""
    began = time.monotonic()
    packed = pickle.dumps(what, protocol=5)
    middle = time.monotonic()
    pickle.loads(packed)
    return middle - began, time.monotonic() - middle, len(packed)


def added(rounds: Sequence[Round]) -> dict[str, float]:
    """Sum the parts of several calls, with their loss, `seconds` and `sent_bytes`."""
    found = {part: sum(each.parts[part] for each in rounds) for part in PARTS}
    return {
        **found, "lost": sum(found.values()) - found["ideal"] - found["tail"],
        "seconds": sum(each.seconds for each in rounds), "sent_bytes": float(sum(each.sent_bytes for each in rounds)),
    }  # fmt: skip
