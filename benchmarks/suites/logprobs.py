"""Log-probs of selected rows and their gradient: from full logits, and chunk by chunk."""

from __future__ import annotations

import torch

from benchmarks.arms import Arm, BenchSetting, Offer, Suite
from deepgrpo.model.logprobs import chunked_logprobs

WIDTH = 512
"""Hidden size."""
CHUNK, KEEP = 256, 2**28
"""The learner's defaults: rows at a time, and bytes that are kept for the backward pass."""


def logprobs_suite(setting: BenchSetting) -> Suite:
    workload = setting.workload
    torch.manual_seed(0)
    rows = workload.rollouts * workload.response
    hidden = torch.randn(rows, WIDTH, requires_grad=True)
    weight = (torch.randn(workload.vocabulary, WIDTH) * 0.02).requires_grad_()
    target = torch.randint(0, workload.vocabulary, (rows,))

    def clear() -> None:
        hidden.grad = weight.grad = None

    def full() -> int:
        clear()
        logprobs = torch.log_softmax(hidden @ weight.t(), -1).gather(1, target[:, None])
        logprobs.mean().backward()
        return rows

    def chunked() -> int:
        clear()
        chunked_logprobs(hidden, weight, None, target, chunk=CHUNK, keep_bytes=KEEP)[0].mean().backward()
        return rows

    return Suite(
        baseline="full_logits",
        offers=[
            Offer("full_logits", lambda: Arm("full_logits", full, "log_softmax of all logits of the selected rows")),
            Offer("chunked", lambda: Arm("chunked", chunked, "256 rows of logits at a time, 256 MiB kept, own backward")),
        ],
    )
