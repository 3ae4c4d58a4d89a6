"""Compute the per-token signals a strategy requests: by a forward pass of the policy, or by asking it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from deepgrpo.explore.base import ATTENTION, BELIEF, LOCATED, Critique, Measured, Signal, Signals, Strategy
from deepgrpo.explore.segments import episode_ends
from deepgrpo.model.policy import Policy
from deepgrpo.model.signals import Steps, attention_influence, check_attention, forwarded_tokens
from deepgrpo.records import Credit, Tree
from deepgrpo.train.belief import Likelihood, check_texts, measure_belief, sequence_logprobs
from deepgrpo.train.critique import Critic


def check_signals(policy: Policy, strategy: Strategy, critic: Critic | None = None) -> None:
    """Check that a strategy's signals can be computed.

    Args:
        critic: asks the policy about its rollouts; needed for LOCATED.

    Raises ModelError if the model cannot compute one of them, ConfigError if the tokenizer cannot encode their texts.
    """
    for signal in sorted(strategy.signals, key=lambda signal: signal.name):
        assert signal.name in (ATTENTION, BELIEF, LOCATED), signal.name
        if signal.name == ATTENTION:
            check_attention(policy)
        elif signal.name == BELIEF:
            check_texts(policy, signal)
        elif critic is not None and isinstance(signal, Critique):
            critic.check(signal)


def build_signals(
    policy: Policy, strategy: Strategy, tokens_per_pack: int, critic: Critic | None = None,
    likelihood: Likelihood | None = None,
) -> Signals | None:  # fmt: skip
    """Build the function that computes a strategy's signals; None if it requests none.

    Args:
        tokens_per_pack: most tokens of a forward pass for beliefs.
        critic: with an engine; needed for LOCATED.
        likelihood: forwards the probes of BELIEF; default: this policy, here.

    Raises as `check_signals`.
    """
    check_signals(policy, strategy, critic)
    if not strategy.signals:
        return None

    def here(trees: Sequence[Tree], credits: Sequence[Credit]) -> tuple[np.ndarray, int]:
        return sequence_logprobs(policy, trees, credits, tokens_per_pack)

    def measure(signal: Signal, nodes: Sequence[tuple[Tree, int]], keys: Sequence[int]) -> Measured:
        if isinstance(signal, Critique):
            assert critic is not None
            return critic.measure(signal, nodes, keys)
        if signal.name == BELIEF:
            return Measured(*measure_belief(policy, signal, nodes, likelihood or here))
        return _attention(policy, signal, nodes)

    return measure


def _attention(policy: Policy, signal: Signal, nodes: Sequence[tuple[Tree, int]]) -> Measured:
    paths: list[Steps] = []
    for tree, node in nodes:
        start = len(tree.prompt.tokens)
        ends = episode_ends(signal.segment, tree.response(node), tree.replies(node))
        paths.append(Steps(tree.path(node), (start, *(start + end for end in ends))))
    found = attention_influence(policy, paths, signal.lag)
    values: list[np.ndarray] = []
    for (tree, node), path, influence in zip(nodes, paths, found, strict=True):
        spread = np.repeat(influence, np.diff(path.bounds))  # every token gets the value of its step
        values.append(spread[len(spread) - len(tree.nodes[node].tokens) :])
    return Measured(values, forwarded_tokens(paths, signal.lag))
