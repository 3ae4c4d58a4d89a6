"""`deepgrpo export`: a checkpoint of a run in, a model directory with its card out, and perhaps up to the hub.

    options ─► checkpoint, checksums ─► weights (weights.py) ─► recipe.toml, README.md (card.py) ─► directory ─► hub (push.py)

The directory is written aside and renamed: it is whole or it is not there.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from safetensors import SafetensorError

from deepgrpo.errors import CheckpointError, ConfigError
from deepgrpo.export.card import CardFacts, model_card
from deepgrpo.export.options import ExportOptions
from deepgrpo.export.weights import WrittenModel, write_model
from deepgrpo.runs.checkpoints import Checkpoint, saved_checkpoints
from deepgrpo.runs.files import WRITING, delete_tree, remedy
from deepgrpo.runs.layout import RunDir
from deepgrpo.runs.moved import load_run_recipe
from deepgrpo.runs.saved import SavedRun
from deepgrpo.visible import visible

RECIPE, CARD = "recipe.toml", "README.md"


def run_export(options: ExportOptions) -> int:
    """Run the command and return its exit code, 0.

    Raises:
        ConfigError: options that do not fit the run, a directory that exists, no token.
        CheckpointError: there is no such checkpoint, or it is damaged.
        ModelError: the base model cannot be loaded.
        HubError: the hub refuses the upload.
    """
    saved = SavedRun(options.run)
    config = load_run_recipe(saved.paths)
    checkpoint = choose_checkpoint(saved.paths, options.checkpoint)
    target = options.to or saved.paths.export
    _refuse_used(target, overwrite=options.overwrite)
    if options.push is not None:
        from deepgrpo.export.push import check_target

        check_target(options.push)
    state = checkpoint.verify()
    aside = target.with_name(f"{WRITING}{target.name}")
    try:
        delete_tree(aside)
        aside.mkdir(parents=True)
        written = write_model(config, checkpoint.model, aside, dtype=options.dtype, merge=options.merge)
        shutil.copyfile(saved.paths.config, aside / RECIPE)
        card = model_card(saved, config, CardFacts(checkpoint.step, state.ledger, written, options.push))
        (aside / CARD).write_text(card, encoding="utf-8")
        delete_tree(target)
        aside.rename(target)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{target} cannot be written: {error}; {remedy(error)}, or choose another with --to DIR") from error
    finally:
        delete_tree(aside)
    print(visible(f"{target}: {describe(written)}, of step {checkpoint.step}"))
    if options.push is not None:
        from deepgrpo.export.push import push

        print(visible(push(target, options.push, public=options.public, message=f"Step {checkpoint.step} of {saved.name}")))
    return 0


def _refuse_used(target: Path, *, overwrite: bool) -> None:
    """Raise ConfigError if a directory exists and may not be replaced."""
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not overwrite:
        raise ConfigError(f"--to {str(target)!r} exists; choose another with --to DIR, or replace it with --overwrite")
    if not (target / RECIPE).is_file() or not (target / CARD).is_file():
        raise ConfigError(
            f"--to {str(target)!r} is no export, which is all that --overwrite replaces; choose another with --to DIR"
        )


def describe(written: WrittenModel) -> str:
    """The weights in a phrase. Example: "LoRA adapters in float32, 8.1 MB"."""
    return f"{written.kind} in {written.dtype}, {written.size / 1e6:,.1f} MB"


def choose_checkpoint(run: RunDir, wanted: str) -> Checkpoint:
    """The newest checkpoint of a run, its best one, or that of a step. Raises CheckpointError if there is none."""
    saved = saved_checkpoints(run)
    if not saved:
        raise CheckpointError(f"{run.path} has no checkpoint yet; wait for its first one")
    newest = saved[-1]
    if wanted == "newest":
        return newest
    steps = ", ".join(str(each.step) for each in saved)
    if wanted == "best":
        best = newest.read_state().best_step
        if best is None:
            raise CheckpointError(
                f"--checkpoint best: {run.path} has no evaluation after its first step, so none is best; "
                f"name newest or a step: {steps}"
            )
        wanted = str(best)
    found = next((each for each in saved if str(each.step) == wanted), None)
    if found is None:
        raise CheckpointError(f"--checkpoint {wanted}: {run.path} has no checkpoint of that step; name newest, best or {steps}")
    return found

