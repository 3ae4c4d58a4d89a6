"""Section `reward`: scoring of responses."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PositiveFloat, PositiveInt, model_validator

from deepgrpo.config.base import Section
from deepgrpo.config.judge import JudgeKeys
from deepgrpo.config.scorers import AnswerKeys, EnvKeys, ExactKeys, MathKeys, TaskKeys, UserKeys

SUM = "sum"
"""Value of `reward.success` that stands for the weighted sum."""

OVERLONG = "overlong"
"""Name under which the length penalty is logged beside the parts."""


class OverlongConfig(Section):
    """Soft penalty for responses near the length limit (DAPO): zero up to `cache` tokens before it, then linear down to
    -`penalty` at the limit. Added in training, not in evaluation.
    """

    cache: PositiveInt
    """Tokens before the limit over which the penalty grows."""
    penalty: PositiveFloat = 1.0
    """Penalty at the limit."""


class _Whole(Section):
    """Keys of a reward that is not a part of another."""

    type: str
    truncated_value: float | None = 0.0
    """Reward of a response that was cut off at the length limit; none: score it like any other."""
    overlong: OverlongConfig | None = None
    """Length penalty; none: no penalty."""

    @property
    def uses_task(self) -> bool:
        """True if the data's own verifier scores."""
        return False

    @property
    def types(self) -> frozenset[str]:
        """Types of the reward and of its parts."""
        return frozenset({self.type})

    def share(self, workers: int) -> Any:
        """This section for one of several reward workers, with its part of the limits that they share."""
        return self

    def check(self, recipe: Any) -> None:
        longest = recipe.sampling.max_new_tokens
        if self.overlong is not None and self.overlong.cache > longest:
            raise ValueError(
                f"reward.overlong.cache is {self.overlong.cache}, but a response has at most sampling.max_new_tokens = "
                f"{longest} tokens, so every one of them would be penalised; lower the one or raise the other"
            )


class _Part(Section):
    """Keys of a part of a reward."""

    type: str
    weight: float = 1.0
    """Factor of this part in the weighted sum; below 0 for something to avoid."""

    @model_validator(mode="before")
    @classmethod
    def _belongs_to_the_whole(cls, raw: Any) -> Any:
        for key in ("truncated_value", "overlong"):
            if isinstance(raw, Mapping) and key in raw:
                raise ValueError(
                    f"{key} = {raw[key]!r} stands in a part of the reward, but belongs to the whole: set reward.{key}"
                )
        return raw


class MathReward(MathKeys, _Whole):
    __doc__ = MathKeys.__doc__


class ExactReward(ExactKeys, _Whole):
    __doc__ = ExactKeys.__doc__


class TaskReward(TaskKeys, _Whole):
    __doc__ = TaskKeys.__doc__

    @property
    def uses_task(self) -> bool:
        return True

    def check(self, recipe: Any) -> None:
        super().check(recipe)
        require_verifier(recipe, "reward.type")


class UserReward(UserKeys, _Whole):
    __doc__ = UserKeys.__doc__


class EnvReward(EnvKeys, _Whole):
    __doc__ = EnvKeys.__doc__
    truncated_value: float | None = None
    """Reward of an episode that was cut off at a limit; none: what it has earned so far."""


class JudgeReward(JudgeKeys, AnswerKeys, _Whole):
    __doc__ = JudgeKeys.__doc__

    def check(self, recipe: Any) -> None:
        super().check(recipe)
        self.share(workers_of(recipe))


class MathPart(MathKeys, _Part):
    __doc__ = MathKeys.__doc__


class ExactPart(ExactKeys, _Part):
    __doc__ = ExactKeys.__doc__


class TaskPart(TaskKeys, _Part):
    __doc__ = TaskKeys.__doc__


class UserPart(UserKeys, _Part):
    __doc__ = UserKeys.__doc__


class EnvPart(EnvKeys, _Part):
    __doc__ = EnvKeys.__doc__


class JudgePart(JudgeKeys, AnswerKeys, _Part):
    __doc__ = JudgeKeys.__doc__


PartConfig = Annotated[MathPart | ExactPart | TaskPart | UserPart | EnvPart | JudgePart, Field(discriminator="type")]

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")
_TAKEN = re.compile(rf"{SUM}|{OVERLONG}|problems|problem_.*|.*_problems|judge_.*")


class WeightedReward(_Whole):
    """Several rewards with weights: the reward of a response is the weighted sum of its parts."""

    type: Literal["weighted"] = "weighted"
    parts: Annotated[dict[str, PartConfig], Field(min_length=1)]
    """The parts, one table each: [reward.parts.NAME] with a type, its keys, and a weight. Logged as reward/NAME."""
    success: str | None = None
    """The part whose value, before its weight, is compared with explore.success_threshold, wherever a response counts as a
    success or a failure; "sum": the weighted sum. none: the only part that checks an answer (math, exact, task)."""

    @property
    def uses_task(self) -> bool:
        return any(isinstance(part, TaskPart) for part in self.parts.values())

    @property
    def types(self) -> frozenset[str]:
        return frozenset({self.type, *(part.type for part in self.parts.values())})

    def share(self, workers: int) -> Any:
        parts = {
            name: part.share(workers, f"reward.parts.{name}") if isinstance(part, JudgePart) else part
            for name, part in self.parts.items()
        }
        return self.model_copy(update={"parts": parts})

    @property
    def success_part(self) -> str | None:
        """Name of the part that says success; None: the weighted sum does."""
        chosen = self.success or next(name for name in self.parts if name in self._checking())
        return None if chosen == SUM else chosen

    def _checking(self) -> list[str]:
        return [name for name, part in self.parts.items() if part.type in ("math", "exact", "task")] or (
            list(self.parts) if len(self.parts) == 1 else []
        )

    @model_validator(mode="after")
    def _names_fit(self) -> WeightedReward:
        for name in self.parts:
            if not _NAME.fullmatch(name) or _TAKEN.fullmatch(name):
                raise ValueError(
                    f"reward.parts.{name}: {name!r} cannot name a part; choose letters, digits, - and _ after a first letter, "
                    f'but not "{SUM}", "{OVERLONG}", "problems", "problem_…", "…_problems" or "judge_…", which are taken'
                )
        return self

    @model_validator(mode="after")
    def _success_is_known(self) -> WeightedReward:
        names = ", ".join(f'"{name}"' for name in self.parts)
        if self.success is not None and self.success not in (*self.parts, SUM):
            raise ValueError(
                f'reward.success is "{self.success}", but the parts are {names}; name one of them, or "{SUM}" for the weighted '
                "sum"
            )
        if self.success is None and len(self._checking()) != 1:
            found = self._checking()
            raise ValueError(
                f"reward.success is missing, and {'several parts check' if found else 'no part checks'} an answer by itself "
                f'({names}); name the part that says whether a response succeeds, or "{SUM}" for the weighted sum'
            )
        return self

    def check(self, recipe: Any) -> None:
        super().check(recipe)
        self.share(workers_of(recipe))
        for name, part in self.parts.items():
            if isinstance(part, TaskPart):
                require_verifier(recipe, f"reward.parts.{name}.type")


def workers_of(recipe: Any) -> int:
    """Processes that score, each with a reward of its own."""
    return max(1, recipe.cluster.reward_workers) if recipe.cluster is not None else 1


def require_verifier(recipe: Any, key: str) -> None:
    """Raises ValueError if the data brings no verifier.

    Args:
        key: the key that wants one.
    """
    mixed = recipe.data.type == "mix"
    kinds = {each.data.type for each in recipe.data.sources} if mixed else {recipe.data.type}
    if not kinds <= ({"reasoning_gym"} if mixed else {"synthetic", "search", "multihop", "reasoning_gym"}):
        raise ValueError(
            f'{key} is "task", but data.type is "{recipe.data.type}" brings no verifier; '
            f'choose {key} = "math", "exact" or "user"'
        )


def _parts_need_no_type(raw: Any) -> Any:
    """`reward.type` may be left out beside parts."""
    return {"type": "weighted", **raw} if isinstance(raw, dict) and "parts" in raw else raw


RewardConfig = Annotated[
    Annotated[
        MathReward | ExactReward | TaskReward | UserReward | EnvReward | JudgeReward | WeightedReward,
        Field(discriminator="type"),
    ],
    BeforeValidator(_parts_need_no_type),
]
