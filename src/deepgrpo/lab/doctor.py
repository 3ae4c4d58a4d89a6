"""`deepgrpo doctor`: tests of a model, a run directory, or a strategy of the user's own. Torch is loaded only for a model."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from deepgrpo.errors import ConfigError
from deepgrpo.lab.options import DoctorOptions
from deepgrpo.progress import Display, showing
from deepgrpo.runs.layout import RunDir
from deepgrpo.terminal import Terminal


def run_doctor(options: DoctorOptions, console: Console | None = None) -> int:
    """Run the tests and print the verdicts. Returns 0 if all is well, else 1."""
    out = console or Terminal()
    if options.model is None and options.strategy is None:
        raise ConfigError(
            "deepgrpo doctor needs a model, a run or a strategy: deepgrpo doctor MODEL, doctor RUN, or --strategy mine.py:Mine"
        )
    code = 0
    with Display(Terminal(stderr=True)) as display, showing(display):
        if options.strategy is not None:
            from deepgrpo.lab.strategy_check import check_strategy

            code = check_strategy(options.strategy, options.explore, out)
        if options.model is None:
            return code
        if RunDir(Path(options.model)).has_recipe():
            from deepgrpo.lab.run_check import check_run

            return max(code, check_run(Path(options.model), out))
        from deepgrpo.lab.model_check import check_model

        return max(code, check_model(options.model, options, out))
