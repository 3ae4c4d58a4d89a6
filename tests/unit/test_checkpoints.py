"""Checkpoints and the lock of a run directory: a kill at any write leaves whole checkpoints; one process at a time writes."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from deepgrpo.errors import CheckpointError, ConfigError
from deepgrpo.runs import checkpoints as module
from deepgrpo.runs import lock as locks
from deepgrpo.runs.checkpoints import Checkpoints, TrainState, newest_checkpoint, saved_checkpoints
from deepgrpo.runs.files import delete_leftovers
from deepgrpo.runs.layout import RunDir
from deepgrpo.runs.lock import hold


class Files:
    """A policy and a learner of a few bytes."""

    def __init__(self, text: str = "weights") -> None:
        self.text = text

    def save(self, directory: Path) -> None:
        name = "model.safetensors" if directory.name == "model" else "optimizer.safetensors"
        (directory / name).write_text(self.text)

    def load_weights(self, directory: Path) -> None:
        self.text = (directory / "model.safetensors").read_text()

    def load(self, directory: Path, updates: int, optimizer_steps: int) -> None:
        assert (directory / "optimizer.safetensors").read_text() == self.text


class Killed(BaseException):
    """The end of the process: nothing that handles errors runs."""


def saved(run: RunDir, *steps: int, **keep: Any) -> Checkpoints:
    run.path.mkdir(exist_ok=True)
    found = Checkpoints(run, **{"keep_last": 2, "keep_best": False, **keep})
    for step in steps:
        found.save(Files(f"weights {step}"), Files(f"weights {step}"), TrainState(step))
    return found


# ---------------------------------------------------------------- a kill at each write


def killed_at(event: int, patch: pytest.MonkeyPatch) -> list[str]:
    """The process ends before this write, rename or deletion; returns the events so far, by name."""
    seen: list[str] = []

    def arm(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def call(*arguments: Any, **options: Any) -> Any:
            seen.append(name)
            if len(seen) == event + 1:
                if name == "rmtree":  # half of it is done
                    next(path for path in Path(arguments[0]).rglob("*") if path.is_file()).unlink()
                raise Killed
            return original(*arguments, **options)

        patch.setattr(owner, name, call)

    for owner, name in (
        (Path, "mkdir"), (Path, "write_text"), (Path, "rename"), (Path, "unlink"), (shutil, "rmtree"),
        (module, "checksums"), (module, "flush_to_disk"),
    ):  # fmt: skip
        arm(owner, name)
    return seen


def test_a_kill_at_any_write_leaves_whole_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Saving step 3 beside 1 and 2, of which 2 are kept: whenever it ends, the newest is whole and 2 or 3."""
    newest: list[int] = []
    for event in range(100):
        run = RunDir(tmp_path / str(event))
        checkpoints = saved(run, 1, 2)
        with monkeypatch.context() as patch:
            seen = killed_at(event, patch)
            try:
                checkpoints.save(Files("weights 3"), Files("weights 3"), TrainState(3))
            except Killed:
                pass
            else:
                break
        for each in saved_checkpoints(run):
            assert each.verify().step == each.step
        found = newest_checkpoint(run)
        assert found is not None
        newest.append(found.step)
        delete_leftovers(run.checkpoints)
        assert all(path.name.startswith("step-") for path in run.checkpoints.iterdir())
        checkpoints.save(Files("weights 4"), Files("weights 4"), TrainState(4))
        read = Files()
        assert checkpoints.load(saved_checkpoints(run)[-1], read, read).step == 4 and read.text == "weights 4"
    # the one rename that counts is behind all flushes but its own, and before all deletions
    assert newest == sorted(newest) and set(newest) == {2, 3}
    first = newest.index(3)
    assert seen[first - 1] == "rename" and seen.count("flush_to_disk") == seen[:first].count("flush_to_disk") + 1
    assert seen[:first].count("rmtree") == 0 and seen.index("checksums") > seen.index("write_text")


def test_the_same_step_saved_again_replaces_the_former_one(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    checkpoints = saved(run, 1, 2)
    checkpoints.save(Files("again"), Files("again"), TrainState(2))
    assert checkpoints.steps() == [1, 2] and (run.checkpoint(2) / "model" / "model.safetensors").read_text() == "again"


# ---------------------------------------------------------------- checksums


@pytest.mark.parametrize("name", ["model/model.safetensors", "optimizer.safetensors", "state.json"])
def test_a_flipped_bit_is_found_and_the_checkpoint_before_is_offered(tmp_path: Path, name: str) -> None:
    run = RunDir(tmp_path)
    checkpoints = saved(run, 1, 2)
    path = run.checkpoint(2) / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(CheckpointError, match=rf"{path.name}.*; continue from an earlier one with: .* --step 1$"):
        checkpoints.load(saved_checkpoints(run)[-1], Files(), Files())
    checkpoints.load(saved_checkpoints(run)[0], Files(), read := Files("weights 1"))
    assert read.text == "weights 1"
    shutil.rmtree(run.checkpoint(1))
    with pytest.raises(CheckpointError, match=r"there is no earlier one: begin again with: .* --step 0$"):
        saved_checkpoints(run)[0].verify()


def test_weights_of_another_checkpoint_of_the_same_size_are_found(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    saved(run, 1, 2)
    shutil.copy(run.checkpoint(1) / "model" / "model.safetensors", run.checkpoint(2) / "model" / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model/model.safetensors has changed since it was written \(CRC-32"):
        saved_checkpoints(run)[-1].verify(below="model/")
    shutil.copytree(run.checkpoint(1), run.checkpoint(7))
    with pytest.raises(CheckpointError, match=r"step-000007 cannot be read: state.json is that of step 1"):
        saved_checkpoints(run)[-1].verify()


# ---------------------------------------------------------------- the lock


def in_child(work: Callable[[], None]) -> int:
    pid = os.fork()
    if pid == 0:
        try:
            work()
        finally:
            os._exit(0)
    return pid


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.parametrize("with_a_child", [False, True])
def test_a_killed_holder_releases_the_lock(tmp_path: Path, with_a_child: bool) -> None:
    """Also while a child that it forked, such as a worker of a reward, lives on."""
    run, ready = RunDir(tmp_path / "run"), tmp_path / "ready"

    def holder() -> None:
        with hold(run):
            if with_a_child:
                ready.with_name("child").write_text(str(in_child(lambda: time.sleep(120))))
            ready.touch()
            time.sleep(120)

    pid = in_child(holder)
    try:
        wait_for(ready)
        said = rf"run.name: .*run is in use by process {pid} on .* since .*; wait for it to end, end it with `kill {pid}`"
        with pytest.raises(ConfigError, match=said), hold(run):
            pass
        assert run.lock.exists()
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    try:
        with hold(run) as remark:
            assert remark is None
    finally:
        if with_a_child:
            os.kill(int(ready.with_name("child").read_text()), signal.SIGKILL)
    assert not run.path.exists() or not list(run.path.iterdir())


def test_a_lock_whose_file_says_nothing(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    for text in (b"", b"\xff\xfe", b"[" * 900, b'{"pid": "x"}', b'{"pid": 1e400, "host": "h", "since": 0}'):
        with hold(run):
            run.lock.write_bytes(text)
            with pytest.raises(ConfigError, match="is in use by another process; wait for it to end"), hold(run):
                pass


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno
    import fcntl

    def refuse(*arguments: Any) -> None:
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with hold(RunDir(tmp_path)) as remark:
        assert remark == locks.NO_LOCKS.format(tmp_path)


def test_a_directory_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    file = "move away the file"
    for name, says in (("file", file), ("file/run", file), ("n" * 300, "choose a shorter name")):
        with pytest.raises(ConfigError, match=rf"run.dir: .* cannot be written: .*; {says}"), hold(RunDir(tmp_path / name)):
            pass
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
