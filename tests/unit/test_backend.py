"""The seam to where a run samples and learns, the batch that is sampled ahead, and how a run is stopped."""

from __future__ import annotations

import errno
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError

from deepgrpo.errors import CheckpointError, EngineError
from deepgrpo.explore.toy import FakeEngine
from deepgrpo.model.policy import Policy
from deepgrpo.runs.checkpoints import Checkpoints
from deepgrpo.runs.layout import RunDir
from deepgrpo.train.backend import LocalBackend, Parts
from deepgrpo.train.build import build_shapes
from deepgrpo.train.directory import refusals_explained
from deepgrpo.train.learner import Learner
from deepgrpo.train.loop import train
from deepgrpo.train.prefetch import Prefetch
from deepgrpo.train.stop import graceful_stop

# ---------------------------------------------------------------- parts


def opened(recipe: Any, policy: Policy, engine: Any = None, **sections: Any) -> Parts:
    backend = LocalBackend(lambda config, policy: engine or FakeEngine())
    parts = backend.open(recipe(reward={"type": "exact"}, **sections), policy, None)
    parts.close()
    return parts


def test_importance_weights_are_on_where_the_sampler_is_another_policy(recipe: Any, policy: Policy) -> None:
    class Rounded(FakeEngine):
        exact = False

    def weighs(engine: Any = None, **sections: Any) -> bool:
        learner = opened(recipe, policy, engine, **sections).learner
        assert isinstance(learner, Learner)
        return learner.objective.weigh

    assert not weighs()
    assert weighs(Rounded())
    assert weighs(sampling={"top_p": 0.9})  # it samples from a part of the distribution
    assert not weighs(Rounded(), loss={"importance": "off"})


def test_a_local_backend_has_nothing_to_say(recipe: Any, policy: Policy) -> None:
    parts = opened(recipe, policy)
    assert (parts.overlaps, parts.loses_learners, parts.description, parts.metrics()) == (False, False, None, {})
    parts.begin_step()
    parts.listen(print)


def test_a_model_is_checked_where_its_shapes_are_known(recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[tuple[Any, str]] = []
    monkeypatch.setattr("deepgrpo.train.backend.check_room", lambda config, shapes, device: checked.append((shapes, device)))
    config = recipe()
    shapes = build_shapes(config)
    assert LocalBackend().prepare(config, shapes) == "cpu" and checked == [(shapes, "cpu")]
    assert LocalBackend().prepare(config, None) == "cpu" and len(checked) == 1


def test_a_backend_is_closed_when_sampling_fails(recipe: Any) -> None:
    closed: list[str] = []

    class Broken(FakeEngine):
        def sample(self, *arguments: Any, **options: Any) -> Any:
            raise EngineError("out of order")

        def close(self) -> None:
            closed.append("engine")

    with pytest.raises(EngineError, match="out of order"):
        train(recipe(), backend=LocalBackend(lambda config, policy: Broken()))
    assert closed == ["engine"]


# ---------------------------------------------------------------- the next batch


def test_a_prefetched_batch_is_taken_once() -> None:
    prefetch: Any = Prefetch()
    assert prefetch.take(1) is None
    gate = threading.Event()
    prefetch.start(2, lambda: (gate.wait(5), "batch")[1])
    gate.set()
    prefetch.wait()
    assert prefetch.take(2) == "batch" and prefetch.take(2) is None
    prefetch.close()


def test_what_fails_ahead_is_raised_when_it_is_taken() -> None:
    def fails() -> Any:
        raise EngineError("out of order")

    prefetch = Prefetch()
    prefetch.start(2, fails)
    prefetch.wait()
    with pytest.raises(EngineError, match="out of order"):
        prefetch.take(2)
    assert prefetch.take(3) is None
    prefetch.close()


# ---------------------------------------------------------------- stopping


def test_the_first_signal_asks_and_the_second_stops() -> None:
    notes: list[str] = []
    # as in a shell's background, tests may ignore SIGINT
    outer = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        before = signal.getsignal(signal.SIGTERM)
        with graceful_stop(notes.append) as stop:
            assert not stop.requested
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGTERM)
            assert stop.requested and notes == ["finishing this step; Ctrl-C again stops at once"]
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGTERM) == before
    finally:
        signal.signal(signal.SIGINT, outer)


def test_a_note_that_cannot_be_written_does_not_end_the_step() -> None:
    def refuses(text: str) -> None:
        raise RuntimeError("reentrant call")

    with graceful_stop(refuses) as stop:
        signal.raise_signal(signal.SIGTERM)
        assert stop.requested


def test_in_a_thread_signals_are_left_alone() -> None:
    seen: list[bool] = []

    def work() -> None:
        with graceful_stop(print) as stop:
            seen.append(stop.requested)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [False]


# ---------------------------------------------------------------- what the system refuses


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        (OSError(errno.ENOSPC, "no space"), "free some space"), (OSError(errno.EDQUOT, "quota"), "free some space"),
        (SafetensorError("I/O error: Permission denied (os error 13)"), "fix its permissions"),
        (PermissionError(errno.EACCES, "not yours", "RUN/trees/x"), "fix its permissions"),
        (OSError(errno.EROFS, "read-only", "RUN/metrics.jsonl"), "make its file system writable"),
        (NotADirectoryError(errno.ENOTDIR, "no", "RUN/eval/x"), "move away the file that is there"),
        (IsADirectoryError(errno.EISDIR, "no", "RUN/eval/x"), "move away the directory that is there"),
    ],
)  # fmt: skip
def test_each_refusal_has_its_remedy(tmp_path: Path, error: Exception, remedy: str) -> None:
    """"permission denied" is not answered with "free some space"."""
    run = RunDir(tmp_path / "run")
    run.path.mkdir()
    if isinstance(error, OSError) and error.filename is not None:
        error = type(error)(error.errno, error.strerror, error.filename.replace("RUN", str(run.path)))
    with pytest.raises(CheckpointError, match=f"{remedy}.* which begins again"), refusals_explained(run, Checkpoints(run)):
        raise error
    run.checkpoint(3).mkdir(parents=True)
    said = f"{remedy}.* and continue with: deepgrpo train --resume [^,]*$"
    with pytest.raises(CheckpointError, match=said), refusals_explained(run, Checkpoints(run)):
        raise error
    run.path.rename(tmp_path / "moved")
    said = "was removed or moved while the run was going"
    with pytest.raises(CheckpointError, match=said), refusals_explained(run, Checkpoints(run)):
        raise error


def test_other_errors_of_files_pass(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    for error in (PermissionError(errno.EACCES, "not yours"), OSError(errno.EACCES, "not yours", "/elsewhere/data")):
        with pytest.raises(PermissionError), refusals_explained(run, Checkpoints(run)):
            raise error
