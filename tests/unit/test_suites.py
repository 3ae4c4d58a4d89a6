"""Suites by name, files by path, and the whole command on a tiny model.

The hub cannot be reached from a test: for hub names only the resolution is checked.
"""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import deepgrpo
from deepgrpo.config import (
    HubData,
    JsonlData,
    MathReward,
    ParquetData,
    SamplingConfig,
    ScratchModel,
    TemplateConfig,
    parse_config,
    to_toml,
)
from deepgrpo.errors import ConfigError, DataError, DeepGRPOError, ModelError
from deepgrpo.eval.command import evaluate_model, sampling_for
from deepgrpo.eval.model import find_model
from deepgrpo.eval.options import EvalOptions
from deepgrpo.eval.suites import SUITES, resolve, resolve_suite
from deepgrpo.model.loading import scratch_policy
from deepgrpo.prompts.source import build_source
from deepgrpo.prompts.synthetic import tokenizer
from deepgrpo.records import Prompt
from deepgrpo.rewards import build_reward
from tiny import SHARED_DATA

ROWS = {"gsm8k": 1319, "math500": 500, "aime24": 30, "amc": 83, "minerva": 272, "olympiad_bench": 675}


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


# ---------------------------------------------------------------- resolution


def test_hub_names_columns_and_splits() -> None:
    found = {}
    for name in SUITES:
        data = resolve(name).data
        assert isinstance(data, HubData)
        found[name] = (data.path, data.name, data.split, data.columns.question, data.columns.answer)
    assert found == {
        "gsm8k": ("openai/gsm8k", "main", "test", "question", "answer"),
        "math500": ("HuggingFaceH4/MATH-500", None, "test", "problem", "answer"),
        "aime24": ("HuggingFaceH4/aime_2024", None, "train", "problem", "answer"),
        "amc": ("AI-MO/aimo-validation-amc", None, "train", "problem", "answer"),
        "minerva": ("math-ai/minervamath", None, "test", "question", "answer"),
        "olympiad_bench": ("math-ai/olympiadbench", None, "test", "question", "final_answer"),
    }


@pytest.mark.parametrize("name", SUITES)
def test_the_wording_and_the_reward_agree(name: str) -> None:
    one = resolve_suite(name)
    assert isinstance(one.reward, MathReward)
    asked = one.data.template.preset
    assert (asked, one.reward.answer_format) == (("gsm8k", "gsm8k") if name == "gsm8k" else ("math", "boxed"))


def test_another_wording_moves_the_reward_along() -> None:
    one = resolve("gsm8k", template=TemplateConfig(preset="math"), limit=5)
    assert isinstance(one.reward, MathReward)
    assert (one.data.template.preset, one.reward.answer_format, one.data.limit) == ("math", "boxed", 5)
    forced = resolve("gsm8k", answer_format="any").reward
    assert isinstance(forced, MathReward)
    assert forced.answer_format == "any"


def test_local_files_win_over_the_hub_when_a_directory_is_named(tmp_path: Path) -> None:
    write(tmp_path / "gsm8k_test.jsonl", {"question": "1+1?", "answer": "2"})
    data = resolve("gsm8k", data_dir=tmp_path).data
    assert isinstance(data, JsonlData)
    assert data.path == str(tmp_path / "gsm8k_test.jsonl")
    with pytest.raises(DataError, match=r"holds no amc\.jsonl or amc_test\.jsonl"):
        resolve("amc", data_dir=tmp_path)


def test_columns_of_a_local_file_are_recognised(tmp_path: Path) -> None:
    path = write(tmp_path / "m.jsonl", {"problem": "1+1?", "final_answer": ["2"]})
    for spec in (f"math500={path}", f"gsm8k={path}", f"mine={path}", str(path)):
        one = resolve(spec)
        assert isinstance(one.data, JsonlData)
        assert (one.data.columns.question, one.data.columns.answer) == ("problem", "final_answer")
    assert resolve(f"mine={path}").name == "mine"
    assert resolve(str(path)).name == "m"


def test_parquet_files(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"problem": ["1+1?"], "answer": ["2"]}), tmp_path / "p.parquet")
    data = resolve(str(tmp_path / "p.parquet")).data
    assert isinstance(data, ParquetData)
    assert data.columns.question == "problem"


def test_hub_names_of_ones_own() -> None:
    plain, whole = resolve("owner/name").data, resolve("owner/name:part:dev").data
    assert isinstance(plain, HubData)
    assert isinstance(whole, HubData)
    assert (plain.path, plain.name, plain.split) == ("owner/name", None, "test")
    assert (whole.path, whole.name, whole.split) == ("owner/name", "part", "dev")


@pytest.mark.parametrize(
    ("spec", "error", "words"),
    [
        ("gsm8", ConfigError, "did you mean 'gsm8k'"),
        ("Math-500", ConfigError, "did you mean 'math500'"),
        ("xyz", ConfigError, "The suites are gsm8k, math500"),
        ("absent.jsonl", DataError, "'absent.jsonl' does not exist"),
        ("gsm8k=absent.jsonl", DataError, "'absent.jsonl' does not exist"),
        ("mine=absent.jsonl", DataError, "'absent.jsonl' does not exist"),
        (f"mine={__file__}", DataError, "neither .jsonl nor .parquet"),
        ("a/b:c:d:e", ConfigError, "owner/name"),
    ],
)
def test_wrong_names(spec: str, error: type[DeepGRPOError], words: str) -> None:
    with pytest.raises(error, match=words.replace(".", r"\.")):
        resolve(spec)


# ---------------------------------------------------------------- references


class Plain:
    """A tokenizer that is enough to read prompts."""

    chat_template = None
    eos_token_id = None
    name_or_path = "plain"

    def __call__(self, texts: list[str], add_special_tokens: bool) -> dict[str, list[list[int]]]:
        return {"input_ids": [list(text.encode()) for text in texts]}


def prompts_of(name: str, limit: int | None = None) -> tuple[Prompt, ...]:
    if not SHARED_DATA.is_dir():
        pytest.skip(f"the data sets are not at {SHARED_DATA}")
    one = resolve(name, data_dir=SHARED_DATA, limit=limit)
    data = one.data.model_copy(update={"template": one.data.template.model_copy(update={"chat": False})})
    source = build_source(data, Plain(), seed=0, context=1_000_000, shuffle=False)
    return source.head(len(source))


@pytest.mark.parametrize(("name", "rows"), ROWS.items())
def test_real_suites_are_read_whole(name: str, rows: int) -> None:
    prompts = prompts_of(name)
    assert len(prompts) == rows
    wanted = '"####"' if name == "gsm8k" else r"\boxed{}"
    assert all(prompt.answer and prompt.question and wanted in prompt.text for prompt in prompts)
    assert len({prompt.id for prompt in prompts}) == rows
    assert sum(bool(prompt.accepted) for prompt in prompts) == (40 if name == "minerva" else 0)


def test_minerva_accepts_every_alternative() -> None:
    prompt = next(p for p in prompts_of("minerva") if len(p.accepted) > 1)
    accepted = prompt.accepted
    reward = build_reward(resolve_suite("minerva").reward)
    try:
        texts = [rf"It is $\boxed{{{answer}}}$." for answer in accepted] + [r"It is $\boxed{-12345}$."]
        scores = reward.score([prompt] * len(texts), texts, [()] * len(texts))
    finally:
        reward.close()
    assert [score.value for score in scores] == [1.0] * len(accepted) + [0.0]


@pytest.mark.parametrize("name", ROWS)
def test_the_reference_of_a_real_row_scores_one(name: str) -> None:
    prompts = prompts_of(name, limit=8)
    form = "#### {}" if name == "gsm8k" else r"\boxed{{{}}}"
    reward = build_reward(resolve_suite(name).reward)
    try:
        scores = reward.score(prompts, [form.format(prompt.answer) for prompt in prompts], [()] * len(prompts))
    finally:
        reward.close()
    assert [score.value for score in scores] == [1.0] * len(prompts)


# ---------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def run_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on the synthetic task with two checkpoints of an untrained model."""
    run = tmp_path_factory.mktemp("runs") / "tiny"
    config = parse_config(
        {
            "model": {"type": "scratch", "hidden_size": 32, "num_layers": 1, "num_heads": 2, "intermediate_size": 32},
            "data": {"type": "synthetic", "chain_length": 2},
            "reward": {"type": "task"},
            "sampling": {"max_new_tokens": 12},
        }
    )
    assert isinstance(config.model, ScratchModel)
    policy = scratch_policy(config.model, tokenizer(), seed=0)
    for step in (5, 10):
        policy.save(run / "checkpoints" / f"step-{step:06d}" / "model")
    (run / "checkpoints" / ".tmp-step-000099" / "model").mkdir(parents=True)  # one that was being written
    (run / "config.toml").write_text(to_toml(config))
    return run


def test_the_newest_whole_checkpoint_is_found(run_directory: Path) -> None:
    checkpoint = run_directory / "checkpoints" / "step-000005"
    newest = find_model(str(run_directory))
    assert newest.path == str(run_directory / "checkpoints" / "step-000010" / "model")
    assert find_model(str(checkpoint)).path == find_model(str(checkpoint / "model")).path == str(checkpoint / "model")
    for name in (run_directory, checkpoint, checkpoint / "model"):
        assert find_model(str(name)).run == newest.run is not None
    assert find_model("owner/name").path == "owner/name"
    assert find_model("owner/name").run is None


def test_a_run_without_checkpoints_says_so(tmp_path: Path, run_directory: Path) -> None:
    (tmp_path / "config.toml").write_text((run_directory / "config.toml").read_text())
    with pytest.raises(ModelError, match="has no checkpoint yet"):
        find_model(str(tmp_path))
    with pytest.raises(ModelError, match=r"'\./absent' does not exist"):
        find_model("./absent")


def test_the_command_on_a_run_with_its_own_data(run_directory: Path, tmp_path: Path) -> None:
    shown = io.StringIO()
    options = EvalOptions(
        str(run_directory), limit=6, samples=4, k=(1, 4), device="cpu", max_rows=8,
        json=str(tmp_path / "out.json"), rows=str(tmp_path / "rows.jsonl"),
    )  # fmt: skip
    assert evaluate_model(options, Console(file=shown, width=120)) == 0
    labels = [
        line.split()[0]
        for line in shown.getvalue().splitlines()
        if line.lstrip().startswith(("greedy", "sampled", "pass@", "maj@"))
    ]
    assert labels == ["greedy", "sampled", "pass@1", "pass@4", "maj@1", "maj@4"]
    whole = json.loads((tmp_path / "out.json").read_text())
    metrics = whole["sets"]["synthetic"]["metrics"]
    assert metrics["eval/prompts"] == 6
    assert metrics["eval/pass@1"] == pytest.approx(metrics["eval/sampled"])
    assert metrics["eval/pass@4"] >= metrics["eval/pass@1"]
    assert whole["sets"]["synthetic"]["sampling"]["max_new_tokens"] == 12
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert len(rows) == 6
    assert all(row["set"] == "synthetic" and len(row["sampled_rewards"]) == 4 for row in rows)
    again = EvalOptions(str(run_directory), limit=6, samples=4, k=(1, 4), device="cpu", max_rows=3, json=options.json)
    evaluate_model(again, Console(file=io.StringIO()))
    # the same seed draws the same responses, whatever is decoded together
    assert json.loads((tmp_path / "out.json").read_text())["sets"]["synthetic"]["metrics"] == metrics


def test_the_command_on_a_file(run_directory: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    # the tiny model's alphabet is that of the synthetic task
    question = build_source(
        parse_config(
            {"model": {"type": "scratch"}, "data": {"type": "synthetic"}, "reward": {"type": "task"}}
        ).data, tokenizer(), seed=0, context=256,
    ).head(1)[0].question  # fmt: skip
    path = write(tmp_path / "q.jsonl", {"question": question, "answer": "5"}, {"question": "", "answer": "5"})
    model = str(run_directory / "checkpoints" / "step-000010")
    shown = io.StringIO()
    options = EvalOptions(model, data=(str(path),), template="plain", max_new_tokens=4, device="cpu")
    assert evaluate_model(options, Console(file=shown, width=100)) == 0
    assert "q: 1 rows left out (empty question)" in shown.getvalue()
    assert capfd.readouterr().err == ""  # it was soon done


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"k": (4,), "samples": 2}, "--k 4 needs at least 4 samples, but --samples is 2"),
        ({"samples": -1}, "--samples is -1"),
        ({"limit": 0}, "--limit is 0"),
        ({"temperature": 0.0}, "--temperature is 0.0"),
        ({"top_p": 1.5}, "--top-p is 1.5"),
        ({"data": ("gsm8",)}, "did you mean 'gsm8k'"),
        ({"data": ()}, "--data is missing"),
        ({"data": ("amc", "amc")}, "names 'amc' twice"),
        ({"json": "absent/out.json"}, "its directory does not exist"),
    ],
)
def test_impossible_options_end_before_any_model_is_loaded(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        evaluate_model(EvalOptions(**{"model": "owner/absent", "data": ("amc",), **changes}))


def test_the_options_parse_without_torch() -> None:
    code = (
        "import sys, tyro\n"
        "from deepgrpo.eval.options import EvalOptions\n"
        "args = ['runs/a', '--data', 'gsm8k', 'mine=x.jsonl', '--k', '1', '4', '--samples', '8']\n"
        "print(tyro.cli(EvalOptions, args=args), 'torch' in sys.modules)"
    )
    source = str(Path(deepgrpo.__file__).parents[1])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={"PYTHONPATH": source})
    assert done.returncode == 0, done.stderr
    assert "data=('gsm8k', 'mine=x.jsonl')" in done.stdout
    assert "k=(1, 4)" in done.stdout
    assert done.stdout.strip().endswith("False")


def test_sampling_stays_within_the_models_context() -> None:
    one = resolve("math500")
    options = EvalOptions("m")
    assert sampling_for(options, None, one, context=1024) == SamplingConfig(max_new_tokens=2048, max_total_tokens=1024)


def test_directories_patterns_and_saved_folders(tmp_path: Path) -> None:
    """Columns of chat data are recognised by their names, nested ones by their paths."""
    datasets = pytest.importorskip("datasets")
    row = {"prompt": [{"role": "user", "content": "1 + 1?"}], "reward_model": {"ground_truth": "2"}}
    table = datasets.Dataset.from_list([row])
    (tmp_path / "shards").mkdir()
    table.to_parquet(str(tmp_path / "shards" / "test-00000-of-00001.parquet"))
    table.save_to_disk(str(tmp_path / "saved"))
    datasets.DatasetDict({"train": table, "test": table}).save_to_disk(str(tmp_path / "splits"))
    (tmp_path / "lines").mkdir()
    (tmp_path / "lines" / "a.jsonl").write_text(json.dumps(row) + "\n")
    for spec, name, kind in (
        ("shards", "shards", ParquetData), (f"mine={tmp_path}/shards/test-*", "mine", ParquetData),
        ("lines", "lines", JsonlData), (f"x={tmp_path}/lines/*.jsonl", "x", JsonlData), ("saved", "saved", HubData),
        ("splits", "splits", HubData),
    ):  # fmt: skip
        one = resolve(spec if "=" in spec else str(tmp_path / spec))
        assert (one.name, type(one.data)) == (name, kind)
        assert isinstance(one.data, ParquetData | JsonlData | HubData)
        assert (one.data.columns.question, one.data.columns.answer) == ("prompt", "reward_model.ground_truth")
        if isinstance(one.data, HubData):
            assert one.data.split == ("test" if spec == "splits" else "train")
