"""Sections `credit`, `loss`, `optim` and `learner`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, PositiveFloat, PositiveInt, model_validator

from deepgrpo.config.base import DecayRate, NonNegative, Section


class CreditConfig(Section):
    """From rewards to advantages."""

    scale: Literal["none", "std"] = "none"
    """none: reward minus the group's mean. std: also divided by the group's standard deviation plus 1e-4 (GRPO)."""
    whiten: bool = False
    """Whiten advantages over the tokens of each stream."""


class LossConfig(Section):
    """L = mean over main ℓ + lambda · mean over branches ℓ + beta · (KL main + KL branch)."""

    lambda_: NonNegative = Field(default=1.0, alias="lambda")
    """Weight of the branch stream."""
    beta: NonNegative = 1e-4
    """Weight of the KL divergence (k3) to the frozen start model; 0 loads no reference model."""
    ratio: Literal["token", "sequence"] = "token"
    """What is compared with the old policy, and clipped. token: each token. sequence: each rollout or branch as a whole, by
    the geometric mean of its tokens' ratios (GSPO)."""
    clip_low: PositiveFloat = 0.2
    """A token's ratio is clipped from below at 1 - clip_low."""
    clip_high: PositiveFloat = 0.2
    """A token's ratio is clipped from above at 1 + clip_high."""
    sequence_clip_low: PositiveFloat = 3e-4
    """The same for ratio = "sequence", in place of clip_low; a mean moves far less than a token."""
    sequence_clip_high: PositiveFloat = 4e-4
    """The same for ratio = "sequence", in place of clip_high."""
    dual_clip: Annotated[float, Field(gt=1)] | None = 3.0
    """For negative advantages the surrogate is bounded by this times the advantage; absent: no bound."""
    reduction: Literal["token", "sequence", "constant"] = "token"
    """token: mean over a stream's tokens. sequence: mean over sequences of their token means.
    constant: sum of tokens / (sequences · `reduction_length`)."""
    reduction_length: PositiveInt | None = None
    """For reduction = "constant"; default: sampling.max_new_tokens."""
    streams: Literal["dual", "merged"] = "dual"
    """merged: one mean over the tokens of both streams together, lambda as a weight."""
    drop_zero_advantage: bool = True
    """Rows without advantage leave the loss, the KL and the denominators."""
    min_branch_sequences: Annotated[int, Field(ge=0)] = 0
    """Drop the whole branch stream of a step with fewer rows than this (the reference has 128)."""
    lambda_scales_kl: bool = False
    """Also multiply the KL of the branch stream by lambda."""
    importance: Literal["auto", "on", "off"] = "auto"
    """Truncated importance weight learner / sampler. auto: only if the engine's log-probs can differ from the learner's."""
    importance_cap: PositiveFloat = 2.0
    """Upper bound of that weight."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False,
        populate_by_name=True, serialize_by_alias=True,
    )  # fmt: skip

    @property
    def clip_range(self) -> tuple[float, float]:
        """How far below and above 1 the ratio may be."""
        whole = self.ratio == "sequence"
        return (self.sequence_clip_low, self.sequence_clip_high) if whole else (self.clip_low, self.clip_high)

    @model_validator(mode="after")
    def _clips_what_it_compares(self) -> LossConfig:
        used, unused = ("sequence_clip", "clip") if self.ratio == "sequence" else ("clip", "sequence_clip")
        for side in ("low", "high"):
            key = f"{unused}_{side}"
            value, default = getattr(self, key), type(self).model_fields[key].default
            if value != default:
                raise ValueError(
                    f'loss.{key} is {value}, but loss.ratio is "{self.ratio}", which is clipped by loss.{used}_low and '
                    f"loss.{used}_high; set loss.{used}_{side} and remove loss.{key}, or choose another loss.ratio"
                )
        return self


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
    """Optimizer steps of linear warm-up from 0."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Learning rate after the warm-up: constant, or decay to 0 at step `run.steps` (not reached if `run.max_sampled_tokens`
    ends the run earlier)."""
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
    """Arithmetic of forward and backward passes; weights and optimizer stay float32."""
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
