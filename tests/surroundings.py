"""The checkout, and surroundings for tests that hold nothing of the user who runs them.

Every test starts in an empty directory, with a home that does not exist and only the variables below. What it starts inherits
that. Tests find the repository's files by `ROOT`.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import MutableMapping
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[1]
"""The checkout."""


def load_script(path: Path) -> ModuleType:
    """Import a script that belongs to no package from its file."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


KEPT = frozenset({
    "PATH", "PYTHONPATH", "PYTHONDONTWRITEBYTECODE", "PYTHONPYCACHEPREFIX", "VIRTUAL_ENV", "TMPDIR", "USER", "LOGNAME", "SHELL",
    "LD_LIBRARY_PATH", "LD_PRELOAD", "DYLD_LIBRARY_PATH", "OMP_NUM_THREADS", "OMP_WAIT_POLICY",
    # of the tests themselves: a browser, and an interpreter with vLLM for the tests marked `vllm`
    "DEEPGRPO_CHROMIUM", "DEEPGRPO_VLLM_PYTHON",
    # of the session whose worker this is: see commands.py
    "DEEPGRPO_TESTS_COMMANDS",
})  # fmt: skip
KEPT_PREFIXES = ("COVERAGE_", "PYTEST_", "CUDA_", "NVIDIA_")
"""GPUs stay those that the user may use."""

STATED = {
    "LC_ALL": "C.UTF-8",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    # nodes at 127.0.0.1 and nowhere else, as Ray does by itself on systems with a firewall that asks; which of the two is
    # read depends on the version
    "RAY_OVERRIDE_NODE_IP_ADDRESS": "127.0.0.1",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    # Ray starts its workers with a niceness of 15, and tests beside them would leave them no processor
    "RAY_worker_niceness": "0",
    # on a machine that has other things to do, Ray's own half minute may not do
    "RAY_raylet_start_wait_time_s": "300",
}

KEPT_CACHES = {
    "MPLCONFIGDIR": "matplotlib", "HYPOTHESIS_STORAGE_DIRECTORY": "hypothesis", "TORCHINDUCTOR_CACHE_DIR": "inductor"
}  # fmt: skip


def clean_environment(environ: MutableMapping[str, str], home: Path) -> None:
    """Drop every variable that is not kept, and state the rest; caches of libraries go below `home`."""
    for name in [n for n in environ if n not in KEPT and not n.startswith(KEPT_PREFIXES)]:
        del environ[name]
    if "PYTHONPATH" in environ:  # other working directories follow
        environ["PYTHONPATH"] = os.pathsep.join(map(os.path.abspath, environ["PYTHONPATH"].split(os.pathsep)))
    environ.setdefault("OMP_NUM_THREADS", "1")
    environ.update(STATED, HOME=str(home))
    # kept from run to run, beside pytest's own cache: the machine's fonts, constants of our sources, and compiled kernels
    for name, directory in KEPT_CACHES.items():
        environ[name] = str(ROOT / ".pytest_cache" / directory)
