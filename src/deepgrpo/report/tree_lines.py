"""Single lines of a drawn tree: a node's reward and remarks, a reply of an environment, Q along a chain."""

from __future__ import annotations

from rich.text import Text

from deepgrpo.feedback import Reply
from deepgrpo.records import Node, Pivot
from deepgrpo.report.numbers import several, short
from deepgrpo.report.pivots import candidate_ratios
from deepgrpo.visible import plain

GOOD, BAD, PIVOT, GIVEN = "green", "red", "bold magenta", "cyan"
_BARS = "▁▂▃▄▅▆▇█"


def reward_text(node: Node, threshold: float) -> Text:
    """The reward of a node, with its parts, marked as a success or a failure."""
    if not node.complete:
        return Text("segment" if node.sampled else "given", style="dim")
    good = node.outcome > threshold
    parts = ", ".join(f"{plain(name)} {part.value:g}" for name, part in node.score.parts.items())
    shown = f"{node.reward:g} ({parts})" if parts else f"{node.reward:g}"
    return Text(f"{'✓' if good else '✗'} {shown}", style=GOOD if good else BAD)


def remark(node: Node) -> str:
    """Notes on the end of a response and on its check."""
    notes = []
    if node.finish == "length":
        notes.append("cut off at the length limit")
    if node.complete and node.score.checked and not node.score.parsed:
        notes.append("no answer found")
    if node.score.problem:
        notes.append(f"check failed: {node.score.problem}")
    return "".join(f", {note}" for note in notes)


def reply_line(number: int, reply: Reply) -> Text:
    """Reply of the environment to a turn: what was called, earned and observed."""
    facts = [f"turn {number}"]
    if reply.calls:
        failed = f", {reply.failed_calls} failed" if reply.failed_calls else ""
        facts.append(several(reply.calls, "call") + failed)
    facts += [f"reward {reply.reward:g}"] if reply.reward is not None else []
    line = Text("  ".join(facts), style="dim")
    if reply.observation:
        line.append("  → " if reply.end > reply.start else "  → (not shown) ")
        line.append(plain(reply.observation), style=GIVEN)
    return line


def chain_line(pivot: Pivot, indent: str, width: int) -> Text:
    """Q at every state of a pivot's chain, in at most `width` columns."""
    ratios = candidate_ratios(pivot) or [0.0] * len(pivot.q)
    top = max(pivot.q)
    line = Text(indent + "  Q along the chain ", style="dim")
    states = [
        (short(ratio), _BARS[min(len(_BARS) - 1, int(len(_BARS) * q / top)) if top > 0 else 0], offset == pivot.offset)
        for offset, ratio, q in zip(pivot.candidates, ratios, pivot.q, strict=True)
    ]
    if line.cell_len + sum(len(ratio) + 2 for ratio, *_ in states) <= width:
        for ratio, bar, drawn in states:
            line.append(f" {ratio}").append(bar, style=PIVOT if drawn else "cyan")
    else:  # label only the ends of the chain; of neighbours sharing a column, show the highest
        room = max(8, width - line.cell_len - 11)
        line.append(f" {states[0][0]} ")
        size = -(-len(states) // room)
        for first in range(0, len(states), size):
            some = states[first : first + size]
            line.append(max(bar for _, bar, _ in some), style=PIVOT if any(drawn for *_, drawn in some) else "cyan")
        line.append(f" {states[-1][0]}")
    return line
