"""Tasks of reasoning-gym: generated questions, scored by the task's own `score_answer`.

`score_answer` takes the bare answer, which `extract_answer` finds in the response.
"""

from __future__ import annotations

import difflib
import pickle
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import islice
from typing import Any

from deepgrpo import rng
from deepgrpo.answers.boxed import last_boxed
from deepgrpo.answers.characters import plain
from deepgrpo.answers.numbers import read_number
from deepgrpo.answers.places import MARKER, answer_of_line
from deepgrpo.answers.running_text import last_number
from deepgrpo.config import ReasoningGymData
from deepgrpo.errors import ConfigError, requires_extra
from deepgrpo.feedback import Score
from deepgrpo.prompts.rows import QuestionRow
from deepgrpo.records import Prompt

_TEST_SHARE = 8  # one question in 8 belongs to the test split

# a number without a unit; fractions are texts to reasoning-gym
_PLAIN = re.compile(r"[-+\s\d.,]*\d(?:[eE][-+]?\d+)?")


def extract_answer(completion: str, reference: str | None) -> tuple[str, bool]:
    r"""Extract (answer, found) from a response.

    The answer is the last occurrence of the first of these that exists:

    1. the text between <answer> and </answer>;
    2. the text after '####';
    3. the content of \boxed{} (see `last_boxed`);
    4. the whole response.

    White space around it is stripped. If the reference is a number, the answer is the number in the text, without
    thousands separators and exponents: the first one behind a mark, as `find_answer` reads it, else the last one in the
    response ("4 - 1 = 3." gives "3"). A text without any number is returned unchanged as not found. An empty text is not
    found.
    """
    # plain searches: a regular expression takes quadratic time on a response that repeats <answer>
    end = completion.rfind("</answer>")
    start = completion.rfind("<answer>", 0, max(end, 0))
    marked = True
    if start >= 0:
        text = completion[start + len("<answer>") : end]
    elif MARKER in completion:
        text = completion.rpartition(MARKER)[2]
    else:
        boxed = last_boxed(completion)
        marked, text = boxed is not None, completion if boxed is None else boxed
    text = text.strip()
    if reference is None or not _PLAIN.fullmatch(plain(reference).strip()):
        return text, bool(text)
    span = last_number(text)
    number = read_number(answer_of_line(text.split("\n", 1)[0], numeric=True) if marked else text)
    if number is None and span is not None:
        number = read_number(text[span[0] : span[1]])
    return (text, False) if number is None else (number.text, True)


@dataclass(frozen=True, slots=True)
class GymTask:
    """reasoning-gym data set and its verifier."""

    dataset: Any
    data: ReasoningGymData

    def rows(self, limit: int | None = None) -> list[QuestionRow]:
        """Generate all questions of the split, or the first `limit`; takes seconds for the slow tasks."""
        every = (self._row(index) for index in range(len(self.dataset)))
        wanted = {"all": (True, False), "train": (False,), "test": (True,)}[self.data.split]
        return list(islice((row for row in every if is_test(row.question) in wanted), limit))

    def verify(self, prompt: Prompt, completion: str) -> Score:
        """`score_answer` of the extracted answer: 1 if correct, less for partial credit, 0 without an answer.

        Runs in this process without a time limit, and passes exceptions on. The reward uses `check` instead.
        """
        answer, found = extract_answer(completion, prompt.answer)
        if not found:
            return Score(0.0, parsed=False)
        return Score(float(self.dataset.score_answer(answer=answer, entry=dict(prompt.columns))))

    def preparation(self) -> Callable[[], None]:
        """Initializer of a worker process: create the data set from its section."""
        return partial(_prepare, pickle.dumps(self.data))

    def check(self, prompt: Prompt, completion: str) -> Callable[[], tuple[float, bool]] | None:
        """`verify` for a worker process; None if the completion has no answer."""
        answer, found = extract_answer(completion, prompt.answer)
        return partial(_score, pickle.dumps(self.data), answer, dict(prompt.columns)) if found else None

    def vote(self, prompt: Prompt, completion: str) -> str | None:
        """The scored answer."""
        answer, found = extract_answer(completion, prompt.answer)
        return answer if found else None

    def _row(self, index: int) -> QuestionRow:
        entry: Mapping[str, Any] = self.dataset[index]
        answer = entry["answer"]
        # `columns` holds the whole entry, the argument of score_answer
        name = f"{self.data.task}-{self.data.seed}-{index}"
        return QuestionRow(name, str(entry["question"]), None if answer is None else str(answer), dict(entry))


def is_test(question: str) -> bool:
    """True for a question of the test split; depends on its text only."""
    return rng.key("gym split", question) % _TEST_SHARE == 0


def rows(data: ReasoningGymData, skipped: Counter[str]) -> list[QuestionRow]:
    """Generate all questions of the split; no row is skipped. Raises ConfigError if there is none."""
    found = build_gym(data).rows(data.limit)
    if not found:
        raise ConfigError(
            f"data.split is {data.split!r}, but none of data.size = {data.size} questions belongs to it; raise data.size"
        )
    return found


def build_gym(data: ReasoningGymData) -> GymTask:
    """Create the data set.

    Raises ConfigError: unknown task or unsuitable parameters; MissingExtraError without reasoning-gym.
    """
    with requires_extra("reasoning-gym", "gym", 'data.type = "reasoning_gym"'):
        import reasoning_gym
        from reasoning_gym.factory import DATASETS

        from deepgrpo.prompts.gym_guard import guard
    guard()  # some verifiers evaluate the answer as Python
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
    except Exception as error:  # its configs validate themselves with bare asserts
        raise ConfigError(
            f"data.params = {data.params!r} does not suit the reasoning-gym task {data.task!r}: "
            f"{str(error) or type(error).__name__}; correct the parameters"
        ) from error
    return GymTask(dataset, data)


def _with_specs(params: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters of the task "composite": the tables `datasets` as specs, by default with weight 1 and no settings."""
    from reasoning_gym.composite import DatasetSpec

    specs = [DatasetSpec(**{"weight": 1.0, "config": {}, **each}) for each in params.get("datasets", ())]
    return {**params, "datasets": specs}


# ---------------------------------------------------------------- in a worker process


@lru_cache(maxsize=64)
def _dataset(data: bytes) -> Any:
    return build_gym(pickle.loads(data)).dataset


def _prepare(data: bytes) -> None:
    _dataset(data)


def _score(data: bytes, answer: str, entry: dict[str, Any]) -> tuple[float, bool]:
    return float(_dataset(data).score_answer(answer=answer, entry=entry)), True
