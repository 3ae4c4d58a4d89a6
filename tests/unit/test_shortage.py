"""A step that runs out of memory says which part did and what to lower; another error passes as it is."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch

from deepgrpo.config import parse_config
from deepgrpo.errors import TrainingError
from deepgrpo.train.shortage import shortage_explained

MODEL = {"model": {"type": "scratch"}, "data": {"type": "synthetic"}, "reward": {"type": "exact"}}


def config(**sections: Any) -> Any:
    return parse_config({**MODEL, "explore": {"type": "root"}, **sections})


def test_learning_halves_the_pack_first() -> None:
    recipe = config(learner={"tokens_per_pack": 4096})
    with (
        pytest.raises(TrainingError, match="step 3, learning: out of memory") as found,
        shortage_explained(recipe, 3, "learning"),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")
    said = str(found.value)
    assert "Tried to allocate 2.00 GiB" in said and "more" not in said
    assert "learner.tokens_per_pack = 2048 (now 4096" in said
    assert said.index("tokens_per_pack") < said.index("gradient_checkpointing = true") < said.index('dtype = "bfloat16"')


def test_nothing_is_advised_that_is_set_already() -> None:
    recipe = config(learner={"gradient_checkpointing": True, "dtype": "bfloat16"})
    with pytest.raises(TrainingError) as found, shortage_explained(recipe, 1, "learning"):
        raise MemoryError
    assert "MemoryError" in str(found.value) and "checkpointing" not in str(found.value) and "bfloat16" not in str(found.value)


def test_sampling_names_the_engines_keys() -> None:
    recipe = config(engine={"max_rows": 77})
    with (
        pytest.raises(TrainingError, match=r"engine.max_rows \(now 77\).*engine.keep_mb"),
        shortage_explained(recipe, 1, "sampling"),
    ):
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")


def test_another_error_passes() -> None:
    with pytest.raises(RuntimeError, match=r"^a bug$"), shortage_explained(config(), 1, "learning"):
        raise RuntimeError("a bug")


def test_what_the_failed_part_held_is_freed() -> None:
    """The state before the step is saved next, which needs memory; the error is still alive then, with its traceback."""
    held: list[weakref.ref[Any]] = []

    def forward() -> None:
        activations = torch.ones(3)
        held.append(weakref.ref(activations))
        raise torch.OutOfMemoryError

    with pytest.raises(TrainingError) as found, shortage_explained(config(), 1, "learning"):
        forward()
    assert isinstance(found.value.__cause__, torch.OutOfMemoryError) and held[0]() is None
