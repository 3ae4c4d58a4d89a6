"""The name of a device: one rule for training and evaluation."""

from __future__ import annotations

import pytest
import torch

from deepgrpo.errors import ConfigError
from deepgrpo.model.device import resolve_device


def test_auto_and_cpu() -> None:
    assert resolve_device("auto") == ("cuda" if torch.cuda.is_available() else "cpu")
    assert resolve_device("cpu") == "cpu"


@pytest.mark.parametrize("wanted", ["foo", "cuda:", "cuda:x", "cuda:-1", "CPU", "", "meta", "mps", "cpu:0"])
def test_other_names_are_refused(wanted: str) -> None:
    with pytest.raises(ConfigError, match=rf"run\.device is '{wanted}'; use auto, cpu, cuda or cuda:N"):
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
