"""Commands that continue a run, or calls where its recipe names objects of a Python program."""

from __future__ import annotations

from deepgrpo.config import Config, given_keywords, load_recipe
from deepgrpo.errors import DeepGRPOError
from deepgrpo.runs.layout import RunDir, shown


def resume_command(run: RunDir, step: int | None = None, recipe: Config | None = None) -> str:
    """The command or call that continues a run.

    Args:
        step: the checkpoint to continue from; default: the newest.
        recipe: of the run; default: its config.toml.

    Returns e.g. `deepgrpo train --resume runs/demo --step 20`.
    """
    try:
        given = given_keywords(recipe or load_recipe(run.config))
    except (DeepGRPOError, OSError):  # the refusal is about something else
        given = []
    at = shown(run.path)
    if not given:
        return f"deepgrpo train --resume {at}" + ("" if step is None else f" --step {step}")
    objects = ", ".join(f"{each}=..." for each in given)
    return f'deepgrpo.train(resume="{at}", {objects}{"" if step is None else f", step={step}"}), with the same objects'
