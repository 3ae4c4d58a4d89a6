"""Which worker samples what. Results do not depend on it: a draw depends on its key alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from deepgrpo.records import Completion, SampleRequest

SPILL = 1.5
"""A worker takes branches of its own rollouts until it has this many times its fair share."""


@dataclass(frozen=True, slots=True)
class RequestShare:
    """Some continuations of one request. Example: RequestShare(3, (0, 1)): the first two keys of request 3."""

    request: int
    places: tuple[int, ...]
    """Indices into the request's keys."""


@dataclass
class RolloutIndex:
    """Which worker sampled which rollout, and so may have its keys and values still."""

    _groups: dict[tuple[int, ...], list[tuple[tuple[int, ...], int]]] = field(default_factory=dict)

    def put(self, prefix: tuple[int, ...], completions: Iterable[Completion], worker: int) -> None:
        self._groups.setdefault(prefix, []).extend((c.tokens, worker) for c in completions)

    def find(self, wanted: tuple[int, ...]) -> int | None:
        """The worker with a rollout that begins with `wanted`, if there is one."""
        for start in {len(prefix) for prefix in self._groups}:
            rest = wanted[start:]
            for tokens, worker in self._groups.get(wanted[:start], ()) if rest else ():
                if tokens[: len(rest)] == rest:
                    return worker
        return None

    def forget(self, worker: int | None = None) -> None:
        """All, or what one worker had."""
        if worker is None:
            self._groups = {}
        else:
            self._groups = {p: [each for each in found if each[1] != worker] for p, found in self._groups.items()}


def spread(requests: Sequence[SampleRequest], workers: Sequence[int], kept: RolloutIndex) -> dict[int, list[RequestShare]]:
    """Share out requests by the tokens that they may cost.

    A branch goes to the worker that has its rollout, unless that one has `SPILL` times its fair share already; all else to
    whoever has least. A request that is more than a fair share by itself is split. Deterministic.
    """
    costs = [len(r.keys) * r.max_new_tokens for r in requests]
    fair = max(1.0, sum(costs) / len(workers))
    load = dict.fromkeys(workers, 0.0)
    shares: dict[int, list[RequestShare]] = {worker: [] for worker in workers}
    parts: list[tuple[float, RequestShare]] = []
    for index, request in enumerate(requests):
        pieces = min(len(request.keys), max(1, round(costs[index] / fair)))
        size = -(-len(request.keys) // pieces)
        for first in range(0, len(request.keys), size):
            places = tuple(range(first, min(first + size, len(request.keys))))
            parts.append((len(places) * request.max_new_tokens, RequestShare(index, places)))
    homeless: list[tuple[float, RequestShare]] = []
    for cost, part in parts:
        home = kept.find(requests[part.request].prefix)
        if home in load and load[home] + cost <= SPILL * fair:
            shares[home].append(part)
            load[home] += cost
        else:
            homeless.append((cost, part))
    for cost, part in sorted(homeless, key=lambda each: -each[0]):  # stable
        least = min(load, key=lambda worker: load[worker])
        shares[least].append(part)
        load[least] += cost
    return {worker: share for worker, share in shares.items() if share}
