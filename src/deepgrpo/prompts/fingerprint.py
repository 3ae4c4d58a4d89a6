"""Fingerprint of the prompts of a run, kept in its checkpoints: data that changed before a resume are noticed.

The cursor of a checkpoint counts prompts, so on other data it would point to other prompts. Data in memory are covered whole
(ids, tokens and answers), streamed ones at a bounded cost: docs/data.md says how far.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from deepgrpo.config import DataConfig
from deepgrpo.errors import CheckpointError
from deepgrpo.prompts.rows import QuestionRow

Fingerprint = Mapping[str, Any]
"""Plain JSON: digest of the recipe's `section`, number of `rows` (None: endless), digest of the `prompts` (ids, tokens and
answers), and the `seed` of their order (None: not shuffled)."""


class Digest:
    """Digest of prompts in their order, fed one by one."""

    def __init__(self) -> None:
        self._hash = hashlib.blake2b(digest_size=16)

    def add(self, row: QuestionRow, tokens: Sequence[int]) -> None:
        self._hash.update(repr((row.id, tuple(tokens), row.answer)).encode())

    def text(self, text: str) -> None:
        self._hash.update(text.encode())

    def hex(self) -> str:
        return self._hash.hexdigest()


class FingerprintedSource(Protocol):
    """A `PromptSource`."""

    digest: str
    order_seed: int | None

    @property
    def size(self) -> int | None: ...


def fingerprint_of(data: DataConfig, source: FingerprintedSource) -> Fingerprint:
    """Fingerprint of a data section and the prompts that it gave."""
    fields = data.model_dump(mode="json")
    for each in [fields, *(part["data"] for part in fields.get("sources", ()))]:
        if "path" in each and os.path.exists(os.path.expanduser(each["path"])):
            each["path"] = os.path.abspath(os.path.expanduser(each["path"]))  # the same file by another spelling
    section = hashlib.blake2b(json.dumps(fields, sort_keys=True).encode(), digest_size=16).hexdigest()
    return {"section": section, "rows": source.size, "prompts": source.digest, "seed": source.order_seed}


def check_unchanged(key: str, data: DataConfig, saved: Fingerprint | None, now: Fingerprint) -> str | None:
    """Compare the prompts of a checkpoint with those of the resumed run.

    Args:
        key: section of the recipe, for messages.
        data: that section now.
        saved: fingerprint in the checkpoint; None if the run had no such data.
        now: fingerprint of the resumed run.

    Returns:
        None if the prompts are equal; a sentence for the log if the section itself or run.seed was changed for the resume.

    Raises CheckpointError if the prompts changed and the section did not.
    """
    source = repr(getattr(data, "path", data.type))
    if saved is not None and (not isinstance(saved, Mapping) or set(saved) != set(now)):
        raise CheckpointError(f"{key}: the fingerprint in the checkpoint is damaged ({saved!r}); continue from another one")
    if saved is None or saved["prompts"] == now["prompts"]:
        if saved is None or saved["seed"] == now["seed"]:
            return None
        return f"run.seed was changed: the prompts of {source} come in another order from here on, some twice in this epoch"
    change = f"{_rows(saved)} before, {_rows(now)} now"
    if saved["rows"] == now["rows"]:
        change = f"{change}, with other ids, prompts or answers"
    if saved["section"] != now["section"]:
        return f"{key} was changed: the prompts of {source} are others than those of the checkpoint ({change})"
    if data.type == "given":
        raise CheckpointError(
            f"{key}: the rows given are not those of the checkpoint ({change}), so the run would repeat some and miss others; "
            "pass the same rows (the tokenizer and sampling.max_total_tokens count too), or begin a new run"
        )
    raise CheckpointError(
        f"{key}: the prompts of {source} have changed since the checkpoint ({change}), so the run would repeat some and miss "
        "others; restore the data (the tokenizer and sampling.max_total_tokens count too), or name the new data by another "
        f"{'path' if hasattr(data, 'path') else 'setting'} with --{key}.KEY VALUE to go on with them"
    )


def _rows(found: Fingerprint) -> str:
    return "endless" if found["rows"] is None else f"{found['rows']} rows"
