"""`deepgrpo probe` through the command line: recipes, runs and models, what is written, and what can be wrong."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from deepgrpo import cli
from recipes import ON_DISK, TINY, TOKENS_3, recipe_text
from tiny import save_model, write_jsonl

RECIPE = recipe_text(
    ON_DISK, run={"steps": 1}, reward={"truncated_value": "none"}, sampling={"max_new_tokens": 12},
    explore={"type": "deep", "num_rollouts": 2, "branches_per_pivot": 3, "gamma": 1.5, "segments": TOKENS_3},
)  # fmt: skip
SCRATCH = recipe_text(
    ON_DISK, run={"name": "scratch", "steps": 1}, model={**TINY, "num_layers": 1, "max_position": 96},
    data={"type": "synthetic", "chain_length": 2}, reward={"truncated_value": "none"}, sampling={"max_new_tokens": 16},
    explore={"type": "root"},
)  # fmt: skip
WARM = """
[warmstart]
steps = 2
batch_size = 2
"""
ROWS = [{"id": f"row-{i}", "question": f"What is {i} + {i}?", "answer": str(2 * i)} for i in range(30)]
# about four of ten responses of a random model; the answer does not matter
REWARD = """
import zlib

def reward(completions, **columns):
    return [float(zlib.crc32(text.encode()) % 10 < 4) for text in completions]

def never(completions, **columns):
    return [0.0 for _ in completions]

def always(completions, **columns):
    return [1.0 for _ in completions]
"""


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
    (tmp_path / "model").symlink_to(model)
    (tmp_path / "tiny.toml").write_text(RECIPE)
    (tmp_path / "scratch.toml").write_text(SCRATCH)
    (tmp_path / "reward.py").write_text(REWARD)
    write_jsonl(tmp_path / "data.jsonl", ROWS)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def probe(place: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    def call(*arguments: str) -> Outcome:
        code = cli.main(["probe", *arguments])
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err
        return Outcome(code, out, err)

    return call


HALF, ADAPTIVE = "deep:gamma=0,loss.lambda=0.5", "adaptive:round_rollouts=2,max_rollouts=4"
SMALL = ("--prompts", "8", "--projection", "128", "--threads", "1")


def test_a_recipe_with_everything(probe: Any, place: Path) -> None:
    done = probe(
        "tiny.toml", *SMALL, "--strategies", "root", "deep", HALF, ADAPTIVE, "--json", "out.json", "--plot", "out.png",
    )  # fmt: skip
    assert done.code == 0, done.err
    for word in ("after the first of 4 rounds: about", "tokens/", "snr²/1k tokens", "pivots with a branch that succeeds",
                 "true gradient: 24 prompts", "cost: ", "one training step (deep, 2 prompts)", "plot: out.png"):  # fmt: skip
        assert word in done.out
    result = json.loads((place / "out.json").read_text())
    assert result["sentence"] in done.out and result["verdict"] in ("best", "some", "none", "no_truth")
    assert list(result["strategies"]) == ["root", "deep", HALF, ADAPTIVE]
    root, deep, half, _ = result["strategies"].values()
    assert len(root["by_prompt"]["tokens"]) == len(result["prompts"]) == 8
    assert root["tokens_per_prompt"] == pytest.approx(sum(root["by_prompt"]["tokens"]) / 8)
    assert deep["loss"]["lambda"] == 1 and half["loss"]["lambda"] == 0.5 and half["explore"]["gamma"] == 0
    assert root["cos_branch"] is None and deep["cos_branch"] is not None
    assert (root["state"], deep["state"]) == ("initial", "learned")
    # the rollouts from the prompt are the same
    assert deep["by_prompt"]["reward"] == root["by_prompt"]["reward"]
    every, branches = deep["by_prompt"]["tokens"], deep["by_prompt"]["branch_tokens"]
    assert [a - b for a, b in zip(every, branches, strict=True)] == root["by_prompt"]["tokens"]
    assert len(result["differences"]) == 6 and result["reference"]["prompts"] == 24
    paid = sum(sum(each["by_prompt"]["tokens"]) for each in result["strategies"].values())
    assert result["cost"]["sampled_tokens"] < paid + 16 * 24  # shared draws are sampled once
    assert (place / "out.png").read_bytes().startswith(b"\x89PNG")
    assert not (place / "runs").exists()


def test_the_same_seed_gives_the_same_figures(probe: Any, place: Path) -> None:
    results = []
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        assert probe("tiny.toml", *SMALL, "--strategies", "root", "--seed", seed, "--json", f"{name}.json").code == 0
        result = json.loads((place / f"{name}.json").read_text())
        results.append({key: value for key, value in result.items() if key not in ("cost", "machine")})
    assert results[0] == results[1] and results[0]["strategies"] != results[2]["strategies"]


def test_a_model_with_data_as_in_eval(probe: Any, place: Path) -> None:
    """A random model never writes a right answer in a box."""
    done = probe(
        "model", "--data", "mine=data.jsonl", "--max-new-tokens", "8", "--template", "plain", "--device", "cpu",
        "--strategies", "root", "deep:segments.type=tokens,segments.size=2", *SMALL,
    )  # fmt: skip
    assert done.code == 0, done.err
    assert "no strategy has any gradient: all groups of all 8 prompts have equal rewards (mean reward 0)" in done.out
    assert "easier questions" in done.out


def test_a_dry_run_names_the_cost(probe: Any, place: Path) -> None:
    done = probe("tiny.toml", "--dry-run", "--prompts", "12", "--projection", "128")
    assert done.code == 0 and "measured 4 prompts with each strategy" in done.out
    assert "the whole probe, 12 prompts (30 for the true gradient), about: " in done.out and "snr" not in done.out


def test_data_with_few_prompts(probe: Any, place: Path) -> None:
    """At most half of 30 prompts go to the strategies."""
    done = probe("tiny.toml", "--prompts", "48", "--projection", "0", "--strategies", "root")
    assert done.code == 0 and "true gradient: 30 prompts" in done.out and "strategies on 15 of them" in done.out
    done = probe("tiny.toml", "--limit", "7", "--strategies", "root")
    assert done.code == 1 and "the data has 7 prompts, and fewer than 8 prove nothing" in done.err


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a warm start, a KL term and checkpoints of two steps."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "reward.py").write_text(REWARD)
    text = recipe_text(
        ON_DISK, run={"name": "scratch", "steps": 2}, model={**TINY, "num_layers": 1, "max_position": 96},
        data={"type": "synthetic", "chain_length": 2}, reward={"truncated_value": "none"}, sampling={"max_new_tokens": 16},
        explore={"type": "deep", "num_rollouts": 4, "branches_per_pivot": 2, "segments": TOKENS_3}, loss={"beta": 0.1},
        warmstart={"steps": 2, "batch_size": 2}, checkpoint={"every": 1},
    )  # fmt: skip
    (folder / "warm.toml").write_text(text)
    with contextlib.chdir(folder), contextlib.redirect_stdout(io.StringIO()):
        assert cli.main(["train", "warm.toml"]) == 0
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_checkpoint_with_its_state_and_cursor(probe: Any, place: Path, trained: Path) -> None:
    """The run's weights, its fit, the prompts that it would take next; nothing in the run changes."""
    shutil.copytree(trained / "runs", "runs")
    before = contents(place / "runs")
    found = {}
    for name, arguments in {
        "newest": ("runs/scratch",), "first": ("runs/scratch", "--step", "1"),
        "path": ("runs/scratch/checkpoints/step-000001",), "start": ("runs/scratch/start",),
    }.items():  # fmt: skip
        done = probe(*arguments, *SMALL, "--strategies", "deep", "random", "--json", "out.json")
        assert done.code == 0, done.err
        found[name] = json.loads((place / "out.json").read_text())
        assert ("deep: with the state of the run" in done.out) == (name != "start")
        at = {"newest": "checkpoints/step-000002/model", "start": "start"}.get(name, "checkpoints/step-000001/model")
        assert f"runs/scratch/{at} on cpu, synthetic" in done.out
    assert contents(place / "runs") == before
    assert found["first"]["strategies"] == found["path"]["strategies"]
    # two prompts a step
    first = {name: each["prompts"][0] for name, each in found.items() if name != "path"}
    assert first == {"newest": "synthetic-train-4", "first": "synthetic-train-2", "start": "synthetic-train-0"}
    states = [found[name]["strategies"]["deep"]["state"] for name in ("newest", "start")]
    assert states == ["run", "learned"] and found["newest"]["strategies"]["random"]["state"] == "initial"


def test_a_checkpoint_that_goes_while_it_is_read(
    probe: Any, place: Path, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run has gone on: the next newest is read."""
    from deepgrpo.train.build import build_policy

    shutil.copytree(trained / "runs", "runs")

    def gone(*arguments: Any) -> Any:
        newest = place / "runs/scratch/checkpoints/step-000002"
        if newest.exists():
            shutil.rmtree(newest)
            raise OSError("gone")
        return build_policy(*arguments)

    monkeypatch.setattr("deepgrpo.lab.probe.session.build_policy", gone)
    done = probe("runs/scratch", *SMALL, "--strategies", "root")
    assert done.code == 0 and "runs/scratch/checkpoints/step-000001/model on cpu" in done.out


def test_ctrl_c_leaves_what_was_measured(probe: Any, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from deepgrpo.lab.probe import measure

    rounds, sample = [], measure._sample

    def interrupted(*arguments: Any) -> Any:
        rounds.append(arguments[3])
        if arguments[3] == stop_at:
            raise KeyboardInterrupt
        return sample(*arguments)

    monkeypatch.setattr(measure, "_sample", interrupted)
    stop_at = 10  # the sixth round of two prompts
    done = probe("tiny.toml", "--prompts", "32", "--projection", "128", "--strategies", "root", "--json", "out.json")
    assert done.code == 130 and "interrupted: 9 of 15 prompts were measured" in done.out
    assert len(json.loads((place / "out.json").read_text())["prompts"]) == 9
    stop_at = 0
    done = probe("tiny.toml", *SMALL, "--strategies", "root", "--json", "none.json")
    assert done.code == 130 and done.err.endswith("interrupted\n") and not (place / "none.json").exists()


EXPERIMENT = """
name = "pair"
baseline = "grpo"
base = "tiny.toml"
seeds = [1, 2]
budget = 100

[arms.grpo.explore]
type = "root"
num_rollouts = 3

[arms.grpo-fast]
explore = {type = "root", num_rollouts = 3}
optim = {lr = 1e-2}

[arms.deep.loss]
lambda = 0.5
"""


def test_the_arms_of_an_experiment(probe: Any, place: Path) -> None:
    (place / "pair.toml").write_text(EXPERIMENT)
    done = probe("tiny.toml", *SMALL, "--arms", "pair.toml", "--json", "out.json")
    assert done.code == 0, done.err
    result = json.loads((place / "out.json").read_text())
    assert list(result["strategies"]) == ["grpo", "deep"] and result["same_gradient"] == {"grpo-fast": "grpo"}
    assert "grpo-fast has the gradient of grpo" in done.out and result["strategies"]["deep"]["loss"]["lambda"] == 0.5
    done = probe("tiny.toml", "--arms", "pair.toml", "--strategies", "deap")
    assert done.code == 2 and "'deap', which is no arm of pair.toml; it has grpo, grpo-fast, deep" in done.err
    (place / "other.toml").write_text(EXPERIMENT + "\n[arms.short.data]\nlimit = 3\n")
    done = probe("tiny.toml", "--arms", "other.toml")
    assert done.code == 2 and "the arm 'short' changes [data]" in done.err


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("tiny.toml", "--prompts", "7"), 2, "--prompts is 7, but fewer than 8 prove nothing"),
        (("tiny.toml", "--prompts", "20", "--reference", "10"), 2, "--reference is 10, but the prompts of the strategies"),
        (("tiny.toml", "--rollouts", "1"), 2, "--rollouts is 1, but a group of one has no baseline"),
        (("tiny.toml", "--projection", "-1"), 2, "--projection is -1; it should be 1 or more, or 0 to keep whole gradients"),
        (("tiny.toml", "--temperature", "0"), 2, "rollouts are sampled, so it should be above 0"),
        (("tiny.toml", "--top-p", "1.5"), 2, "--top-p is 1.5"),
        (("tiny.toml", "--step", "3"), 2, "--step is 3; it names a checkpoint of a run, but MODEL 'tiny.toml'"),
        (("tiny.toml", "--strategies", "oracle"), 2, 'explore.type is "oracle", but data.type is "jsonl"'),
        (("tiny.toml", "--json", "nowhere/out.json"), 2, "--json 'nowhere/out.json': its directory does not exist"),
        (("tiny.toml", "--device", "abacus"), 2, "'abacus'"),
        (("warm.toml",), 2, "`deepgrpo train warm.toml --run.steps 0`, then probe its result: deepgrpo probe runs/scratch/s"),
        (("runs/empty",), 1, "has neither a checkpoint (checkpoints/step-*/model) nor a start model"),
        (("runs/empty", "--step", "5"), 1, "--step 5: runs/empty has no checkpoint of that step; it has none"),
        (("model",), 2, "--data is missing; name a suite or a file"),
        (("model", "--data", "gsm9k"), 2, "did you mean 'gsm8k'"),
        (("model", "--data", "absent.jsonl"), 1, "data file 'absent.jsonl' does not exist"),
        (("model", "--data", "data.jsonl", "--sampling.top_p", "0.9"), 2, "--sampling.top_p is a key of a recipe"),
        (("tiny.toml", "--data.path", "empty.jsonl"), 1, "empty.jsonl is empty"),
        (("absent.toml",), 2, "recipe 'absent.toml' does not exist"),
        (("./absent",), 1, "the model directory './absent' does not exist"),
    ],
)
def test_what_can_be_wrong(probe: Any, place: Path, arguments: tuple[str, ...], code: int, says: str) -> None:
    (place / "empty.jsonl").write_text("")
    (place / "warm.toml").write_text(SCRATCH + WARM)
    (place / "runs" / "empty").mkdir(parents=True)
    (place / "runs" / "empty" / "config.toml").write_text(RECIPE)
    done = probe(*arguments)
    assert done.code == code and says in done.err and done.err.startswith("error: ")


def test_a_plot_without_matplotlib(probe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is told before anything is sampled."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    done = probe("tiny.toml", "--plot", "out.png")
    assert done.code == 2 and 'pip install "deepgrpo[plots]"' in done.err and "round" not in done.out
