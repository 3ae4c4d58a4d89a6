"""Sampling by vLLM, which holds a copy of the policy's weights and gets them anew whenever they have changed.

    sample ─► weights changed? write them to memory, vLLM reloads in place, its prefix cache is emptied
           ─► one vLLM request per continuation, with a seed of its own ─► completions, stop strings, what was encoded

vLLM runs in a process of its own, on the CPU as on a GPU. So its memory goes back to the system whatever happened in it
(a CUDA context is never given up by the process that has it); its death is an error that quotes its last words, and not the
trainer's; it may live in an environment with other versions of torch and transformers (`engine.python`); and its threads
and allocator are not those of the learner. The price is that weights cross a process border: through a file in memory, in
vLLM's dtype, once per update of the policy.

What a continuation draws depends on its prefix, its key and the weights, through vLLM's seed per request: other requests in
the batch change its logits by rounding only (`docs/engines.md` says how often that decides a token).
"""

from __future__ import annotations

import math
import os
import shutil
import sys
import time
import weakref
from collections.abc import Sequence
from typing import Any

import torch

from deepgrpo.config import VLLMEngine as VLLMConfig
from deepgrpo.engines.base import NOT_FINITE, SampleStats, SamplingParams, check_requests
from deepgrpo.engines.stops import completes_stop
from deepgrpo.engines.vllm.process import VLLMProcess
from deepgrpo.engines.vllm.weights import fingerprint, transfer_directory, write_tokenizer, write_weights
from deepgrpo.errors import EngineError
from deepgrpo.model.policy import Policy
from deepgrpo.records import Completion, FinishReason, SampleRequest

PYTHON = "DEEPGRPO_VLLM_PYTHON"
"""Names the interpreter where the recipe does not."""

CPU_CACHE_GIB = 4.0
"""Of keys and values on a CPU, where the recipe does not say; on a GPU vLLM takes what `gpu_memory` leaves."""

SEED_BITS = 2**63 - 1
"""vLLM keeps seeds as signed 64-bit integers."""

ENVIRONMENT = {
    # its engine in the process itself: that process is ours already
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    # sampler and learner take turns on the same cores
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    # nobody but us may speak to it
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_NO_USAGE_STATS": "1",
    # the model is here
    "HF_HUB_OFFLINE": "1",
}
"""Where the user has not set them otherwise."""


class VLLMEngine:
    """Samples from a `Policy` with vLLM.

    Args:
        policy: the policy; its current weights are used at every call.
        config: the section `engine` of the recipe.
        dtype: of weights, keys and values in vLLM.
        longest: prompt plus response, in tokens; None: the model's context.
        trust_remote_code: whether the model's own code may run.

    Raises EngineError if vLLM is missing, of another version or cannot start; ModelError if it does not know the model.
    """

    exact = False

    def __init__(
        self, policy: Policy, config: VLLMConfig, *, dtype: torch.dtype | None = None, longest: int | None = None,
        trust_remote_code: bool = False,
    ) -> None:  # fmt: skip
        self.policy, self.config, self.dtype = policy, config, dtype or policy.dtype
        self.context = min(longest or policy.context, policy.context)
        self._directory = transfer_directory(policy, self.dtype)
        self._remove = weakref.finalize(self, shutil.rmtree, self._directory, ignore_errors=True)
        self.awake = True
        self.updates = 0
        """Times that vLLM got new weights, the first ones not counted."""
        self.vllm_seconds = 0.0
        """Of vLLM's own sampling, without the way to it and back."""
        try:
            self._sent = fingerprint(policy)
            write_weights(policy, self._directory, self.dtype)
            tokenizer = write_tokenizer(policy, self._directory)
            python = config.python or os.environ.get(PYTHON) or sys.executable
            self.process = VLLMProcess(
                python, self._settings(tokenizer, trust_remote_code),
                {**ENVIRONMENT, "OMP_NUM_THREADS": str(torch.get_num_threads())}, config.start_timeout_s,
            )  # fmt: skip
        except BaseException:
            self._remove()
            raise
        self._end = weakref.finalize(self, VLLMProcess.close, self.process)
        if config.sleep == "on" and not self.process.can_sleep:
            self.close()
            raise EngineError(
                f'engine.sleep is "on", but vLLM cannot give its memory back on this device ({self.process.device}); set it '
                'to "auto" or "off"'
            )

    def _settings(self, tokenizer: bool, trust_remote_code: bool) -> dict[str, Any]:
        config = self.config
        return {
            "model": str(self._directory), "tokenizer": tokenizer, "trust_remote_code": trust_remote_code,
            "dtype": str(self.dtype).removeprefix("torch."), "context": self.context, "rows": config.max_rows,
            "prefix_caching": config.prefix_caching, "block_size": config.block_size, "eager": config.eager,
            "kv_bytes": None if config.kv_cache_gb is None else int(config.kv_cache_gb * 2**30),
            "kv_bytes_on_cpu": int(CPU_CACHE_GIB * 2**30), "gpu_memory": config.gpu_memory,
            "sleep": config.sleep != "off", "options": config.options,
        }  # fmt: skip

    def sample(
        self, requests: Sequence[SampleRequest], params: SamplingParams, *, keep: bool = False
    ) -> tuple[list[list[Completion]], SampleStats]:
        """See `engines.base.Engine.sample`. What was encoded stays as long as vLLM's cache has room, whatever `keep` says."""
        began = time.perf_counter()
        check_requests(requests, self.context)
        if not params.greedy and params.temperature > 2:
            raise EngineError(f"the temperature is {params.temperature}, but vLLM takes at most 2")
        self._follow()
        answer: dict[str, Any] = self._ask(self._job(requests, params)) if requests else {"seconds": 0.0}
        self.vllm_seconds += answer["seconds"]
        groups: list[list[Completion]] = []
        sampled = encoded = row = 0
        for request in requests:
            group: list[Completion] = []
            for _ in request.keys:
                tokens, logprobs = answer["tokens"][row], answer["logprobs"][row]
                if not all(map(math.isfinite, logprobs)):
                    raise EngineError(NOT_FINITE)
                group.append(self._completion(request, params, tokens, logprobs, answer["finish"][row]))
                # also those behind a stop string that only we have seen: they were drawn, so they are billed
                sampled += len(tokens)
                encoded += len(request.prefix) - answer["cached"][row]
                row += 1
            groups.append(group)
        return groups, SampleStats(
            sampled_tokens=sampled,
            prefix_tokens=sum(len(r.prefix) * len(r.keys) for r in requests),
            prefix_tokens_encoded=encoded,
            seconds=time.perf_counter() - began,
        )

    def _job(self, requests: Sequence[SampleRequest], params: SamplingParams) -> dict[str, Any]:
        return {
            "do": "sample",
            "requests": [
                {"prompt": r.prefix, "seeds": [key & SEED_BITS for key in r.keys], "max_tokens": r.max_new_tokens}
                for r in requests
            ],
            "temperature": 0.0 if params.greedy else params.temperature,
            "top_p": 1.0 if params.greedy else params.top_p,
            "stop": list(params.stop),
            "stop_token_ids": [token for token in self.policy.eos_ids if token >= 0],
        }  # fmt: skip

    def _completion(
        self, request: SampleRequest, params: SamplingParams, tokens: list[int], logprobs: list[float], finish: str
    ) -> Completion:
        """What vLLM returned, cut where a stop string is complete that began before the pivot: it sees new text only."""
        before = request.prefix[request.response_start :] if request.response_start is not None else ()
        end = _first_stop(self.policy.tokenizer, params.stop, before, tokens)
        reason: FinishReason = "stop" if end is not None or finish == "stop" else "length"
        return Completion(tuple(tokens[:end]), tuple(logprobs[:end]), reason)

    def _follow(self) -> None:
        """See to it that vLLM is awake and has the policy's present weights."""
        if not self.awake:
            if self.policy.device.type == "cuda":
                torch.cuda.empty_cache()  # what the learner's allocator holds back is another process's now
            self._ask({"do": "wake"})
            self.awake = True
        current = fingerprint(self.policy)
        if current != self._sent:
            # vLLM has read the files before and holds none of them open
            write_weights(self.policy, self._directory, self.dtype)
            self._ask({"do": "load", "model": str(self._directory)})
            self._sent = current
            self.updates += 1

    @property
    def remark(self) -> str | None:
        """See `engines.base.Engine.remark`."""
        return f"sampled by vLLM {self.process.version} on {self.process.device}, in {self._words}"

    @property
    def _words(self) -> str:
        sleeps = ", asleep while the policy learns" if self.process.can_sleep else ""
        return f"{str(self.dtype).removeprefix('torch.')}{sleeps}"

    def forget(self) -> None:
        """See `engines.base.Engine.forget`: between phases the device's memory is given back, where vLLM can."""
        if self.process.can_sleep and self.awake:
            self._ask({"do": "sleep"})
            self.awake = False

    def drop_prefixes(self) -> None:
        """Forget what was encoded, as new weights would have it: for comparisons."""
        self._ask({"do": "drop"})

    def close(self) -> None:
        """End vLLM's process, and remove the weights that it read."""
        self._end()
        self._remove()

    def _ask(self, job: dict[str, Any]) -> dict[str, Any]:
        return self.process.ask(job, self.config.timeout_s)


def _first_stop(tokenizer: Any, stop: Sequence[str], before: Sequence[int], tokens: Sequence[int]) -> int | None:
    """How many tokens there are up to and with the one that completes the first stop string; None if none does."""
    if not stop:
        return None
    # most responses have none: one look at the text, with as much of `before` as may matter, spares one per token
    tail = before[-max(map(len, stop)) - 8 :]
    text = tokenizer.decode([*tail, *tokens])
    if not any(one in text for one in stop):
        return None
    ends = (n for n in range(1, len(tokens) + 1) if completes_stop(tokenizer, stop, before, tokens[:n]))
    return next(ends, None)
