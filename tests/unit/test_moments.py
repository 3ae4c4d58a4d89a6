"""Moments on disk: everything comes back, torch's random state included."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from deepgrpo.config import OptimConfig
from deepgrpo.model.policy import Policy
from deepgrpo.train.moments import load_moments, moments_of, read_moments, save_moments
from deepgrpo.train.optim import build_optimizer


def test_what_was_saved_comes_back(policy: Policy, tmp_path: Path) -> None:
    """The moments by name, of a second optimizer too, and the random numbers that would have come next."""
    optimizer = build_optimizer(policy, OptimConfig(lr=1e-3))
    for step in range(2):
        for number, parameter in enumerate(policy.trainable().values()):
            parameter.grad = torch.full_like(parameter, 0.1 * (number + 1) + step)
        optimizer.step()
    torch.manual_seed(7)
    torch.rand(3)
    saved = {name: value.clone() for name, value in moments_of(policy, optimizer).items()}
    save_moments(saved, tmp_path)
    expected = torch.rand(2)
    torch.rand(5)
    other = build_optimizer(policy, OptimConfig(lr=1e-3))
    load_moments(policy, other, read_moments(policy, tmp_path))
    assert torch.equal(torch.rand(2), expected)
    loaded = moments_of(policy, other)
    assert loaded.keys() == saved.keys() and all(torch.equal(loaded[name], saved[name]) for name in saved)
    # of the first parameter: gradients .1 and 1.1, so .9 · .01 + .1 · 1.1 = .119, and .999 · 1e-5 + .001 · 1.21 = 1.21999e-3
    name = next(iter(policy.trainable()))
    assert float(loaded[f"exp_avg/{name}"].flatten()[0]) == pytest.approx(0.119)
    assert float(loaded[f"exp_avg_sq/{name}"].flatten()[0]) == pytest.approx(1.21999e-3)
    assert float(loaded[f"step/{name}"]) == 2


def test_a_directory_without_moments(policy: Policy, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"has neither optimizer.safetensors nor optimizer/"):
        read_moments(policy, tmp_path)
