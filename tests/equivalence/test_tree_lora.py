"""Adapters on tree packs: the log-probs and the gradients of a row per path, and a base that nothing reaches."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers.models.qwen2 import modeling_qwen2
from trees import make_tree

from deepgrpo.config import Config, PretrainedModel
from deepgrpo.credit.siblings import sibling_credit
from deepgrpo.model.loading import load_policy
from deepgrpo.model.policy import Policy
from deepgrpo.model.tree_gate import PackingVerdict, judge_model
from deepgrpo.pack.budget import Pack, pack_rows
from deepgrpo.pack.layout import lay_out
from deepgrpo.pack.tree import pack_trees
from deepgrpo.train.learner import Learner
from deepgrpo.train.optim import build_optimizer
from tiny import save_model

pytestmark = pytest.mark.skipif(find_spec("peft") is None, reason="peft is not installed")

TREES = [
    make_tree([(6, 0.0), (5, 1.0), (7, 0.0)], [(0, 4, [(2, 1.0), (3, 0.0)]), (2, 0, [(4, 0.0), (5, 1.0), (2, 0.0)])]),
    make_tree([(3, 1.0), (8, 0.0), (2, 0.0)], [(1, 6, [(1, 1.0), (9, 0.0)]), (4, 3, [(2, 0.0), (4, 1.0)])], 5),
]
CREDITS = [sibling_credit(tree) for tree in TREES]
PER_PATH = PackingVerdict(False, "to compare with")


@pytest.fixture
def adapted(tmp_path: Path) -> Any:
    """Makes a policy with adapters that do something: peft starts B at zero, and then A has no gradient."""

    def make(modules: str | Sequence[str] = "all-linear") -> Policy:
        path = save_model(tmp_path / "base", "qwen2")
        torch.manual_seed(1)
        policy = load_policy(
            PretrainedModel.model_validate({"path": path, "lora": {"rank": 4, "target_modules": modules}})
        )
        with torch.no_grad():
            for name, parameter in policy.model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(0.0, 0.1)
                elif "lora" not in name and parameter.ndim == 2:
                    parameter.mul_(4.0)  # sharper attention: a wrong neighbour shows
        return policy

    return make


def logprobs(policy: Policy, packs: Sequence[Pack]) -> Tensor:
    """Of every term, in the order of the layout; differentiable."""
    layout = lay_out(TREES, CREDITS)
    parts, order = [], []
    for pack in packs:
        got, _ = policy.logprobs(
            torch.from_numpy(pack.input_ids_BT), torch.from_numpy(pack.rows_n),
            torch.from_numpy(layout.terms.target_N[pack.terms_n]), temperature=0.9,
            positions_BT=None if pack.positions_BT is None else torch.from_numpy(pack.positions_BT),
            segments=[(s.start, s.end, s.until, s.parent) for s in pack.segments],
        )  # fmt: skip
        parts.append(got)
        order.append(pack.terms_n)
    return torch.cat(parts)[torch.from_numpy(np.argsort(np.concatenate(order)))]


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Largest L2 distance of a parameter's gradient, relative to the largest gradient of any parameter."""
    assert a.keys() == b.keys() and a
    scale = max(float(g.norm()) for g in b.values())
    return max(float((a[n] - b[n]).norm()) for n in a) / scale


def learn(policy: Policy, config: Config) -> dict[str, Tensor]:
    """The gradients that an optimizer step of the learner finds, of whatever parameter has one; the weights stay."""
    caught: dict[str, Tensor] = {}
    optimizer = build_optimizer(policy, config.optim)
    optimizer.step = lambda closure=None: caught.update(  # type: ignore[method-assign, assignment]
        {n: p.grad.clone() for n, p in policy.model.named_parameters() if p.grad is not None}
    )
    Learner(policy, None, optimizer, config).update(TREES, CREDITS)
    policy.model.zero_grad()
    return caught


@pytest.mark.parametrize("budget", [25, 1000])
def test_float64_equals_one_by_one(adapted: Any, budget: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def norm(self: Any, x: Tensor) -> Tensor:  # transformers' own computes in float32 whatever comes in
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)

    monkeypatch.setattr(modeling_qwen2.Qwen2RMSNorm, "forward", norm)
    policy = adapted()
    assert policy.try_tree_packing().kernel == "cascade"
    policy.model.double()
    policy.dtype = torch.float64
    layout = lay_out(TREES, CREDITS)
    packs = pack_trees(TREES, layout, budget)
    assert len(packs) > 2 if budget == 25 else len(packs) == 1
    weight = torch.from_numpy(layout.terms.advantage_N).double()
    names = list(policy.trainable())
    found = []
    for each in (packs, pack_rows(layout.rows, budget)):
        got = logprobs(policy, each)
        gradients = torch.autograd.grad((weight * got).sum(), list(policy.trainable().values()))
        found.append((got, dict(zip(names, gradients, strict=True))))
    (quick, quick_gradients), (slow, slow_gradients) = found
    assert float((quick - slow).detach().abs().max()) < 1e-12
    assert all("lora_" in name for name in names)
    assert min(float(g.norm()) for g in slow_gradients.values()) > 0.0
    assert distance(quick_gradients, slow_gradients) < 1e-12


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("modules", ["all-linear", ("q_proj", "v_proj"), ("down_proj",)])
def test_the_learner_finds_the_gradients_of_a_row_per_path(
    adapted: Any, recipe: Any, modules: Any, checkpointing: bool
) -> None:
    """In several packs and in one, with activations kept or computed again; the base gets none."""
    policy = adapted(modules)
    if checkpointing:
        policy.checkpoint_activations()
    sections = {"optim": {"lr": 1e-3, "max_grad_norm": "none"}, "loss": {"beta": 0.0, "lambda": 0.7}}
    slow = learn(policy, recipe(**sections))
    verdict = policy.try_tree_packing()
    assert verdict.packs and verdict.kernel == "cascade", verdict.reason
    for budget in (25, 1000):
        config = recipe(**sections, learner={"tokens_per_pack": budget})
        quick = learn(policy, config)
        assert quick.keys() == slow.keys() == policy.trainable().keys()
        assert all("lora_" in name for name in quick)
        assert distance(quick, slow) < 1e-5
    # the control: branches that count twice as much do change it
    assert distance(learn(policy, recipe(**{**sections, "loss": {"beta": 0.0, "lambda": 1.4}})), slow) > 1e-2


def test_recomputation_goes_through_tree_attention_again(adapted: Any) -> None:
    """With checkpointing every layer attends twice for a pack; else the recomputed layers would lose the plan."""
    from deepgrpo.model import tree_attention

    policy = adapted()
    assert policy.try_tree_packing().packs
    (pack,) = pack_trees(TREES, lay_out(TREES, CREDITS), 1000)
    policy.model.train()
    calls = []
    original = tree_attention.cascade_attention
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(tree_attention.KERNELS, "cascade", lambda *args: calls.append(1) or original(*args))
        for expected in (2, 4):
            logprobs(policy, [pack]).sum().backward()
            assert len(calls) == expected
            calls.clear()
            policy.checkpoint_activations()


@pytest.mark.parametrize("modules", ["all-linear", ("down_proj",)])
def test_the_gate_leaves_no_trace(adapted: Any, modules: Any) -> None:
    """A verdict on a model whose base is frozen, also where no attention layer has an adapter."""
    policy = adapted(modules)
    before = {name: (p.requires_grad, p.detach().clone()) for name, p in policy.model.named_parameters()}
    for dtype in (torch.float32, torch.bfloat16):
        verdict = judge_model(policy.causal, dtype)
        assert verdict.packs and "gradients within" in verdict.reason
    for name, parameter in policy.model.named_parameters():
        assert parameter.grad is None
        assert parameter.requires_grad == before[name][0] == ("lora_" in name)
        assert torch.equal(parameter, before[name][1])


def test_the_peft_model_itself_may_be_judged(adapted: Any) -> None:
    policy = adapted()
    verdict = judge_model(policy.model)
    assert verdict.packs, verdict.reason
