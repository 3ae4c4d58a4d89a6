"""The command line. Nothing here loads torch before a command has been understood.

    deepgrpo train RECIPE [--section.key VALUE ...]   train a model by a recipe
    deepgrpo eval MODEL --data SOURCE                  accuracy and pass@k of a model
    deepgrpo recipes [NAME]                            the recipes that come along
    deepgrpo doctor MODEL                              what can be done with a model
    deepgrpo profile RECIPE [--section.key VALUE ...]  where the seconds of a step go
    deepgrpo compare EXPERIMENT.toml                   arms × seeds at equal sampled tokens
    deepgrpo probe MODEL --data SOURCE                 whether pivots would help, before any training
    deepgrpo report RUN ...                            one HTML page about runs, with every saved tree
    deepgrpo inspect RUN --step N --prompt ID          a tree in the terminal

Exit codes: 0 done, 1 the command could not go on, 2 it was called wrongly, 130 interrupted with Ctrl-C.
With DEEPGRPO_DEBUG=1 in the environment an error shows its traceback.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from deepgrpo import __version__
from deepgrpo.config import Config, load_recipe, shipped
from deepgrpo.config.explain import describe_keys, section_names
from deepgrpo.errors import ConfigError, DeepGRPOError
from deepgrpo.eval.options import EvalOptions
from deepgrpo.lab.options import CompareOptions, DoctorOptions, ProbeOptions, ProfileOptions
from deepgrpo.report.options import InspectOptions, ReportOptions
from deepgrpo.runs.layout import RunDir

Overrides = list[tuple[str, str]]
_STYLE = (tyro.conf.FlagCreatePairsOff, tyro.conf.PositionalMetavarFromFieldName)


_OVERRIDES = """
Any key of the recipe can be set on the command line:

  --optim.lr 3e-5  --explore.gamma=-20     a value, read as TOML; a string where it is none
  --sampling.stop '["\\n\\n"]'               a list
  --explore '{type = "root"}'              a table in place of the recipe's
  --warmstart none                         a value or a table taken away

`deepgrpo train --help-config` lists all keys, `--help-config explore` those of a section.
"""


@dataclass(frozen=True)
class Train:
    """Train a model by a recipe, or go on with a run."""

    recipe: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="[RECIPE]", help_behavior_hint="")] = None
    """Path of a TOML file, or the name of a recipe that comes along, such as demo."""
    dry_run: Annotated[bool, tyro.conf.arg(help_behavior_hint="")] = False
    """Show what the run would do and need, without loading weights; train nothing."""
    resume: Annotated[Path | None, tyro.conf.arg(metavar="RUN_DIR", help_behavior_hint="")] = None
    """Go on with the run in this directory, by its own config.toml; no RECIPE is given."""
    help_config: Annotated[str | None, tyro.conf.arg(metavar="[SECTION]", help_behavior_hint="")] = None
    """List every key of a recipe, or of one section, with type, default and meaning."""


@dataclass(frozen=True)
class Recipes:
    """List the recipes that come along, or print one."""

    name: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="[NAME]", help_behavior_hint="")] = None
    """Print this recipe, e.g. `deepgrpo recipes demo > mine.toml`."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; a call that cannot be parsed leaves with SystemExit(2)."""
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # libraries' bars have no place in a log file
    try:
        return _run(list(sys.argv[1:] if argv is None else argv))
    except DeepGRPOError as error:
        if os.environ.get("DEEPGRPO_DEBUG") == "1":
            raise
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # the reader has gone (`| head`): nothing is left to say, also not when Python flushes at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _run(arguments: list[str]) -> int:
    if arguments == ["--version"]:
        print(f"deepgrpo {__version__}")
        return 0
    if arguments[:1] == ["train"]:
        rest, overrides = split_overrides(arguments[1:])
        options = tyro.cli(
            Train,
            prog="deepgrpo train",
            description=f"{Train.__doc__}\n{_OVERRIDES}",
            args=_give_value(rest, "--help-config", "all"),
            config=_STYLE,
        )
        return _train(options, overrides)
    overrides = []
    if arguments[:1] == ["profile"]:
        arguments, overrides = split_overrides(arguments)
    if arguments[:1] == ["probe"]:
        # its --data is an option of its own, and no section of a recipe
        arguments, overrides = split_overrides(arguments, sections=False)
    command = tyro.extras.subcommand_cli_from_dict(
        {
            "train": Train, "eval": EvalOptions, "recipes": Recipes, "doctor": DoctorOptions,
            "profile": ProfileOptions, "compare": CompareOptions, "probe": ProbeOptions, "report": ReportOptions,
            "inspect": InspectOptions,
        },
        prog="deepgrpo",
        description="Reinforcement learning that chooses where to explore. Start with: deepgrpo train demo",
        args=arguments or ["--help"],
        config=_STYLE,
    )
    if isinstance(command, Recipes):
        return _recipes(command)
    if isinstance(command, DoctorOptions):
        from deepgrpo.lab.doctor import run_doctor

        return run_doctor(command)
    if isinstance(command, CompareOptions):
        from deepgrpo.lab.compare.command import run_compare

        return run_compare(command)
    if isinstance(command, ProfileOptions):
        from deepgrpo.lab.profile import run_profile

        return run_profile(command, overrides)
    if isinstance(command, ProbeOptions):
        from deepgrpo.lab.probe.command import run_probe

        return run_probe(command, overrides)
    if isinstance(command, ReportOptions):
        from deepgrpo.report.command import run_report

        return run_report(command)
    if isinstance(command, InspectOptions):
        from deepgrpo.report.inspect import run_inspect

        return run_inspect(command)
    from deepgrpo.eval.command import evaluate_model

    return evaluate_model(command)


def _train(command: Train, overrides: Overrides) -> int:
    if command.help_config is not None:
        sys.stdout.write(describe_keys(None if command.help_config == "all" else command.help_config))
        return 0
    config = _config(command, overrides)
    if command.dry_run:
        from deepgrpo.train.dry_run import dry_run

        dry_run(config)
    elif config.cluster is not None:
        from deepgrpo.cluster.run import train_on_cluster

        train_on_cluster(config, resume=command.resume)
    else:
        from deepgrpo.train.loop import train

        train(config, resume=command.resume)
    return 0


def _config(command: Train, overrides: Overrides) -> Config:
    if command.recipe is None and command.resume is None:
        raise ConfigError(
            "deepgrpo train needs a recipe\nusage: deepgrpo train RECIPE [--section.key VALUE ...], "
            "or: deepgrpo train --resume RUN_DIR; `deepgrpo recipes` lists recipes, `deepgrpo train --help` tells more"
        )
    if command.recipe is not None and command.resume is not None:
        raise ConfigError(
            f"deepgrpo train was given the recipe {command.recipe!r} and --resume {str(command.resume)!r}; a resumed "
            "run goes on by its own config.toml, so drop the recipe (--section.key VALUE still changes single values)"
        )
    if command.resume is not None:
        paths = RunDir(command.resume)
        if not paths.has_recipe():
            raise ConfigError(
                f"--resume {str(command.resume)!r} has no config.toml; name the directory of an earlier run, "
                "e.g. runs/demo"
            )
        return load_recipe(paths.config, overrides)
    assert command.recipe is not None  # checked above
    return load_recipe(shipped.find_recipe(command.recipe), overrides)


def _recipes(command: Recipes) -> int:
    if command.name is not None:
        sys.stdout.write(shipped.shipped_recipe(command.name).read_text(encoding="utf-8"))
        return 0
    recipes = shipped.list_recipes()
    width = max(len(name) for name, _ in recipes)
    for name, comment in recipes:
        print(f"{name:<{width}}  {comment}")
    print("\nprint one: deepgrpo recipes NAME    run one: deepgrpo train NAME")
    return 0


def split_overrides(arguments: Sequence[str], *, sections: bool = True) -> tuple[list[str], Overrides]:
    """Take the `--section.key VALUE` and `--section.key=VALUE` pairs out of the arguments.

    An override is an option with a dot in its name, or one that is named like a section of the recipe; all
    others are left to the parser, so a misspelt option is an error and never an override.
    With `sections` off, the dot is what makes an override.

    >>> split_overrides(["demo", "--optim.lr", "1e-5", "--dry-run", "--warmstart=none"])
    (['demo', '--dry-run'], [('optim.lr', '1e-5'), ('warmstart', 'none')])

    Raises ConfigError if a value is missing.
    """
    rest: list[str] = []
    overrides: Overrides = []
    waiting = list(arguments)
    while waiting:
        argument = waiting.pop(0)
        key, equals, value = argument.removeprefix("--").partition("=")
        if not argument.startswith("--") or not ("." in key or (sections and key in section_names())):
            rest.append(argument)
            continue
        if not equals:
            # a single dash may begin a negative number, two begin the next option
            if not waiting or waiting[0].startswith("--"):
                raise ConfigError(f"--{key} has no value; write --{key} VALUE")
            value = waiting.pop(0)
        overrides.append((key, value))
    return rest, overrides


def _give_value(arguments: Sequence[str], option: str, value: str) -> list[str]:
    """Give an option its value where it was written without one."""
    given = list(arguments)
    if option in given:
        after = given.index(option) + 1
        if after == len(given) or given[after].startswith("-"):
            given.insert(after, value)
    return given


if __name__ == "__main__":
    sys.exit(main())
