"""Speed of bfloat16 on the CPU: with instructions for it twice that of float32, without them a tenth and less."""

from __future__ import annotations

import functools
import time

import torch
from torch.nn.functional import linear

ROWS, WIDTH = 64, 512
SLOW = 3.0
"""Ratio of times from which a user is told. Measured: about .5 with AMX, 10 to 60 without AVX-512."""


@functools.cache
def bfloat16_time() -> float:
    """Time of a product of matrices and its gradients on the CPU in bfloat16, divided by that in float32."""
    return _seconds(torch.bfloat16) / _seconds(torch.float32)


def _seconds(dtype: torch.dtype) -> float:
    # nothing random: the global stream belongs to the run
    weight = torch.linspace(-1, 1, WIDTH * WIDTH).view(WIDTH, WIDTH).to(dtype).requires_grad_()
    given = torch.linspace(-1, 1, ROWS * WIDTH).view(ROWS, WIDTH).to(dtype).requires_grad_()
    trials = []
    with torch.enable_grad():
        for _ in range(3):  # the first one warms up
            began = time.perf_counter()
            torch.autograd.grad(linear(given, weight).sum(), [given, weight])
            trials.append(time.perf_counter() - began)
    return min(trials)


def slow_dtype(dtype: torch.dtype, device: torch.device) -> str:
    """Warning for a learner that computes in bfloat16 on a CPU that is slow at it; otherwise an empty string."""
    if device.type != "cpu" or dtype != torch.bfloat16 or bfloat16_time() < SLOW:
        return ""
    return (
        f'learner.dtype = "bfloat16": this CPU has no instructions for it and takes {bfloat16_time():.0f} times as long as in '
        'float32, for large vocabularies even longer; set learner.dtype = "float32"'
    )
