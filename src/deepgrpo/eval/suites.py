"""Maths suites by name, and the other forms of `--data`.

    gsm8k                        a suite: NAME.jsonl or NAME_test.jsonl in the data directory, if given, else the hub
    gsm8k=path/to/file.jsonl     a suite's wording and rules on a local file
    mine=path/to/file.parquet    any file, under a chosen name
    path/to/file.jsonl           any file; also a directory of shards, a pattern, or a folder of `save_to_disk`
    owner/name[:config][:split]  a data set on the hub (split: test)

The package contains no questions: a suite only states its location, its columns and its wording.
"""

from __future__ import annotations

import difflib
import glob
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from deepgrpo.config import (
    ColumnMap,
    DataConfig,
    HubData,
    JsonlData,
    MathReward,
    ParquetData,
    RewardConfig,
    TemplateConfig,
)
from deepgrpo.errors import ConfigError, DataError, requires_extra
from deepgrpo.prompts.jsonl import ENDINGS, first_row
from deepgrpo.prompts.paths import paths_of
from deepgrpo.prompts.readers import load_hub, plain_rows
from deepgrpo.prompts.shards import files_of, is_saved

AnswerFormat = Literal["boxed", "gsm8k", "any"]
Preset = Literal["plain", "gsm8k", "math", "custom"]

REFERENCE_MARKER = "####"
"""Marker in a reference column: the reference is the text after it."""

ANSWER_FORMATS: dict[Preset, AnswerFormat] = {"gsm8k": "gsm8k", "math": "boxed", "plain": "any", "custom": "any"}
"""Answer format of each wording: the place that it asks for."""

_ENDINGS = (".jsonl", ".jsonl.gz", ".parquet")
_QUESTION_COLUMNS = ("question", "problem", "prompt")
_ANSWER_COLUMNS = ("answer", "final_answer", "ground_truth", "reward_model.ground_truth")


@dataclass(frozen=True, slots=True)
class Suite:
    """Published test set: location on the hub, columns and wording.

    Example: Suite("math500", hub="HuggingFaceH4/MATH-500", question="problem").
    """

    name: str
    hub: str
    config: str | None = None
    split: str = "test"
    question: str = "question"
    answer: str = "answer"
    preset: Preset = "math"
    max_new_tokens: int = 2048
    """Default length limit of a response, in tokens; capped at the model's context."""


SUITES: dict[str, Suite] = {
    suite.name: suite
    for suite in (
        # the answer column on the hub holds the whole solution, see REFERENCE_MARKER
        Suite("gsm8k", "openai/gsm8k", config="main", preset="gsm8k", max_new_tokens=512),
        Suite("math500", "HuggingFaceH4/MATH-500", question="problem"),
        Suite("aime24", "HuggingFaceH4/aime_2024", split="train", question="problem"),
        Suite("amc", "AI-MO/aimo-validation-amc", split="train", question="problem"),
        Suite("minerva", "math-ai/minervamath"),
        # final_answer is a list with one text
        Suite("olympiad_bench", "math-ai/olympiadbench", answer="final_answer"),
    )
}


@dataclass(frozen=True, slots=True)
class EvalSet:
    """Resolved data set of an evaluation.

    Example: EvalSet(name="gsm8k", data=JsonlData(...), reward=MathReward(...), max_new_tokens=512).
    """

    name: str
    data: DataConfig
    reward: RewardConfig
    max_new_tokens: int | None = None
    """The suite's default; None without one."""


def resolve_suite(
    name: str,
    path: str | Path | None = None,
    *,
    template: TemplateConfig | None = None,
    answer_format: AnswerFormat | None = None,
    limit: int | None = None,
) -> EvalSet:
    """Resolve a suite, from a local file if given, else from the hub.

    Args:
        name: one of `SUITES`.
        path: a .jsonl or .parquet file, with the suite's columns or with question and answer.
        template: wording; default: the suite's preset.
        answer_format: place of the answer; default: the one that the wording asks for.
        limit: number of rows, from the first.

    Raises:
        ConfigError: unknown name (the message gives the nearest one).
        DataError: the file does not exist or has another type.
    """
    suite = SUITES.get(name)
    if suite is None:
        raise ConfigError(f"{name!r} is no known suite; {_hint(name)}")
    template = template or TemplateConfig(preset=suite.preset)
    columns = _columns(suite.question, suite.answer)
    data = _file(Path(path), template, limit, columns) if path is not None else HubData(
        path=suite.hub, name=suite.config, split=suite.split, columns=columns, template=template, limit=limit
    )  # fmt: skip
    return EvalSet(name, data, _reward(template, answer_format), suite.max_new_tokens)


def resolve(
    spec: str,
    *,
    data_dir: str | Path | None = None,
    template: TemplateConfig | None = None,
    answer_format: AnswerFormat | None = None,
    limit: int | None = None,
) -> EvalSet:
    """Resolve a value of `--data`; the forms are listed at the top of this file.

    At most the first row of a file is read, so that errors appear before a model is loaded.

    Raises:
        ConfigError: neither a suite, a file nor a valid hub name.
        DataError: a file does not exist, or the data directory lacks the suite.
    """
    name, found, path = spec.partition("=")
    if found:
        if name in SUITES:
            return resolve_suite(name, path, template=template, answer_format=answer_format, limit=limit)
        return _plain(name, Path(path), template, answer_format, limit)
    if spec in SUITES:
        local = _in_directory(spec, Path(data_dir)) if data_dir is not None else None
        return resolve_suite(spec, local, template=template, answer_format=answer_format, limit=limit)
    # os.path: a name that no file can have is no file, where pathlib would raise
    if spec.endswith(_ENDINGS) or os.path.exists(os.path.expanduser(spec)) or glob.has_magic(spec):
        name = Path(spec).stem.removesuffix(".jsonl") or spec
        return _plain(name, Path(spec), template, answer_format, limit)
    if spec.count("/") == 1 and not spec.startswith((".", "/", "~")) and not os.path.exists(spec):
        return _hub(spec, template or TemplateConfig(preset="math"), answer_format, limit)
    raise ConfigError(f"--data {spec!r} is neither a suite nor a .jsonl or .parquet file; {_hint(spec)}")


def _columns(question: str = "question", answer: str | None = "answer") -> ColumnMap:
    return ColumnMap(question=question, answer=answer, answer_after=REFERENCE_MARKER)


def _plain(
    name: str, path: Path, template: TemplateConfig | None, answer_format: AnswerFormat | None, limit: int | None
) -> EvalSet:
    template = template or TemplateConfig(preset="math")
    return EvalSet(name, _file(path, template, limit, _columns()), _reward(template, answer_format))


def _hub(spec: str, template: TemplateConfig, answer_format: AnswerFormat | None, limit: int | None) -> EvalSet:
    path, *rest = spec.split(":")
    if len(rest) > 2:
        raise ConfigError(f"--data {spec!r} has {len(rest)} parts after the name; write owner/name[:config][:split]")
    split = rest[-1] if rest else "test"
    data = HubData(path=path, name=rest[0] if len(rest) == 2 else None, split=split, template=template, limit=limit)
    return EvalSet(path.rpartition("/")[2], data, _reward(template, answer_format))


def _reward(template: TemplateConfig, answer_format: AnswerFormat | None) -> MathReward:
    return MathReward(answer_format=answer_format or ANSWER_FORMATS[template.preset])


def _in_directory(name: str, directory: Path) -> Path:
    names = [f"{name}{ending}" for ending in (".jsonl", "_test.jsonl", ".parquet", "_test.parquet")]
    for each in names:
        if (directory / each).is_file():
            return directory / each
    raise DataError(
        f"the data directory {str(directory)!r} holds no {names[0]} or {names[1]} (nor .parquet); put one there, "
        f"name the file with --data {name}=PATH, or leave out --data-dir to use the hub"
    )


def _file(path: Path, template: TemplateConfig, limit: int | None, usual: ColumnMap) -> DataConfig:
    """Data section of local files. Its columns are the suite's if present, else common names."""
    path = Path(os.path.expanduser(path))
    if is_saved(path):
        return _saved(path, template, limit, usual)
    if not os.path.exists(path) and not glob.has_magic(str(path)):
        raise DataError(f"data file {str(path)!r} does not exist; check the path (relative to the working directory)")
    parquet = _holds(path, (".parquet",))
    if not parquet and not _holds(path, ENDINGS):
        raise DataError(f"data file {str(path)!r} is neither .jsonl nor .parquet; convert it to one of them")
    kind: Any = ParquetData if parquet else JsonlData
    have = _parquet_columns(path) if parquet else paths_of(first_row(str(path)))
    data: DataConfig = kind(path=str(path), columns=_chosen(usual, list(have)), template=template, limit=limit)
    return data


def _holds(path: Path, endings: tuple[str, ...]) -> bool:
    """True for a file, a directory or a pattern of files with such an ending."""
    if path.is_dir():
        return any(each.name.endswith(endings) for each in path.iterdir())
    return path.name.endswith(endings) or any(each.endswith(endings) for each in glob.glob(str(path)))


def _saved(path: Path, template: TemplateConfig, limit: int | None, usual: ColumnMap) -> DataConfig:
    """Data section of a folder of `save_to_disk`: of several splits "test" if there is one, else the first."""
    splits = [each.name for each in sorted(path.iterdir()) if each.is_dir()] or ["train"]
    data = HubData(path=str(path), split="test" if "test" in splits else splits[0], template=template, limit=limit)
    row = next(plain_rows(load_hub(data)), None) or {}
    return data.model_copy(update={"columns": _chosen(usual, list(paths_of(row)))})


def _chosen(usual: ColumnMap, have: Sequence[str]) -> ColumnMap:
    question = _first((usual.question, *_QUESTION_COLUMNS), have) or usual.question
    answer = _first((str(usual.answer), *_ANSWER_COLUMNS), have) or usual.answer
    return _columns(question, answer)


def _parquet_columns(path: Path) -> list[str]:
    """Columns of parquet files and of the tables in them; empty if they are unreadable, which reading the data will report."""
    with requires_extra("pyarrow", "data", f"--data {path}"):
        import pyarrow
        import pyarrow.parquet
    try:
        schema = pyarrow.parquet.read_schema(files_of(str(path), (".parquet",))[0])
    except (OSError, pyarrow.ArrowException):
        return []
    inner = [
        f"{field.name}.{field.type.field(number).name}"
        for field in schema
        if pyarrow.types.is_struct(field.type)
        for number in range(field.type.num_fields)
    ]
    return [*schema.names, *inner]


def _first(wanted: Sequence[str], have: Sequence[str]) -> str | None:
    return next((name for name in wanted if name in have), None)


def _hint(name: str) -> str:
    close = difflib.get_close_matches(name, SUITES, n=1)
    nearest = f"did you mean {close[0]!r}? " if close else ""
    return f"{nearest}The suites are {', '.join(SUITES)}; for a file of your own write name=PATH"
