"""A tree as lines of text: one lane per rollout, its pivots with Q along the chain, and their branches below.

    rollout 2  ✗ 0  advantage -0.375  15 tokens
      ━━━━━━◆━━━━━┿━━
      3+4=7;◆7*2=5;│#5<eos>
      ◆ after token 6, r = .50, Q = .50: 3 of 8 branches better, rescued
        Q along the chain  .25▄ .50█ .75▅
            ━━━━━━━━━  ✓ 1  advantage +0.625  3×  7*2=4;#4<eos>
            ━━━━━━━━━  ✗ 0  advantage -0.375  5×  7*2=3;#3<eos>
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.text import Text

from deepgrpo.records import ROOT, Node, Pivot
from deepgrpo.report.numbers import several, short
from deepgrpo.report.tokens import TokenTexts, own_text, segment_ends, state_at
from deepgrpo.report.tree_lines import BAD, GIVEN, GOOD, PIVOT, chain_line, remark, reply_line, reward_text
from deepgrpo.runs.facts import bar_of, is_rescued, tree_facts
from deepgrpo.runs.trees import SavedTree
from deepgrpo.visible import plain, visible

_LANE = 72
"""Maximum width of a lane in columns."""
_BESIDE = 30
"""Columns reserved beside a lane for the outcome of a branch."""


def draw_tree(
    console: Console, saved: SavedTree, texts: TokenTexts | None, threshold: float, *, only: str | None = None,
    states: bool = False,
) -> None:  # fmt: skip
    """Print a tree.

    Args:
        console: output.
        saved: the tree with its credit.
        texts: cuts tokens; None: texts are printed whole.
        threshold: rewards above it are successes.
        only: "rescued" or "unrecoverable" hides rollouts without such a pivot, "truncated" those without a truncated
            response.
        states: show an environment's state at every pivot.
    """
    _Drawing(console, saved, texts, threshold, only, states).draw()


class _Drawing:
    def __init__(
        self, console: Console, saved: SavedTree, texts: TokenTexts | None, threshold: float, only: str | None, states: bool
    ) -> None:
        self.console, self.saved, self.tree, self.states = console, saved, saved.tree, states
        self.texts, self.threshold, self.only = texts, threshold, only
        self.starts = [len(self.tree.response(node.parent, node.offset)) for node in self.tree.nodes]
        longest = max((s + len(n.tokens) for s, n in zip(self.starts, self.tree.nodes, strict=True)), default=1)
        self.scale = min(1.0, max(8, min(_LANE, console.width - 2 - _BESIDE)) / max(1, longest))
        self.columns = 2 + round(longest * self.scale)

    def draw(self) -> None:
        prompt = self.tree.prompt
        facts = tree_facts(self.tree, self.threshold)
        flags = ", ".join(sorted(facts.flags - {"solved", "failed"})) or "no signal"
        self._say(f"step {self.saved.step} · prompt {prompt.id} · {flags}", style="bold")
        self._say(prompt.question, name="question  ")
        if prompt.answer is not None:
            self._say(prompt.answer, name="answer    ")
        self._say(
            f"{facts.successes} of {facts.rollouts} rollouts succeed, "
            + (f"{facts.rescued} of {several(facts.chances, 'pivot')} rescued, " if facts.pivots else "")
            + several(facts.tokens, "sampled token")
        )
        roots = [i for i, node in enumerate(self.tree.nodes) if node.parent == ROOT]
        shown = [i for i in roots if self._wanted(i)]
        for number, index in enumerate(roots, 1):
            if index in shown:
                self.console.print()
                self._rollout(index, number)
        if len(shown) < len(roots):
            self._say(f"\n{several(len(roots) - len(shown), 'rollout')} left out by --only {self.only}", style="dim")

    def _wanted(self, root: int) -> bool:
        if self.only not in ("rescued", "unrecoverable", "truncated"):
            return True
        below = set(self._below(root))
        if self.only == "truncated":
            return any(self.tree.nodes[i].finish == "length" for i in below)
        return any(
            pivot.parent in below and pivot.stream == "branch"
            and is_rescued(self.tree, i, self.threshold) == (self.only == "rescued")
            for i, pivot in enumerate(self.tree.pivots)
        )

    def _below(self, root: int) -> Iterator[int]:
        """A node and its descendants."""
        yield root
        for index, node in enumerate(self.tree.nodes):
            if node.parent == root:
                yield from self._below(index)

    def _rollout(self, index: int, number: int) -> None:
        node = self.tree.nodes[index]
        line = Text(f"rollout {number}  " if node.sampled else "earlier rollout  ", style="bold")
        line.append_text(reward_text(node, self.threshold))
        line.append(f"  {self._advantage(index)}  {several(len(node.tokens), 'token')}{remark(node)}")
        if given := sum(reply.end - reply.start for reply in node.replies):
            line.append(f", {given} of them given")
        self.console.print(line)
        self._parts(index, "  ")
        self.console.print(self._bar(index))
        self._fold(self._text(index), "  ")
        self._turns(index, "  ")
        self._pivots(index, "  ")

    def _pivots(self, index: int, indent: str) -> None:
        for number, pivot in self._pivots_in(index):
            children = self.tree.children(number)
            line = Text(indent)
            line.append("◆", style=PIVOT)
            line.append(f" after token {pivot.offset}")
            if pivot.ratio:
                line.append(f", r = {short(pivot.ratio)}")
            if pivot.offset in pivot.candidates and pivot.q:
                line.append(f", Q = {short(pivot.q[pivot.candidates.index(pivot.offset)])}")
            if pivot.stream == "branch":
                bar = bar_of(self.tree, number, self.threshold)
                better = sum(self.tree.nodes[child].outcome > bar for child in children)
                line.append(": ")
                if better or bar > self.threshold:
                    line.append(f"{better} of {len(children)} branches better, ")
                if better:
                    line.append("rescued", style=GOOD)
                elif bar > self.threshold:
                    line.append("nothing to rescue", style="dim")
                else:
                    line.append(f"not recovered in {len(children)} {'try' if len(children) == 1 else 'tries'}", style=BAD)
            self.console.print(line)
            if self.states and (shown := state_at(self.tree, pivot)) is not None:
                self._fold(Text(f"state {plain(shown)}", style="dim"), indent + "  ")
            if len(pivot.q) > 1:
                self.console.print(chain_line(pivot, indent, self.console.width))
            self._branches(children, indent)

    def _pivots_in(self, index: int) -> list[tuple[int, Pivot]]:
        """The pivots of a node, deepest first, so that no branch crosses the line of another."""
        found = [(number, pivot) for number, pivot in enumerate(self.tree.pivots) if pivot.parent == index]
        return sorted(found, key=lambda each: -each[1].offset)

    def _branches(self, children: Sequence[int], indent: str) -> None:
        """One line per branch, or two if any text is too long. Equal branches without pivots are drawn once."""
        inner = {pivot.parent for pivot in self.tree.pivots}
        alike: dict[object, list[int]] = {}
        for child in children:
            node = self.tree.nodes[child]
            same = (node.tokens, node.reward, self._advantage(child), remark(node))
            alike.setdefault(child if child in inner else same, []).append(child)
        most = max((len(each) for each in alike.values()), default=1)
        lines = [self._branch(each[0], len(each) if most > 1 else 0) for each in alike.values()]
        texts = [self._text(each[0]) for each in alike.values()]
        fits = all(head.cell_len + 2 + text.cell_len <= self.console.width for head, text in zip(lines, texts, strict=True))
        for (child, *_), head, text in zip(alike.values(), lines, texts, strict=True):
            if fits:
                self.console.print(head.append("  ").append_text(text))
            else:
                self.console.print(head)
                self._fold(text, self._under(child, text, f"{indent}    "))
            self._parts(child, indent + "    ")
            self._turns(child, indent + "    ")
            self._pivots(child, indent + "    ")

    def _under(self, index: int, text: Text, indent: str) -> str:
        """Indentation of a text: up to the start of its bar if the text then fits on the line."""
        start = 2 + round(self.starts[index] * self.scale)
        return " " * start if start + text.cell_len <= self.console.width else indent

    def _branch(self, index: int, times: int) -> Text:
        """Bar and reward of a branch; `times`: number of identical siblings, shown if there are any."""
        node = self.tree.nodes[index]
        line = self._bar(index)
        line.append(" " * max(0, self.columns - line.cell_len) + "  ")
        line.append_text(reward_text(node, self.threshold))
        line.append(f"  {self._advantage(index)}{remark(node)}")
        if times:
            line.append(f"  {times}×", style="bold" if times > 1 else "dim")
        return line

    def _bar(self, index: int) -> Text:
        """A bar for the position of a node along its path, with marks at segment ends and pivots."""
        node = self.tree.nodes[index]
        start = round(self.starts[index] * self.scale)
        length = max(1, round((self.starts[index] + len(node.tokens)) * self.scale) - start)
        cells = ["━" if node.finish != "length" else "╍"] * length
        ends = segment_ends(self.tree, index, self.texts)
        for end in ends if 3 * len(ends) <= length else ():  # denser marks would hide the bar
            cells[self._cell(index, end, start, length)] = "┿"
        for pivot in self.tree.pivots:
            if pivot.parent == index:
                cells[self._cell(index, pivot.offset, start, length)] = "◆"
        bar = Text(" " * (start + 2))
        for cell in cells:
            bar.append(cell, style=PIVOT if cell == "◆" else self._colour(node))
        return bar

    def _cell(self, index: int, offset: int, start: int, length: int) -> int:
        return min(length - 1, max(0, round((self.starts[index] + offset) * self.scale) - start))

    def _text(self, index: int) -> Text:
        node = self.tree.nodes[index]
        text = Text()
        marks = {pivot.offset for pivot in self.tree.pivots if pivot.parent == index}
        ends = set(segment_ends(self.tree, index, self.texts))
        if self.texts is None:
            text.append(plain(own_text(self.tree, index)))
        else:
            given = {place for reply in node.replies for place in range(reply.start, reply.end)}
            for place, piece in enumerate([*self.texts.pieces(node.tokens), ""]):
                if (place in given) != (place - 1 in given):
                    text.append("‹" if place in given else "›", style=GIVEN)
                if place in marks:
                    text.append("◆", style=PIVOT)
                elif place in ends:
                    text.append("│", style="dim")
                style = "dim" if piece in self.texts.specials else GIVEN if place in given else ""
                text.append(plain(piece), style=style)
        return text

    def _colour(self, node: Node) -> str:
        return "dim" if not node.complete else GOOD if node.outcome > self.threshold else BAD

    def _advantage(self, index: int) -> str:
        spans = self.saved.advantages(index)
        if not spans:
            return "not trained"
        values = {round(span.advantage, 4) for span in spans}
        if len(values) == 1:
            return f"advantage {values.pop():+.3f}"
        return "advantages by part"

    def _parts(self, index: int, indent: str) -> None:
        """Print the advantages of a node by token range if they differ."""
        spans = self.saved.advantages(index)
        if len({round(span.advantage, 4) for span in spans}) > 1:
            parts = ", ".join(f"tokens {span.start + 1}–{span.end} {span.advantage:+.3f}" for span in spans)
            self._fold(Text(parts, style="dim"), indent)

    def _turns(self, index: int, indent: str) -> None:
        """One line for each reply of the environment: what was called, earned and observed."""
        node = self.tree.nodes[index]
        before = len(self.tree.replies(index)) - len(node.replies)
        for number, reply in enumerate(node.replies, before + 1):
            self._fold(reply_line(number, reply), indent)

    def _say(self, text: str, style: str = "", name: str = "") -> None:
        self._fold(Text(visible(text, keep="\n"), style=style), name)

    def _fold(self, text: Text, indent: str) -> None:
        """Print a text with `indent` before its first line and equal indentation before the others."""
        for number, line in enumerate(text.wrap(self.console, max(1, self.console.width - len(indent)), overflow="fold")):
            self.console.print(Text(indent if number == 0 else " " * len(indent)).append_text(line))
