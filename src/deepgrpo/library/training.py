"""`train` and `steps`: a run from a recipe and objects of the program that calls them."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Generator, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from deepgrpo.config import Config, GivenModel
from deepgrpo.errors import ConfigError
from deepgrpo.ledger import StepReport
from deepgrpo.library.callbacks import Callbacks
from deepgrpo.library.given import Recipe, build_config, resumed_config
from deepgrpo.library.objects import Given, Rewards
from deepgrpo.library.run import Run
from deepgrpo.model.given import handed_back
from deepgrpo.records import Tree
from deepgrpo.runs.layout import RunDir
from deepgrpo.train import loop
from deepgrpo.train.stop import handlers_from_before


def train(
    config: Recipe = None, *, model: Any = None, tokenizer: Any = None, dataset: Any = None, eval_dataset: Any = None,
    rewards: Rewards = None, reward_weights: Sequence[float] | None = None, strategy: Any = None,
    callbacks: Sequence[Any] = (), overrides: Mapping[str, Any] | None = None,
    resume: str | Path | Run | None = None, step: int | None = None, show: bool = True,
) -> Run:  # fmt: skip
    """Train to the end of the recipe and return the run.

    Ctrl-C finishes the step, saves, and returns; a second one stops at once.

    Args:
        config: a Config, a dict of its tables, or the name or path of a recipe; None: the defaults.
        model: a causal language model of transformers (also wrapped by peft), trained in place; or a directory or hub name.
        tokenizer: of the model; default: loaded from where the model came from.
        dataset: a list of dicts, a `datasets.Dataset` or a data frame. The recipe's [data] may name columns and a template.
        eval_dataset: held-out questions of the same kind; evaluated before the first and after the last step, or as
            `eval.every` says.
        rewards: functions with TRL's signature, or types of shipped rewards such as "math"; several are added.
        reward_weights: one factor for each of several rewards; default: 1.
        strategy: a class or an object with the methods of `Strategy`, or the name of a shipped one, such as "root".
        callbacks: objects with methods of `Callback`.
        overrides: keys to change, as in {"run.steps": 20, "optim.lr": 1e-5}.
        resume: the directory of a run to continue by its own recipe, without `config`; give the objects it was started with.
        step: with resume: the checkpoint to continue from; what came later is deleted. Default: the newest.
        show: show the log on standard output; log.txt in the run directory has it in any case.

    Raises:
        DeepGRPOError: see errors.py. What was reached is saved, and the message says how to go on.
    """
    given = Given(model, tokenizer, dataset, eval_dataset, rewards, reward_weights, strategy)
    found, directory = _resolve(config, overrides, given, resume)
    for _ in _reports(found, directory, resume, step, Callbacks(callbacks), show, pause=False):
        pass
    return Run(directory)


def steps(
    config: Recipe = None, *, model: Any = None, tokenizer: Any = None, dataset: Any = None, eval_dataset: Any = None,
    rewards: Rewards = None, reward_weights: Sequence[float] | None = None, strategy: Any = None,
    callbacks: Sequence[Any] = (), overrides: Mapping[str, Any] | None = None,
    resume: str | Path | Run | None = None, step: int | None = None, show: bool = True,
) -> Steps:  # fmt: skip
    """A run step by step: `for report in` this. The arguments are those of `train`.

    The run begins with the first step. Leaving the loop with `break` closes the run: it is saved, and can be resumed. So does
    `close()`, and the end of a `with` block.
    """
    given = Given(model, tokenizer, dataset, eval_dataset, rewards, reward_weights, strategy)
    found, directory = _resolve(config, overrides, given, resume)
    return Steps(found, directory, resume, step, Callbacks(callbacks), show)


class Steps(Iterator[StepReport]):
    """A run in progress: an iterator over the reports of its steps, made by `steps`."""

    def __init__(
        self, config: Config, directory: Path, resume: Any, step: int | None, watcher: Callbacks, show: bool
    ) -> None:
        self.directory = directory
        self._watcher = watcher
        self._reports = _reports(config, directory, resume, step, watcher, show, pause=True)
        # when the last reference goes, and at the latest before Python ends
        self._close = weakref.finalize(self, self._reports.close)

    @property
    def trees(self) -> Sequence[Tree]:
        """Trees of the newest step."""
        return self._watcher.trees

    @property
    def run(self) -> Run:
        """The run so far, read from its directory."""
        return Run(self.directory)

    def close(self) -> None:
        """End the run after the step that was last taken, and save it."""
        self._close()

    def __next__(self) -> StepReport:
        return next(self._reports)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _resolve(
    config: Recipe, overrides: Mapping[str, Any] | None, given: Given, resume: str | Path | Run | None
) -> tuple[Config, Path]:
    if resume is None:
        found = build_config(config, overrides, given)
        return found, RunDir.of(found.run).path
    if config is not None:
        raise ConfigError("config and resume are both given; a resumed run uses its own config.toml: change keys by overrides")
    directory = Path(resume).expanduser()
    return resumed_config(directory, overrides, given), directory


def _reports(
    config: Config, directory: Path, resume: Any, step: int | None, watcher: Callbacks, show: bool, *, pause: bool
) -> Generator[StepReport]:
    """The steps of a run, until its end, a callback's "stop", or the caller's `close`.

    Args:
        pause: the caller's own code runs between two steps: Ctrl-C and torch's random streams are then its own.
    """
    reached = 0
    with contextlib.closing(_taken(config, resume, step, watcher, show)) as taken, contextlib.suppress(GeneratorExit):
        for report in taken:
            reached = report.step
            with _caller() if pause else contextlib.nullcontext():
                yield report
            if watcher.stopped:
                break
    watcher.ended(Run(directory), reached)


def _taken(
    config: Config, resume: Any, step: int | None, watcher: Callbacks, show: bool
) -> Generator[StepReport]:
    """The steps of a run, on a cluster if there is one; a given model gets its attention function back at the end."""
    own = handed_back(config.model.held[0]) if isinstance(config.model, GivenModel) else contextlib.nullcontext()
    arguments: dict[str, Any] = {"resume": None if resume is None else Path(resume), "step": step, "show": show}
    with own:
        if config.cluster is None:
            yield from loop.steps(config, watcher=watcher, **arguments)
        else:
            from deepgrpo.cluster.run import steps_on_cluster

            yield from steps_on_cluster(config, watcher=watcher, **arguments)


@contextlib.contextmanager
def _caller() -> Iterator[None]:
    """While the caller's code runs: signals go where they went before the run, and draws move no stream of the run."""
    state = torch.get_rng_state()
    on_cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    with handlers_from_before():
        try:
            yield
        finally:
            torch.set_rng_state(state)
            if on_cuda:
                torch.cuda.set_rng_state_all(on_cuda)
