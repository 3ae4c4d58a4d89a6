"""Whether vLLM can be had in these tests, and engines of it that start quickly."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from deepgrpo.config import VLLMEngineConfig
from deepgrpo.engines import build_engine
from deepgrpo.engines.vllm.engine import PYTHON, VLLMEngine
from deepgrpo.model.policy import Policy

HERE = importlib.util.find_spec("vllm") is not None or bool(os.environ.get(PYTHON))

needs_vllm = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(not HERE, reason=f"no vllm in this environment and no other named in {PYTHON}; see make test-vllm"),
]


def vllm_engine(policy: Policy, *, longest: int | None = None, trial: str = "float32", **config: Any) -> VLLMEngine:
    """Small and uncompiled unless the config says otherwise."""
    # on a machine that has other things to do, the start may take a while
    small = {"max_rows": 32, "kv_cache_gb": 0.25, "eager": True, "dtype": trial, "start_timeout_s": 3000}
    engine = build_engine(VLLMEngineConfig.model_validate({**small, **config}), policy, longest=longest)
    assert isinstance(engine, VLLMEngine)
    return engine


# A few lines in vLLM's place, for what is around it: the process, its lines, its failures. It says what it was told.
# BROKEN: fails to load; UNABLE: fails the trial.
# SHORT: a token too few; DIES: by a signal while it samples; SLOW: samples for ever; NAN: its log-probs.
# torch takes seconds to load, and only its store is looked at, for which tests/cluster/test_network.py has the real one.
STAND_IN = """
import json, os, pathlib, signal, sys, time, types

sys.modules["torch.distributed.rendezvous"] = types.SimpleNamespace(TCPStore=None)
__version__ = os.environ.get("VERSION", "0.32.9")
HEARD = pathlib.Path(os.environ["HEARD"])


def SamplingParams(**settings):
    return types.SimpleNamespace(**settings)


class LLM:
    def __init__(self, **settings):
        print("INFO a line of log", flush=True)
        self.caching = settings["enable_prefix_caching"]
        if os.environ.get("BROKEN"):
            raise RuntimeError(os.environ["BROKEN"])
        if os.environ.get("NO_LORA") and settings.get("enable_lora"):
            raise ValueError(os.environ["NO_LORA"])
        self.hear(what="start", settings=settings, threads=os.environ["OMP_NUM_THREADS"],
                  files=sorted(p.name for p in pathlib.Path(settings["model"]).iterdir()))
        self.next, self.tried = 10, False

    def hear(self, **what):
        with HEARD.open("a") as file:
            print(json.dumps({**what, "caching": self.caching}), file=file)

    def reset_prefix_cache(self):
        self.hear(what="reset")
        return not os.environ.get("STUCK")

    def collective_rpc(self, name, kwargs):
        self.hear(what=name, **kwargs)

    def apply_model(self, function):
        pass

    def sleep(self, level):
        self.hear(what="sleep", level=level)

    def wake_up(self):
        self.hear(what="wake")

    @property
    def llm_engine(self):
        return self

    def add_lora(self, request):
        if os.environ.get("REFUSES"):
            raise ValueError(os.environ["REFUSES"])
        self.hear(what="add_lora", number=request.lora_int_id, path=request.lora_path,
                  files=sorted(p.name for p in pathlib.Path(request.lora_path).iterdir()),
                  left=sorted(p.name for p in pathlib.Path(request.lora_path).parent.glob("*.safetensors")))
        return True

    def remove_lora(self, number):
        self.hear(what="remove_lora", number=number)

    def generate(self, prompts, params, use_tqdm, lora_request=None):
        print("INFO a line without an end", end="", flush=True)
        if not self.tried:
            self.tried = True
            if os.environ.get("UNABLE"):
                raise RuntimeError(os.environ["UNABLE"])
            return self.hear(what="trial", prompts=[p["prompt_token_ids"] for p in prompts])
        self.hear(what="generate", prompts=[p["prompt_token_ids"] for p in prompts], params=[vars(p) for p in params],
                  lora=lora_request and lora_request.lora_int_id)
        if os.environ.get("DIES"):
            os.kill(os.getpid(), signal.SIGKILL)
        if os.environ.get("SLOW"):
            time.sleep(600)
        return [types.SimpleNamespace(outputs=[self.one(p)], num_cached_tokens=1) for p in params]

    def one(self, params):
        count = params.max_tokens - bool(os.environ.get("SHORT"))
        tokens = [10 + (self.next - 10 + i) % 50 for i in range(count)]
        self.next += count
        value = float("nan") if os.environ.get("NAN") else -1.0
        logprobs = [{token: types.SimpleNamespace(logprob=value)} for token in tokens]
        return types.SimpleNamespace(token_ids=tokens, logprobs=logprobs, finish_reason="length")
"""

LORA = """
import dataclasses

@dataclasses.dataclass
class LoRARequest:
    lora_name: str
    lora_int_id: int
    lora_path: str
"""

PLATFORM = """
import os, types

current_platform = types.SimpleNamespace(
    device_type="cpu", is_cpu=lambda: True, is_sleep_mode_available=lambda: bool(os.environ.get("SLEEPS"))
)
"""


def stand_in_vllm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[], list[dict[str, Any]]]:
    """Install the stand-in for children of this interpreter."""
    package = tmp_path / "site" / "vllm"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(STAND_IN)
    (package / "platforms.py").write_text(PLATFORM)
    (package / "lora").mkdir()
    (package / "lora" / "__init__.py").touch()
    (package / "lora" / "request.py").write_text(LORA)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    monkeypatch.setenv("HEARD", str(tmp_path / "heard"))
    return lambda: [json.loads(line) for line in (tmp_path / "heard").read_text().splitlines()]
