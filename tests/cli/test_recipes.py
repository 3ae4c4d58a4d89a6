"""Every recipe that comes along loads and fits together, with a tiny random model in place of the real one."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from deepgrpo.config import PretrainedModel, load_recipe
from deepgrpo.config.shipped import find_recipe, list_recipes
from deepgrpo.train.dry_run import dry_run
from deepgrpo.train.loop import train
from tiny import save_model, write_jsonl

NAMES = [name for name, _ in list_recipes()]
# the columns of GSM8K and of MATH together
ROWS = [
    {
        "unique_id": f"test/{i}", "question": f"Ann has {i} apples and buys 3 more. How many has she?",
        "problem": f"What is ${i} + 3$?", "answer": str(i + 3), "solution": f"It is $\\boxed{{{i + 3}}}$.",
    }
    for i in range(6)
]  # fmt: skip


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Paths of a model of each architecture, and of a data file."""
    place = tmp_path_factory.mktemp("stand-ins")
    return {
        "llama": save_model(place / "llama", "llama"),
        "qwen2": save_model(place / "qwen2", "qwen2"),
        "rows": write_jsonl(place / "rows.jsonl", ROWS),
    }


def overrides(name: str, stand_ins: dict[str, str]) -> list[tuple[str, str]]:
    """What has to be changed so that a recipe runs without its model and its data."""
    config = load_recipe(find_recipe(name))
    changes = [("run.device", "cpu")]
    if isinstance(config.model, PretrainedModel):
        family = "qwen2" if "Qwen" in config.model.path else "llama"
        changes += [("model.path", stand_ins[family]), ("model.gguf_file", "none")]
    for section, data in (("data", config.data), ("eval.data", config.eval.data)):
        if data is not None and data.type in ("jsonl", "hf"):
            # a hub data set's own keys (name, split) are dropped with its type
            changes += [(f"{section}.type", "jsonl"), (f"{section}.path", stand_ins["rows"])]
    return changes


def test_there_are_recipes() -> None:
    assert len(NAMES) >= 9 and {"demo", "gsm8k-smollm2-cpu"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_dry_run_of_a_recipe(name: str, stand_ins: dict[str, str]) -> None:
    if name == "smollm2-arithmetic-cpu":
        pytest.importorskip("reasoning_gym")
    if name == "multihop-smollm2-cpu":
        pytest.importorskip("bm25s")
    config = load_recipe(find_recipe(name), overrides(name, stand_ins))
    shown = io.StringIO()
    dry_run(config, Console(file=shown, width=200, highlight=False))
    text = shown.getvalue()
    assert text.endswith("dry run: nothing was trained\n")
    assert "rows skipped" not in text
    if config.data.type == "jsonl":
        # the question in the words of the recipe's template, inside the chat template
        question = "Ann has" if name.startswith("gsm8k") else "What is $"
        asked_for = "####" if name.startswith("gsm8k") else "\\boxed{}"
        prompt = text.split("\nprompt ")[1]
        assert question in prompt and asked_for in prompt and "<|assistant|>" in prompt


PLACES = [
    ("gsm8k-qwen2.5-0.5b", ""), ("math-qwen2.5-1.5b", ""), ("math-qwen2.5-7b", ""), ("gsm8k-qwen2.5-0.5b", "-vllm"),
    ("math-qwen2.5-1.5b", "-vllm"), ("math-qwen2.5-7b", "-8gpu"), ("math-qwen2.5-7b", "-2x8gpu"),
]  # fmt: skip
MATHEMATICS = ("model", "data", "reward", "sampling", "credit", "optim", "eval")


@pytest.mark.parametrize(("task", "place"), PLACES)
def test_the_arms_of_a_comparison_differ_in_nothing_else(task: str, place: str) -> None:
    """DEEP-GRPO and GRPO share model, data, reward, sampling, optimizer and evaluation."""
    deep, grpo = (load_recipe(find_recipe(f"{task}-{arm}{place}")) for arm in ("deep", "grpo"))
    for section in (*MATHEMATICS, "engine", "learner", "checkpoint", "cluster"):
        assert getattr(deep, section) == getattr(grpo, section), section
    assert (deep.explore.type, deep.explore.num_rollouts) == ("deep", 8)
    assert grpo.explore.type == "root"


@pytest.mark.parametrize(("task", "place"), [each for each in PLACES if each[1]])
@pytest.mark.parametrize("arm", ["deep", "grpo"])
def test_elsewhere_an_arm_is_the_same(task: str, place: str, arm: str) -> None:
    """More GPUs and another engine change where it is computed, and nothing of the paper's."""
    plain, here = (load_recipe(find_recipe(f"{task}-{arm}{where}")) for where in ("", place))
    for section in (*MATHEMATICS, "explore", "loss", "checkpoint"):
        assert getattr(here, section) == getattr(plain, section), section
    assert here.run.model_copy(update={"name": plain.run.name, "device": plain.run.device}) == plain.run
    assert here.engine.type == "vllm" and (here.cluster is not None) == ("gpu" in place)


def test_two_steps_of_gsm8k_on_a_cpu(tmp_path: Path, stand_ins: dict[str, str]) -> None:
    """With the recipe's reward, a worker of math-verify, and its evaluation before and after."""
    name = "gsm8k-smollm2-cpu"
    shorter = {"run.dir": str(tmp_path), "run.steps": "2", "sampling.max_new_tokens": "12", "eval.limit": "4"}
    run = train(load_recipe(find_recipe(name), [*overrides(name, stand_ins), *shorter.items()]))
    lines: list[dict[str, Any]] = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2]
    assert all("eval/greedy" in line for line in (lines[0], lines[2]))
    for line in lines[1:]:
        # 4 prompts of 8 rollouts, none of which a random model gets right, so each has a pivot with 8 branches
        assert (line["main/rollouts"], line["pivots/count"], line["branch/rollouts"]) == (32, 32, 256)
        assert line["reward/problems"] == 0
    assert (run / "checkpoints" / "step-000002" / "model" / "model.safetensors").is_file()
