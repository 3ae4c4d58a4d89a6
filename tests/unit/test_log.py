"""The run's log on real files, in a real pipe and on a real pseudo-terminal."""

from __future__ import annotations

import json
import math
import os
import pty
import select
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

import deepgrpo
from deepgrpo.config import LogConfig
from deepgrpo.errors import MissingExtraError
from deepgrpo.ledger import Ledger, StepReport
from deepgrpo.runs.metrics import step_json, truncate_metrics
from deepgrpo.train.log import RunLog, step_line
from deepgrpo.train.shown import COLUMNS, Shown, shown_of
from saved_runs import small_tree

METRICS = {
    "main/reward": 0.41,
    "main/mixed": 0.62,
    "branch/reward": 0.23,
    "eval/greedy": 0.58,
    "main/entropy": 0.333,
    "main/length": 38.2,
    "grad_norm": 0.8,
    "tokens_per_s": 19_000.0,
}


def report(step: int, warnings: tuple[str, ...] = (), **metrics: object) -> StepReport:
    return StepReport(step, {**METRICS, **metrics}, Ledger(sampled_tokens=100 * step), warnings)  # type: ignore[arg-type]


def quiet() -> Console:
    return Console(file=open(os.devnull, "w"))


def test_the_step_line() -> None:
    line = step_line(report(12), 60)
    assert line == ("step 12/60  reward .41  mixed 62%  branch .23  eval .58  entropy .33  len 38  grad 0.8  19k tok/s")
    assert len(line) <= 100


def test_the_step_line_leaves_out_what_is_missing_and_shows_what_is_broken() -> None:
    few = StepReport(3, {"main/reward": -0.25, "main/entropy": math.nan, "eval/greedy": None}, Ledger())
    assert step_line(few, 1000) == "step    3/1000  reward -.25  entropy nan"
    assert "reward 1.00" in step_line(report(1, **{"main/reward": 1.0}), 60)


def test_a_step_with_nothing_to_learn_says_so() -> None:
    """All groups agree, so there was no gradient: nothing is broken."""
    assert step_line(report(3, **{"main/mixed": 0.0, "grad_norm": math.nan}), 60) == (
        "step  3/60  reward .41  mixed 0%  branch .23  eval .58  entropy .33  len 38  no signal  19k tok/s"
    )


def test_step_json_has_no_nan_and_the_ledger_under_its_name() -> None:
    line = step_json(report(2, ("careful",), loss=math.nan, hist=[1.0, math.inf]))
    assert line["loss"] is None
    assert line["hist"] == [1.0, None]
    assert line["ledger/sampled_tokens"] == 200
    assert line["warnings"] == ["careful"]


def test_what_trackers_show_of_a_step() -> None:
    """small_tree has two rollouts, one wrong and one right, and two such branches of its pivot, at r = 0.5."""
    trees = [small_tree("q1"), small_tree("q2")]
    shown = shown_of(3, trees, count=3)
    assert sorted(shown.values["responses/reward"]) == [0.0] * 4 + [1.0] * 4
    assert shown.values["pivots/r"] == [0.5, 0.5]
    assert len(shown.values["responses/tokens"]) == 8
    # one of each prompt, then a second one of the first
    assert [(row[0], row[1], row[2]) for row in shown.rows] == [(3, "q1", "main"), (3, "q2", "main"), (3, "q1", "branch")]
    assert all(len(row) == len(COLUMNS) for row in shown.rows)
    assert shown_of(3, [], count=3) == Shown()


def test_metrics_are_on_disk_after_every_step(tmp_path: Path) -> None:
    with RunLog(tmp_path / "run", total_steps=2, console=quiet()) as log:
        log.step(report(1, loss=math.inf))
        (first,) = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
        assert json.loads(first)["step"] == 1
        assert json.loads(first)["loss"] is None
        log.note("saved")
        log.step(report(2, ("look here",)))
    assert [json.loads(s)["step"] for s in (tmp_path / "run/metrics.jsonl").read_text().splitlines()] == [1, 2]
    text = (tmp_path / "run/log.txt").read_text().splitlines()
    assert [line[21:30] for line in text] == ["step 1/2 ", "saved", "step 2/2 ", "warning: "]


def test_truncate_drops_later_and_torn_lines(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    whole = "".join(json.dumps({"step": step}) + "\n" for step in range(1, 6))
    path.write_text(whole + '{"step": 3, "rew')
    assert truncate_metrics(path, 3) == 3  # steps 4 and 5, and the torn line
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3]
    assert truncate_metrics(path, 3) == 0
    assert truncate_metrics(tmp_path / "absent.jsonl", 3) == 0
    assert os.listdir(tmp_path) == ["metrics.jsonl"]


SCRIPT = """
import sys, time
from pathlib import Path
from deepgrpo.ledger import Ledger, StepReport
from deepgrpo.train.log import RunLog
with RunLog(Path(sys.argv[1]), total_steps=3) as log:
    log.note("[model] sampled with [bold] 2 rollouts")
    for step in range(1, 4):
        metrics = {"main/reward": 0.41, "main/entropy": 0.33, "main/mixed": 0.5, "branch/reward": .2, "main/length": 38,
                   "eval/greedy": 0.5, "grad_norm": 0.812, "tokens_per_s": 19000.0}
        log.step(StepReport(step, metrics, Ledger(), ("a long warning " * 12,) if step == 2 else ()))
        time.sleep(0.15)
"""


def environment() -> dict[str, str]:
    # variables with which rich takes a pipe for a terminal, or the other way round
    drop = ("FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "COLUMNS", "TERM")
    kept = {k: v for k, v in os.environ.items() if k not in drop}
    source = str(Path(deepgrpo.__file__).parents[1])  # also where the package is not installed
    return {**kept, "TERM": "xterm-256color", "PYTHONPATH": source}


def test_a_pipe_gets_plain_lines(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path)], capture_output=True, env=environment(), check=True
    )
    out = done.stdout.decode("ascii")
    assert not [c for c in out if ord(c) < 32 and c != "\n"]
    lines = out.splitlines()
    assert len(lines) == 5
    assert lines[0] == "[model] sampled with [bold] 2 rollouts"
    assert lines[3] == "warning: " + "a long warning " * 12
    assert lines[4].startswith("step 3/3  reward .41  mixed 50%  branch .20  eval .50")


def test_a_terminal_gets_a_bar_and_keeps_the_lines(tmp_path: Path) -> None:
    leader, follower = pty.openpty()
    process = subprocess.Popen([sys.executable, "-c", SCRIPT, str(tmp_path)], stdout=follower, env=environment())
    os.close(follower)
    out = b""
    while select.select([leader], [], [], 20)[0]:
        try:
            piece = os.read(leader, 65536)
        except OSError:  # the other end is closed
            break
        if not piece:
            break
        out += piece
    os.close(leader)
    assert process.wait() == 0
    text = out.decode()
    assert "\x1b[" in text
    assert "3/3" in text
    assert "step 3/3  reward .41" in text
    # log.txt stays plain
    assert "\x1b" not in (tmp_path / "log.txt").read_text()


def test_tensorboard_events_can_be_read_back(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    recipe = {"run": {"name": "a|b"}, "explore": {"type": "deep"}}
    config = LogConfig(tensorboard=True, responses_every=1)
    with RunLog(tmp_path, config, total_steps=2, recipe=recipe, console=quiet()) as log:
        first = report(1, pivots_histogram=[1.0, 3.0], rates=[0.5, None], loss=math.nan, **{"eval/pass@4": 0.7})
        log.step(first, [small_tree("a|b")])
        log.step(report(2))
    # a resume at step 2: its first life is hidden
    with RunLog(tmp_path, LogConfig(tensorboard=True), total_steps=2, done_steps=1, console=quiet()) as log:
        log.step(report(2, **{"main/reward": 0.9}))
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, pytest.approx(e.value)) for e in events.Scalars("main/reward")] == [(1, 0.41), (2, 0.9)]
    tags = events.Tags()
    assert "eval/pass@4" in tags["scalars"]
    assert "ledger/sampled_tokens" in tags["scalars"]
    assert "loss" not in tags["scalars"]
    (drawn,) = events.Histograms("pivots_histogram")
    # one pivot in [0, 1/2] and three in [1/2, 1]: the sum of the middles is 0.25 + 3 * 0.75
    assert drawn.histogram_value.bucket == [1.0, 3.0]
    assert drawn.histogram_value.sum == pytest.approx(2.5)
    assert set(tags["histograms"]) == {"pivots_histogram", "responses/reward", "responses/tokens", "pivots/r"}
    (rewards,) = events.Histograms("responses/reward")  # the tree has two rollouts and two branches
    assert (rewards.histogram_value.num, rewards.histogram_value.sum) == (4, 2.0)
    (text,) = events.Tensors("recipe/text_summary")
    assert '"type": "deep"' in text.tensor_proto.string_val[0].decode()
    (text,) = events.Tensors("responses/text_summary")
    head, _, *rows = text.tensor_proto.string_val[0].decode().splitlines()
    assert head == "| step | prompt | stream | reward | tokens | finish | question | response |"
    assert rows[0].split(" | ")[1:4] == ["a\\|b", "main", "0.0"] and len(rows) == 4


@pytest.mark.parametrize("package", ["tensorboard", "wandb", "trackio"])
def test_a_missing_sink_names_the_install_command(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=rf'log.{package} = true.*pip install "deepgrpo\[{package}\]"'):
        RunLog(tmp_path, LogConfig(**{package: True}), total_steps=1, console=quiet())


def test_wandb_offline_writes_and_resumes_one_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    config = LogConfig(wandb=True, responses_every=2)
    for done in (0, 1):
        with RunLog(
            tmp_path, config, total_steps=2, done_steps=done, console=quiet(), recipe={"explore": {"type": "deep"}}
        ) as log:
            log.step(report(done + 1), [small_tree("q1")])
    places = sorted((tmp_path / "wandb").glob("offline-run-*"))
    (name,) = {path.name.rsplit("-", 1)[1] for path in places}
    assert name == (tmp_path / "wandb-id.txt").read_text().strip()
    # what is kept for `wandb sync`: the table of the second step, and all records
    (table,) = (tmp_path / "wandb").glob("offline-run-*/files/media/table/*.table.json")
    found = json.loads(table.read_text())
    assert found["columns"] == list(COLUMNS) and next(row[1:4] for row in found["data"]) == ["q1", "main", 0.0]
    wandb.teardown()  # its service writes the end of the records when it ends
    kept = b"".join(file.read_bytes() for place in places for file in place.glob("*.wandb"))
    for said in (b"responses/reward", b"pivots/r", b"histogram", b"explore"):
        assert said in kept, said


def test_trackio_keeps_a_run_in_its_own_database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trackio = pytest.importorskip("trackio")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    config = LogConfig(trackio=True, responses_every=1, project="tried")
    with RunLog(tmp_path, config, total_steps=1, console=quiet(), name="one", recipe={"explore": {"type": "deep"}}) as log:
        log.step(report(1), [small_tree("q1")])
    (run,) = trackio.Api().runs("tried")
    assert run.name == "one" and "deep" in json.dumps(run.config)
    from trackio.sqlite_storage import SQLiteStorage

    kept = json.dumps(SQLiteStorage.get_logs("tried", "one"), default=str)
    for said in ("main/reward", "responses/reward", "trackio.histogram", "trackio.table"):
        assert said in kept, said


def test_a_plain_log_imports_neither_torch_nor_a_sink() -> None:
    code = "import sys, deepgrpo.train.log; print({'torch', 'wandb', 'tensorboard', 'trackio'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment())
    assert done.stdout.strip() == "set()"
