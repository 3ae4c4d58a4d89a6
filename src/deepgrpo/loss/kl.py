"""KL divergence to the frozen start model. Shapes: N terms."""

from __future__ import annotations

import torch
from torch import Tensor


def k3(logprob_N: Tensor, reference_N: Tensor) -> Tensor:
    """Schulman's k3 estimate of KL(π || π_ref) per sampled token: `exp(d) - d - 1` with `d = log π_ref - log π`.

    Never negative; unbiased for tokens drawn from π; zero, with zero gradient, where the two agree.

    Example: log π = -1, log π_ref = -1 + log 2: 2 - log 2 - 1 = 0.3069.
    """
    difference_N = reference_N - logprob_N
    return torch.exp(difference_N) - difference_N - 1
