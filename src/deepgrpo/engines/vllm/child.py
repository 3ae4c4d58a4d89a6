"""The vLLM process: reads jobs and writes answers as lines of JSON.

It is started by path with the interpreter of an environment that has vLLM and may have nothing else, so it imports only
the standard library and vllm. `process.py` is the parent side.

    argument  {"model": directory, "dtype": "bfloat16", "rows": 64, ...}: see `_start`
    hello     {"version": "0.32.0", "device": "cpu", "can_sleep": false}
              {"failed": "missing" | "version" | "start", "message": ...}, and the process ends with code 1
    jobs      {"do": "sample", "requests": [{"prompt": [ids], "seeds": [...], "max_tokens": 256}], "temperature": 1.0, ...}
              {"do": "load", "model": directory}        load new weights and clear the prefix cache
              {"do": "adapt", "adapters": {"number": 2, "path": directory}}  replace adapter 1 likewise; "sample" names it, too;
                                                        {"refused": reason} if vLLM does not take it
              {"do": "drop"}                            clear the prefix cache
              {"do": "sleep"}, {"do": "wake"}           release the device's memory, reclaim it
    answers   {...}, and the peak memory of the process

Any other failure ends the process with a traceback, which the parent quotes. End of file on its input ends it as well.
"""

from __future__ import annotations

import glob
import importlib
import importlib.util
import json
import os
import re
import shutil
import signal
import socket
import sys
import threading
import time
from typing import Any

OLDEST, BEYOND = (0, 32), (0, 33)
"""Supported versions of vLLM: from the first, below the second."""


def main(settings: dict[str, Any]) -> int:
    """Load the model, announce it, and serve jobs until the input ends. Returns the exit code."""
    if importlib.util.find_spec("vllm") is not None and _preload():
        os.execv(sys.executable, [sys.executable, *sys.argv])
    _end_with_parent(settings["model"])
    # vLLM logs to stdout: reserve the original pipe for answers and redirect stdout to stderr
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(**answer: Any) -> None:
        print(json.dumps({**answer, "peak_mb": _peak_mb()}), file=answers, flush=True)

    try:
        vllm, llm = _start(settings)
    except _CannotStart as problem:
        say(failed=problem.kind, message=str(problem))
        return 1
    platform = importlib.import_module("vllm.platforms").current_platform
    say(version=vllm.__version__, device=platform.device_type, can_sleep=settings["sleep"] and _can_sleep(platform))
    for line in sys.stdin:
        job = json.loads(line)
        say(**_JOBS[job["do"]](vllm, llm, job))
    # a killed parent cannot remove the weights, and in memory they would stay until a reboot
    shutil.rmtree(settings["model"], ignore_errors=True)
    return 0


def _end_with_parent(weights: str) -> None:
    """End this process and all that it started once the parent has ended, even in the middle of a job."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        shutil.rmtree(weights, ignore_errors=True)  # in memory they would stay until a reboot
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


class _CannotStart(Exception):  # noqa: N818
    """vLLM cannot start here; the parent words the error."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


def _stay_on_loopback() -> None:
    """Keep the ports of vLLM's process group to this machine: torch's store would listen on all interfaces.

    Unless the user has chosen another address by VLLM_HOST_IP.
    """
    if not os.environ.get("VLLM_HOST_IP", "").startswith("127."):
        return
    loopback = [name for _, name in socket.if_nameindex() if name in ("lo", "lo0")]
    if loopback:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback[0])
    rendezvous: Any = importlib.import_module("torch.distributed.rendezvous")
    original = rendezvous.TCPStore

    def local_store(*, host_name: str, port: int, is_master: bool = False, **options: Any) -> Any:
        if is_master and host_name.startswith("127."):
            options["master_listen_fd"] = socket.create_server((host_name, port)).detach()
        return original(host_name=host_name, port=port, is_master=is_master, **options)

    rendezvous.TCPStore = local_store


def _start(settings: dict[str, Any]) -> tuple[Any, Any]:
    try:
        # imported by name, as type checkers run without vLLM
        vllm: Any = importlib.import_module("vllm")
    except ModuleNotFoundError as error:
        if error.name != "vllm":
            raise
        raise _CannotStart("missing", sys.executable) from None
    found = tuple(map(int, re.findall(r"\d+", vllm.__version__)[:2]))
    if not OLDEST <= found < BEYOND:
        raise _CannotStart("version", vllm.__version__)
    _stay_on_loopback()
    platform = importlib.import_module("vllm.platforms").current_platform
    kv_bytes = settings["kv_bytes"] or (settings["kv_bytes_on_cpu"] if platform.is_cpu() else None)
    try:
        llm = vllm.LLM(
            model=settings["model"],
            skip_tokenizer_init=not settings["tokenizer"],  # only needed for stop strings: input and output are ids
            trust_remote_code=settings["trust_remote_code"],
            dtype=settings["dtype"],
            max_model_len=settings["context"],
            max_num_seqs=settings["rows"],
            enable_prefix_caching=settings["prefix_caching"],
            enforce_eager=settings["eager"],
            # log-probs of the sampling distribution: after penalties, temperature, and what cuts it
            logprobs_mode="processed_logprobs",
            # ignore the model's generation config (top_k, repetition penalties): the recipe decides
            generation_config="vllm",
            enable_sleep_mode=settings["sleep"] and _can_sleep(platform),
            disable_log_stats=True,
            seed=0,
            **block_size(settings["block_size"], on_cpu=platform.is_cpu()),
            **adapter_slots(settings["adapter_rank"]),
            **({"kv_cache_memory_bytes": kv_bytes} if kv_bytes else {}),
            # chunked prefill rewinds a request's generator, which raises on a CPU (vLLM 0.32): encode whole prompts, in
            # batches of 4,096 tokens or of the longest text
            **({"enable_chunked_prefill": False, **settings["options"]} if platform.is_cpu() else settings["options"]),
            **({} if platform.is_cpu() else {"gpu_memory_utilization": settings["gpu_memory"]}),
        )
        # sample one token, so that an unsupported device fails now and not in the middle of a step
        one = vllm.SamplingParams(max_tokens=1, detokenize=False)
        llm.generate([{"prompt_token_ids": [0]}], one, use_tqdm=False)
    except Exception as error:  # vLLM raises many types for a model, an argument or a device
        raise _CannotStart("start", f"{type(error).__name__}: {error}") from error
    return vllm, llm


def block_size(wanted: int | None, *, on_cpu: bool) -> dict[str, int]:
    """The argument for vLLM. On a GPU it chooses one that its fastest attention backend has; a given one excludes others."""
    size = wanted or (32 if on_cpu else None)
    return {"block_size": size} if size else {}


RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Sizes that vLLM has for adapters; a smaller adapter is padded."""


def adapter_slots(rank: int | None) -> dict[str, Any]:
    """The arguments for adapters of a rank, one at a time; none without adapters."""
    if rank is None:
        return {}
    return {
        "enable_lora": True, "max_loras": 1, "max_cpu_loras": 1,
        "max_lora_rank": next((size for size in RANKS if size >= rank), rank),
    }  # fmt: skip


def _can_sleep(platform: Any) -> bool:
    return bool(platform.is_sleep_mode_available())


def _sample(vllm: Any, llm: Any, job: dict[str, Any]) -> dict[str, Any]:
    """Continue every prompt once per seed, each as its own request; siblings share the prefix through the cache."""
    stop = job["stop"]
    prompts, params = [], []
    for request in job["requests"]:
        for seed in request["seeds"]:
            prompts.append({"prompt_token_ids": request["prompt"]})
            params.append(
                vllm.SamplingParams(
                    seed=seed, temperature=job["temperature"], **job["cuts"], max_tokens=request["max_tokens"],
                    logprobs=0, ignore_eos=True, stop_token_ids=job["stop_token_ids"], stop=stop, detokenize=bool(stop),
                    # special tokens may be stop strings; the tokens that complete one belong to the response
                    skip_special_tokens=False, include_stop_str_in_output=True, spaces_between_special_tokens=False,
                )
            )  # fmt: skip
    began = time.perf_counter()
    outputs = llm.generate(prompts, params, use_tqdm=False, lora_request=_adapter(job))
    seconds = time.perf_counter() - began
    ones = [output.outputs[0] for output in outputs]
    return {
        "seconds": seconds,
        "tokens": [list(one.token_ids) for one in ones],
        "logprobs": [
            [at[token].logprob for at, token in zip(one.logprobs, one.token_ids)]  # noqa: B905
            for one in ones
        ],
        "finish": [one.finish_reason for one in ones],
        "cached": [output.num_cached_tokens or 0 for output in outputs],
    }


def _adapter(job: dict[str, Any]) -> Any:
    """VLLM's name for the adapter of a job; None without one. A number is never used twice, so no cached key is of another."""
    wanted = job["adapters"]
    if wanted is None:
        return None
    request: Any = importlib.import_module("vllm.lora.request")
    return request.LoRARequest(f"policy-{wanted['number']}", wanted["number"], wanted["path"])


def _adapt(vllm: Any, llm: Any, job: dict[str, Any]) -> dict[str, Any]:
    began = time.perf_counter()
    if job["adapters"]["number"] > 1:
        llm.llm_engine.remove_lora(job["adapters"]["number"] - 1)
    try:
        if not llm.llm_engine.add_lora(_adapter(job)):
            return {"refused": "it gives no reason"}
    except Exception as error:  # a module or a shape that this model has no adapters for
        return {"refused": f"{type(error).__name__}: {error}"}
    _drop(vllm, llm, job)
    return {"seconds": time.perf_counter() - began}


def _load(vllm: Any, llm: Any, job: dict[str, Any]) -> dict[str, Any]:
    began = time.perf_counter()
    # vLLM's own reload: takes checkpoint names, rebuilds fused and packed layers, writes where compiled code reads
    llm.collective_rpc("reload_weights", kwargs={"weights_path": job["model"]})
    llm.apply_model(_repack_tied)
    _drop(vllm, llm, job)
    return {"seconds": time.perf_counter() - began}


def _repack_tied(model: Any) -> None:
    """Repack a head that is tied to the embeddings.

    On a CPU vLLM multiplies by a packed copy of each weight. A reload repacks the modules that receive a weight; a tied head
    receives none, and would keep the packed copy of the old embeddings (vLLM 0.32).
    """
    owners: dict[int, int] = {}
    for module in model.modules():
        weight = module._parameters.get("weight")
        if weight is not None and weight.numel() and hasattr(module, "cpu_linear"):
            if owners.setdefault(weight.data_ptr(), id(module)) != id(module):
                module.quant_method.process_weights_after_loading(module)


def _drop(vllm: Any, llm: Any, job: dict[str, Any]) -> dict[str, Any]:
    if not llm.reset_prefix_cache():
        raise RuntimeError("vLLM did not reset its prefix cache: keys of the old weights would be used with the new ones")
    return {}


def _sleep(vllm: Any, llm: Any, job: dict[str, Any]) -> dict[str, Any]:
    llm.sleep(level=1)
    return {}


def _wake(vllm: Any, llm: Any, job: dict[str, Any]) -> dict[str, Any]:
    llm.wake_up()
    return {}


_JOBS = {"sample": _sample, "load": _load, "adapt": _adapt, "drop": _drop, "sleep": _sleep, "wake": _wake}


def _preload() -> bool:
    """Preload the allocator and OpenMP that vLLM recommends, if installed. Returns True if the process must restart."""
    spec = importlib.util.find_spec("vllm")
    package = os.path.dirname((spec and spec.origin) or "")
    before = os.environ.get("LD_PRELOAD", "")
    places = [os.path.join(package, "libs", "libtcmalloc*.so*"), os.path.join(sys.prefix, "lib", "libiomp5.so")]
    found = [file for place in places for file in sorted(glob.glob(place))[:1] if file not in before]
    if found:
        os.environ["LD_PRELOAD"] = ":".join([*found, *filter(None, [before])])
    return bool(found)


def _peak_mb() -> float | None:
    """Peak resident memory of this process, in MiB; from /proc, as vLLM's environment need not have psutil."""
    try:
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) / 1024 for line in status if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        return None


if __name__ == "__main__":
    sys.exit(main(json.loads(sys.argv[1])))
