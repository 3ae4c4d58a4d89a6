"""The whole path on a real CUDA device, against the CPU; `make test-cuda` runs it. Skipped where there is no device.

float32 on both devices differs by the order of its sums, so figures are compared to a tolerance. The pretended device of
tests/pretend compares bit by bit, and cannot see kernels.
"""

from __future__ import annotations

import io
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from pretend.scenes import BASE, HELD_OUT, recipe
from tiny import save_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(300),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CUDA = torch.device("cuda")
TIMED = ("time/", "ledger/seconds_", "tokens_per_s", "memory/")


def lines(directory: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if not key.startswith(TIMED)} for line in found]


def apart(a: dict[str, Any], b: dict[str, Any], relative: float) -> dict[str, tuple[Any, Any]]:
    """Figures of two lines that differ by more than rounding."""

    def equal(x: Any, y: Any) -> bool:
        if isinstance(x, float | int) and isinstance(y, float | int):
            return math.isclose(x, y, rel_tol=relative, abs_tol=relative) or (x != x and y != y)
        return bool(x == y)

    return {key: (a.get(key), b.get(key)) for key in {**a, **b} if not equal(a.get(key), b.get(key))}


RUNS: dict[str, dict[str, Any]] = {
    "deep": {},
    "rows": {"explore": {"type": "root", "num_rollouts": 6}, "learner": {"tree_packing": "off", "tokens_per_pack": 384}},
    "checkpointing": {"learner": {"gradient_checkpointing": True, "tokens_per_pack": 384}},
    "attnrl": {
        "explore": {
            "type": "attnrl", "num_rollouts": 3, "num_pivots": 2, "branches_per_pivot": 2, "top_share": 0.5, "lag": 1,
            "segments": {"type": "tokens", "size": 3},
        },
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", RUNS)
def test_the_first_step_equals_the_cpus(tmp_path: Path, kind: str) -> None:
    """Sampling from the same seeds, reward, credit, packs or rows, KL and AdamW; the second starts from other roundings."""
    from deepgrpo.train.loop import train

    found = []
    for device in ("cpu", "cuda"):
        sections = {**RUNS[kind], "run": {"device": device}}
        found.append(lines(train(recipe(str(tmp_path), f"{kind}-{device}", 1, **sections))))
    assert found[0][-1]["grad_norm"] > 0
    assert apart(found[0][-1], found[1][-1], 2e-3) == {}


def test_a_run_that_is_resumed(tmp_path: Path) -> None:
    """Warm start, evaluation, checkpoint, resume: the resumed step is the uninterrupted one to rounding."""
    from deepgrpo.config import load_recipe
    from deepgrpo.train.loop import train

    sections: dict[str, Any] = {
        "run": {"device": "cuda"}, "warmstart": {"steps": 6, "batch_size": 8, "lr": 1e-2, "check_every": 3},
        "eval": {"every": 1, "limit": 3, "samples": 1, "data": HELD_OUT}, "checkpoint": {"every": 1},
    }  # fmt: skip
    whole = train(recipe(str(tmp_path), "whole", 2, **sections))
    half = tmp_path / "half"
    shutil.copytree(whole, half)
    shutil.rmtree(half / "checkpoints" / "step-000002")
    kept = (half / "metrics.jsonl").read_text().splitlines()
    (half / "metrics.jsonl").write_text("".join(f"{line}\n" for line in kept if json.loads(line)["step"] < 2))
    train(load_recipe(half / "config.toml", [("run.steps", "2")]), resume=half)
    assert apart(lines(whole)[-1], lines(half)[-1], 2e-3) == {}


def policy(device: torch.device, dtype: torch.dtype = torch.float32, length: int = 512, family: str = "qwen2") -> Any:
    """A small policy whose choices no rounding decides; heads of 32 dimensions."""
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

    from deepgrpo.model.policy import Policy
    from deepgrpo.prompts import synthetic

    tokenizer = synthetic.tokenizer()
    shape = {
        "vocab_size": len(tokenizer), "hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": length, "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
    }  # fmt: skip
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(**shape)) if family == "qwen2" else LlamaForCausalLM(LlamaConfig(**shape))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(3.0)
    return replace(Policy(model.eval().to(device), tokenizer, length), dtype=dtype)


@pytest.mark.parametrize("kernel", ["flex", "gather"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_kernel_passes_the_gate(kernel: str, dtype: torch.dtype) -> None:
    from deepgrpo.model.tree_gate import judge_model

    for family in ("qwen2", "llama"):
        verdict = judge_model(policy(CUDA, family=family).causal, dtype, kernel)  # type: ignore[arg-type]
        assert verdict.packs and verdict.kernel == kernel, verdict.reason


def requests(vocabulary: int) -> list[Any]:
    from deepgrpo import rng
    from deepgrpo.records import SampleRequest

    random = np.random.default_rng(1)
    prefixes = [tuple(int(t) for t in random.integers(2, vocabulary, n)) for n in (4, 17, 30)]
    return [SampleRequest(p, tuple(rng.key(i, s) for s in range(4)), 40) for i, p in enumerate(prefixes)]


def test_the_engine_samples_what_the_cpu_samples() -> None:
    from deepgrpo.engines.base import SamplingParams
    from deepgrpo.engines.embedded.engine import EmbeddedEngine

    for params in (SamplingParams(greedy=True), SamplingParams(temperature=0.9, top_p=0.9), SamplingParams()):
        found = []
        for device in (torch.device("cpu"), CUDA):
            one = policy(device)
            with_slots = EmbeddedEngine(one, max_rows=6, keep_bytes=2**22)
            completions, _ = with_slots.sample(requests(len(one.tokenizer)), params, keep=True)
            with_slots.close()
            found.append([each for group in completions for each in group])
        for here, there in zip(*found, strict=True):
            assert here.tokens == there.tokens
            assert np.allclose(here.logprobs, there.logprobs, atol=2e-3)


def test_greedy_equals_generate() -> None:
    from deepgrpo.engines.base import SamplingParams
    from deepgrpo.engines.embedded.engine import EmbeddedEngine

    one = policy(CUDA)
    engine = EmbeddedEngine(one, max_rows=8)
    wanted = requests(len(one.tokenizer))
    completions, _ = engine.sample(wanted, SamplingParams(greedy=True))
    for request, group in zip(wanted, completions, strict=True):
        prompt = torch.tensor([request.prefix], device=CUDA)
        with torch.no_grad():
            expected = one.causal.generate(prompt, max_new_tokens=40, do_sample=False, pad_token_id=0)[0, prompt.shape[1] :]
        assert group[0].tokens == tuple(expected.tolist())[: len(group[0].tokens)]
    engine.close()


@pytest.mark.parametrize(("dtype", "limit"), [("float32", 2e-3), ("bfloat16", 0.1)])
def test_packs_and_rows_move_the_weights_alike(dtype: str, limit: float) -> None:
    """An update on the same trees with flex attention over packs and with a row per path."""
    from benchmarks.workloads import Workload, build_trees
    from deepgrpo.credit.siblings import sibling_credit
    from deepgrpo.train.learner import Learner
    from deepgrpo.train.optim import build_optimizer

    found = []
    for layout in ("auto", "off"):
        one = policy(CUDA, getattr(torch, dtype))
        if layout == "auto":
            verdict = one.try_tree_packing()
            assert verdict.packs and verdict.kernel == "flex", verdict.reason
        small = Workload("S", 2, 20, 3, 60, 2, 2, vocabulary=len(one.tokenizer))
        config = recipe("unused", "none", 1, loss={"beta": 0.1}, learner={
            "dtype": dtype, "tree_packing": layout, "tokens_per_pack": 512,
        }, optim={"lr": 1e-3, "eps": 1e-4})  # fmt: skip
        trees = build_trees(small)
        learner = Learner(one, None, build_optimizer(one, config.optim), config)
        learner.freeze_reference()
        metrics = learner.update(trees, [sibling_credit(tree) for tree in trees]).metrics
        found.append(metrics)
    assert math.isclose(found[0]["grad_norm"], found[1]["grad_norm"], rel_tol=limit)
    assert found[0]["grad_norm"] > 0


def test_adapters_over_bfloat16_and_the_commands(tmp_path: Path) -> None:
    """A run with adapters over a base in bfloat16, then eval, probe, doctor and profile on the device."""
    from deepgrpo.config.files import to_toml
    from deepgrpo.eval.command import evaluate_model
    from deepgrpo.eval.options import EvalOptions
    from deepgrpo.lab.doctor import run_doctor
    from deepgrpo.lab.options import DoctorOptions, ProbeOptions
    from deepgrpo.lab.probe.command import run_probe
    from deepgrpo.train.loop import train

    quiet = Console(file=io.StringIO(), width=200)
    model = save_model(tmp_path / "llama", dtype="bfloat16")
    config = recipe(
        str(tmp_path), "adapters", 2, run={"device": "cuda"},
        model={"type": "pretrained", "path": model, "lora": {"rank": 4, "alpha": 8}},
        learner={"gradient_checkpointing": True, "dtype": "bfloat16"}, optim={"lr": 1e-2, "eps": 1e-4},
    )  # fmt: skip
    directory = train(config)
    assert all(math.isfinite(line["grad_norm"]) for line in lines(directory))
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"question": "1 + 1 = ?", "answer": "2"}\n{"question": "2 + 3 = ?", "answer": "5"}\n')
    assert evaluate_model(EvalOptions(str(directory), (str(rows),), samples=1, max_new_tokens=3, device="cuda"), quiet) == 0
    assert run_doctor(DoctorOptions(model, device="cuda"), quiet) == 0
    scratch = tmp_path / "scratch.toml"
    scratch.write_text(to_toml(recipe(str(tmp_path), "probe", 1, run={"device": "cuda"})))
    options = ProbeOptions(str(scratch), strategies=("root", "deep"), prompts=8, reference=12, projection=64, device="cuda")
    assert run_probe(options, console=quiet) == 0


def test_the_peak_of_an_update_is_within_the_estimate() -> None:
    """Weights, gradient and moments are 16 bytes a parameter; what is held between two updates is no more."""
    from benchmarks.workloads import Workload, build_trees
    from deepgrpo.credit.siblings import sibling_credit
    from deepgrpo.train.learner import Learner
    from deepgrpo.train.optim import build_optimizer

    before = torch.cuda.memory_allocated()
    one = policy(CUDA)
    count = sum(p.numel() for p in one.causal.parameters())
    config = recipe("unused", "none", 1, loss={"beta": 0.0}, learner={"tokens_per_pack": 512})
    learner = Learner(one, None, build_optimizer(one, config.optim), config)
    trees = build_trees(Workload("S", 2, 20, 3, 60, 2, 2, vocabulary=len(one.tokenizer)))
    learner.update(trees, [sibling_credit(tree) for tree in trees])
    held = torch.cuda.memory_allocated() - before
    assert 12 * count <= held <= 16 * count + 2**21


def test_a_shortage_of_memory_says_what_to_lower(tmp_path: Path) -> None:
    from deepgrpo.errors import TrainingError
    from deepgrpo.train.loop import train

    torch.cuda.empty_cache()
    held = torch.cuda.memory_reserved() + 2**26  # what is there, and 64 MiB
    torch.cuda.set_per_process_memory_fraction(held / torch.cuda.get_device_properties(0).total_memory)
    wide = {**BASE["model"], "max_position": 2048, "hidden_size": 512, "intermediate_size": 1024, "num_layers": 4}
    try:
        with pytest.raises((TrainingError, torch.OutOfMemoryError)) as found:
            train(recipe(str(tmp_path), "short", 1, run={"device": "cuda"}, model=wide, loss={"beta": 0.0}))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    print(found.value)
