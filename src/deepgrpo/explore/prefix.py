"""Prefix (after PrefixRL, arXiv:2601.18795): continue a piece of an earlier success of the same prompt.

    first round    `num_rollouts` rollouts from the prompt
    second round   K branches behind a prefix of a stored success, for prompts that this step did not solve
    depth          found by bisection, between a prefix behind which all fail and one behind which all succeed (`bisect`)
    afterwards     a success of the first round enters the store (prefix_store.py), which the checkpoint holds

The prefix is a given node: forwarded as context, never trained, and it costs no sampled tokens. Where the policy alone never
succeeds, one lucky rollout so becomes a row of easier questions that end at the question itself.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from deepgrpo.config import PrefixExplore
from deepgrpo.credit.siblings import sibling_credit
from deepgrpo.explore.base import Limits, Signal, State, main_pivot
from deepgrpo.explore.pivots import Segmented
from deepgrpo.explore.prefix_store import Entry, Store, entries_of
from deepgrpo.records import ROOT, Credit, Given, Node, Pivot, Tree

EVENTS = ("used", "mixed", "added", "mastered", "hopeless", "old", "crowded")
"""Counts of a step: prefixes continued, of them with both outcomes; entries that came, and that left by reason."""


@dataclass(frozen=True)
class PrefixStrategy(Segmented[PrefixExplore]):
    signals: frozenset[Signal] = frozenset()

    def initial_state(self) -> State:
        return {"step": 0, "store": {}, "events": {}}

    def plan(self, tree: Tree, state: State, limits: Limits, random: np.random.Generator) -> list[Pivot]:
        if not tree.pivots:
            return [main_pivot(self.config.num_rollouts)]
        if len(tree.pivots) > 1 or not self._wanted(tree):
            return []
        room = limits.response(tree)
        fitting = [each for each in entries_of(state["store"], tree.prompt) if len(each.prefix) < room]
        if not fitting:
            return []
        entry = fitting[int(random.integers(len(fitting)))]
        given = Given(entry.prefix, entry.version)
        return [Pivot(ROOT, 0, self.config.branches_per_pivot, ratio=(entry.depth + 1) / (entry.length + 1), given=given)]

    def _wanted(self, tree: Tree) -> bool:
        """True if a prefix of this prompt is to be continued, after its first round."""
        if self.config.expand == "all":
            return True
        successes = [self._succeeds(node) for _, node in tree.stream("main")]
        return not all(successes) if self.config.expand == "failed" else not any(successes)

    def _succeeds(self, node: Node) -> bool:
        return node.outcome > self.config.success_threshold

    def returns(self, level: int) -> bool:
        return False

    def credit(self, tree: Tree) -> Credit:
        return sibling_credit(tree, self.scale)

    def observe(self, state: State, trees: Sequence[Tree]) -> State:
        """Move the bisections of the prefixes that were continued, and store one success per prompt."""
        config, step = self.config, int(state["step"]) + 1
        events: Counter[str] = Counter()
        store = Store.read(state["store"])
        for tree in trees:
            for number, pivot in enumerate(tree.pivots):
                if pivot.stream == "branch":
                    outcomes = [self._succeeds(tree.nodes[child]) for child in tree.children(number)]
                    events["used"] += 1
                    events["mixed"] += any(outcomes) and not all(outcomes)
                    events.update(store.learn(tree.prompt, tree.nodes[pivot.parent].tokens, outcomes))
            if (found := next((node for _, node in tree.stream("main") if self._succeeds(node)), None)) is not None:
                entry = Entry.of(found, self.segment(found.tokens), step)
                events.update(store.add(tree.prompt, entry, config.per_prompt) if entry else ())
        events.update(store.forget(step, config.max_age, config.store_tokens))
        return {"step": step, "store": store.to_json(), "events": {name: events[name] for name in EVENTS}}

    def report(self, state: State) -> dict[str, float]:
        entries = Store.read(state["store"]).entries()
        found = {
            "store/prompts": float(len(state["store"])),
            "store/tokens": float(sum(len(each.tokens) for each in entries)),
            **{f"store/{name}": float(state["events"].get(name, 0)) for name in EVENTS},
        }
        if entries:
            found["store/depth"] = float(np.mean([each.depth / each.length for each in entries]))
            found["store/age"] = float(np.mean([state["step"] - each.step for each in entries]))
        return found

