"""Other people's software in the benchmarks: it does the same work, is timed over the right part, or is left out.

TRL and transformers run for real. vLLM needs an environment of its own: here a stand-in of a few lines takes its place in
the child's process, so what is tested is everything around it.
"""

from __future__ import annotations

import io
import json
import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from vllm_here import HERE

from benchmarks import harness as bench
from benchmarks.arms import BenchSetting
from benchmarks.baselines import trl_trainer as trl_peer
from benchmarks.baselines import vllm_sampling as vllm_peer
from benchmarks.baselines.hf_generate import plain_copy
from benchmarks.options import BenchOptions
from benchmarks.workloads import WORKLOADS, Workload, build_policy, build_trees
from deepgrpo.engines.base import SampleStats
from deepgrpo.engines.vllm.engine import PYTHON
from deepgrpo.errors import ConfigError, EngineError
from deepgrpo.records import Completion

SMALL = Workload(
    "S", prompts=2, prompt=4, rollouts=3, response=8, failed=2, branches=2, vocabulary=64, hidden=64, layers=2
)  # fmt: skip
TOKENS = 2 * (3 * 8 + 2 * 2 * 2)
"""Two trees of three rollouts of 8 tokens, and of two pivots with two branches of 2."""


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Runs arms of a part on the small workload; (what the JSON says, what was printed)."""
    monkeypatch.setitem(WORKLOADS, "S", SMALL)
    monkeypatch.delenv(PYTHON, raising=False)

    def call(part: Any, *arms: str, **options: Any) -> tuple[dict[str, Any], str]:
        out, path = io.StringIO(), tmp_path / "figures.json"
        chosen = BenchOptions(part, "S", repeats=1, warmup=0, threads=1, arms=arms, memory=False, json=path)
        bench.run_bench(replace(chosen, **options), Console(file=out, width=200))
        return json.loads(path.read_text()), " ".join(out.getvalue().split())

    return call


# ---------------------------------------------------------------- transformers


def test_the_copy_for_peers_has_their_own_attention() -> None:
    policy = build_policy(SMALL)
    assert policy.causal.config._attn_implementation == "deepgrpo"
    copied = plain_copy(policy, torch.bfloat16)
    assert copied.config._attn_implementation == "sdpa"
    assert {p.dtype for p in copied.parameters()} == {torch.bfloat16}
    assert {b.dtype for b in copied.buffers()} == {torch.float32}  # rotary frequencies
    assert policy.causal.config._attn_implementation == "deepgrpo"
    assert {p.dtype for p in policy.causal.parameters()} == {torch.float32}


def test_continuous_batching_runs_if_asked_for(run: Any) -> None:
    result, _ = run("sampling", "hf_continuous", "engine_fp32")
    assert {arm["name"]: arm["tokens"] for arm in result["arms"]} == {"hf_continuous": TOKENS, "engine_fp32": TOKENS}
    assert set(result["pairs"]) == {"engine_fp32/hf_continuous"}
    assert result["ratios"] == {}  # the baseline has not run


# ---------------------------------------------------------------- TRL

# between TRL and transformers, nothing that we call
quiet = pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning")


@quiet
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_of_trl_is_counted_from_sampling_to_the_optimizer(dtype: Any) -> None:
    pytest.importorskip("trl")
    policy = build_policy(SMALL)
    seen: list[str] = []
    with ExitStack() as closing:
        # a budget of 40 tokens holds 3 rows of 12: two micro-batches
        trainer, clock = trl_peer.build_trainer(BenchSetting(SMALL, 40, 1, closing), policy, SMALL, dtype, False)
        assert (trainer.args.per_device_train_batch_size, trainer.args.gradient_accumulation_steps) == (3, 2)

        def listen(owner: Any, name: str, word: str) -> None:
            function = getattr(owner, name)

            def listening(*args: Any, **kwargs: Any) -> Any:
                seen.append(word)
                if word == "sample":
                    wanted = [list(tree.prompt.tokens) for tree in build_trees(SMALL) for _ in range(3)]
                    assert args[0] == wanted
                return function(*args, **kwargs)

            setattr(owner, name, listening)

        listen(clock, "on_step_begin", "begin")
        listen(clock, "on_step_end", "end")
        listen(trainer, "_generate_single_turn", "sample")
        listen(trainer, "compute_loss", "loss")
        for _ in range(2):
            clock.tokens, clock.seconds = 0, 0.0
            trainer.train()
            assert clock.tokens == 2 * 3 * 8 and clock.seconds > 0
        assert seen == ["begin", "sample", "loss", "loss", "end"] * 2
        # the second step went on with the moments of the first
        assert {int(state["step"]) for state in trainer.optimizer.state.values()} == {2}
        assert {p.dtype for p in trainer.model.parameters()} == {dtype}


def test_trl_runs_beside_ours(run: Any) -> None:
    trl = pytest.importorskip("trl")
    result, _ = run("step", "grpo", "trl_grpo", "trl_grpo_continuous", "grpo_bf16", "trl_grpo_bf16")
    assert {arm["tokens"] for arm in result["arms"]} == {2 * 3 * 8}
    assert set(result["pairs"]) == {"grpo/trl_grpo", "grpo/trl_grpo_continuous", "grpo_bf16/trl_grpo_bf16"}
    assert result["versions"]["trl"] == trl.__version__


def test_without_trl_its_arms_are_left_out(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trl", None)
    result, text = run("step", "grpo", "trl_grpo")
    assert [arm["name"] for arm in result["arms"]] == ["grpo"]
    assert "arm trl_grpo left out: TRL is not installed; pip install 'trl==1.16.*'" in text
    with pytest.raises(ConfigError, match=r"no arm is left of trl_grpo"):
        run("step", "trl_grpo")


# ---------------------------------------------------------------- vLLM

def test_vllm_samples_rollouts_and_then_branches_from_them(
    run: Any, stand_in: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(PYTHON, sys.executable)
    # a child would not know of the small workload; it is tested in test_lab.py
    measured: list[str] = []
    monkeypatch.setattr(bench, "peak_in_child", lambda options, arm: measured.append(arm))
    result, _ = run("sampling", "engine_bf16", "vllm_bf16", "vllm_bf16_no_prefix", repeats=2, memory=True)
    assert measured == ["engine_bf16"]
    assert {arm["tokens"] for arm in result["arms"]} == {TOKENS}
    assert {"engine_bf16/vllm_bf16", "vllm_bf16/vllm_bf16_no_prefix"} <= set(result["pairs"])
    assert result["versions"]["vllm"] == "0.32.9"
    peaks = {arm["name"]: arm["peak_mb"] for arm in result["arms"]}
    assert peaks["vllm_bf16"] is None or peaks["vllm_bf16"] > 1  # it tells its own
    heard = [one for one in stand_in() if one["caching"]]
    start, _, *rounds = heard
    assert start["threads"] == "1" and "model.safetensors" in start["files"]
    assert start["settings"]["dtype"] == "bfloat16" and start["settings"]["max_model_len"] == 12
    assert not Path(start["settings"]["model"]).exists()  # tidied up
    # each of the two runs forgets what the one before encoded, then samples twice
    assert [one["what"] for one in rounds] == ["reset", "generate", "generate"] * 2
    trees = build_trees(SMALL)
    mains, branches = rounds[1], rounds[2]
    assert mains["prompts"] == [list(tree.prompt.tokens) for tree in trees for _ in range(3)]
    assert {(p["max_tokens"], p["logprobs"], p["ignore_eos"]) for p in mains["params"]} == {(8, 0, True)}
    assert mains["params"][0]["stop_token_ids"] == []  # nothing ends a text
    # rollouts were 10 .. 17, 18 .. 25, ...; the first two of each tree go on after 6 of their 8 tokens, twice
    expected = [[*tree.prompt.tokens, *range(first, first + 6)] for tree, begin in zip(trees, (10, 34), strict=True)
                for first in (begin, begin + 8) for _ in range(2)]  # fmt: skip
    assert branches["prompts"] == expected
    assert {p["max_tokens"] for p in branches["params"]} == {2}


def test_only_vllms_own_seconds_are_counted() -> None:
    class Engine:
        vllm_seconds = 3.0

        def drop_prefixes(self) -> None:
            pass

        def sample(self, requests: Any, params: Any) -> Any:
            self.vllm_seconds += 0.75
            groups = [[Completion((10,) * r.max_new_tokens, (-1.0,), "length") for _ in r.keys] for r in requests]
            return groups, SampleStats(sampled_tokens=sum(len(c.tokens) for g in groups for c in g), seconds=9.0)

    engine: Any = Engine()
    assert vllm_peer.sample(engine, SMALL, build_trees(SMALL)) == (TOKENS, 1.5)


def test_vllm_that_cannot_start_is_quoted(run: Any, stand_in: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BROKEN", "no such instruction")
    with pytest.raises(EngineError, match=r"could not start: RuntimeError: no such instruction"):
        run("sampling", "vllm_bf16", vllm_python=Path(sys.executable))


def test_vllm_that_samples_too_little_is_found_out(run: Any, stand_in: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHORT", "1")
    with pytest.raises(EngineError, match=r"vLLM sampled \d+ tokens and not 64"):
        run("sampling", "vllm_bf16", vllm_python=Path(sys.executable))


@pytest.mark.skipif(HERE, reason="vLLM is in this environment")
def test_without_an_environment_vllm_is_left_out(run: Any, tmp_path: Path) -> None:
    result, text = run("sampling", "engine_bf16", "vllm_bf16")
    assert [arm["name"] for arm in result["arms"]] == ["engine_bf16"]
    assert "arm vllm_bf16 left out: no environment with vLLM is named; make one" in text and "--vllm-python" in text
    with pytest.raises(ConfigError, match="is no file"):
        run("sampling", "vllm_bf16", vllm_python=tmp_path / "python")
