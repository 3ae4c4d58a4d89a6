"""`deepgrpo probe` through the command line: recipes, runs and models, what is written, and what can be wrong."""

from __future__ import annotations

import json
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


def test_a_recipe_with_everything(probe: Any, place: Path) -> None:
    done = probe("tiny.toml", "--rollouts", "24", "--depths", "3", "--json", "out.json", "--plot", "out.png")
    assert done.code == 0, done.err
    # 24 · 12 · (1 + 3 · 2.5)
    assert "cost: 24 failed responses, each continued 3 times from the prompt and from up to 3 depths" in done.out
    assert "about 2,448 sampled tokens" in done.out and "after 16 responses: " in done.out
    for word in ("depth r", "prompt", "mixed/1k tokens", "× prompt", "gamma", "figures: out.json", "plot: out.png"):
        assert word in done.out
    result = json.loads((place / "out.json").read_text())
    assert result["sentence"] in done.out and result["verdict"] in ("helps", "no_difference", "prompt_is_better")
    assert [band["ratio"] for band in result["depths"]] == pytest.approx(_means(result, 3))
    # 12 tokens in segments of 3 make a chain of 5, whose root is at 1/5; a response that ended earlier has a shorter one
    whole = [rollout for rollout in result["failed"] if rollout["length"] == 12]
    assert whole and all(rollout["states"][0]["ratio"] == pytest.approx(0.2) for rollout in whole)
    assert [gamma["gamma"] for gamma in result["gammas"]] == [-20, 0, 0.5, 1, 1.5, 2, 3]  # the recipe's among them
    assert result["setting"]["branches"] == 3 and result["setting"]["segments"]["size"] == 3
    assert result["sampled"]["failed"] == len(result["failed"]) >= 24
    assert sum(band["states"] * band["tokens"] for band in result["depths"]) + result["sampled"][
        "rollout_tokens"
    ] == pytest.approx(result["sampled"]["tokens"])
    assert (place / "out.png").read_bytes().startswith(b"\x89PNG")
    assert not (place / "runs").exists()


def _means(result: dict[str, Any], bands: int) -> list[float]:
    """Mean depth of the prompt and of the states in each band that has some, from the raw states."""
    states = [state for rollout in result["failed"] for state in rollout["states"]]
    found = {b: [s["ratio"] for s in states if s["band"] == b] for b in range(bands + 1)}
    return [sum(each) / len(each) for each in found.values() if each]


def test_the_same_seed_gives_the_same_figures(probe: Any, place: Path) -> None:
    results = []
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        assert probe("tiny.toml", "--rollouts", "10", "--seed", seed, "--json", f"{name}.json").code == 0
        result = json.loads((place / f"{name}.json").read_text())
        results.append({key: value for key, value in result.items() if key not in ("seconds", "machine")})
    assert results[0] == results[1] and results[0]["failed"] != results[2]["failed"]


def test_a_model_from_scratch_on_the_synthetic_task(probe: Any, place: Path) -> None:
    """A recipe of another strategy: K and the segments are the defaults of deep, or the options."""
    done = probe(
        "scratch.toml", "--rollouts", "12", "--branches", "4", "--segments", "count", "--segment-size", "4", "--json", "s.json"
    )
    assert done.code == 0, done.err
    result = json.loads((place / "s.json").read_text())
    assert result["setting"]["segments"] == {"type": "count", "size": 4, "extra_ends": [], "function": None}
    assert result["setting"]["data"]["type"] == "synthetic" and result["setting"]["branches"] == 4


def test_a_model_with_data_as_in_eval(probe: Any, place: Path) -> None:
    """A random model never writes a right answer in a box: nothing succeeds, from no depth."""
    done = probe(
        "model", "--data", "mine=data.jsonl", "--rollouts", "8", "--branches", "2", "--depths", "2", "--max-new-tokens", "8",
        "--segments", "tokens", "--segment-size", "2", "--template", "plain", "--device", "cpu",
    )  # fmt: skip
    assert done.code == 1 and "responses were cut off at 8 tokens" in done.err  # it hardly ever ends a text by itself


def test_a_run_and_its_start(probe: Any, place: Path) -> None:
    (place / "warm.toml").write_text(SCRATCH + WARM)
    done = probe("warm.toml")
    assert done.code == 2
    assert "`deepgrpo train warm.toml --run.steps 0`" in done.err and "deepgrpo probe runs/scratch/start" in done.err
    assert cli.main(["train", "warm.toml"]) == 0
    settings = ("--rollouts", "8", "--branches", "2", "--depths", "2", "--segments", "tokens", "--segment-size", "4")
    run = probe("runs/scratch", *settings)
    start = probe("runs/scratch/start", *settings)
    assert (run.code, start.code) == (0, 0)
    assert "runs/scratch/checkpoints/step-000001/model on cpu, synthetic" in run.out
    assert "runs/scratch/start on cpu, synthetic" in start.out
    changed = probe("runs/scratch", *settings, "--sampling.max_new_tokens", "10", "--json", "out.json")
    assert changed.code == 0
    assert json.loads((place / "out.json").read_text())["setting"]["sampling"]["max_new_tokens"] == 10


def test_a_run_without_weights(probe: Any, place: Path) -> None:
    (place / "runs" / "empty").mkdir(parents=True)
    (place / "runs" / "empty" / "config.toml").write_text(RECIPE)
    done = probe("runs/empty")
    assert done.code == 1 and "has neither a checkpoint (checkpoints/step-*/model) nor a start model" in done.err


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        pytest.param(("--reward.function", "reward.py:always", "--rollouts", "8"), 0, "none of 32 responses failed", id="easy"),
        pytest.param(
            ("--reward.function", "reward.py:never", "--rollouts", "8"), 0,
            "continuations of 8 failed responses succeeded, neither from any depth nor from the prompt (3 each)", id="hard",
        ),
        pytest.param(
            ("--segments", "count", "--segment-size", "1", "--rollouts", "8"), 0,
            "have no state to branch at besides the prompt (one segment, 12 tokens", id="short",
        ),
        pytest.param(("--max-sampled-tokens", "1", "--rollouts", "200", "--reward.function", "reward.py:always"), 1,
            "only 0 of 16 responses failed within 192 sampled tokens", id="cap"),
        pytest.param(("--reward.truncated_value", "0"), 1, "responses were cut off at 12 tokens", id="truncated"),
    ],
)  # fmt: skip
def test_where_there_is_nothing_to_compare(probe: Any, place: Path, arguments: tuple[str, ...], code: int, says: str) -> None:
    done = probe("tiny.toml", *arguments, "--json", "out.json", "--plot", "out.png")
    assert done.code == code and says in (done.err if code else done.out)
    if code == 0:
        result = json.loads((place / "out.json").read_text())
        assert result["sentence"] in done.out and result["recommended_gamma"] is None
        assert (place / "out.png").exists() == (result["depths"] is not None)


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("tiny.toml", "--branches", "1"), 2, "--branches is 1, but a group of one is never mixed"),
        (("tiny.toml", "--explore.num_pivots", "0", "--explore.branches_per_pivot", "1"), 2, "--branches"),
        (("tiny.toml", "--rollouts", "7"), 2, "--rollouts is 7, but fewer than 8 prove nothing"),
        (("tiny.toml", "--depths", "0"), 2, "--depths is 0; it should be 1 or more"),
        (("tiny.toml", "--gammas", "nan"), 2, "name at least one finite number"),
        (("tiny.toml", "--temperature", "0"), 2, "rollouts are sampled, so it should be above 0"),
        (("tiny.toml", "--top-p", "1.5"), 2, "--top-p is 1.5"),
        (("tiny.toml", "--segment-size", "4"), 2, "--segment-size is 4, but --segments is 'auto'"),
        (("tiny.toml", "--json", "nowhere/out.json"), 2, "--json 'nowhere/out.json': its directory does not exist"),
        (("tiny.toml", "--device", "abacus"), 2, "--device is 'abacus'"),
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
    done = probe(*arguments)
    assert done.code == code and says in done.err and done.err.startswith("error: ")


def test_a_plot_without_matplotlib(probe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is told before anything is sampled."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    done = probe("tiny.toml", "--plot", "out.png")
    assert done.code == 2 and 'pip install "deepgrpo[plots]"' in done.err and "cost:" not in done.out
