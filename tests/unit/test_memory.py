"""What a run needs of memory: worked by hand, by the shapes of real models, and refused where it cannot be had."""

from __future__ import annotations

import io
import resource
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from rich.console import Console
from surroundings import ROOT, load_script

from deepgrpo.cluster import actors
from deepgrpo.config import Config, PretrainedModel
from deepgrpo.errors import ConfigError, ModelError
from deepgrpo.explore import build_strategy
from deepgrpo.explore.base import Context
from deepgrpo.explore.toy import FakeEngine
from deepgrpo.model.loading import load_policy, load_tokenizer
from deepgrpo.model.meta_policy import build_meta_policy
from deepgrpo.model.policy import Policy
from deepgrpo.prompts import synthetic
from deepgrpo.train import room, setup
from deepgrpo.train.build import build_shapes
from deepgrpo.train.counts import Counts
from deepgrpo.train.dry_run import dry_run
from deepgrpo.train.loop import train
from deepgrpo.train.memory import Holder, MemoryEstimate, estimate_cluster, estimate_memory
from deepgrpo.train.room import check_cluster_room, check_room
from tiny import save_model

# The tiny policy has 19 tokens, width 32, 2 layers with 2 heads of 16 and a feed-forward of 64, the head tied:
#   a layer        4 · 32 · 32 + 3 · 32 · 64 + 2 · 32 = 10,304
#   outside        19 · 32 + 32                       =    640
#   all            2 · 10,304 + 640                   = 21,248
P, LAYER, REST = 21_248, 10_304, 640
LEARNER = {"tokens_per_pack": 100}
WITH_REFERENCE = {"beta": 1e-4}


def outlined(config: Config) -> Policy:
    policy = build_shapes(config)
    assert policy is not None
    return policy


def one_process(config: Config) -> MemoryEstimate:
    policy = outlined(config)
    strategy = build_strategy(config.explore, Context(tokenizer=policy.tokenizer))
    return estimate_memory(config, policy, strategy, 20)


def cluster(config: Config) -> dict[str, Holder]:
    policy = outlined(config)
    strategy = build_strategy(config.explore, Context(tokenizer=policy.tokenizer))
    return {f"{h.name}, {h.memory}": h for h in estimate_cluster(config, policy, strategy, 20)}


# ---------------------------------------------------------------- formulas


def test_the_outline_of_the_tiny_policy_is_counted(recipe: Any, policy: Policy) -> None:
    assert Counts.of(outlined(recipe())) == Counts.of(policy) == Counts(P, P, LAYER, REST)


def test_one_process_by_hand(recipe: Any) -> None:
    found = one_process(recipe(loss=WITH_REFERENCE, learner=LEARNER))
    assert (found.weights, found.gradients, found.optimizer, found.reference) == (84_992, 84_992, 169_984, 84_992)
    # 64 rows · 20 tokens · 2 layers · (keys and values) · 2 heads · 16 · 4 bytes
    assert (found.engine, found.cache) == (0, 655_360)
    # 100 tokens · 32 · 2 layers · (12 + 4 · 64 / 32) · 4 bytes; three chunks of 256 · 19 logits; the logits that are kept
    assert found.activations == 512_000 + 58_368 + 7_600
    # sampling takes more than learning: 16 rollouts · 20 tokens · (512 + 32 · 4) bytes are kept on top
    assert found.prefixes == 204_800
    assert (found.certain, found.total) == (424_960, 424_960 + 655_360 + 204_800)
    # recomputed: 2 values per layer, and all 20 of one
    again = one_process(recipe(learner={**LEARNER, "gradient_checkpointing": True}))
    assert (again.activations, again.reference) == (100 * 32 * (2 * 2 + 20) * 4 + 58_368 + 7_600, 0)
    # a second set of weights for sampling in bfloat16
    assert one_process(recipe(engine={"dtype": "bfloat16"})).engine == 42_496


def test_sampling_and_learning_take_turns() -> None:
    held = MemoryEstimate(weights=1, gradients=2, optimizer=3, reference=4, engine=5, transfer=6, stored=7)
    assert held.total == 28
    # 10 + 20 for sampling, 15 + 25 for learning: the larger one counts
    both = replace(held, cache=10, prefixes=20, gathered=15, activations=25)
    assert both.total == 28 + 40 and replace(both, cache=40).total == 28 + 60
    assert both.certain == 10 and replace(both, start=100).certain == replace(both, start=100).total == 100


def test_what_vllm_holds_by_hand(recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    vllm = {"type": "vllm", "dtype": "bfloat16", "max_rows": 64}
    # on a CPU its weights, 2 bytes each, and a cache of 4 GiB
    found = one_process(recipe(engine=vllm))
    assert (found.engine, found.cache, found.prefixes) == (42_496, 4 * 2**30, 0)
    # half of a GPU of 1,000,000 bytes, its weights included
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=1_000_000))
    found = one_process(recipe(run={"device": "cuda"}, engine={**vllm, "gpu_memory": 0.5}))
    assert (found.engine, found.cache) == (42_496, 500_000 - 42_496)
    # over two GPUs that are not here: half of the weights, half of the 64 rows · 20 tokens · 128 numbers · 2 bytes
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    spread = {**vllm, "options": {"tensor_parallel_size": 2}}
    found = one_process(recipe(run={"device": "cuda"}, engine=spread))
    assert (found.engine, found.cache) == (21_248, 163_840)


def test_four_learners_hold_all_or_a_quarter_each(recipe: Any) -> None:
    def learner(sharding: str) -> MemoryEstimate:
        wanted = {"learners": 4, "sharding": sharding}
        return cluster(recipe(loss=WITH_REFERENCE, learner=LEARNER, cluster=wanted))["learner, host"].estimate

    whole, part = learner("ddp"), learner("fsdp")
    assert (whole.weights, whole.gradients, whole.optimizer, whole.reference) == (84_992, 84_992, 169_984, 84_992)
    assert (whole.gathered, whole.start) == (0, 0)
    assert (part.weights, part.gradients, part.optimizer, part.reference) == (21_248, 21_248, 42_496, 21_248)
    # embeddings of policy and reference, two layers; the gradient of the embeddings and of a layer
    assert part.gathered == 4 * (2 * REST + 2 * LAYER) + 4 * (REST + LAYER) == 131_328
    # a quarter of policy and reference, and a layer; before that embeddings and a layer that are tried, with its gradient
    assert part.start == max(2 * P + 4 * LAYER, 4 * (REST + 2 * LAYER)) == 84_992
    assert part.certain == 106_240
    assert part.activations == whole.activations


def test_the_other_processes_of_a_cluster(recipe: Any) -> None:
    found = cluster(recipe(cluster={"rollout_workers": 2, "learners": 3}))
    worker = found["rollout worker, host"]
    assert worker.count == 2
    # a worker has half of the 16 rollouts
    assert worker.estimate == MemoryEstimate(weights=4 * P, cache=655_360, prefixes=102_400)
    # the moments pass by when a checkpoint is written
    assert found["driver, host"].estimate == MemoryEstimate(weights=4 * P, optimizer=8 * P)
    assert found["object store, host"] == Holder("object store", None, "host", MemoryEstimate(stored=8 * P, optimizer=8 * P))


def test_a_worker_with_vllm_keeps_the_policy_in_host_memory(recipe: Any) -> None:
    found = cluster(
        recipe(
            run={"device": "cuda"}, engine={"type": "vllm", "dtype": "bfloat16", "kv_cache_gb": 3},
            cluster={"learners": 2, "sharding": "fsdp", "address": "auto"},
        )
    )  # fmt: skip
    assert found["rollout worker, GPU"].estimate == MemoryEstimate(engine=2 * P, cache=3 * 2**30)
    assert found["rollout worker, host"].estimate == MemoryEstimate(weights=4 * P, transfer=2 * P)
    assert found["learner, GPU"].estimate.start == max(2 * P + 4 * LAYER, 4 * (REST + 2 * LAYER))
    # the first learner hands the weights out; none has loaded any, as all of the model comes through the store
    assert found["learner, host"].estimate == MemoryEstimate(stored=4 * P)
    assert found["object store, host"].estimate == MemoryEstimate(stored=8 * P, start=4 * P)
    # learners write their own shards
    assert found["driver, host"].estimate == MemoryEstimate(weights=4 * P)


@pytest.mark.parametrize(("engine", "device"), [("vllm", "cpu"), ("embedded", "cuda")])
def test_a_worker_builds_its_policy_where_it_is_counted(
    recipe: Any, monkeypatch: pytest.MonkeyPatch, engine: str, device: str
) -> None:
    built: list[str] = []
    monkeypatch.setattr(actors, "build_policy", lambda config, device: built.append(device))
    actors.RolloutWorker(recipe(engine={"type": engine}), "cuda", lambda config, policy: FakeEngine())
    assert built == [device]


# ---------------------------------------------------------------- models without weights


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("lora", [None, {"rank": 2}])
def test_an_outline_has_the_parameters_of_the_loaded_model(tmp_path: Path, family: Any, lora: Any) -> None:
    if lora:
        pytest.importorskip("peft")
    path = save_model(tmp_path, family, dtype="bfloat16")
    model = PretrainedModel.model_validate({"path": path, "lora": lora})
    outline, loaded = build_meta_policy(model, load_tokenizer(model)), load_policy(model)
    assert outline is not None and {p.device.type for p in outline.model.parameters()} == {"meta"}
    counts = Counts.of(outline)
    assert counts == Counts.of(loaded) and counts.weights == sum(p.nbytes for p in loaded.model.parameters())
    assert (counts.narrow > 0.8 * counts.every) == (lora is not None)
    shapes = [{name: tuple(p.shape) for name, p in policy.trainable().items()} for policy in (outline, loaded)]
    assert shapes[0] == shapes[1]
    assert (outline.context, outline.plain_head, outline.eos_ids) == (loaded.context, loaded.plain_head, loaded.eos_ids)


def test_stored_in_another_form_it_is_loaded_to_be_counted(tmp_path: Path) -> None:
    model = PretrainedModel(path=save_model(tmp_path))
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace("{", '{"quantization_config": {"quant_method": "gptq", "bits": 4},', 1))
    assert build_meta_policy(model, None) is None


def seventy_billion(place: Path) -> str:
    """The shape of Llama-3-70B with a tokenizer, and no weights."""
    from transformers import LlamaConfig

    LlamaConfig(
        vocab_size=128_256, hidden_size=8_192, intermediate_size=28_672, num_hidden_layers=80, num_attention_heads=64,
        num_key_value_heads=8, max_position_embeddings=8_192, tie_word_embeddings=False,
    ).save_pretrained(place)  # fmt: skip
    synthetic.tokenizer().save_pretrained(place)
    return str(place)


@pytest.mark.parametrize("explore", [{"type": "deep"}, {"type": "attnrl"}])
def test_a_dry_run_of_70_billion_parameters_takes_seconds(recipe: Any, tmp_path: Path, explore: Any) -> None:
    config = recipe(
        model={"type": "pretrained", "path": seventy_billion(tmp_path / "big")}, data={"template": {"chat": False}},
        explore=explore, run={"device": "cuda"}, cluster={"learners": 16, "sharding": "fsdp", "address": "auto"},
    )  # fmt: skip
    shown = io.StringIO()
    began, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    dry_run(config, Console(file=shown, width=200, highlight=False))
    assert time.process_time() - began < 20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # KiB
    text = shown.getvalue()
    assert "70,553.71M" in text and "2+3" not in text.split("one step")[1]
    # 4 · 70,553,706,496 / 16 bytes
    assert "16.43" in text and text.endswith("dry run: nothing was trained\n")


def test_a_dry_run_loads_no_weights(recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def loaded(*_: Any, **__: Any) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("deepgrpo.train.dry_run.build_policy", loaded)
    monkeypatch.setattr(room, "free_memory", lambda device: 300_000)
    shown = io.StringIO()
    dry_run(recipe(loss=WITH_REFERENCE), Console(file=shown, width=400))
    assert "it does not fit here: the model of 0.00 billion" in shown.getvalue()


@pytest.mark.parametrize("cluster", [None, {"address": "auto"}])
def test_a_dry_run_may_be_for_a_gpu_that_is_not_here_but_for_no_other_device(
    recipe: Any, cluster: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    sections = {"cluster": cluster} if cluster else {}
    dry_run(recipe(run={"device": "cuda:7"}, **sections), Console(file=io.StringIO()))
    with pytest.raises(ConfigError, match="use auto, cpu, cuda or cuda:N"):
        dry_run(recipe(run={"device": "gpu"}, **sections), Console(file=io.StringIO()))


# ---------------------------------------------------------------- refused before anything is loaded


@pytest.fixture
def loading(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which devices a policy was loaded on; none is."""
    seen: list[str] = []

    def note(config: Config, device: str) -> None:
        seen.append(device)
        raise ModelError("far enough")

    monkeypatch.setattr(setup, "build_policy", note)
    return seen


def test_a_model_that_cannot_fit_is_refused_before_it_is_loaded(
    recipe: Any, monkeypatch: pytest.MonkeyPatch, loading: list[str]
) -> None:
    # 20 bytes a parameter
    monkeypatch.setattr(room, "free_memory", lambda device: 424_959)
    with pytest.raises(ModelError, match=r"takes 0\.0 GiB \(weights .*moments .*reference .*on cpu.*loss\.beta = 0"):
        train(recipe(loss=WITH_REFERENCE))
    assert loading == []
    monkeypatch.setattr(room, "free_memory", lambda device: 424_960)
    with pytest.raises(ModelError, match="far enough"):
        train(recipe(loss=WITH_REFERENCE))
    assert loading == ["cpu"]


def test_what_a_run_does_without_is_not_asked_for(recipe: Any, policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "free_memory", lambda device: 4 * P)
    check_room(recipe(run={"steps": 0}), policy, "cpu")  # weights alone
    with pytest.raises(ModelError, match=r"model\.hidden_size = 32"):
        check_room(recipe(run={"steps": 0}, warmstart={"steps": 1}), policy, "cpu")
    monkeypatch.setattr(room, "free_memory", lambda device: 16 * P)
    check_room(recipe(), policy, "cpu")  # no reference
    with pytest.raises(ModelError, match="reference"):
        check_room(recipe(loss=WITH_REFERENCE), policy, "cpu")


def test_all_processes_of_a_cluster_on_this_machine_are_added_up(
    recipe: Any, policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = recipe(cluster={"learners": 3, "rollout_workers": 2})
    # the driver 4, each worker 4, each learner 16 bytes a parameter
    monkeypatch.setattr(room, "free_memory", lambda device: (4 + 2 * 4 + 3 * 16) * P)
    check_cluster_room(config, policy, cuda=False)
    monkeypatch.setattr(room, "free_memory", lambda device: (4 + 2 * 4 + 3 * 16) * P - 1)
    with pytest.raises(ModelError, match=r"in the driver; so do 2 rollout workers, and 3 learners take .* together; but"):
        check_cluster_room(config, policy, cuda=False)
    # of other machines nothing is known: the driver alone
    elsewhere = recipe(cluster={"learners": 3, "rollout_workers": 2, "address": "auto"})
    check_cluster_room(elsewhere, policy, cuda=False)
    monkeypatch.setattr(room, "free_memory", lambda device: 4 * P - 1)
    with pytest.raises(ModelError, match="in the driver; but"):
        check_cluster_room(elsewhere, policy, cuda=True)


def test_a_learner_must_fit_on_the_largest_gpu(recipe: Any, policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = [1, 0]

    class Properties:
        def __init__(self, number: int) -> None:
            self.total_memory = sizes[number]

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", Properties)
    sharded = recipe(cluster={"learners": 4, "sharding": "fsdp"})
    sizes[1] = 4 * P  # a quarter of 16 bytes; at the start the embeddings and a layer with its gradient, which is as much
    check_cluster_room(sharded, policy, cuda=True)
    with pytest.raises(ModelError, match=r"in each of cluster\.learners = 4 \(cluster\.sharding = \"ddp\"\)"):
        check_cluster_room(recipe(cluster={"learners": 4}), policy, cuda=True)
    sizes[1] = 4 * P - 1
    with pytest.raises(ModelError, match="at the start, when each module is whole before it is sharded") as error:
        check_cluster_room(sharded, policy, cuda=True)
    assert "raise cluster.learners" not in str(error.value)  # would not help


def test_free_memory_includes_swap(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 2**20 < room.free_memory("cpu") < 2**50
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=70, free=10))
    monkeypatch.setattr(psutil, "swap_memory", lambda: SimpleNamespace(free=5, total=9))
    assert room.free_memory("cpu") == 75


def test_more_learners_are_a_remedy_only_where_they_would_help(
    recipe: Any, policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """16 bytes a parameter do not fit; what each of many learners would try, embeddings and two layers, does or does not."""
    trial = 4 * (REST + 2 * LAYER)
    for free, helps in ((trial, True), (trial - 1, False)):
        monkeypatch.setattr(room, "free_memory", lambda device, free=free: free)
        with pytest.raises(ModelError) as error:
            check_room(recipe(), policy, "cuda")
        assert ("shard it over GPUs" in str(error.value)) is helps


# ---------------------------------------------------------------- the table of docs/scaling.md


def table_script() -> Any:
    return load_script(ROOT / "benchmarks" / "memory_table.py")


@pytest.mark.parametrize("name", ["Qwen2.5-0.5B", "Qwen2.5-7B", "Llama-3-70B"])
@pytest.mark.parametrize("learners", [1, 16])
def test_the_formulas_of_the_documentation_agree_with_a_dry_run(tmp_path: Path, name: str, learners: int) -> None:
    script = table_script()
    ours, theirs = script.formula(name, learners), script.printed(name, learners, tmp_path)
    for what, value in ours.items():
        assert theirs[what] == pytest.approx(value, rel=0.01), what


def test_the_formulas_of_adapters_agree_with_a_dry_run(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    script = table_script()
    theirs = script.printed("Qwen2.5-0.5B", 1, tmp_path, {"rank": script.RANK})
    assert theirs["held"] == pytest.approx(script.adapted("Qwen2.5-0.5B")["bfloat16"], abs=0.02)
