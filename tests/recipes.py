"""Small recipes as TOML, for tests that go through the command line."""

from __future__ import annotations

from typing import Any

import tomli_w

Sections = dict[str, dict[str, Any]]

TINY = {"type": "scratch", "hidden_size": 16, "num_heads": 2, "intermediate_size": 32}
TOKENS_3 = {"type": "tokens", "size": 3}
HELD_OUT = {"type": "synthetic", "chain_length": 1, "split": "test"}

CHAIN: Sections = {
    "run": {"name": "tiny", "dir": "runs", "prompts_per_step": 8, "device": "cpu", "threads": 1},
    "model": {**TINY, "max_position": 64},
    "warmstart": {"steps": 40, "batch_size": 16, "lr": 1e-2},
    "data": {"type": "synthetic", "chain_length": 1},
    "reward": {"type": "task"},
    "sampling": {"max_new_tokens": 12},
    "explore": {"type": "deep", "num_rollouts": 4, "branches_per_pivot": 4, "segments": TOKENS_3},
    "optim": {"lr": 1e-3},
}
"""A new model that learns sums of two numbers, after a warm start; a run takes a second or two."""

ON_DISK: Sections = {
    "run": {"name": "tiny", "dir": "runs", "prompts_per_step": 2, "device": "cpu"},
    "model": {"type": "pretrained", "path": "model"},
    "data": {"type": "jsonl", "path": "data.jsonl"},
    "reward": {"type": "user", "function": "reward.py:reward"},
    "loss": {"beta": 0.0},
}
"""A model, questions and a reward beside the recipe."""


def recipe_text(base: Sections, **sections: dict[str, Any]) -> str:
    """A recipe with these changes of `base`. A section with another type starts anew, and an empty one goes."""
    found = {name: dict(values) for name, values in base.items()}
    for name, values in sections.items():
        before = found.get(name, {})
        anew = "type" in before and values.get("type", before["type"]) != before["type"]
        found[name] = dict(values) if anew or not values else {**before, **values}
    return tomli_w.dumps({name: values for name, values in found.items() if values})
