"""Compute the per-token signals a strategy requests, by a forward pass of the policy."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from deepgrpo.explore.base import ATTENTION, BELIEF, Signal, Signals, Strategy
from deepgrpo.model.policy import Policy
from deepgrpo.model.signals import Steps, attention_influence, check_attention, forwarded_tokens
from deepgrpo.records import Tree
from deepgrpo.train.belief import check_texts, measure_belief


def build_signals(policy: Policy, strategy: Strategy, tokens_per_pack: int) -> Signals | None:
    """Build the function that computes a strategy's signals; None if it requests none.

    Args:
        tokens_per_pack: most tokens of a forward pass for beliefs.

    Raises ModelError if the model cannot compute one of them, ConfigError if the tokenizer cannot encode their texts.
    """
    wanted = {signal.name for signal in strategy.signals}
    if not wanted:
        return None
    assert wanted <= {ATTENTION, BELIEF}, sorted(wanted)
    if ATTENTION in wanted:
        check_attention(policy)
    for signal in strategy.signals:
        if signal.name == BELIEF:
            check_texts(policy, signal)

    def measure(signal: Signal, nodes: Sequence[tuple[Tree, int]]) -> tuple[list[np.ndarray], int]:
        if signal.name == BELIEF:
            return measure_belief(policy, signal, nodes, tokens_per_pack)
        paths: list[Steps] = []
        for tree, node in nodes:
            start = len(tree.prompt.tokens)
            ends = signal.segment(tree.response(node))
            paths.append(Steps(tree.path(node), (start, *(start + end for end in ends))))
        found = attention_influence(policy, paths, signal.lag)
        values: list[np.ndarray] = []
        for (tree, node), path, influence in zip(nodes, paths, found, strict=True):
            spread = np.repeat(influence, np.diff(path.bounds))  # every token gets the value of its step
            values.append(spread[len(spread) - len(tree.nodes[node].tokens) :])
        return values, forwarded_tokens(paths, signal.lag)

    return measure
