"""Flex attention over packs of trees: its lists of blocks, its forward pass, and (on CUDA only) its gradients."""

from __future__ import annotations

import itertools
import shutil
from typing import Any

import pytest
import torch
import torch._inductor.config
from hypotheses import examples
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_block_mask
from torch.nn.attention.flex_attention import flex_attention as torch_flex_attention

from deepgrpo.model import flex_attention as flex
from deepgrpo.model import tree_attention
from deepgrpo.model.tree_attention import TreePlan, dense_attention, flex_attention, visibility
from deepgrpo.model.tree_gate import judge_model

CPU = torch.device("cpu")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
CHECKS = examples(60)

Segments = tuple[tuple[int, int, int, int], ...]


@st.composite
def packs(draw: Any) -> Segments:
    """Segments of some trees in depth-first order: (start, end, until, parent)."""
    lengths = draw(st.lists(st.integers(1, 40), min_size=1, max_size=12))
    depths = [0]
    for _ in lengths[1:]:
        depths.append(draw(st.integers(0, depths[-1] + 1)))
    ends = list(itertools.accumulate(lengths))
    segments = []
    for i, (length, depth, end) in enumerate(zip(lengths, depths, ends, strict=True)):
        behind = [j for j in range(i + 1, len(lengths)) if depths[j] <= depth]
        above = [j for j in range(i) if depths[j] == depth - 1]
        segments.append((end - length, end, ends[behind[0] - 1] if behind else ends[-1], above[-1] if above else -1))
    return tuple(segments)


# the picture of pack/tree.py, 40 times as long: 760 tokens are 6 blocks, and the last is not filled
PICTURE: Segments = tuple(
    (40 * a, 40 * b, 40 * c, p)
    for a, b, c, p in ((0, 3, 19, -1), (3, 7, 14, 0), (7, 9, 9, 1), (9, 11, 11, 1), (11, 14, 14, 1), (14, 19, 19, 0))
)


def inputs(length: int, device: torch.device = CPU, dim: int = 8) -> list[torch.Tensor]:
    """Query of 4 heads, key and value of 2; sharp, so that a wrong neighbour shows."""
    generator = torch.Generator().manual_seed(length)
    return [3.0 * torch.randn(1, heads, length, dim, generator=generator).to(device) for heads in (4, 2, 2)]


def listed(count: torch.Tensor, indices: torch.Tensor) -> list[list[int]]:
    return [sorted(row[:n].tolist()) for n, row in zip(count[0, 0].tolist(), indices[0, 0], strict=True)]


@CHECKS
@given(segments=packs(), block=st.sampled_from([4, 16, 128]))
def test_the_lists_of_blocks_are_those_that_torch_finds_by_asking_for_every_pair(segments: Segments, block: int) -> None:
    length = segments[-1][1]
    seen = visibility(TreePlan(segments), length)
    ours = flex.block_mask(segments, length, CPU, block)
    theirs = create_block_mask(
        lambda b, h, q, k: seen[q.clamp(max=length - 1), k.clamp(max=length - 1)], None, None, length, length,
        device="cpu", BLOCK_SIZE=block,
    )  # fmt: skip
    for kind in ("kv", "full_kv", "q", "full_q"):
        got, expected = (
            listed(getattr(mask, f"{kind}_num_blocks"), getattr(mask, f"{kind}_indices")) for mask in (ours, theirs)
        )
        assert got == expected, kind
    assert ours.shape[-2:] == (length, length)


def test_the_lists_of_the_picture() -> None:
    """Untils 760 (prompt, to 120), 560 (A, to 280), 360, 440, 560 (leaves), 760 (B, from 560), in blocks of 128.

    Block 0 holds prompt and A: nearest until 560, so queries up to block 3 (to 512) see all of it, block 4 and 5 parts.
    Block 1 is A alone: 560 again. Block 2 holds A, A' and C: nearest 360, farthest 560. B begins inside block 4.
    """
    mask = flex.block_mask(PICTURE, 760, CPU)
    assert listed(mask.full_kv_num_blocks, mask.full_kv_indices) == [[], [0], [0, 1], [0, 1], [], []]
    assert listed(mask.kv_num_blocks, mask.kv_indices) == [[0], [1], [2], [2, 3], [0, 1, 2, 3, 4], [0, 4, 5]]


@CHECKS
@given(segments=packs(), grouped=st.booleans())
def test_forward_equals_the_oracle(segments: Segments, grouped: bool) -> None:
    query, key, value = inputs(segments[-1][1])
    if not grouped:
        key, value = query.flip(2), query.flip(3)
    plan = TreePlan(segments, "flex")
    got, expected = (f(query, key, value, plan, 0.3) for f in (flex_attention, dense_attention))
    assert float((got - expected).abs().max()) < 1e-5


def test_a_wrong_boundary_is_noticed() -> None:
    """The control that must fail: the first segment loses sight of the last token of the pack."""
    query, key, value = inputs(760)
    right = dense_attention(query, key, value, TreePlan(PICTURE), 0.3)
    start, end, until, parent = PICTURE[0]
    spoilt = TreePlan(((start, end, until - 1, parent), *PICTURE[1:]))
    wrong = flex_attention(query, key, value, spoilt, 0.3)
    assert float((wrong - right)[:, :, :-1].abs().max()) < 1e-5
    assert float((wrong - right)[:, :, -1].abs().max()) > 1e-2


def test_a_pack_makes_its_lists_once_for_all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    made = []
    original = flex.block_mask
    monkeypatch.setattr(flex, "block_mask", lambda *args: made.append(args) or original(*args))
    tree_attention.register()
    config = LlamaConfig(
        vocab_size=20, hidden_size=32, intermediate_size=32, num_hidden_layers=3, num_attention_heads=4,
        attn_implementation=tree_attention.NAME,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    for _ in range(2):
        with torch.no_grad(), tree_attention.without_mask():
            plan = TreePlan(((0, 2, 6, -1), (2, 4, 4, 0), (4, 6, 6, 0)), "flex")
            model(torch.arange(6)[None], position_ids=torch.tensor([[0, 1, 2, 3, 2, 3]]), tree_plan=plan)
    assert len(made) == 2


@torch._dynamo.config.patch(recompile_limit=3)
def test_other_lengths_are_not_compiled_again() -> None:
    """Every pack has another length. Compiled once for packs of a single block (a size of 1 is a case of its own to torch)
    and once for all others; then for other numbers of heads, more often than torch's own limit, here three.
    """
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = flex.compiled_attention(counter)
    for length in (352, 384, 1000, 257, 90, 128, 17, 640):
        mask = flex.block_mask(((0, 9, length, -1), (9, 15, 15, 0), (15, length, length, 0)), length, CPU)
        compiled(*inputs(length), block_mask=mask, scale=0.3, enable_gqa=True)
    assert counter.frame_count == 2
    for heads in range(5, 8):
        query = torch.zeros(1, heads, 300, 8)
        compiled(query, query, query, block_mask=flex.block_mask(((0, 300, 300, -1),), 300, CPU))
    assert counter.frame_count == 5
    assert torch._dynamo.config.recompile_limit == 3
    torch._dynamo.reset()


# most of what a first compilation takes: g++ is tried with each set of instructions, and processes are started for it
@torch._inductor.config.patch({"cpp.vec_isa_ok": True, "compile_threads": 1, "cpp_cache_precompile_headers": False})
@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch compiles with g++")
def test_a_compiled_kernel_takes_the_lists() -> None:
    """The eager function asks for every pair and never reads the lists; torch's compiled kernel of the CPU does."""
    torch._dynamo.reset()
    compiled = torch.compile(torch_flex_attention, dynamic=False)  # with dynamic sizes its C++ of torch 2.13 has a mistake
    query, key, value = inputs(760)
    right = dense_attention(query, key, value, TreePlan(PICTURE), 0.3)

    def distance(mask: Any) -> float:
        with torch.no_grad():
            return float((compiled(query, key, value, block_mask=mask, scale=0.3, enable_gqa=True) - right).abs().max())

    mask = flex.block_mask(PICTURE, 760, CPU)
    assert distance(mask) < 1e-4
    mask.full_kv_num_blocks[0, 0, 2] = 1  # the control: block 2 no longer sees block 1
    assert distance(mask) > 1e-2
    torch._dynamo.reset()


# ---------------------------------------------------------------- with a GPU


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("dim", [64, 80, 128])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-3), (torch.bfloat16, 5e-2)])
@pytest.mark.parametrize("segments", [PICTURE, ((0, 20, 50, -1), (20, 30, 30, 0), (30, 50, 50, 0))], ids=["long", "short"])
def test_gradients_equal_the_oracles(dim: int, dtype: torch.dtype, limit: float, segments: Segments) -> None:
    device = torch.device("cuda")
    leaves = [x.to(dtype).requires_grad_(True) for x in inputs(segments[-1][1], device, dim)]
    weight = inputs(segments[-1][1], device, dim)[0].flip(2)
    found = []
    for function in (flex_attention, dense_attention):
        out = function(*leaves, TreePlan(segments, "flex"), dim**-0.5)
        found.append((out, *torch.autograd.grad((out.float() * weight).sum(), leaves)))
    for got, expected in zip(*found, strict=True):
        assert float((got - expected).float().norm() / expected.float().norm()) < limit


@pytest.mark.gpu
@needs_cuda
def test_the_gate_chooses_flex() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=60, hidden_size=256, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512,
    )  # fmt: skip
    for dtype in (torch.float32, torch.bfloat16):
        verdict = judge_model(LlamaForCausalLM(config).cuda(), dtype)
        assert verdict.packs and verdict.kernel == "flex", verdict.reason
