"""The text of single tokens, from the tokenizer that a run has saved; and where its rollouts are cut into segments.

The library `tokenizers` reads the file alone: no model, no torch. A run without that file still shows the text of its
nodes, but no tokens and no segments.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from deepgrpo.config import SegmentConfig
from deepgrpo.errors import ConfigError
from deepgrpo.explore.segments import Segmenter, build_segmenter
from deepgrpo.records import Node, Tree
from deepgrpo.report.saved import SavedRun

_BROKEN = "\ufffd"
"""What a decoder puts where bytes are no whole character."""


class TokenTexts:
    """Cuts token sequences into pieces of text; what is cut once is remembered."""

    def __init__(self, tokenizer: Any, segment: Segmenter | None = None) -> None:
        """Take a `tokenizers.Tokenizer`, or anything with its `decode`."""
        self._tokenizer, self._segment = tokenizer, segment
        self._singles: dict[int, str] = {}
        self._pairs: dict[tuple[int, int], str] = {}
        added = tokenizer.get_added_tokens_decoder() if hasattr(tokenizer, "get_added_tokens_decoder") else {}
        self.specials = frozenset(str(token.content) for token in added.values() if token.special)
        """Texts of the special tokens, such as the end of a response."""

    def pieces(self, tokens: Sequence[int]) -> list[str]:
        """`[n]` texts of `[n]` tokens; joined, they are the decoded sequence.

        A token means its text behind the one before it: some decoders drop the blank at the beginning of a sequence. Where
        several tokens make one character, the first of them has it and the others are empty.
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
            both = self._decode([before, token])
            pair = self._pairs[before, token] = both[len(first) :] if both.startswith(first) else alone
        return pair

    def _join(self, tokens: Sequence[int], found: list[str], start: int) -> int:
        """Put the pieces from `start` on together until they are whole characters; returns where to go on."""
        for end in range(start + 1, min(len(found), start + 8) + 1):
            whole = self._decode(list(tokens[start:end]))
            if _BROKEN not in whole:
                found[start:end] = [whole, *[""] * (end - start - 1)]
                return end
        return start + 1  # never completed: it stays what the decoder says

    def _single(self, token: int) -> str:
        if token not in self._singles:
            self._singles[token] = self._decode([token])
        return self._singles[token]

    def _decode(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=False))

    def ends(self, tokens: Sequence[int]) -> list[int]:
        """Ends of the segments of a rollout, by the recipe's own rule; empty if the recipe cuts none."""
        return self._segment(tokens) if self._segment else []


class _Decoder:
    """A tokenizer as `build_segmenter` wants it: special tokens are text, as when the run was sampled."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def decode(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=False))


def read_tokens(run: SavedRun) -> TokenTexts | None:
    """The tokenizer of a run: of its newest checkpoint, its start, or the model directory of its recipe. None: nowhere."""
    path = find_tokenizer(run)
    if path is None:
        return None
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception:  # the library raises bare Exception for a file that it cannot read
        return None
    segment = None
    try:
        raw = run.section("explore").get("segments")
        if raw is not None:
            segment = build_segmenter(SegmentConfig.model_validate(raw), _Decoder(tokenizer))
    except (ValidationError, ConfigError):
        pass  # recipe of another version, or a user's segmenter that is not here: show its rollouts without segments
    return TokenTexts(tokenizer, segment)


def find_tokenizer(run: SavedRun) -> Path | None:
    """The tokenizer.json that belongs to a run."""
    checkpoints = sorted((run.directory / "checkpoints").glob("step-*/model/tokenizer.json"), reverse=True)
    places = [*checkpoints, run.directory / "start" / "tokenizer.json"]
    model = run.section("model").get("path")
    if isinstance(model, str):
        places.append(Path(model) / "tokenizer.json")
    return next((place for place in places if place.is_file()), None)


def own_text(tree: Tree, index: int) -> str:
    """The text of a node's own tokens where no tokenizer can tell it: what its response has beyond the rollout it is in.

    A guess: a branch that begins as its parent went on seems to start later than it did.
    """
    node = tree.nodes[index]
    siblings = [tree.nodes[i].text for i in tree.children(node.pivot)]
    if node.parent < 0:
        return node.text
    return node.text[_common(tree.nodes[node.parent].text, siblings) :]


def _common(parent: str, siblings: Sequence[str]) -> int:
    length = 0
    for characters in zip(parent, *siblings, strict=False):
        if len(set(characters)) > 1:
            break
        length += 1
    return length


def segment_ends(tree: Tree, index: int, texts: TokenTexts | None) -> list[int]:
    """Ends of a node's segments, the last one left out: what the pivot drawn in it says, else the recipe's own rule.

    Only rollouts from the prompt are cut; a branch has no states of its own.
    """
    node: Node = tree.nodes[index]
    if node.parent >= 0 or not node.complete:
        return []
    known = {end for pivot in tree.pivots if pivot.parent == index for end in pivot.candidates}
    if texts is not None:
        known |= set(texts.ends(node.tokens))
    return sorted(end for end in known if 0 < end < len(node.tokens))
