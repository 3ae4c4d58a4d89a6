"""The pretended device itself: it refuses what CUDA refuses, allows what CUDA allows, and answers for torch.cuda."""

from __future__ import annotations

import copy
import io
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretend.server import Server, on_device

MIXED = "Expected all tensors to be on the same device"


def refused(message: str, *works: Any, error: type[Exception] = RuntimeError) -> None:
    """Each of these raises this error, by a message that has this pattern."""
    for number, work in enumerate(works):
        with pytest.raises(error) as raised:
            work()
        assert re.search(message, str(raised.value)), f"{number}: {raised.value}"


def same(found: Tensor, expected: Any, device: str = "cuda") -> None:
    """On this device, with these numbers."""
    assert found.device.type == device and found.is_cuda == (device == "cuda"), found.device
    assert found.tolist() == (expected.tolist() if isinstance(expected, Tensor) else expected)


def test_nothing_of_it_reaches_this_process(server: Server) -> None:
    """A failure in the child is told here, and the child's device stays there."""
    server.call(__file__, "child_has_the_device", "cuda", {})
    server.call(__file__, "child_has_none", "cpu", {})
    with pytest.raises(AssertionError, match=r"(?s)on cuda:.*Traceback.*child_has_none"):
        server.call(__file__, "child_has_none", "cuda", {})


def child_has_the_device() -> None:
    assert torch.cuda.is_available()


def child_has_none() -> None:
    assert not torch.cuda.is_available()


@on_device
def test_factories() -> None:
    """By keyword, by a device as context, like another tensor, from lists and arrays."""
    same(torch.zeros(2, device="cuda"), [0, 0])
    same(torch.ones(1, 2, device="cuda:0"), [[1, 1]])
    same(torch.full((2,), 3, device=torch.device("cuda")), [3, 3])
    same(torch.arange(3, device="cuda"), [0, 1, 2])
    same(torch.linspace(0, 1, 2, device="cuda"), [0, 1])
    same(torch.eye(2, device="cuda"), [[1, 0], [0, 1]])
    same(torch.tensor([1, 2], device="cuda"), [1, 2])
    same(torch.as_tensor([1.0], device="cuda"), [1.0])
    same(torch.tril_indices(2, 2, device="cuda"), [[0, 1, 1], [0, 0, 1]])
    x = torch.ones(2, device="cuda")
    for made in (torch.zeros_like(x), x.new_zeros(2), torch.zeros_like(torch.ones(2), device="cuda"), x.new_tensor([0, 0])):
        same(made, [0, 0])
    same(torch.zeros_like(x, device="cpu"), [0, 0], "cpu")
    with torch.device("cuda"):
        same(torch.zeros(1), [0])
    assert nn.Linear(2, 2, device="cuda").weight.device == torch.device("cuda:0")
    assert x.dtype == torch.float32 and torch.empty(2, device="cuda", dtype=torch.bfloat16).dtype == torch.bfloat16
    refused("invalid device ordinal", lambda: torch.ones(2, device="cuda:1"), lambda: torch.ones(2).to("cuda:1"))


@on_device
def test_moves() -> None:
    here = torch.arange(4.0)
    there = here.to("cuda")
    moves = (here.cuda(), here.cuda(0), here.to(torch.device("cuda:0")), here.to(there), here.to("cuda", non_blocking=True))
    for moved in moves:
        same(moved, here)
    same(here.to("cuda", torch.float64), here)
    assert here.to("cuda", torch.bfloat16).dtype == torch.bfloat16
    same(there.cpu(), here, "cpu")
    same(there.to("cpu", non_blocking=True), here, "cpu")
    assert there.to("cuda") is there and there.to(there.device) is there
    there += 1
    same(here, [0, 1, 2, 3], "cpu")  # a move is a copy
    target = torch.zeros(4)
    same(target.copy_(there), [1, 2, 3, 4], "cpu")
    same(there.copy_(torch.zeros(4), non_blocking=True), [0, 0, 0, 0])
    there[1:3] = torch.ones(2)
    same(there, [0, 1, 1, 0])


@on_device
def test_pinned_memory() -> None:
    pinned = torch.arange(2.0).pin_memory()
    assert pinned.is_pinned() and not torch.ones(2).is_pinned() and pinned.pin_memory() is pinned
    same(pinned.to("cuda", non_blocking=True), [0, 1])
    assert torch.empty(2, pin_memory=True).shape == (2,)
    refused("cannot pin 'torch.cuda.FloatTensor'", lambda: torch.ones(2, device="cuda").pin_memory())


@on_device
def test_a_cpu_tensor_beside_one_on_the_device() -> None:
    x, y = torch.ones(2, 2, device="cuda"), torch.ones(2, 2)
    refused(
        MIXED, lambda: x + y, lambda: y + x, lambda: x @ y, lambda: y @ x,
        lambda: torch.cat([x, y]), lambda: torch.stack([y, x]),
        lambda: x.add_(y), lambda: y.add_(x), lambda: F.linear(x, y), lambda: torch.where(y > 0, x, x),
        lambda: torch.where(x > 0, x, y), lambda: x.masked_fill(y > 0, 0.0), lambda: x.masked_fill_(y > 0, 0.0),
        lambda: F.embedding(torch.tensor([0]), x), lambda: x.gather(0, torch.zeros(1, 2, dtype=torch.long)),
        lambda: x.index_select(0, torch.tensor([0])), lambda: x.index_add_(0, torch.tensor([0, 1]), x),
        lambda: x.scatter_(0, torch.zeros(1, 2, dtype=torch.long), x), lambda: torch.maximum(x, y),
        lambda: F.scaled_dot_product_attention(x[None, None], y[None, None], x[None, None]), lambda: x.lerp_(y, 0.5),
        lambda: torch.add(x, x, out=y), lambda: torch.equal(x, y), lambda: torch.allclose(x, y), lambda: x.eq(y),
    )  # fmt: skip


@on_device
def test_cpu_scalars() -> None:
    """A CPU tensor without dimensions counts as a number beside tensors of CUDA, in arithmetic and nowhere else."""
    x, two = torch.ones(2, device="cuda"), torch.tensor(2.0)
    same(x + two, [3, 3])
    same(two - x, [1, 1])
    same(torch.tensor(1.0, device="cuda") * two, 2)
    same(torch.where(x > 0, x, two), [1, 1])
    same(torch.where(x > 0, 5.0, x), [5, 5])
    same(x.clone().mul_(two), [2, 2])
    same(x.masked_fill(x > 0, two), [2, 2])
    same(torch.maximum(x, two), [2, 2])
    zero = torch.tensor(0, device="cuda")
    refused(
        MIXED, lambda: torch.ones(2) + zero, lambda: two.add_(zero), lambda: torch.stack([two, two.cuda()]),
        lambda: F.embedding(torch.tensor(0), x[None]), lambda: x.index_select(0, torch.tensor(0)),
    )  # fmt: skip


@on_device
def test_indexing() -> None:
    """CPU masks and indices are moved to a tensor on the device, not the other way round."""
    x = torch.arange(4.0, device="cuda")
    mask, index = torch.tensor([True, False, True, False]), torch.tensor([3, 0])
    same(x[mask], [0, 2])
    same(x[index], [3, 0])
    same(x[mask.cuda()], [0, 2])
    same(x[torch.tensor(2)], 2)
    same(x[[1, 2]], [1, 2])
    same(x.clone().index_put_((index,), torch.tensor(9.0)), [9, 1, 2, 9])
    y = x.clone()
    y[mask] = 7.0
    y[index.cuda()] = torch.tensor([1.0, 2.0], device="cuda")
    same(y, [2, 1, 7, 1])
    same(torch.arange(4.0)[torch.tensor(1, device="cuda")], 1, "cpu")  # as a number

    def assign() -> None:
        y[index] = torch.ones(2)

    refused(MIXED, assign, lambda: torch.ones(4)[index.cuda()], lambda: torch.ones(4)[mask.cuda()])


@on_device
def test_reading_it_on_the_host() -> None:
    import numpy as np

    x = torch.arange(3.0, device="cuda")
    assert x.tolist() == [0, 1, 2] and x[2].item() == 2 and float(x[1]) == 1 and int(x[1]) == 1 and bool(x[1])
    assert x.cpu().numpy().tolist() == x.numpy(force=True).tolist() == [int(i) for i in x] == [0, 1, 2] and len(x) == 3
    refused("can't convert cuda:0 device type tensor to numpy", x.numpy, lambda: np.asarray(x), error=TypeError)
    assert x.__dlpack_device__() == (2, 0)
    refused("", lambda: np.from_dlpack(x), error=(RuntimeError, BufferError))  # type: ignore[arg-type]
    assert "device='cuda:0'" in repr(x)


@on_device
def test_kernels_that_cuda_lacks() -> None:
    x = torch.ones(2, 2, dtype=torch.long, device="cuda")
    refused('"addmm_cuda" not implemented for \'Long\'', lambda: x @ x, lambda: F.linear(x, x))
    refused("baddbmm_cuda", lambda: x[None] @ x[None])


@on_device
def test_random_numbers() -> None:
    """The device has a generator of its own, which torch.manual_seed sets as well."""
    state = torch.get_rng_state()
    torch.cuda.manual_seed_all(3)
    first = torch.rand(3, device="cuda")
    assert torch.equal(torch.get_rng_state(), state)
    saved = torch.cuda.get_rng_state()
    second = torch.rand(3, device="cuda")
    torch.cuda.set_rng_state(saved)
    assert torch.equal(torch.rand(3, device="cuda"), second) and not torch.equal(first, second)
    torch.manual_seed(3)
    assert torch.equal(torch.rand(3, device="cuda"), first)
    with torch.random.fork_rng(device_type="cuda"):
        torch.rand(1, device="cuda")
    assert torch.equal(torch.rand(3, device="cuda"), second)
    torch.cuda.set_rng_state_all(torch.cuda.get_rng_state_all())
    refused("ByteTensor", lambda: torch.cuda.set_rng_state(saved.to("cuda")), error=TypeError)
    dropped = F.dropout(torch.ones(64, device="cuda"), 0.5)
    assert 0 < dropped.count_nonzero() < 64


@on_device
def test_generators() -> None:
    ours, theirs = torch.Generator(device="cuda").manual_seed(1), torch.Generator().manual_seed(1)
    assert ours.device.type == "cuda" and theirs.device.type == "cpu" and isinstance(ours, torch.Generator)
    a = torch.randn(3, device="cuda", generator=ours)
    assert torch.equal(a.cpu(), torch.randn(3, generator=theirs))
    ours.set_state(ours.get_state())
    torch.randperm(4, device="cuda", generator=ours)
    torch.randint(0, 5, (2,), device="cuda", generator=ours)
    torch.multinomial(torch.ones(3, device="cuda"), 1, generator=ours)
    refused(
        "Expected a 'cuda' device type for generator", lambda: torch.rand(2, device="cuda", generator=theirs),
        lambda: torch.randperm(4, device="cuda", generator=theirs),
        lambda: torch.empty(2, device="cuda").normal_(generator=theirs),
    )  # fmt: skip


@on_device
def test_what_torch_cuda_answers() -> None:
    cuda = torch.cuda
    assert cuda.is_available() and cuda.device_count() == 1 and cuda.current_device() == 0 and cuda.is_initialized()
    assert cuda.is_bf16_supported() and cuda.get_device_capability() == (9, 0) and cuda.get_device_name(0)
    assert torch.accelerator.is_available() and torch.accelerator.current_accelerator() == torch.device("cuda")
    for device in (0, "cuda", "cuda:0", torch.device("cuda"), torch.device("cuda", 0)):
        free, total = cuda.mem_get_info(device)
        assert 0 < free < total == cuda.get_device_properties(device).total_memory
        assert cuda.max_memory_allocated(device) == cuda.memory_allocated(device) == 0
        cuda.synchronize(device)
        cuda.reset_peak_memory_stats(device)
        cuda.set_device(device)
        with cuda.device(device):
            cuda.empty_cache()
    with cuda.stream(cuda.Stream()):
        cuda.current_stream().synchronize()
    event = cuda.Event(enable_timing=True)
    event.record()
    event.synchronize()
    refused("invalid device ordinal", lambda: cuda.mem_get_info(1), lambda: cuda.get_device_properties("cuda:3"))


@on_device
def test_autocast() -> None:
    x, w = torch.ones(2, 2, device="cuda"), torch.ones(2, 2, device="cuda")
    with torch.autocast("cuda", dtype=torch.bfloat16):
        assert torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda") == torch.bfloat16
        assert not torch.is_autocast_enabled("cpu")
        assert (x @ w).dtype == torch.bfloat16 and (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
        assert F.softmax(x.bfloat16(), -1).dtype == torch.float32  # a rule of CUDA's, not of the CPU's
        with torch.autocast("cuda", enabled=False):
            assert (x @ w).dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (x @ w).dtype == torch.float32


@on_device
def test_backward_and_optimizers() -> None:
    """Gradients and moments lie on the device, and equal the CPU's."""
    found: dict[str, list[Any]] = {}
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 3), nn.SiLU(), nn.LayerNorm(3)).to(device)
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        plain = torch.optim.AdamW(model.parameters())
        for chosen in (optimizer, plain):
            model(torch.tensor([0, 3], device=device)).square().mean().backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            assert all(p.grad is not None and p.grad.device == p.device for p in model.parameters())
            chosen.step()
            chosen.zero_grad()
        assert all(v.device.type == device for s in optimizer.state.values() for v in s.values())
        steps = {s["step"].device.type for s in plain.state.values()}
        assert steps == {"cpu"}  # the way by several tensors keeps its counts on the host, the fused one does not
        found[device] = [p.tolist() for p in model.parameters()]
    assert found["cpu"] == found["cuda"]


@on_device
def test_modules_and_state() -> None:
    """Parameters stay the same objects when a module moves, tied ones stay tied; state goes both ways."""
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False), nn.BatchNorm1d(2))
    model[1].weight = model[0].weight
    before = model[0].weight
    model.to("cuda")
    assert model[0].weight is before is model[1].weight and before.is_cuda and isinstance(before, nn.Parameter)
    assert model[2].running_mean.is_cuda
    state = model.state_dict()
    assert all(value.is_cuda for value in state.values())
    other = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False), nn.BatchNorm1d(2))
    other.load_state_dict(state)
    same(other[0].weight.detach(), model[0].weight.detach(), "cpu")
    model.load_state_dict(other.state_dict())
    twin = copy.deepcopy(model)
    assert twin[0].weight is twin[1].weight is not before
    assert twin[0].weight.is_cuda and isinstance(twin[0].weight, nn.Parameter)
    same(twin[0].weight.detach(), before.detach())
    before.data = torch.zeros(2, 2, device="cuda")
    same(model[1].weight.detach(), [[0, 0], [0, 0]])
    assert twin[0].weight.detach().abs().sum() > 0
    model.cpu()
    assert model[0].weight is before and not before.is_cuda
    refused(MIXED, lambda: twin[0](torch.ones(1, 2)))


@on_device
def test_files() -> None:
    """torch.save remembers the device; safetensors writes what is on it and reads onto it."""
    import tempfile
    from pathlib import Path

    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    x = torch.arange(3.0, device="cuda").requires_grad_()
    buffer = io.BytesIO()
    torch.save({"x": x}, buffer)
    buffer.seek(0)
    back = torch.load(buffer, weights_only=False)["x"]
    assert back.requires_grad
    same(back.detach(), [0, 1, 2])
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "x.safetensors"
        save_file({"x": x.detach(), "half": x.detach().bfloat16()}, file)
        same(load_file(file)["x"], [0, 1, 2], "cpu")
        same(load_file(file, device="cuda:0")["x"], [0, 1, 2])
        same(load_file(file, device="cuda")["half"], [0, 1, 2])
        with safe_open(file, "pt", device="cuda:0") as opened:
            same(opened.get_tensor("x"), [0, 1, 2])


@on_device
def test_views_share_their_numbers() -> None:
    x = torch.zeros(2, 3, device="cuda")
    x[0].add_(1)
    x[:, 1] = 5
    x.view(-1)[5] = 7
    same(x, [[1, 5, 1], [0, 5, 7]])
    out = torch.empty(2, 3, device="cuda")
    assert torch.mul(x, 2, out=out) is out
    same(out, [[2, 10, 2], [0, 10, 14]])
    values, places = x.max(-1)
    same(values, [5, 7])
    same(places, [1, 2])
    refused("changes the shape", lambda: x.t_(), error=NotImplementedError)


@on_device
def test_checkpointed_segments() -> None:
    """Gradient checkpointing asks for the device's random state, and draws the same dropout twice."""
    from torch.utils.checkpoint import checkpoint

    x = torch.ones(32, device="cuda").requires_grad_()
    for reentrant in (True, False):
        x.grad = None
        torch.manual_seed(0)
        out = checkpoint(lambda t: F.dropout(t, 0.5) * t, x, use_reentrant=reentrant)
        out.sum().backward()
        assert x.grad is not None and torch.equal(x.grad, 2 * out.detach())


@pytest.mark.parametrize("kind", ["plain", "causal", "mask", "grouped", "bool"])
def test_attention_is_the_cpus(server: Server, kind: str) -> None:
    assert server.call(__file__, "attend", "cuda", {"kind": kind}) == server.call(__file__, "attend", "cpu", {"kind": kind})


def attend(kind: str) -> Any:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    random = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 4, 5, 8, generator=random).to(device).requires_grad_() for _ in range(3))
    mask = torch.ones(5, 5, dtype=torch.bool, device=device).tril()
    more: dict[str, Any] = {
        "plain": {}, "causal": {"is_causal": True}, "bool": {"attn_mask": mask},
        "mask": {"attn_mask": torch.zeros(5, 5, device=device).masked_fill(~mask, -1.0)}, "grouped": {"enable_gqa": True},
    }[kind]  # fmt: skip
    if kind == "grouped":
        k, v = k[:, :2], v[:, :2]
    out = F.scaled_dot_product_attention(q, k, v, **more)
    out.square().sum().backward()
    assert q.grad is not None and out.device.type == device
    return out.tolist(), q.grad.tolist()
