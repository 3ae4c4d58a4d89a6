"""The update: what must not change its gradient, and what must."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from trees import make_tree

from deepgrpo.config import Config
from deepgrpo.credit.siblings import sibling_credit
from deepgrpo.errors import DivergenceError
from deepgrpo.model.logprobs import chunked_logprobs
from deepgrpo.model.policy import Policy, Reference
from deepgrpo.pack.budget import pack_rows
from deepgrpo.pack.layout import lay_out
from deepgrpo.records import Tree
from deepgrpo.train.learner import Learner
from deepgrpo.train.optim import build_optimizer, learning_rate

TREES = [
    make_tree([(6, 0.0), (5, 1.0), (7, 0.0)], [(0, 4, [(2, 1.0), (3, 0.0)]), (2, 0, [(4, 0.0), (5, 1.0), (2, 0.0)])]),
    make_tree([(3, 1.0), (8, 0.0), (2, 0.0)], [(1, 6, [(1, 1.0), (9, 0.0)])], prompt_length=5),
    make_tree([(4, 1.0), (4, 1.0)]),
]


def gradient(policy: Policy, config: Config, trees: Sequence[Tree] = TREES, **learner: Any) -> dict[str, Tensor]:
    """The gradient of one optimizer step, before clipping; the weights stay."""
    caught: dict[str, Tensor] = {}
    optimizer = build_optimizer(policy, config.optim)
    # the learner clips to infinity here, so what `step` finds is the gradient itself
    optimizer.step = lambda closure=None: caught.update(  # type: ignore[method-assign, assignment]
        {n: p.grad.clone() for n, p in policy.trainable().items() if p.grad is not None}
    )
    reference = Reference.of(policy) if config.loss.beta else None
    Learner(policy, reference, optimizer, config, **learner).update(trees, [sibling_credit(t) for t in trees])
    return caught


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Largest relative L2 distance over the parameters."""
    assert a.keys() == b.keys() and a
    return max(float((a[n] - b[n]).norm() / (b[n].norm() + 1e-12)) for n in a)


@pytest.fixture
def config(recipe: Any) -> Any:
    def make(**sections: Any) -> Config:
        return recipe(**{"optim": {"lr": 1e-3, "max_grad_norm": "none"}, **sections})

    return make


def test_the_micro_batch_split_does_not_change_the_gradient(policy: Policy, config: Any) -> None:
    whole = gradient(policy, config(loss={"beta": 0.1, "lambda": 0.7}))
    for budget in (1, 20, 40):
        split = gradient(policy, config(loss={"beta": 0.1, "lambda": 0.7}, learner={"tokens_per_pack": budget}))
        assert distance(split, whole) < 1e-5


@pytest.mark.parametrize("reduction", ["token", "sequence", "constant"])
def test_the_gradient_is_that_of_the_formula(policy: Policy, config: Any, reduction: str) -> None:
    """Against the obvious slow version: a loop over nodes, full logits, means written out."""
    settings = config(loss={"beta": 0.0, "lambda": 0.5, "reduction": reduction, "reduction_length": 10})
    ours = gradient(policy, settings)
    streams: dict[str, list[Tensor]] = {"main": [], "branch": []}
    for tree in TREES:
        credit = sibling_credit(tree)
        for span in credit.spans:
            if span.advantage == 0.0:
                continue
            own = tree.nodes[span.node].tokens
            path = tree.path(span.node)
            log_p = torch.log_softmax(policy.model(torch.tensor([path])).logits[0], -1)
            chosen = log_p[torch.arange(len(path) - len(own) - 1, len(path) - 1), torch.tensor(own)]
            streams[span.stream].append(-span.advantage * torch.exp(chosen - chosen.detach()))

    def reduce(losses: list[Tensor]) -> Tensor:
        if reduction == "token":
            return torch.cat(losses).mean()
        if reduction == "sequence":
            return torch.stack([loss.mean() for loss in losses]).mean()
        return torch.cat(losses).sum() / (len(losses) * 10)

    policy.model.zero_grad()
    (reduce(streams["main"]) + 0.5 * reduce(streams["branch"])).backward()
    expected = {n: p.grad for n, p in policy.trainable().items() if p.grad is not None}
    assert distance(ours, expected) < 1e-5


def test_lambda_zero_is_the_grpo_update(policy: Policy, config: Any) -> None:
    """Branches with lambda 0 change nothing: the same gradient as the main rollouts alone."""
    without = [Tree(t.prompt, t.nodes[: t.pivots[0].num_branches], t.pivots[:1]) for t in TREES]
    ours = gradient(policy, config(loss={"beta": 0.0, "lambda": 0.0}))
    grpo = gradient(policy, config(loss={"beta": 0.0}), trees=without)
    assert distance(ours, grpo) < 1e-5
    # a control that must fail: with lambda 1 the branches do count
    assert distance(gradient(policy, config(loss={"beta": 0.0, "lambda": 1.0})), grpo) > 0.05


def gradient_by_token(policy: Policy, config: Config, tree: Tree, streams: str) -> dict[tuple[int, int], float]:
    """(packed row, position in it) → size of d loss / d last hidden state there, from the learner's own update."""
    caught: list[Tensor] = []

    def keep(module: Any, args: Any, output: Any) -> None:
        output.last_hidden_state.retain_grad()
        caught.append(output.last_hidden_state)

    credit = sibling_credit(tree)
    chosen = dataclasses.replace(credit, spans=tuple(s for s in credit.spans if s.stream in streams))
    optimizer = build_optimizer(policy, config.optim)
    optimizer.step = lambda closure=None: None  # type: ignore[method-assign, assignment]
    handle = policy.causal.base_model.register_forward_hook(keep)
    Learner(policy, None, optimizer, config).update([tree], [chosen])
    handle.remove()
    (hidden,) = caught
    assert hidden.grad is not None
    sizes = hidden.grad.abs().sum(-1)
    return {(b, t): float(sizes[b, t]) for b in range(sizes.shape[0]) for t in range(sizes.shape[1])}


@pytest.mark.parametrize("packed", [False, True])
def test_a_branch_gives_its_prefix_exactly_no_gradient(policy: Policy, config: Any, packed: bool) -> None:
    """Through the learner, in both layouts: with the branch stream alone, d loss / d hidden is exactly zero at every
    prefix token but the last, which predicts the first token of each branch.

    Prompt 3, rollout 0 of 6 tokens, two branches of 3 and 4 tokens after its fourth.
    """
    tree = make_tree([(6, 0.0), (5, 1.0)], [(0, 4, [(3, 1.0), (4, 0.0)])])
    if packed:
        assert policy.try_tree_packing().packs
    sizes = gradient_by_token(policy, config(), tree, streams="branch")
    prefix = [size for (_, position), size in sizes.items() if position < 6]
    assert prefix and not any(prefix)
    if packed:  # prompt and prefix once (7), then the branches: rows 6..8 and 6, 10..12 predict; the last ones nothing
        trained = {position for (_, position), size in sizes.items() if size}
        assert trained == {6, 7, 8, 10, 11, 12}
    else:
        assert {cell for cell, size in sizes.items() if size} == {(0, 6), (0, 7), (0, 8), (1, 6), (1, 7), (1, 8), (1, 9)}
    # the control: the main stream does train the prefix
    both = gradient_by_token(policy, config(), tree, streams="main branch")
    assert any(size for (_, position), size in both.items() if 2 <= position < 6)


def test_branches_train_no_prefix_token(policy: Policy, config: Any) -> None:
    """The terms of the branch stream are the branches' own tokens, counted."""
    layout = lay_out(TREES, [sibling_credit(t) for t in TREES])
    branch_tokens = sum(len(n.tokens) for t in TREES for _, n in t.stream("branch"))
    assert int((layout.terms.stream_N == 1).sum()) == branch_tokens
    assert len(layout.terms) == sum(len(n.tokens) for t in TREES for n in t.nodes)


def test_unique_tokens_count_each_token_once() -> None:
    layout = lay_out(TREES, [sibling_credit(t) for t in TREES])
    assert layout.unique_tokens == sum(len(t.prompt.tokens) + sum(len(n.tokens) for n in t.nodes) for t in TREES)


def test_packs_hold_every_row_once_within_the_budget() -> None:
    layout = lay_out(TREES, [sibling_credit(t) for t in TREES])
    packs = pack_rows(layout.rows, tokens_per_pack=30)
    assert sorted(np.concatenate([p.terms_n for p in packs]).tolist()) == list(range(len(layout.terms)))
    assert all(p.input_ids_BT.size <= 30 for p in packs)
    assert sum(p.num_tokens for p in packs) == sum(len(r.input_ids) for r in layout.rows)
    for pack in packs:  # each term's target follows the position that predicts it
        flat = pack.input_ids_BT.reshape(-1)
        assert (flat[pack.rows_n + 1] == layout.terms.target_N[pack.terms_n]).all()


@pytest.mark.parametrize("budget", [20, 40, 1000])
def test_tree_packs_give_the_gradient_of_rows(policy: Policy, config: Any, budget: int) -> None:
    settings = config(loss={"beta": 0.1, "lambda": 0.7}, learner={"tokens_per_pack": budget})
    rows = gradient(policy, settings)
    assert policy.try_tree_packing().packs
    assert distance(gradient(policy, settings), rows) < 1e-5
    policy.checkpoint_activations()
    assert distance(gradient(policy, settings), rows) < 1e-5


def test_a_window_shorter_than_a_path_means_rows(policy: Policy, config: Any) -> None:
    policy.verdict = dataclasses.replace(policy.try_tree_packing(), window=10)
    optimizer = build_optimizer(policy, config().optim)
    learner = Learner(policy, None, optimizer, config())
    credits = [sibling_credit(t) for t in TREES]
    rows = learner.update(TREES, credits).ledger
    policy.verdict = dataclasses.replace(policy.verdict, window=100)
    packed = learner.update(TREES, credits).ledger
    assert rows.learner_tokens > packed.learner_tokens == packed.learner_tokens_unique == rows.learner_tokens_unique


def test_gradient_checkpointing_and_chunks_do_not_change_the_gradient(policy: Policy, config: Any) -> None:
    plain = gradient(policy, config())
    policy.checkpoint_activations()
    policy.logprob_chunk = 3
    assert distance(gradient(policy, config()), plain) < 1e-5


def test_a_head_that_is_not_plain_takes_the_full_logits(policy: Policy, config: Any) -> None:
    plain = gradient(policy, config())
    assert policy.plain_head
    policy.head = None
    assert distance(gradient(policy, config()), plain) < 1e-5


def test_several_steps_use_the_old_policys_logprobs(policy: Policy, config: Any) -> None:
    """In the second epoch the ratio is not 1; its old log-probs are those before the first step."""
    settings = config(optim={"lr": 0.05, "epochs": 2, "max_grad_norm": "none"})
    learner = Learner(policy, None, build_optimizer(policy, settings.optim), settings)
    update = learner.update(TREES, [sibling_credit(t) for t in TREES])
    assert update.optimizer_steps == learner.optimizer_steps == policy.version == 2
    assert update.metrics["main/clip_fraction"] > 0.05
    single = config(optim={"lr": 0.05})
    fresh = Learner(policy, None, build_optimizer(policy, single.optim), single)
    assert fresh.update(TREES, [sibling_credit(t) for t in TREES]).metrics["main/clip_fraction"] == 0.0


def test_minibatches_split_the_prompts(policy: Policy, config: Any) -> None:
    settings = config(optim={"lr": 1e-3, "minibatches": 3})
    learner = Learner(policy, None, build_optimizer(policy, settings.optim), settings)
    update = learner.update(TREES, [sibling_credit(t) for t in TREES])
    assert update.optimizer_steps == 2  # the third prompt's group is unanimous


def test_kl_is_zero_at_the_start_and_pulls_back_later(policy: Policy, config: Any) -> None:
    settings = config(loss={"beta": 0.5})
    learner = Learner(policy, Reference.of(policy), build_optimizer(policy, settings.optim), settings)
    credits = [sibling_credit(t) for t in TREES]
    assert learner.update(TREES, credits).metrics["main/kl"] == pytest.approx(0.0, abs=1e-9)
    assert learner.update(TREES, credits).metrics["main/kl"] > 1e-6


def test_importance_weights_apply_only_where_the_sampler_may_differ(policy: Policy, config: Any) -> None:
    # the trees say log-prob -1 for every token, which is not what the policy says
    exact = gradient(policy, config())
    assert distance(gradient(policy, config(loss={"beta": 0.0, "importance": "off"}), exact_sampler=False), exact) == 0.0
    weighted = gradient(policy, config(), exact_sampler=False)
    assert distance(weighted, exact) > 0.05
    assert distance(gradient(policy, config(loss={"beta": 0.0, "importance": "on"})), weighted) == 0.0


def test_bf16_is_close_and_keeps_float32_weights(policy: Policy, config: Any) -> None:
    exact = gradient(policy, config())
    policy.dtype = torch.bfloat16
    rough = gradient(policy, config(learner={"dtype": "bfloat16"}))
    assert 1e-6 < distance(rough, exact) < 0.2
    assert all(g.dtype == torch.float32 for g in rough.values())


def test_a_loss_that_is_not_finite_stops_before_the_weights_move(policy: Policy, config: Any) -> None:
    settings = config()
    learner = Learner(policy, None, build_optimizer(policy, settings.optim), settings)
    with torch.no_grad():
        policy.causal.model.norm.weight[0] = torch.nan
    before = {n: p.clone() for n, p in policy.trainable().items()}
    with pytest.raises(DivergenceError, match=r"loss of step 1 \(optimizer step 0\) is nan.* to prompt 'p'.*--resume"):
        learner.update(TREES, [sibling_credit(t) for t in TREES])
    assert all(torch.equal(p, before[n]) or p.isnan().any() for n, p in policy.trainable().items())
    assert learner.optimizer_steps == 0


def test_no_signal_no_step(policy: Policy, config: Any) -> None:
    before = {n: p.clone() for n, p in policy.trainable().items()}
    settings = config()
    learner = Learner(policy, None, build_optimizer(policy, settings.optim), settings)
    update = learner.update(TREES[2:], [sibling_credit(t) for t in TREES[2:]])
    assert update.optimizer_steps == 0 and update.ledger.learner_tokens == 0
    assert all(torch.equal(p, before[n]) for n, p in policy.trainable().items())


def test_chunked_logprobs_in_float64() -> None:
    """Values, gradients, entropy and bias against log_softmax, with a chunk that does not divide the rows."""
    torch.manual_seed(0)
    hidden = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(11, 5, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(11, dtype=torch.float64, requires_grad=True)
    target, upstream = torch.randint(0, 11, (7,)), torch.randn(7, dtype=torch.float64)
    full = torch.log_softmax((hidden @ weight.t() + bias) / 0.7, -1)
    expected = full[torch.arange(7), target]
    slow = torch.autograd.grad((expected * upstream).sum(), [hidden, weight, bias])
    got, entropy = chunked_logprobs(hidden, weight, bias, target, temperature=0.7, chunk=3, with_entropy=True)
    quick = torch.autograd.grad((got * upstream).sum(), [hidden, weight, bias])
    assert torch.allclose(got, expected, atol=1e-12)
    assert torch.allclose(entropy, -(full.exp() * full).sum(-1), atol=1e-12)
    for a, b in zip(quick, slow, strict=True):
        assert torch.allclose(a, b, atol=1e-12)


def test_learning_rate_by_hand(config: Any) -> None:
    optim = config(optim={"lr": 1.0, "warmup_steps": 2, "schedule": "linear"}).optim
    assert [learning_rate(optim, s, 6) for s in range(7)] == pytest.approx([0.5, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0])
    cosine = config(optim={"lr": 1.0, "schedule": "cosine"}).optim
    assert [learning_rate(cosine, s, 4) for s in (0, 2, 4)] == pytest.approx([1.0, 0.5, 0.0])
    assert learning_rate(config(optim={"lr": 1.0}).optim, 99, 4) == 1.0
