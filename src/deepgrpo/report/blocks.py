"""Trees inside a page: a small index of all trees, and compressed blocks opened one at a time.

    index    one entry per tree: step, prompt, question, flags, rewards; decoded with the page
    blocks   up to 64 trees of one step each; decoded when one of them is viewed

Both are gzipped JSON in base64, an alphabet that cannot end a script element whatever the model wrote.
"""

from __future__ import annotations

import base64
import gzip
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from deepgrpo.records import Node
from deepgrpo.report.tokens import TokenTexts, own_text, segment_ends, state_at
from deepgrpo.runs.facts import FLAGS, tree_facts
from deepgrpo.runs.trees import SavedTree

BLOCK_TREES = 64
"""Trees per block; viewing one tree decodes its whole block."""
_QUESTION = 160
"""Longest question in the index, in characters."""
_LEVEL = 6


@dataclass
class TreeIndex:
    """Columns of the tree list: what it shows and filters by."""

    step: list[int] = field(default_factory=list)
    number: list[int] = field(default_factory=list)
    block: list[int] = field(default_factory=list)
    id: list[str] = field(default_factory=list)
    question: list[str] = field(default_factory=list)
    flags: list[int] = field(default_factory=list)
    """Bit i is FLAGS[i]."""
    successes: list[int] = field(default_factory=list)
    rollouts: list[int] = field(default_factory=list)
    reward: list[float] = field(default_factory=list)
    chances: list[int] = field(default_factory=list)
    """Pivots that could be rescued."""
    rescued: list[int] = field(default_factory=list)

    def add(self, saved: SavedTree, block: int, threshold: float) -> None:
        facts = tree_facts(saved.tree, threshold)
        prompt = saved.tree.prompt
        self.step.append(saved.step)
        self.number.append(saved.number)
        self.block.append(block)
        self.id.append(prompt.id)
        self.question.append(prompt.question if len(prompt.question) <= _QUESTION else prompt.question[:_QUESTION] + "…")
        self.flags.append(sum(1 << i for i, flag in enumerate(FLAGS) if flag in facts.flags))
        self.successes.append(facts.successes)
        self.rollouts.append(facts.rollouts)
        self.reward.append(short(facts.reward))
        self.chances.append(facts.chances)
        self.rescued.append(facts.rescued)

    def packed(self) -> str:
        return pack(vars(self))


def tree_blocks(trees: Iterator[SavedTree], index: TreeIndex, texts: TokenTexts | None, threshold: float) -> Iterator[str]:
    """Pack trees into blocks and fill the index. The trees must be grouped by step."""
    block: list[dict[str, Any]] = []
    count, step = 0, None
    for saved in trees:
        if block and (saved.step != step or len(block) == BLOCK_TREES):
            yield pack(block)
            block = []
            count += 1
        step = saved.step
        index.add(saved, count, threshold)
        block.append(tree_json(saved, texts))
    if block:
        yield pack(block)


def tree_json(saved: SavedTree, texts: TokenTexts | None) -> dict[str, Any]:
    """A tree as the page draws it. The keys are short because every node repeats them.

    Node: p parent, o offset, v pivot, n tokens, r reward, f finish, s stream, a advantages, e ends of segments, and k token
    texts with l log-probs in hundredths of a nat; without a tokenizer x, the whole text. w: why there is no checked answer.
    g: replies of an environment, each with its first token, the token behind it, observation, reward, calls and failed calls.
    Of a reward with parts: t their values by name, u the value that says success where it is not the reward.
    Pivot: z the environment's state there, as JSON.
    """
    tree, prompt = saved.tree, saved.tree.prompt
    return {
        "step": saved.step, "number": saved.number, "id": str(prompt.id), "question": str(prompt.question),
        "answer": None if prompt.answer is None else str(prompt.answer),
        "prompt": prompt.text if prompt.text != prompt.question else None,
        "nodes": [
            {
                "p": node.parent, "o": node.offset, "v": node.pivot, "n": len(node.tokens), "r": short(node.reward),
                "f": node.finish, "s": node.stream,
                "a": [[s.start, s.end, short(s.advantage), s.stream] for s in saved.advantages(i)],
                "e": segment_ends(tree, i, texts), **_why(node), **_parts(node), **_replies(node),
                **(
                    {"k": texts.pieces(node.tokens), "l": [_hundredths(lp) for lp in node.logprobs]}
                    if texts
                    else {"x": own_text(tree, i)}
                ),
            }
            for i, node in enumerate(tree.nodes)
        ],
        "pivots": [
            {
                "p": pivot.parent, "o": pivot.offset, "r": round(pivot.ratio, 4), "s": pivot.stream,
                "c": list(pivot.candidates), "q": [round(q, 4) for q in pivot.q],
                **({} if (state := state_at(tree, pivot)) is None else {"z": state}),
            }
            for pivot in tree.pivots
        ],
    }  # fmt: skip


def _parts(node: Node) -> Mapping[str, Any]:
    """Parts of the reward, and the number that says success, of a response whose reward has parts."""
    if not node.score.parts:
        return {}
    success = {} if node.score.outcome is None else {"u": short(node.score.outcome)}
    return {**success, "t": {name: short(part.value) for name, part in node.score.parts.items()}}


def _replies(node: Node) -> Mapping[str, Any]:
    if not node.replies:
        return {}
    return {
        "g": [
            [r.start, r.end, r.observation, None if r.reward is None else short(r.reward), r.calls, r.failed_calls]
            for r in node.replies
        ]
    }


def _why(node: Node) -> Mapping[str, str]:
    """The reason why a response has no checked answer, if so."""
    if node.score.problem:
        return {"w": f"the check failed: {node.score.problem}"}
    if not node.sampled:
        return {"w": "from an earlier step, continued below"}
    if not node.complete:
        return {"w": "a segment, cut to be continued"}
    if not node.score.checked:
        return {"w": "cut off, so its answer was not checked"}
    return {} if node.score.parsed else {"w": "no answer found"}


def _hundredths(logprob: float) -> int:
    """Hundredths of a nat; 0 for NaN and infinities."""
    return round(100 * logprob) if math.isfinite(logprob) else 0


def choose_steps(counts: Mapping[int, int], limit: int) -> list[int]:
    """Evenly spread steps, including the first and the last, whose trees fit into `limit` together.

    If fewer than two steps fit: the last one if it fits, else none.

    Args:
        counts: step → trees, ascending.
        limit: maximum number of trees.
    """
    steps = list(counts)
    for many in range(len(steps), 0, -1):
        if many == 1:
            chosen = steps[-1:]
        else:
            chosen = [steps[round(i * (len(steps) - 1) / (many - 1))] for i in range(many)]
        if sum(counts[step] for step in chosen) <= limit:
            return chosen
    return []


def pack(value: Any) -> str:
    """Gzipped JSON in base64; equal values give equal texts."""
    raw = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return base64.b64encode(gzip.compress(raw.encode("ascii"), _LEVEL, mtime=0)).decode("ascii")


def short(value: float) -> float:
    """Four significant digits; NaN and infinities become 0, which JSON can express."""
    return float(f"{value:.4g}") if value == value and abs(value) != float("inf") else 0.0

