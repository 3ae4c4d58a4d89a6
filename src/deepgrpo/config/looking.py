"""Sections of strategies that look before they branch: at beliefs, at the policy's own critique, at earlier successes."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from deepgrpo.config.data import GeneratedData, MixData
from deepgrpo.config.placeholders import placeholders
from deepgrpo.config.strategy import Explore, PivotExplore, SegmentConfig


def _lacks_answers(data: Any) -> bool:
    """True if the rows, or those of some source of a mix, have no reference answer."""
    parts = [each.data for each in data.sources] if isinstance(data, MixData) else [data]
    columns = [getattr(part, "columns", None) for part in parts]
    return any(each is not None and each.answer is None for each in columns)


class BeliefExplore(PivotExplore):
    """Pivots before the largest drop of the policy's probability of the reference answer."""

    implementation = "deepgrpo.explore.belief:BeliefStrategy"
    type: Literal["belief"] = "belief"
    cue: str = "\n#### "
    """Text written between a state and the reference answer; "#" for the synthetic tasks."""
    closing: str = ""
    """Text behind the answer that belongs to it, so that 1 is not the beginning of 12, e.g. "}" or "\\n"."""
    temperature: PositiveFloat = 0.05
    """Q ∝ exp(drop / temperature); the smaller, the surer is the largest drop chosen."""

    def check(self, recipe: Any) -> None:
        if _lacks_answers(recipe.data):
            raise ValueError(
                'explore.type is "belief", but data.columns.answer is none: it measures the probability of the '
                'reference answer; name the column, or choose explore.type = "deep"'
            )
        self._refuse_overlap(recipe)


class PrefixExplore(Explore):
    """Prefixes of earlier successes of the same prompt, from the depth where outcomes differ."""

    implementation = "deepgrpo.explore.prefix:PrefixStrategy"
    needs_epochs = True
    in_episodes = False
    type: Literal["prefix"] = "prefix"
    num_rollouts: Annotated[int, Field(ge=2)] = 8
    """Rollouts per prompt, G."""
    branches_per_pivot: Annotated[int, Field(ge=2)] = 8
    """Continuations of a prefix, K."""
    expand: Literal["unsolved", "failed", "all"] = "unsolved"
    """Prompts whose prefix is continued: those without any success in this step, those with a failed rollout, or all."""
    success_threshold: float = 0.0
    """A reward above this is a success."""
    per_prompt: PositiveInt = 1
    """Most successes stored per prompt; a newer one replaces the oldest."""
    store_tokens: PositiveInt = 1_000_000
    """Most tokens stored in all; the oldest successes leave first. A checkpoint needs some 6 bytes per token."""
    max_age: PositiveInt | None = None
    """Steps after which a stored success leaves; none: never. Prefixes are context and need not be recent."""
    segments: SegmentConfig = SegmentConfig()

    @property
    def most_branches(self) -> int:
        """Most branches per rollout."""
        return -(-self.branches_per_pivot // self.num_rollouts)

    def check(self, recipe: Any) -> None:
        data = recipe.data
        if isinstance(data, GeneratedData) and data.size is None and data.limit is None:
            raise ValueError(
                f'explore.type is "prefix", but data.type = "{data.type}" without data.size has questions without end, and '
                "none comes twice: no earlier success would ever be continued; set data.size so that the run passes over the "
                'questions several times, or choose explore.type = "deep"'
            )


class LocatedExplore(PivotExplore):
    """SRPO: the policy names the first wrong step of a failed rollout, and continues before it."""

    implementation = "deepgrpo.explore.located:LocatedStrategy"
    type: Literal["located"] = "located"
    num_pivots: Annotated[int, Field(ge=0, le=1)] = 1
    """Pivots per expanded rollout; 0 is GRPO."""
    question: str = (
        "Here is a question, and a solution in {count} numbered steps whose final answer is wrong.\n\nQuestion: {question}\n\n"
        "Solution:\n{steps}\nWhich step is the first wrong one? Answer with its number only."
    )
    """Question to the policy, a user turn of the data's chat template: {question}, {steps}, {count}, and {answer} for the
    reference answer."""
    step: str = "Step {number}: {text}\n"
    """Wording of each step in {steps}."""
    answer_tokens: PositiveInt = 32
    """Longest answer; more for a model that reasons before it names a step."""
    answer_temperature: Annotated[float, Field(ge=0)] = 0.0
    """Temperature of the answer; 0: greedy."""
    fallback: Literal["random", "first", "none"] = "random"
    """Pivot where no step is named, or none that may be a pivot: random, the first candidate, or none."""

    @property
    def most_asked_tokens(self) -> int:
        """See `Explore.most_asked_tokens`."""
        return self.answer_tokens

    @model_validator(mode="after")
    def _question_shows_the_steps(self) -> LocatedExplore:
        for key, text, name in (("question", self.question, "steps"), ("step", self.step, "text")):
            if name not in {each.name for each in placeholders(text)}:
                raise ValueError(f"explore.{key} is {text!r} and has no {{{name}}}; write {{{name}}} where the {name} goes")
        return self

    def check(self, recipe: Any) -> None:
        asks = "answer" in {each.name for each in placeholders(self.question)}
        if asks and _lacks_answers(recipe.data):
            raise ValueError(
                "explore.question has {answer}, but data.columns.answer is none; name the column, or take {answer} out"
            )
