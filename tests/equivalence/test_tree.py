"""Tree packs against one path at a time: log-probs, gradients, and a control that must fail."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypotheses import examples
from hypothesis import given
from hypothesis import strategies as st
from transformers import Qwen2Config, Qwen2ForCausalLM
from transformers.models.qwen2 import modeling_qwen2

from deepgrpo.feedback import Score
from deepgrpo.model import tree_attention
from deepgrpo.model.tree_attention import TreePlan
from deepgrpo.model.tree_gate import judge_model
from deepgrpo.pack.layout import Layout, lay_out
from deepgrpo.pack.tree import pack_trees
from deepgrpo.records import ROOT, Credit, CreditSpan, Node, Pivot, Prompt, Tree

VOCABULARY = 60


def model_of(dtype: torch.dtype) -> Any:
    tree_attention.register()
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4.0)  # sharper attention: a wrong neighbour shows
    model.set_attn_implementation(tree_attention.NAME)
    return model


@pytest.fixture(autouse=True)
def _exact_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' RMSNorm computes in float32 whatever comes in, which limits float64 gradients to 1e-7."""

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)

    monkeypatch.setattr(modeling_qwen2.Qwen2RMSNorm, "forward", forward)


@st.composite
def trees(draw: Any) -> list[Tree]:
    """One to three trees: main rollouts, branches anywhere (ends included), branches of branches."""
    count = draw(st.integers(1, 3))
    seed = draw(st.integers(0, 2**31))
    random = np.random.default_rng(seed)

    def node(parent: int, offset: int, length: int, pivot: int) -> Node:
        tokens = tuple(int(t) for t in random.integers(0, VOCABULARY, length))
        stream = "main" if parent == ROOT else "branch"
        return Node(parent, offset, tokens, (-1.0,) * length, "stop", "", Score(0.0), stream, pivot)  # type: ignore[arg-type]

    made = []
    for number in range(count):
        tokens = tuple(int(t) for t in random.integers(0, VOCABULARY, draw(st.integers(1, 6))))
        tree = Tree(Prompt(str(number), "", tokens, ""))
        lengths = draw(st.lists(st.integers(1, 9), min_size=1, max_size=4))
        tree = tree.add([Pivot(ROOT, 0, len(lengths), "main")], [node(ROOT, 0, n, 0) for n in lengths])
        for _ in range(draw(st.integers(0, 4))):
            parent = draw(st.integers(0, len(tree.nodes) - 1))
            offset = draw(st.integers(0, len(tree.nodes[parent].tokens)))
            kids = draw(st.lists(st.integers(1, 6), min_size=1, max_size=3))
            pivot = len(tree.pivots)
            tree = tree.add([Pivot(parent, offset, len(kids))], [node(parent, offset, n, pivot) for n in kids])
        made.append(tree)
    return made


def layout_of(grown: list[Tree]) -> Layout:
    random = np.random.default_rng(len(grown))
    credits = [
        Credit(tuple(CreditSpan(i, 0, len(n.tokens), float(random.normal()), n.stream) for i, n in enumerate(t.nodes)), ())
        for t in grown
    ]
    return lay_out(grown, credits)


def by_paths(model: Any, layout: Layout) -> torch.Tensor:
    logprobs = torch.zeros(len(layout.terms), dtype=model.dtype)
    for row in layout.rows:
        logits = model(torch.from_numpy(row.input_ids)[None], use_cache=False).logits[0, torch.from_numpy(row.positions)]
        target = torch.from_numpy(layout.terms.target_N[row.terms])
        logprobs = logprobs.index_put(
            (torch.from_numpy(row.terms),), torch.log_softmax(logits, -1).gather(1, target[:, None])[:, 0]
        )
    return logprobs


def by_packs(model: Any, grown: list[Tree], layout: Layout, budget: int, kernel: str, spoil: int = 0) -> torch.Tensor:
    logprobs = torch.zeros(len(layout.terms), dtype=model.dtype)
    for pack in pack_trees(grown, layout, budget):
        segments = [(s.start, s.end, s.until, s.parent) for s in pack.segments]
        if spoil:  # the negative control: the first segment with descendants loses sight of the last of them
            which = next(i for i, s in enumerate(segments) if s[2] - s[1] > spoil)
            segments[which] = (*segments[which][:2], segments[which][2] - spoil, segments[which][3])
        plan = TreePlan(tuple(segments), kernel)  # type: ignore[arg-type]
        with tree_attention.without_mask():
            logits = model(
                torch.from_numpy(pack.input_ids_BT), position_ids=torch.from_numpy(pack.positions_BT), use_cache=False,
                tree_plan=plan,
            ).logits.flatten(0, 1)[torch.from_numpy(pack.rows_n)]  # fmt: skip
        target = torch.from_numpy(layout.terms.target_N[pack.terms_n])
        logprobs = logprobs.index_put(
            (torch.from_numpy(pack.terms_n),), torch.log_softmax(logits, -1).gather(1, target[:, None])[:, 0]
        )
    return logprobs


def gradients(model: Any, logprobs: torch.Tensor, layout: Layout) -> dict[str, torch.Tensor]:
    loss = -(torch.from_numpy(layout.terms.advantage_N).to(model.dtype) * logprobs).sum() / len(layout.terms)
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def apart(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Largest L2 distance of a parameter's gradient, relative to the largest gradient of any parameter."""
    scale = max(float(g.norm()) for g in b.values())
    return max(float((a[n] - b[n]).norm()) for n in b) / scale


MODELS = {dtype: model_of(dtype) for dtype in (torch.float64, torch.float32)}
CHECKS = examples(25)


@CHECKS
@given(grown=trees(), budget=st.sampled_from([1, 20, 1000]))
def test_float64_equals_one_by_one(grown: list[Tree], budget: int) -> None:
    model, layout = MODELS[torch.float64], layout_of(grown)
    slow = by_paths(model, layout)
    expected = gradients(model, slow, layout)
    for kernel in ("cascade", "gather", "dense"):
        quick = by_packs(model, grown, layout, budget, kernel)
        assert float((quick - slow).abs().max()) < 1e-10, kernel
        assert apart(gradients(model, quick, layout), expected) < 1e-12, kernel


@CHECKS
@given(grown=trees())
def test_float32_equals_one_by_one(grown: list[Tree]) -> None:
    model, layout = MODELS[torch.float32], layout_of(grown)
    slow = by_paths(model, layout)
    quick = by_packs(model, grown, layout, 1000, "cascade")
    assert float((quick - slow).abs().max()) < 1e-4
    assert apart(gradients(model, quick, layout), gradients(model, slow, layout)) < 1e-5


def test_a_wrong_boundary_is_noticed() -> None:
    """The control that must fail: cut the sight of the first segment by two tokens of its last descendant.

    By one token it would pass unseen: nothing is predicted from the last token of a leaf.
    """
    node = [Node(ROOT, 0, (5, 6, 7, 8), (-1.0,) * 4, "stop", "", Score(0.0), "main", 0)]
    tree = Tree(Prompt("0", "", (1, 2, 3), "")).add([Pivot(ROOT, 0, 1, "main")], node)
    layout = layout_of([tree])
    model = MODELS[torch.float64]
    right = by_packs(model, [tree], layout, 1000, "cascade")
    assert float((right - by_paths(model, layout)).detach().abs().max()) < 1e-10
    wrong = by_packs(model, [tree], layout, 1000, "dense", spoil=2)
    assert float((wrong - right).detach().abs().max()) > 1e-2


def test_a_forgotten_mask_loses_the_prefix() -> None:
    """What without_mask guards against: transformers takes a jump of positions for another document."""
    model = MODELS[torch.float64]
    ids = torch.tensor([[1, 2, 3, 4, 5, 6]])
    positions = torch.tensor([[0, 1, 2, 3, 2, 3]])
    alone = model(torch.tensor([[1, 2, 5, 6]]), use_cache=False).logits[0, -1]
    silent = model(ids, position_ids=positions, use_cache=False).logits[0, -1]
    assert float((silent - alone).detach().abs().max()) > 1e-2
    with tree_attention.without_mask():
        plan = TreePlan(((0, 2, 6, -1), (2, 4, 4, 0), (4, 6, 6, 0)))
        packed = model(ids, position_ids=positions, use_cache=False, tree_plan=plan).logits[0, -1]
    assert float((packed - alone).detach().abs().max()) < 1e-10


def test_the_picture_of_the_docstring() -> None:
    def node(parent: int, offset: int, length: int, pivot: int) -> Node:
        return Node(parent, offset, tuple(range(length)), (-1.0,) * length, "stop", "", Score(0.0), "main", pivot)

    tree = Tree(Prompt("0", "", (7, 8, 9), "")).add([Pivot(ROOT, 0, 2, "main")], [node(ROOT, 0, 6, 0), node(ROOT, 0, 5, 0)])
    tree = tree.add([Pivot(0, 4, 2)], [node(0, 4, 2, 1), node(0, 4, 3, 1)])
    (pack,) = pack_trees([tree], layout_of([tree]), 1000)
    assert pack.positions_BT is not None
    assert pack.positions_BT[0].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 7, 8, 7, 8, 9, 3, 4, 5, 6, 7]
    assert [(s.start, s.end, s.until, s.parent, s.depth) for s in pack.segments] == [
        (0, 3, 19, -1, 0), (3, 7, 14, 0, 3), (7, 9, 9, 1, 7), (9, 11, 11, 1, 7), (11, 14, 14, 1, 7), (14, 19, 19, 0, 3),
    ]  # fmt: skip
    assert pack.num_tokens == 19


@CHECKS
@given(grown=trees(), budget=st.integers(1, 60))
def test_every_term_is_in_one_pack_and_packs_keep_the_budget(grown: list[Tree], budget: int) -> None:
    layout = layout_of(grown)
    packs = pack_trees(grown, layout, budget)
    assert sorted(np.concatenate([p.terms_n for p in packs]).tolist()) == list(range(len(layout.terms)))
    longest = max(len(row.input_ids) for row in layout.rows)
    assert all(p.num_tokens <= max(budget, longest) for p in packs)
    if budget == 60 and len(packs) == 1:
        assert packs[0].num_tokens == layout.unique_tokens


# ---------------------------------------------------------------- the gate


def tiny(kind: str, **changes: Any) -> Any:
    import transformers

    torch.manual_seed(1)
    shape = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 128, **changes,
    }  # fmt: skip
    config = getattr(transformers, f"{kind}Config")(**shape)
    return getattr(transformers, f"{kind}ForCausalLM")(config)


@pytest.mark.parametrize("kernel", ["cascade", "gather"])
@pytest.mark.parametrize("kind", ["Llama", "Qwen2", "Qwen3", "SmolLM3"])
def test_common_families_prove_themselves(kind: str, kernel: str) -> None:
    extra = {"pad_token_id": 0} if kind == "SmolLM3" else {}
    verdict = judge_model(tiny(kind, **extra), kernel=kernel)  # type: ignore[arg-type]
    assert verdict.packs, verdict.reason
    assert verdict.window is None


def test_a_window_is_read_from_the_model_and_limits_the_path() -> None:
    verdict = judge_model(tiny("Mistral", sliding_window=20))
    assert verdict.packs and verdict.window == 20


def test_a_window_shorter_than_the_probe_fails_it() -> None:
    verdict = judge_model(tiny("Mistral", sliding_window=4))
    assert not verdict.packs and "differ from those of single paths" in verdict.reason


@pytest.mark.parametrize(
    ("kind", "changes", "reason"),
    [
        ("Gemma2", {"head_dim": 8}, 'runs as "eager"'),
        ("Llama", {"attn_implementation": "eager"}, 'runs as "eager"'),
        ("Llama", {"attention_dropout": 0.1}, "drops attention"),
        ("Llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "scaled by the length"),
        ("Bloom", {"n_layer": 2, "n_head": 4}, "does not take attention functions"),
    ],
)
def test_what_cannot_be_packed_is_refused_with_a_reason(kind: str, changes: dict[str, Any], reason: str) -> None:
    model = tiny(kind, **changes)
    before = model.config._attn_implementation
    verdict = judge_model(model)
    assert not verdict.packs and reason in verdict.reason
    assert model.config._attn_implementation == before


def spoilt_backward(which: str) -> Any:
    """Right forward; backward one of query, key and value gets nothing, or the first of them NaN."""

    def attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, plan: TreePlan, scale: float) -> Any:
        inputs = {"query": query, "key": key, "value": value}
        if which in inputs:
            inputs[which] = inputs[which].detach()
        elif which == "nan" and query.requires_grad:
            inputs["query"] = query * 1.0
            inputs["query"].register_hook(lambda grad: grad * torch.nan)
        return tree_attention.gather_attention(**inputs, plan=plan, scale=scale)

    return attention


@pytest.mark.parametrize("which", ["nothing", "query", "key", "value", "nan"])
def test_a_back_end_that_is_wrong_backward_only_is_refused(which: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tree_attention.KERNELS, "gather", spoilt_backward(which))
    verdict = judge_model(tiny("Qwen2"), kernel="gather")
    if which == "nothing":
        assert verdict.packs and "gradients within" in verdict.reason
    else:
        assert not verdict.packs and "packed gradients differ from those of single paths" in verdict.reason


def test_a_back_end_without_a_backward_is_passed_over_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flex attention on the CPU is such a one; on CUDA it comes first and gather second."""
    assert tree_attention.kernels(torch.device("cuda")) == ("flex", "gather")
    monkeypatch.setattr(tree_attention, "kernels", lambda device: ("flex", "gather"))
    verdict = judge_model(tiny("Llama", max_position_embeddings=512))
    assert verdict.packs and verdict.kernel == "gather"
    assert "packed log-probs agree" in verdict.reason
    assert "flex is not used: the probe raised NotImplementedError: FlexAttention does not support backward" in verdict.reason


def test_a_model_that_no_back_end_serves_is_told_why_by_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tree_attention, "kernels", lambda device: ("flex", "gather"))
    monkeypatch.setitem(tree_attention.KERNELS, "gather", spoilt_backward("value"))
    model = tiny("Llama", max_position_embeddings=512)
    verdict = judge_model(model)
    assert not verdict.packs
    assert verdict.reason.startswith("flex: the probe raised") and "; gather: packed gradients differ" in verdict.reason
    assert model.config._attn_implementation == "sdpa"


def test_heads_of_two_sizes_are_packed_by_gather() -> None:
    """DeepSeek's heads: 24 wide in queries and keys, 16 in values; the CPU's flash kernels take one width only."""
    model = tiny(
        "DeepseekV3", num_key_value_heads=4, head_dim=8, q_lora_rank=32, kv_lora_rank=16, qk_nope_head_dim=16,
        qk_rope_head_dim=8, v_head_dim=16, n_group=1, topk_group=1, n_routed_experts=4, num_experts_per_tok=2,
        moe_intermediate_size=32,
    )  # fmt: skip
    verdict = judge_model(model)
    assert verdict.packs and verdict.kernel == "gather"
    assert "cascade is not used" in verdict.reason


@pytest.mark.parametrize("frozen", [False, True])
def test_the_gate_leaves_no_gradient_and_nothing_thawed(frozen: bool) -> None:
    model = tiny("Qwen2").requires_grad_(not frozen)
    verdict = judge_model(model, torch.bfloat16)
    assert verdict.packs and verdict.reason.endswith("in bfloat16")
    assert all(p.grad is None and p.requires_grad != frozen for p in model.parameters())


@pytest.mark.parametrize("factor", [1.0, 3.0])
def test_a_kernel_that_is_wrong_in_bfloat16_only_is_refused(factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    def attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, plan: TreePlan, scale: float) -> Any:
        right = tree_attention.gather_attention(query, key, value, plan, scale)
        return right * factor if query.dtype == torch.bfloat16 else right

    monkeypatch.setitem(tree_attention.KERNELS, "gather", attention)
    assert judge_model(tiny("Qwen2"), kernel="gather").packs
    verdict = judge_model(tiny("Qwen2"), torch.bfloat16, kernel="gather")
    assert verdict.packs == (factor == 1.0) and verdict.reason.endswith("in bfloat16")
    assert verdict.reason.startswith("packed log-probs agree" if factor == 1.0 else "packed log-probs differ")
