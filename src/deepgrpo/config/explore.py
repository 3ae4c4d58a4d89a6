"""Section `explore`: one model per strategy, each with the class that implements it."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from deepgrpo.config.base import PathText
from deepgrpo.config.data import GeneratedData
from deepgrpo.config.looking import BeliefExplore, LocatedExplore, PrefixExplore
from deepgrpo.config.rivals import AttnRLExplore, FR3EExplore, SPOTreeExplore, TreeRLExplore
from deepgrpo.config.strategy import Explore, PivotExplore, RecoverabilityConfig, SegmentConfig


class RootExplore(Explore):
    """GRPO: every rollout starts at the prompt."""

    implementation = "deepgrpo.explore.root:RootStrategy"
    type: Literal["root"] = "root"
    num_rollouts: Annotated[int, Field(ge=2)] = 8
    """Rollouts per prompt, G."""

    success_threshold: float = 0.0
    """A reward above this is a success."""

    most_branches: ClassVar[int] = 0
    """Most branches per rollout."""


class AdaptiveExplore(Explore):
    """Reinforce-Ada: more rollouts from the prompt, in rounds, until its outcomes differ or its allowance is spent."""

    implementation = "deepgrpo.explore.adaptive:AdaptiveStrategy"
    type: Literal["adaptive"] = "adaptive"
    round_rollouts: Annotated[int, Field(ge=2)] = 8
    """Rollouts per prompt and round."""
    max_rollouts: Annotated[int, Field(ge=2)] = 32
    """Most rollouts per prompt."""
    min_successes: PositiveInt = 1
    """A prompt with at least this many successes and `min_failures` failures gets no further round."""
    min_failures: PositiveInt = 1
    """See `min_successes`."""
    keep_rollouts: Annotated[int, Field(ge=2)] | None = None
    """Train at most this many rollouts per prompt, half of them of either outcome where there are enough; the mean is that of
    all. None: train all."""
    success_threshold: float = 0.0
    """A reward above this is a success."""

    @property
    def num_rollouts(self) -> int:
        """Most rollouts per prompt."""
        return self.max_rollouts

    most_branches: ClassVar[int] = 0
    """Most branches per rollout."""

    @model_validator(mode="after")
    def _a_round_fits(self) -> AdaptiveExplore:
        if self.max_rollouts < self.round_rollouts:
            raise ValueError(
                f"explore.max_rollouts is {self.max_rollouts}, but a round has explore.round_rollouts = {self.round_rollouts}; "
                "raise the former or lower the latter"
            )
        return self


class DeepExplore(PivotExplore):
    """DEEP-GRPO: resample from a deep but recoverable pivot of every failed rollout."""

    implementation = "deepgrpo.explore.deep:DeepStrategy"
    type: Literal["deep"] = "deep"
    gamma: float = 2.0
    """Exponent of the depth bias: Q(r) ∝ P(success | r) · r^gamma. Strongly negative: the root only."""
    recoverability: RecoverabilityConfig = RecoverabilityConfig()


class RandomExplore(PivotExplore):
    """Control for `deep`: the same candidates, drawn uniformly in every failed rollout."""

    implementation = "deepgrpo.explore.random:RandomStrategy"
    type: Literal["random"] = "random"


class AllocateExplore(Explore):
    """One allowance of tokens: each prompt's next tokens go to the prompt or to a depth, as mixed groups per token suggest."""

    implementation = "deepgrpo.explore.allocate:AllocateStrategy"
    type: Literal["allocate"] = "allocate"
    num_rollouts: Annotated[int, Field(ge=2)] = 4
    """Rollouts of the first round, and of each further round at the prompt."""
    branches_per_pivot: Annotated[int, Field(ge=2)] = 4
    """Continuations sampled at a pivot, K."""
    max_rounds: Annotated[int, Field(ge=0)] = 3
    """Most rounds after the first."""
    root: bool = True
    """Allow further rollouts from the prompt."""
    depth_bins: Annotated[int, Field(ge=0)] = 4
    """Equal bins of the depth ratio, one option each; 0: only the prompt."""
    tokens_per_prompt: PositiveFloat | None = None
    """Sampled tokens per prompt that a step may cost on average; none: every prompt gets `max_rounds` rounds."""
    memory: Annotated[float, Field(gt=0, le=1)] = 0.9
    """Weight of the counts of earlier steps, per step."""
    success_threshold: float = 0.0
    """A reward above this is a success."""
    root_pivot: bool = False
    """Count the prompt itself among the states of the first depth bin."""
    segments: SegmentConfig = SegmentConfig()

    @property
    def most_branches(self) -> int:
        """Most branches per rollout."""
        return self.max_rounds * self.branches_per_pivot

    @model_validator(mode="after")
    def _has_options(self) -> AllocateExplore:
        if not self.root and not self.depth_bins:
            raise ValueError(
                "explore.root is false and explore.depth_bins is 0, so there is nowhere to sample after the first round; set "
                'one of them, or choose explore.type = "root"'
            )
        return self


class OracleExplore(Explore):
    """Upper bound for the choice of pivots: just before the first error of every failed rollout (synthetic tasks only)."""

    implementation = "deepgrpo.explore.oracle:OracleStrategy"
    type: Literal["oracle"] = "oracle"
    num_rollouts: Annotated[int, Field(ge=2)] = 8
    """Main rollouts per prompt, G."""
    branches_per_pivot: Annotated[int, Field(ge=2)] = 8
    """Continuations sampled at a pivot, K."""
    success_threshold: float = 0.0
    """A reward above this is a success."""

    @property
    def most_branches(self) -> int:
        """Most branches per rollout."""
        return self.branches_per_pivot

    def check(self, recipe: Any) -> None:
        if not isinstance(recipe.data, GeneratedData):
            raise ValueError(
                f'explore.type is "oracle", but data.type is "{recipe.data.type}": only the synthetic tasks can tell where the '
                'first error of a rollout is; set data.type = "synthetic" or choose explore.type = "deep"'
            )


class UserExplore(Explore):
    """Your own strategy, from a file or an installed module (docs/algorithms/your_own.md)."""

    implementation = "deepgrpo.explore.user:UserStrategy"
    type: Literal["user"] = "user"
    strategy: PathText
    """The class: "path/to/file.py:Name" or "package.module:Name". `deepgrpo doctor --strategy` tests it."""
    num_rollouts: PositiveInt = 8
    """Rollouts per prompt."""
    most_branches: Annotated[int, Field(ge=0)] = 8
    """Most branches per rollout. The budget num_rollouts · (1 + most_branches) is enforced, segments excluded."""
    success_threshold: float = 0.0
    """A reward above this is a success."""
    segments: SegmentConfig = SegmentConfig()
    options: dict[str, Any] = {}
    """Your own keys, e.g. { stride = 8 }; the strategy reads `config.options`."""


ExploreConfig = Annotated[
    RootExplore | AdaptiveExplore | AllocateExplore | DeepExplore | RandomExplore | BeliefExplore | LocatedExplore
    | PrefixExplore | TreeRLExplore | FR3EExplore | SPOTreeExplore | AttnRLExplore | OracleExplore | UserExplore,
    Field(discriminator="type"),
]  # fmt: skip
"""Registry of strategies: `type` chooses the section, and the section names its implementation."""
