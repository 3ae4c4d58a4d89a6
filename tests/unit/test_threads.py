"""Threads: spin settings before torch loads, the number for a model, and the CPUs that a container grants."""

from __future__ import annotations

import ast
import importlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from surroundings import ROOT

from deepgrpo import threads
from deepgrpo.config import load_recipe
from deepgrpo.lab.compare.jobs import environment
from deepgrpo.model.device import use_threads
from deepgrpo.threads import Threads, available_cpus, cgroup_cpus, limit_spinning, spin_settings, threads_for
from deepgrpo.train.loop import train

SPIN = {"GOMP_SPINCOUNT": "1000", "KMP_BLOCKTIME": "1"}


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> Any:
    """An environment without a user's settings, on four CPUs; torch's number is restored."""
    for name in (*threads.SPIN_OF_USERS, *threads.NUMBER_OF_USERS, threads.CPUS):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3}, raising=False)
    monkeypatch.setattr(threads, "cgroup_cpus", lambda: None)
    before = torch.get_num_threads()
    yield monkeypatch
    torch.set_num_threads(before)


# ---------------------------------------------------------------- spinning


def test_a_users_own_setting_wins() -> None:
    assert spin_settings({}) == SPIN
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"):
        environ = {name: "ACTIVE"}
        limit_spinning(environ)
        assert environ == {name: "ACTIVE"}


def test_the_command_line_sets_it_before_torch_loads(free: pytest.MonkeyPatch) -> None:
    code = (
        "import os, sys\nfrom deepgrpo import cli\n"
        "try: cli.main(['recipes'])\nfinally: print(os.environ.get('GOMP_SPINCOUNT'), 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("1000 False\n")


def test_the_package_of_rays_workers_sets_it(free: pytest.MonkeyPatch) -> None:
    """They are started by a Ray that need not have been started by us; the package is loaded before torch."""
    import deepgrpo.cluster

    importlib.reload(deepgrpo.cluster)
    assert {name: os.environ[name] for name in SPIN} == SPIN
    imported = [
        node for node in ast.parse(Path(deepgrpo.cluster.__file__ or "").read_text()).body if isinstance(node, ast.ImportFrom)
    ]
    assert [node.module for node in imported] == ["deepgrpo.threads"]


def test_libgomp_obeys(free: pytest.MonkeyPatch) -> None:
    """OpenMP's own list of settings, as the library of this torch prints it."""
    if not sys.platform.startswith("linux"):
        pytest.skip("libgomp comes with torch on Linux")
    library = Path(torch.__file__).parent / "lib" / "libgomp.so.1"
    if not library.exists():
        pytest.skip("this torch has another OpenMP runtime")
    done = subprocess.run(
        [sys.executable, "-c", f"import ctypes; ctypes.CDLL({str(library)!r})"], capture_output=True, text=True, check=True,
        env={**os.environ, **spin_settings(), "OMP_DISPLAY_ENV": "verbose"},
    )  # fmt: skip
    assert "GOMP_SPINCOUNT = '1000'" in done.stderr


# ---------------------------------------------------------------- how many


@pytest.mark.parametrize(
    ("parameters", "cpus", "number"),
    [(30_000, 8, 1), (199_999, 8, 1), (220_000, 8, 2), (220_000, 1, 1), (135_000_000, 8, 8), (0, 4, 1)],
)
def test_a_thread_per_hundred_thousand_parameters(parameters: int, cpus: int, number: int) -> None:
    assert threads_for(parameters, cpus) == number


def test_recipe_then_environment_then_size(free: pytest.MonkeyPatch) -> None:
    small, large = torch.nn.Linear(150, 1000), torch.nn.Linear(1000, 1000)  # 151,000 and 1,001,000 parameters
    assert use_threads(small, None) == Threads(1, 4, "model of 0.15M parameters")
    assert torch.get_num_threads() == 1
    assert use_threads(large, None).number == torch.get_num_threads() == 4
    assert use_threads(large, 3, "--threads") == Threads(3, 4, "--threads")
    free.setenv("OMP_NUM_THREADS", "2")
    torch.set_num_threads(2)  # as torch does by itself when it loads
    assert use_threads(large, None) == Threads(2, 4, "OMP_NUM_THREADS")
    assert use_threads(large, 3) == Threads(3, 4, "run.threads")


def test_it_is_said() -> None:
    assert str(Threads(1, 2, "model of 0.03M parameters")) == "2 cores, 1 thread (model of 0.03M parameters)"
    assert str(Threads(1, 1, "model of 0.03M parameters")) == "1 core, 1 thread"


def test_a_run_says_its_number_and_keeps_it(free: pytest.MonkeyPatch, recipe: Any) -> None:
    config = recipe(run={"steps": 1})
    run = train(config)
    first = (run / "log.txt").read_text().splitlines()[0]
    assert "0.02M trainable parameters on cpu · 4 cores, 1 thread (model of 0.02M parameters) · " in first
    assert load_recipe(run / "config.toml").run.threads == 1
    # more CPUs, or another rule, later: the number stays
    free.setattr("deepgrpo.model.device.threads_for", lambda parameters, cpus: 4)
    train(load_recipe(run / "config.toml", [("run.steps", "2")]), resume=run)
    assert torch.get_num_threads() == 1
    assert "4 cores, 1 thread (run.threads)" in (run / "log.txt").read_text()


# ---------------------------------------------------------------- CPUs


def test_jobs_share_the_cpus(free: pytest.MonkeyPatch) -> None:
    assert [environment(workers)["DEEPGRPO_CPUS"] for workers in (1, 2, 3, 8)] == ["4", "2", "1", "1"]
    free.setenv("DEEPGRPO_CPUS", "2")
    assert available_cpus() == 2 and environment(2)["DEEPGRPO_CPUS"] == "1"
    free.setenv("DEEPGRPO_CPUS", "many")
    assert available_cpus() == 4


def test_a_containers_quota_counts(free: pytest.MonkeyPatch) -> None:
    for quota, cpus in ((2.0, 2), (1.5, 1), (0.5, 1), (64.0, 4)):
        free.setattr(threads, "cgroup_cpus", lambda quota=quota: quota)
        assert available_cpus() == cpus


def groups(root: Path, own: str, **files: str) -> float | None:
    """Quota for a process whose /proc/self/cgroup is `own`, with these files below /sys/fs/cgroup (`__` for a slash)."""
    for name, text in files.items():
        path = root / name.replace("__", "/").replace("cpu_max", "cpu.max").replace("cfs_", "cpu.cfs_")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (root / "own").write_text(own)
    return cgroup_cpus(root, root / "own")


@pytest.mark.parametrize(
    ("own", "files", "cpus"),
    [
        ("0::/\n", {"cpu_max": "200000 100000\n"}, 2.0),  # version 2, inside a container
        ("0::/a/b\n", {"a__cpu_max": "150000 100000\n", "a__b__cpu_max": "max 100000\n"}, 1.5),  # the parent has the quota
        ("0::/docker/x\n", {"cpu_max": "400000 100000\n"}, 4.0),  # the host's path, of which only the own group is mounted
        ("0::/\n", {"cpu_max": "max 100000\n"}, None),
        ("4:cpu,cpuacct:/\n", {"cpu__cfs_quota_us": "300000\n", "cpu__cfs_period_us": "100000\n"}, 3.0),  # version 1
        ("1:cpu:/x\n3:memory:/x\n", {"cpu__x__cfs_quota_us": "-1\n", "cpu__x__cfs_period_us": "100000\n"}, None),
        ("0::/\n", {"cpu_max": "\n"}, None),
        ("garbage\n", {}, None),
    ],
)
def test_the_quota_of_a_control_group(own: str, files: dict[str, str], cpus: float | None, tmp_path: Path) -> None:
    assert groups(tmp_path, own, **files) == cpus


def test_without_control_groups(tmp_path: Path) -> None:
    assert cgroup_cpus(tmp_path, tmp_path / "missing") is None


def test_no_other_count_of_cpus() -> None:
    """`os.cpu_count` is the whole machine, of which a container may have a part."""
    users = [str(path) for path in (ROOT / "src").rglob("*.py") if "cpu_count" in path.read_text()]
    assert users == [str(ROOT / "src" / "deepgrpo" / "threads.py")]
