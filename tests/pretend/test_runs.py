"""Everything that runs on one GPU, on the pretended one: tensors are where they belong, results equal the CPU's bit by bit.

What the pretended device cannot see (kernels, memory, NCCL, errors that come late, flex attention): docs/scaling.md.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pretend import scenes
from pretend.server import Server
from tiny import save_model

ROOT_ROWS = {
    "explore": {"type": "root", "num_rollouts": 6}, "optim": {"lr": 3e-3, "eps": 1e-4, "minibatches": 2},
    "learner": {"tree_packing": "off", "tokens_per_pack": 384, "logprob_chunk": 4},
    "sampling": {"max_new_tokens": 10, "top_p": 0.9},
}  # fmt: skip
ATTNRL = {
    "explore": {
        "type": "attnrl", "num_rollouts": 3, "num_pivots": 2, "branches_per_pivot": 2, "top_share": 0.5, "lag": 1,
        "segments": {"type": "tokens", "size": 3},
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model(tmp_path_factory.mktemp("llama"))


def equal(server: Server, name: str, **arguments: Any) -> Any:
    """The result of a scene, the same on both devices."""
    here, there = (server.call(scenes.__file__, name, device, arguments) for device in ("cpu", "cuda"))
    assert differences(here, there) == []
    return there


def differences(a: Any, b: Any, where: str = "") -> list[str]:
    """Places where two JSON values differ, with both; not a number equals not a number."""
    if isinstance(a, dict) and isinstance(b, dict):
        return [line for key in {**a, **b} for line in differences(a.get(key), b.get(key), f"{where} {key}")]
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        return [line for i, (x, y) in enumerate(zip(a, b, strict=True)) for line in differences(x, y, f"{where}[{i}]")]
    return [] if a == b or (a != a and b != b) else [f"{where}: cpu {a!r}, cuda {b!r}"]


@pytest.mark.parametrize("sections", [{}, ROOT_ROWS, ATTNRL], ids=["deep-packs", "root-rows", "attnrl-signals"])
def test_training(server: Server, tmp_path: Path, sections: dict[str, Any]) -> None:
    """Two steps: sampling, reward, credit, packs or rows, KL, AdamW, the checkpoint at the end."""
    metrics, weights, _ = equal(server, "run", place=str(tmp_path), steps=2, **sections)
    assert [line["step"] for line in metrics] == [1, 2] and weights
    assert any(line["main/mixed"] > 0 and line["grad_norm"] > 0 for line in metrics)


def test_warm_start_evaluation_checkpoints_and_resume(server: Server, tmp_path: Path) -> None:
    metrics, _ = equal(server, "resumed", place=str(tmp_path))
    assert [line["step"] for line in metrics] == [0, 1, 2] and "eval/greedy" in metrics[0]


def test_adapters_gradient_checkpointing_and_the_eval_command(server: Server, tmp_path: Path, llama: str) -> None:
    metrics, weights, evaluated = equal(server, "adapters", place=str(tmp_path), model=llama)
    assert any("lora_" in name for name in weights) and "main/kl" in metrics[-1] and evaluated["eval/prompts"] == 2


@pytest.mark.parametrize("kind", ["plain", "shared", "bfloat16"])
def test_the_embedded_engine(server: Server, kind: str) -> None:
    """Slots, prefixes taken from finished rollouts, prefixes read where they are, a copy of the weights in bfloat16."""
    completions, _ = equal(server, "sampled", kind=kind)
    assert len(completions) == 7


def test_generate_where_slots_do_not_work(server: Server) -> None:
    completions, remark = equal(server, "generated")
    assert len(completions) == 2 and "generate" in remark


@pytest.mark.parametrize(("layout", "dtype", "keep_mb"), [
    ("on", "float32", 0), ("off", "float32", 64), ("on", "bfloat16", 64),
])  # fmt: skip
def test_an_update(server: Server, layout: str, dtype: str, keep_mb: int) -> None:
    """Packs and rows with KL and several optimizer steps; log-probs in chunks, logits kept or computed again."""
    metrics, _ = equal(server, "updated", layout=layout, dtype=dtype, keep_mb=keep_mb)
    assert metrics["grad_norm"] > 0 and metrics["main/kl"] != 0


@pytest.mark.parametrize("command", ["probe", "bench", "profile", "dry"])
def test_commands(server: Server, tmp_path: Path, command: str) -> None:
    assert equal(server, command, place=str(tmp_path))


def test_doctor(server: Server, llama: str) -> None:
    """Its verdicts; the differences that it measured are of rounding, and a gradient is summed in an order of its own."""
    code, lines = equal(server, "doctor", model=llama)
    assert code == 0 and "tree packing yes (gather)" in lines


@pytest.mark.parametrize("scene", ["exported", "materialized"])
def test_weights_for_other_processes(server: Server, llama: str, scene: str) -> None:
    """What vLLM is given, and a model that is filled part by part."""
    assert equal(server, scene, model=llama)
