"""Errors from other processes: our own are raised as they are, so that a user sees the message and not Ray's wrapper."""

from __future__ import annotations

from typing import NoReturn

from ray.exceptions import RayTaskError

from deepgrpo.errors import DeepGRPOError, EngineError


def raise_task_error(error: RayTaskError) -> NoReturn:
    """Raise the error of a failed call: our own if it is one, otherwise Ray's with its traceback."""
    raise error.cause if isinstance(error.cause, DeepGRPOError) else error from None


def raise_actor_error(error: Exception) -> None:
    """Raise our own error if that is what ended an actor, for example a model that cannot be loaded; else return."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, DeepGRPOError):
        raise cause from None
    # Ray reports a failed constructor as text only
    if "because of an error raised in its creation task" in str(error):
        raise EngineError(f"a process of the cluster could not be built: {str(error).strip().splitlines()[-1]}") from None
