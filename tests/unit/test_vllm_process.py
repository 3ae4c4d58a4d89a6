"""Around vLLM: what is sent to it, what is made of its answers, and what is said when it fails.

A stand-in of a few lines takes vLLM's place in the child's process; tests/with_vllm has the real one.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm_here import HERE, vllm_engine

from deepgrpo.config import Config, VLLMEngineConfig, load_recipe, parse_config, to_toml
from deepgrpo.engines.base import SamplingParams
from deepgrpo.engines.stops import first_stop
from deepgrpo.engines.vllm import child
from deepgrpo.engines.vllm.engine import PYTHON, own_gpu_first
from deepgrpo.engines.vllm.weights import fingerprint
from deepgrpo.errors import ConfigError, EngineError, ModelError
from deepgrpo.model.merge import merged_state
from deepgrpo.records import SampleRequest

REQUEST = SampleRequest((3, 4, 5), (7, 2**64 - 1), 4)


@pytest.fixture
def start(stand_in: Any, policy: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Starts engines on the stand-in, and ends them."""
    monkeypatch.delenv(PYTHON, raising=False)
    made: list[Any] = []

    def build(**config: Any) -> Any:
        made.append(vllm_engine(policy, **config))
        return made[-1]

    yield build
    for engine in made:
        engine.close()


def test_what_is_asked_and_answered(start: Any, stand_in: Any, policy: Any) -> None:
    engine = start(options={"tensor_parallel_size": 2})
    groups, stats = engine.sample([REQUEST], SamplingParams(temperature=0.5, top_p=0.9, top_k=7, repetition_penalty=1.2))
    begun, trial, asked = stand_in()
    assert trial["what"] == "trial"
    settings = begun["settings"]
    assert (settings["logprobs_mode"], settings["generation_config"]) == ("processed_logprobs", "vllm")
    assert (settings["block_size"], settings["tensor_parallel_size"]) == (32, 2)
    assert settings["kv_cache_memory_bytes"] == 2**28 and not settings["enable_sleep_mode"]
    # a request per key; the second key does not fit into 63 bits
    assert asked["prompts"] == [[3, 4, 5], [3, 4, 5]] and [p["seed"] for p in asked["params"]] == [7, 2**63 - 1]
    assert {(p["temperature"], p["top_p"], p["max_tokens"], p["detokenize"]) for p in asked["params"]} == {(0.5, 0.9, 4, False)}
    assert {(p["top_k"], p["min_p"], p["repetition_penalty"]) for p in asked["params"]} == {(7, 0.0, 1.2)}
    assert asked["params"][0]["stop_token_ids"] == list(policy.eos_ids)
    assert [(c.tokens, c.finish) for c in groups[0]] == [((10, 11, 12, 13), "length"), ((14, 15, 16, 17), "length")]
    # of 3 tokens of each prefix one was cached
    assert (stats.sampled_tokens, stats.prefix_tokens, stats.prefix_tokens_encoded) == (8, 6, 4)
    assert stats.reused == pytest.approx(1 / 3)
    assert not engine.exact and "vLLM 0.32.9 on cpu, in float32" in engine.remark


def test_a_cache_on_a_cpu_has_a_size_whoever_holds_the_policy(start: Any, stand_in: Any) -> None:
    start(kv_cache_gb=None)
    assert stand_in()[0]["settings"]["kv_cache_memory_bytes"] == 4 * 2**30


def test_weights_go_over_when_they_have_changed_and_only_then(start: Any, stand_in: Any, policy: Any) -> None:
    engine = start()
    engine.sample([REQUEST], SamplingParams())
    engine.sample([REQUEST], SamplingParams(greedy=True))
    with torch.no_grad():
        policy.model.lm_head.weight[3, 3] += 1e-3
    engine.sample([REQUEST], SamplingParams())
    heard = [one["what"] for one in stand_in()]
    assert heard == ["start", "trial", "generate", "generate", "reload_weights", "reset", "generate"]
    assert engine.updates == 1
    assert [p["temperature"] for p in stand_in()[3]["params"]] == [0, 0]


def test_a_cache_that_is_not_reset_is_no_cache_to_go_on_with(
    start: Any, policy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STUCK", "1")
    engine = start()
    with torch.no_grad():
        policy.model.lm_head.weight[3, 3] += 1e-3
    with pytest.raises(EngineError, match="did not reset its prefix cache"):
        engine.sample([REQUEST], SamplingParams())


def test_it_sleeps_between_phases_where_it_can(start: Any, stand_in: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLEEPS", "1")
    engine = start()
    assert "asleep while the policy learns" in engine.remark
    engine.sample([REQUEST], SamplingParams())
    engine.forget()
    engine.forget()
    engine.sample([REQUEST], SamplingParams())
    assert [one["what"] for one in stand_in()] == ["start", "trial", "generate", "sleep", "wake", "generate"]
    assert stand_in()[0]["settings"]["enable_sleep_mode"]
    off = start(sleep="off")
    off.forget()
    assert not stand_in()[-2]["settings"]["enable_sleep_mode"]


def test_sleep_that_is_demanded_and_cannot_be_had(start: Any) -> None:
    with pytest.raises(EngineError, match=r'engine.sleep is "on", but vLLM cannot .* on this device \(cpu\)'):
        start(sleep="on")


# ---------------------------------------------------------------- failures


@pytest.mark.skipif(HERE, reason="vLLM is in this environment")
def test_vllm_that_is_missing(policy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(PYTHON, raising=False)
    with pytest.raises(EngineError, match=r"needs the package 'vllm', .* this environment; run: pip install .*engine.python"):
        vllm_engine(policy)


def test_an_interpreter_that_is_not_there(policy: Any, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"cannot be started with the interpreter .*engine.python"):
        vllm_engine(policy, python=str(tmp_path / "python"))


@pytest.mark.parametrize("version", ["0.31.2", "0.33.0", "1.0"])
def test_versions_out_of_range(start: Any, monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setenv("VERSION", version)
    with pytest.raises(EngineError, match=f"vLLM {version} is installed, but .* 0.32 up to, not including, 0.33; run: pip"):
        start()


def test_a_model_that_vllm_does_not_know(start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BROKEN", "Model architectures ['Odd'] are not supported for now.")
    with pytest.raises(ModelError, match=r'does not know this model: .*Odd.*; use engine.type = "embedded"'):
        start()


@pytest.mark.parametrize(
    ("when", "message"),
    [
        ("BROKEN", "Selected backend is not valid. Reason: ['head_size not supported']"),
        ("UNABLE", "Unsupported CPU attention configuration: head_dim=24 isa=1 kv_cache_idx=0"),
    ],
)  # fmt: skip
def test_heads_that_vllm_has_no_attention_for(
    start: Any, monkeypatch: pytest.MonkeyPatch, when: str, message: str
) -> None:
    monkeypatch.setenv(when, message)
    with pytest.raises(ModelError, match=r"attention for heads of this size.*model.num_heads"):
        start()


def test_a_process_that_dies_is_quoted(start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIES", "1")
    engine = start()
    with pytest.raises(EngineError, match=r"(?s)was killed by SIGKILL during the job 'sample'.*--resume.*a line of log"):
        engine.sample([REQUEST], SamplingParams())
    with pytest.raises(EngineError, match="SIGKILL"):  # and stays dead
        engine.sample([REQUEST], SamplingParams())


def test_a_call_that_takes_too_long_is_ended(start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLOW", "1")
    engine = start(timeout_s=0.5)
    with pytest.raises(EngineError, match=r"did not answer within 0.5 s \(the job 'sample'\).*engine.timeout_s"):
        engine.sample([REQUEST], SamplingParams())
    with pytest.raises(ProcessLookupError):
        os.kill(engine.process.pid, 0)


def test_logprobs_that_are_not_finite(start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NAN", "1")
    with pytest.raises(EngineError, match="are not finite"):
        start().sample([REQUEST], SamplingParams())


def test_too_hot(start: Any, recipe: Any) -> None:
    with pytest.raises(EngineError, match=r"temperature is 2.5, but vLLM takes at most 2"):
        start().sample([REQUEST], SamplingParams(temperature=2.5))
    with pytest.raises(ConfigError, match=r"sampling.temperature is 2.5, but vLLM takes at most 2"):
        recipe(engine={"type": "vllm"}, sampling={"temperature": 2.5})


def test_nothing_is_left_behind(start: Any) -> None:
    engine = start()
    directory, pid = Path(engine.directory), engine.process.pid
    assert directory.is_dir()
    os.kill(pid, signal.SIGCONT)  # it is there
    engine.close()
    assert not directory.exists()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_parent_that_was_killed_leaves_no_weights_in_memory(start: Any) -> None:
    engine = start()
    engine.process.child.stdin.close()  # as the system does for it
    engine.process.child.wait(60)
    assert not Path(engine.directory).exists()


# ---------------------------------------------------------------- weights, stops, recipe


def test_adapters_are_merged_in_float32_and_tied_weights_stay_one(policy: Any) -> None:
    peft = pytest.importorskip("peft")
    plain = merged_state(policy, torch.bfloat16)
    assert plain["lm_head.weight"] is plain["model.embed_tokens.weight"]
    assert {t.dtype for t in plain.values()} == {torch.bfloat16}
    names = set(plain)
    base = policy.model.model.layers[0].self_attn.q_proj.weight.detach().clone()
    policy.model = peft.get_peft_model(policy.model, peft.LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj", "down_proj"]))
    layer = policy.causal.model.layers[0].self_attn.q_proj
    torch.nn.init.normal_(layer.lora_B["default"].weight)
    merged = merged_state(policy, torch.float32)
    assert set(merged) == names
    # W + alpha/rank · B A
    expected = base + 3.0 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    assert torch.allclose(merged["model.layers.0.self_attn.q_proj.weight"], expected, atol=1e-6)
    assert torch.equal(layer.base_layer.weight, base)  # nothing was merged in place


@pytest.fixture
def adapted(policy: Any) -> Any:
    """The policy with adapters that do something."""
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    policy.model = peft.get_peft_model(policy.model, settings)
    return policy


def test_adapters_go_alone(start: Any, stand_in: Any, adapted: Any) -> None:
    """The base once, the adapters at the start and after each update; a number is never used twice."""
    engine = start()
    engine.sample([REQUEST], SamplingParams())
    first = engine.sent_bytes
    with torch.no_grad():
        next(iter(adapted.trainable().values())).add_(1e-3)
    engine.sample([REQUEST], SamplingParams())
    heard = stand_in()
    assert [one["what"] for one in heard] == [
        "start", "trial", "add_lora", "reset", "generate", "remove_lora", "add_lora", "reset", "generate",
    ]  # fmt: skip
    settings = heard[0]["settings"]
    assert (settings["enable_lora"], settings["max_loras"], settings["max_lora_rank"]) == (True, 1, 8)
    assert [one["number"] for one in heard if "number" in one] == [1, 1, 2]
    assert [one["lora"] for one in heard if one["what"] == "generate"] == [1, 2]
    # the base's weights left memory when vLLM had read them
    assert "model.safetensors" in heard[0]["files"] and heard[2]["left"] == []
    assert {"adapter_config.json", "adapter_model.safetensors"} <= set(heard[2]["files"])
    # rank 3: 2 layers, q_proj 32 + 32, down_proj 64 + 32; float32
    values = 2 * 3 * (64 + 96)
    assert 4 * values < engine.sent_bytes == first < 4 * values + 2_000
    assert "gets the adapters alone" in engine.remark and engine.updates == 1


def test_adapters_are_merged_where_that_is_asked_or_vllm_takes_no_others(
    start: Any, stand_in: Any, adapted: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    merged = start(adapters="merged")
    merged.sample([REQUEST], SamplingParams())
    assert "enable_lora" not in stand_in()[0]["settings"] and stand_in()[-1]["lora"] is None
    # all 21,248 weights of the model
    assert merged.sent_bytes > 4 * 21_248 and "adapters" not in merged.remark
    monkeypatch.setenv("NO_LORA", "this model has no adapters in vLLM")
    other = start()
    other.sample([REQUEST], SamplingParams())
    assert stand_in()[-1]["lora"] is None and other.sent_bytes == merged.sent_bytes
    assert "ValueError: this model has no adapters in vLLM" in other.remark
    with pytest.raises(EngineError, match="this model has no adapters in vLLM"):
        start(adapters="alone")
    # it starts with room for adapters, and does not take these
    monkeypatch.delenv("NO_LORA")
    monkeypatch.setenv("REFUSES", "expected target modules in ['q_proj'] but received ['odd']")
    third = start()
    third.sample([REQUEST], SamplingParams())
    assert stand_in()[-1]["lora"] is None and "received ['odd']" in third.remark and "adapters alone" not in third.remark[:70]
    with pytest.raises(EngineError, match=r'does not take the adapters \(ValueError: .*; set engine.adapters = "merged"'):
        start(adapters="alone")


def test_the_fingerprint_sees_one_bit(policy: Any) -> None:
    before = fingerprint(policy)
    assert fingerprint(policy) == before
    with torch.no_grad():
        weight = policy.model.model.norm.weight
        weight[5] = torch.nextafter(weight[5], torch.tensor(9.0))
    after = fingerprint(policy)
    assert sum(a != b for a, b in zip(before, after, strict=True)) == 1


class _Letters:
    def decode(self, tokens: Any) -> str:
        return "".join(chr(ord("a") + t) for t in tokens)


@pytest.mark.parametrize(
    ("before", "tokens", "end"),
    [([], [0, 1, 2, 3], 3), ([0, 1], [2, 3], 1), ([1, 2], [3, 1, 2], 3), ([0, 1, 2], [3, 0], None), ([], [], None)],
)
def test_the_first_token_that_completes_a_stop_string(before: list[int], tokens: list[int], end: int | None) -> None:
    assert first_stop(_Letters(), ("bc",), before, tokens) == end
    assert first_stop(_Letters(), (), before, tokens) is None


def test_the_engine_of_a_recipe(recipe: Any, tmp_path: Path) -> None:
    config: Config = recipe(engine={"type": "vllm", "max_rows": 8, "options": {"swap_space": 1}})
    assert isinstance(config.engine, VLLMEngineConfig) and config.engine_dtype == "float32"
    (tmp_path / "again.toml").write_text(to_toml(config))
    assert load_recipe(tmp_path / "again.toml") == config
    # without a type it is the one that comes along, as ever
    assert recipe(engine={"max_rows": 8}).engine.type == "embedded"
    with pytest.raises(ConfigError, match=r"unknown key 'engine.keep_mb'"):
        recipe(engine={"type": "vllm", "keep_mb": 8})
    with pytest.raises(ConfigError, match=r"engine.type is 'vlm'; choose one of .*did you mean 'vllm'"):
        parse_config({**config.model_dump(), "engine": {"type": "vlm"}})


def test_a_dry_run_counts_its_copy_and_its_cache(recipe: Any, policy: Any) -> None:
    from deepgrpo.explore import build_strategy
    from deepgrpo.explore.base import Context
    from deepgrpo.train.memory import estimate_memory

    count = sum(p.numel() for p in policy.model.parameters())
    config = recipe(engine={"type": "vllm", "kv_cache_gb": 2})
    strategy = build_strategy(config.explore, Context(tokenizer=policy.tokenizer))
    found = estimate_memory(config, policy, strategy, 50)
    assert (found.engine, found.cache, found.prefixes) == (4 * count, 2 * 2**30, 0)
    # two GPUs share both; on a CPU the cache has a size of its own
    shared = estimate_memory(
        recipe(engine={"type": "vllm", "options": {"tensor_parallel_size": 2}}), policy, strategy, 50
    )
    assert (shared.engine, shared.cache) == (2 * count, 4 * 2**30)


@pytest.mark.parametrize(("device", "visible", "seen"), [
    ("cuda:0", None, None), ("cuda:0", "3,5", "3,5"), ("cpu", "3,5", "3,5"), ("cuda:2", None, "2,0,1,3"),
    ("cuda:1", "3,5", "5,3"), ("cuda:1", "GPU-a,GPU-b", "GPU-b,GPU-a"),
])  # fmt: skip
def test_vllm_takes_the_gpu_of_the_policy(
    device: str, visible: str | None, seen: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM takes the first GPU that it sees, or the first few; the policy's comes first."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    environment = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    assert {**environment, **own_gpu_first(torch.device(device), environment)}.get("CUDA_VISIBLE_DEVICES") == seen


@pytest.mark.parametrize(("cpu", "wanted", "passed"), [(True, None, 32), (True, 64, 64), (False, None, None), (False, 64, 64)])
def test_on_a_gpu_vllm_chooses_its_block_size(cpu: bool, wanted: int | None, passed: int | None) -> None:
    """A size that it is told keeps vLLM 0.32 from attention backends that want another one (vllm/platforms/cuda.py)."""
    assert child.block_size(wanted, on_cpu=cpu) == ({} if passed is None else {"block_size": passed})
