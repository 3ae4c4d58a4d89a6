"""The loss of docs/algorithms/switches.md, as it stands there, in whole runs: trained, stopped, resumed, refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from deepgrpo.config import Config, load_recipe
from deepgrpo.errors import ConfigError
from deepgrpo.train.dry_run import dry_run
from deepgrpo.train.loop import train

PAGE = (Path(__file__).parents[2] / "docs" / "algorithms" / "switches.md").read_text(encoding="utf-8")
(CODE,) = re.findall(r"```python\n(# mine\.py\n.*?)```", PAGE, re.DOTALL)


@pytest.fixture
def run_of(recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes a recipe with the loss of the page, which lies in the working directory; its reward is the share of digits."""
    monkeypatch.chdir(tmp_path)
    # the start model gives its 19 characters about .05 each
    (tmp_path / "mine.py").write_text(CODE.replace("FLOOR = 0.01", "FLOOR = 0.05"))
    (tmp_path / "digits.py").write_text(
        "def share(completions):\n    return [sum(c.isdigit() for c in text) / max(1, len(text)) for text in completions]\n"
    )

    def make(name: str, steps: int, **loss: Any) -> Config:
        return recipe(
            run={"name": name, "steps": steps}, explore={"expand": "all"},
            reward={"type": "user", "function": "digits.py:share", "truncated_value": "none"},
            sampling={"max_new_tokens": 10, "top_p": 0.9}, optim={"lr": 1e-2, "minibatches": 2},
            loss={"beta": 0.01, "policy": "mine.py:my_loss", **loss}, checkpoint={"every": 2},
        )  # fmt: skip

    return make


def trace(run: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what a clock measured."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    timed = ("time/", "ledger/seconds_", "tokens_per_s")
    return [{key: value for key, value in line.items() if not key.startswith(timed)} for line in lines]


def test_the_example_trains_and_is_resumed_exactly(run_of: Any) -> None:
    """Four steps, and the same in two halves: every metric and every weight is the same, bit by bit."""
    whole = train(run_of("whole", 4))
    lines = trace(whole)
    assert len(lines) == 4
    for stream in ("main", "branch"):
        assert all(0.5 < line[f"{stream}/figure/ratio"] < 2 for line in lines)
    assert any(line["main/figure/ratio"] != 1 for line in lines)
    assert any(line["main/clip_fraction"] > 0 for line in lines)  # some tokens are left alone
    assert all(line["mismatch/weight"] != 1 for line in lines)  # a nucleus: importance weights apply to this loss too
    half = train(run_of("half", 2))
    train(load_recipe(half / "config.toml", [("run.steps", "4")]), resume=half)
    assert trace(half) == lines
    a, b = (load_file(run / "checkpoints" / "step-000004" / "model" / "model.safetensors") for run in (whole, half))
    assert a.keys() == b.keys() and all((a[name] == b[name]).all() for name in a)
    # the control: another loss takes another path
    assert trace(train(run_of("other", 4, policy="ppo")))[3]["main/loss"] != lines[3]["main/loss"]


@pytest.mark.parametrize("start", [train, dry_run])
def test_a_bad_one_is_refused_before_anything_is_written(run_of: Any, start: Any, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(CODE.replace("LossOutput(loss_N,", "LossOutput(loss_N.mean(),"))
    says = r"loss.policy is 'mine.py:my_loss', but the function returned loss_N of the shape \[\], but there are 6 terms"
    with pytest.raises(ConfigError, match=says):
        start(run_of("bad", 2))
    assert not (tmp_path / "runs" / "bad" / "metrics.jsonl").exists()


def test_a_file_that_is_not_there_is_refused(run_of: Any) -> None:
    with pytest.raises(ConfigError, match=r"loss.policy is 'yours.py:my_loss', but the file '.*yours.py' does not exist"):
        train(run_of("none", 2, policy="yours.py:my_loss"))
