"""Assignment of requests to rollout workers. Results do not depend on it: a draw depends on its key alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from deepgrpo.records import Completion, SampleRequest

MAX_LOAD = 1.5
"""A worker takes branches of its own rollouts up to this multiple of its fair share."""


@dataclass(frozen=True, slots=True)
class RequestShare:
    """Some continuations of one request. Example: RequestShare(3, (0, 1)): the first two keys of request 3."""

    request: int
    indices: tuple[int, ...]
    """Indices into the request's keys."""


@dataclass
class RolloutIndex:
    """Map from rollouts to the workers that sampled them and may still have their keys and values."""

    _groups: dict[tuple[int, ...], list[tuple[tuple[int, ...], int]]] = field(default_factory=dict)

    def add(self, prefix: tuple[int, ...], completions: Iterable[Completion], worker: int) -> None:
        self._groups.setdefault(prefix, []).extend((c.tokens, worker) for c in completions)

    def find(self, request: SampleRequest) -> int | None:
        """Return the worker with a rollout that begins with the request's prefix, or with the part of it that is known from
        earlier turns; None if there is none.
        """
        wanted = request.prefix[: request.known or None]
        for start in {len(prefix) for prefix in self._groups}:
            rest = wanted[start:]
            for tokens, worker in self._groups.get(wanted[:start], ()) if rest or request.known else ():
                if tokens[: len(rest)] == rest:
                    return worker
        return None

    def forget(self, worker: int | None = None) -> None:
        """Drop the rollouts of one worker; None: of all."""
        if worker is None:
            self._groups = {}
        else:
            self._groups = {p: [each for each in found if each[1] != worker] for p, found in self._groups.items()}


def assign_requests(
    requests: Sequence[SampleRequest], workers: Sequence[int], rollouts: RolloutIndex
) -> dict[int, list[RequestShare]]:
    """Assign requests to workers by the tokens that they may cost. Deterministic.

    A branch goes to the worker that has its rollout, up to `MAX_LOAD` times that worker's fair share; everything else goes
    to the least loaded worker. A request that exceeds a fair share by itself is split.
    """
    costs = [len(r.keys) * r.max_new_tokens for r in requests]
    fair = max(1.0, sum(costs) / len(workers))
    load = dict.fromkeys(workers, 0.0)
    assigned: dict[int, list[RequestShare]] = {worker: [] for worker in workers}
    shares: list[tuple[float, RequestShare]] = []
    for number, request in enumerate(requests):
        pieces = min(len(request.keys), max(1, round(costs[number] / fair)))
        size = -(-len(request.keys) // pieces)
        for first in range(0, len(request.keys), size):
            indices = tuple(range(first, min(first + size, len(request.keys))))
            shares.append((len(indices) * request.max_new_tokens, RequestShare(number, indices)))
    free: list[tuple[float, RequestShare]] = []
    for cost, share in shares:
        home = rollouts.find(requests[share.request])
        if home in load and load[home] + cost <= MAX_LOAD * fair:
            assigned[home].append(share)
            load[home] += cost
        else:
            free.append((cost, share))
    for cost, share in sorted(free, key=lambda each: -each[0]):  # stable
        least = min(load, key=lambda worker: load[worker])
        assigned[least].append(share)
        load[least] += cost
    return {worker: own for worker, own in assigned.items() if own}
