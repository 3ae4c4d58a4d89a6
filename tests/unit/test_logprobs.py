"""Log-probs in chunks: values and the written-out gradient against autograd, and how much of `[rows, V]` is ever held."""

from __future__ import annotations

import itertools
import weakref
from typing import Any

import pytest
import torch
from hypotheses import examples
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from deepgrpo.model.logprobs import chunked_logprobs

EXACT = {"rtol": 1e-12, "atol": 1e-12}


def naive(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, scale: float, softcap: float | None,
    temperature: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The same by autograd, with all logits at once: log-probs and entropies."""
    logits = torch.nn.functional.linear(hidden, weight, bias) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    log_p = torch.log_softmax(logits / temperature, -1)
    return log_p.gather(1, target[:, None]).squeeze(1), -(log_p.exp() * log_p).sum(-1)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("scale", [1.0, 0.125, 3.7])
@pytest.mark.parametrize("softcap", [None, 1.5, 30.0])
def test_values_and_gradients_are_those_of_autograd(
    with_bias: bool, tied: bool, scale: float, softcap: float | None
) -> None:
    """Seven rows in chunks of three. With a tied head the weight gets gradient from both of its ends."""
    torch.manual_seed(0)
    make: Any = lambda *shape: torch.randn(*shape, dtype=torch.float64)  # noqa: E731
    weight, mix = make(11, 5).requires_grad_(), make(5, 5).requires_grad_()
    bias = make(11).requires_grad_() if with_bias else None
    apart, upstream = make(7, 5).requires_grad_(), make(7)
    ids, target = torch.randint(0, 11, (7,)), torch.randint(0, 11, (7,))
    leaves = [weight, mix, *([bias] if bias is not None else []), *([] if tied else [apart])]
    # nothing kept, one of three chunks kept (a chunk of 3 rows has 264 bytes), all kept
    for temperature, with_entropy, keep in itertools.product((1.0, 0.7), (False, True), (0, 300, 2**20)):
        hidden = (weight[ids] if tied else apart) @ mix
        expected, entropy = naive(hidden, weight, bias, target, scale, softcap, temperature)
        slow = torch.autograd.grad((expected * upstream).sum(), leaves, retain_graph=True)
        got, got_entropy = chunked_logprobs(
            hidden, weight, bias, target,
            scale=scale, softcap=softcap, temperature=temperature, chunk=3, with_entropy=with_entropy,
            keep_bytes=keep,
        )  # fmt: skip
        quick = torch.autograd.grad((got * upstream).sum(), leaves)
        assert torch.allclose(got, expected, **EXACT)
        assert torch.allclose(got_entropy, entropy if with_entropy else torch.zeros_like(entropy), **EXACT)
        for a, b in zip(quick, slow, strict=True):
            assert torch.allclose(a, b, **EXACT)


def test_a_soft_cap_by_hand() -> None:
    """Two tokens, raw logits 2 and 0, scale 1/2, cap 1: capped they are tanh(1) = 0.7616 and 0.

    log p = 0.7616 - ln(e^0.7616 + 1) = -0.3832; d log p / d raw = (1 - p) · (1 - 0.7616²) · 1/2 = 0.0668.
    """
    hidden = torch.tensor([[2.0]], dtype=torch.float64, requires_grad=True)
    weight = torch.tensor([[1.0], [0.0]], dtype=torch.float64)
    logprob, _ = chunked_logprobs(hidden, weight, None, torch.tensor([0]), scale=0.5, softcap=1.0)
    logprob.sum().backward()
    assert hidden.grad is not None
    assert logprob.item() == pytest.approx(-0.3832, abs=5e-5)
    assert hidden.grad.item() == pytest.approx(0.0668, abs=5e-5)


@examples(40)
@given(
    rows=st.integers(1, 6), chunk=st.integers(1, 8), scale=st.floats(0.01, 100), softcap=st.floats(0.1, 100) | st.none(),
    temperature=st.floats(0.1, 5), seed=st.integers(0, 2**16),
)  # fmt: skip
def test_the_chunk_is_irrelevant_and_probabilities_sum_to_one(
    rows: int, chunk: int, scale: float, softcap: float | None, temperature: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    hidden, weight = (torch.randn(n, 3, dtype=torch.float64, generator=generator) for n in (rows, 4))
    every, targets = hidden.repeat_interleave(4, 0).requires_grad_(), torch.arange(4).repeat(rows)
    options: Any = {"scale": scale, "softcap": softcap, "temperature": temperature}
    logprobs, _ = chunked_logprobs(every, weight, None, targets, chunk=chunk, **options)
    whole, _ = chunked_logprobs(every, weight, None, targets, chunk=4 * rows, **options)
    assert torch.allclose(logprobs, whole, rtol=1e-10, atol=1e-10)
    assert torch.allclose(logprobs.view(rows, 4).exp().sum(1), torch.ones(rows, dtype=torch.float64))
    # sum_t p_t · d log p_t = d sum_t p_t = 0: the gradient of a certainty
    (logprobs.exp().detach() * logprobs).sum().backward()
    assert every.grad is not None
    per_row = every.grad.view(rows, 4, 3).sum(1)
    assert torch.allclose(per_row, torch.zeros_like(per_row), atol=1e-9 * max(1.0, scale / temperature))
    if softcap is not None:  # capped logits are at most 2c apart
        assert float(logprobs.detach().min()) >= -2 * softcap / temperature - torch.log(torch.tensor(4.0)) - 1e-9


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_coarse_head_caps_in_float32(dtype: torch.dtype) -> None:
    """Log-probs and gradients stay finite where the cap is saturated, and near the truth in float64."""
    torch.manual_seed(1)
    hidden, weight = (40 * torch.randn(6, 8)).to(dtype).requires_grad_(), torch.randn(13, 8).to(dtype).requires_grad_()
    target = torch.randint(0, 13, (6,))
    got, _ = chunked_logprobs(hidden, weight, None, target, softcap=30.0, chunk=4)
    got.sum().backward()
    exact = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    truth, _ = naive(exact[0], exact[1], None, target, 1.0, 30.0, 1.0)
    truth.sum().backward()
    bound = 1e-4 if dtype == torch.float32 else 0.5
    assert got.dtype == torch.float32 and float((got - truth).detach().abs().max()) < bound
    for tensor, twin in zip((hidden, weight), exact, strict=True):
        assert tensor.grad is not None and twin.grad is not None
        assert float((tensor.grad - twin.grad).norm() / twin.grad.norm()) < (1e-4 if dtype == torch.float32 else 0.05)


class Held(TorchDispatchMode):
    """Counts the tensors of one size that are alive at once."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.alive, self.most = size, weakref.WeakValueDictionary[int, Any](), 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.numel() == self.size:
            self.alive.setdefault(result.data_ptr(), result)  # an operation in place may hand over an alias
            self.most = max(self.most, len(self.alive))
        return result


@pytest.mark.parametrize(
    ("softcap", "with_entropy", "forward", "backward"),
    [(None, False, 1, 1), (30.0, False, 1, 2), (None, True, 3, 1), (30.0, True, 3, 2)],
)
def test_how_many_chunks_of_logits_are_held(
    softcap: float | None, with_entropy: bool, forward: int, backward: int
) -> None:
    """One; two while the softcap's slope is taken, and the entropy's p and what it is made of in the forward pass."""
    hidden, weight = torch.randn(40, 6, requires_grad=True), torch.randn(97, 6, requires_grad=True)
    with Held(8 * 97) as held:
        logprobs, _ = chunked_logprobs(
            hidden, weight, None, torch.randint(0, 97, (40,)),
            scale=0.5, softcap=softcap, temperature=0.9, chunk=8, with_entropy=with_entropy,
        )  # fmt: skip
    assert held.most == forward
    with Held(8 * 97) as held:
        logprobs.sum().backward()
    assert held.most == backward


def test_no_more_is_kept_than_was_allowed_and_nothing_without_gradient() -> None:
    hidden, weight = torch.randn(40, 6, requires_grad=True), torch.randn(97, 6, requires_grad=True)
    target = torch.randint(0, 97, (40,))
    size = 8 * 97 * 4
    for keep, most in ((2 * size + 5, 3), (2 * size, 3), (2 * size - 1, 2)):  # those that are kept, and the one at work
        with Held(8 * 97) as held:
            chunked_logprobs(hidden, weight, None, target, chunk=8, keep_bytes=keep)
        assert held.most == most
    with torch.no_grad(), Held(8 * 97) as held:
        chunked_logprobs(hidden, weight, None, target, chunk=8, keep_bytes=2 * size + 5)
    assert held.most == 1


def test_a_second_backward_pass_gives_the_same() -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(9, 6, requires_grad=True), torch.randn(17, 6, requires_grad=True)
    logprobs, _ = chunked_logprobs(hidden, weight, None, torch.randint(0, 17, (9,)), chunk=4, keep_bytes=2**20)
    first = torch.autograd.grad(logprobs.sum(), [hidden, weight], retain_graph=True)
    again = torch.autograd.grad(logprobs.sum(), [hidden, weight])
    for a, b in zip(first, again, strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)
