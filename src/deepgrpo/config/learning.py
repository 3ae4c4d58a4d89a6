"""Sections `credit`, `loss`, `optim` and `learner`."""

from __future__ import annotations

import difflib
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, PositiveFloat, PositiveInt, field_validator, model_validator

from deepgrpo.config.base import DecayRate, NonNegative, PathText, Section

POLICY_LOSSES = ("ppo", "cispo")
"""Values of `loss.policy`, the names in `loss/policy.py`."""


class CreditConfig(Section):
    """From rewards to advantages."""

    scale: Literal["none", "std", "mean", "part_std"] = "none"
    """none: reward minus the group's mean. std: also divided by the group's standard deviation plus 1e-4 (GRPO). mean: also
    divided by the group's mean, for rewards of at least 0 (MaxRL). part_std: each of [reward.parts] minus its mean and divided
    by its standard deviation within the group, then added by weight (GDPO)."""
    whiten: bool = False
    """Whiten advantages over the tokens of each stream."""

    def check(self, recipe: Any) -> None:
        if self.scale == "part_std" and recipe.reward.type != "weighted":
            raise ValueError(
                f'credit.scale is "part_std", but reward.type is "{recipe.reward.type}", which has no parts; add tables '
                '[reward.parts.NAME], or set credit.scale = "std"'
            )
        below = recipe.reward.truncated_value or 0.0
        if self.scale == "mean" and recipe.reward.type == "weighted":
            for name, part in recipe.reward.parts.items():
                if part.weight < 0:
                    raise ValueError(
                        f'credit.scale is "mean", but reward.parts.{name}.weight is {part.weight:g}, so rewards, and the mean '
                        'they are divided by, may be negative; set credit.scale = "none" or "std"'
                    )
        if self.scale == "mean" and (recipe.reward.overlong is not None or below < 0):
            raise ValueError(
                'credit.scale is "mean", but '
                + (f"reward.truncated_value is {below}" if below < 0 else "[reward.overlong] is set")
                + ", so rewards, and the mean they are divided by, may be negative; remove that, or set credit.scale = "
                '"none" or "std"'
            )


class LossConfig(Section):
    """L = mean over main ℓ + lambda · mean over branches ℓ + beta · (KL main + KL branch)."""

    lambda_: NonNegative = Field(default=1.0, alias="lambda")
    """Weight of the branch stream."""
    beta: NonNegative = 1e-4
    """Weight of the KL divergence (k3) to the frozen start model; with 0, no reference model is loaded."""
    policy: PathText = "ppo"
    """Loss of a token. ppo: clipped surrogate. cispo: clipped weight times log-prob. Or your own function, as
    "path/to/file.py:name" or "package.module:name"."""
    ratio: Literal["token", "sequence"] = "token"
    """Level of the ratio to the old policy. token: each token. sequence: each rollout or branch as a whole, by the geometric
    mean of its tokens' ratios (GSPO)."""
    clip_low: PositiveFloat = 0.2
    """Lower clip bound of a token's ratio: 1 - clip_low."""
    clip_high: PositiveFloat = 0.2
    """Upper clip bound of a token's ratio: 1 + clip_high."""
    sequence_clip_low: PositiveFloat = 3e-4
    """For ratio = "sequence", in place of clip_low; a mean moves far less than a token."""
    sequence_clip_high: PositiveFloat = 4e-4
    """For ratio = "sequence", in place of clip_high."""
    dual_clip: Annotated[float, Field(gt=1)] | None = 3.0
    """Bound of the surrogate for negative advantages, as a multiple of the advantage; none: no bound."""
    cispo_low: NonNegative = 0.0
    """For policy = "cispo": lower bound of the ratio; 0 is none."""
    cispo_high: PositiveFloat = 5.0
    """For policy = "cispo": upper bound of the ratio."""
    reduction: Literal["token", "sequence", "constant"] = "token"
    """token: mean over a stream's tokens. sequence: mean over sequences of their token means.
    constant: sum of tokens / (sequences · `reduction_length`)."""
    reduction_length: PositiveInt | None = None
    """For reduction = "constant"; default: sampling.max_new_tokens."""
    streams: Literal["dual", "merged"] = "dual"
    """dual: a mean per stream. merged: one mean over both streams together, with lambda as a weight."""
    drop_zero_advantage: bool = True
    """Drop rows without advantage from the loss, the KL and the denominators."""
    min_branch_sequences: Annotated[int, Field(ge=0)] = 0
    """Drop the branch stream of a step that has fewer rows than this (the reference: 128)."""
    full_branch_sequences: Annotated[int, Field(ge=0)] = 0
    """Branch rows of an optimizer step from which lambda counts in full; with n fewer ones, lambda · n / this. 0: always."""
    lambda_scales_kl: bool = False
    """Also multiply the KL of the branch stream by lambda."""
    importance: Literal["auto", "on", "off"] = "auto"
    """Importance weight learner / sampler. auto: only if the engine's log-probs can differ from the learner's."""
    importance_mode: Literal["truncate", "mask"] = "truncate"
    """truncate: bound the weight by `importance_cap`. mask: leave out tokens whose weight is out of bounds (IcePop)."""
    importance_cap: PositiveFloat = 2.0
    """For importance_mode = "truncate": upper bound of the weight."""
    importance_low: NonNegative = 0.5
    """For importance_mode = "mask": smallest weight that counts."""
    importance_high: PositiveFloat = 5.0
    """For importance_mode = "mask": largest weight that counts."""

    model_config = ConfigDict(populate_by_name=True, serialize_by_alias=True)

    @property
    def clip_range(self) -> tuple[float, float]:
        """Distances below and above 1 within which the ratio is not clipped."""
        whole = self.ratio == "sequence"
        return (self.sequence_clip_low, self.sequence_clip_high) if whole else (self.clip_low, self.clip_high)

    @property
    def importance_range(self) -> tuple[float, float]:
        """Bounds of the importance weight."""
        masked = self.importance_mode == "mask"
        return (self.importance_low, self.importance_high) if masked else (0.0, self.importance_cap)

    @property
    def user_function(self) -> bool:
        """True if `policy` names a user's own function."""
        return ":" in self.policy

    @field_validator("policy")
    @classmethod
    def _is_known(cls, policy: str) -> str:
        if policy not in POLICY_LOSSES and ":" not in policy:
            close = difflib.get_close_matches(policy, POLICY_LOSSES, n=1)
            hint = f" (did you mean {close[0]!r}?)" if close else ""
            raise ValueError(
                f"loss.policy is {policy!r}; choose one of {', '.join(map(repr, POLICY_LOSSES))}{hint}, or name a function of "
                'yours: "path/to/file.py:name"'
            )
        return policy

    @model_validator(mode="after")
    def _has_no_idle_key(self) -> LossConfig:
        """Refuse keys that were set and have no effect: they would be taken for the cause of a result."""
        clip, whole = ("clip_low", "clip_high"), ("sequence_clip_low", "sequence_clip_high")
        weight = ("cispo_low", "cispo_high")
        if self.policy == "cispo":
            self._refuse((*clip, *whole, "dual_clip"), 'loss.policy is "cispo"', weight)
        elif self.policy == "ppo":
            self._refuse(weight, 'loss.policy is "ppo"', whole if self.ratio == "sequence" else clip)
        if self.policy != "cispo":
            used, unused = (whole, clip) if self.ratio == "sequence" else (clip, whole)
            self._refuse(unused, f'loss.ratio is "{self.ratio}"', used)
        if self.full_branch_sequences and self.streams == "merged":
            raise ValueError(
                f'loss.full_branch_sequences is {self.full_branch_sequences}, but loss.streams is "merged", where each row has '
                'the same weight however few there are; set loss.streams = "dual" or remove loss.full_branch_sequences'
            )
        bounds = ("importance_low", "importance_high")
        if self.importance_mode == "mask":
            self._refuse(("importance_cap",), 'loss.importance_mode is "mask"', bounds)
            if self.importance == "off":
                raise ValueError(
                    'loss.importance_mode is "mask", but loss.importance is "off", so no token would be masked; set '
                    'loss.importance = "auto" or "on", or remove loss.importance_mode'
                )
        else:
            self._refuse(bounds, 'loss.importance_mode is "truncate"', ("importance_cap",))
        for low, high in (weight, bounds):
            if getattr(self, low) >= getattr(self, high):
                raise ValueError(
                    f"loss.{low} is {getattr(self, low)}, but loss.{high} is {getattr(self, high)}: nothing would be within "
                    "the bounds; lower the one or raise the other"
                )
        return self

    def _refuse(self, idle: tuple[str, ...], because: str, used: tuple[str, ...]) -> None:
        for key in idle:
            value = getattr(self, key)
            if value is not None and value != type(self).model_fields[key].default:
                instead = " and ".join(f"loss.{name}" for name in used)
                raise ValueError(
                    f"loss.{key} is {value}, but {because}, which is bounded by {instead}; set {instead} and remove "
                    f"loss.{key}, or choose another {because.split(' ')[0]}"
                )


class OptimConfig(Section):
    """AdamW, and the split of a batch into optimizer steps."""

    lr: PositiveFloat = 1e-6
    """Peak learning rate."""
    betas: tuple[DecayRate, DecayRate] = (0.9, 0.999)
    """Decay rates of the first and second moment."""
    eps: PositiveFloat = 1e-8
    """Added to the square root of the second moment."""
    weight_decay: NonNegative = 0.01
    """Decoupled weight decay, per step and unit of learning rate."""
    max_grad_norm: PositiveFloat | None = 1.0
    """Maximum global norm of the gradient; none: no clipping."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Optimizer steps of linear warm-up from 0; those that a run step without signal leaves out count."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Learning rate after the warm-up: constant, or decay to 0 at step `run.steps`, steps without signal included (not reached
    if `run.max_sampled_tokens` ends the run earlier)."""
    minibatches: PositiveInt = 1
    """Optimizer steps into which the prompts of a step are split."""
    epochs: PositiveInt = 1
    """Passes over the batch of a step."""

    def check(self, recipe: Any) -> None:
        if self.minibatches > recipe.run.prompts_per_step:
            raise ValueError(
                f"optim.minibatches is {self.minibatches}, but a step has only run.prompts_per_step = "
                f"{recipe.run.prompts_per_step} prompts to split; lower it"
            )


class LearnerConfig(Section):
    """Arithmetic and memory of the learner."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    """Arithmetic of forward and backward passes; weights and optimizer stay float32. bfloat16 is quick on GPUs and on CPUs with
    instructions for it (AMX, AVX512-BF16); on others it takes 10 to 60 times as long."""
    tokens_per_pack: PositiveInt = 16_384
    """Most tokens per forward pass, padding included; gradients are accumulated over passes."""
    tree_packing: Literal["auto", "on", "off"] = "auto"
    """Forward every shared prefix once. auto: if the model passes the check; on: an error if not; off: a row per path."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    logprob_chunk: PositiveInt = 256
    """Rows of logits in memory at a time."""
    logprob_keep_mb: Annotated[int, Field(ge=0)] = 256
    """Memory for logits kept for the backward pass, in MiB; more saves up to a quarter of the output layer's work."""
