"""A model directory: what is missing from it, in a sentence. transformers would guess: without config.json it builds a model
of 6.7 billion random weights.
"""

from __future__ import annotations

import json
from pathlib import Path

from deepgrpo.errors import ModelError
from deepgrpo.runs.checkpoints import newest_checkpoint
from deepgrpo.runs.layout import RunDir


def require_config(directory: Path, said: str) -> None:
    """Raise ModelError if a directory has no config.json.

    Args:
        said: the key and its value, for the message, e.g. "model.path = 'x'".
    """
    if (directory / "config.json").is_file():
        return
    inside = [path.parent.name for path in sorted(directory.glob("*/config.json"))]
    if RunDir(directory).checkpoints.is_dir():
        newest = newest_checkpoint(RunDir(directory))
        advice = f"it is a run; did you mean {str(newest.model)!r}?" if newest else "it is a run without a checkpoint"
    elif inside:  # a checkpoint holds its model one level deeper
        advice = f"did you mean {str(directory / inside[0])!r}?"
    elif (directory / "adapter_config.json").is_file():
        advice = "it holds adapters (LoRA) alone; name the model that they were trained on, or merge them into it"
    elif any(directory.glob("*.gguf")):
        advice = "it holds GGUF weights; name the file with model.gguf_file"
    elif any(directory.iterdir()):
        advice = "name a directory in the Hugging Face layout, or copy the config.json that belongs to its weights there"
    else:
        advice = "it is empty; name a directory in the Hugging Face layout"
    raise ModelError(f"{said} has no config.json: {advice}")


def require_weights(directory: Path, said: str) -> None:
    """Raise ModelError if a directory has no weights, or lacks files that the index of its weights names."""
    for index in directory.glob("*.index.json"):
        try:
            named = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, AttributeError, TypeError):
            raise ModelError(f"{said} has an index of weights that cannot be read ({index.name}); copy it again") from None
        missing = sorted(name for name in named if not (directory / str(name)).is_file())
        if missing:
            raise ModelError(
                f"{said} lacks {len(missing)} of its {len(named)} files of weights ({', '.join(map(str, missing[:3]))}); "
                "copy or download them again"
            )
    if not any(path.suffix in (".safetensors", ".bin", ".pt", ".pth") for path in directory.iterdir()):
        hint = "; model.gguf_file names GGUF weights" if any(directory.glob("*.gguf")) else ""
        raise ModelError(f"{said} has a config.json and no weights (*.safetensors); copy them there{hint}")
