"""Samples with vLLM in an environment of its own: jobs come in as lines of JSON, answers go out as lines of JSON.

Started by its path with the interpreter of that environment, which knows nothing of this package: only the standard
library and vllm are imported here. `vllm_peer.py` is the other end.

    argument  {"model": directory, "dtype": "bfloat16", "context": 512, "rows": 64}
    hello     MARK {"version": "0.32.0", "peak_mb": 4906.8}
    job       {"fresh": bool, "requests": [{"prompt": [ids], "n": 8, "max_tokens": 256, "seed": null}]}
    answer    MARK {"seconds": 1.5, "tokens": 2048, "completions": [[[ids], ...], ...], "peak_mb": 4940.3}

Every continuation is as long as `max_tokens` says, whatever its tokens, and comes with the log-prob of each token, as
in our engine. vLLM writes its log to stdout as well, hence the mark before an answer. An end of file ends the process.
"""

from __future__ import annotations

import glob
import importlib
import importlib.util
import json
import os
import sys
import time
from typing import Any

MARK = "@deepgrpo@"


def main(settings: dict[str, Any]) -> None:
    """Load the model, say so, and answer jobs until there are no more."""
    if _preload():
        os.execv(sys.executable, [sys.executable, *sys.argv])
    # by name: the interpreter that runs this has vLLM, one that only checks it has not
    vllm: Any = importlib.import_module("vllm")
    llm = vllm.LLM(
        model=settings["model"],
        skip_tokenizer_init=True,  # token ids go in and come out
        dtype=settings["dtype"],
        max_model_len=settings["context"],
        max_num_seqs=settings["rows"],
        enable_prefix_caching=True,
        disable_log_stats=True,
        seed=0,
    )
    _say({"version": vllm.__version__, "peak_mb": _peak_mb()})
    for line in sys.stdin:
        _say({**_sample(vllm, llm, json.loads(line)), "peak_mb": _peak_mb()})


def _sample(vllm: Any, llm: Any, job: dict[str, Any]) -> dict[str, Any]:
    if job["fresh"]:
        # another step has other weights: what an earlier one has encoded is of no use, and the same prompts come again
        llm.reset_prefix_cache()
    prompts = [{"prompt_token_ids": request["prompt"]} for request in job["requests"]]
    params = [
        vllm.SamplingParams(
            n=request["n"], max_tokens=request["max_tokens"], ignore_eos=True, seed=request["seed"], temperature=1.0,
            logprobs=0, detokenize=False,
        )
        for request in job["requests"]
    ]  # fmt: skip
    began = time.perf_counter()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    completions = [[list(one.token_ids) for one in output.outputs] for output in outputs]
    logprobs = [
        [[at[token].logprob for at, token in zip(one.logprobs, one.token_ids)] for one in output.outputs]  # noqa: B905
        for output in outputs
    ]
    seconds = time.perf_counter() - began
    tokens = sum(request["n"] * request["max_tokens"] for request in job["requests"])
    for name, found in (("tokens", completions), ("log-probs", logprobs)):
        if sum(len(one) for group in found for one in group) != tokens:
            raise RuntimeError(f"vLLM did not return {tokens} {name}, which were asked for")
    return {"seconds": seconds, "tokens": tokens, "completions": completions}


def _preload() -> bool:
    """Ask for the allocator and the OpenMP that vLLM advises, where they came with it; whether that takes a new start."""
    spec = importlib.util.find_spec("vllm")
    package = os.path.dirname((spec and spec.origin) or "")
    before = os.environ.get("LD_PRELOAD", "")
    places = [os.path.join(package, "libs", "libtcmalloc*.so*"), os.path.join(sys.prefix, "lib", "libiomp5.so")]
    found = [file for place in places for file in sorted(glob.glob(place))[:1] if file not in before]
    os.environ["LD_PRELOAD"] = ":".join([*found, *filter(None, [before])])
    return bool(found)


def _peak_mb() -> float | None:
    """Highest resident memory of this process so far, in MiB."""
    try:
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) / 1024 for line in status if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        return None


def _say(answer: dict[str, Any]) -> None:
    print("\n" + MARK, json.dumps(answer), flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
