"""A section `data` as a source of prompts: loaded whole, streamed, generated, or mixed of several.

    rows of a file or a task ─► rendered ─► too long? ─► shuffled every epoch ─► take(cursor, n)
"""

from __future__ import annotations

from functools import partial
from typing import Any

from deepgrpo.config import DataConfig, GeneratedData, HubData, JsonlData, MixData, ParquetData
from deepgrpo.errors import ConfigError, DataError, ModelError
from deepgrpo.progress import phase
from deepgrpo.prompts import synthetic
from deepgrpo.prompts.base import Cursor, PromptSource
from deepgrpo.prompts.chat import Tools, build_renderer
from deepgrpo.prompts.loaded import EndlessSource, LoadedSource, usable_rows
from deepgrpo.prompts.mixed import MixedSource, Part
from deepgrpo.prompts.sieve import Sieve
from deepgrpo.prompts.streamed import StreamedSource
from deepgrpo.prompts.streaming import open_reader
from deepgrpo.prompts.tasks import read_rows

__all__ = ["Cursor", "PromptSource", "build_source"]


def build_source(
    data: DataConfig, tokenizer: Any, *, seed: int, context: int, shuffle: bool = True, name: str | None = None,
    tools: Tools = None,
) -> PromptSource:
    """Read and check the data.

    Args:
        data: the section `data`. `limit` keeps the first rows of the data, skipped ones included.
        tokenizer: a transformers tokenizer. For the synthetic task it needs no chat template: its questions are then
            plain text, unless `template.chat` is set.
        seed: seed of the shuffle (generated data has a seed of its own).
        context: longest prompt plus response, in tokens. A prompt may take half of it, or `max_prompt_tokens`, and
            always leaves room for one token.
        shuffle: reshuffle every epoch. An endless source is random by construction.
        name: begins the messages, where there are several data sets.
        tools: schemas of the environment's tools, for the chat template.

    Raises DataError (see `prompts.rows` and `prompts.jsonl`, or no row is left), ConfigError, ModelError,
    MissingExtraError.
    """
    with phase(f"reading {name or 'data'}"):
        return _named(name, data, tokenizer, seed, context, shuffle, tools)


def _named(
    name: str | None, data: DataConfig, tokenizer: Any, seed: int, context: int, shuffle: bool, tools: Tools,
    source: str = "",
) -> PromptSource:
    try:
        if isinstance(data, MixData):
            return _mix(data, tokenizer, seed, context, shuffle, tools)
        return _one(data, tokenizer, seed, context, shuffle, tools, source)
    except (ConfigError, DataError, ModelError) as error:
        if name is None:
            raise
        raise type(error)(f"{name}: {error}") from error


def _mix(data: MixData, tokenizer: Any, seed: int, context: int, shuffle: bool, tools: Tools) -> PromptSource:
    parts = []
    for each in data.sources:
        limit = min((bound for bound in (each.data.limit, data.limit) if bound is not None), default=None)
        section: DataConfig = each.data.model_copy(update={"limit": limit})
        name = each.label
        parts.append(
            Part(name, each.weight, _named(f"source {name!r}", section, tokenizer, seed, context, shuffle, tools, name))
        )
    return MixedSource(parts)


def _one(
    data: DataConfig, tokenizer: Any, seed: int, context: int, shuffle: bool, tools: Tools, source: str
) -> PromptSource:
    assert not isinstance(data, MixData)
    renderer = build_renderer(data.template, tokenizer, plain_if_no_template=isinstance(data, GeneratedData), tools=tools)
    longest = min(data.max_prompt_tokens or max(context // 2, 1), context - 1)
    sieve = Sieve(renderer, longest, source)
    if isinstance(data, GeneratedData) and data.size is None and data.limit is None:
        make = partial(synthetic.make, config=data)
        # all questions have the same number of characters, so a few suffice
        _, digest = usable_rows([make(i) for i in range(8)], sieve, data.type, data.template)
        return EndlessSource(make, sieve, digest=digest)
    reader = open_reader(data, seed=seed, shuffle=shuffle)
    if reader is not None:
        assert isinstance(data, JsonlData | ParquetData | HubData)
        streamed = StreamedSource(reader, data.columns, renderer, longest, source)
        streamed.check(data.type, data.template)
        return streamed
    rows, digest = usable_rows(read_rows(data, sieve.skipped), sieve, data.type, data.template)
    return LoadedSource(rows, sieve, seed=seed, shuffle=shuffle, skipped=sieve.counted(), digest=digest)
