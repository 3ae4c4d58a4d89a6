"""What can be timed: one file per part of a step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from deepgrpo.lab.arms import Setting, Suite
from deepgrpo.lab.parts.distribution import distribution_suite
from deepgrpo.lab.parts.learner import learner_suite
from deepgrpo.lab.parts.logprobs import logprobs_suite
from deepgrpo.lab.parts.sampling import sampling_suite
from deepgrpo.lab.parts.step import step_suite

Part = Literal["learner", "logprobs", "sampling", "step", "distribution"]

SUITES: dict[Part, Callable[[Setting], Suite]] = {
    "learner": learner_suite, "logprobs": logprobs_suite, "sampling": sampling_suite, "step": step_suite,
    "distribution": distribution_suite,
}  # fmt: skip
