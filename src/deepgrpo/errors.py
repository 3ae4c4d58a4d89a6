"""Every error a user can meet.

    DeepGRPOError
    ├── ConfigError        a recipe or a command-line value is wrong (exit code 2)
    ├── DataError          a data file, a column or a row cannot be used
    ├── ModelError         a model or tokenizer cannot be loaded or cannot do what is asked
    ├── RewardError        a reward function breaks its contract
    ├── EngineError        sampling cannot go on
    ├── TrainingError      the update is not usable (a loss that is not finite, ...)
    ├── CheckpointError    a checkpoint cannot be written or read
    └── MissingExtraError  an optional dependency is not installed (names the install command)

A message says what was wrong, with the key and the value, and what to do about it.
`assert` guards only what our own bug could break.
"""

from __future__ import annotations


class DeepGRPOError(Exception):
    """Base of all errors that are meant for a user; the command line prints them without a traceback."""

    exit_code = 1


class ConfigError(DeepGRPOError):
    """A recipe or a command-line value is wrong."""

    exit_code = 2


class DataError(DeepGRPOError):
    """A data file, a column or a row cannot be used."""


class ModelError(DeepGRPOError):
    """A model or tokenizer cannot be loaded, or cannot do what is asked of it."""


class RewardError(DeepGRPOError):
    """A reward function breaks its contract."""


class EngineError(DeepGRPOError):
    """Sampling cannot go on."""


class EngineLostError(EngineError):
    """The process that samples is gone or stuck: another one may do what it was asked."""


class TrainingError(DeepGRPOError):
    """The update is not usable, for instance because the loss is not finite."""


class CheckpointError(DeepGRPOError):
    """A checkpoint cannot be written or read."""


class MissingExtraError(DeepGRPOError):
    """An optional dependency is not installed."""

    exit_code = 2

    def __init__(self, package: str, extra: str, wanted_by: str) -> None:
        super().__init__(
            f"{wanted_by} needs the package {package!r}, which is not installed; "
            f'run: pip install "deepgrpo[{extra}]"'
        )


def first_line(error: BaseException, longest: int = 300) -> str:
    """First line of a foreign error's message, or its type if the message is empty; for quoting in ours."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:longest]
