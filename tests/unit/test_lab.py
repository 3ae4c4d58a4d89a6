"""Benchmarks and doctor: that they compute what they say, on a workload of a few tokens."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from benchmarks import harness as bench
from benchmarks.arms import Arm, Timed
from benchmarks.options import BenchOptions
from benchmarks.suites import sampling
from benchmarks.workloads import WORKLOADS, Workload, build_trees
from deepgrpo.errors import ConfigError, ModelError
from deepgrpo.lab.doctor import run_doctor
from deepgrpo.lab.options import DoctorOptions
from deepgrpo.prompts import synthetic

SMALL = Workload("S", prompts=2, prompt=4, rollouts=3, response=8, failed=2, branches=2, vocabulary=64)


def console() -> Console:
    return Console(file=io.StringIO(), width=120)


def test_workload_s_is_what_it_says() -> None:
    """Prompt 128; 8 × 256; 5 × 8 branches of 64 from 75%: on paths 8·384 + 40·384 = 18,432, unique 4,736 tokens."""
    (tree,) = build_trees(WORKLOADS["S"])
    assert sum(len(tree.path(i)) for i in range(len(tree.nodes))) == 18_432
    assert len(tree.prompt.tokens) + sum(len(node.tokens) for node in tree.nodes) == 4_736
    assert {(p.parent, p.offset, p.num_branches) for p in tree.pivots[1:]} == {(i, 192, 8) for i in range(5)}


@pytest.mark.parametrize("part", ["learner", "sampling", "step", "logprobs"])
def test_a_benchmark_reports_arms_and_ratios(part: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(WORKLOADS, "S", SMALL)
    monkeypatch.setattr(sampling, "SPREAD", (8, 4, 2.0))
    monkeypatch.setitem(sys.modules, "trl", None)  # has tests of its own
    path = tmp_path / "out" / "figures.json"
    out = console()
    # memory would be looked at by a child, which would not know of the small workload: that part is tested below
    options = BenchOptions(part, "S", repeats=2, threads=1, memory=False, json=path)
    assert bench.run_bench(options, out) == 0
    result = json.loads(path.read_text())
    names = [arm["name"] for arm in result["arms"]]
    medians = {arm["name"]: arm["median_s"] for arm in result["arms"]}
    baseline = result["baseline"]
    assert baseline in names and result["ratios"][baseline] == 1.0
    assert set(result["ratios"]) == set(names)
    for arm in result["arms"]:
        assert 0 < arm["min_s"] <= arm["median_s"] <= arm["max_s"]
        assert arm["tokens"] > 0 and arm["peak_mb"] is None
    text = " ".join(out.file.getvalue().split())  # type: ignore[attr-defined]
    for pair, ratio in result["pairs"].items():
        ours, other = pair.split("/")
        assert ratio == medians[other] / medians[ours]
        assert f"{ours} against {other}: {ratio:.2f}×" in text
    tokens = {arm["name"]: arm["tokens"] for arm in result["arms"]}
    if part == "learner":
        # paths: 2 trees of 3 · 12 + 4 · 12; unique: 2 trees of 4 + 3 · 8 + 4 · 2
        assert tokens["per_path"] == 168 and tokens["tree"] == 72
        model = result["cost_model"]
        assert model["unique_tokens"] == 72
        assert model["fraction"] == result["ratios"]["tree"] / model["predicted_ratio"]
        assert f"expect {model['predicted_ratio']:.2f}; tree has {model['fraction']:.0%} of that" in text
    if part == "step":
        # rollouts: 2 trees of 3 · 8, branches: 2 trees of 4 · 2
        assert tokens == {
            "per_path": 64, "per_path_merged": 64, "tree": 64, "tree_bf16": 64, "grpo": 48, "grpo_bf16": 48
        }  # fmt: skip
        assert set(result["pairs"]) == {"tree/per_path_merged", "tree_bf16/tree"}
    if part == "sampling":
        spread = {name for name in names if name.startswith("spread")}
        assert spread == {"spread_static_bf16", "spread_engine_bf16"}
        assert {tokens[name] for name in set(names) - spread} == {64}
        assert "hf_continuous" not in names  # must be asked for
        assert "engine_bf16/hf_generate_bf16" in result["pairs"]


def test_only_what_an_arm_says_is_counted_after_the_rounds_that_warm_up() -> None:
    runs: list[int] = []

    def peer() -> Timed:
        runs.append(1)
        return Timed(tokens=7, seconds=float(len(runs)))  # 1, 2, 3, ... and nothing that the call took besides

    (measured,) = bench.measure([Arm("peer", peer)], repeats=2, warmup=3)
    assert measured.seconds == [4.0, 5.0] and measured.tokens == 7


def test_memory_is_measured_in_a_process_of_its_own() -> None:
    """Of the log-probs of S, 2,048 · 8,192 logits, that is 64 MiB: all at once, softmax and gradients beside them."""
    options = BenchOptions("logprobs", "S", threads=1)
    full, chunked = (bench._peak_in_child(options, arm) for arm in ("full_logits", "chunked"))
    if full is None or chunked is None:
        pytest.skip("this system does not tell")
    assert full > 128 > chunked > 0


def test_a_benchmark_measures_something() -> None:
    with pytest.raises(ConfigError, match="--repeats is 0"):
        bench.run_bench(BenchOptions("logprobs", "S", repeats=0), console())


def test_the_peak_of_memory_is_that_of_one_arm() -> None:
    """In a process of its own, as in use: this one may hold free memory that the arm would be given."""
    code = (
        "import torch; from benchmarks.harness import Arm, peak_of; kept = []; "
        "print(peak_of(Arm('big', lambda: len(kept) or kept.append(torch.ones(16, 2**20)) or 1)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    if done.stdout.strip() == "None":
        pytest.skip("this system does not tell")
    assert 60 < float(done.stdout) < 100  # 16 · 2^20 floats are 64 MiB


def test_an_unknown_arm_is_named() -> None:
    with pytest.raises(ConfigError, match="'treee' is not one of full_logits, chunked"):
        bench.run_bench(BenchOptions("logprobs", "S", arms=("treee",)), console())


def test_doctor_tells_what_a_model_can(policy: Any, tmp_path: Path) -> None:
    policy.save(tmp_path / "model")
    out = console()
    assert run_doctor(DoctorOptions(str(tmp_path / "model")), out) == 0
    text = out.file.getvalue()  # type: ignore[attr-defined]
    for words in ("tree packing", "yes (cascade)", "in chunks", "no: set template.chat", "embedded sampling"):
        assert words in text


def test_doctor_says_how_a_recurrent_model_is_sampled_from(tmp_path: Path) -> None:
    from transformers import MambaConfig, MambaForCausalLM

    model = MambaForCausalLM(MambaConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1, state_size=4))
    model.save_pretrained(tmp_path / "mamba")
    synthetic.tokenizer().save_pretrained(tmp_path / "mamba")
    out = console()
    assert run_doctor(DoctorOptions(str(tmp_path / "mamba")), out) == 0
    text = " ".join(out.file.getvalue().split())  # type: ignore[attr-defined]
    assert "its family does not take attention functions" in text
    assert "sampled by the model's own generate: mamba has layers of type" in text
    assert re.search(r"bfloat16 matrix products \d+\.\d times as fast", text)


def test_doctor_needs_a_model() -> None:
    with pytest.raises(ModelError, match="nowhere"):
        run_doctor(DoctorOptions("nowhere/at-all/here"), console())
