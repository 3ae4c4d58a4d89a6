"""`deepgrpo doctor MODEL`: tests of a model (packing, log-probs, sampling) before any training."""

from __future__ import annotations

import time

import torch
from rich.console import Console
from rich.table import Table

from deepgrpo.config import PretrainedModel
from deepgrpo.engines.base import SamplingParams
from deepgrpo.engines.embedded.engine import EmbeddedEngine
from deepgrpo.errors import DeepGRPOError, first_line
from deepgrpo.lab.options import DoctorOptions
from deepgrpo.model.device import resolve_device, use_threads
from deepgrpo.model.loading import load_policy
from deepgrpo.model.policy import Policy
from deepgrpo.progress import phase
from deepgrpo.records import SampleRequest

WORTHWHILE = 1.3
"""Speed-ups below this are lost in operations other than matrix products."""


def check_model(name: str, options: DoctorOptions, out: Console) -> int:
    """Load a model and print its verdicts. Returns 0 if it can be trained and sampled from, else 1."""
    policy = load_policy(
        PretrainedModel(path=name, trust_remote_code=options.trust_remote_code),
        device=resolve_device(options.device, "--device"), dtype=options.dtype,
    )  # fmt: skip
    use_threads(policy.model, None)
    with phase("testing tree packs"):
        packing = policy.try_tree_packing()
    with phase("testing the sampler"):
        sampling, problem = _sampling(policy)
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    size = sum(p.numel() for p in policy.model.parameters())
    table.add_row("model", f"{policy.causal.config.model_type}, {size / 1e6:,.1f}M parameters, context {policy.context:,}")
    table.add_row("ends a text", ", ".join(repr(policy.tokenizer.decode([i])) for i in policy.eos_ids))
    chats = bool(getattr(policy.tokenizer, "chat_template", None))
    table.add_row("chat template", "yes" if chats else "no: set template.chat = false")
    chunks = "in chunks, without full logits"
    table.add_row("log-probs", chunks if policy.plain_head else f"from full logits: {policy.head_reason}")
    where = "" if packing.window is None else f", for paths of at most {packing.window} tokens"
    table.add_row(
        "tree packing",
        f"yes ({packing.kernel}): {packing.reason}{where}" if packing.packs
        else f"no: {packing.reason}; every shared prefix is forwarded again for each branch",
    )  # fmt: skip
    table.add_row("embedded sampling", f"yes: {sampling}" if not problem else f"no: {sampling}")
    gain = bfloat16_gain(policy)
    worth = "worth" if gain >= WORTHWHILE else "not worth"
    table.add_row("bfloat16", f"matrix products {gain:.1f} times as fast as in float32: {worth} engine.dtype = \"bfloat16\"")
    out.print(table)
    return int(problem)


@torch.no_grad()
def bfloat16_gain(policy: Policy) -> float:
    """Speed-up of bfloat16 over float32 for multiplying 64 rows by the model's largest weight, on its device."""
    weight = max((p for p in policy.model.parameters() if p.ndim == 2), key=lambda p: p.numel()).float()
    given = torch.randn(64, weight.shape[1], device=weight.device)
    seconds: dict[torch.dtype, float] = {}
    for dtype in (torch.float32, torch.bfloat16):
        left, right = given.to(dtype), weight.to(dtype).t()
        trials = []
        for _ in range(6):  # the first one warms up
            began = time.perf_counter()
            float((left @ right)[0, 0])  # waits for the device
            trials.append(time.perf_counter() - began)
        seconds[dtype] = min(trials)
    return seconds[torch.float32] / seconds[torch.bfloat16]


@torch.no_grad()
def _sampling(policy: Policy) -> tuple[str, bool]:
    """Compare greedy decoding by the engine with full forward passes; (sentence, True if they disagree)."""
    vocabulary = policy.causal.config.get_text_config().vocab_size
    prompts = [tuple((7 * i + j) % min(vocabulary, 1000) for j in range(4 + 3 * i)) for i in range(3)]
    try:
        engine = EmbeddedEngine(policy, max_rows=2)
        groups, _ = engine.sample([SampleRequest(p, (1,), 6) for p in prompts], SamplingParams(greedy=True))
    except (DeepGRPOError, RuntimeError, ValueError, TypeError, AttributeError) as error:
        return first_line(error, 200), True
    worst = 0.0
    for prompt, (completion,) in zip(prompts, groups, strict=True):
        rows = torch.arange(len(prompt) - 1, len(prompt) - 1 + len(completion.tokens), device=policy.device)
        ids = torch.tensor([prompt + completion.tokens], device=policy.device)
        target = torch.tensor(completion.tokens, device=policy.device)
        logprobs, _ = policy.logprobs(ids, rows, target, temperature=1.0)
        worst = max(worst, float((logprobs.cpu() - torch.tensor(completion.logprobs)).abs().max()))
    limit = 1e-2 if policy.dtype == torch.float32 else 0.5
    remark = f"; {engine.remark}" if engine.remark else ""
    return f"its log-probs and the learner's agree within {worst:.0e}{remark}", not worst < limit
