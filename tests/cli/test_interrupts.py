"""Ctrl-C while the command line or torch is imported: one line, exit code 130."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import deepgrpo

SLOW = """
import os, signal, time
os.kill(os.getpid(), signal.SIGINT)
try:
    time.sleep(60)
except KeyboardInterrupt:
    raise ImportError("numpy._core.multiarray failed to import")  # as compiled modules do
"""


@pytest.mark.parametrize("module", ["tyro", "torch"])
def test_ctrl_c_during_imports_is_quiet(module: str, tmp_path: Path) -> None:
    (tmp_path / f"{module}.py").write_text(SLOW)
    source = Path(deepgrpo.__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{source}"}
    done = subprocess.run(
        [sys.executable, "-m", "deepgrpo", "train", "demo", "--dry-run"], capture_output=True, text=True, env=environment,
        timeout=240, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a job in the background ignores it
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")
