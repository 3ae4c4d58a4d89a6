"""Suites: one file per timed part of a step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from benchmarks.arms import BenchSetting, Suite
from benchmarks.suites.distribution import distribution_suite
from benchmarks.suites.learner import learner_suite
from benchmarks.suites.logprobs import logprobs_suite
from benchmarks.suites.sampling import sampling_suite
from benchmarks.suites.step import step_suite

SuiteName = Literal["learner", "logprobs", "sampling", "step", "distribution"]

SUITES: dict[SuiteName, Callable[[BenchSetting], Suite]] = {
    "learner": learner_suite, "logprobs": logprobs_suite, "sampling": sampling_suite, "step": step_suite,
    "distribution": distribution_suite,
}  # fmt: skip
