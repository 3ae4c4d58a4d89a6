"""Section `reward`: how responses are judged."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from deepgrpo.config.base import Probability, Section


class OverlongConfig(Section):
    """Soft penalty for responses near the length limit (DAPO): nothing up to `cache` tokens before it, then a straight line
    down to -`penalty` at the limit. Added to the reward of the training, not to that of an evaluation.
    """

    cache: PositiveInt
    """Tokens before the limit over which the penalty grows."""
    penalty: PositiveFloat = 1.0
    """What a response as long as the limit loses."""


class _RewardBase(Section):
    type: str
    truncated_value: float | None = 0.0
    """Reward of a response that was cut off at the length limit; absent ("none"): it is scored like any other."""
    overlong: OverlongConfig | None = None
    """Penalty on length, for any reward; none: no penalty."""

    def check(self, recipe: Any) -> None:
        longest = recipe.sampling.max_new_tokens
        if self.overlong is not None and self.overlong.cache > longest:
            raise ValueError(
                f"reward.overlong.cache is {self.overlong.cache}, but a response has at most sampling.max_new_tokens = "
                f"{longest} tokens, so every one of them would be penalised; lower the one or raise the other"
            )


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

    def check(self, recipe: Any) -> None:
        super().check(recipe)
        if recipe.data.type not in ("synthetic", "reasoning_gym"):
            raise ValueError(
                f'reward.type is "task", but data.type is "{recipe.data.type}" brings no verifier; '
                'choose reward.type = "math", "exact" or "user"'
            )


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
