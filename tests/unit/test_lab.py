"""Benchmarks and doctor: that they compute what they say, on a workload of a few tokens."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from commands import Starter
from rich.console import Console
from surroundings import ROOT

from benchmarks import harness as bench
from benchmarks.arms import Arm, Suite, Timed
from benchmarks.harness import Timing
from benchmarks.options import BenchOptions
from benchmarks.suites import sampling
from benchmarks.suites.learner import cost_model
from benchmarks.workloads import WORKLOADS, Workload, build_trees
from deepgrpo.errors import ConfigError, ModelError
from deepgrpo.lab import model_check
from deepgrpo.lab.doctor import run_doctor
from deepgrpo.lab.options import DoctorOptions
from deepgrpo.prompts import synthetic

SMALL = Workload(
    "S", prompts=2, prompt=4, rollouts=3, response=8, failed=2, branches=2, vocabulary=64, hidden=64, layers=2
)  # fmt: skip


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
    assert baseline in names
    assert set(result["ratios"]) == set(names)
    for arm in result["arms"]:
        assert arm["min_s"] > 0 and arm["tokens"] > 0 and arm["peak_mb"] is None
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


def report_of(seconds: dict[str, list[float]], **suite: Any) -> dict[str, Any]:
    """The report on arms that took these seconds."""
    arms = [Arm(name, lambda: 1) for name in seconds]
    timings = [Timing(name, each, tokens=10) for name, each in seconds.items()]
    return bench.report(BenchOptions("learner", "S"), Suite("slow", [], **suite), arms, timings)


def test_ratios_say_how_many_times_faster_an_arm_is() -> None:
    """Medians 8, 2 and 4 s: against `slow` 1, 4 and 2 times as fast; `fast` against `middle` 4 / 2 = 2 times."""
    seconds = {"slow": [9.0, 8.0, 1.0], "fast": [2.0, 3.0, 1.0], "middle": [4.0, 4.0, 5.0]}
    found = report_of(seconds, pairs=[("fast", "middle"), ("fast", "absent")])
    assert found["ratios"] == {"slow": 1.0, "fast": 4.0, "middle": 2.0} and found["pairs"] == {"fast/middle": 2.0}
    first = found["arms"][0]
    assert (first["min_s"], first["median_s"], first["max_s"], first["tokens"]) == (1.0, 8.0, 9.0, 10)


def test_other_work_has_no_ratio_and_the_model_a_fraction_of_its_forecast() -> None:
    """`tree` is 4 times as fast where the cost model expects 5: 80% of that."""
    extra: dict[str, Any] = {"cost_model": {"predicted_ratio": 5.0}}
    found = report_of({"slow": [8.0], "tree": [2.0], "other": [1.0]}, apart=frozenset({"other"}), extra=lambda: extra)
    assert found["ratios"] == {"slow": 1.0, "tree": 4.0} and found["cost_model"]["fraction"] == 0.8
    assert report_of({"fast": [2.0]})["ratios"] == {}  # the baseline has not run


def test_the_cost_model_by_hand() -> None:
    """A trunk of 100 parameters and a head of 10; 30 tokens on paths, 10 unique, 5 trained.

    Rows 6·100·30 + 8·10·5 = 18,400 operations, packs 6·100·10 + 8·10·5 = 6,400: 2.875 times as many.
    """
    head = torch.zeros(10)
    policy: Any = SimpleNamespace(
        causal=SimpleNamespace(get_output_embeddings=lambda: SimpleNamespace(weight=head)),
        model=SimpleNamespace(parameters=lambda: [torch.zeros(100), head]),
    )
    assert cost_model(policy, 30, 10, 5) == {
        "path_tokens": 30, "unique_tokens": 10, "terms": 5, "token_ratio": 3.0, "predicted_ratio": 2.875,
    }  # fmt: skip


def test_only_what_an_arm_says_is_counted_after_the_rounds_that_warm_up() -> None:
    runs: list[int] = []

    def peer() -> Timed:
        runs.append(1)
        return Timed(tokens=7, seconds=float(len(runs)))  # 1, 2, 3, ... and nothing that the call took besides

    (measured,) = bench.measure([Arm("peer", peer)], repeats=2, warmup=3)
    assert measured.seconds == [4.0, 5.0] and measured.tokens == 7


def test_memory_is_measured_in_a_process_of_its_own(commands: Starter, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the log-probs of S, 2,048 · 8,192 logits, that is 64 MiB: all at once, softmax and gradients beside them."""

    def forked(command: list[str], cwd: Path, **how: Any) -> Any:
        assert command[:2] == [sys.executable, "-m"]
        return commands.run(*command[3:], cwd=cwd, module=command[2], PYTHONPATH=str(ROOT))

    monkeypatch.setattr(bench, "subprocess", SimpleNamespace(run=forked))
    options = BenchOptions("logprobs", "S", threads=1)
    full, chunked = (bench.peak_in_child(options, arm) for arm in ("full_logits", "chunked"))
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
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
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


def test_doctor_fails_where_sampler_and_learner_disagree(
    policy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A learner whose log-probs are off by 0.02, twice what float32 is allowed: exit code 1, and by how much."""
    policy.save(tmp_path / "model")
    honest = type(policy).logprobs

    def shifted(self: Any, *arguments: Any, **options: Any) -> Any:
        found, entropy = honest(self, *arguments, **options)
        return found + 0.02, entropy

    monkeypatch.setattr(type(policy), "logprobs", shifted)
    out = console()
    assert run_doctor(DoctorOptions(str(tmp_path / "model")), out) == 1
    text = " ".join(out.file.getvalue().split())  # type: ignore[attr-defined]
    assert "embedded sampling no: its log-probs and the learner's agree within 2e-02" in text


@pytest.mark.parametrize(("gain", "says"), [(1.29, "1.3 times as fast as in float32: not worth"), (1.31, "float32: worth")])
def test_doctor_advises_bfloat16_where_it_gains_enough(
    policy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gain: float, says: str
) -> None:
    policy.save(tmp_path / "model")
    monkeypatch.setattr(model_check, "bfloat16_gain", lambda policy: gain)
    out = console()
    assert run_doctor(DoctorOptions(str(tmp_path / "model")), out) == 0
    assert says in " ".join(out.file.getvalue().split())  # type: ignore[attr-defined]


def test_the_gain_of_bfloat16_is_seconds_of_float32_over_its_own(policy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Six products in float32 of 3 s each, then six in bfloat16 of 2 s: 1.5 times as fast."""
    ends = iter([value for seconds in [3.0] * 6 + [2.0] * 6 for value in (0.0, seconds)])
    monkeypatch.setattr(model_check.time, "perf_counter", lambda: next(ends))
    assert model_check.bfloat16_gain(policy) == 1.5


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


def test_the_help_of_the_benchmarks_lists_their_parts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from benchmarks.__main__ import main

    monkeypatch.setattr("sys.argv", ["benchmarks", "--help"])
    with pytest.raises(SystemExit):
        main()
    said = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for part in ("learner", "logprobs", "sampling", "step", "distribution", "busy"):
        assert f"{part}: " in said, said
