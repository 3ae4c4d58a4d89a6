"""Time the parts of a step, side by side: our way, the reference's way, and peers that are installed.

All arms of a benchmark are run in turn within one process, `repeats` times over, so that a change in the machine's mood
meets all of them; medians and ranges are reported, and ratios to a baseline. The figure to trust is the ratio.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from deepgrpo import rng
from deepgrpo.config import Config, parse_config
from deepgrpo.credit.siblings import sibling_credit
from deepgrpo.engines.base import SamplingParams
from deepgrpo.engines.embedded.engine import EmbeddedEngine
from deepgrpo.errors import ConfigError
from deepgrpo.lab.options import BenchOptions
from deepgrpo.lab.workloads import WORKLOADS, Workload, WorkloadName, build_policy, build_trees
from deepgrpo.model.logprobs import chunked_logprobs
from deepgrpo.model.policy import Policy
from deepgrpo.model.tree_gate import Verdict
from deepgrpo.pack.layout import lay_out
from deepgrpo.records import Completion, SampleRequest, Tree
from deepgrpo.train.optim import build_optimizer
from deepgrpo.train.step import Learner

SPREAD = (64, 256, 94.0)
"""Requests of spread lengths: how many, the longest, and the mean."""

Part = Literal["learner", "logprobs", "sampling", "step"]
BASELINES: dict[str, str] = {
    "learner": "per_path", "step": "per_path", "sampling": "hf_generate", "logprobs": "full_logits"
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Arm:
    """One way of doing the work. `run` returns how many tokens it computed."""

    name: str
    run: Callable[[], int]
    note: str = ""


@dataclass(slots=True)
class Measured:
    """Seconds and memory of an arm."""

    name: str
    seconds: list[float] = field(default_factory=list)
    peak_mb: float | None = None
    """Highest resident memory while it ran, above that before; None where the system does not tell."""
    tokens: int = 0
    note: str = ""

    def row(self) -> dict[str, Any]:
        return {
            "name": self.name, "median_s": statistics.median(self.seconds), "min_s": min(self.seconds),
            "max_s": max(self.seconds), "peak_mb": self.peak_mb, "tokens": self.tokens, "note": self.note,
        }  # fmt: skip


def run_bench(options: BenchOptions, console: Console | None = None) -> int:
    """Run one benchmark, print its table, and write JSON if asked. Returns the exit code."""
    out = console or Console(highlight=False)
    if not out.is_terminal:
        out = Console(file=out.file, highlight=False, width=160)  # a table in a file should not be folded
    torch.set_num_threads(options.threads)
    workload = WORKLOADS[options.workload]
    arms, extra = _arms(options.part, workload, options.budget)
    if options.arms:
        unknown = set(options.arms) - {arm.name for arm in arms}
        if unknown:
            raise ConfigError(f"--arms {sorted(unknown)[0]!r} is not one of {', '.join(arm.name for arm in arms)}")
        arms = [arm for arm in arms if arm.name in options.arms]
    measured = measure(arms, options.repeats)
    for each in measured:
        each.peak_mb = _peak_in_child(options, each.name)
    result = report(options, measured, extra)
    _show(out, options, result)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


def measure(arms: Sequence[Arm], repeats: int) -> list[Measured]:
    """Time the arms in turn, after a first round that warms up."""
    found = {arm.name: Measured(arm.name, note=arm.note) for arm in arms}
    for arm in arms:
        found[arm.name].tokens = arm.run()
    for _ in range(repeats):
        for arm in arms:
            began = time.perf_counter()
            arm.run()
            found[arm.name].seconds.append(time.perf_counter() - began)
    return list(found.values())


def peak_of(arm: Arm) -> float | None:
    """Highest resident memory while an arm runs for the first time in this process, above that before, in MiB."""
    before, known = _resident("VmRSS"), _reset_peak()
    arm.run()
    peak = _resident("VmHWM")
    return round(peak - before, 1) if known and before is not None and peak is not None else None


def _peak_in_child(options: BenchOptions, arm: str) -> float | None:
    """The same in a process of its own: memory that another arm has used before would be taken from the allocator."""
    command = [
        sys.executable, "-m", "deepgrpo.lab.bench", options.part, options.workload, str(options.threads),
        str(options.budget), arm,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    last = done.stdout.strip().rpartition("\n")[2]
    return float(last) if done.returncode == 0 and last not in ("", "None") else None


def report(options: BenchOptions, measured: Sequence[Measured], extra: dict[str, Any]) -> dict[str, Any]:
    """Arms, ratios to the baseline, machine and versions, as plain JSON."""
    import transformers

    rows = [each.row() for each in measured]
    medians = {row["name"]: row["median_s"] for row in rows}
    baseline = BASELINES[options.part]
    ratios = {name: medians[baseline] / s for name, s in medians.items()} if baseline in medians else {}
    return {
        "part": options.part, "workload": asdict(WORKLOADS[options.workload]), "baseline": baseline,
        "repeats": options.repeats, "threads": torch.get_num_threads(), "arms": rows, "ratios": ratios, **extra,
        "machine": {"processor": _processor(), "cores": os.cpu_count(), "load": os.getloadavg()[0]},
        "versions": {
            "python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__
        },
    }  # fmt: skip


def _arms(part: Part, workload: Workload, budget: int) -> tuple[list[Arm], dict[str, Any]]:
    if part == "learner":
        return learner_arms(workload, budget)
    if part == "logprobs":
        return logprob_arms(workload), {}
    if part == "sampling":
        return sampling_arms(workload), {}
    return step_arms(workload, budget), {}


# ---------------------------------------------------------------- the parts


def _config(workload: Workload, budget: int) -> Config:
    return parse_config(
        {
            "model": {"type": "scratch"}, "data": {"type": "synthetic"}, "reward": {"type": "task"},
            "run": {"steps": 1, "prompts_per_step": workload.prompts}, "loss": {"beta": 0.0},
            "sampling": {"max_new_tokens": workload.response},
            "learner": {"token_budget": budget}, "optim": {"lr": 1e-9},
        }
    )  # fmt: skip


def learner_arms(workload: Workload, budget: int) -> tuple[list[Arm], dict[str, Any]]:
    """One update on the workload's trees: a row per path, and packs of unique tokens, under the same token budget."""
    policy = build_policy(workload)
    trees = build_trees(workload)
    credits = [sibling_credit(tree) for tree in trees]
    config = _config(workload, budget)
    learner = Learner(policy, None, build_optimizer(policy, config.optim), config)
    verdict = policy.verdict

    def arm(name: str, chosen: Verdict, note: str = "") -> Arm:
        def run() -> int:
            policy.verdict = chosen
            return learner.update(trees, credits).ledger.learner_tokens

        return Arm(name, run, note)

    arms = [arm("per_path", Verdict(False, "baseline"), "a row per path, padded; head on trained tokens only")]
    if verdict.packs:
        arms.append(arm("tree", verdict, f"packs of unique tokens, {verdict.backend}"))
        others = {"gather"} - {verdict.backend}
        arms += [
            arm(f"tree_{other}", Verdict(True, "", other), "the same packs, another back-end")  # type: ignore[arg-type]
            for other in others
        ]
    layout = lay_out(trees, credits)
    paths = sum(len(row.input_ids) for row in layout.rows)
    return arms, {"cost_model": cost_model(policy, paths, layout.unique_tokens, len(layout.terms))}


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


def logprob_arms(workload: Workload) -> list[Arm]:
    """Log-probs of 1,024 selected rows and their gradient: full logits, and chunk by chunk."""
    torch.manual_seed(0)
    rows, width = workload.rollouts * workload.response, 512
    hidden = torch.randn(rows, width, requires_grad=True)
    weight = (torch.randn(workload.vocabulary, width) * 0.02).requires_grad_()
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
        chunked_logprobs(hidden, weight, None, target, chunk=256)[0].mean().backward()
        return rows

    return [
        Arm("full_logits", full, "log_softmax of all logits of the selected rows"),
        Arm("chunked", chunked, "256 rows of logits at a time, own backward"),
    ]


def sampling_arms(workload: Workload) -> list[Arm]:
    """The rollouts and branches of one step, lengths as given."""
    trees = build_trees(workload)
    policy = build_policy(workload)
    rough = Policy(policy.model, policy.tokenizer, policy.context, torch.bfloat16)
    params = SamplingParams()
    mains = _main_requests(workload, trees)

    def engine_arm(name: str, chosen: Policy, keep: int, note: str) -> Arm:
        engine = EmbeddedEngine(chosen, max_rows=64, keep_bytes=keep)

        def run() -> int:
            groups, stats = engine.sample(mains, params, keep=keep > 0)
            if workload.failed:
                _, more = engine.sample(_branch_requests(workload, trees, groups), params)
                stats += more
            engine.forget()
            return stats.sampled_tokens

        return Arm(name, run, note)

    def generate() -> int:
        tokens = 0
        for tree in trees:
            main = _generate(policy, [tree.prompt.tokens] * workload.rollouts, workload.response)
            tokens += main.numel()
            for s in range(workload.failed):
                prefix = tree.prompt.tokens + tuple(main[s, : workload.pivot].tolist())
                tokens += _generate(policy, [prefix] * workload.branches, workload.branch).numel()
        return tokens

    return [
        Arm("hf_generate", generate, "transformers' generate on repeated prompts, float32"),
        engine_arm("engine_fp32", policy, 2**31, "branches from kept keys"),
        engine_arm("engine_fp32_no_keep", policy, 0, "branches encode their prefix once per pivot"),
        engine_arm("engine_bf16", rough, 2**31, "branches from kept keys, bfloat16"),
        *spread_arms(workload, rough),
    ]


def spread_arms(workload: Workload, policy: Policy) -> list[Arm]:
    """64 requests of spread lengths (mean 94, longest 256): one static batch per prompt, and with refill."""
    random = np.random.default_rng(0)
    count, longest_of_all, mean = SPREAD
    # log-normal with sigma 0.6, whose mean is exp(mu + sigma² / 2)
    draws = random.lognormal(np.log(mean) - 0.18, 0.6, count)
    lengths = np.clip(draws, min(16, longest_of_all), longest_of_all).astype(int)
    lengths[0] = longest_of_all
    prompts = [
        tuple(int(t) for t in random.integers(10, workload.vocabulary, workload.prompt)) for _ in range(-(-count // 8))
    ]
    requests = [SampleRequest(prompts[i // 8], (rng.key("s", i),), int(n)) for i, n in enumerate(lengths)]
    refill = EmbeddedEngine(policy, max_rows=64)

    def continuous() -> int:
        return refill.sample(requests, SamplingParams())[1].sampled_tokens

    def static() -> int:
        # as a batch of one prompt's rollouts is decoded without taking out what has ended: all run to the longest
        for start in range(0, count, 8):
            part = requests[start : start + 8]
            longest = max(r.max_new_tokens for r in part)
            keys = tuple(r.keys[0] for r in part)
            refill.sample([SampleRequest(part[0].prefix, keys, longest)], SamplingParams())
        return int(lengths.sum())

    return [
        Arm("spread_static_bf16", static, "64 requests of spread lengths, one static batch per prompt"),
        Arm("spread_engine_bf16", continuous, "the same requests at once, ended rows taken out"),
    ]


def step_arms(workload: Workload, budget: int) -> list[Arm]:
    """A whole step, sampling and update: as the reference does it, and ours."""
    policy = build_policy(workload)
    policy = Policy(policy.model, policy.tokenizer, policy.context, torch.bfloat16, verdict=policy.verdict)
    trees = build_trees(workload)
    credits = [sibling_credit(tree) for tree in trees]
    config = _config(workload, budget)
    learner = Learner(policy, None, build_optimizer(policy, config.optim), config, exact_sampler=False)
    verdict = policy.verdict

    def sample(keep: int, separate: bool) -> int:
        engine = EmbeddedEngine(policy, max_rows=64, keep_bytes=keep)
        requests = _main_requests(workload, trees)
        groups, stats = engine.sample(_separate(requests) if separate else requests, SamplingParams(), keep=keep > 0)
        flat = [c for group in groups for c in group]
        whole = [flat[i : i + workload.rollouts] for i in range(0, len(flat), workload.rollouts)]
        branches = _branch_requests(workload, trees, whole)
        _, more = engine.sample(_separate(branches) if separate else branches, SamplingParams())
        return stats.sampled_tokens + more.sampled_tokens

    def per_path() -> int:
        tokens = sample(0, separate=True)
        policy.verdict = Verdict(False, "baseline")
        learner.update(trees, credits)
        return tokens

    def ours() -> int:
        tokens = sample(2**31, separate=False)
        policy.verdict = verdict
        learner.update(trees, credits)
        return tokens

    return [
        Arm("per_path", per_path, "branches as separate prompts, a row per path: the reference's way, in our code"),
        Arm("tree", ours, "prefixes shared in sampling and in learning"),
    ]


def _main_requests(workload: Workload, trees: Sequence[Tree]) -> list[SampleRequest]:
    return [
        SampleRequest(tree.prompt.tokens, tuple(rng.key(i, s) for s in range(workload.rollouts)), workload.response)
        for i, tree in enumerate(trees)
    ]


def _branch_requests(
    workload: Workload, trees: Sequence[Tree], groups: Sequence[Sequence[Completion]]
) -> list[SampleRequest]:
    """Branches of each tree's failed rollouts, from what was sampled for it."""
    return [
        SampleRequest(
            tree.prompt.tokens + group[s].tokens[: workload.pivot],
            tuple(rng.key("b", i, s, k) for k in range(workload.branches)), workload.branch,
        )
        for i, (tree, group) in enumerate(zip(trees, groups, strict=True)) for s in range(workload.failed)
    ]  # fmt: skip


def _separate(requests: Sequence[SampleRequest]) -> list[SampleRequest]:
    """Each continuation as a request of its own, told apart so that nothing is shared."""
    return [SampleRequest(r.prefix, (k,), r.max_new_tokens) for r in requests for k in r.keys]


@torch.no_grad()
def _generate(policy: Policy, prompts: Sequence[tuple[int, ...]], count: int) -> torch.Tensor:
    ids = torch.tensor(prompts, device=policy.device)
    output = policy.causal.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
        min_new_tokens=count, max_new_tokens=count, pad_token_id=0,
    )  # fmt: skip
    generated: torch.Tensor = output[:, ids.shape[1] :]
    return generated


# ---------------------------------------------------------------- the machine


def _resident(name: str) -> float | None:
    """VmRSS or VmHWM of this process in MiB, where the system tells."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith(name + ":")), None)


def _reset_peak() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def _main(part: Part, workload: WorkloadName, threads: str, budget: str, name: str) -> None:
    """What a child does for `_peak_in_child`: run one arm once and print its peak."""
    torch.set_num_threads(int(threads))
    arms, _ = _arms(part, WORKLOADS[workload], int(budget))
    print(peak_of(next(arm for arm in arms if arm.name == name)))


def _show(out: Console, options: BenchOptions, result: dict[str, Any]) -> None:
    table = Table(title=f"{options.part}, workload {options.workload}, {result['threads']} threads", title_justify="left")
    for column in ("arm", "median s", "range", f"× {result['baseline']}", "peak MB", "tokens", ""):
        table.add_column(column, justify="left" if column in ("arm", "") else "right")
    for row in result["arms"]:
        ratio = result["ratios"].get(row["name"])
        table.add_row(
            row["name"], f"{row['median_s']:.2f}", f"{row['min_s']:.2f}–{row['max_s']:.2f}",
            "" if ratio is None else f"{ratio:.2f}", "" if row["peak_mb"] is None else f"{row['peak_mb']:.0f}",
            f"{row['tokens']:,}", row["note"],
        )  # fmt: skip
    out.print(table)
    if "cost_model" in result:
        model = result["cost_model"]
        out.print(
            f"cost model: {model['path_tokens']:,} tokens on paths, {model['unique_tokens']:,} unique "
            f"(ratio {model['token_ratio']:.2f}), {model['terms']:,} trained: expect {model['predicted_ratio']:.2f}"
        )
    out.print(f"{result['machine']['processor']}, load {result['machine']['load']:.1f}, torch {result['versions']['torch']}")


if __name__ == "__main__":
    _main(*sys.argv[1:])  # type: ignore[arg-type]
