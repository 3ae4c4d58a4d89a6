"""Callbacks of a run: a class with methods of the user's own, called after each step, evaluation and checkpoint."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from deepgrpo import rng
from deepgrpo.errors import CallbackError, ConfigError
from deepgrpo.foreign import unchanged_process
from deepgrpo.ledger import StepReport
from deepgrpo.library.run import Run
from deepgrpo.loading import where
from deepgrpo.records import Tree
from deepgrpo.train.watch import Watcher

STOP = "stop"
"""Returned by a method of a callback: end the run after this step, saved as by Ctrl-C."""


class Callback:
    """Base of callbacks, whose methods do nothing. Inherit it, or write any class with some of these methods.

    A method that returns "stop" ends the run after the step, as Ctrl-C does: saved, to be resumed.
    """

    def on_step(self, report: StepReport, trees: Sequence[Tree]) -> str | None:
        """A step was taken: its metrics, and the trees it was trained on."""

    def on_eval(self, report: StepReport) -> str | None:
        """The policy was evaluated on the held-out questions: before the first step, or after one."""

    def on_checkpoint(self, step: int, path: Path) -> str | None:
        """A checkpoint was written."""

    def on_end(self, run: Run) -> None:
        """The run has ended, at its last step or earlier; not called after an error."""


_METHODS = {"on_step": 2, "on_eval": 1, "on_checkpoint": 2, "on_end": 1}
"""Method → number of its arguments."""


class Callbacks(Watcher):
    """Calls the user's callbacks, in their order."""

    def __init__(self, callbacks: Iterable[Any] = ()) -> None:
        """Raises ConfigError if one of them is a class, has none of the methods, or has one of another name or form."""
        self.callbacks = list(callbacks)
        self.stopped = False
        self.trees: Sequence[Tree] = ()
        for each in self.callbacks:
            _check(each)

    def stepped(self, report: StepReport, trees: Sequence[Tree]) -> None:
        self.trees = trees
        self._call("on_step", report, trees, step=report.step)
        if "eval/greedy" in report.metrics:
            self.evaluated(report)

    def evaluated(self, report: StepReport) -> None:
        self._call("on_eval", report, step=report.step)

    def saved(self, step: int, checkpoint: Path) -> None:
        self._call("on_checkpoint", step, checkpoint, step=step)

    def ended(self, run: Run, step: int) -> None:
        self._call("on_end", run, step=step)

    def _call(self, method: str, *arguments: Any, step: int) -> None:
        for each in self.callbacks:
            function = getattr(each, method, None)
            if function is None:
                continue
            try:
                # what a callback draws from torch must not move the run's own stream
                with unchanged_process(rng.key("callback", method, step) >> 1):
                    answer = function(*arguments)
            except Exception as error:
                name = f"{type(each).__name__}.{method}"
                raise CallbackError(f"the callback {name} raised {where(error)}; correct it, or leave it out") from error
            self.stopped |= isinstance(answer, str) and answer == STOP


def _check(callback: Any) -> None:
    name = type(callback).__name__
    if isinstance(callback, type):
        raise ConfigError(f"callbacks has the class {callback.__name__}; pass an instance: {callback.__name__}(...)")
    known = [method for method in _METHODS if callable(getattr(callback, method, None))]
    for other in (each for each in dir(callback) if each.startswith("on_") and each not in _METHODS):
        close = difflib.get_close_matches(other, _METHODS, n=1)
        hint = f"; did you mean {close[0]}?" if close else f"; the methods are {', '.join(_METHODS)}"
        raise ConfigError(f"the callback {name} has a method {other}, which is never called{hint}")
    if not known:
        raise ConfigError(f"callbacks has a {name} without any of the methods {', '.join(_METHODS)}")
    for method in known:
        function = getattr(callback, method)
        try:
            inspect.signature(function).bind(*[None] * _METHODS[method])
        except TypeError:
            wanted = str(inspect.signature(getattr(Callback, method))).split(" ->")[0]
            raise ConfigError(
                f"the callback {name}.{method} takes {inspect.signature(function)}; it is called with {_METHODS[method]} "
                f"arguments: def {method}{wanted}"
            ) from None
        except ValueError:
            pass  # a builtin without a signature: the call will tell
