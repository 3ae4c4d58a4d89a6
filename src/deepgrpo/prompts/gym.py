"""Tasks of reasoning-gym: questions made by a generator, scored by the task's own `score_answer`.

`score_answer` wants the bare answer, so it is first taken out of the response, see `extract_answer`.
"""

from __future__ import annotations

import difflib
import pickle
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

from deepgrpo.boxed import last_boxed
from deepgrpo.config import ReasoningGymData
from deepgrpo.errors import ConfigError, MissingExtraError
from deepgrpo.prompts.rows import Row
from deepgrpo.records import Prompt, Score

# a minus after a digit, a letter or a bracket subtracts; elsewhere it is a sign
_NUMBER = re.compile(r"(?:(?<![\w)])-)?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?")


def extract_answer(completion: str, reference: str | None) -> tuple[str, bool]:
    r"""The answer in a response, and whether there was one.

    Looked at in this order, the last occurrence of the first that is there:

    1. what stands between <answer> and </answer>;
    2. what follows '####';
    3. what stands in \boxed{} (see `last_boxed`);
    4. the whole response.

    White space around it is cut off. If the reference is a number and the text found is not one, the last number in
    that text is taken, without thousands separators ("4 - 1 = 3." gives "3"); without any number the text stays as
    it is and counts as not found. An empty text counts as not found.
    """
    # plain searches: a pattern would take quadratic time over a response that repeats <answer> a thousand times
    end = completion.rfind("</answer>")
    start = completion.rfind("<answer>", 0, max(end, 0))
    if start >= 0:
        text = completion[start + len("<answer>") : end]
    elif "####" in completion:
        text = completion.rpartition("####")[2]
    else:
        boxed = last_boxed(completion)
        text = completion if boxed is None else boxed
    text = text.strip()
    if reference is None or not _NUMBER.fullmatch(reference.strip()) or _NUMBER.fullmatch(text):
        return (text.replace(",", "") if _NUMBER.fullmatch(text) else text), bool(text)
    numbers = _NUMBER.findall(text)
    return (numbers[-1].replace(",", ""), True) if numbers else (text, False)


@dataclass(frozen=True, slots=True)
class GymTask:
    """A reasoning-gym data set and its verifier."""

    dataset: Any
    data: ReasoningGymData

    def rows(self, limit: int | None = None) -> list[Row]:
        """All questions, or the first `limit`. They are made here and now, which takes seconds for the slow tasks."""
        count = len(self.dataset) if limit is None else min(limit, len(self.dataset))
        return [self._row(index) for index in range(count)]

    def verify(self, prompt: Prompt, completion: str) -> Score:
        """`score_answer` of the extracted answer: 1 if right; some tasks give part of it. 0 if none was found.

        It runs in this process and without a time limit; what it raises is passed on. The reward uses `check`.
        """
        answer, found = extract_answer(completion, prompt.answer)
        if not found:
            return Score(0.0, parsed=False)
        return Score(float(self.dataset.score_answer(answer=answer, entry=dict(prompt.columns))))

    def preparation(self) -> Callable[[], None]:
        """What a worker process does before its first check: make the data set once more, from the recipe."""
        return partial(_prepare, pickle.dumps(self.data))

    def check(self, prompt: Prompt, completion: str) -> Callable[[], tuple[float, bool]] | None:
        """`verify` for a worker process, or None if there is no answer to score."""
        answer, found = extract_answer(completion, prompt.answer)
        return partial(_score, pickle.dumps(self.data), answer, dict(prompt.columns)) if found else None

    def vote(self, prompt: Prompt, completion: str) -> str | None:
        """The answer that is scored."""
        answer, found = extract_answer(completion, prompt.answer)
        return answer if found else None

    def _row(self, index: int) -> Row:
        entry: Mapping[str, Any] = self.dataset[index]
        answer = entry["answer"]
        # the whole entry travels in `columns`: it is what score_answer wants back
        name = f"{self.data.task}-{self.data.seed}-{index}"
        return Row(name, str(entry["question"]), None if answer is None else str(answer), dict(entry))


def rows(data: ReasoningGymData, skipped: Counter[str]) -> list[Row]:
    """All questions of the data set; none is unusable."""
    return build_gym(data).rows(data.limit)


def build_gym(data: ReasoningGymData) -> GymTask:
    """Create the data set.

    Raises ConfigError: no such task, or parameters that do not suit it; MissingExtraError without reasoning-gym.
    """
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ImportError:
        raise MissingExtraError("reasoning-gym", "gym", 'data.type = "reasoning_gym"') from None
    if data.task not in DATASETS:
        close = difflib.get_close_matches(data.task, DATASETS, n=3)
        hint = f"did you mean {' or '.join(map(repr, close))}?" if close else f"choose one of {', '.join(DATASETS)}"
        raise ConfigError(f"data.task is {data.task!r}, which reasoning-gym does not have; {hint}")
    for name in ("size", "seed"):
        if name in data.params:
            raise ConfigError(f"data.params has {name!r} = {data.params[name]!r}; set data.{name} instead")
    try:
        params = _with_specs(data.params) if data.task == "composite" else data.params
        dataset = reasoning_gym.create_dataset(data.task, size=data.size, seed=data.seed, **params)
    except Exception as error:  # its configs check themselves with bare asserts
        raise ConfigError(
            f"data.params = {data.params!r} does not suit the reasoning-gym task {data.task!r}: "
            f"{str(error) or type(error).__name__}; correct the parameters"
        ) from error
    return GymTask(dataset, data)


def _with_specs(params: Mapping[str, Any]) -> dict[str, Any]:
    """The tables of `data.params.datasets` as what the task "composite" wants; weight 1 and no settings by default."""
    from reasoning_gym.composite import DatasetSpec

    specs = [DatasetSpec(**{"weight": 1.0, "config": {}, **each}) for each in params.get("datasets", ())]
    return {**params, "datasets": specs}


# ---------------------------------------------------------------- in a worker process


@lru_cache(maxsize=4)
def _dataset(data: bytes) -> Any:
    return build_gym(pickle.loads(data)).dataset


def _prepare(data: bytes) -> None:
    _dataset(data)


def _score(data: bytes, answer: str, entry: dict[str, Any]) -> tuple[float, bool]:
    return float(_dataset(data).score_answer(answer=answer, entry=entry)), True
