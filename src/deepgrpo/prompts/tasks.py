"""Registry of data types: reader of the rows, and verifier for tasks that have one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from deepgrpo.config import DataConfig, MixData
from deepgrpo.feedback import Score
from deepgrpo.prompts import given, gym, multihop, readers, synthetic
from deepgrpo.prompts.gym import GymTask
from deepgrpo.prompts.rows import QuestionRow
from deepgrpo.records import Prompt


class Task(Protocol):
    """Verifier of a task. A synthetic task also has the solution and the first error."""

    def verify(self, prompt: Prompt, completion: str) -> Score:
        """Score one response: `completion` is its text without the prompt and without special tokens such as EOS."""


@dataclass(frozen=True, slots=True)
class _Kind:
    rows: Callable[[Any, Counter[str]], list[QuestionRow]]
    """Read the rows of a data section; count the rows left out under their reason."""
    task: Callable[[Any], Task] | None = None
    """Build the verifier; None for files, which have none."""


_KINDS = {
    "jsonl": _Kind(readers.jsonl_rows),
    "parquet": _Kind(readers.parquet_rows),
    "hf": _Kind(readers.hub_rows),
    "given": _Kind(given.given_rows),
    "synthetic": _Kind(synthetic.rows, synthetic.build_synthetic),
    "search": _Kind(synthetic.rows, synthetic.build_synthetic),
    "lookup": _Kind(synthetic.rows, synthetic.build_synthetic),
    "multihop": _Kind(multihop.rows, multihop.MultihopTask),
    "reasoning_gym": _Kind(gym.rows, gym.build_gym),
}


def read_rows(data: DataConfig, skipped: Counter[str]) -> list[QuestionRow]:
    """Read all rows of a finite data section; `skipped` counts the rows left out, by reason.

    Raises DataError, ConfigError or MissingExtraError, see `prompts.readers`, `prompts.rows` and `prompts.gym`.
    """
    return _KINDS[data.type].rows(data, skipped)


@dataclass(frozen=True, slots=True)
class MixTask:
    """Verifier of a mix of reasoning-gym tasks: each response is scored by the task of its prompt."""

    tasks: Mapping[str, GymTask]
    """By the name of the source."""

    def verify(self, prompt: Prompt, completion: str) -> Score:
        """See `GymTask.verify`."""
        return self.tasks[prompt.source].verify(prompt, completion)

    def preparation(self) -> Callable[[], None]:
        """See `GymTask.preparation`."""
        return partial(_prepare, [task.preparation() for task in self.tasks.values()])

    def check(self, prompt: Prompt, completion: str) -> Callable[[], tuple[float, bool]] | None:
        """See `GymTask.check`."""
        return self.tasks[prompt.source].check(prompt, completion)

    def vote(self, prompt: Prompt, completion: str) -> str | None:
        """See `GymTask.vote`."""
        return self.tasks[prompt.source].vote(prompt, completion)


def _prepare(preparations: Sequence[Callable[[], None]]) -> None:
    for each in preparations:
        each()


def build_task(data: DataConfig) -> Task | None:
    """Build the verifier of a data section, or return None for a file, which has none.

    Raises ConfigError or MissingExtraError, see `build_gym`.
    """
    if isinstance(data, MixData):
        tasks = {each.label: build_task(each.data) for each in data.sources}
        verifiers = {name: task for name, task in tasks.items() if isinstance(task, GymTask)}
        return MixTask(verifiers) if len(verifiers) == len(tasks) else None
    build = _KINDS[data.type].task
    return None if build is None else build(data)
