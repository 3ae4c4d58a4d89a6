"""Machine and versions behind a measured figure."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

from deepgrpo.threads import available_cpus


def machine_and_versions() -> dict[str, Any]:
    """Processor, cores, load and versions, as plain JSON."""
    import torch
    import transformers

    return {
        "machine": {"processor": _processor(), "cores": available_cpus(), "load": os.getloadavg()[0]},
        "versions": {
            "python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__
        },
    }  # fmt: skip


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor())
