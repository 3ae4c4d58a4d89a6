"""What can be wrong ends in a sentence that names it and a remedy, or in a counted skip; a run never ends in a traceback.

Everything goes through the command line's `main`, in this process; tests/cli/test_train_cli.py has the real ones.
"""

from __future__ import annotations

import json
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from deepgrpo import cli
from deepgrpo.errors import MissingExtraError
from deepgrpo.train import log, loop
from recipes import ON_DISK, TINY, TOKENS_3, recipe_text
from tiny import save_model, write_jsonl

RECIPE = recipe_text(
    ON_DISK, run={"steps": 2}, sampling={"max_new_tokens": 8}, optim={"lr": 1e-3},
    explore={"type": "deep", "num_rollouts": 4, "branches_per_pivot": 2, "segments": TOKENS_3},
)  # fmt: skip
ROWS = [{"id": f"row-{i}", "question": f"What is {i} + {i}?", "answer": str(2 * i)} for i in range(4)]
# responses cut off are not shown to the function, so it is asked to score all: truncated_value = "none" below
REWARD = "def reward(completions, **columns):\n    return [float(len(text) % 2) for text in completions]\n"


@dataclass
class Outcome:
    code: int
    out: str
    err: str


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def place(tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory from which the recipe runs as it is."""
    (tmp_path / "model").symlink_to(model)
    (tmp_path / "tiny.toml").write_text(RECIPE)
    (tmp_path / "reward.py").write_text(REWARD)
    write_jsonl(tmp_path / "data.jsonl", ROWS)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def deepgrpo(place: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    def call(*arguments: str) -> Outcome:
        code = cli.main(["train", *arguments, "--reward.truncated_value", "none"])
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err.split("The end of the traceback")[0]
        return Outcome(code, out, err)

    return call


def metrics(place: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (place / "runs" / "tiny" / "metrics.jsonl").read_text().splitlines()]


def test_the_recipe_itself_runs(deepgrpo: Any, place: Path) -> None:
    """A reward file is named by its path; no row is skipped."""
    done = deepgrpo("tiny.toml")
    assert (done.code, done.err) == (0, "")
    assert "skipped" not in done.out and "4 prompts" in done.out
    assert all(line["main/mixed"] > 0 and line["grad_norm"] > 0 for line in metrics(place))


def test_a_device_that_cannot_train(deepgrpo: Any, place: Path) -> None:
    done = deepgrpo("tiny.toml", "--run.device", "meta")
    assert done.code == 2 and "error: " in done.err and "'meta'" in done.err and "cpu" in done.err
    assert not (place / "runs").exists()


# ---------------------------------------------------------------- data


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        pytest.param([], "data.jsonl is empty; it needs at least one row with a column 'question'", id="empty file"),
        pytest.param(
            [{"prompt": "1 + 1", "answer": "2"}],
            "data.jsonl, line 1 has no column 'question' (the question); its columns are prompt, answer; "
            "set data.columns.question to one of them", id="missing column",
        ),
        pytest.param(
            [ROWS[0], ROWS[1], ROWS[0]],
            "data.jsonl: id 'row-0' is in line 1 and in line 3; make ids unique, or set data.columns.id",
            id="duplicate id",
        ),
        pytest.param([b'{"question": '], "data.jsonl, line 1 is not valid JSON", id="torn line"),
        pytest.param(
            [{"question": "x" * 100_000, "answer": "1"}], "no usable row is left in the data of type 'jsonl' (too long: 1)",
            id="only a long row",
        ),
    ],
)  # fmt: skip
def test_data_that_cannot_be_used(deepgrpo: Any, place: Path, rows: Any, says: str) -> None:
    write_jsonl(place / "data.jsonl", rows)
    done = deepgrpo("tiny.toml")
    assert done.code == 1 and done.err.startswith("error: ") and says in done.err
    assert not (place / "runs").exists()  # nothing stands in the way of the next try


def test_a_data_file_that_is_missing(deepgrpo: Any, place: Path) -> None:
    done = deepgrpo("tiny.toml", "--data.path", "dta.jsonl")
    assert done.code == 1
    assert f"data.path 'dta.jsonl' does not exist (looked for {place / 'dta.jsonl'})" in done.err


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        pytest.param({"question": "x" * 100_000, "answer": "1"}, "1 too long", id="100,000 tokens"),
        pytest.param(b'{"question": "caf\xe9", "answer": "1"}', "1 bad encoding", id="not UTF-8"),
        pytest.param({"question": "  ", "answer": "1"}, "1 empty question", id="empty"),
    ],
)
def test_a_row_that_cannot_be_used_is_counted_and_the_run_goes_on(
    deepgrpo: Any, place: Path, row: Any, reason: str
) -> None:
    write_jsonl(place / "data.jsonl", [ROWS[0], row, ROWS[1], ROWS[2]])
    done = deepgrpo("tiny.toml")
    assert (done.code, done.err) == (0, "")
    assert f"rows skipped: {reason}\n" in done.out and "3 prompts" in done.out
    assert len(metrics(place)) == 2


def test_a_batch_that_is_larger_than_the_data_is_told_once(deepgrpo: Any, place: Path) -> None:
    done = deepgrpo("tiny.toml", "--run.prompts_per_step", "6")
    assert (done.code, done.err) == (0, "")
    told = "the data has 4 prompts and a step takes run.prompts_per_step = 6: some occur more than once in a batch\n"
    assert done.out.count(told) == 1
    assert "more than once" not in deepgrpo("tiny.toml", "--run.name", "fits", "--run.prompts_per_step", "4").out


# ---------------------------------------------------------------- model


def test_a_model_without_a_tokenizer(deepgrpo: Any, place: Path, model: str) -> None:
    (place / "bare").mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(Path(model) / name, place / "bare" / name)
    done = deepgrpo("tiny.toml", "--model.path", "bare")
    assert done.code == 1
    assert "error: no tokenizer could be loaded from 'bare'" in done.err and "model.tokenizer" in done.err


@pytest.mark.parametrize("path", ["nowhere", "./nowhere", "/nowhere/at/all"])
def test_a_model_directory_that_is_missing(deepgrpo: Any, path: str) -> None:
    done = deepgrpo("tiny.toml", "--model.path", path)
    assert done.code == 1
    assert f"error: model.path = {path!r} is no directory here, and nothing could be loaded from the hub" in done.err
    assert "check the path" in done.err


def test_a_directory_that_is_no_model(deepgrpo: Any, place: Path) -> None:
    (place / "empty").mkdir()
    done = deepgrpo("tiny.toml", "--model.path", "empty")
    assert done.code == 1 and "error: model.path = 'empty' has no config.json: it is empty; name a directory" in done.err


def test_weights_that_are_damaged(deepgrpo: Any, place: Path, model: str) -> None:
    shutil.copytree(model, place / "damaged")
    whole = (place / "damaged" / "model.safetensors").read_bytes()
    (place / "damaged" / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    done = deepgrpo("tiny.toml", "--model.path", "damaged")
    assert done.code == 1 and "error: no causal language model could be loaded from 'damaged'" in done.err


# ---------------------------------------------------------------- a disk that fills


@contextmanager
def files_no_larger_than(size: int) -> Iterator[None]:
    """The system refuses to write on, as it does on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_that_fills_while_a_checkpoint_is_written(deepgrpo: Any, place: Path) -> None:
    """The earlier checkpoint is whole, and the run goes on from it when there is space again."""
    assert deepgrpo("tiny.toml", "--checkpoint.every", "1").code == 0
    kept = place / "runs" / "tiny" / "checkpoints" / "step-000002"
    before = {path: path.read_bytes() for path in kept.rglob("*") if path.is_file()}
    more = ("--resume", "runs/tiny", "--run.steps", "4")
    # room for the model, but not for the moments of the optimizer, which are twice as large
    with files_no_larger_than((kept / "model" / "model.safetensors").stat().st_size + 1000):
        done = deepgrpo(*more)
    assert done.code == 1
    assert "error: the checkpoint of step 3 could not be written to runs/tiny/checkpoints" in done.err
    assert "Earlier checkpoints [1, 2] are whole; free some space and continue with --resume" in done.err
    assert {path: path.read_bytes() for path in kept.rglob("*") if path.is_file()} == before
    assert sorted(path.name for path in kept.parent.iterdir()) == ["step-000001", "step-000002"]
    assert deepgrpo(*more).code == 0
    assert [line["step"] for line in metrics(place)] == [1, 2, 3, 4]


def test_a_disk_that_fills_while_metrics_are_written(deepgrpo: Any, place: Path) -> None:
    assert deepgrpo("tiny.toml", "--checkpoint.every", "1").code == 0
    more = ("--resume", "runs/tiny", "--run.steps", "4")
    with files_no_larger_than((place / "runs" / "tiny" / "metrics.jsonl").stat().st_size + 10):
        done = deepgrpo(*more)
    assert done.code == 1
    assert "error: runs/tiny cannot be written" in done.err
    assert "continue with: deepgrpo train --resume runs/tiny" in done.err
    assert deepgrpo(*more).code == 0
    assert [line["step"] for line in metrics(place)] == [1, 2, 3, 4]


def test_a_disk_that_is_full_before_the_first_checkpoint(deepgrpo: Any, place: Path) -> None:
    with files_no_larger_than(3000):  # room for the recipe and the first line of metrics, not for both lines
        done = deepgrpo("tiny.toml")
    assert done.code == 1 and "error: runs/tiny cannot be written" in done.err
    assert "continue with: deepgrpo train --resume runs/tiny, which begins again, as there is no checkpoint yet" in done.err
    assert deepgrpo("--resume", "runs/tiny").code == 0
    assert [line["step"] for line in metrics(place)] == [1, 2]


def test_a_disk_that_is_full_when_a_run_is_resumed(deepgrpo: Any, place: Path) -> None:
    """The recipe of the run is rewritten on resume: the old one stays until the new one is whole."""
    assert deepgrpo("tiny.toml").code == 0
    run = place / "runs" / "tiny"
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with files_no_larger_than((run / "config.toml").stat().st_size - 10):
        done = deepgrpo("--resume", "runs/tiny", "--run.steps", "4")
    assert done.code == 1
    assert "error: runs/tiny/config.toml could not be written" in done.err and "is as it was" in done.err
    assert "deepgrpo train --resume runs/tiny" in done.err
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    assert deepgrpo("--resume", "runs/tiny", "--run.steps", "4").code == 0
    assert [line["step"] for line in metrics(place)] == [1, 2, 3, 4]


def test_a_log_that_cannot_be_opened_leaves_the_recipe(
    deepgrpo: Any, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`--log.wandb true` without wandb: the run does not ask for it from then on."""
    assert deepgrpo("tiny.toml").code == 0
    before = (place / "runs" / "tiny" / "config.toml").read_bytes()

    def refuse(*arguments: Any, **kwargs: Any) -> Any:
        raise MissingExtraError("wandb", "wandb", "log.wandb = true")

    monkeypatch.setattr(log, "open_sinks", refuse)
    done = deepgrpo("--resume", "runs/tiny", "--run.steps", "3", "--log.wandb", "true")
    assert done.code == 2 and "log.wandb = true needs the package" in done.err
    assert (place / "runs" / "tiny" / "config.toml").read_bytes() == before


def test_a_run_directory_that_cannot_be_made(deepgrpo: Any, place: Path) -> None:
    (place / "runs").write_text("a file")
    done = deepgrpo("tiny.toml")
    assert done.code == 2 and "error: run.dir: runs/tiny cannot be written" in done.err and "--run.dir" in done.err


def test_a_checkpoint_that_is_damaged_or_of_another_model(deepgrpo: Any, place: Path) -> None:
    assert deepgrpo("tiny.toml").code == 0
    path = place / "runs" / "tiny" / "checkpoints" / "step-000002"
    for name, content in (("state.json", b"{"), ("optimizer.safetensors", b"\0" * 100), ("model/model.safetensors", b"\0")):
        whole = (path / name).read_bytes()
        (path / name).write_bytes(content)
        done = deepgrpo("--resume", "runs/tiny", "--run.steps", "3")
        assert done.code == 1 and "the checkpoint runs/tiny/checkpoints/step-000002 cannot be read" in done.err, name
        (path / name).write_bytes(whole)
    files = [place / "runs" / "tiny" / name for name in ("config.toml", "metrics.jsonl")]
    before = [file.read_bytes() for file in files]
    done = deepgrpo("--resume", "runs/tiny", "--run.steps", "3", "--model.path", save_model(place / "wide", width=64))
    assert done.code == 1 and "do not fit the model" in done.err and "was the recipe's [model] changed?" in done.err
    # what could not be resumed leaves the run as it was: it goes on by its own recipe
    assert [file.read_bytes() for file in files] == before
    assert deepgrpo("--resume", "runs/tiny", "--run.steps", "3").code == 0


# ---------------------------------------------------------------- numbers that are none


def test_a_learning_rate_that_is_far_too_high(deepgrpo: Any, place: Path) -> None:
    """The weights blow up in step 1, and step 2 notices; step 1 is there to go back to."""
    done = deepgrpo("tiny.toml", "--optim.lr", "1e30", "--checkpoint.every", "1")
    assert done.code == 3
    assert "error: the gradient norm of step 2 (optimizer step 1) is nan, so the step was not taken. Lower optim.lr" in done.err
    assert [line["step"] for line in metrics(place)] == [1]


def test_weights_that_are_not_finite(deepgrpo: Any, place: Path, model: str) -> None:
    """Nothing can be sampled from them."""
    shutil.copytree(model, place / "poisoned")
    weights = load_file(place / "poisoned" / "model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, place / "poisoned" / "model.safetensors", metadata={"format": "pt"})
    done = deepgrpo("tiny.toml", "--model.path", "poisoned")
    assert done.code == 1
    assert "error: model.path = 'poisoned' gives logits that are not finite" in done.err
    assert "1 of its parameters have NaN (model.norm.weight); copy or download its weights again" in done.err


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_loss_or_a_gradient_that_is_not_finite(
    deepgrpo: Any, place: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """It is noticed before the weights move: step 2 fails, the checkpoint of step 1 is whole and the run goes on."""
    original = loop.train_step

    def train_step(run: Any, state: Any) -> Any:
        if state.step == 1:
            head = run.policy.causal.get_output_embeddings().weight
            logprobs = run.policy.logprobs

            def poisoned(*args: Any, **kwargs: Any) -> Any:
                logprob_n, entropy_n = logprobs(*args, **kwargs)
                if where == "loss":
                    return logprob_n + float("nan"), entropy_n
                # sqrt has no finite slope at 0; the loss itself is as it was
                return logprob_n + torch.sqrt(head[0, 0] * 0.0), entropy_n

            run.policy.logprobs = poisoned
        return original(run, state)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_step", train_step)
        done = deepgrpo("tiny.toml", "--checkpoint.every", "1")
    assert done.code == 3
    what = "the loss" if where == "loss" else "the gradient norm"
    assert f"error: {what} of step 2 (optimizer step 1) is nan, so the step was not taken" in done.err
    assert "optim.lr" in done.err and "--resume" in done.err
    assert deepgrpo("--resume", "runs/tiny").code == 0
    assert [line["step"] for line in metrics(place)] == [1, 2]


# ---------------------------------------------------------------- the user's reward


@pytest.mark.parametrize(
    ("body", "says"),
    [
        pytest.param(
            "raise KeyError('solution')",
            ("raised KeyError: 'solution' (", "reward.py, line 2", "no step was taken; continue with"),
            id="raises",
        ),
        pytest.param(
            "import time; time.sleep(30)", ("did not return within reward.timeout_s = 0.3 s", "raise reward.timeout_s"),
            id="hangs",
        ),
        pytest.param(
            "return [1.0]", ("returned 1 rewards for 8 responses; return one per response",), id="too few values"
        ),
        pytest.param("return None", ("returned None (a NoneType); return a list",), id="nothing"),
        pytest.param("return ['good' for _ in completions]", ("'good' (a str) for response 0",), id="words"),
    ],
)  # fmt: skip
def test_a_reward_that_breaks_its_contract(deepgrpo: Any, place: Path, body: str, says: tuple[str, ...]) -> None:
    (place / "reward.py").write_text(f"def reward(completions, **columns):\n    {body}\n")
    done = deepgrpo("tiny.toml", "--reward.timeout_s", "0.3")
    assert done.code == 1 and done.err.startswith("error: the reward function 'reward.py:reward' ")
    for part in says:
        assert part in done.err


SYNTHETIC = recipe_text(
    ON_DISK, run={"steps": 1}, model={**TINY, "hidden_size": 32, "intermediate_size": 64, "max_position": 64},
    warmstart={"steps": 2, "batch_size": 4}, data={"type": "synthetic", "chain_length": 1}, sampling={"max_new_tokens": 8},
    explore={"type": "root", "num_rollouts": 4}, loss={},
)  # fmt: skip


def test_a_first_step_that_fails_after_a_warm_start_can_be_tried_again(deepgrpo: Any, place: Path) -> None:
    """Nothing was saved but the start model, which belongs to the failed try: the same command starts anew."""
    (place / "tiny.toml").write_text(SYNTHETIC)
    (place / "reward.py").write_text("def reward(completions, **columns):\n    raise KeyError('solution')\n")
    start = place / "runs" / "tiny" / "start" / "model.safetensors"
    for _ in range(2):
        done = deepgrpo("tiny.toml")
        assert done.code == 1 and "raised KeyError: 'solution'" in done.err and start.exists()
    failed = start.read_bytes()
    (place / "reward.py").write_text(REWARD)
    assert deepgrpo("tiny.toml", "--warmstart.lr", "1e-2").code == 0
    assert start.read_bytes() != failed


def test_a_start_model_of_a_failed_try_is_not_taken_over(deepgrpo: Any, place: Path) -> None:
    """A resumed run would take its KL reference from it."""
    (place / "tiny.toml").write_text(SYNTHETIC)
    (place / "reward.py").write_text("def reward(completions, **columns):\n    raise KeyError('solution')\n")
    assert deepgrpo("tiny.toml").code == 1 and (place / "runs" / "tiny" / "start").is_dir()
    (place / "reward.py").write_text(REWARD)
    assert deepgrpo("tiny.toml", "--warmstart", "none").code == 0
    assert not (place / "runs" / "tiny" / "start").exists()


def test_rewards_that_are_no_numbers_are_counted(deepgrpo: Any, place: Path) -> None:
    """NaN and infinity score 0 and are problems; None scores 0 and counts as an answer that was not found."""
    values = "[float('nan'), float('inf'), None, 1.0]"
    (place / "reward.py").write_text(
        f"def reward(completions, **columns):\n    return [{values}[i % 4] for i in range(len(completions))]\n"
    )
    done = deepgrpo("tiny.toml", "--explore", '{type = "root", num_rollouts = 4}')
    assert (done.code, done.err) == (0, "")
    for line in metrics(place):
        # 2 prompts of 4 rollouts
        assert line["reward/problems"] == line["reward/problem_not_finite"] == 4
        assert line["main/reward"] == 0.25
    assert "warning: 4 checks of the reward failed in this step (50%" in done.out


def test_a_reward_file_that_is_missing(deepgrpo: Any, place: Path) -> None:
    done = deepgrpo("tiny.toml", "--reward.function", "rewrd.py:reward")
    assert done.code == 2 and f"the file {str(place / 'rewrd.py')!r} does not exist" in done.err
    done = deepgrpo("tiny.toml", "--reward.function", "reward.py:score")
    assert done.code == 2 and "reward.py does not have it; it has reward" in done.err


# ---------------------------------------------------------------- rows that leave no room or have no answer


def test_a_row_that_leaves_no_room_for_a_response_is_counted(deepgrpo: Any, place: Path) -> None:
    """Whatever data.max_prompt_tokens says, a prompt as long as the whole context is left out."""
    write_jsonl(place / "data.jsonl", [ROWS[0], {"question": "x" * 300, "answer": "1"}, ROWS[1]])
    done = deepgrpo("tiny.toml", "--data.max_prompt_tokens", "100000", "--sampling.max_total_tokens", "200")
    assert (done.code, done.err) == (0, "")
    assert "rows skipped: 1 too long\n" in done.out and "2 prompts" in done.out


def test_a_row_without_its_reference_answer_is_counted(deepgrpo: Any, place: Path) -> None:
    rows = [ROWS[0], {"question": "What is 1?", "answer": None}, ROWS[1]]
    write_jsonl(place / "data.jsonl", rows)
    exact = ("--reward.type", "exact")
    done = deepgrpo("tiny.toml", *exact)
    assert (done.code, done.err) == (0, "")
    assert "rows skipped: 1 no answer\n" in done.out and "2 prompts" in done.out
    write_jsonl(place / "data.jsonl", rows[1:2])
    done = deepgrpo("tiny.toml", *exact, "--run.name", "other")
    assert done.code == 1 and "no usable row is left in the data of type 'jsonl' (no answer: 1)" in done.err
    assert "data.columns.answer" in done.err
