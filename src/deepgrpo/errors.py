"""Exceptions that reach the user.

    DeepGRPOError
    ├── ConfigError        a recipe or a command-line value is invalid (exit code 2)
    ├── DataError          a data file, a column or a row is unusable
    ├── ModelError         a model or tokenizer cannot be loaded or lacks a required capability
    ├── RewardError        a reward function breaks its contract
    ├── StrategyError      a user's strategy or segmenter breaks its contract
    ├── EnvError           an environment breaks its contract
    ├── CallbackError      a callback of `deepgrpo.train` raises
    ├── EngineError        sampling failed
    │   └── EngineLostError    the sampling process died or hangs; another process may retry
    ├── TrainingError      the update is unusable (a lack of memory, ...)
    │   └── DivergenceError    a loss or a gradient is not finite (exit code 3)
    ├── CheckpointError    a checkpoint cannot be written or read
    ├── HubError           the hub refuses an upload
    └── MissingExtraError  an optional dependency is not installed (exit code 2; the message gives the install command)

Every message states the problem with its key and value, then the remedy. `assert` is for bugs of this package only.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class DeepGRPOError(Exception):
    """Base class of all errors meant for the user; the command line prints them without a traceback."""

    exit_code = 1


class ConfigError(DeepGRPOError):
    """Invalid recipe or command-line value."""

    exit_code = 2


class DataError(DeepGRPOError):
    """Unusable data file, column or row."""


class ModelError(DeepGRPOError):
    """Model or tokenizer that cannot be loaded or lacks a required capability."""


class RewardError(DeepGRPOError):
    """Reward function that breaks its contract."""


class StrategyError(DeepGRPOError):
    """A user's strategy or segmenter breaks its contract."""


class EnvError(DeepGRPOError):
    """An environment breaks its contract."""


class CallbackError(DeepGRPOError):
    """Callback that raises."""


class EngineError(DeepGRPOError):
    """Failed sampling."""


class EngineLostError(EngineError):
    """Dead or stuck sampling process. The request itself is fine: another process may retry it."""


class TrainingError(DeepGRPOError):
    """Unusable update, for instance for lack of memory."""


class DivergenceError(TrainingError):
    """Loss, gradient or advantage that is not finite: the fault of the recipe's values, and of no machine."""

    exit_code = 3


class CheckpointError(DeepGRPOError):
    """Checkpoint that cannot be written or read."""


class HubError(DeepGRPOError):
    """Upload that the hub refuses."""


class MissingExtraError(DeepGRPOError):
    """Optional dependency that is not installed."""

    exit_code = 2

    def __init__(self, package: str, extra: str, wanted_by: str, error: ImportError | None = None) -> None:
        """The error of the import may name another package: one that `package` needs itself."""
        module = ((error and error.name) or "").split(".")[0]
        missing = repr(module) if module not in ("", package.replace("-", "_")) else repr(package)
        super().__init__(
            f"{wanted_by} needs the package {missing}, which is not installed; "
            f'run: pip install "deepgrpo[{extra}]"'
        )


def first_line(error: BaseException, longest: int = 300) -> str:
    """First line of a foreign error's message, or its type if the message is empty; for quoting in ours."""
    try:
        text = str(error).strip()
    except Exception:  # an exception of a user's own may fail to print
        text = ""
    return (text or type(error).__name__).splitlines()[0][:longest]


@contextmanager
def requires_extra(package: str, extra: str, wanted_by: str) -> Iterator[None]:
    """Import an optional package inside the block. Raises MissingExtraError, with the command that installs it."""
    try:
        yield
    except ImportError as error:
        raise MissingExtraError(package, extra, wanted_by, error) from None


def did_you_mean(name: str, known: Iterable[str], otherwise: str) -> str:
    """Hint for a message about an unknown name: the nearest one that is known, or all of them.

    >>> did_you_mean("dep", ["deep", "root"], "strategies"), did_you_mean("x", ["deep", "root"], "strategies")
    ("did you mean 'deep'?", 'strategies: deep, root')
    """
    close = difflib.get_close_matches(name, known := list(known), n=1)
    return f"did you mean {close[0]!r}?" if close else f"{otherwise}: {', '.join(known)}"
