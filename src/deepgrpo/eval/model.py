"""Models by name: a run, a checkpoint, a model directory or a hub name → weights and the run's recipe."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from deepgrpo.config import Config, PretrainedModel
from deepgrpo.errors import ModelError
from deepgrpo.runs.checkpoints import model_in, newest_checkpoint
from deepgrpo.runs.layout import RunDir, run_around
from deepgrpo.runs.moved import load_run_recipe
from deepgrpo.runs.weights import check_weights

if TYPE_CHECKING:
    from deepgrpo.model.policy import Policy


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A model's location, and the recipe of the run it belongs to.

    Example: ModelSource(path="runs/a/checkpoints/step-000050/model", run=Config(...)).
    """

    path: str
    run: Config | None = None
    """None for a model outside a run."""


def find_model(model: str) -> ModelSource:
    """Resolve the name of a model.

    A run directory has a config.toml and checkpoints/step-*/model: it resolves to its newest checkpoint. A run, or a
    checkpoint inside one, brings the run's recipe. Any other name is returned unchanged.

    Raises ModelError: the run has no checkpoint, or a path does not exist; CheckpointError: the weights have changed since the
    run wrote them.
    """
    path = Path(model).expanduser()
    run = RunDir(path)
    if run.has_recipe():
        newest = newest_checkpoint(run)
        if newest is None:
            raise ModelError(
                f"the run {model!r} has no checkpoint yet (checkpoints/step-*/model); wait for its first one, "
                "or name a model directory"
            )
        check_weights(newest.model)
        return ModelSource(str(newest.model), load_run_recipe(run))
    directory = model_in(path) if model_in(path).is_dir() else path
    check_weights(directory)
    if (around := run_around(path)) is not None:
        return ModelSource(str(directory), load_run_recipe(around))
    if path.is_dir():
        return ModelSource(str(directory))
    if model.startswith(("/", "./", "../", "~")):
        raise ModelError(f"the model directory {model!r} does not exist; check the path")
    return ModelSource(model)


def model_section(source: ModelSource) -> PretrainedModel:
    """Section `model` that loads a source: the run's settings (attention, remote code, ...) with a checkpoint's weights.

    Adapters keep the run's section unchanged, because their base model is loaded first.

    Raises ModelError for adapters without the run that names their base model.
    """
    path = Path(source.path)
    own = source.run.model if source.run is not None and isinstance(source.run.model, PretrainedModel) else None
    if _holds_adapters(path):
        if own is None:
            raise ModelError(
                f"{source.path!r} holds adapters (LoRA) without the run that they come from, whose config.toml names "
                "their base model; name the run's directory or a checkpoint in it (runs/NAME or "
                "runs/NAME/checkpoints/step-...)"
            )
        return own
    # a checkpoint holds plain weights and its own tokenizer
    plain = {"path": source.path, "gguf_file": None, "tokenizer": None, "lora": None}
    return PretrainedModel(path=source.path) if own is None else own.model_copy(update=plain)


def load_model(source: ModelSource, device: str, dtype: str) -> Policy:
    """Load the result of `find_model`; dtype "auto" is the run's, or float32 without a run."""
    from deepgrpo.model.loading import load_policy

    if dtype == "auto":
        dtype = source.run.learner.dtype if source.run is not None else "float32"
    policy = load_policy(model_section(source), device=device, dtype=dtype)
    if _holds_adapters(Path(source.path)):
        policy.load_weights(Path(source.path))
    return policy


def _holds_adapters(path: Path) -> bool:
    return (path / "adapter_config.json").is_file() and not (path / "config.json").is_file()
