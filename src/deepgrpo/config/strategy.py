"""Common parts of the strategies' sections: their bases, segments, recoverability."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from deepgrpo.config.base import PathText, Section


class Explore(Section):
    """Base of the strategies' sections."""

    implementation: ClassVar[str]
    """module:Class of the strategy, imported only when a recipe uses it."""

    needs_epochs: ClassVar[bool] = False
    """True if the strategy branches only at prompts that it has seen before."""

    in_episodes: ClassVar[bool] = True
    """False if the strategy cannot explore episodes of several turns, with an environment."""

    type: str

    @property
    def most_asked_tokens(self) -> int:
        """Most tokens sampled about a rollout, besides itself and its branches."""
        return 0

    def _refuse_scale(self, recipe: Any) -> None:
        if recipe.credit.scale != "none":
            raise ValueError(
                f'credit.scale is "{recipe.credit.scale}", but explore.type = "{self.type}" takes differences of values along '
                'a tree and has no group to scale by; set credit.scale = "none"'
            )

    def _refuse_parts(self, recipe: Any) -> None:
        if recipe.credit.scale == "part_std":
            raise ValueError(
                f'credit.scale is "part_std", but explore.type = "{self.type}" compares values along a tree and not the '
                'rewards of siblings, which have parts; set credit.scale = "none" or "std"'
            )

    def _refuse_overlap(self, recipe: Any) -> None:
        if recipe.cluster and recipe.cluster.overlap:
            raise ValueError(
                f'cluster.overlap is on, but explore.type = "{self.type}" asks the policy about its rollouts while they '
                "grow, and the policy changes meanwhile; set cluster.overlap = false"
            )


class SegmentConfig(Section):
    """Rule that cuts a rollout into segments; pivots lie at segment ends."""

    type: Literal["sentence", "period", "tokens", "count", "step", "turn", "user"] = "sentence"
    """sentence: ends of sentences and lines. period: bare "." tokens (the reference). tokens: every `size` tokens.
    count: `size` equal parts. step: steps separated by blank lines. turn: turns of an episode, for a recipe with [env]. user:
    your `function`. In an episode, each turn of the model is cut by itself, and the environment's reply belongs to its end."""
    size: PositiveInt = 50
    """For tokens: tokens per segment. For count: number of segments."""
    extra_ends: tuple[str, ...] = ()
    """For sentence: additional characters that end a segment, e.g. [";"]."""
    function: PathText | None = None
    """For user: "path/to/file.py:name" or "package.module:name" of `def ends(texts: Sequence[str]) -> list[int]`, from the
    texts of a rollout's tokens to the ascending ends of its segments (docs/algorithms/your_own.md)."""

    @model_validator(mode="after")
    def _function_belongs_to_user(self) -> SegmentConfig:
        if self.type == "user" and self.function is None:
            raise ValueError(
                'segments.type is "user", but segments.function is missing; name your function, e.g. '
                'function = "mine.py:ends", or choose another type'
            )
        if self.type != "user" and self.function is not None:
            raise ValueError(
                f'segments.function is {self.function!r}, but segments.type is "{self.type}"; set segments.type = "user" or '
                "remove segments.function"
            )
        return self


class PivotExplore(Explore):
    """Base of strategies that draw pivots among segment ends: candidates and budget."""

    num_rollouts: Annotated[int, Field(ge=2)] = 8
    """Main rollouts per prompt, G."""
    num_pivots: Annotated[int, Field(ge=0)] = 1
    """Pivots per expanded rollout (p), drawn without replacement; 0 is GRPO."""
    branches_per_pivot: PositiveInt = 8
    """Continuations sampled at a pivot (b = K)."""
    expand: Literal["failed", "all", "unsolved"] = "failed"
    """Rollouts that get pivots: failed ones, all, or those of prompts without any success."""
    success_threshold: float = 0.0
    """A reward above this is a success."""
    root_pivot: bool = True
    """Allow the prompt itself as a pivot."""
    max_ratio: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Deepest pivot, as a depth ratio r; below 1 it leaves out the states behind the last steps."""
    segments: SegmentConfig = SegmentConfig()

    @property
    def most_branches(self) -> int:
        """Most branches per rollout."""
        return self.num_pivots * self.branches_per_pivot

    @model_validator(mode="after")
    def _siblings(self) -> PivotExplore:
        if self.num_pivots and self.branches_per_pivot < 2:
            raise ValueError(
                "explore.branches_per_pivot is 1, but a local baseline needs at least 2; set it to 2 or more, "
                'or choose explore.type = "root"'
            )
        return self


class RecoverabilityConfig(Section):
    """P(success | depth), estimated between steps."""

    model: Literal["logistic", "bins", "uniform"] = "logistic"
    """logistic: a logistic regression. bins: the share of rescued pivots in each of `bins` equal bins of r, (s + 1) / (n + 2).
    uniform: P = 1 at every depth."""
    bins: PositiveInt = 10
    """For bins: number of bins."""
    window: PositiveInt = 10_000
    """Latest pivots kept for the fit (first in, first out)."""
    min_items: PositiveInt = 10
    """The estimate needs more items than this, and both outcomes; until then P = 1."""
    l2: PositiveFloat = 1.0
    """C of scikit-learn's LogisticRegression: the inverse of the L2 penalty on w."""
