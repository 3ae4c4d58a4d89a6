"""Options of `deepgrpo export`, without heavy imports, so that `--help` is fast."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro


@dataclass(frozen=True)
class ExportOptions:
    """Write the weights of a run as a model in the Hugging Face layout, with a model card; or upload it to the hub."""

    run: Annotated[Path, tyro.conf.Positional]
    """Run directory, such as runs/demo."""
    checkpoint: str = "newest"
    """newest, best (by greedy accuracy on eval.data), or the step of a checkpoint."""
    merge: bool = False
    """Merge adapters (model.lora) into their base model. Default: write the adapters alone, in peft's layout."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """dtype of the weights. auto: that in which the base model came; for adapters alone float32, in which they were trained."""
    to: Path | None = None
    """Directory to write. Default: RUN/export."""
    overwrite: bool = False
    """Replace the directory if it holds an earlier export."""
    push: Annotated[str | None, tyro.conf.arg(metavar="OWNER/NAME")] = None
    """Also upload to this repository of the hub, which is made (private) if it does not exist. Needs a token: `hf auth login`,
    or HF_TOKEN."""
    public: bool = False
    """With --push: make a new repository public."""
