"""Section `explore`: one model per strategy."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from deepgrpo.config.base import Section


class SegmentConfig(Section):
    """How a rollout is cut into segments; pivots lie at their ends."""

    type: Literal["sentence", "period", "tokens", "count", "step"] = "sentence"
    """sentence: ends of sentences and lines. period: bare "." tokens (the reference). tokens: every `size` tokens.
    count: `size` equal parts. step: steps set apart by blank lines."""
    size: PositiveInt = 50
    """For tokens: tokens per segment. For count: number of segments."""
    extra_ends: tuple[str, ...] = ()
    """For sentence: further characters that end a segment, e.g. [";"]."""


class RootExplore(Section):
    """GRPO: every rollout starts at the prompt."""

    type: Literal["root"] = "root"
    num_rollouts: Annotated[int, Field(ge=2)] = 8
    """Rollouts per prompt, G."""

    @property
    def most_branches(self) -> int:
        """Branches of a rollout, at most."""
        return 0

    @property
    def success_threshold(self) -> float:
        """A reward above this is a success."""
        return 0.0


class RecoverabilityConfig(Section):
    """P(success | depth), a logistic regression that is fitted between the steps."""

    model: Literal["logistic", "uniform"] = "logistic"
    """uniform: P = 1 at every depth."""
    window: PositiveInt = 10_000
    """Latest pivots kept for the fit (first in, first out)."""
    min_items: PositiveInt = 10
    """The fit needs more items than this, and both outcomes; before that P = 1."""
    l2: PositiveFloat = 1.0
    """C of scikit-learn's LogisticRegression: the inverse of the L2 penalty on w."""


class DeepExplore(Section):
    """DEEP-GRPO: resample from a deep but recoverable pivot of every failed rollout."""

    type: Literal["deep"] = "deep"
    num_rollouts: Annotated[int, Field(ge=2)] = 8
    """Main rollouts per prompt, G."""
    num_pivots: Annotated[int, Field(ge=0)] = 1
    """Pivots per expanded rollout (p), drawn without replacement; 0 is GRPO."""
    branches_per_pivot: PositiveInt = 8
    """Continuations sampled at a pivot (b = K)."""
    gamma: float = 2.0
    """Exponent of the depth bias: Q(r) ∝ P(success | r) · r^gamma. Strongly negative: the root only."""
    expand: Literal["failed", "all"] = "failed"
    """Which rollouts get pivots."""
    success_threshold: float = 0.0
    """A reward above this is a success."""
    root_pivot: bool = True
    """Whether the prompt itself may be drawn as a pivot."""
    segments: SegmentConfig = SegmentConfig()
    recoverability: RecoverabilityConfig = RecoverabilityConfig()

    @property
    def most_branches(self) -> int:
        """Branches of a rollout, at most."""
        return self.num_pivots * self.branches_per_pivot

    @model_validator(mode="after")
    def _siblings(self) -> DeepExplore:
        if self.num_pivots and self.branches_per_pivot < 2:
            raise ValueError(
                "explore.branches_per_pivot is 1, but a local baseline needs at least 2; set it to 2 or more, "
                'or choose explore.type = "root"'
            )
        return self


class RandomExplore(Section):
    """The control of `deep`: the same candidates, one drawn uniformly in every failed rollout."""

    type: Literal["random"] = "random"
    num_rollouts: Annotated[int, Field(ge=2)] = 8
    """Main rollouts per prompt, G."""
    num_pivots: Annotated[int, Field(ge=0)] = 1
    """Pivots per expanded rollout (p), drawn without replacement; 0 is GRPO."""
    branches_per_pivot: PositiveInt = 8
    """Continuations sampled at a pivot (b = K)."""
    expand: Literal["failed", "all"] = "failed"
    """Which rollouts get pivots."""
    success_threshold: float = 0.0
    """A reward above this is a success."""
    root_pivot: bool = True
    """Whether the prompt itself may be drawn as a pivot."""
    segments: SegmentConfig = SegmentConfig()

    @property
    def most_branches(self) -> int:
        """Branches of a rollout, at most."""
        return self.num_pivots * self.branches_per_pivot

    @model_validator(mode="after")
    def _siblings(self) -> RandomExplore:
        if self.num_pivots and self.branches_per_pivot < 2:
            raise ValueError(
                "explore.branches_per_pivot is 1, but a local baseline needs at least 2; set it to 2 or more, "
                'or choose explore.type = "root"'
            )
        return self


class TreeRLExplore(Section):
    """TreeRL: every rollout is the trunk of a tree that branches before its most surprising tokens (EPTree)."""

    type: Literal["treerl"] = "treerl"
    num_rollouts: Annotated[int, Field(ge=2)] = 6
    """Rollouts per prompt (M), each the trunk of a tree of its own."""
    num_pivots: PositiveInt = 2
    """Tokens of a tree before which it branches, per round (N)."""
    num_rounds: PositiveInt = 1
    """Rounds of branching (L)."""
    branches_per_pivot: PositiveInt = 2
    """Continuations sampled before such a token (T)."""
    mask_after: tuple[str, ...] = ("answer", "conclusion")
    """Never branch behind a token whose text contains one of these, in either case."""
    skip_first: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Never branch in this share of a response's tokens at its beginning (a later port: 0.05)."""
    skip_last: Annotated[int, Field(ge=0)] = 0
    """Never branch before one of this many tokens at a response's end (a later port: 10)."""
    keep_leaves: PositiveInt | None = None
    """Train the paths to this many responses only, drawn at random with at least one success if there is any (the released
    code: 16 of 30); absent: to all."""
    leaf_values: Literal["reward", "leave_one_out"] = "reward"
    """What a response counts in V. leave_one_out: its reward minus the mean of all others' (the released code)."""
    token_mean: Literal["keep", "remove"] = "keep"
    """remove: values are shifted so that their mean over the tokens of all responses is zero (the released code)."""
    node_values: Literal["mean", "sum"] = "mean"
    """mean: V is a mean, and the advantage is divided by sqrt(responses below). sum: a sum divided by that root, before any
    difference is taken (the released code); needs values that are centred by one of the two keys above."""
    zero_local: Literal["keep", "copy"] = "keep"
    """copy: where V is that of the parent, its own change of value is taken in place of the zero (the released code)."""
    success_threshold: float = 0.0
    """A reward above this is a success."""

    @property
    def most_branches(self) -> int:
        """Branches of a rollout, at most."""
        return self.num_rounds * self.num_pivots * self.branches_per_pivot

    @model_validator(mode="after")
    def _sums_are_of_centred_values(self) -> TreeRLExplore:
        if self.node_values == "sum" and self.leaf_values == "reward" and self.token_mean == "keep":
            raise ValueError(
                'explore.node_values is "sum", but explore.leaf_values is "reward" and explore.token_mean is "keep": a sum of '
                "values that are not centred grows with the number of responses, so a prefix would seem better than its parts; "
                'set explore.leaf_values = "leave_one_out" or explore.token_mean = "remove", or explore.node_values = "mean"'
            )
        return self


class FR3EExplore(Section):
    """FR3E: fresh rollouts from the prompt and from the least likely tokens of a rollout that succeeded and one that failed."""

    type: Literal["fr3e"] = "fr3e"
    num_bases: PositiveInt = 4
    """Base rollouts per prompt. They are looked at and billed, not trained."""
    num_anchors: PositiveInt = 4
    """Tokens of a base, those of lowest probability, before which rollouts start anew."""
    rollouts_per_state: Annotated[int, Field(ge=2)] = 16
    """Rollouts from the prompt and from each anchor of a base, n."""
    values: Literal["success", "positive_advantage"] = "success"
    """V of a state: the share of its rollouts that succeed, or that have a positive advantage (the released code); these
    differ where all succeed."""
    sharpen: bool = False
    """Take sign(ΔV) · |ΔV|^1.5 / Σ |ΔV|^1.5 in place of ΔV, the sum over the states of a base (a switch of the released
    code)."""
    success_threshold: float = 0.0
    """A reward above this is a success."""

    @property
    def most_bases(self) -> int:
        """Bases that are expanded, at most: one that succeeded and one that failed."""
        return min(2, self.num_bases)

    @property
    def num_rollouts(self) -> int:
        """Rollouts from the prompt, at most: the bases, and those of each expanded base."""
        return self.num_bases + self.most_bases * self.rollouts_per_state

    @property
    def most_branches(self) -> int:
        """Branches of a rollout from the prompt, at most, rounded up: they are shared out among all of these."""
        return math.ceil(self.most_bases * self.num_anchors * self.rollouts_per_state / self.num_rollouts)


class SPOTreeExplore(Section):
    """SPO-tree: a uniform tree of short segments, each credited with the change of value along it."""

    type: Literal["spo_tree"] = "spo_tree"
    branching: Annotated[tuple[Annotated[int, Field(ge=2)], ...], Field(min_length=1)] = (6, 6, 6)
    """Continuations per state, one number per level; those of the last level run to their end."""
    segment_tokens: PositiveInt = 100
    """Tokens of a segment (M), on every level but the last."""
    advantage: Literal["parent", "siblings"] = "parent"
    """parent: V(child) - V(parent), V the mean reward of the responses below. siblings: V(child) minus the mean of its
    siblings', V bottom up as the mean of the children (TreeRPO)."""
    success_threshold: float = 0.0
    """A reward above this is a success."""

    @property
    def num_rollouts(self) -> int:
        """Responses per prompt, at most."""
        return math.prod(self.branching)

    @property
    def most_branches(self) -> int:
        """Branches of a rollout, at most: all is one stream."""
        return 0


class AttnRLExplore(Section):
    """AttnRL: branch at the earliest steps that the rest of a rollout keeps looking back to."""

    type: Literal["attnrl"] = "attnrl"
    num_rollouts: Annotated[int, Field(ge=2)] = 6
    """Rollouts per prompt, M; the higher the share of successes, the fewer of them are expanded."""
    num_pivots: PositiveInt = 2
    """Pivots per expanded rollout, N."""
    branches_per_pivot: PositiveInt = 2
    """Continuations sampled at a pivot, T."""
    top_share: Annotated[float, Field(gt=0, le=1)] = 0.2
    """Share of a rollout's steps, by influence, among which the earliest become pivots."""
    lag: PositiveInt = 4
    """The influence of a step counts the attention of the steps from this many after it on."""
    spacing: Annotated[int, Field(ge=0)] = 0
    """Fewest tokens between two pivots of a rollout, and between the prompt and the first (the released code: 512)."""
    success_threshold: float = 0.0
    """A reward above this is a success."""
    segments: SegmentConfig = SegmentConfig(type="step")

    @property
    def most_branches(self) -> int:
        """Branches of a rollout, at most."""
        return self.num_pivots * self.branches_per_pivot


class OracleExplore(Section):
    """The pivot just before the first error of every failed rollout, an upper bound for choosing it (synthetic data only)."""

    type: Literal["oracle"] = "oracle"
    num_rollouts: Annotated[int, Field(ge=2)] = 8
    """Main rollouts per prompt, G."""
    branches_per_pivot: Annotated[int, Field(ge=2)] = 8
    """Continuations sampled at a pivot, K."""
    success_threshold: float = 0.0
    """A reward above this is a success."""

    @property
    def most_branches(self) -> int:
        """Branches of a rollout, at most."""
        return self.branches_per_pivot


ExploreConfig = Annotated[
    RootExplore | DeepExplore | RandomExplore | TreeRLExplore | FR3EExplore | SPOTreeExplore | AttnRLExplore | OracleExplore,
    Field(discriminator="type"),
]
