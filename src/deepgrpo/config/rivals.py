"""Sections of `explore` for published rivals of DEEP-GRPO: TreeRL, FR3E, SPO-tree, AttnRL."""

from __future__ import annotations

import math
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, PositiveInt, model_validator

from deepgrpo.config.strategy import Explore, SegmentConfig


class TreeRLExplore(Explore):
    """TreeRL: every rollout is the trunk of a tree that branches before its most surprising tokens (EPTree)."""

    implementation = "deepgrpo.explore.treerl:TreeRLStrategy"
    type: Literal["treerl"] = "treerl"
    num_rollouts: Annotated[int, Field(ge=2)] = 6
    """Rollouts per prompt (M), each the trunk of its own tree."""
    num_pivots: PositiveInt = 2
    """Tokens per tree and round before which it branches (N)."""
    num_rounds: PositiveInt = 1
    """Rounds of branching (L)."""
    branches_per_pivot: PositiveInt = 2
    """Continuations sampled before such a token (T)."""
    mask_after: tuple[str, ...] = ("answer", "conclusion")
    """Never branch after a token whose text contains one of these, ignoring case."""
    skip_first: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Never branch in this share of a response's tokens at its beginning (a later port: 0.05)."""
    skip_last: Annotated[int, Field(ge=0)] = 0
    """Never branch before one of this many tokens at a response's end (a later port: 10)."""
    keep_leaves: PositiveInt | None = None
    """Train the paths to this many responses only, drawn at random with at least one success if there is any (the released
    code: 16 of 30); none: train all."""
    leaf_values: Literal["reward", "leave_one_out"] = "reward"
    """Value of a response in V. leave_one_out: its reward minus the mean of all others' (the released code)."""
    token_mean: Literal["keep", "remove"] = "keep"
    """remove: shift values so that their mean over the tokens of all responses is zero (the released code)."""
    node_values: Literal["mean", "sum"] = "mean"
    """mean: V is a mean, and the advantage is divided by sqrt(responses below). sum: a sum divided by that root, before any
    difference is taken (the released code); needs values that are centred by one of the two keys above."""
    zero_local: Literal["keep", "copy"] = "keep"
    """copy: where V equals the parent's, replace the zero by the parent's own change of value (the released code)."""
    success_threshold: float = 0.0
    """A reward above this is a success."""

    @property
    def most_branches(self) -> int:
        """Most branches per rollout."""
        return self.num_rounds * self.num_pivots * self.branches_per_pivot

    def check(self, recipe: Any) -> None:
        self._refuse_scale(recipe)

    @model_validator(mode="after")
    def _sums_are_of_centred_values(self) -> TreeRLExplore:
        if self.node_values == "sum" and self.leaf_values == "reward" and self.token_mean == "keep":
            raise ValueError(
                'explore.node_values is "sum", but explore.leaf_values is "reward" and explore.token_mean is "keep": a sum of '
                "values that are not centred grows with the number of responses, so a prefix would seem better than its parts; "
                'set explore.leaf_values = "leave_one_out" or explore.token_mean = "remove", or explore.node_values = "mean"'
            )
        return self


class FR3EExplore(Explore):
    """FR3E: fresh rollouts from the prompt and from the least likely tokens of a rollout that succeeded and one that failed."""

    implementation = "deepgrpo.explore.fr3e:FR3EStrategy"
    type: Literal["fr3e"] = "fr3e"
    num_bases: PositiveInt = 4
    """Base rollouts per prompt. They are analysed and billed, not trained."""
    num_anchors: PositiveInt = 4
    """Anchors per base: its tokens of lowest probability, before which new rollouts start."""
    rollouts_per_state: Annotated[int, Field(ge=2)] = 16
    """Rollouts from the prompt and from each anchor of a base, n."""
    values: Literal["success", "positive_advantage"] = "success"
    """V of a state: the share of its rollouts that succeed, or that have a positive advantage (the released code); the two
    differ where all succeed."""
    sharpen: bool = False
    """Replace ΔV by sign(ΔV) · |ΔV|^1.5 / Σ |ΔV|^1.5, the sum over the states of a base (a switch of the released code)."""
    success_threshold: float = 0.0
    """A reward above this is a success."""

    @property
    def most_bases(self) -> int:
        """Most bases that are expanded: one that succeeded and one that failed."""
        return min(2, self.num_bases)

    @property
    def num_rollouts(self) -> int:
        """Most rollouts from the prompt: the bases, and those of each expanded base."""
        return self.num_bases + self.most_bases * self.rollouts_per_state

    @property
    def most_branches(self) -> int:
        """Most branches per rollout from the prompt, rounded up: they are shared among all of these."""
        return math.ceil(self.most_bases * self.num_anchors * self.rollouts_per_state / self.num_rollouts)


class SPOTreeExplore(Explore):
    """SPO-tree: a uniform tree of short segments, each credited with the change of value along it."""

    implementation = "deepgrpo.explore.spo_tree:SPOTreeStrategy"
    in_episodes = False
    type: Literal["spo_tree"] = "spo_tree"
    branching: Annotated[tuple[Annotated[int, Field(ge=2)], ...], Field(min_length=1)] = (6, 6, 6)
    """Continuations per state, one number per level; those of the last level run to their end."""
    segment_tokens: PositiveInt = 100
    """Tokens per segment (M), on every level but the last."""
    advantage: Literal["parent", "siblings"] = "parent"
    """parent: V(child) - V(parent), V the mean reward of the responses below. siblings: V(child) minus the mean of its
    siblings', V bottom up as the mean of the children (TreeRPO)."""
    success_threshold: float = 0.0
    """A reward above this is a success."""

    @property
    def num_rollouts(self) -> int:
        """Most responses per prompt."""
        return math.prod(self.branching)

    most_branches: ClassVar[int] = 0
    """None: all responses belong to one stream."""

    def check(self, recipe: Any) -> None:
        longest = recipe.sampling.max_new_tokens
        if (len(self.branching) - 1) * self.segment_tokens >= longest:
            raise ValueError(
                f"explore.branching has {len(self.branching)} levels with explore.segment_tokens = {self.segment_tokens}, but "
                f"a response has at most sampling.max_new_tokens = {longest} tokens, so the last level would begin at or "
                "behind its end; take shorter segments or fewer levels, or raise sampling.max_new_tokens"
            )
        if self.advantage == "parent":
            self._refuse_scale(recipe)
        self._refuse_parts(recipe)


class AttnRLExplore(Explore):
    """AttnRL: branch at the earliest steps that the rest of a rollout keeps attending to."""

    implementation = "deepgrpo.explore.attnrl:AttnRLStrategy"
    type: Literal["attnrl"] = "attnrl"
    num_rollouts: Annotated[int, Field(ge=2)] = 6
    """Rollouts per prompt, M; the higher the share of successes, the fewer are expanded."""
    num_pivots: PositiveInt = 2
    """Pivots per expanded rollout, N."""
    branches_per_pivot: PositiveInt = 2
    """Continuations sampled at a pivot, T."""
    top_share: Annotated[float, Field(gt=0, le=1)] = 0.2
    """Share of a rollout's steps, by influence, among which the earliest become pivots."""
    lag: PositiveInt = 4
    """Count only the attention of steps at least this many after a step in its influence."""
    spacing: Annotated[int, Field(ge=0)] = 0
    """Fewest tokens between two pivots of a rollout, and between the prompt and the first (the released code: 512)."""
    success_threshold: float = 0.0
    """A reward above this is a success."""
    segments: SegmentConfig = SegmentConfig(type="step")

    @property
    def most_branches(self) -> int:
        """Most branches per rollout."""
        return self.num_pivots * self.branches_per_pivot

    def check(self, recipe: Any) -> None:
        self._refuse_scale(recipe)
        self._refuse_overlap(recipe)
