"""Keys of a curriculum: how often each prompt is drawn, by how often it was solved so far."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from deepgrpo.config.base import DecayRate, Section

Sampling = Literal["uniform", "difficulty", "frontier"]
"""Values of `data.sampling`."""


class CurriculumConfig(Section):
    """Memory of how often each prompt was solved (docs/curriculum.md)."""

    prior_rate: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Success rate of a prompt before its first try."""
    prior_tries: PositiveFloat = 2.0
    """Weight of `prior_rate`, in tries."""
    memory: DecayRate = 0.5
    """Factor on a prompt's earlier tries each time it is drawn again; 0: its latest tries alone."""
    rest_tries: PositiveInt = 8
    """A prompt that was solved in at least this many tries in a row rests."""
    rest_steps: PositiveInt = 50
    """Steps of a rest. After it the prompt is as likely as one that was never drawn, until it is drawn again."""
    window: PositiveInt = 100_000
    """Prompts remembered at most; the one that was not drawn for the longest time is forgotten."""


def sampling_of(data: Any) -> Sampling:
    """`data.sampling`; a mix draws its sources by weight, and their prompts in turn."""
    found: Sampling = getattr(data, "sampling", "uniform")
    return found


def check_mix(data: Any, recipe: Any) -> None:
    """Refuse a curriculum of a mix's source, and passes over a mix. Raises ValueError."""
    for each in data.sources:
        if each.data.sampling != "uniform":
            raise ValueError(
                f'data.sources has the source {each.label!r} with sampling = "{each.data.sampling}", but a curriculum draws '
                "from one data set; remove the key, or train on that source alone"
            )
    if recipe.run.epochs is not None:
        raise ValueError(
            f'run.epochs is {recipe.run.epochs}, but data.type = "mix" has no passes: its sources end at different times; end '
            "the run by run.steps"
        )


def check_curriculum(data: Any, recipe: Any) -> None:
    """Check `data.sampling` against the other sections. Raises ValueError.

    Args:
        data: the section `data`.
        recipe: the whole `Config`.
    """
    endless = data.type in ("synthetic", "search") and data.size is None and data.limit is None
    key = f'data.sampling is "{data.sampling}"'
    if data.sampling != "uniform" and endless:
        raise ValueError(
            f'{key}, but data.type = "{data.type}" without data.size has endless questions, none of which comes twice; set '
            'data.size, or data.sampling = "uniform"'
        )
    if data.sampling != "uniform" and getattr(data, "streaming", False):
        raise ValueError(
            f"{key}, but data.streaming reads rows when their turn comes, and remembers none; set data.streaming = false, or "
            'data.sampling = "uniform"'
        )
    if data.sampling == "uniform" and data.curriculum != CurriculumConfig():
        raise ValueError(
            '[data.curriculum] is set, but data.sampling is "uniform", which remembers nothing; set data.sampling = '
            '"frontier" or "difficulty", or remove the table'
        )
    if recipe.run.epochs is not None and endless:
        raise ValueError(
            f'run.epochs is {recipe.run.epochs}, but data.type = "{data.type}" without data.size has endless questions; set '
            "data.size, or end the run by run.steps"
        )
