"""Sequence ratios through the learner: the formula written out node by node, and splits into packs that do not show."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from learners import LearnerWithOld
from torch import Tensor
from trees import make_tree

from deepgrpo.config import Config
from deepgrpo.credit.siblings import sibling_credit
from deepgrpo.model.policy import Policy
from deepgrpo.pack.budget import pack_rows
from deepgrpo.pack.layout import lay_out
from deepgrpo.pack.tree import pack_trees
from deepgrpo.records import Tree
from deepgrpo.train.learner import Learner
from deepgrpo.train.optim import build_optimizer

TREES = [
    make_tree([(6, 0.0), (5, 1.0), (7, 0.0)], [(0, 4, [(2, 1.0), (3, 0.0)]), (2, 0, [(4, 0.0), (5, 1.0), (2, 0.0)])]),
    make_tree([(3, 1.0), (8, 0.0), (2, 0.0)], [(1, 6, [(1, 1.0), (9, 0.0)])], prompt_length=5),
    make_tree([(4, 1.0), (4, 1.0)]),
]
CLIP = {"sequence_clip_low": 0.1, "sequence_clip_high": 0.1, "dual_clip": "none"}


@pytest.fixture
def config(recipe: Any) -> Any:
    def make(**sections: Any) -> Config:
        loss = {"beta": 0.0, "lambda": 0.7, "ratio": "sequence", **CLIP, **sections.pop("loss", {})}
        # two epochs, so that old log-probs are asked for; at this rate the weights stay
        optim = {"lr": 1e-30, "epochs": 2, "max_grad_norm": "none"}
        return recipe(loss=loss, optim=optim, **sections)

    return make


@torch.no_grad()
def old_logprobs(policy: Policy, trees: Sequence[Tree], seed: int = 0) -> Tensor:
    """`[N]` log-probs that are not the policy's: each is off by about .4 nats."""
    noise = np.random.default_rng(seed)
    per_node = [own_logprobs(policy, tree, span.node) for tree in trees for span in spans(tree)]
    joined = torch.cat(per_node)
    return joined + torch.from_numpy(noise.normal(0, 0.4, len(joined))).float()


def own_logprobs(policy: Policy, tree: Tree, node: int) -> Tensor:
    """Of a node's own tokens, by one forward pass over its path, with all logits."""
    own, path = tree.nodes[node].tokens, tree.path(node)
    log_p = torch.log_softmax(policy.model(torch.tensor([path])).logits[0], -1)
    return log_p[torch.arange(len(path) - len(own) - 1, len(path) - 1), torch.tensor(own)]


def spans(tree: Tree) -> list[Any]:
    """Rows with an advantage, in the order of the learner's terms."""
    return sorted((s for s in sibling_credit(tree).spans if s.advantage), key=lambda s: s.node)


def gradient(policy: Policy, config: Config, old_N: Tensor, trees: Sequence[Tree] = TREES) -> dict[str, Tensor]:
    """The gradient of the first optimizer step, with these old log-probs."""
    optimizer = build_optimizer(policy, config.optim)
    learner = LearnerWithOld(policy, None, optimizer, config, old_N=old_N)
    caught: list[dict[str, Tensor]] = []
    optimizer.register_step_pre_hook(
        lambda *_: caught.append({n: p.grad.clone() for n, p in policy.trainable().items() if p.grad is not None})
    )
    learner.update(trees, [sibling_credit(tree) for tree in trees])
    return caught[0]


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Largest relative L2 distance over the parameters."""
    assert a.keys() == b.keys() and a
    return max(float((a[n] - b[n]).norm() / (b[n].norm() + 1e-12)) for n in a)


@pytest.mark.parametrize("reduction", ["token", "sequence", "constant"])
def test_the_gradient_is_that_of_the_formula(policy: Policy, config: Any, reduction: str) -> None:
    """A loop over nodes: s_i from the mean of its log-probs, differentiated through that mean, clipped, averaged."""
    old_N = old_logprobs(policy, TREES)
    ours = gradient(policy, config(loss={"reduction": reduction, "reduction_length": 10}), old_N)
    losses: dict[str, list[tuple[Tensor, int]]] = {"main": [], "branch": []}
    begin, clipped = 0, 0
    for tree in TREES:
        for span in spans(tree):
            length = len(tree.nodes[span.node].tokens)
            ratio = torch.exp((own_logprobs(policy, tree, span.node) - old_N[begin : begin + length]).mean())
            loss = -torch.minimum(ratio * span.advantage, ratio.clamp(0.9, 1.1) * span.advantage)
            clipped += bool(ratio * span.advantage > ratio.clamp(0.9, 1.1) * span.advantage)
            losses[span.stream].append((loss, length))
            begin += length
    assert begin == len(old_N) and 3 <= clipped <= sum(map(len, losses.values())) - 3

    def reduce(found: list[tuple[Tensor, int]]) -> Tensor:
        if reduction == "sequence":
            return sum(loss for loss, _ in found) / len(found)  # type: ignore[return-value]
        per = sum(length for _, length in found) if reduction == "token" else 10 * len(found)
        return sum(loss * length for loss, length in found) / per  # type: ignore[return-value]

    policy.model.zero_grad()
    (reduce(losses["main"]) + 0.7 * reduce(losses["branch"])).backward()
    expected = {n: p.grad for n, p in policy.trainable().items() if p.grad is not None}
    assert distance(ours, expected) < 1e-5
    # the control: ratios of tokens are something else
    tokens = {"ratio": "token", "sequence_clip_low": 3e-4, "sequence_clip_high": 4e-4}
    other = gradient(policy, config(loss={"reduction": reduction, "reduction_length": 10, **tokens}), old_N)
    assert distance(other, expected) > 0.05


def test_the_split_into_packs_does_not_change_the_gradient(policy: Policy, config: Any) -> None:
    """Rows of paths and packs of trees, of any size; rollout 0 and its branches are in several of the small ones."""
    old_N = old_logprobs(policy, TREES)
    whole = gradient(policy, config(), old_N)
    for budget in (1, 12, 20, 40):
        assert distance(gradient(policy, config(learner={"tokens_per_pack": budget}), old_N), whole) < 1e-5
    assert policy.try_tree_packing().packs
    for budget in (1, 12, 20, 40, 1000):
        assert distance(gradient(policy, config(learner={"tokens_per_pack": budget}), old_N), whole) < 1e-5


@given(
    main=st.lists(st.integers(1, 12), min_size=2, max_size=4), branches=st.lists(st.integers(1, 12), min_size=2, max_size=4),
    offset=st.integers(0, 12), budget=st.integers(1, 60),
)  # fmt: skip
def test_no_sequence_is_in_two_packs(main: list[int], branches: list[int], offset: int, budget: int) -> None:
    """Which is what lets a pack compute the ratios of its sequences by itself."""
    kids = [(length, float(i % 2)) for i, length in enumerate(branches)]
    tree = make_tree([(length, float(i % 2)) for i, length in enumerate(main)], [(0, min(offset, main[0]), kids)])
    layout = lay_out([tree, tree], [sibling_credit(tree)] * 2)
    for packs in (pack_rows(layout.rows, budget), pack_trees([tree, tree], layout, budget)):
        found = [label for pack in packs for label in set(layout.terms.sequence_N[pack.terms_n].tolist())]
        assert sorted(found) == list(range(len(layout.rows)))


def test_one_optimizer_step_is_the_same_with_either_ratio(policy: Policy, recipe: Any) -> None:
    """Without old log-probs every ratio is 1; loss/ratio.py says why the gradients agree."""

    def once(level: str) -> dict[str, Tensor]:
        settings = recipe(loss={"beta": 0.0, "ratio": level, "reduction": "sequence"}, optim={"lr": 1e-30})
        return gradient(policy, settings, torch.empty(0))

    assert distance(once("sequence"), once("token")) < 1e-7


def test_importance_weights_are_of_sequences_too(policy: Policy, config: Any) -> None:
    """The trees' sampler says -1 for every token; all tokens of a node then weigh the same, and the figure shows it."""
    settings = config(loss={"importance": "on"})
    optimizer = build_optimizer(policy, settings.optim)
    update = Learner(policy, None, optimizer, settings).update(TREES, [sibling_credit(tree) for tree in TREES])
    weights = [
        (min(2.0, float((own_logprobs(policy, tree, span.node).detach() + 1).mean().exp())), len(tree.nodes[span.node].tokens))
        for tree in TREES
        for span in spans(tree)
    ]
    expected = sum(weight * length for weight, length in weights) / sum(length for _, length in weights)
    assert update.metrics["mismatch/weight"] == pytest.approx(expected, rel=1e-5)
    assert len({round(weight, 6) for weight, _ in weights}) > 5
