"""Mathematical answers, compared by math-verify in worker processes that can be killed.

    response ─► the part with the answer ─► equal checks merged ─► worker (time limit) ─► Score

A check that hangs, crashes or raises costs its own samples a zero with the problem "timeout", "crash" or "raised".
The time limit of a check starts when a worker takes it up: waiting behind others and the imports of a fresh worker
are not counted.

Workers are forked from a small server process that has math-verify loaded and torch not, so a killed one is replaced
in a few milliseconds; where there is no such server (Windows) they are spawned. As always with `multiprocessing`, a
script that trains needs `if __name__ == "__main__":` around its main part.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import CancelledError, Future, TimeoutError
from concurrent.futures.process import BrokenProcessPool
from typing import Literal

from pebble import ProcessExpired, ProcessPool

from deepgrpo.config import MathReward
from deepgrpo.errors import RewardError
from deepgrpo.records import Prompt, Score
from deepgrpo.rewards.base import references
from deepgrpo.rewards.math_check import check_answer, guarded, warm_up

Check = Callable[[str, tuple[str, ...]], tuple[bool, bool]]
AnswerFormat = Literal["boxed", "gsm8k", "any"]
_Job = tuple[str, tuple[str, ...]]


class MathAnswerReward:
    """1 if the answer equals an accepted one as mathematics, else 0. Workers start with the first call."""

    def __init__(self, config: MathReward, check: Check = check_answer) -> None:
        """`check` runs in the workers, which import it by name; tests put ill-behaved ones here."""
        self._config = config
        self._check = check
        self._pool: ProcessPool | None = None

    def score(
        self, prompts: Sequence[Prompt], completions: Sequence[str], completion_ids: Sequence[tuple[int, ...]]
    ) -> list[Score]:
        """Raises RewardError if a prompt has no reference, or if no worker can be started."""
        jobs: list[_Job | None] = []
        for prompt, completion in zip(prompts, completions, strict=True):
            accepted = references(prompt, 'reward.type = "math"')
            text = find_answer(completion, self._config.answer_format)
            jobs.append(None if text is None else (text, accepted))
        scores = self._run(dict.fromkeys(job for job in jobs if job is not None))
        return [Score(0.0, parsed=False) if job is None else scores[job] for job in jobs]

    def close(self) -> None:
        """Stop the workers."""
        pool, self._pool = self._pool, None
        if pool is not None:
            pool.stop()
            pool.join()

    def _run(self, jobs: Iterable[_Job]) -> dict[_Job, Score]:
        done: dict[_Job, Score] = {}
        waiting = self._submit(list(jobs), done)
        # A worker that dies within an instant of taking a check may break pebble's whole pool, as it cannot tell whose
        # fault it was. The checks that were lost then run again one by one, and a pool that breaks convicts its check.
        for job in waiting:
            if self._submit([job], done):
                self._prove_workers_start()
                done[job] = Score(0.0, problem="crash")
        return done

    def _submit(self, jobs: list[_Job], done: dict[_Job, Score]) -> list[_Job]:
        """Run checks at once; returns those that were lost because the pool broke."""
        try:
            pool = self._healthy_pool()
            futures = [
                (job, pool.schedule(guarded, args=(self._check, *job), timeout=self._config.timeout_s)) for job in jobs
            ]
        except (RuntimeError, OSError):
            return jobs
        lost = []
        for job, future in futures:
            score = _outcome(future)
            if score is None:
                lost.append(job)
            else:
                done[job] = score
        return lost

    def _healthy_pool(self) -> ProcessPool:
        if self._pool is not None and not self._pool.active:
            self.close()
        if self._pool is None:
            self._pool = ProcessPool(self._config.workers, initializer=warm_up, context=_context())
        return self._pool

    def _prove_workers_start(self) -> None:
        """Tell a check that kills its worker from workers that cannot start. Raises RewardError for the latter."""
        try:
            self._healthy_pool().schedule(_nothing).result(timeout=120)
        except (Exception, CancelledError) as error:
            self.close()
            raise RewardError(
                f'the worker process of reward.type = "math" cannot start ({error!r}); try '
                "`python -c 'import math_verify'`, and put the main part of your script under "
                '`if __name__ == "__main__":`'
            ) from error


def find_answer(completion: str, answer_format: AnswerFormat) -> str | None:
    r"""The part of a response that math-verify shall look at, or None if there is no answer.

    boxed: the last \boxed{...} whose braces close. gsm8k: the rest of the line after the last '####'. any: all of it.
    """
    if answer_format == "any":
        return completion if completion.strip() else None
    if answer_format == "gsm8k":
        _, found, answer = completion.rpartition("####")
        # the line: models like to go on and explain
        answer = answer.strip().split("\n", 1)[0] if found else ""
        # math-verify reads the dollars of "$1,000" as currency, but not those of "\$1,000"
        return answer.replace("\\$", "$") or None
    content = last_boxed(completion)
    content = None if content is None else content.strip().rstrip(".").rstrip()
    return f"\\boxed{{{content}}}" if content else None


def last_boxed(text: str) -> str | None:
    r"""What stands in the last \boxed{...} whose braces close.

    >>> last_boxed("\\boxed{1} or \\boxed{\\frac{1}{2}}, not \\boxed{3")
    '\\frac{1}{2}'
    """
    marker = "\\boxed{"
    stack: list[int | None] = []
    last: str | None = None
    last_start = -1
    index = 0
    # one pass with a stack: a response of thousands of unclosed boxes must not cost quadratic time
    while index < len(text):
        if text.startswith(marker, index):
            stack.append(index + len(marker))
            index += len(marker)
            continue
        if text.startswith(("\\{", "\\}"), index):
            index += 2  # an escaped brace is a character, not a bracket
            continue
        if text[index] == "{":
            stack.append(None)
        elif text[index] == "}" and stack:
            start = stack.pop()
            if start is not None and start > last_start:
                last, last_start = text[start:index], start
        index += 1
    return last


def _outcome(future: Future[tuple[bool, bool] | str]) -> Score | None:
    """A check's score, or None if it was lost with its pool."""
    try:
        result = future.result()
    except TimeoutError:
        return Score(0.0, problem="timeout")
    except ProcessExpired:
        return Score(0.0, problem="crash")
    except (BrokenProcessPool, CancelledError, RuntimeError, OSError):
        return None
    if isinstance(result, str):
        return Score(0.0, problem="raised")
    correct, found = result
    return Score(float(correct), parsed=found)


def _context() -> multiprocessing.context.BaseContext:
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    # only matters if nobody has started the server yet; the initializer imports it otherwise
    context.set_forkserver_preload(["math_verify"])
    return context


def _nothing() -> None:
    """Runs in a worker to show that there is one."""
