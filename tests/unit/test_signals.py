"""Influence of steps, against the formula written out token by token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from deepgrpo.config import PretrainedModel, ScratchModel
from deepgrpo.errors import ModelError
from deepgrpo.explore.base import ATTENTION, Signal
from deepgrpo.model import signals
from deepgrpo.model.loading import load_policy
from deepgrpo.model.policy import Policy
from deepgrpo.model.signals import Steps, attention_influence, forwarded_tokens
from deepgrpo.train.signals import build_signals
from tiny import save_model

PATHS = [
    Steps(tuple(range(2, 17)), (3, 5, 8, 9, 12, 15)),  # 5 steps
    Steps((7, 3, 9, 4, 4, 2, 11, 5), (2, 4, 5, 7, 8)),  # 4 steps
    Steps((5, 6, 7, 8), (1, 3, 4)),  # 2 steps
]


def naive(policy: Policy, path: Steps, lag: int) -> list[float]:
    """max over layers and heads of the sum over later steps of the mean over pairs of tokens."""
    model = policy.causal
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    with torch.no_grad():
        layers = model(input_ids=torch.tensor([path.tokens]), output_attentions=True, use_cache=False).attentions
    model.set_attn_implementation(before)
    steps = [range(a, b) for a, b in zip(path.bounds, path.bounds[1:], strict=False)]
    found = []
    for k, step in enumerate(steps):
        best = 0.0
        for layer in layers:
            for head in layer[0].double():
                total = 0.0
                for later in steps[k + lag :]:
                    total += sum(float(head[i, j]) for i in later for j in step) / (len(later) * len(step))
                best = max(best, total)
        found.append(best)
    return found


@pytest.mark.parametrize("lag", [1, 2, 4])
def test_equals_the_formula_written_out(policy: Policy, lag: int) -> None:
    for path, got in zip(PATHS, attention_influence(policy, PATHS, lag), strict=True):
        assert got == pytest.approx(naive(policy, path, lag), abs=1e-6)
        assert not got[max(0, len(got) - lag) :].any()
    assert attention_influence(policy, PATHS, 1)[0][0] > 0


def test_two_steps_by_hand(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer with given weights, one head; prompt of 1, steps [1, 3) and [3, 4).

    Token 3 looks back with .2 and .4 to tokens 1 and 2: the mean is .3. In the other head it is .1 and .9: .5.
    """
    reduction = signals.InfluenceReduction([Steps((1, 2, 3, 4), (1, 3, 4))], 4, 1, torch.device("cpu"))
    one = torch.tensor([[1, 0, 0, 0], [0.5, 0.5, 0, 0], [0, 0, 1, 0], [0.3, 0.2, 0.4, 0.1]])
    two = one.clone()
    two[3] = torch.tensor([0, 0.1, 0.9, 0])
    reduction.take(torch.stack([one, one])[None])
    assert reduction.influence[0].tolist() == pytest.approx([0.3, 0.0])
    reduction.take(torch.stack([two, one])[None])
    assert reduction.influence[0].tolist() == pytest.approx([0.5, 0.0])


def test_grouped_heads_and_another_family(tmp_path: Path) -> None:
    policy = load_policy(PretrainedModel(path=save_model(tmp_path, "qwen2")))
    for path, got in zip(PATHS, attention_influence(policy, PATHS, 1), strict=True):
        assert got == pytest.approx(naive(policy, path, 1), abs=1e-6)


def test_it_does_not_matter_what_else_is_asked(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    together = attention_influence(policy, PATHS, 1)
    monkeypatch.setattr(signals, "MOST_WEIGHTS", 1)  # every path has a pass of its own
    alone = attention_influence(policy, PATHS[::-1], 1)[::-1]
    for a, b in zip(together, alone, strict=True):
        assert a == pytest.approx(b, abs=1e-6)


def test_batches_keep_to_the_memory() -> None:
    lengths = [2, 3, 10, 10, 30]  # 2^24 weights are 256 tokens squared in 2^16 heads: two paths of 10, no third
    assert [*signals.batch_by_length(range(5), lengths, heads=2**16)] == [[0, 1], [2, 3], [4]]
    assert [*signals.batch_by_length(range(5), lengths, heads=1)] == [[0, 1, 2, 3, 4]]
    assert [*signals.batch_by_length([], [], heads=1)] == []


def test_the_model_is_left_as_it_was(policy: Policy) -> None:
    policy.try_tree_packing()
    policy.model.train()
    before = policy.causal.config._attn_implementation
    assert before == "deepgrpo"
    ids = torch.tensor([PATHS[0].tokens])
    with torch.no_grad():
        logits = policy.causal(input_ids=ids).logits
        attention_influence(policy, PATHS, 1)
        assert torch.equal(policy.causal(input_ids=ids).logits, logits)
    assert policy.causal.config._attn_implementation == before
    assert policy.model.training
    assert not any(module._forward_hooks for module in policy.causal.modules())
    assert all(p.grad is None for p in policy.model.parameters())


def test_it_is_left_as_it_was_after_an_error_too(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(self: Any, weights: Any) -> None:
        raise RuntimeError("out of memory")

    before = policy.causal.config._attn_implementation
    monkeypatch.setattr(signals.InfluenceReduction, "take", fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        attention_influence(policy, PATHS, 1)
    assert policy.causal.config._attn_implementation == before
    assert not any(module._forward_hooks for module in policy.causal.modules())


def test_nobody_keeps_the_weights_of_a_layer(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many layers there are: when one is looked at, the weights of the others are gone."""
    import gc
    import weakref

    alive: list[weakref.ref[torch.Tensor]] = []
    most = 0
    plain = signals.InfluenceReduction.take

    def watch(self: Any, weights: torch.Tensor) -> None:
        nonlocal most
        gc.collect()
        alive.append(weakref.ref(weights))
        most = max(most, sum(ref() is not None for ref in alive))
        plain(self, weights)

    monkeypatch.setattr(signals.InfluenceReduction, "take", watch)
    attention_influence(policy, PATHS[:1], 1)
    assert len(alive) == ScratchModel().num_layers == 2
    assert most == 1


def test_paths_with_too_few_steps_cost_nothing(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    assert forwarded_tokens(PATHS, 1) == 15 + 8 + 4
    assert forwarded_tokens(PATHS, 2) == 15 + 8
    assert forwarded_tokens(PATHS, 4) == 15
    monkeypatch.setattr(policy.causal, "set_attn_implementation", None)
    assert [x.tolist() for x in attention_influence(policy, PATHS, 9)] == [[0.0] * 5, [0.0] * 4, [0.0] * 2]


def test_a_model_without_weights_is_refused_before_the_first_step(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    class Wants:
        signals = frozenset({Signal(ATTENTION, lambda tokens: [len(tokens)], 1)})

    # as if the family could not switch: sdpa gives no weights
    monkeypatch.setattr(policy.causal, "set_attn_implementation", lambda name: None)
    with pytest.raises(ModelError, match=r'of this model \(llama\) cannot be read: .* choose an explore.type'):
        build_signals(policy, Wants(), 4096)  # type: ignore[arg-type]


def test_each_token_has_the_value_of_its_step(policy: Policy, worked_tree: Any) -> None:
    """Steps of two tokens over the whole response: node 2 begins inside the third, node 3 too."""

    class Wants:
        signals = frozenset({Signal(ATTENTION, lambda tokens: [*range(2, len(tokens), 2), len(tokens)], 1)})

    (signal,) = Wants.signals
    measure = build_signals(policy, Wants(), 4096)  # type: ignore[arg-type]
    assert measure is not None
    measured = measure(signal, [(worked_tree, 0), (worked_tree, 3)], [0, 1])
    values, cost = measured.values, measured.forwarded
    paths = [
        Steps(worked_tree.path(0), (3, 5, 7, 9)),
        Steps(worked_tree.path(3), (3, 5, 7, 9, 10)),
    ]
    first, second = attention_influence(policy, paths, 1)
    assert values[0] == pytest.approx(np.repeat(first, 2))
    assert values[1] == pytest.approx([second[2], second[2], second[3]])
    assert cost == 9 + 10


def test_who_wants_nothing_gets_nobody_to_ask(policy: Policy) -> None:
    class Wants:
        signals: frozenset[Signal] = frozenset()

    assert build_signals(policy, Wants(), 4096) is None  # type: ignore[arg-type]
