"""Keys of each way to score responses, as a whole reward or as a part of one; those of a judge are in `judge.py`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from deepgrpo.config.base import PathText, Probability, Section

_Tag = Annotated[str, Field(min_length=1)]


class AnswerKeys(Section):
    """Keys of rewards that read an answer."""

    reasoning_tags: tuple[_Tag, _Tag] | Literal["auto"] | None = "auto"
    """Tags around the model's reasoning, which holds no answer, e.g. ["<reason>", "</reason>"]. auto: <think> and </think>
    where the chat template or the response has them; none: read the whole response."""


class MathKeys(AnswerKeys):
    """Compare the response's answer with the reference as mathematics, in a worker process with a time limit."""

    type: Literal["math"] = "math"
    answer_format: Literal["boxed", "gsm8k", "any"] = "any"
    """Position of the answer: in the last \\boxed{}, after the last '####', or (any) behind the last of these marks and "the
    answer is", else the last formula or number."""
    timeout_s: PositiveFloat = 5.0
    """Seconds per check; after that the worker is killed and the sample scores 0."""
    workers: PositiveInt = 1
    """Worker processes."""


class ExactKeys(AnswerKeys):
    """Score 1 if the text after the last marker equals the reference, ignoring white space and, in a whole number, the commas
    between thousands.
    """

    type: Literal["exact"] = "exact"
    marker: str = "####"
    """The answer is the text after its last occurrence, up to the end of the line; "": the whole response."""


class TaskKeys(AnswerKeys):
    """The task's own verifier (synthetic, reasoning_gym)."""

    type: Literal["task"] = "task"
    threshold: Probability = 1.0
    """Set scores below this to 0 (reasoning-gym gives partial credit for format)."""
    timeout_s: PositiveFloat = 5.0
    """For reasoning_gym: seconds per check; after that the worker is killed and the sample scores 0."""
    workers: PositiveInt = 1
    """For reasoning_gym: worker processes."""


class UserKeys(Section):
    """Your own function, with TRL's signature: `def reward(prompts, completions, **columns) -> list[float]`."""

    type: Literal["user"] = "user"
    function: PathText
    """The function: "path/to/file.py:name" or "package.module:name"."""
    format: Literal["auto", "text", "messages"] = "auto"
    """Form of prompts and completions. text: strings. messages: lists of {"role", "content"}, as functions of trl.rewards
    expect. auto: messages where the data have prompts as messages, else text."""
    timeout_s: PositiveFloat = 300.0
    """Seconds per call (all completions of a round); a longer call ends the run with an error."""


class EnvKeys(Section):
    """Rewards that the environment gives, added over the turns of an episode (docs/agents.md)."""

    type: Literal["env"] = "env"
