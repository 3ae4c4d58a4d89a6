"""The vLLM engine: sampling by a vLLM process that holds a copy of the policy's weights.

    sample ─► weights changed? write them to memory, vLLM reloads in place, its prefix cache is cleared
           ─► one vLLM request per continuation, with its own seed ─► completions, stop strings, encoded tokens

vLLM runs in a separate process, on CPU and GPU alike. Its memory returns to the system even after a failure (a process never
releases its CUDA context); its crash becomes an error that quotes its log, not a crash of the trainer; it may use another
environment with other versions of torch and transformers (`engine.python`); and its threads and allocator are separate from
the learner's. The cost is copying the weights to that process once per policy update, through a file in memory, in vLLM's
dtype. Of a policy with adapters, the base is copied once at the start and the adapters alone after each update.

A continuation depends on its prefix, its key and the weights, through vLLM's per-request seed; other requests in the batch
change its logits only by rounding (`docs/engines.md` reports how often that changes a token).
"""

from __future__ import annotations

import math
import os
import shutil
import sys
import time
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from deepgrpo.config import VLLMEngineConfig
from deepgrpo.engines.base import SampleStats, SamplingParams, check_requests, not_finite
from deepgrpo.engines.stops import first_stop
from deepgrpo.engines.vllm.process import VLLMProcess
from deepgrpo.engines.vllm.weights import (
    fingerprint,
    remove_weights,
    transfer_directory,
    write_adapters,
    write_tokenizer,
    write_weights,
)
from deepgrpo.errors import EngineError, EngineLostError, ModelError, first_line
from deepgrpo.model.adapters import adapter_rank, has_adapters
from deepgrpo.model.policy import Policy
from deepgrpo.progress import phase
from deepgrpo.records import Completion, FinishReason, SampleRequest
from deepgrpo.threads import spin_settings

PYTHON = "DEEPGRPO_VLLM_PYTHON"
"""Environment variable with the interpreter, if the recipe names none."""

CPU_CACHE_GIB = 4.0
"""Default size of the key/value cache on a CPU; on a GPU vLLM uses what `gpu_memory` leaves."""

SEED_BITS = 2**63 - 1
"""vLLM stores seeds as signed 64-bit integers."""

ENVIRONMENT = {
    # run its engine inside the process that we already started for it
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    # sampler and learner take turns on the same cores
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    # bind to the loopback interface only
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_NO_USAGE_STATS": "1",
    # the model is local
    "HF_HUB_OFFLINE": "1",
}
"""Environment of the vLLM process; variables that the user has set take precedence."""


def own_gpu_first(device: torch.device, environment: Mapping[str, str]) -> dict[str, str]:
    """Environment in which vLLM, which takes the first visible GPU, takes the policy's, e.g. with `run.device = "cuda:1"`."""
    if device.type != "cuda" or not device.index:
        return {}
    named = environment.get("CUDA_VISIBLE_DEVICES")
    seen = named.split(",") if named else [str(number) for number in range(torch.cuda.device_count())]
    own = seen.pop(device.index)
    return {"CUDA_VISIBLE_DEVICES": ",".join([own, *seen])}


def sends_adapters(config: VLLMEngineConfig, policy: Policy) -> bool:
    """True if a policy has adapters and they are to go to vLLM alone."""
    return config.adapters != "merged" and has_adapters(policy.model)


class VLLMEngine:
    """Samples from a `Policy` with vLLM.

    Args:
        policy: the policy; every call uses its current weights.
        config: section `engine` of the recipe.
        dtype: dtype of weights, keys and values in vLLM.
        longest: longest prompt plus response, in tokens; None: the model's context.
        trust_remote_code: allow the model's own code to run.

    Raises EngineError if vLLM is missing, has an unsupported version or cannot start; ModelError if it does not support
    the model.
    """

    exact = False

    def __init__(
        self, policy: Policy, config: VLLMEngineConfig, *, dtype: torch.dtype | None = None, longest: int | None = None,
        trust_remote_code: bool = False,
    ) -> None:  # fmt: skip
        self.policy, self.config, self.dtype = policy, config, dtype or policy.dtype
        self.context = min(longest or policy.context, policy.context)
        self.directory = transfer_directory(policy, self.dtype)
        self._remove = weakref.finalize(self, shutil.rmtree, self.directory, ignore_errors=True)
        self.awake = True
        self.updates = 0
        """Weight reloads after the start."""
        self.vllm_seconds = 0.0
        """Seconds spent inside vLLM's sampling, without communication."""
        self.sent_bytes = 0
        """Bytes of the weights that were sent last."""
        self.alone = sends_adapters(config, policy)
        """True if adapters go to vLLM alone, and are not merged into the weights."""
        self.why_merged = ""
        self._adapters: dict[str, Any] | None = None
        """Number and directory of the adapters that vLLM has."""
        try:
            self._sent = fingerprint(policy)
            try:
                self._start(trust_remote_code)
            except EngineLostError:
                raise
            except (EngineError, ModelError) as error:
                if not self.alone or config.adapters == "alone":
                    raise
                self._close_process()
                self.alone, self._adapters, self.why_merged = False, None, first_line(error)
                self._start(trust_remote_code)
        except BaseException:
            self._close_process()
            self._remove()
            raise
        self._end = weakref.finalize(self, VLLMProcess.close, self.process)
        if config.sleep == "on" and not self.process.can_sleep:
            self.close()
            raise EngineError(
                f'engine.sleep is "on", but vLLM cannot give its memory back on this device ({self.process.device}); set it '
                'to "auto" or "off"'
            )

    @classmethod
    def from_config(
        cls, policy: Policy, config: VLLMEngineConfig, *, dtype: torch.dtype, longest: int | None, trust_remote_code: bool
    ) -> VLLMEngine:
        """Start the engine of the section `engine` of a recipe."""
        return cls(policy, config, dtype=dtype, longest=longest, trust_remote_code=trust_remote_code)

    def _start(self, trust_remote_code: bool) -> None:
        """Start the process on the present weights."""
        self.sent_bytes = write_weights(self.policy, self.directory, self.dtype, merge=not self.alone)
        tokenizer = write_tokenizer(self.policy, self.directory)
        python = self.config.python or os.path.expanduser(os.environ.get(PYTHON, "")) or sys.executable
        with phase("starting vLLM"):
            self.process = VLLMProcess(
                python, self._settings(tokenizer, trust_remote_code),
                {**ENVIRONMENT, **spin_settings(), "OMP_NUM_THREADS": str(torch.get_num_threads())},
                self.config.start_timeout_s, own_gpu_first(self.policy.device, os.environ),
            )  # fmt: skip
        if self.alone:
            remove_weights(self.directory)
            self._send_adapters()

    def _close_process(self) -> None:
        if hasattr(self, "process"):
            self.process.close()
            del self.process

    def _send_adapters(self) -> None:
        number = self._adapters["number"] + 1 if self._adapters else 1
        self._adapters = {"number": number, "path": str(self.directory / "adapters")}
        self.sent_bytes = write_adapters(self.policy, self.directory / "adapters")
        answer = self._ask({"do": "adapt", "adapters": self._adapters})
        if "refused" in answer:
            reason = answer["refused"].splitlines()[0]
            raise EngineError(f'vLLM does not take the adapters ({reason}); set engine.adapters = "merged"')

    def _settings(self, tokenizer: bool, trust_remote_code: bool) -> dict[str, Any]:
        config = self.config
        return {
            "model": str(self.directory), "tokenizer": tokenizer, "trust_remote_code": trust_remote_code,
            "dtype": str(self.dtype).removeprefix("torch."), "context": self.context, "rows": config.max_rows,
            "prefix_caching": config.prefix_caching, "block_size": config.block_size, "eager": config.eager,
            "kv_bytes": None if config.kv_cache_gb is None else int(config.kv_cache_gb * 2**30),
            "kv_bytes_on_cpu": int(CPU_CACHE_GIB * 2**30), "gpu_memory": config.gpu_memory,
            "sleep": config.sleep != "off", "options": config.options,
            "adapter_rank": adapter_rank(self.policy.model) if self.alone else None,
        }  # fmt: skip

    def sample(
        self, requests: Sequence[SampleRequest], params: SamplingParams, *, keep: bool = False
    ) -> tuple[list[list[Completion]], SampleStats]:
        """See `engines.base.Engine.sample`. vLLM's cache holds prefixes while it has room, regardless of `keep`."""
        began = time.perf_counter()
        check_requests(requests, self.context, self.policy.token_rows)
        if not params.greedy and params.temperature > 2:
            raise EngineError(f"the temperature is {params.temperature}, but vLLM takes at most 2")
        self._update_weights()
        with phase(f"sampling {sum(len(r.keys) for r in requests):,} responses with vLLM"):
            answer: dict[str, Any] = self._ask(self._job(requests, params)) if requests else {"seconds": 0.0}
        self.vllm_seconds += answer["seconds"]
        groups: list[list[Completion]] = []
        sampled = encoded = row = 0
        for request in requests:
            group: list[Completion] = []
            for _ in request.keys:
                tokens, logprobs = answer["tokens"][row], answer["logprobs"][row]
                bad = next((i for i, logprob in enumerate(logprobs) if not math.isfinite(logprob)), None)
                if bad is not None:
                    raise not_finite(self.policy.tokenizer, request, bad)
                group.append(self._completion(request, params, tokens, logprobs, answer["finish"][row]))
                # including tokens after a stop string that only we detect: they were sampled, so they are billed
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
            "adapters": self._adapters,
            "requests": [
                {"prompt": r.prefix, "seeds": [key & SEED_BITS for key in r.keys], "max_tokens": r.max_new_tokens}
                for r in requests
            ],
            "temperature": 0.0 if params.greedy else params.temperature,
            # 0 is vLLM's word for all tokens
            "cuts": {} if params.greedy else {
                "top_p": params.top_p, "top_k": params.top_k or 0, "min_p": params.min_p,
                "repetition_penalty": params.repetition_penalty,
            },
            "stop": list(params.stop),
            "stop_token_ids": [token for token in self.policy.eos_ids if token >= 0],
        }  # fmt: skip

    def _completion(
        self, request: SampleRequest, params: SamplingParams, tokens: list[int], logprobs: list[float], finish: str
    ) -> Completion:
        """Completion from vLLM's result, cut after a stop string that began before the pivot, which vLLM cannot see."""
        end = first_stop(self.policy.tokenizer, params.stop, request.response, tokens)
        reason: FinishReason = "stop" if end is not None or finish == "stop" else "length"
        return Completion(tuple(tokens[:end]), tuple(logprobs[:end]), reason)

    def _update_weights(self) -> None:
        """Wake vLLM and reload the weights if the policy's have changed."""
        if not self.awake:
            if self.policy.device.type == "cuda":
                torch.cuda.empty_cache()  # release the learner's cached blocks to the vLLM process
            self._ask({"do": "wake"})
            self.awake = True
        current = fingerprint(self.policy)
        if current != self._sent:
            # vLLM has no file of the directory open
            if self.alone:
                self._send_adapters()
            else:
                self.sent_bytes = write_weights(self.policy, self.directory, self.dtype)
                self._ask({"do": "load", "model": str(self.directory)})
            self._sent = current
            self.updates += 1

    @property
    def remark(self) -> str | None:
        """See `engines.base.Engine.remark`."""
        asleep = ", asleep while the policy learns" if self.process.can_sleep else ""
        dtype = str(self.dtype).removeprefix("torch.")
        adapted = ", which gets the adapters alone" if self.alone else ""
        said = f"sampled by vLLM {self.process.version} on {self.process.device}, in {dtype}{adapted}{asleep}"
        if self.why_merged:
            said += f"; adapters are merged for it, as it did not start with them alone: {self.why_merged}"
        return said

    def forget(self) -> None:
        """See `engines.base.Engine.forget`. Also puts vLLM to sleep until the next call, where the device supports it."""
        if self.process.can_sleep and self.awake:
            self._ask({"do": "sleep"})
            self.awake = False

    def drop_prefixes(self) -> None:
        """Clear vLLM's prefix cache, as new weights would: for comparisons."""
        self._ask({"do": "drop"})

    def close(self) -> None:
        """End the vLLM process and remove its weight files."""
        self._end()
        self._remove()

    def _ask(self, job: dict[str, Any]) -> dict[str, Any]:
        return self.process.ask(job, self.config.timeout_s)
