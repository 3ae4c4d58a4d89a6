"""Section `data`: sources of questions, and the prompt template."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, PositiveInt, model_validator

from deepgrpo.config.base import PathText, Probability, Section
from deepgrpo.config.curriculum import CurriculumConfig, Sampling, check_curriculum
from deepgrpo.config.placeholders import placeholders


class ColumnMap(Section):
    """Names of the columns of a data file."""

    id: str | None = "id"
    """Column with a unique id, a text or a number; none, or missing in the row: the row number."""
    question: str = "question"
    """Column with the question."""
    answer: str | None = "answer"
    """Column with the reference answer (a text, a number, or a list of accepted ones); none, if the reward needs no answer."""
    alternatives: str | None = "alt_answers"
    """Column with further accepted answers; none, or missing in the row: the answer alone."""
    answer_after: str | None = None
    """Keep only the text after the last occurrence of this in the answer column, e.g. '####'."""


class TemplateConfig(Section):
    """Template that turns a question into a prompt."""

    preset: Literal["plain", "gsm8k", "math", "custom"] = "plain"
    """plain: the question alone. gsm8k: asks for the answer after '####'. math: asks for \\boxed{}. custom: `user`."""
    user: str | None = None
    """For preset = "custom": the user turn, with {question} in place of the question. Other columns of the row can be named
    too, nested ones with dots ({metadata.expression}). {{name}} is the text {name}; braces of LaTeX are text."""
    system: str | None = None
    """System turn of the chat template; may name columns like `user`."""
    chat: bool | None = None
    """Apply the tokenizer's chat template; false: the user turn is the whole prompt. Default: true, except for the synthetic
    task with a tokenizer that has no chat template."""

    @model_validator(mode="after")
    def _consistent(self) -> TemplateConfig:
        if self.preset == "custom" and self.user is None:
            raise ValueError(
                'template.preset is "custom", but template.user is missing; add the user turn with {question} in it'
            )
        if self.user is not None and self.preset != "custom":
            raise ValueError(
                f'template.user is {self.user!r}, but template.preset is "{self.preset}", which brings its own user '
                'turn; set template.preset = "custom" or remove template.user'
            )
        if self.user is not None and not placeholders(self.user):
            raise ValueError(
                f"template.user is {self.user!r} and has no {{question}}; write {{question}} where the question goes "
                "(or {column} for another column of the row)"
            )
        if self.system is not None and self.chat is False:
            raise ValueError(
                f"template.system is {self.system!r}, but template.chat is false and plain text has no system turn; "
                "move the text into template.user or set template.chat = true"
            )
        return self


class _DataBase(Section):
    type: str
    template: TemplateConfig = TemplateConfig()
    limit: PositiveInt | None = None
    """Use only this many rows from the start."""
    max_prompt_tokens: PositiveInt | None = None
    """Skip and count rows with a longer prompt; default: half of `sampling.max_total_tokens`, or of the model's context."""
    sampling: Sampling = "uniform"
    """uniform: every prompt once per epoch, in random order. Or drawn by p, the rate at which a prompt was solved so far:
    frontier: by p · (1 - p), most often where half of the rollouts succeed. difficulty: by 1 - p."""
    curriculum: CurriculumConfig = CurriculumConfig()

    def check(self, recipe: Any) -> None:
        check_curriculum(self, recipe)


class JsonlData(_DataBase):
    """A file with one JSON object per line."""

    type: Literal["jsonl"] = "jsonl"
    path: PathText
    """The file."""
    columns: ColumnMap = ColumnMap()


class ParquetData(_DataBase):
    """A parquet file (needs the extra `data`)."""

    type: Literal["parquet"] = "parquet"
    path: PathText
    """The file."""
    columns: ColumnMap = ColumnMap()


class HubData(_DataBase):
    """A Hugging Face dataset, from the hub or a local directory (needs the extra `data`)."""

    type: Literal["hf"] = "hf"
    path: PathText
    """Hub name or directory."""
    name: str | None = None
    """Configuration of the dataset."""
    split: str = "train"
    """Split of the dataset."""
    columns: ColumnMap = ColumnMap()


Recovery = Literal["none", "at_once", "after_answer"]
"""Place where a written solution corrects an error."""


class _SyntheticBase(_DataBase):
    split: Literal["train", "test"] = "train"
    """Split; the two share no question."""
    size: PositiveInt | None = None
    """Number of distinct questions; none: unlimited (`eval` then needs `limit`)."""
    seed: int = 0
    """Random seed for questions."""


class SyntheticData(_SyntheticBase):
    """Chains of modular arithmetic with a written chain of thought, generated on the fly without end."""

    type: Literal["synthetic"] = "synthetic"
    chain_length: PositiveInt = 6
    """Operations per chain."""
    modulus: Annotated[int, Field(ge=2, le=10)] = 10
    """All values are taken modulo this."""
    luck: bool = True
    """Reward the answer alone, also behind wrong steps; false: every step that stands must be right."""
    recovery: Recovery = "none"
    """'!' retracts: at_once: the step before it. after_answer: a whole chain, behind its answer. Solutions of the warm start
    contain such corrections. none: there is no '!'."""
    corrections: Probability = 0.4
    """Share of the warm start's solutions with a wrong step and its correction (needs `recovery`)."""
    wrong_facts: Probability = 0.0
    """Share of the results (a+b, a-b, a*b) that the warm start's solutions get wrong, always in the same way."""


class SearchData(_SyntheticBase):
    """A search by trial: signs between given digits are tried until the chain ends at a target."""

    type: Literal["search"] = "search"
    chain_length: Annotated[int, Field(ge=1, le=5)] = 3
    """Signs to find."""
    modulus: Annotated[int, Field(ge=2, le=10)] = 10
    """All values are taken modulo this."""
    most_fitting: PositiveInt = 1
    """Leave out questions with more choices of signs that fit; a guess is right in at most this many of 3 ** chain_length."""
    most_tries: PositiveInt = 8
    """Most tries in a solution of the warm start; of a longer search, the last ones."""


GeneratedData = SyntheticData | SearchData
"""Sections with written solutions, a verifier, and a first error of each response."""


class ReasoningGymData(_DataBase):
    """A task of reasoning-gym with its own verifier (needs the extra `gym`)."""

    type: Literal["reasoning_gym"] = "reasoning_gym"
    task: str
    """Name of the task, e.g. "chain_sum"."""
    params: dict[str, Any] = {}
    """Parameters of the task, e.g. {min_terms = 2, max_terms = 3}."""
    size: PositiveInt = 10_000
    """Number of questions."""
    seed: int = 0
    """Random seed for questions."""


DataConfig = Annotated[
    JsonlData | ParquetData | HubData | SyntheticData | SearchData | ReasoningGymData, Field(discriminator="type")
]
