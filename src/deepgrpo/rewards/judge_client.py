"""Requests to a judge: at once up to a limit, spaced, repeated after failures, each with a deadline.

    body ─► turn (concurrency, requests per minute, a pause of the server's) ─► POST, at most timeout_s
              ▲                                                                   │
              └── wait: Retry-After, else backoff_s · 2^i, up to max_wait_s ◄─────┤ 408, 409, 425, 429, 5xx, connection, time
                                                                                  ├─► text of the answer
                                                any other status: no retry ◄──────┘

The event loop runs in a thread of its own, so a caller may have one itself (a notebook), and Ctrl-C is heard meanwhile. The key
is in the header of the requests only; where a server repeats it, messages leave it out.
"""

from __future__ import annotations

import asyncio
import json
import random
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import httpx2 as httpx

from deepgrpo.config import JudgeKeys
from deepgrpo.errors import RewardError

_RETRIED = (408, 409, 425, 429)
_SETTINGS = (301, 302, 303, 307, 308, 401, 403, 404, 405)
"""Answers that say that the address or the key is wrong, as long as no request has been answered."""
_LARGEST = 4 << 20
"""Bytes of an answer that are read; more of them count as a failure."""


@dataclass(frozen=True, slots=True)
class Reply:
    """Outcome of a request after all its tries: the text of the answer, or a problem of `Score.problem`."""

    text: str | None = None
    problem: str | None = None


@dataclass(slots=True)
class Counts:
    """Counts since they were last taken."""

    calls: int = 0
    """Requests sent, retries included."""
    retries: int = 0
    cached: int = 0
    """Responses that were scored by a known answer."""
    failures: int = 0
    """Responses without a score."""
    seconds: float = 0.0
    """Time of requests in flight, added up."""
    waited: float = 0.0
    """Time of requests that waited for their turn by `requests_per_minute` or a server's pause, added up."""

    def take(self) -> dict[str, float]:
        """The counts as metrics, and start again from zero."""
        found = {f"reward/judge_{each.name}": float(getattr(self, each.name)) for each in fields(self)}
        for each in fields(self):
            setattr(self, each.name, type(getattr(self, each.name))())
        return found


class _FailedError(Exception):
    """A try without an answer."""

    def __init__(self, problem: str, said: str, status: int | None = None, pause: float | None = None) -> None:
        """`pause`: seconds that the server asks to wait."""
        super().__init__(said)
        self.problem, self.said, self.status, self.pause = problem, said, status, pause

    @property
    def lasting(self) -> bool:
        """True if another try would fail, too."""
        return self.problem == "refused"


class JudgeClient:
    """Asks the judge of a recipe. One call of `ask` at a time."""

    def __init__(
        self, config: JudgeKeys, key: str | None, counts: Counts, *,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep, clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        """Send nothing yet.

        Args:
            key: sent as a bearer token.
            counts: updated by every request.
            sleep, clock: of the waits; tests replace them.
        """
        self._config, self._key, self._counts, self._sleep, self._clock = config, key, counts, sleep, clock
        self._url = f"{config.base_url}/chat/completions"
        self._next = 0.0
        """Time of the next request by `requests_per_minute`."""
        self._paused = 0.0
        """Time until which the server wants no request."""
        self._answered = False

    def ask(self, bodies: Sequence[Mapping[str, Any]], heard: Callable[[int, str], None]) -> list[Reply]:
        """Send requests and wait for all of them.

        Args:
            bodies: JSON of each request.
            heard: called with the index and the text of each answer as it comes in.

        Raises RewardError if the server refuses them for a reason that lies in the recipe.
        """
        return _in_a_thread(self._ask(bodies, heard))

    async def _ask(self, bodies: Sequence[Mapping[str, Any]], heard: Callable[[int, str], None]) -> list[Reply]:
        turns = asyncio.Semaphore(self._config.concurrency)
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        limits = httpx.Limits(max_connections=None)  # a wait for a connection would count as time of the server
        replies: dict[int, Reply] = {}
        refusals: list[_FailedError] = []

        async def one(index: int) -> None:
            for attempt in range(self._config.retries + 1):
                try:
                    async with turns:
                        text = await self._try(client, bodies[index])
                    replies[index] = Reply(text)
                    self._answered = True
                    heard(index, text)
                    return
                except _FailedError as failure:
                    if failure.status in _SETTINGS and not self._answered:
                        raise
                    refusals.extend([failure] if failure.lasting else [])
                    replies[index] = Reply(problem=failure.problem)
                    wait = self._wait(attempt, failure)
                    if failure.lasting or wait is None or attempt == self._config.retries:
                        return
                self._counts.retries += 1
                await self._sleep(wait)

        try:
            async with (
                httpx.AsyncClient(headers=headers, limits=limits, timeout=None) as client,
                asyncio.TaskGroup() as group,
            ):
                for index in range(len(bodies)):
                    group.create_task(one(index))
        except* _FailedError as failed:
            first = failed.exceptions[0]
            assert isinstance(first, _FailedError)
            raise self._hopeless(first) from None
        if bodies and len(refusals) == len(bodies) and not self._answered:
            raise self._hopeless(refusals[0])
        return [replies[index] for index in range(len(bodies))]

    async def _try(self, client: httpx.AsyncClient, body: Mapping[str, Any]) -> str:
        """One request. Raises _FailedError."""
        await self._turn()
        began = self._clock()
        self._counts.calls += 1
        try:
            async with asyncio.timeout(self._config.timeout_s), client.stream("POST", self._url, json=body) as response:
                content = b""
                async for some in response.aiter_bytes():
                    content += some
                    if len(content) > _LARGEST:
                        raise _FailedError("no answer", f"more than {_LARGEST >> 20} MiB")
        except TimeoutError:
            raise _FailedError("timeout", f"nothing within reward.timeout_s = {self._config.timeout_s:g}") from None
        except (httpx.HTTPError, httpx.InvalidURL, httpx.StreamError) as error:
            raise _FailedError("no answer", self._shown(f"{type(error).__name__}: {error}")) from None
        finally:
            self._counts.seconds += self._clock() - began
        if response.status_code != 200:
            raise self._refusal(response, content)
        return _text_of(content)

    async def _turn(self) -> None:
        """Wait until the rate limit and the server allow a request."""
        now = self._clock()
        at = max(now, self._next, self._paused)
        if self._config.requests_per_minute is not None:
            self._next = at + 60.0 / self._config.requests_per_minute
        if at > now:
            self._counts.waited += at - now
            await self._sleep(at - now)

    def _refusal(self, response: httpx.Response, content: bytes) -> _FailedError:
        status = response.status_code
        said = self._shown(f"{status} {response.reason_phrase}: {content[:300].decode(errors='replace')}")
        if status not in _RETRIED and status < 500:
            return _FailedError("refused", said, status)
        pause = retry_after(response.headers.get("retry-after"), datetime.now(UTC))
        if pause is not None and pause <= self._config.max_wait_s:
            self._paused = max(self._paused, self._clock() + pause)
        return _FailedError("no answer", said, status, pause)

    def _wait(self, attempt: int, failure: _FailedError) -> float | None:
        """Seconds before the next try; None if the server asks for more than we wait."""
        if failure.pause is not None:
            return failure.pause if failure.pause <= self._config.max_wait_s else None
        longest: float = min(self._config.max_wait_s, self._config.backoff_s * 2**attempt)
        # spreads the tries of a round; no result depends on it
        return longest * (1.0 - random.random() / 2)

    def _hopeless(self, failure: _FailedError) -> RewardError:
        hint = {401: "reward.api_key_env", 403: "reward.api_key_env", 400: "reward.model and reward.options"}
        return RewardError(
            f"the judge at {self._url} refuses requests: {failure.said}; correct "
            f"{hint.get(failure.status or 0, 'reward.base_url and reward.model')}"
        )

    def _shown(self, text: str) -> str:
        """A text of the server on one line, without the key."""
        return " ".join((text.replace(self._key, "…") if self._key else text).split())[:300]


def _text_of(content: bytes) -> str:
    """The text of an answer. Raises _FailedError if it is none."""
    try:
        text = json.loads(content)["choices"][0]["message"]["content"]
        if isinstance(text, list):
            text = "".join(part.get("text", "") for part in text)
        text.encode()
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise _FailedError("no answer", "no chat completion") from None
    return str(text)


def retry_after(header: str | None, now: datetime) -> float | None:
    """Seconds of a Retry-After header, which is a number or a date; None without one that can be read.

    >>> retry_after("2", datetime(2026, 1, 1, tzinfo=UTC))
    2.0
    >>> retry_after("Thu, 01 Jan 2026 00:00:30 GMT", datetime(2026, 1, 1, tzinfo=UTC))
    30.0
    """
    if header is None:
        return None
    try:
        seconds = float(header)
    except ValueError:
        try:
            date = parsedate_to_datetime(header)
        except ValueError:
            return None
        seconds = (date.replace(tzinfo=date.tzinfo or UTC) - now).total_seconds()
    return max(0.0, seconds) if seconds == seconds else None


def _in_a_thread(work: Coroutine[Any, Any, list[Reply]]) -> list[Reply]:
    """Run a coroutine in an event loop of its own, in a thread, and return its result. An interrupt cancels it."""
    loop = asyncio.new_event_loop()
    task = loop.create_task(work)
    outcome: list[list[Reply] | BaseException] = []

    def run() -> None:
        try:
            outcome.append(loop.run_until_complete(task))
        except BaseException as error:
            outcome.append(error)
        finally:
            loop.close()

    thread = threading.Thread(target=run, name="deepgrpo-judge", daemon=True)
    thread.start()
    try:
        thread.join()
    except BaseException:
        loop.call_soon_threadsafe(task.cancel)
        thread.join(5.0)
        raise
    (found,) = outcome
    if isinstance(found, BaseException):
        raise found
    return found
