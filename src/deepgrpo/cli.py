"""The command line. Torch is imported only after a command has been parsed.

    deepgrpo train RECIPE [--section.key VALUE ...]   train a model by a recipe
    deepgrpo eval MODEL --data SOURCE                  accuracy and pass@k of a model
    deepgrpo recipes [NAME]                            the shipped recipes
    deepgrpo doctor MODEL                              tests of a model, or of your own strategy
    deepgrpo profile RECIPE [--section.key VALUE ...]  where the seconds of a step go
    deepgrpo compare EXPERIMENT.toml                   arms × seeds at equal sampled tokens
    deepgrpo probe RECIPE | RUN                        would branching pay now? signal of each strategy per token
    deepgrpo export RUN                                a run's weights as a model with its card, for other tools or the hub
    deepgrpo report RUN ...                            one HTML page about runs, with all saved trees
    deepgrpo inspect RUN --step N --prompt ID          a tree in the terminal

Exit codes: 0 success, 1 failure, 2 wrong usage or recipe, 3 a loss that is not finite, 130 interrupted with Ctrl-C.
DEEPGRPO_DEBUG=1 in the environment shows the traceback of an error.
"""

from __future__ import annotations

import contextlib
import io
import os
import pkgutil
import shutil
import signal
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TextIO, cast

import tyro

from deepgrpo import __version__
from deepgrpo.arguments import Overrides, expand_homes, give_value, split_overrides
from deepgrpo.config import Config, load_recipe, shipped
from deepgrpo.config.explain import describe_keys
from deepgrpo.errors import ConfigError, DeepGRPOError
from deepgrpo.eval.options import EvalOptions
from deepgrpo.export.options import ExportOptions
from deepgrpo.interrupts import importing
from deepgrpo.lab.options import CompareOptions, DoctorOptions, ProbeOptions, ProfileOptions
from deepgrpo.processes import end_within, follow_parent
from deepgrpo.report.options import InspectOptions, ReportOptions
from deepgrpo.runs.files import FULL, remedy
from deepgrpo.runs.layout import RunDir
from deepgrpo.runs.moved import load_run_recipe
from deepgrpo.threads import limit_spinning
from deepgrpo.visible import GuardedStream, guard_messages, visible

NARROWEST = 20
"""Columns that every command assumes at least."""

_PATIENCE_S = 30.0
"""Seconds for threads, child processes and exit handlers of a user's code after a command has ended."""

_STYLE = (tyro.conf.FlagCreatePairsOff, tyro.conf.PositionalMetavarFromFieldName)
_OVERRIDES = """
Any key of the recipe can be set on the command line:

  --optim.lr 3e-5  --explore.gamma=-20     a value, read as TOML, else as a string
  --sampling.stop '["\\n\\n"]'               a list
  --explore '{type = "root"}'              a table that replaces the recipe's
  --warmstart none                         remove a value or a table

`deepgrpo train --help-config` lists all keys, `--help-config explore` those of a section.
"""


@dataclass(frozen=True)
class Train:
    """Train a model by a recipe, or resume a run."""

    recipe: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="[RECIPE]", help_behavior_hint="")] = None
    """Path of a TOML file, or the name of a shipped recipe, such as demo."""
    dry_run: Annotated[bool, tyro.conf.arg(help_behavior_hint="")] = False
    """Show what the run would sample and need, without loading weights; train nothing."""
    resume: Annotated[Path | None, tyro.conf.arg(metavar="RUN_DIR", help_behavior_hint="")] = None
    """Resume the run in this directory by its own config.toml, without RECIPE."""
    step: Annotated[int | None, tyro.conf.arg(metavar="N", help_behavior_hint="")] = None
    """With --resume: continue from the checkpoint of this step and delete what came later; 0 begins again. Default: the newest
    checkpoint."""
    help_config: Annotated[str | None, tyro.conf.arg(metavar="[SECTION]", help_behavior_hint="")] = None
    """List every key of a recipe, or of one section, with type, default and meaning."""


@dataclass(frozen=True)
class Recipes:
    """List the shipped recipes, or print one."""

    name: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="[NAME]", help_behavior_hint="")] = None
    """Print this recipe, e.g. `deepgrpo recipes demo > mine.toml`."""


@dataclass(frozen=True)
class Command:
    """One command: how its options are parsed, and the function that runs it."""

    options: type
    function: str
    """module:function, imported when the command is run; called with the options, and with overrides if it takes them."""
    overrides: Literal["none", "keys", "dotted"] = "none"
    """Recipe keys it takes. keys: `--section VALUE` and `--section.key VALUE`. dotted: the latter only."""


COMMANDS = {
    "train": Command(Train, "deepgrpo.cli:run_train", "keys"),
    "eval": Command(EvalOptions, "deepgrpo.eval.command:evaluate_model"),
    "recipes": Command(Recipes, "deepgrpo.cli:run_recipes"),
    "doctor": Command(DoctorOptions, "deepgrpo.lab.doctor:run_doctor"),
    "profile": Command(ProfileOptions, "deepgrpo.lab.profile:run_profile", "keys"),
    "compare": Command(CompareOptions, "deepgrpo.lab.compare.command:run_compare"),
    "probe": Command(ProbeOptions, "deepgrpo.lab.probe.command:run_probe", "dotted"),  # --data is its own option
    "export": Command(ExportOptions, "deepgrpo.export.command:run_export"),
    "report": Command(ReportOptions, "deepgrpo.report.command:run_report"),
    "inspect": Command(InspectOptions, "deepgrpo.report.inspect:run_inspect"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; a call that cannot be parsed raises SystemExit(2).

    Args:
        argv: default: the arguments of this process, which then ends soon after, whatever a user's code has left running.
    """
    if argv is not None:
        return _report(argv)
    follow_parent()
    code = 1
    try:
        code = _report(sys.argv[1:])
        return code
    except KeyboardInterrupt:  # Ctrl-C again while the first one was being reported
        code = 130
        return code
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # nothing is left that could be interrupted
        end_within(_PATIENCE_S, code)


def _report(argv: Sequence[str]) -> int:
    """Run one command; report its error in a sentence and return its exit code."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal without our characters shows a question mark
    if shutil.get_terminal_size().columns < NARROWEST:
        os.environ["COLUMNS"] = str(NARROWEST)  # tables and help would be laid out for no width at all, or without end
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # keep libraries' progress bars out of log files
    limit_spinning()
    guard_messages()
    try:
        code = _run(list(argv))
        if sys.stdout is not None:  # closed by the shell (`>&-`)
            sys.stdout.flush()
        return code
    except DeepGRPOError as error:
        if os.environ.get("DEEPGRPO_DEBUG") == "1":
            raise
        print(visible(f"error: {error}"), file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # the reader is gone (`| head`): print nothing more, not even when Python flushes at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if os.environ.get("DEEPGRPO_DEBUG") == "1":
            raise
        return _refused(error)


def _refused(error: OSError) -> int:
    """Report a file that the system refuses to read or write, or a full standard output; return the exit code."""
    if error.filename is not None:
        print(f"error: {os.fsdecode(error.filename)}: {error.strerror or error}; {remedy(error)}", file=sys.stderr)
        return 1
    said = "a file cannot be written"
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python flushes at exit
        said = "standard output cannot be written"
    else:
        if error.errno not in FULL:
            raise error
    print(f"error: {said}: {error.strerror}; {remedy(error)}, or send the output elsewhere", file=sys.stderr)
    return 1


def _run(arguments: list[str]) -> int:
    if arguments == ["--version"]:
        print(f"deepgrpo {__version__}")
        return 0
    name = arguments[0] if arguments else "--help"
    command = COMMANDS.get(name)
    if command is None:
        # prints the list of commands, or the nearest one, and exits
        with _guarded(arguments):
            tyro.extras.subcommand_cli_from_dict(
                {name: each.options for name, each in COMMANDS.items()},
                prog="deepgrpo",
                description="Reinforcement learning that chooses where to explore. Start with: deepgrpo train demo",
                args=arguments or ["--help"],
                config=_STYLE,
            )
        return 0
    rest = arguments[1:]
    overrides: Overrides = []
    if command.overrides != "none":
        rest, overrides = split_overrides(rest, sections=command.overrides == "keys")
    with _guarded(arguments):
        options: Any = tyro.cli(
            command.options,
            prog=f"deepgrpo {name}",
            description=(command.options.__doc__ or "") + ("" if command.overrides == "none" else f"\n{_OVERRIDES}"),
            args=give_value(rest, "--help-config", "all"),
            config=_STYLE,
        )
    options = expand_homes(options)
    with importing():
        function = pkgutil.resolve_name(command.function)
    return int(function(options) if command.overrides == "none" else function(options, overrides))


@contextlib.contextmanager
def _guarded(arguments: Sequence[str]) -> Iterator[None]:
    """The parser quotes arguments as they came."""
    out, err = (cast(TextIO, GuardedStream(stream, arguments)) for stream in (sys.stdout, sys.stderr))
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        yield


def run_train(command: Train, overrides: Overrides) -> int:
    """Train, show what a run would do (--dry-run), or list the keys of a recipe (--help-config)."""
    if command.help_config is not None:
        sys.stdout.write(describe_keys(None if command.help_config == "all" else command.help_config))
        return 0
    config = _config(command, overrides)
    if command.dry_run:
        with importing():
            from deepgrpo.train.dry_run import dry_run

        dry_run(config)
    elif config.cluster is not None:
        with importing():
            from deepgrpo.cluster.run import train_on_cluster

        train_on_cluster(config, resume=command.resume, step=command.step)
    else:
        with importing():
            from deepgrpo.train.loop import train

        train(config, resume=command.resume, step=command.step)
    return 0


def _config(command: Train, overrides: Overrides) -> Config:
    if command.recipe is None and command.resume is None:
        raise ConfigError(
            "deepgrpo train needs a recipe\nusage: deepgrpo train RECIPE [--section.key VALUE ...], "
            "or: deepgrpo train --resume RUN_DIR; `deepgrpo recipes` lists recipes, `deepgrpo train --help` explains more"
        )
    if command.step is not None and (command.resume is None or command.step < 0):
        raise ConfigError(
            f"--step is {command.step}; it names a checkpoint of the run to resume, so it needs --resume RUN_DIR and a step "
            "that has one, or 0"
        )
    if command.recipe is not None and command.resume is not None:
        raise ConfigError(
            f"deepgrpo train was given the recipe {command.recipe!r} and --resume {str(command.resume)!r}; a resumed "
            "run uses its own config.toml, so drop the recipe (--section.key VALUE still changes single values)"
        )
    if command.resume is not None:
        paths = RunDir(command.resume)
        if not paths.has_recipe():
            raise ConfigError(
                f"--resume {str(command.resume)!r} has no config.toml; name the directory of an earlier run, "
                "e.g. runs/demo"
            )
        return load_run_recipe(paths, overrides)
    assert command.recipe is not None  # checked above
    return load_recipe(shipped.find_recipe(command.recipe), overrides)


def run_recipes(command: Recipes) -> int:
    """List the shipped recipes, or print one."""
    if command.name is not None:
        sys.stdout.write(shipped.shipped_recipe(command.name).read_text(encoding="utf-8"))
        return 0
    columns = max(shutil.get_terminal_size().columns, NARROWEST)
    print(shipped.describe_recipes(columns if sys.stdout.isatty() else None))
    return 0


if __name__ == "__main__":
    sys.exit(main())
