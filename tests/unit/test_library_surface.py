"""The public names: a name that goes, or a changed signature, breaks a test."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
from surroundings import ROOT

import deepgrpo

SIGNATURES = {
    "train": "config, *, model, tokenizer, dataset, eval_dataset, rewards, reward_weights, strategy, callbacks, overrides, "
    "resume, step, show",
    "steps": "config, *, model, tokenizer, dataset, eval_dataset, rewards, reward_weights, strategy, callbacks, overrides, "
    "resume, step, show",
    "evaluate": "model, dataset, *, tokenizer, rewards, reward_weights, config, overrides, samples, k, limit, seed, device, "
    "max_rows",
    "Run": "directory",
    "load_run": "run",
    "load_trees": "run, steps",
    "load_recipe": "path, overrides",
    "parse_config": "raw, source",
    "to_toml": "config",
    "list_recipes": "",
    "group_advantages": "rewards, *, scale",
    "select_pivots": "ends, *, num_pivots, gamma, recoverability, root_pivot, max_ratio, room, random",
    "fit_recoverability": "ratios, outcomes, *, model, l2, bins, min_items",
    "dual_stream_loss": "logprobs, advantages, *, branch, old_logprobs, mask, sequence, reference_logprobs, lambda_, beta, "
    "clip_low, clip_high, dual_clip, reduction, reduction_length",
    "pack_trees": "trees, credits, *, tokens_per_pack, share_prefixes",
    "tree_mask": "pack",
    "pass_at_k": "n, c, k",
    "maj_at_k": "answers, k",
    "main_pivot": "num_rollouts",
    "sibling_credit": "tree, scale, stream",
    "build_segmenter": "config, tokenizer",
}
"""Public function or class → names of its parameters; those behind * are passed by name."""

OTHERS = {
    "Callback", "CallbackError", "CheckpointError", "Completion", "Config", "ConfigError", "Context", "Credit", "CreditSpan",
    "DataError", "DeepGRPOError", "EngineError", "EnvError", "Environment", "EvalResult", "Group", "Ledger", "Limits",
    "MissingExtraError", "ModelError",
    "Node", "Packed", "Pivot", "PivotDraw", "Prompt", "Recoverability", "RewardError", "SampleRequest", "Score", "Signal",
    "Stateless", "StepReport", "Steps", "Strategy", "StrategyError", "TrainingError", "DivergenceError", "Tree", "Turn",
    "__version__",
}  # fmt: skip


def test_the_names() -> None:
    assert set(deepgrpo.__all__) == {*SIGNATURES, *OTHERS} == set(dir(deepgrpo))
    for name in deepgrpo.__all__:
        assert getattr(deepgrpo, name) is not None
        assert name == "__version__" or inspect.getdoc(getattr(deepgrpo, name)), name
    with pytest.raises(AttributeError, match="no attribute 'trian'; public names: Callback"):
        _ = deepgrpo.trian


@pytest.mark.parametrize("name", SIGNATURES)
def test_the_signatures(name: str) -> None:
    found, star = [], False
    for parameter in inspect.signature(getattr(deepgrpo, name)).parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and not star:
            found, star = [*found, "*"], True
        found.append(parameter.name)
    assert ", ".join(found) == SIGNATURES[name]


def test_type_checkers_see_the_same_names() -> None:
    stub = Path(deepgrpo.__file__).with_suffix(".pyi").read_text(encoding="utf-8")
    body = ast.parse(stub).body
    imported = {alias.name: node.module for node in body if isinstance(node, ast.ImportFrom) for alias in node.names}
    (listed,) = [ast.literal_eval(node.value) for node in body if isinstance(node, ast.Assign)]
    assert listed == deepgrpo.__all__ and {*imported, "__version__"} == set(listed)
    for name, module in imported.items():
        if name != "train":
            assert getattr(sys.modules[module], name) is getattr(deepgrpo, name)


def test_the_page_lists_each_name_once() -> None:
    page = (ROOT / "docs" / "library.md").read_text(encoding="utf-8")
    table = page.partition("## The surface")[2].partition("Anything else may move")[0]
    names = [name for line in table.splitlines() if line.startswith("| `") for name in re.findall(r"`(\w+)`", line)]
    assert sorted(names) == deepgrpo.__all__


def test_names_are_light_until_they_are_used() -> None:
    """`train` is a package as well, which can be called whichever is imported first."""
    code = (
        "import sys, deepgrpo; from deepgrpo import Config, Run, load_run, load_trees, list_recipes, train, ConfigError\n"
        "assert not {'torch', 'transformers', 'pandas', 'ray'} & set(sys.modules), 'heavy'\n"
        "assert callable(train) and train is sys.modules['deepgrpo.train']\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
