"""Allocate: spend each prompt's next tokens where a group with signal is expected for the fewest of them.

    first round   `num_rollouts` rollouts from the prompt
    later rounds  one option for a prompt with a failed rollout, while it is worth its tokens:
                    root       `num_rollouts` more rollouts from the prompt, pooled with the first, unless those are mixed
                    depth d    K branches in every failed rollout, from a random candidate whose depth ratio is in bin d
    worth         P(mixed | option, successes so far) / E[tokens per group], both counted online; P is drawn from
                  Beta(mixed + 1, tries - mixed + 1), so that rarely tried options are tried again (Thompson sampling)
    price         an option below it is not bought; each step moves it so that a prompt costs `tokens_per_prompt` on average

A price instead of a purse: a tree depends on no other tree of its batch, and the allowance is still that of the whole step.
Counts decay by `memory` per step, because the policy changes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from deepgrpo.config import AllocateExplore
from deepgrpo.credit.siblings import pooled_credit, sibling_credit
from deepgrpo.explore.base import Limits, Signal, State, main_pivot
from deepgrpo.explore.pivots import Segmented, candidates, draw_without_replacement
from deepgrpo.explore.random import log_uniform
from deepgrpo.explore.segments import node_ends
from deepgrpo.records import Credit, Pivot, Tree
from deepgrpo.runs.facts import depth_bin, is_mixed

AT_ROOT = "root"
PRICE_STEP = 0.5
"""Change of the log price per step, for a cost of twice the allowance."""


@dataclass(frozen=True)
class AllocateStrategy(Segmented[AllocateExplore]):
    signals: frozenset[Signal] = frozenset()

    def initial_state(self) -> State:
        return {"price": 0.0, "counts": {}, "tokens": 0.0, "rounds": 0.0}

    def plan(self, tree: Tree, state: State, limits: Limits, random: np.random.Generator) -> list[Pivot]:
        config = self.config
        if not tree.pivots:
            return [main_pivot(config.num_rollouts)]
        if _rounds(tree, config.depth_bins) > config.max_rounds:
            return []
        rewards = [node.reward for _, node in tree.stream("main")]
        successes = sum(node.outcome > config.success_threshold for _, node in tree.stream("main"))
        if successes == len(rewards):
            return []
        options: dict[str, list[Pivot]] = {}
        if config.root and not is_mixed(rewards):
            options[AT_ROOT] = [main_pivot(config.num_rollouts)]
        options |= self._depths(tree, limits, random)
        best, worth = "", -math.inf
        for name in options:
            draw = self._worth(name, successes, tree, state, random)
            if draw > worth:
                best, worth = name, draw
        return options[best] if best and worth >= state["price"] else []

    def _depths(self, tree: Tree, limits: Limits, random: np.random.Generator) -> dict[str, list[Pivot]]:
        """Option of each depth bin → its pivots, one per failed rollout with a candidate there that is not a pivot yet."""
        config = self.config
        taken = {(pivot.parent, pivot.offset) for pivot in tree.pivots}
        options: dict[str, list[Pivot]] = {}
        for index, node in tree.stream("main"):
            if node.outcome > config.success_threshold:
                continue
            offsets, ratios = candidates(node_ends(self.segment, node), room=limits.response(tree), root=config.root_pivot)
            bins = [depth_bin(ratio, config.depth_bins) for ratio in ratios]
            for depth in range(config.depth_bins):
                free = [i for i, at in enumerate(bins) if at == depth and (index, offsets[i]) not in taken]
                if not free:
                    continue
                log_q = log_uniform([ratios[i] for i in free])
                chosen = free[draw_without_replacement(log_q, 1, random)[0]]
                options.setdefault(str(depth), []).append(
                    Pivot(
                        index, offsets[chosen], config.branches_per_pivot, ratio=ratios[chosen],
                        candidates=tuple(offsets[i] for i in free), q=tuple(map(float, np.exp(log_q))),
                    )
                )  # fmt: skip
        return options

    def _worth(self, option: str, successes: int, tree: Tree, state: State, random: np.random.Generator) -> float:
        """Draw the mixed groups per token of an option."""
        tries, mixed, tokens = state["counts"].get(key_of(option, successes), (0.0, 0.0, 0.0))
        lengths = [node.num_sampled for _, node in tree.stream("main")]
        if option == AT_ROOT:
            guess = float(np.mean(lengths)) * self.config.num_rollouts
        else:
            rest = 1 - (int(option) + 0.5) / self.config.depth_bins
            guess = float(np.mean(lengths)) * rest * self.config.branches_per_pivot
        worth: float = random.beta(mixed + 1, tries - mixed + 1) * (tries + 1) / (tokens + guess)
        return worth

    def returns(self, level: int) -> bool:
        return True  # a failed rollout of any round may be branched off

    def credit(self, tree: Tree) -> Credit:
        """The rollouts of all rounds are one group, the branches of each pivot another."""
        main = pooled_credit(tree, self.scale)
        branches = sibling_credit(tree, self.scale, stream="branch")
        return Credit(main.spans + branches.spans, main.groups + branches.groups)

    def observe(self, state: State, trees: Sequence[Tree]) -> State:
        """Count tries, mixed groups and tokens of each option, and move the price towards the allowance."""
        if not trees:
            return state
        keep = self.config.memory
        counts = {key: tuple(keep * value for value in values) for key, values in state["counts"].items()}
        for tree in trees:
            for key, mixed, tokens in tries_of(tree, self.config):
                old = counts.get(key, (0.0, 0.0, 0.0))
                counts[key] = (old[0] + 1, old[1] + mixed, old[2] + tokens)
        spent = float(np.mean([sum(node.num_sampled for node in tree.nodes) for tree in trees]))
        return {
            "price": self._next_price(state["price"], spent), "counts": {key: list(counts[key]) for key in sorted(counts)},
            "tokens": spent, "rounds": float(np.mean([_rounds(tree, self.config.depth_bins) - 1 for tree in trees])),
        }  # fmt: skip

    def _next_price(self, price: float, spent: float) -> float:
        """The price rises where prompts cost more than the allowance, from 0 to a thousandth of a group per allowance first."""
        allowance = self.config.tokens_per_prompt
        if allowance is None:
            return 0.0
        if price == 0.0:
            return 1e-3 / allowance if spent > allowance else 0.0
        return price * math.exp(PRICE_STEP * float(np.clip(spent / allowance - 1, -1, 1)))

    def report(self, state: State) -> dict[str, float]:
        found = {
            "allocate/price": 1000 * float(state["price"]), "allocate/tokens_per_prompt": float(state["tokens"]),
            "allocate/rounds": float(state["rounds"]),
        }  # fmt: skip
        for key, (tries, mixed, tokens) in state["counts"].items():
            if tokens:
                found[f"allocate/mixed_per_1k_{key}"] = 1000 * mixed / tokens
            found[f"allocate/tries_{key}"] = tries
        return found


def key_of(option: str, successes: int) -> str:
    """Key of an option's counts: "root/0", "3/1", "3/2+" by the successes before it."""
    return f"{option}/{successes if successes < 2 else '2+'}"


def tries_of(tree: Tree, config: AllocateExplore) -> list[tuple[str, int, int]]:
    """(key, 1 if its group became mixed, its tokens) of every option that was bought for a tree, one per group."""
    found: list[tuple[str, int, int]] = []
    rewards: list[float] = []
    successes = 0
    for number, pivot in enumerate(tree.pivots):
        children = [tree.nodes[child] for child in tree.children(number)]
        own, tokens = [node.reward for node in children], sum(node.num_sampled for node in children)
        if pivot.stream == "branch":
            found.append((key_of(str(depth_bin(pivot.ratio, config.depth_bins)), successes), int(is_mixed(own)), tokens))
            continue
        if number:
            found.append((key_of(AT_ROOT, successes), int(is_mixed([*rewards, *own])), tokens))
        rewards += own
        successes += sum(node.outcome > config.success_threshold for node in children)
    return found


def _rounds(tree: Tree, depth_bins: int) -> int:
    """Rounds so far, the first included.

    A round is one pivot at the prompt, or pivots of one depth bin in distinct rollouts: all that have a candidate there.
    """
    rounds, depth = 0, -1
    seen: set[int] = set()
    for pivot in tree.pivots:
        here = -1 if pivot.stream == "main" else depth_bin(pivot.ratio, depth_bins)
        if here < 0 or here != depth or pivot.parent in seen:
            rounds, depth, seen = rounds + 1, here, set()
        seen.add(pivot.parent)
    return rounds
