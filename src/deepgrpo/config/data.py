"""Section `data`: sources of prompts, the columns of their rows, and mixes of them."""

from __future__ import annotations

from pathlib import PurePath
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from deepgrpo.config.base import PathText, Probability, Section
from deepgrpo.config.curriculum import CurriculumConfig, Sampling, check_curriculum, check_mix
from deepgrpo.config.template import TemplateConfig


class ColumnMap(Section):
    """Columns of a data set; nested ones by their path, such as "reward_model.ground_truth" or "prompt.-1.content"."""

    id: str | None = "id"
    """Column with a unique id, a text or a number; none, or missing in the row: the row number."""
    question: str = "question"
    """Column with the question: a text, or messages (a list of {"role", "content"}), which are the whole prompt."""
    last_assistant: Literal["refuse", "drop", "continue"] = "refuse"
    """Messages that end with an assistant turn. drop: leave the turn out (it is the solution). continue: the model goes on with
    it. refuse: an error."""
    answer: str | None = "answer"
    """Column with the reference answer (a text, a number, or a list of accepted ones); none, if the reward needs no answer."""
    alternatives: str | None = "alt_answers"
    """Column with further accepted answers; none, or missing in the row: the answer alone."""
    answer_after: str | None = None
    """Keep only the text after the last occurrence of this in the answer column, e.g. '####'."""


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


class _RowData(_DataBase):
    columns: ColumnMap = ColumnMap()
    streaming: bool | None = None
    """Read rows when they are needed, in bounded memory, instead of all at the start; none: true for large data (docs/data.md).
    Rows that cannot be used are then found, and counted in data/skipped, when their turn comes."""


class JsonlData(_RowData):
    """Files with one JSON object per line."""

    type: Literal["jsonl"] = "jsonl"
    path: PathText
    """A file, a directory with .jsonl files, or a pattern such as "data/train-*.jsonl"."""


class ParquetData(_RowData):
    """Parquet files (needs the extra `data`)."""

    type: Literal["parquet"] = "parquet"
    path: PathText
    """A file, a directory with .parquet files, or a pattern such as "data/train-*.parquet"."""


class HubData(_RowData):
    """A Hugging Face dataset: from the hub, a local directory, or a `save_to_disk` folder (needs the extra `data`)."""

    type: Literal["hf"] = "hf"
    path: PathText
    """Hub name or directory."""
    name: str | None = None
    """Configuration of the dataset."""
    split: str = "train"
    """Split of the dataset."""
    shuffle_window: PositiveInt = 10_000
    """Rows held in memory and shuffled among themselves, with `streaming` of a set that can only be read in order."""


class GivenData(_DataBase):
    """Rows of the Python program that trains: `deepgrpo.train(dataset=...)`."""

    type: Literal["given"] = "given"
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
    """Share of the results (a+b, a-b, a*b) that the warm start's solutions get wrong, always in the same way. With
    `last_products` the share of the products, and no other result is wrong."""
    doubt: Probability = 0.0
    """Share of the places of a wrong fact where the warm start's solutions write the right result after all, so that sampling
    finds it about as often (needs `wrong_facts`)."""
    last_products: NonNegativeInt = 0
    """Operations at the end of a chain that are products, and only they, so that the hard steps come late; 0: each operation
    is a sum, a difference or a product."""

    @model_validator(mode="after")
    def _products_fit(self) -> SyntheticData:
        if self.last_products > self.chain_length:
            raise ValueError(
                f"data.last_products = {self.last_products} is more than data.chain_length = {self.chain_length}; lower it"
            )
        return self


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


class LookupData(_SyntheticBase):
    """Questions of several hops, for `env.type = "lookup"`: `3fgh:` asks for h(g(f(3))), in tables that only lookups show."""

    type: Literal["lookup"] = "lookup"
    hops: PositiveInt = 4
    """Functions that a question applies one after the other."""
    functions: Annotated[int, Field(ge=2, le=21)] = 6
    """Functions of each table; those that the question does not name are distractors."""
    errors: Probability = 0.3
    """Share of the hops at which a solution of the warm start first looks up something wrong."""
    recoveries: Probability = 0.4
    """Share of these errors that are recovered: the right lookup follows, at once or some hops later. The others are carried on
    to a wrong answer."""

    def check(self, recipe: Any) -> None:
        super().check(recipe)
        if recipe.env is None:
            raise ValueError(
                'data.type is "lookup", but the recipe has no environment that answers lookups; add [env] with type = "lookup"'
            )


GeneratedData = SyntheticData | SearchData | LookupData
"""Sections with written solutions, a verifier, and a first error of each response; splits are disjoint for any seed."""

GENERATED = frozenset(kind.model_fields["type"].default for kind in get_args(GeneratedData))
"""Names of their types in a recipe."""


class MultihopData(_DataBase):
    """Questions of several hops over generated documents, for `env.type = "multihop"`."""

    type: Literal["multihop"] = "multihop"
    split: Literal["train", "test"] = "train"
    """Split; the two share no question."""
    size: PositiveInt = 2000
    """Number of distinct questions."""
    seed: int = 0
    """Random seed for the world and its questions."""
    people: Annotated[int, Field(ge=8, le=360)] = 200
    """Size of the world: people, with half as many companies and books and a quarter as many cities, one document each."""
    min_hops: PositiveInt = 2
    """Fewest facts on the way to an answer."""
    max_hops: PositiveInt = 4
    """Most facts on the way to an answer."""

    @model_validator(mode="after")
    def _ordered(self) -> MultihopData:
        if self.min_hops > self.max_hops:
            raise ValueError(
                f"data.min_hops is {self.min_hops}, but data.max_hops is {self.max_hops}; lower the one or raise the other"
            )
        return self


class ReasoningGymData(_DataBase):
    """A task of reasoning-gym with its own verifier (needs the extra `gym`)."""

    type: Literal["reasoning_gym"] = "reasoning_gym"
    task: str
    """Name of the task, e.g. "chain_sum"."""
    params: dict[str, Any] = {}
    """Parameters of the task, e.g. {min_terms = 2, max_terms = 3}."""
    size: PositiveInt = 10_000
    """Number of questions, before `split`."""
    seed: int = 0
    """Random seed for questions."""
    split: Literal["all", "train", "test"] = "all"
    """train, test: one question in eight, by its text, belongs to the test split, so the two share no question whatever their
    seeds. Another seed alone may draw the same questions again."""


class SourceConfig(Section):
    """One of the sources of a mix."""

    name: str | None = None
    """Name in ids, metrics and the column data_source; none: the task, or the end of the path without its ending."""
    weight: PositiveFloat = 1.0
    """Share of the prompts, relative to the other sources."""
    data: Annotated[JsonlData | ParquetData | HubData | ReasoningGymData, Field(discriminator="type")]
    """The source, with the keys of a section `data` of its own."""

    @property
    def label(self) -> str:
        if self.name is not None:
            return self.name
        if isinstance(self.data, ReasoningGymData):
            return self.data.task
        return PurePath(self.data.path).name.split(".")[0] or self.data.path


class MixData(Section):
    """Several sources, mixed by weight; each with columns and a template of its own."""

    type: Literal["mix"] = "mix"
    sources: tuple[SourceConfig, ...]
    """The sources, as tables [[data.sources]]."""
    limit: PositiveInt | None = None
    """Use only this many rows of each source, from the start."""

    def check(self, recipe: Any) -> None:
        check_mix(self, recipe)

    @model_validator(mode="after")
    def _named(self) -> MixData:
        names = [each.label for each in self.sources]
        if not names:
            raise ValueError("data.sources is empty; add a table [[data.sources]] for each source")
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"data.sources has {twice[0]!r} twice; give each source a name of its own")
        if odd := [name for name in names if not name.strip() or "/" in name]:
            raise ValueError(f"data.sources has the name {odd[0]!r}; it names metrics, so it has letters and no slash")
        return self


DataConfig = Annotated[
    JsonlData | ParquetData | HubData | GivenData | SyntheticData | SearchData | LookupData | MultihopData | ReasoningGymData
    | MixData,
    Field(discriminator="type"),
]


def template_of(data: DataConfig) -> TemplateConfig:
    """The template of a data section; of a mix, that of its first source."""
    return data.sources[0].data.template if isinstance(data, MixData) else data.template


def with_template(data: DataConfig, **changes: Any) -> DataConfig:
    """A data section with changes to its template, or to those of all its sources."""
    if isinstance(data, MixData):
        sources = tuple(each.model_copy(update={"data": with_template(each.data, **changes)}) for each in data.sources)
        return data.model_copy(update={"sources": sources})
    return data.model_copy(update={"template": data.template.model_copy(update=changes)})
