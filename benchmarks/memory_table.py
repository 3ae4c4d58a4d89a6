"""The memory tables of docs/scaling.md: formulas worked here from the shapes, against what `deepgrpo train --dry-run` prints.

    python -m benchmarks.memory_table > table.md

Writes a config and a tokenizer per model into a temporary directory; no weights are needed, and none are made.
"""

from __future__ import annotations

import io
import re
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console

from deepgrpo.config import Config, parse_config
from deepgrpo.prompts import synthetic
from deepgrpo.train.dry_run import dry_run

GIB = 2**30

# vocabulary, hidden size, feed-forward size, layers, query heads, key heads, tied embeddings, biases of q, k and v
SHAPES: dict[str, tuple[int, int, int, int, int, int, bool, bool]] = {
    "Qwen2.5-0.5B": (151_936, 896, 4_864, 24, 14, 2, True, True),
    "Qwen2.5-1.5B": (151_936, 1_536, 8_960, 28, 12, 2, True, True),
    "Qwen2.5-7B": (152_064, 3_584, 18_944, 28, 28, 4, False, True),
    "Qwen2.5-14B": (152_064, 5_120, 13_824, 48, 40, 8, False, True),
    "Qwen2.5-32B": (152_064, 5_120, 27_648, 64, 40, 8, False, True),
    "Llama-3-70B": (128_256, 8_192, 28_672, 80, 64, 8, False, False),
}
LEARNERS = (1, 8, 16)
RANK = 16
"""Of the adapters in the second table, on all linear layers but the head."""
CACHE_GB = 16


def parameters(name: str) -> tuple[int, int, int]:
    """Parameters of the whole model, of a decoder layer, and outside the layers."""
    vocabulary, hidden, feed_forward, layers, heads, key_heads, tied, biases = SHAPES[name]
    keys = key_heads * (hidden // heads)
    attention = 2 * hidden * hidden + 2 * hidden * keys + (hidden + 2 * keys if biases else 0)
    layer = attention + 3 * hidden * feed_forward + 2 * hidden
    rest = vocabulary * hidden * (1 if tied else 2) + hidden
    return layers * layer + rest, layer, rest


def formula(name: str, learners: int) -> dict[str, float]:
    """GiB of a learner, with a reference and without activations, and of a rollout worker with vLLM in bfloat16.

    20 P / N, for N > 1 plus what is whole at a time: 12 bytes per parameter of embeddings, head and of a layer, the reference's
    embeddings and head included. At the start 8 P / N and the larger of embeddings with head and a layer; before that,
    in no case less, embeddings with head and a layer with its gradient.
    """
    every, layer, rest = parameters(name)
    whole = 12 * (rest + layer) if learners > 1 else 0
    start = max(8 * every / learners + 4 * max(rest, layer), 4 * (rest + 2 * layer))
    return {
        "held": (20 * every / learners + whole) / GIB, "start": start / GIB if learners > 1 else 0.0,
        "worker": 2 * every / GIB + CACHE_GB,
    }  # fmt: skip


def adapted(name: str) -> dict[str, float]:
    """Trained parameters and GiB of one learner with adapters, its base in float32 and in bfloat16; without activations.

    Matrices take 4 or 2 bytes, vectors 4; the adapters 16, with their gradient and moments. There is no reference.
    """
    vocabulary, hidden, feed_forward, layers, heads, key_heads, tied, _ = SHAPES[name]
    keys = key_heads * (hidden // heads)
    matrices = layers * (2 * hidden * hidden + 2 * hidden * keys + 3 * hidden * feed_forward)
    matrices += vocabulary * hidden * (1 if tied else 2)
    vectors = parameters(name)[0] - matrices
    both = 2 * (hidden + hidden) + 2 * (hidden + keys) + 3 * (hidden + feed_forward)
    trained = RANK * layers * both
    held = {kind: (size * matrices + 4 * vectors + 16 * trained) / GIB for kind, size in (("float32", 4), ("bfloat16", 2))}
    return {"trained": float(trained), **held}


def printed(name: str, learners: int, place: Path, lora: dict[str, Any] | None = None) -> dict[str, float]:
    """The same, and what the learner has with its activations, as a dry run prints them."""
    shown = io.StringIO()
    dry_run(_recipe(_directory(name, place), learners, place, lora), Console(file=shown, width=200, highlight=False))
    text = shown.getvalue()
    uses = ("weights", "gradients", "optimizer", "reference", "gathered from shards")
    column = _block(text, "learner, GPU") if learners > 1 else _rows(text)
    held = sum(column.get(use, 0.0) for use in uses)
    sampler = column if learners == 1 else _block(text, "rollout worker, GPU")
    worker = sampler["weights of the engine"] + sampler["cache"]
    return {
        "held": held, "step": held + column["activations"], "start": column.get("while it starts", 0.0), "worker": worker,
    }  # fmt: skip


def _rows(text: str) -> dict[str, float]:
    """Memory of a run in one process."""
    found = re.findall(r"memory, (.*?) +│ +([\d,.]+) GiB", text)
    return {label: float(value.replace(",", "")) for label, value in found}


def _block(text: str, title: str) -> dict[str, float]:
    """Memory of one kind of process of a cluster."""
    block = text.split(f"│ {title} ")[1].split("├")[0]
    return {label: float(value.replace(",", "")) for label, value in re.findall(r"│   (.*?) +│ +([\d,.]+) GiB", block)}


def _directory(name: str, place: Path) -> Path:
    from transformers import LlamaConfig, Qwen2Config

    vocabulary, hidden, feed_forward, layers, heads, key_heads, tied, biases = SHAPES[name]
    kind = Qwen2Config if biases else LlamaConfig
    kind(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=feed_forward, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=key_heads, tie_word_embeddings=tied, max_position_embeddings=4096,
        dtype="bfloat16",
    ).save_pretrained(place / name)  # fmt: skip
    synthetic.tokenizer().save_pretrained(place / name)
    return place / name


def _recipe(model: Path, learners: int, place: Path, lora: dict[str, Any] | None) -> Config:
    raw: dict[str, Any] = {
        "run": {"dir": str(place / "runs"), "device": "cuda"},
        "model": {"type": "pretrained", "path": str(model), "lora": lora},
        "data": {"type": "synthetic", "template": {"chat": False}},
        "reward": {"type": "task"},
        "engine": {"type": "vllm", "kv_cache_gb": CACHE_GB},
        "learner": {"dtype": "bfloat16", "tokens_per_pack": 16_384, "gradient_checkpointing": True},
    }
    if learners > 1:
        # of 8 or 16 GPUs all learn; those that sample come on top
        raw["cluster"] = {"learners": learners, "sharding": "fsdp", "address": "auto"}
    return parse_config(raw)


def main() -> None:
    """Print the tables as markdown."""
    columns = ("model", "parameters", "learners", "held, formula", "held", "with activations", "at the start", "rollout worker")
    print(f"| {' | '.join(columns)} |")
    print("|---" * len(columns) + "|")
    with tempfile.TemporaryDirectory() as directory:
        for name in SHAPES:
            for learners in LEARNERS:
                ours, theirs = formula(name, learners), printed(name, learners, Path(directory))
                start = f"{theirs['start']:,.1f}" if learners > 1 else ""
                print(
                    f"| {name} | {parameters(name)[0] / 1e9:.2f}B | {learners} | {ours['held']:,.1f} | {theirs['held']:,.1f} | "
                    f"{theirs['step']:,.1f} | {start} | {theirs['worker']:,.1f} |"
                )
        of_adapters = ("model", "trained", "base in float32, formula", "in bfloat16, formula", "printed", "with activations")
        print(f"\n| {' | '.join(of_adapters)} |")
        print("|---" * len(of_adapters) + "|")
        for name in SHAPES:
            ours, theirs = adapted(name), printed(name, 1, Path(directory), {"rank": RANK})
            print(
                f"| {name} | {ours['trained'] / 1e6:.1f}M | {ours['float32']:,.1f} | {ours['bfloat16']:,.1f} | "
                f"{theirs['held']:,.1f} | {theirs['step']:,.1f} |"
            )


if __name__ == "__main__":
    main()
