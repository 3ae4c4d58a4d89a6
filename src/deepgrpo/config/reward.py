"""Section `reward`: scoring of responses."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from deepgrpo.config.base import PathText, Probability, Section

_Tag = Annotated[str, Field(min_length=1)]


class OverlongConfig(Section):
    """Soft penalty for responses near the length limit (DAPO): zero up to `cache` tokens before it, then linear down to
    -`penalty` at the limit. Added in training, not in evaluation.
    """

    cache: PositiveInt
    """Tokens before the limit over which the penalty grows."""
    penalty: PositiveFloat = 1.0
    """Penalty at the limit."""


class _RewardBase(Section):
    type: str
    truncated_value: float | None = 0.0
    """Reward of a response that was cut off at the length limit; none: score it like any other."""
    overlong: OverlongConfig | None = None
    """Length penalty; none: no penalty."""

    def check(self, recipe: Any) -> None:
        longest = recipe.sampling.max_new_tokens
        if self.overlong is not None and self.overlong.cache > longest:
            raise ValueError(
                f"reward.overlong.cache is {self.overlong.cache}, but a response has at most sampling.max_new_tokens = "
                f"{longest} tokens, so every one of them would be penalised; lower the one or raise the other"
            )


class _AnswerReward(_RewardBase):
    reasoning_tags: tuple[_Tag, _Tag] | Literal["auto"] | None = "auto"
    """Tags around the model's reasoning, which holds no answer, e.g. ["<reason>", "</reason>"]. auto: <think> and </think>
    where the chat template or the response has them; none: read the whole response."""


class MathReward(_AnswerReward):
    """Compare the response's answer with the reference as mathematics, in a worker process with a time limit."""

    type: Literal["math"] = "math"
    answer_format: Literal["boxed", "gsm8k", "any"] = "any"
    """Position of the answer: in the last \\boxed{}, after the last '####', or (any) behind the last of these marks and "the
    answer is", else the last formula or number."""
    timeout_s: PositiveFloat = 5.0
    """Seconds per check; after that the worker is killed and the sample scores 0."""
    workers: PositiveInt = 1
    """Worker processes."""


class ExactReward(_AnswerReward):
    """Score 1 if the text after the last marker equals the reference, ignoring white space and, in a whole number, the commas
    between thousands.
    """

    type: Literal["exact"] = "exact"
    marker: str = "####"
    """The answer is the text after its last occurrence, up to the end of the line; "": the whole response."""


class TaskReward(_AnswerReward):
    """The task's own verifier (synthetic, reasoning_gym)."""

    type: Literal["task"] = "task"
    threshold: Probability = 1.0
    """Set scores below this to 0 (reasoning-gym gives partial credit for format)."""
    timeout_s: PositiveFloat = 5.0
    """For reasoning_gym: seconds per check; after that the worker is killed and the sample scores 0."""
    workers: PositiveInt = 1
    """For reasoning_gym: worker processes."""

    def check(self, recipe: Any) -> None:
        super().check(recipe)
        kinds = {each.data.type for each in recipe.data.sources} if recipe.data.type == "mix" else {recipe.data.type}
        if not kinds <= ({"reasoning_gym"} if recipe.data.type == "mix" else {"synthetic", "search", "reasoning_gym"}):
            raise ValueError(
                f'reward.type is "task", but data.type is "{recipe.data.type}" brings no verifier; '
                'choose reward.type = "math", "exact" or "user"'
            )


class UserReward(_RewardBase):
    """Your own function, with TRL's signature: `def reward(prompts, completions, **columns) -> list[float]`."""

    type: Literal["user"] = "user"
    function: PathText
    """The function: "path/to/file.py:name" or "package.module:name"."""
    format: Literal["auto", "text", "messages"] = "auto"
    """Form of prompts and completions. text: strings. messages: lists of {"role", "content"}, as functions of trl.rewards
    expect. auto: messages where the data have prompts as messages, else text."""
    timeout_s: PositiveFloat = 300.0
    """Seconds per call (all completions of a round); a longer call ends the run with an error."""


RewardConfig = Annotated[MathReward | ExactReward | TaskReward | UserReward, Field(discriminator="type")]
