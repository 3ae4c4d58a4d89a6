"""The name of a device: one rule for training and evaluation."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from deepgrpo.errors import ConfigError, ModelError
from deepgrpo.model import bfloat16, device
from deepgrpo.model.bfloat16 import slow_dtype
from deepgrpo.model.device import resolve_device


def test_auto_and_cpu() -> None:
    assert resolve_device("auto") == ("cuda" if torch.cuda.is_available() else "cpu")
    assert resolve_device("cpu") == "cpu"


@pytest.mark.parametrize("wanted", ["foo", "cuda:", "cuda:x", "cuda:-1", "CPU", "", "meta", "mps:0", "xpu:x", "cpu:0"])
def test_other_names_are_refused(wanted: str) -> None:
    with pytest.raises(ConfigError, match=rf"run\.device is '{wanted}'; use auto, cpu, cuda or cuda:N, xpu or xpu:N, or mps"):
        resolve_device(wanted)
    with pytest.raises(ConfigError, match=f"--device is '{wanted}'"):
        resolve_device(wanted, "--device")


def test_cuda_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=r'is \'cuda:1\', but torch sees no CUDA device; use "cpu" or "auto"'):
        resolve_device("cuda:1")


def test_more_devices_than_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve_device("cuda:1") == "cuda:1"
    with pytest.raises(ConfigError, match=r"is 'cuda:2', but torch sees 2 CUDA devices; the last one is cuda:1"):
        resolve_device("cuda:2")


def test_devices_that_were_never_run_may_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"is 'xpu:1', but torch sees no XPU device"):
        resolve_device("xpu:1")
    with pytest.raises(ConfigError, match=r"is 'mps', but torch sees no MPS device"):
        resolve_device("mps")
    monkeypatch.setattr(torch.xpu, "is_available", lambda: True)
    monkeypatch.setattr(torch.xpu, "device_count", lambda: 1)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.mps, "device_count", lambda: 1)
    assert (resolve_device("xpu"), resolve_device("xpu:0"), resolve_device("mps")) == ("xpu", "xpu:0", "mps")
    with pytest.raises(ConfigError, match="torch sees 1 XPU device; the last one is xpu:0"):
        resolve_device("xpu:1")
    assert resolve_device("auto") == "cpu"  # never chosen, only named


def test_a_device_that_computes_otherwise_is_refused(policy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model is tried before and after it is moved; here it stays, and its weights change on the way or do not."""
    model = policy.model
    monkeypatch.setattr(device, "_PROVEN", ())
    kept = {name: p.detach().clone() for name, p in model.named_parameters()}
    was = model.training
    assert device.moved(model, "cpu") is model and model.training == was

    def broken(where: str) -> Any:
        with torch.no_grad():
            model.lm_head.weight[:, 3] += 1.0
        return model

    monkeypatch.setattr(model, "to", broken)
    with pytest.raises(ModelError, match=r"run.device is 'cpu', and the model does not compute there what .* differ by"):
        device.moved(model, "cpu")
    assert all(torch.equal(p, kept[name]) for name, p in model.named_parameters() if "embed" not in name)
    with pytest.raises(ModelError, match="differ by nan"):
        device.require_same(torch.zeros(3), torch.tensor([0.0, torch.nan, 0.0]), "mps")
    device.require_same(torch.tensor([-torch.inf, 0.0]), torch.tensor([-torch.inf, 1e-3]), "mps")  # a masked token


# ---------------------------------------------------------------- bfloat16 without instructions for it


@pytest.mark.parametrize(("seconds", "told"), [(0.29, False), (1.5, True)])
def test_bfloat16_on_a_cpu_that_is_slow_at_it(monkeypatch: pytest.MonkeyPatch, seconds: float, told: bool) -> None:
    bfloat16.bfloat16_time.cache_clear()
    monkeypatch.setattr(bfloat16, "_seconds", lambda dtype: seconds if dtype == torch.bfloat16 else 0.1)
    cpu, gpu = torch.device("cpu"), torch.device("cuda:0")
    assert slow_dtype(torch.float32, cpu) == slow_dtype(torch.bfloat16, gpu) == ""
    found = slow_dtype(torch.bfloat16, cpu)
    assert ('learner.dtype = "bfloat16"' in found and "takes 15 times as long" in found) is told
    bfloat16.bfloat16_time.cache_clear()


def test_the_time_of_bfloat16_is_measured_and_draws_nothing() -> None:
    bfloat16.bfloat16_time.cache_clear()
    before = torch.get_rng_state()
    assert 0.02 < bfloat16.bfloat16_time() < 1000
    assert torch.equal(torch.get_rng_state(), before)
