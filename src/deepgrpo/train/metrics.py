"""What a step's trees say, as numbers. docs/metrics.md tells how to read each of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from deepgrpo.records import Credit, Stream, Tree
from deepgrpo.runs.facts import DEPTH_BINS, depth_bin, is_rescued

Metrics = dict[str, Any]


def tree_metrics(trees: Sequence[Tree], credits: Sequence[Credit]) -> Metrics:
    """Rewards, groups, lengths and pivots of a step. A segment is no response: only its log-probs count."""
    metrics: Metrics = {}
    for stream in ("main", "branch"):
        nodes = [node for tree in trees for _, node in tree.stream(stream)]
        responses = [(tree, i) for tree in trees for i, node in tree.stream(stream) if node.complete]
        metrics[f"{stream}/rollouts"] = float(len(responses))
        if len(nodes) > len(responses):
            metrics[f"{stream}/segments"] = float(len(nodes) - len(responses))
        if nodes:
            metrics[f"{stream}/surprisal"] = float(-np.concatenate([node.logprobs for node in nodes]).mean())
        if responses:
            metrics |= _stream_metrics(stream, responses)
        groups = [group for credit in credits for group in credit.groups if group.stream == stream]
        if groups:
            metrics[f"{stream}/groups"] = float(len(groups))
            metrics[f"{stream}/mixed"] = float(np.mean([group.mixed for group in groups]))
            metrics[f"{stream}/zero_variance"] = 1.0 - metrics[f"{stream}/mixed"]
    everything = [node for tree in trees for node in tree.nodes]
    metrics["reward/problems"] = float(sum(node.score.problem is not None for node in everything))
    for problem in sorted({node.score.problem for node in everything if node.score.problem}):
        metrics[f"reward/problem_{problem.replace(' ', '_')}"] = float(
            sum(node.score.problem == problem for node in everything)
        )
    return metrics | pivot_metrics(trees)


def _stream_metrics(stream: Stream, responses: Sequence[tuple[Tree, int]]) -> Metrics:
    nodes = [tree.nodes[i] for tree, i in responses]
    # a main response may consist of several segments; a branch is what was sampled at its pivot
    lengths = [len(tree.response(i)) if stream == "main" else len(tree.nodes[i].tokens) for tree, i in responses]
    whole = [node for node in nodes if node.finish == "stop"]
    return {
        f"{stream}/reward": float(np.mean([node.reward for node in nodes])),
        f"{stream}/truncated": float(np.mean([node.finish == "length" for node in nodes])),
        f"{stream}/length": float(np.mean(lengths)),
        # a response that was cut off could not give its answer: it is no sign of a wrong format
        f"{stream}/unparsed": float(np.mean([not node.score.parsed for node in whole])) if whole else 0.0,
    }


def pivot_metrics(trees: Sequence[Tree]) -> Metrics:
    """Where branches started, and whether any of them succeeded.

    `rescue_by_ratio` has None in a bin without pivots: no pivot there is not the same as no rescue.
    """
    found = [(pivot, is_rescued(tree, i)) for tree in trees for i, pivot in enumerate(tree.pivots) if pivot.stream == "branch"]
    metrics: Metrics = {"pivots/count": float(len(found))}
    if not found:
        return metrics
    rescued = np.array([ok for _, ok in found])
    bins = np.array([depth_bin(pivot.ratio) for pivot, _ in found])
    counts = np.bincount(bins, minlength=DEPTH_BINS)
    return metrics | {
        "pivots/rescue_rate": float(rescued.mean()),
        "pivots/unrecoverable": float((~rescued).sum()),
        "pivots/ratio": float(np.mean([pivot.ratio for pivot, _ in found])),
        "pivots/ratio_histogram": [float(c) for c in counts],
        "pivots/rescue_by_ratio": [
            float(rescued[bins == i].mean()) if counts[i] else None for i in range(DEPTH_BINS)
        ],
    }
