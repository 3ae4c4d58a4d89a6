"""A test sees nothing of the user who runs it: no files of the working directory or of a home, no variables, no locale."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from surroundings import KEPT, KEPT_PREFIXES, ROOT, STATED

from deepgrpo.threads import SPIN

LIBRARIES = {"KMP_INIT_AT_FORK", "KMP_DUPLICATE_LIB_OK", "RAY_CLIENT_MODE", "TQDM_DISABLE", *SPIN}
"""Set by libraries when they are imported, or by a command that a fixture of a module ran in this process."""
OURS = {"HOME", "MPLCONFIGDIR", "HYPOTHESIS_STORAGE_DIRECTORY", "TORCHINDUCTOR_CACHE_DIR", "PYTEST_CURRENT_TEST", *STATED}
TESTS = ROOT / "tests"
# they stumbled over a user's things, or would: a directory `runs/`, a recipe of the same name, DEEPGRPO_DEBUG, a home, a locale
SENSITIVE = (
    "cli/test_surroundings.py::test_a_test_starts_with_nothing",
    "cli/test_surroundings.py::test_so_does_what_it_starts",
    "cli/test_recipes.py::test_a_dry_run_of_a_recipe[demo]",
    "cli/test_cli.py::test_a_command_in_an_interpreter_of_its_own",
    "cli/test_cli.py::test_errors_in_this_process",
    "unit/test_boxed.py",
    "property/test_toml_properties.py",
)


def test_a_test_starts_with_nothing(tmp_path: Path) -> None:
    assert Path.cwd() == tmp_path and not list(tmp_path.iterdir())
    assert not Path.home().exists()
    assert {name for name in os.environ if not name.startswith(KEPT_PREFIXES)} <= KEPT | OURS | LIBRARIES
    assert {name: os.environ[name] for name in STATED} == STATED


def test_so_does_what_it_starts(tmp_path: Path) -> None:
    code = "import os, locale; print(os.getcwd(), os.path.expanduser('~'), locale.getpreferredencoding(), sep='|')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == f"{tmp_path}|{tmp_path / 'home'}|UTF-8\n"


@pytest.fixture
def user(tmp_path: Path) -> dict[str, Any]:
    """A user's directory with a run named demo and recipes of shipped names, and environment variables set for debugging."""
    run = tmp_path / "runs" / "demo"
    run.mkdir(parents=True)
    for name in ("config.toml", "metrics.jsonl", "log.txt"):
        (run / name).write_text("mine\n")
    (tmp_path / "recipes").mkdir()
    for name in ("demo", "demo.toml", "recipes/demo.toml", "config.toml"):
        (tmp_path / name).write_text("mine = \n")
    variables = {
        "HOME": "/nonexistent", "HF_HOME": "/nonexistent/hub", "XDG_CACHE_HOME": "/nonexistent/cache",
        "WANDB_MODE": "online", "TRACKIO_DIR": "/nonexistent/trackio", "DEEPGRPO_DEBUG": "1", "COLUMNS": "20",
        "FORCE_COLOR": "1", "LANG": "de_DE.UTF-8", "LC_ALL": "C", "PYTHONIOENCODING": "ascii", "RAY_ADDRESS": "10.0.0.1:1",
        "TRANSFORMERS_CACHE": "/nonexistent/models", "http_proxy": "http://10.0.0.1:1",
    }  # fmt: skip
    return {"cwd": tmp_path, "env": {**os.environ, **variables}}


@pytest.mark.slow
def test_in_the_directory_of_a_user(user: dict[str, Any]) -> None:
    """The tests that such things can touch pass there, and leave nothing behind, in the checkout neither."""

    def beside() -> set[str]:
        return {path.name for path in ROOT.iterdir() if not path.name.startswith((".coverage", ".pytest_cache"))}

    before = beside(), sorted(user["cwd"].rglob("*"))
    options = ("-q", "-p", "no:cacheprovider", "-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT))
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *(str(TESTS / test) for test in SENSITIVE)],
        capture_output=True, text=True, timeout=240, **user,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert (beside(), sorted(user["cwd"].rglob("*"))) == before
