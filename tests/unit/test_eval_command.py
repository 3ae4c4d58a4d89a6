"""`deepgrpo eval` on runs: the run's own model settings, adapters, and rows that do not fit."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from deepgrpo.config import Config, PretrainedModel, parse_config, to_toml
from deepgrpo.errors import ConfigError, ModelError
from deepgrpo.eval.command import evaluate_model
from deepgrpo.eval.model import find_model, load_model, model_section
from deepgrpo.eval.options import ColumnOptions, EvalOptions
from deepgrpo.model.loading import load_policy
from deepgrpo.model.policy import Policy
from tiny import save_model, write_jsonl

STEP = Path("checkpoints") / "step-000001" / "model"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model(tmp_path_factory.mktemp("base"))


def save_run(directory: Path, base: str, model: dict[str, Any] | None = None, **sections: Any) -> tuple[Config, Policy]:
    """A run with one checkpoint, whose weights differ from those of the base model."""
    directory.mkdir(parents=True, exist_ok=True)
    data = write_jsonl(
        directory / "data.jsonl", [{"question": "1 + 1?", "answer": "2"}, {"question": "x" * 300, "answer": "2"}]
    )
    config = parse_config(
        {
            "model": {"type": "pretrained", "path": base, **(model or {})},
            "data": {"type": "jsonl", "path": data},
            "reward": {"type": "exact"},
            "sampling": {"max_new_tokens": 8},
            **sections,
        }
    )
    assert isinstance(config.model, PretrainedModel)
    policy = load_policy(config.model)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in policy.trainable().values():
            parameter.add_(torch.randn_like(parameter))
    policy.save(directory / STEP)
    (directory / "config.toml").write_text(to_toml(config))
    return config, policy


def figures(options: dict[str, Any], place: Path) -> tuple[dict[str, Any], list[dict[str, Any]], str]:
    shown = io.StringIO()
    paths = {"json": str(place / "out.json"), "rows": str(place / "rows.jsonl")}
    assert evaluate_model(EvalOptions(**{"device": "cpu", **options, **paths}), Console(file=shown, width=120)) == 0
    rows = [json.loads(line) for line in (place / "rows.jsonl").read_text().splitlines()]
    return json.loads((place / "out.json").read_text())["sets"], rows, shown.getvalue()


def test_a_row_too_long_for_the_runs_own_limit_is_left_out(tmp_path: Path, base: str) -> None:
    """The model could take it (its context is 4096), the run cannot: 200 tokens for prompt and response."""
    save_run(
        tmp_path / "run", base, sampling={"max_new_tokens": 8, "max_total_tokens": 200},
    )  # fmt: skip
    sets, rows, shown = figures({"model": str(tmp_path / "run")}, tmp_path)
    assert sets["jsonl"]["skipped"] == {"too long": 1}
    assert len(rows) == 1 and "1 rows left out (too long)" in shown


def test_a_lora_run_is_evaluated_with_its_adapters(tmp_path: Path, base: str) -> None:
    pytest.importorskip("peft")
    _, policy = save_run(tmp_path / "run", base, {"lora": {"rank": 4}})
    assert not (tmp_path / "run" / STEP / "config.json").exists()  # adapters alone
    for place in (tmp_path / "run", tmp_path / "run" / STEP, (tmp_path / "run" / STEP).parent):
        loaded = load_model(find_model(str(place)), "cpu", "auto")
        ids = torch.arange(4, 20)[None]
        with torch.no_grad():
            assert torch.equal(loaded.causal(input_ids=ids).logits, policy.causal(input_ids=ids).logits)
    _, rows, _ = figures({"model": str(tmp_path / "run")}, tmp_path)
    _, bare, _ = figures(
        {"model": base, "data": (str(tmp_path / "run" / "data.jsonl"),), "template": "plain"}, tmp_path
    )
    assert rows[0]["greedy_text"] != bare[0]["greedy_text"]


def test_adapters_outside_their_run_say_what_is_missing(tmp_path: Path, base: str) -> None:
    pytest.importorskip("peft")
    save_run(tmp_path / "run", base, {"lora": {"rank": 4}})
    shutil.copytree(tmp_path / "run" / STEP, tmp_path / "moved")
    options = EvalOptions(str(tmp_path / "moved"), data=(str(tmp_path / "run" / "data.jsonl"),), device="cpu")
    with pytest.raises(ModelError, match=r"'.*moved' holds adapters .* without the run .* name the run's directory"):
        evaluate_model(options, Console(file=io.StringIO()))


def test_the_runs_own_model_settings(tmp_path: Path, base: str) -> None:
    settings = {"attn_implementation": "eager", "trust_remote_code": True, "tokenizer": base}
    save_run(tmp_path / "run", base, settings, learner={"dtype": "bfloat16"})
    source = find_model(str(tmp_path / "run"))
    assert model_section(source) == PretrainedModel(
        path=str(tmp_path / "run" / STEP), attn_implementation="eager", trust_remote_code=True
    )
    loaded = load_model(source, "cpu", "auto")
    assert (loaded.causal.config._attn_implementation, loaded.dtype) == ("eager", torch.bfloat16)
    assert load_model(source, "cpu", "float32").dtype == torch.float32
    bare = load_model(find_model(base), "cpu", "auto")
    assert bare.dtype == torch.float32
    assert model_section(find_model("owner/name")) == PretrainedModel(path="owner/name")


def test_the_runs_own_threshold_of_success(tmp_path: Path, base: str) -> None:
    """Every reward is 0.2: below the run's threshold nothing is solved."""
    (tmp_path / "graded.py").write_text("def reward(completions, **columns):\n    return [0.2 for _ in completions]\n")
    reward = {"type": "user", "function": f"{tmp_path / 'graded.py'}:reward", "truncated_value": "none"}
    for threshold, solved in ((0.5, 0.0), (0.1, 1.0)):
        run = tmp_path / f"run-{threshold}"
        save_run(run, base, reward=reward, explore={"type": "deep", "success_threshold": threshold})
        sets, _, _ = figures({"model": str(run), "samples": 2, "k": (2,)}, tmp_path)
        metrics = sets["jsonl"]["metrics"]
        assert metrics["eval/pass@2"] == solved
        assert metrics["eval/sampled"] == pytest.approx(0.2)


def test_an_unknown_device_is_refused_before_the_model_is_loaded() -> None:
    with pytest.raises(ConfigError, match="--device is 'foo'; use auto, cpu, cuda or cuda:N"):
        evaluate_model(EvalOptions("owner/absent", data=("amc",), device="foo"))


def test_columns_by_path_and_variables_of_the_chat_template(tmp_path: Path, base: str) -> None:
    """The keys of data.columns, for data in verl's form."""
    row = {"prompt": [{"role": "user", "content": "1 + 1?"}], "reward_model": {"ground_truth": "2"}, "extra_info": {"index": 7}}
    data = write_jsonl(tmp_path / "verl.jsonl", [row])
    columns = ColumnOptions(id="extra_info.index", question="prompt", answer="reward_model.ground_truth", alternatives="none")
    options = {"model": base, "data": (data,), "template": "plain", "max_new_tokens": 2, "columns": columns}
    found, rows, _ = figures(options, tmp_path)
    assert (rows[0]["id"], rows[0]["answer"]) == ("7", "2")
    written = found["verl"]["data"]["columns"]
    assert (written["question"], written["alternatives"]) == ("prompt", None)
    with pytest.raises(ModelError, match=r"has 'enable_thinking', which the chat template of .* never reads"):
        evaluate_model(EvalOptions(**options, chat_template_kwargs="{enable_thinking = false}"))
    with pytest.raises(ConfigError, match=r"chat_template_kwargs is 'off'; it should be a table"):
        evaluate_model(EvalOptions(**options, chat_template_kwargs="off"))
    generated = {"data": {"type": "reasoning_gym", "task": "chain_sum"}, "reward": {"type": "task"}}
    save_run(tmp_path / "run", base, **generated)
    with pytest.raises(ConfigError, match=r"--columns.id is set, but data of type 'reasoning_gym' have no columns"):
        evaluate_model(EvalOptions(str(tmp_path / "run"), columns=ColumnOptions(id="x")))
