"""One update on the workload's trees: a row per path, and packs of unique tokens, under the same token budget."""

from __future__ import annotations

from functools import cached_property
from typing import Any, Literal

from benchmarks.arms import Arm, BenchSetting, LeftOutError, Offer, Suite
from benchmarks.workloads import Workload, build_policy, build_trees
from deepgrpo.config import Config, parse_config
from deepgrpo.credit.siblings import sibling_credit
from deepgrpo.model.policy import Policy
from deepgrpo.model.tree_gate import PackingVerdict
from deepgrpo.pack.layout import lay_out
from deepgrpo.train.learner import Learner
from deepgrpo.train.optim import build_optimizer

PER_PATH = PackingVerdict(False, "baseline")
"""Under this verdict the learner forwards a row per path."""


def learner_suite(setting: BenchSetting) -> Suite:
    arms = _Arms(setting)
    return Suite(
        baseline="per_path",
        offers=[Offer("per_path", arms.per_path), Offer("tree", arms.tree), Offer("tree_gather", arms.gather)],
        extra=arms.extra,
    )


class _Arms:
    def __init__(self, setting: BenchSetting) -> None:
        self.workload, self.budget = setting.workload, setting.budget
        self.trees = build_trees(setting.workload)
        self.credits = [sibling_credit(tree) for tree in self.trees]

    @cached_property
    def learner(self) -> Learner:
        policy, config = build_policy(self.workload), learner_config(self.workload, self.budget)
        return Learner(policy, None, build_optimizer(policy, config.optim), config)

    @cached_property
    def verdict(self) -> PackingVerdict:
        """Verdict on the model itself; the policy carries that of the running arm."""
        verdict = self.learner.policy.verdict
        if not verdict.packs:
            raise LeftOutError(f"this model cannot be packed: {verdict.reason}")
        return verdict

    def per_path(self) -> Arm:
        _ = self.learner  # made before its memory is looked at
        return self._arm("per_path", PER_PATH, "a row per path, padded; head on trained tokens only")

    def tree(self) -> Arm:
        return self._arm("tree", self.verdict, f"packs of unique tokens, {self.verdict.kernel}")

    def gather(self) -> Arm:
        other: Literal["gather"] = "gather"
        if self.verdict.kernel == other:
            raise LeftOutError(f"{other} is the kernel of the arm tree already")
        return self._arm("tree_gather", PackingVerdict(True, "", other), "the same packs, another kernel")

    def _arm(self, name: str, verdict: PackingVerdict, note: str) -> Arm:
        def run() -> int:
            self.learner.policy.verdict = verdict
            return self.learner.update(self.trees, self.credits).ledger.learner_tokens

        return Arm(name, run, note)

    def extra(self) -> dict[str, Any]:
        layout = lay_out(self.trees, self.credits)
        paths = sum(len(row.input_ids) for row in layout.rows)
        return {"cost_model": cost_model(self.learner.policy, paths, layout.unique_tokens, len(layout.terms))}


def learner_config(workload: Workload, budget: int, dtype: str = "float32") -> Config:
    """A recipe whose learner takes one optimizer step that hardly moves the weights, so that all runs are alike."""
    return parse_config(
        {
            "model": {"type": "scratch"}, "data": {"type": "synthetic"}, "reward": {"type": "task"},
            "run": {"steps": 1, "prompts_per_step": workload.prompts}, "loss": {"beta": 0.0},
            "sampling": {"max_new_tokens": workload.response},
            "learner": {"tokens_per_pack": budget, "dtype": dtype}, "optim": {"lr": 1e-9},
        }
    )  # fmt: skip


def cost_model(policy: Policy, path_tokens: int, unique_tokens: int, terms: int) -> dict[str, float]:
    """The ratio to expect: the trunk costs its parameters per token laid out, the head per trained token.

    6 operations per parameter and token for forward and backward; 8 in the head, whose logits are computed twice.
    """
    head = policy.causal.get_output_embeddings().weight.numel()
    trunk = sum(p.numel() for p in policy.model.parameters()) - head
    rows = 6 * trunk * path_tokens + 8 * head * terms
    packs = 6 * trunk * unique_tokens + 8 * head * terms
    return {
        "path_tokens": path_tokens, "unique_tokens": unique_tokens, "terms": terms,
        "token_ratio": path_tokens / unique_tokens, "predicted_ratio": rows / packs,
    }  # fmt: skip
