"""Sections of strategies that look before they branch: at what the policy believes, and at what has succeeded before."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from deepgrpo.config.data import GeneratedData
from deepgrpo.config.strategy import Explore, PivotExplore, SegmentConfig


class BeliefExplore(PivotExplore):
    """Pivots before the largest drop of the policy's probability of the reference answer."""

    implementation = "deepgrpo.explore.belief:BeliefStrategy"
    type: Literal["belief"] = "belief"
    cue: str = "\n#### "
    """Text written between a state and the reference answer; "#" for the synthetic tasks."""
    closing: str = ""
    """Text behind the answer that belongs to it, so that 1 is not the beginning of 12, e.g. "}" or "\\n"."""
    temperature: PositiveFloat = 0.05
    """Q ∝ exp(drop / temperature); the smaller, the surer is the largest drop chosen."""

    def check(self, recipe: Any) -> None:
        columns = getattr(recipe.data, "columns", None)
        if columns is not None and columns.answer is None:
            raise ValueError(
                'explore.type is "belief", but data.columns.answer is none: it measures the probability of the '
                'reference answer; name the column, or choose explore.type = "deep"'
            )
        self._refuse_overlap(recipe)


class PrefixExplore(Explore):
    """Prefixes of earlier successes of the same prompt, from the depth where outcomes differ."""

    implementation = "deepgrpo.explore.prefix:PrefixStrategy"
    needs_epochs = True
    type: Literal["prefix"] = "prefix"
    num_rollouts: Annotated[int, Field(ge=2)] = 8
    """Rollouts per prompt, G."""
    branches_per_pivot: Annotated[int, Field(ge=2)] = 8
    """Continuations of a prefix, K."""
    expand: Literal["unsolved", "failed", "all"] = "unsolved"
    """Prompts whose prefix is continued: those without any success in this step, those with a failed rollout, or all."""
    success_threshold: float = 0.0
    """A reward above this is a success."""
    per_prompt: PositiveInt = 1
    """Most successes stored per prompt; a newer one replaces the oldest."""
    store_tokens: PositiveInt = 1_000_000
    """Most tokens stored in all; the oldest successes leave first. A checkpoint needs some 6 bytes per token."""
    max_age: PositiveInt | None = None
    """Steps after which a stored success leaves; none: never. Prefixes are context and need not be recent."""
    segments: SegmentConfig = SegmentConfig()

    @property
    def most_branches(self) -> int:
        """Most branches per rollout."""
        return -(-self.branches_per_pivot // self.num_rollouts)

    def check(self, recipe: Any) -> None:
        data = recipe.data
        if isinstance(data, GeneratedData) and data.size is None and data.limit is None:
            raise ValueError(
                f'explore.type is "prefix", but data.type = "{data.type}" without data.size has questions without end, and '
                "none comes twice: no earlier success would ever be continued; set data.size so that the run passes over the "
                'questions several times, or choose explore.type = "deep"'
            )
