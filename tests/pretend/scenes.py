"""Whole pieces of work, called once with the pretended device and once without; what they return is compared.

On the CPU they take the kernels that CUDA takes (`as_on_cuda`), so that the arithmetic is the same and so are the results.
"""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from deepgrpo import rng
from deepgrpo.config import Config, load_recipe, parse_config
from deepgrpo.records import SampleRequest

TIMED = ("time/", "ledger/seconds_", "tokens_per_s")
BASE: dict[str, Any] = {
    "model": {
        "type": "scratch", "hidden_size": 16, "num_layers": 2, "num_heads": 2, "intermediate_size": 32, "max_position": 48,
    },
    "data": {"type": "synthetic", "chain_length": 1},
    "reward": {
        "type": "user", "function": f"{Path(__file__).parents[1] / 'golden/reward.py'}:reward", "truncated_value": "none",
    },
    "sampling": {"max_new_tokens": 10},
    "explore": {"type": "deep", "num_rollouts": 4, "branches_per_pivot": 3, "segments": {"type": "tokens", "size": 3}},
    "loss": {"beta": 0.02},
    "optim": {"lr": 3e-3, "eps": 1e-4},
    "learner": {"tokens_per_pack": 384, "logprob_chunk": 16},
    "checkpoint": {"every": "none"},
    "log": {"trees_every": "none"},
}  # fmt: skip
HELD_OUT = {"type": "synthetic", "chain_length": 1, "split": "test"}


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def as_on_cuda() -> None:
    """Take the ways of a CUDA device on both: attention by gathering, products instead of the CPU's fused kernels."""
    from deepgrpo.engines.embedded import weights
    from deepgrpo.model import decode_attention, flex_attention, tree_attention

    def no_compiler() -> Any:
        raise RuntimeError("no compiler for the pretended device")

    flex_attention.compiled_attention = no_compiler  # type: ignore[assignment]
    if device() == "cpu":
        tree_attention.kernels = lambda device: ("gather",)  # type: ignore[assignment]
        decode_attention._attend = decode_attention._attend_by_products
        weights.supports_packing = lambda device, dtype: False  # type: ignore[attr-defined]


def recipe(place: str, name: str, steps: int, **sections: Any) -> Config:
    """A run of a few steps; sections are merged into BASE, another type replaces."""
    run = {"dir": place, "name": name, "steps": steps, "prompts_per_step": 3, "device": device(), "seed": 5, "threads": 1}
    raw: dict[str, Any] = {"run": {**run, **sections.pop("run", {})}, **BASE}
    for key, values in sections.items():
        base = raw.get(key, {})
        raw[key] = values if values.get("type", base.get("type")) != base.get("type") else {**base, **values}
    return parse_config(raw)


def figures(directory: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what a clock measured."""
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if not key.startswith(TIMED)} for line in lines]


def weights(directory: Path) -> dict[str, list[float]]:
    """Sum and squares of each tensor of the newest checkpoint."""
    from safetensors.torch import load_file

    newest = max((directory / "checkpoints").glob("step-*"), key=lambda path: int(path.name.split("-")[1]))
    found: dict[str, list[float]] = {}
    for file in sorted(newest.rglob("*.safetensors")):
        for key, value in load_file(file).items():
            found[f"{file.name}:{key}"] = [float(value.double().sum()), float(value.double().square().sum())]
    return found


# ---------------------------------------------------------------- runs


def run(place: str, steps: int, **sections: Any) -> Any:
    """A run from its first step to its last checkpoint."""
    from deepgrpo.train.loop import train

    as_on_cuda()
    directory = train(recipe(place, device(), steps, **sections))
    if device() == "cuda":  # checkpoints hold the CPU's random state only
        assert torch.equal(torch.cuda.get_rng_state(), torch.Generator().manual_seed(5).get_state())
    return figures(directory), weights(directory), (directory / "log.txt").read_text().count("warning")


def resumed(place: str) -> Any:
    """A run with warm start, evaluation and checkpoints, whole and in two halves; both must be the same run."""
    from deepgrpo.train.loop import train

    as_on_cuda()
    sections: dict[str, Any] = {
        "warmstart": {"steps": 6, "batch_size": 8, "lr": 1e-2, "target_accuracy": 0.9, "check_every": 3},
        "eval": {"every": 1, "limit": 3, "samples": 1, "data": HELD_OUT}, "checkpoint": {"every": 1},
        "sampling": {"max_new_tokens": 6},
        "explore": {**BASE["explore"], "recoverability": {"window": 20, "min_items": 4}}, "log": {"trees_every": 1},
    }  # fmt: skip
    whole = train(recipe(place, f"{device()}-whole", 2, **sections))
    half = train(recipe(place, f"{device()}-half", 1, **sections))
    more = load_recipe(half / "config.toml", [("run.steps", "2")])
    train(more, resume=half)
    assert figures(half) == figures(whole) and weights(half) == weights(whole)
    return figures(whole), weights(whole)


def adapters(place: str, model: str) -> Any:
    """A run with adapters, gradient checkpointing and KL, and the evaluation of its checkpoint by the command."""
    from deepgrpo.eval.command import evaluate_model
    from deepgrpo.eval.options import EvalOptions
    from deepgrpo.train.loop import train

    as_on_cuda()
    config = recipe(
        place, device(), 1, model={"type": "pretrained", "path": model, "lora": {"rank": 4, "alpha": 8}},
        data={"type": "synthetic", "chain_length": 1}, learner={"gradient_checkpointing": True, "logprob_chunk": 16},
        optim={"lr": 1e-2, "eps": 1e-4, "minibatches": 2},
    )  # fmt: skip
    directory = train(config)
    rows = Path(place) / f"{device()}.jsonl"
    rows.write_text('{"question": "1 + 1 = ?", "answer": "2"}\n{"question": "2 + 3 = ?", "answer": "5"}\n')
    report = Path(place) / f"{device()}.json"
    options = EvalOptions(
        model=str(directory), data=(str(rows),), samples=1, max_new_tokens=3, device=device(), json=str(report), threads=1
    )
    assert evaluate_model(options, Console(file=io.StringIO())) == 0
    (found,) = json.loads(report.read_text())["sets"].values()
    return figures(directory), weights(directory), found["metrics"]


# ---------------------------------------------------------------- engine and learner


def sharpened(length: int = 128) -> Any:
    """A small policy whose choices no rounding decides."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from deepgrpo.model.policy import Policy
    from deepgrpo.prompts import synthetic

    tokenizer = synthetic.tokenizer()
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=length, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
        )
    )  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(6.0)
    return Policy(model.eval().to(device()), tokenizer, length)


def sampled(kind: str) -> Any:
    """Requests of three lengths with siblings, then branches of a finished rollout; and the engine's remark."""
    from deepgrpo.engines.base import SamplingParams
    from deepgrpo.engines.embedded import decode
    from deepgrpo.engines.embedded.engine import EmbeddedEngine

    as_on_cuda()
    if kind == "shared":
        decode.ATTACH_COPIES, decode.ATTACH_TOKENS = 1, 10
    policy = sharpened()
    packs = policy.try_tree_packing()
    assert packs.packs and packs.kernel == "gather", packs
    dtype = torch.bfloat16 if kind == "bfloat16" else torch.float32
    engine = EmbeddedEngine(policy, max_rows=6, keep_bytes=2**20, dtype=dtype)
    random = np.random.default_rng(1)
    prefixes = [tuple(int(t) for t in random.integers(2, len(policy.tokenizer), n)) for n in (4, 17, 30)]
    requests = [SampleRequest(p, tuple(rng.key(i, s) for s in range(4)), 8) for i, p in enumerate(prefixes)]
    params = SamplingParams(temperature=0.9, top_p=0.9, stop=("7",)) if kind == "shared" else SamplingParams()
    first, _ = engine.sample(requests, params, keep=True)
    branches = [
        SampleRequest(p + done[0].tokens[:5], tuple(rng.key(9, i, s) for s in range(3)), 6)
        for i, (p, done) in enumerate(zip(prefixes, first, strict=True))
    ]
    second, _ = engine.sample(branches, params)
    greedy, _ = engine.sample(requests[:1], SamplingParams(greedy=True))
    mode = engine.remark
    engine.close()
    return [[(c.tokens, c.logprobs, c.finish) for c in each] for batch in (first, second, greedy) for each in batch], mode


def generated() -> Any:
    """A family that cannot be decoded from slots, sampled by its own `generate`."""
    from transformers import BloomConfig, BloomForCausalLM

    from deepgrpo.engines.base import SamplingParams
    from deepgrpo.engines.embedded.engine import EmbeddedEngine
    from deepgrpo.model.policy import Policy
    from deepgrpo.prompts import synthetic

    as_on_cuda()
    tokenizer = synthetic.tokenizer()
    torch.manual_seed(0)
    model = BloomForCausalLM(BloomConfig(vocab_size=len(tokenizer), hidden_size=32, n_layer=2, n_head=4, bos_token_id=None))
    policy = Policy(model.eval().to(device()), tokenizer, 64)
    engine = EmbeddedEngine(policy, max_rows=4)
    prefixes = [(3, 4, 5), (6, 7, 8, 9, 2)]
    found, _ = engine.sample(
        [SampleRequest(p, tuple(rng.key(i, s) for s in range(3)), 8) for i, p in enumerate(prefixes)], SamplingParams(top_p=0.9)
    )
    return [[(c.tokens, c.logprobs, c.finish) for c in each] for each in found], engine.remark


def updated(layout: str, dtype: str, keep_mb: int) -> Any:
    """An update of a learner on given trees: its figures, and the weights afterwards."""
    from benchmarks.workloads import Workload, build_trees
    from deepgrpo.credit.siblings import sibling_credit
    from deepgrpo.train.learner import Learner
    from deepgrpo.train.optim import build_optimizer

    as_on_cuda()
    policy = sharpened(64)
    policy = replace(policy, dtype=getattr(torch, dtype), logprob_chunk=8)
    assert policy.try_tree_packing().packs
    small = Workload("S", 2, 4, 3, 8, 2, 2, vocabulary=len(policy.tokenizer))
    config = recipe("unused", "none", 1, loss={"beta": 0.1}, learner={
        "dtype": dtype, "tree_packing": layout, "logprob_keep_mb": keep_mb, "tokens_per_pack": 48, "logprob_chunk": 8,
    }, optim={"lr": 1e-3, "eps": 1e-4, "minibatches": 2})  # fmt: skip
    trees = build_trees(small)
    learner = Learner(policy, None, build_optimizer(policy, config.optim), config)
    learner.freeze_reference()
    report = learner.update(trees, [sibling_credit(tree) for tree in trees])
    sums = {key: float(value.detach().double().sum()) for key, value in policy.trainable().items()}
    return {k: v for k, v in report.metrics.items() if not k.startswith(TIMED)}, sums


# ---------------------------------------------------------------- commands


def probe(place: str) -> Any:
    from deepgrpo.config.files import to_toml
    from deepgrpo.lab.options import ProbeOptions
    from deepgrpo.lab.probe.command import run_probe

    as_on_cuda()
    path, report = Path(place) / f"{device()}.toml", Path(place) / f"{device()}-probe.json"
    path.write_text(to_toml(recipe(place, "probe", 1)))
    options = ProbeOptions(
        str(path), strategies=("root", "deep"), prompts=8, reference=12, projection=64, device=device(), threads=1,
        json=str(report),
    )  # fmt: skip
    assert run_probe(options, console=Console(file=io.StringIO())) == 0
    found = json.loads(report.read_text())
    return {key: value for key, value in found.items() if key not in ("machine", "cost", "model")}  # seconds, and a path


def doctor(model: str) -> Any:
    from deepgrpo.lab.doctor import run_doctor
    from deepgrpo.lab.options import DoctorOptions

    as_on_cuda()
    out = io.StringIO()
    code = run_doctor(DoctorOptions(model, device=device()), Console(file=out, width=200))
    lines = [" ".join(line.split()).split(": packed")[0] for line in out.getvalue().splitlines()]
    return code, [line for line in lines if "bfloat16" not in line]  # the speed of a product


def bench(place: str) -> Any:
    from benchmarks import harness
    from benchmarks.options import BenchOptions
    from benchmarks.workloads import WORKLOADS, Workload

    as_on_cuda()
    WORKLOADS["S"] = Workload("S", 2, 4, 3, 8, 2, 2, vocabulary=64, hidden=64, layers=2)
    path = Path(place) / f"{device()}-bench.json"
    options = BenchOptions("learner", "S", repeats=1, warmup=0, threads=1, memory=False, json=path)
    assert harness.run_bench(options, Console(file=io.StringIO())) == 0
    found = json.loads(path.read_text())
    return [[arm["name"], arm["tokens"], arm["note"]] for arm in found["arms"]]


def profile(place: str) -> Any:
    """A watched product and the peak of the device. Nothing records the kernels of a device that is not there."""
    from deepgrpo.lab import profile as profile_module

    profiler, where = profile_module.profile, torch.device(device())
    profile_module.profile = lambda activities, **how: profiler(activities=activities[:1], **how)  # type: ignore[misc]
    phase, x = profile_module.PhaseProfile(), torch.ones(8, 8, device=where)
    profile_module._watched(lambda: x @ x, phase, "float32", where)()
    peak = profile_module.measure_peak("float32", where, size=64, copied_mb=1)
    return [phase.operations > 0, phase.wall_s > 0, peak.operations_per_s > 0, peak.bytes_per_s > 0]


def dry(place: str) -> Any:
    from deepgrpo.train.dry_run import dry_run

    out = io.StringIO()
    dry_run(recipe(place, "dry", 1), Console(file=out, width=200))
    return "sampled tokens" in out.getvalue(), device() in out.getvalue() or device() == "cpu"


# ---------------------------------------------------------------- parts of other processes


def exported(model: str) -> Any:
    """The weights that vLLM is given, adapters merged; and weights that are laid out as a learner without a copy fills them."""
    from deepgrpo.config import LoraConfig, PretrainedModel
    from deepgrpo.model.loading import load_policy
    from deepgrpo.model.merge import merged_state

    torch.manual_seed(0)
    policy = load_policy(PretrainedModel(path=model, lora=LoraConfig(rank=4, alpha=8)), device=device())
    with torch.no_grad():
        for parameter in policy.trainable().values():
            parameter.add_(0.01)
    state = merged_state(policy, torch.bfloat16)
    assert {value.device.type for value in state.values()} == {"cpu"}  # a second copy might not fit on the device
    return {key: float(value.double().sum()) for key, value in state.items()}


def materialized(model: str) -> Any:
    """A model on torch's meta device, judged and filled part by part, as a sharded learner does it."""
    from deepgrpo.config import PretrainedModel
    from deepgrpo.model.loading import load_policy
    from deepgrpo.model.materialize import FrozenState, Materializer, judge_meta_policy
    from deepgrpo.train.build import build_shapes

    as_on_cuda()
    section = PretrainedModel(path=model)
    policy = load_policy(section, device=device())
    policy.try_tree_packing()
    config = recipe("unused", "none", 1, model={"type": "pretrained", "path": model})
    outline = build_shapes(config)
    assert outline is not None
    trained = {key: value.detach().cpu().numpy() for key, value in policy.trainable().items()}
    values = FrozenState.of(policy).values_for(outline, trained)
    assert values is not None
    verdict = judge_meta_policy(outline, values, torch.device(device()))
    Materializer(outline, values, torch.device(device())).fill(outline.model)
    assert {p.device.type for p in outline.model.parameters()} == {device()}
    return verdict.packs, verdict.kernel, {key: float(v.detach().double().sum()) for key, v in outline.trainable().items()}
