"""Shared by all tests: surroundings of their own, a tiny policy, trees by hand, and one thread for torch.

Nothing here imports torch before the environment is clean: libraries read their variables when they are imported.
"""

from __future__ import annotations

import functools
import gc
import os
import shutil
import tempfile
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
from commands import SHARED, Starter, shared_process
from hypotheses import register_profiles
from leftovers import restorer, seed_everything
from surroundings import clean_environment
from trees import make_tree

from deepgrpo.config import Config, ScratchModel, parse_config
from deepgrpo.records import Tree

TINY = {"type": "scratch", "hidden_size": 32, "num_layers": 2, "num_heads": 2, "intermediate_size": 64, "max_position": 96}

SLOWEST = (
    "cluster/test_faults.py", "cluster/test_cluster.py", "cli/test_compare_cli.py", "equivalence/test_golden.py",
    "cluster/test_driver.py", "equivalence/test_training.py", "cli/test_train_cli.py", "unit/test_user_code.py",
    "cluster/test_distribution.py", "pretend/test_runs.py", "cli/test_agents_cli.py", "browser/", "storm/", "learn/",
    "cli/test_cli.py", "equivalence/test_tree_flex.py", "unit/test_policy.py", "property/test_strategy_contract.py",
    "unit/test_compare.py", "unit/test_lab.py", "unit/test_rescue.py", "equivalence/test_tree.py",
    "cli/test_surroundings.py", "unit/test_bench_peers.py", "unit/test_rewards.py", "unit/test_vllm_process.py",
    "cli/", "cluster/", "equivalence/", "pretend/", "unit/test_profile.py",
)  # fmt: skip
"""Files that take long, which come first, so that none is left for the end."""

_home = pytest.StashKey[Path]()
register_profiles()


@pytest.hookimpl(tryfirst=True)
def pytest_sessionstart(session: pytest.Session) -> None:
    """Clean the environment of this process, which a worker of xdist inherits and cleans again."""
    session.config.stash[_home] = home = Path(tempfile.mkdtemp(prefix="deepgrpo-tests-"))
    clean_environment(os.environ, home)
    if SHARED not in os.environ:
        shared = shared_process()
        shared.__enter__()
        session.config.add_cleanup(lambda: shared.__exit__(None, None, None))


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_collection(session: pytest.Session) -> Generator[None, Any, Any]:
    """Import test modules and build shared fixtures in a temporary directory.

    Garbage is looked for less often, and not among the million objects of libraries and tests: at Python's own thresholds that
    takes a twelfth of the time of all tests.
    """
    os.chdir(session.config.stash[_home])
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.set_threshold(50_000, 20, 20)
        gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    tests = Path(__file__).parent

    @functools.cache
    def place(path: Path) -> int:
        name = path.relative_to(tests).as_posix()
        return next((i for i, start in enumerate(SLOWEST) if name.startswith(start)), len(SLOWEST))

    items.sort(key=lambda item: place(item.path))


def pytest_sessionfinish(session: pytest.Session) -> None:
    os.chdir(session.config.invocation_params.dir)
    shutil.rmtree(session.config.stash[_home], ignore_errors=True)


@pytest.fixture(autouse=True)
def _surroundings(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An empty working directory and a home that does not exist; what a test sets in its process ends with it."""
    before, restore = dict(os.environ), restorer(tmp_path)
    seed_everything()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    if not request.node.get_closest_marker("vllm"):
        monkeypatch.delenv("DEEPGRPO_VLLM_PYTHON", raising=False)
    yield
    monkeypatch.undo()  # first: it may have replaced what is needed now
    restore()
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="module", autouse=True)
def _around_a_file(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Fixtures that a file shares start with the same random state, and what they set ends with the file."""
    before, restore = dict(os.environ), restorer(tmp_path_factory.getbasetemp())
    seed_everything()
    yield
    restore()
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="session")
def commands() -> Starter:
    """Starts commands of `deepgrpo` in processes of their own."""
    return Starter()


@pytest.fixture
def policy() -> Any:
    """A fresh random policy over the characters of the synthetic task, 0.03M parameters."""
    from deepgrpo.model.loading import scratch_policy
    from deepgrpo.prompts import synthetic

    return scratch_policy(ScratchModel.model_validate(TINY), synthetic.tokenizer(), seed=3)


@pytest.fixture
def recipe(tmp_path: Path) -> Any:
    """Makes a small recipe for the synthetic task; sections given by keyword are merged in."""

    def make(**sections: dict[str, Any]) -> Config:
        raw: dict[str, Any] = {
            "run": {"dir": str(tmp_path / "runs"), "name": "test", "steps": 3, "prompts_per_step": 4, "device": "cpu"},
            "model": dict(TINY),
            "data": {"type": "synthetic", "chain_length": 2},
            "reward": {"type": "task"},
            "sampling": {"max_new_tokens": 24},
            "explore": {
                "type": "deep", "num_rollouts": 4, "branches_per_pivot": 3,
                "segments": {"type": "tokens", "size": 4},
            },
            "loss": {"beta": 0.0},
            "optim": {"lr": 1e-3},
        }  # fmt: skip
        for name, values in sections.items():
            section = raw.get(name, {})
            # another type of section starts empty
            base = {} if "type" in values and section.get("type") not in (None, values["type"]) else section
            raw[name] = {**base, **values}
        return parse_config(raw)

    return make


@pytest.fixture
def worked_tree() -> Tree:
    """The worked example of records.py."""
    return make_tree([(6, 0.0), (5, 1.0)], [(0, 4, [(2, 1.0), (3, 0.0)])])


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Puts a stand-in for vLLM where a child of this interpreter finds it; returns what it was told, line by line."""
    from vllm_here import stand_in_vllm

    return stand_in_vllm(monkeypatch, tmp_path)
