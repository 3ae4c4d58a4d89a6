"""A whole step, sampling and update: as the reference does it, ours, and plain GRPO against TRL."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import torch

from benchmarks.arms import Arm, BenchSetting, LeftOutError, Offer, Suite
from benchmarks.baselines.trl_trainer import trl_arm
from benchmarks.baselines.vllm_sampling import describe, vllm_engine
from benchmarks.suites.learner import PER_PATH, learner_config
from benchmarks.suites.sampling import KEEP, ROWS
from benchmarks.workloads import Workload, branch_requests, build_policy, build_trees, main_requests
from deepgrpo.credit.siblings import sibling_credit
from deepgrpo.engines.base import Engine, SamplingParams
from deepgrpo.engines.embedded.engine import EmbeddedEngine
from deepgrpo.model.policy import Policy
from deepgrpo.model.tree_gate import PackingVerdict
from deepgrpo.records import SampleRequest, Tree
from deepgrpo.train.learner import Learner
from deepgrpo.train.optim import build_optimizer

Dtype = Literal["float32", "bfloat16"]


def step_suite(setting: BenchSetting) -> Suite:
    arms = _Arms(setting)

    def trl(name: str, dtype: torch.dtype, continuous: bool = False) -> Arm:
        return trl_arm(setting, name, arms.policy, arms.plain, dtype, continuous)

    reference = "the reference's way in our code, float32: branches as separate prompts"
    return Suite(
        baseline="per_path",
        offers=[
            Offer("per_path", lambda: arms.per_path("per_path", False, f"{reference}, each encoded; a row per path")),
            Offer(
                "per_path_merged",
                lambda: arms.per_path("per_path_merged", True, f"{reference}, equal ones encoded once; a row per path"),
            ),
            Offer("tree", lambda: arms.tree("tree", "float32", "prefixes shared in sampling and in learning")),
            Offer("tree_bf16", lambda: arms.tree("tree_bf16", "bfloat16", "the same, engine in bfloat16")),
            Offer(
                "tree_bf16_no_keep",
                lambda: arms.tree("tree_bf16_no_keep", "bfloat16", "branches encode their prefix once per pivot", keep=False),
                default=False,
            ),
            Offer("tree_vllm_bf16", lambda: arms.vllm("tree_vllm_bf16", prefix_caching=True), default=False),
            Offer(
                "tree_vllm_bf16_no_prefix", lambda: arms.vllm("tree_vllm_bf16_no_prefix", prefix_caching=False), default=False
            ),
            Offer("grpo", lambda: arms.grpo("grpo", "float32")),
            Offer("trl_grpo", lambda: trl("trl_grpo", torch.float32)),
            # another way for TRL to sample, for who wants to know which is its better one
            Offer("trl_grpo_continuous", lambda: trl("trl_grpo_continuous", torch.float32, True), default=False),
            Offer("grpo_bf16", lambda: arms.grpo("grpo_bf16", "bfloat16")),
            Offer("trl_grpo_bf16", lambda: trl("trl_grpo_bf16", torch.bfloat16)),
        ],
        pairs=[
            ("tree", "per_path_merged"), ("tree_bf16", "tree"), ("grpo", "trl_grpo"), ("grpo", "trl_grpo_continuous"),
            ("grpo_bf16", "trl_grpo_bf16"), ("tree_bf16", "tree_vllm_bf16"), ("tree_bf16", "tree_bf16_no_keep"),
            ("tree_vllm_bf16", "tree_vllm_bf16_no_prefix"),
        ],
    )


@dataclass(frozen=True, slots=True)
class _Work:
    """Trees of the shape that is sampled; what is sampled itself is thrown away, as its rewards would be chance."""

    workload: Workload
    trees: Sequence[Tree]

    @classmethod
    def of(cls, workload: Workload) -> _Work:
        return cls(workload, build_trees(workload))


class _Arms:
    """All arms train the one model, whose learning rate is so low that it stays what it is."""

    def __init__(self, setting: BenchSetting) -> None:
        self.setting, self.workload, self.budget = setting, setting.workload, setting.budget

    @cached_property
    def policy(self) -> Policy:
        return build_policy(self.workload)

    @cached_property
    def optimizer(self) -> torch.optim.Optimizer:
        return build_optimizer(self.policy, learner_config(self.workload, self.budget).optim)

    @property
    def plain(self) -> Workload:
        """The same rollouts without branches."""
        return replace(self.workload, failed=0, branches=0)

    def per_path(self, name: str, merge: bool, note: str) -> Arm:
        work, learner = _Work.of(self.workload), self._learner("float32", exact=True)
        engine = EmbeddedEngine(self.policy, max_rows=ROWS, dtype=torch.float32, share_prefixes=merge)

        def run() -> int:
            tokens = _sample(engine, work, keep=False, separate=True)
            _update(learner, work, PER_PATH)
            return tokens

        return Arm(name, run, note)

    def tree(self, name: str, sampler: Dtype, note: str, keep: bool = True) -> Arm:
        self._must_pack()
        return self._ours(name, _Work.of(self.workload), "float32", sampler, f"{note}; learner in float32", keep)

    def vllm(self, name: str, *, prefix_caching: bool) -> Arm:
        self._must_pack()
        engine = vllm_engine(self.setting, self.policy, ROWS, prefix_caching=prefix_caching)
        work, learner, verdict = _Work.of(self.workload), self._learner("float32", exact=False), self.policy.verdict

        def run() -> int:
            # the learning rate leaves the weights as they are; after a real step vLLM gets new ones
            _turn_a_bit(self.policy)
            tokens = _sample(engine, work, keep=True, separate=False)
            _update(learner, work, verdict)
            return tokens

        note = f"{describe(engine)}, weights sent anew; learner in float32"
        return Arm(name, run, note, versions={"vllm": engine.process.version})

    def _must_pack(self) -> None:
        if not self.policy.verdict.packs:
            raise LeftOutError(f"this model cannot be packed: {self.policy.verdict.reason}")

    def grpo(self, name: str, dtype: Dtype) -> Arm:
        note = f"plain GRPO, no branches; engine and arithmetic of the learner in {dtype}"
        return self._ours(name, _Work.of(self.plain), dtype, dtype, note)

    def _ours(self, name: str, work: _Work, dtype: Dtype, sampler: Dtype, note: str, keep: bool = True) -> Arm:
        verdict = self.policy.verdict
        # one for all runs, as in training: a copy of the weights is made once and refreshed in each run
        engine = EmbeddedEngine(self.policy, max_rows=ROWS, keep_bytes=KEEP, dtype=getattr(torch, sampler))
        learner = self._learner(dtype, exact=dtype == sampler == "float32")

        def run() -> int:
            tokens = _sample(engine, work, keep=keep, separate=False)
            _update(learner, work, verdict)
            return tokens

        return Arm(name, run, note)

    def _learner(self, dtype: Dtype, exact: bool) -> Learner:
        policy = self.policy
        if dtype == "bfloat16":  # the same weights under autocast
            policy = Policy(policy.model, policy.tokenizer, policy.context, torch.bfloat16)
        return Learner(
            policy, None, self.optimizer, learner_config(self.workload, self.budget, dtype), exact_sampler=exact
        )


def _sample(engine: Engine, work: _Work, *, keep: bool, separate: bool) -> int:
    params, rollouts = SamplingParams(), work.workload.rollouts
    requests = main_requests(work.workload, work.trees)
    groups, stats = engine.sample(_separate(requests) if separate else requests, params, keep=keep)
    flat = [completion for group in groups for completion in group]
    whole = [flat[i : i + rollouts] for i in range(0, len(flat), rollouts)]
    branches = branch_requests(work.workload, work.trees, whole)
    if branches:
        stats += engine.sample(_separate(branches) if separate else branches, params)[1]
    engine.forget()
    return stats.sampled_tokens


def _update(learner: Learner, work: _Work, verdict: PackingVerdict) -> None:
    policy = learner.policy
    before, policy.verdict = policy.verdict, verdict
    learner.update(work.trees, [sibling_credit(tree) for tree in work.trees])
    policy.verdict = before  # the engines of other arms look at it as well


@torch.no_grad()
def _turn_a_bit(policy: Policy) -> None:
    """Change a weight by its last bit."""
    next(policy.model.parameters()).view(torch.int32).view(-1)[0].bitwise_xor_(1)


def _separate(requests: Sequence[SampleRequest]) -> list[SampleRequest]:
    """Each continuation as a request of its own."""
    return [SampleRequest(r.prefix, (k,), r.max_new_tokens) for r in requests for k in r.keys]
