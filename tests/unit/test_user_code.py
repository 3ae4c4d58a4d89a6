"""A user's code leaves the process as it was, ends within its limit, and does not hold up the end of the run."""

from __future__ import annotations

import os
import select
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import Starter
from safetensors.torch import load_file

from deepgrpo import processes
from deepgrpo.config import UserReward
from deepgrpo.errors import RewardError
from deepgrpo.foreign import unchanged_process
from deepgrpo.records import Prompt
from deepgrpo.rewards import call
from deepgrpo.rewards.user import UserFunctionReward
from deepgrpo.runs.layout import RunDir
from deepgrpo.train.loop import train
from deepgrpo.train.stop import graceful_stop
from hostile.reward_cases import CASES
from hostile.rewards import train_with

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")


def in_child(work: Callable[[], object], *, seconds: float = 60.0) -> tuple[int, str]:
    """Do some work in a forked child; its exit code, and what it wrote to standard error."""
    out, end = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            os.close(out)
            os.dup2(end, 2)
            sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
            work()
        finally:
            os._exit(70)
    os.close(end)
    said, deadline = b"", time.monotonic() + seconds
    try:
        while more := select.select([out], [], [], max(0.0, deadline - time.monotonic()))[0] and os.read(out, 1 << 16):
            said += more
        assert time.monotonic() < deadline, "it hangs"
    finally:
        os.close(out)
        if time.monotonic() >= deadline:
            os.kill(pid, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return code, said.decode()


# ---------------------------------------------------------------- the process afterwards is the process before

DISTURBS = """
import os, random, sys, tempfile
import numpy, torch
os.chdir("/")
torch.set_grad_enabled(False)
torch.manual_seed(7)
first = {first}
def reward(completions, completion_ids, **columns):
    if {disturbs}:
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)
        os.umask(0o777)
        os.environ.clear()
        os.environ.update(HOME="/nowhere", TMPDIR="/nowhere")
        random.seed(1); numpy.random.seed(1); torch.manual_seed(1)
        torch.set_num_threads(3); torch.set_default_dtype(torch.float64); torch.set_float32_matmul_precision("medium")
        torch.use_deterministic_algorithms(True); torch.autograd.set_detect_anomaly(True)
        os.close(0)
        sys.stdout = None
    return [float(sum(ids) % 3) for ids in completion_ids]
"""


def test_a_reward_that_disturbs_its_process_changes_nothing_in_the_run(
    recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found = {}
    for name, disturbs in (("tame", False), ("wild", True)):
        Path(f"{name}.py").write_text(DISTURBS.format(first=name == "tame", disturbs=disturbs))
        config = recipe(
            run={"name": name, "dir": "runs", "steps": 3}, reward={"type": "user", "function": f"{name}.py:reward"},
            checkpoint={"every": 2}, log={"trees_every": 1}, loss={"beta": 0.1},
        )  # fmt: skip
        run = train(config)
        assert run == tmp_path / "runs" / name
        found[name] = run
        assert Path.cwd() == tmp_path
        assert torch.get_default_dtype() == torch.float32 and torch.is_grad_enabled() and torch.get_num_threads() == 1
    kept = [sorted((str(path.relative_to(run)), path.stat().st_mode) for path in run.rglob("*")) for run in found.values()]
    assert kept[0] == kept[1] and "trees/step-000003.jsonl.gz" in dict(kept[0])
    for file in ("model/model.safetensors", "optimizer.safetensors"):  # the latter has torch's random state
        one, other = (load_file(RunDir(run).checkpoint(3) / file) for run in found.values())
        assert all(torch.equal(one[key], other[key]) for key in one)


def test_standard_streams_come_back(tmp_path: Path) -> None:
    def work() -> None:
        for each in (lambda: sys.stderr.close(), lambda: os.close(2), lambda: os.dup2(os.open(os.devnull, os.O_WRONLY), 2)):
            with unchanged_process():
                each()
            os.write(2, b"x")
            print("y", end="", file=sys.stderr, flush=True)
            print(end="", flush=True)
        os._exit(0)

    assert in_child(work) == (0, "xyxyxy")


def test_a_child_that_a_users_code_forks_ends_where_it_returns() -> None:
    def work() -> None:
        with unchanged_process():
            pid = os.fork()
        os._exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) + 5 if pid else 9)  # the child never comes here

    assert in_child(work) == (5, "")


def test_torch_draws_the_same_in_a_call_whatever_was_drawn_before(tmp_path: Path) -> None:
    """A resumed run asks the function for the first time where an uninterrupted one has asked before."""
    (tmp_path / "mine.py").write_text(
        "import torch\ndef reward(completions, **columns):\n    return torch.rand(len(completions))"
    )
    reward = UserFunctionReward(UserReward(function=f"{tmp_path}/mine.py:reward"))
    prompt = Prompt("p", "text", (1,), "q", "1", {})
    before = torch.get_rng_state()
    one, other, again = (reward.score([prompt], ["x"], [ids]) for ids in ((1, 2), (3,), (1, 2)))
    reward.close()
    assert one == again != other
    assert torch.equal(torch.get_rng_state(), before)


# ---------------------------------------------------------------- signals


@needs_fork
@pytest.mark.parametrize("library", [False, True], ids=["default", "handled by a library, as Ray does"])
def test_forked_children_leave_our_signals_alone(library: bool) -> None:
    """Before, SIGTERM in a child asked the run to stop, wrote into its log, and did not end the child."""
    before = signal.signal(signal.SIGTERM, (lambda number, frame: sys.exit(3)) if library else signal.SIG_DFL)
    try:
        _fork_and_terminate()
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def _fork_and_terminate() -> None:
    notes: list[str] = []
    with graceful_stop(notes.append) as stop:
        handler = signal.getsignal(signal.SIGTERM)
        pid = os.fork()
        if not pid:
            try:
                own = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
                if handler in own or own[1] is not signal.SIG_IGN:
                    os._exit(1)
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(30)
            finally:
                os._exit(2)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGTERM
        assert (stop.requested, notes) == (False, [])
        assert signal.getsignal(signal.SIGTERM) is handler


@needs_fork
def test_a_child_dies_of_a_signal_that_comes_before_its_first_line() -> None:
    """As a worker of a pool that is terminated before it has started."""
    with graceful_stop(lambda note: None):
        before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
        for _ in range(8):
            pid = os.fork()
            if not pid:
                time.sleep(30)
                os._exit(2)
            os.kill(pid, signal.SIGTERM)
            assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGTERM
        assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before


@pytest.mark.parametrize(
    "name", ["multiprocessing.Pool", "a fork that returns", "os._exit(3)", "os.chdir from a thread that stays"]
)
def test_whole_runs(name: str, tmp_path: Path, commands: Starter) -> None:
    (case,) = [each for each in CASES if each.name == name]
    found = train_with(case, tmp_path, commands)
    assert found.fault is None, found
    assert found.out.count("run directory: runs/hostile\n") == (case.code is None)
    assert len((tmp_path / "runs" / "hostile" / "metrics.jsonl").read_text().splitlines()) == 2 * (case.code is None)


# ---------------------------------------------------------------- time limits


def test_code_that_lets_no_thread_run_ends_the_process_in_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before, it hung for good: the thread that watches the clock never got its turn."""
    monkeypatch.setattr(call, "GRACE_S", 0.2)
    file = tmp_path / "mine.py"
    file.write_text("import itertools\ndef reward(completions):\n    return sum(itertools.repeat(1))")
    reward = UserFunctionReward(UserReward(function=f"{file}:reward", timeout_s=0.1))
    code, said = in_child(lambda: reward.score([Prompt("p", "t", (1,), "q", "1", {})], ["x"], [(1,)]))
    assert code == 1
    assert said == (
        f"error: the reward function '{file}:reward' exceeded reward.timeout_s in code that lets no other thread run ({file}, "
        "line 3), so the process was ended; a training run goes on from its last checkpoint: deepgrpo train --resume RUN, "
        "or deepgrpo.train(resume=RUN, ...)\n"
    )


def test_a_thread_that_runs_python_code_is_ended(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "import threading\nseen = []\ndef reward(completions):\n    seen.append(threading.current_thread())\n"
        "    while True: pass"
    )
    reward = UserFunctionReward(UserReward(function=f"{tmp_path}/mine.py:reward", timeout_s=0.1))
    with pytest.raises(RewardError, match="did not return within"):
        reward.score([Prompt("p", "t", (1,), "q", "1", {})], ["x"], [(1,)])
    reward.close()
    (thread,) = reward._function.__globals__["seen"]
    thread.join(20)
    assert not thread.is_alive()


# ---------------------------------------------------------------- the end of processes


def test_the_end_is_not_held_up() -> None:
    def work() -> None:
        processes.end_within(0.2, 3)
        import threading

        threading.Thread(target=time.sleep, args=(1000,), name="mine").start()
        threading._shutdown()  # type: ignore[attr-defined]

    assert in_child(work) == (3, "ended without waiting longer than 0.2 s for what your code left running: mine\n")
