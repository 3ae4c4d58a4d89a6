"""Texts of single tokens, by the tokenizer saved with a run, and the segment ends of its rollouts.

The library `tokenizers` reads that file without a model or torch. A run without the file still shows the text of its nodes,
but no tokens and no segments.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from deepgrpo.config import SegmentConfig
from deepgrpo.errors import ConfigError
from deepgrpo.explore.segments import Segmenter, build_segmenter, node_ends
from deepgrpo.records import Node, Pivot, Tree
from deepgrpo.runs.checkpoints import saved_checkpoints
from deepgrpo.runs.saved import SavedRun
from deepgrpo.runs.text import json_text

_BROKEN = "\ufffd"
"""Replacement character that a decoder emits for incomplete bytes."""


class TokenTexts:
    """Cuts token sequences into pieces of text, with a cache."""

    def __init__(self, tokenizer: Any) -> None:
        """Wrap a `tokenizers.Tokenizer`, or any object with its `decode`."""
        self._tokenizer = tokenizer
        self.segment: Segmenter | None = None
        self._singles: dict[int, str] = {}
        self._pairs: dict[tuple[int, int], str] = {}
        added = tokenizer.get_added_tokens_decoder() if hasattr(tokenizer, "get_added_tokens_decoder") else {}
        self.specials = frozenset(str(token.content) for token in added.values() if token.special)
        """Texts of the special tokens, such as the end of a response."""

    def pieces(self, tokens: Sequence[int]) -> list[str]:
        """`[n]` texts of `[n]` tokens; joined, they are the decoded sequence.

        Each token is decoded after its predecessor, because some decoders drop a leading space. Where several tokens form one
        character, the first piece holds it and the others are empty.
        """
        found: list[str] = []
        before: int | None = None
        for token in tokens:
            found.append(self._piece(before, token))
            before = token
        i = 0
        while i < len(found):
            if _BROKEN in found[i]:
                i = self._join(tokens, found, i)
            else:
                i += 1
        return found

    def _piece(self, before: int | None, token: int) -> str:
        alone = self._single(token)
        if before is None or _BROKEN in alone or _BROKEN in (first := self._single(before)):
            return alone
        pair = self._pairs.get((before, token))
        if pair is None:
            both = self.decode([before, token])
            pair = self._pairs[before, token] = both[len(first) :] if both.startswith(first) else alone
        return pair

    def _join(self, tokens: Sequence[int], found: list[str], start: int) -> int:
        """Merge pieces from `start` on until they form whole characters; returns the index to continue at."""
        for end in range(start + 1, min(len(found), start + 8) + 1):
            whole = self.decode(list(tokens[start:end]))
            if _BROKEN not in whole:
                found[start:end] = [whole, *[""] * (end - start - 1)]
                return end
        return start + 1  # never completed: keep the decoder's output

    def _single(self, token: int) -> str:
        if token not in self._singles:
            self._singles[token] = self.decode([token])
        return self._singles[token]

    def decode(self, tokens: list[int]) -> str:
        """Text of a sequence; special tokens stay in it, as during sampling."""
        return str(self._tokenizer.decode(tokens, skip_special_tokens=False))

    def ends(self, node: Node) -> list[int]:
        """Segment ends of a rollout, by the recipe's rule; empty if the recipe has no segments."""
        return node_ends(self.segment, node) if self.segment else []


def read_tokens(run: SavedRun) -> TokenTexts | None:
    """The tokenizer of a run: from its newest checkpoint, its start model, or the recipe's model directory; None if absent."""
    path = find_tokenizer(run)
    if path is None:
        return None
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception:  # the library raises bare Exception for an unreadable file
        return None
    texts = TokenTexts(tokenizer)
    try:
        raw = run.section("explore").get("segments")
        # a user's segmenter is code that the recipe names; a report shows runs of others, and runs nothing of theirs
        if isinstance(raw, dict) and raw.get("type") != "user":
            texts.segment = build_segmenter(SegmentConfig.model_validate(raw), texts)
    except (ValidationError, ConfigError):
        pass  # recipe of another version: show its rollouts without segments
    return texts


def find_tokenizer(run: SavedRun) -> Path | None:
    """The tokenizer.json of a run; None if there is none."""
    models = [*(each.model for each in saved_checkpoints(run.paths)[::-1]), run.paths.start]
    recipe_model = run.section("model").get("path")
    if isinstance(recipe_model, str):
        models.append(Path(recipe_model))
    return next((file for model in models if (file := model / "tokenizer.json").is_file()), None)


def own_text(tree: Tree, index: int) -> str:
    """The text of a node's own tokens, estimated without a tokenizer: its response minus the prefix shared with its parent.

    A branch whose first words equal the parent's continuation appears to start later than it did.
    """
    node = tree.nodes[index]
    if node.parent < 0:
        return node.text
    siblings = [tree.nodes[i].text for i in tree.children(node.pivot)]
    return node.text[_common(tree.nodes[node.parent].text, siblings) :]


def _common(parent: str, siblings: Sequence[str]) -> int:
    length = 0
    for characters in zip(parent, *siblings, strict=False):
        if len(set(characters)) > 1:
            break
        length += 1
    return length


def segment_ends(tree: Tree, index: int, texts: TokenTexts | None) -> list[int]:
    """Ends of a node's segments except the last, from the candidates of its pivots and the recipe's rule.

    Only rollouts from the prompt are cut; a branch has no candidates of its own.
    """
    node: Node = tree.nodes[index]
    if node.parent >= 0 or not node.complete:
        return []
    known = {end for pivot in tree.pivots if pivot.parent == index for end in pivot.candidates}
    if texts is not None:
        known |= set(texts.ends(node))
    return sorted(end for end in known if 0 < end < len(node.tokens))


def state_at(tree: Tree, pivot: Pivot) -> str | None:
    """The environment's state at a pivot as JSON; None without one, or if it could not be given."""
    replies = tree.replies(pivot.parent, pivot.offset)
    state = replies[-1].state if replies else tree.start
    return None if state is None else json_text(state)
