"""The metrics of a step, from its trees and costs. docs/metrics.md explains how to read them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from deepgrpo.explore.grow import Growth
from deepgrpo.ledger import Ledger
from deepgrpo.records import Credit, Node, Stream, Tree
from deepgrpo.runs.facts import DEPTH_BINS, depth_bin, is_rescued
from deepgrpo.stats import finite_mean

Metrics = dict[str, Any]


def step_metrics(
    growth: Growth, credits: Sequence[Credit], seconds_learn: float, success_threshold: float = 0.0
) -> Metrics:
    """Metrics of a step's trees, of their sampling, and of its times.

    Args:
        credits: of each tree.
        seconds_learn: time of the update.
        success_threshold: outcomes above it are successes.
    """
    stats, branches = growth.stats, growth.branches
    return {
        **tree_metrics(growth.trees, credits, success_threshold),
        "tokens_per_s": stats.sampled_tokens / max(stats.seconds, 1e-9),
        "sampled_tokens": float(growth.sampled_tokens),
        **({"signals/sampled_tokens": float(growth.signal_stats.sampled_tokens)} if growth.signal_sequences else {}),
        "prefix/reused": stats.reused,
        **({"branch/prefix_reused": branches.reused} if branches.prefix_tokens else {}),
        **episode_metrics(growth),
        "time/sample": stats.seconds,
        "time/reward": growth.seconds_reward,
        **({"time/signals": growth.seconds_signals} if growth.signal_tokens else {}),
        "time/learn": seconds_learn,
    }


def sampling_cost(growth: Growth) -> Ledger:
    """The ledger's entry for growing a batch of trees."""
    return Ledger(
        sampled_tokens=growth.sampled_tokens,
        sampled_sequences=sum(node.sampled for tree in growth.trees for node in tree.nodes) + growth.signal_sequences,
        prefix_tokens=growth.stats.prefix_tokens,
        prefix_tokens_encoded=growth.stats.prefix_tokens_encoded,
        signal_tokens=growth.signal_tokens,
        given_tokens=growth.episodes.given_tokens,
        tool_calls=growth.episodes.calls,
        verifier_calls=growth.verifier_calls,
        seconds_tools=growth.episodes.seconds,
        seconds_sample=growth.stats.seconds,
        seconds_signals=growth.seconds_signals,
        seconds_reward=growth.seconds_reward,
    )


def episode_metrics(growth: Growth) -> Metrics:
    """Turns, calls and given tokens of a step's episodes; empty without an environment."""
    cost = growth.episodes
    whole = [len(tree.replies(i)) for tree in growth.trees for i, node in tree.stream("main") if node.complete]
    if not cost.turns:
        return {}
    return {
        "env/turns": float(np.mean(whole)),
        "env/calls": float(cost.calls),
        "env/failed_calls": float(cost.failed_calls),
        "env/given_tokens": float(cost.given_tokens),
        "env/tool_seconds": cost.tool_seconds,
        **({"env/replayed_turns": float(cost.replayed), "env/replays_differ": float(cost.differing)} if cost.replayed else {}),
        "time/tools": cost.seconds,
    }


def staleness(trees: Sequence[Tree], optimizer_steps: int) -> float:
    """Optimizer steps between the weights that sampled a node and the learner's, averaged over nodes.

    Args:
        optimizer_steps: of the learner, before the update.
    """
    versions = [node.version for tree in trees for node in tree.nodes if node.sampled]
    return optimizer_steps - sum(versions) / max(1, len(versions))


def tree_metrics(trees: Sequence[Tree], credits: Sequence[Credit], success_threshold: float = 0.0) -> Metrics:
    """Rewards, groups, lengths and pivots of a step. Segments are not responses: only their log-probs count."""
    metrics: Metrics = {}
    for stream in ("main", "branch"):
        nodes = [node for tree in trees for _, node in tree.stream(stream)]
        responses = [(tree, i) for tree in trees for i, node in tree.stream(stream) if node.complete]
        metrics[f"{stream}/rollouts"] = float(len(responses))
        if len(nodes) > len(responses):
            metrics[f"{stream}/segments"] = float(len(nodes) - len(responses))
        if nodes:
            metrics[f"{stream}/surprisal"] = float(
                -np.concatenate([np.array(node.logprobs)[node.sampled_places()] for node in nodes]).mean()
            )
        if responses:
            metrics |= _stream_metrics(stream, responses)
            # evidence of a part is what the prompt's own rollouts got; branches start where others failed
            prefix = "reward" if stream == "main" else "branch/reward"
            metrics |= part_means([tree.nodes[i] for tree, i in responses], prefix)
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
    failed = Counter(name for node in everything for name, part in node.score.parts.items() if part.problem)
    metrics |= {f"reward/{name}_problems": float(count) for name, count in sorted(failed.items())}
    return metrics | given_metrics(trees) | pivot_metrics(trees, success_threshold) | source_metrics(trees, credits)


def source_metrics(trees: Sequence[Tree], credits: Sequence[Credit]) -> Metrics:
    """Prompts, mean reward and share of mixed groups of each source of a mix, in the main stream; empty without a mix."""
    metrics: Metrics = {}
    for name in sorted({tree.prompt.source for tree in trees} - {""}):
        of = [(tree, credit) for tree, credit in zip(trees, credits, strict=True) if tree.prompt.source == name]
        rewards = [node.reward for tree, _ in of for _, node in tree.stream("main") if node.complete]
        groups = [group.mixed for _, credit in of for group in credit.groups if group.stream == "main"]
        metrics[f"source/{name}/prompts"] = float(len(of))
        metrics |= {f"source/{name}/reward": finite_mean(rewards)} if rewards else {}
        metrics |= {f"source/{name}/mixed": float(np.mean(groups))} if groups else {}
    return metrics


def given_metrics(trees: Sequence[Tree]) -> Metrics:
    """Tokens of earlier rollouts that trees start from, and their mean age in optimizer steps; empty without any."""
    given = [node for tree in trees for _, node in tree.stream("given")]
    if not given:
        return {}
    now = max(node.version for tree in trees for node in tree.nodes)
    return {
        "given/tokens": float(sum(len(node.tokens) for node in given)),
        "given/age": float(np.mean([now - node.version for node in given])),
    }


def part_means(nodes: Sequence[Node], prefix: str) -> Metrics:
    """Mean of each part of the reward, before its weight; empty for a reward without parts."""
    names = nodes[0].score.parts
    return {f"{prefix}/{name}": finite_mean([node.score.parts[name].value for node in nodes]) for name in names}


def _stream_metrics(stream: Stream, responses: Sequence[tuple[Tree, int]]) -> Metrics:
    nodes = [tree.nodes[i] for tree, i in responses]
    # a main response may consist of several segments; a branch is what was sampled at its pivot
    lengths = [len(tree.response(i)) if stream == "main" else len(tree.nodes[i].tokens) for tree, i in responses]
    whole = [node for node in nodes if node.finish == "stop"]
    return {
        f"{stream}/reward": finite_mean([node.reward for node in nodes]),
        f"{stream}/truncated": float(np.mean([node.finish == "length" for node in nodes])),
        f"{stream}/length": float(np.mean(lengths)),
        # a truncated response could not reach its answer, which says nothing about its format
        f"{stream}/unparsed": float(np.mean([not node.score.parsed for node in whole])) if whole else 0.0,
    }


def pivot_metrics(trees: Sequence[Tree], success_threshold: float = 0.0) -> Metrics:
    """Depth ratios of branch pivots and their rescue rates.

    `rescue_by_ratio` is None in a bin without pivots, which differs from a rescue rate of 0.
    """
    found = [
        (pivot, is_rescued(tree, i, success_threshold))
        for tree in trees for i, pivot in enumerate(tree.pivots) if pivot.stream == "branch"
    ]  # fmt: skip
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
        "pivots/rescue_by_ratio": [float(rescued[bins == i].mean()) if counts[i] else None for i in range(DEPTH_BINS)],
    }
