"""The command line as a user meets it: real processes, their output and their exit codes."""

from __future__ import annotations

import doctest
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import Starter

import deepgrpo
from deepgrpo import arguments, cli
from deepgrpo.arguments import split_overrides
from deepgrpo.config import load_recipe, to_toml
from deepgrpo.config.shipped import find_recipe, list_recipes
from deepgrpo.errors import ConfigError

Run = Callable[..., subprocess.CompletedProcess[str]]
SRC = Path(deepgrpo.__file__).parents[1]
SHOWN = {"COLUMNS": "100", "NO_COLOR": "1"}


def environment() -> dict[str, str]:
    # whatever directory a test runs in, it is this package that is meant
    return {**os.environ, "PYTHONPATH": str(SRC), **SHOWN}


def fresh(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run an interpreter of its own; the commands of the other tests are forks (commands.py)."""
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=280, env=environment())


@pytest.fixture
def run(commands: Starter, tmp_path: Path) -> Run:
    """Runs a command of `deepgrpo` in an empty directory."""
    return lambda *arguments, **extra: commands.run(*arguments, cwd=tmp_path, **SHOWN, **extra)


def words(text: str) -> str:
    """Output without its frames and line breaks."""
    return " ".join(text.replace("│", " ").split())


# ---------------------------------------------------------------- help


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), ("usage: deepgrpo", "train", "eval", "recipes", "Start with: deepgrpo train demo")),
        (("--help",), ("usage: deepgrpo", "Train a model by a recipe", "List the shipped recipes")),
        (
            ("train", "--help"),
            ("[RECIPE]", "--dry-run", "--resume RUN_DIR", "--optim.lr 3e-5", "read as TOML", "--warmstart none",
             "--help-config"),
        ),
        (("eval", "--help"), ("usage: deepgrpo eval", "MODEL", "--data")),
        (("recipes", "--help"), ("usage: deepgrpo recipes", "[NAME]")),
        (("--version",), (f"deepgrpo {deepgrpo.__version__}",)),
        (("train", "--help-config"), ("[run]", "optim.lr = 1e-06 (number > 0)", "Weight of the branch stream.")),
        (("train", "--help-config", "explore.segments"), ("explore.segments.size = 50 (integer > 0)",)),
        (("train", "demo", "--help-config", "--dry-run"), ("[run]",)),
    ],
)  # fmt: skip
def test_help_answers(run: Run, arguments: tuple[str, ...], says: tuple[str, ...]) -> None:
    done = run(*arguments)
    assert (done.returncode, done.stderr) == (0, "")
    for part in says:
        assert part in words(done.stdout)


LIGHT = [[], ["--help"], ["train", "--help"], ["train", "--help-config"], ["eval", "--help"], ["recipes"]]


def test_help_loads_no_torch_and_answers_at_once() -> None:
    """All commands in one interpreter, in their order: what one of them loads stands in its line and in those after it."""
    code = (
        "import sys, time\n"
        "from deepgrpo.cli import main\n"
        "before = 0.0\n"
        f"for arguments in {LIGHT}:\n"
        "    try: main(arguments)\n"
        "    except SystemExit: pass\n"
        "    heavy = {'torch', 'transformers', 'math_verify', 'datasets', 'peft', 'pebble', 'sympy'} & set(sys.modules)\n"
        "    now = time.process_time()  # seconds of the processor: the machine may be busy with other tests\n"
        "    print('used', now - before, arguments, sorted(heavy), file=sys.stderr)\n"
        "    before = now\n"
    )
    done = fresh("-c", code)
    lines = [line.split(maxsplit=2) for line in done.stderr.splitlines() if line.startswith("used ")]
    assert [rest for _, _, rest in lines] == [f"{arguments} []" for arguments in LIGHT], done.stdout + done.stderr
    assert max(float(seconds) for _, seconds, _ in lines) < 2.0


def test_a_command_in_an_interpreter_of_its_own() -> None:
    done = fresh("-m", "deepgrpo.cli", "recipes", "demo")
    assert (done.returncode, done.stdout, done.stderr) == (0, find_recipe("demo").read_text(), "")


def test_the_package_itself_is_light() -> None:
    code = (
        "import sys, deepgrpo\n"
        "print(sorted({'torch', 'pydantic', 'numpy'} & set(sys.modules)))\n"
        "print(deepgrpo.Config.__module__, deepgrpo.Ledger().sampled_tokens, 'torch' in sys.modules)\n"
        "print(all(hasattr(deepgrpo, name) for name in dir(deepgrpo)))"
    )
    done = fresh("-c", code)
    assert done.stdout.splitlines() == ["[]", "deepgrpo.config.recipe 0 False", "True"]


# ---------------------------------------------------------------- recipes


def test_recipes_are_listed_with_their_first_line(run: Run) -> None:
    done = run("recipes")
    assert done.returncode == 0
    for name, comment in list_recipes():
        assert f"{name} " in done.stdout
        assert comment in done.stdout


def test_a_recipe_is_printed_as_it_is(run: Run) -> None:
    done = run("recipes", "demo")
    assert (done.returncode, done.stdout) == (0, find_recipe("demo").read_text())


def test_a_reader_that_stops_early_is_no_error() -> None:
    command = f'"{sys.executable}" -m deepgrpo.cli train --help-config | head -1'
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=280, env=environment())
    assert (done.stdout, done.stderr) == ("[run]\n", "")


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("train",), "error: deepgrpo train needs a recipe usage: deepgrpo train RECIPE"),
        (("train", "dmo"), "error: recipe 'dmo' does not exist; did you mean 'demo'?"),
        (("train", "missing.toml"), "error: recipe 'missing.toml' does not exist; `deepgrpo recipes` lists"),
        (("recipes", "dmo"), "did you mean 'demo'?"),
        (("recipes", "missing.toml"), "error: recipe 'missing.toml' does not exist"),
        (("train", "demo", "--dry-rn"), "Perhaps you meant: --dry-run"),
        (("train", "demo", "--explre.gamma", "2"), "did you mean 'explore'?"),
        (("train", "demo", "--explore.gama", "2"), "key 'explore.gama' (value 2); did you mean 'explore.gamma'?"),
        (("train", "demo", "--optim.lr=fast"), "optim.lr is 'fast'; it should be"),
        (("train", "demo", "--optim.lr"), "error: --optim.lr has no value; write --optim.lr VALUE"),
        (("train", "demo", "--optim.lr", "--dry-run"), "error: --optim.lr has no value"),
        (("train", "demo", "extra"), "Unrecognized options: extra"),
        (("train", "--resume", "nowhere"), "error: --resume 'nowhere' has no config.toml; name the directory"),
        (("train", "demo", "--resume", "runs/demo"), "so drop the recipe"),
        (("train", "--help-config", "explor"), "did you mean 'explore'?"),
        (("eval",), "MODEL"),
        (("trian",), "Available subcommands: train, eval, recipes"),
        (("recipes", "--nmae"), "Unrecognized options: --nmae"),
    ],
)
def test_a_wrong_call_says_what_is_wrong(run: Run, arguments: tuple[str, ...], says: str) -> None:
    done = run(*arguments)
    told = words(done.stderr + done.stdout)
    assert says in told
    assert "Traceback" not in told
    assert done.returncode == 2
    # what goes wrong never goes into a pipe
    assert done.stdout == ""


def test_a_broken_recipe_is_an_error_without_a_traceback(run: Run, tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text("[run\n")
    done = run("train", "mine.toml")
    assert done.returncode == 2
    assert done.stderr.startswith("error: recipe 'mine.toml' is not valid TOML")
    assert "Traceback" not in done.stderr


def test_the_traceback_is_there_when_asked_for(run: Run) -> None:
    done = run("train", "dmo", DEEPGRPO_DEBUG="1")
    assert done.returncode == 1
    assert "Traceback" in done.stderr


def test_ctrl_c_leaves_with_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(arguments: list[str]) -> int:
        signal.raise_signal(signal.SIGINT)
        return 0

    monkeypatch.setattr(cli, "_run", interrupted)
    # what a shell starts in the background ignores SIGINT, and these tests with it
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert cli.main([]) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert capsys.readouterr().err == "interrupted\n"


# ---------------------------------------------------------------- what a command is given


def test_overrides_are_taken_out_of_the_arguments() -> None:
    assert doctest.testmod(arguments).failed == 0
    overrides = ["--explore.gamma", "-20", "--a.b=c=d", "--sampling.stop", "[]"]
    assert split_overrides([*overrides, "x", "--resume=r.toml", "--help-config"]) == (
        ["x", "--resume=r.toml", "--help-config"],
        [("explore.gamma", "-20"), ("a.b", "c=d"), ("sampling.stop", "[]")],
    )


def test_a_recipe_and_its_overrides_become_a_config() -> None:
    config = cli._config(cli.Train(recipe="demo"), [("run.steps", "3"), ("explore", '{type = "root"}')])
    assert (config.run.name, config.run.steps, config.explore.type) == ("demo", 3, "root")


def test_a_resumed_run_goes_on_by_its_own_config(tmp_path: Path) -> None:
    written = load_recipe(find_recipe("demo"), [("run.seed", "5")])
    (tmp_path / "config.toml").write_text(to_toml(written))
    assert cli._config(cli.Train(resume=tmp_path), []) == written
    assert cli._config(cli.Train(resume=tmp_path), [("run.steps", "99")]).run.steps == 99


@pytest.mark.parametrize("options", [cli.Train(), cli.Train(recipe="demo", resume=Path("runs/demo"))])
def test_a_recipe_or_a_run_but_not_both(options: cli.Train) -> None:
    with pytest.raises(ConfigError):
        cli._config(options, [])


def test_errors_in_this_process(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "dmo"]) == 2
    assert capsys.readouterr().err == "error: recipe 'dmo' does not exist; did you mean 'demo'?\n"
    assert cli.main(["recipes"]) == 0
    assert cli.main(["recipes", "demo"]) == 0
    assert cli.main(["train", "--help-config", "log"]) == 0
    assert cli.main(["--version"]) == 0
