"""Damage of a run directory: each file missing, cut, overwritten, replaced; each directory likewise; wrong values inside.

`damages()` returns (name, function of the run directory) pairs; `build(place)` makes the run that they are made for, and
`outcome(command, run)` runs one command of `COMMANDS` on it. A command may succeed or end in a sentence; a traceback or a
hang is a fault.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import os
import shutil
import traceback
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RECIPE = """
[run]
name = "run"
dir = "runs"
steps = 2
prompts_per_step = 4
device = "cpu"

[model]
type = "scratch"
hidden_size = 32
intermediate_size = 64
num_layers = 2
num_heads = 2
max_position = 96

[data]
type = "synthetic"
chain_length = 1
size = 8

[reward]
type = "task"

[sampling]
max_new_tokens = 12

[explore]
type = "deep"
num_rollouts = 8
branches_per_pivot = 2

[explore.segments]
type = "tokens"
size = 3

[explore.recoverability]
window = 20
min_items = 4

[warmstart]
""" + (WARMSTART := "steps = 100\nbatch_size = 16\nlr = 1e-2\n") + """
[optim]
lr = 1e-3

[loss]
beta = 0.01

[eval]
every = 1
limit = 4

[eval.data]
type = "synthetic"
chain_length = 1
split = "test"
size = 8

[checkpoint]
every = 1
keep_last = 2

[log]
trees_every = 1
"""

EXPERIMENT = """
name = "pair"
budget = 1
seeds = [0, 1]
baseline = "deep"
base = "base.toml"

[final]
limit = 4
sampled_limit = 2
samples = 2
k = [1, 2]

[arms.deep]

[arms.root]
explore = {type = "root", num_rollouts = 4}
"""

Damage = Callable[[Path], object]
STEP = "checkpoints/step-000002"
FILES = (
    "config.toml", "metrics.jsonl", "log.txt", "final.json", "trees/step-000002.jsonl.gz", "eval/step-000002.jsonl",
    "start/checksums.json",
    "start/config.json", "start/model.safetensors", "start/tokenizer.json", f"{STEP}/state.json",
    f"{STEP}/optimizer.safetensors", f"{STEP}/model/config.json", f"{STEP}/model/model.safetensors",
    f"{STEP}/model/tokenizer.json", f"{STEP}/model/tokenizer_config.json", f"{STEP}/model/generation_config.json",
)  # fmt: skip
FOLDERS = ("trees", "eval", "checkpoints", STEP, f"{STEP}/model", "start")
COMMANDS: dict[str, tuple[str, ...]] = {
    "resume": ("train", "--resume", "RUN", "--run.steps", "3"),
    "eval": ("eval", "RUN", "--limit", "2"),
    "report": ("report", "RUN"),
    "inspect": ("inspect", "RUN"),
    "inspect step": ("inspect", "RUN", "--step", "2", "--prompt", "0"),
    "compare": ("compare", "pair.toml"),
    "probe": ("probe", "RUN", "--prompts", "8", "--reference", "8", "--projection", "64", "--strategies", "root"),
}


def build(place: Path) -> Path:
    """A run of two steps with everything in it: a warm start, two checkpoints, trees, evaluations, a final evaluation.

    It can also be an arm of the experiment `pair.toml` beside it.
    """
    from deepgrpo import cli
    from deepgrpo.lab.compare.final_eval import measure

    (place / "recipe.toml").write_text(RECIPE)
    (place / "base.toml").write_text(_from(str(place / "runs" / "warm" / "start")))
    (place / "pair.toml").write_text(EXPERIMENT)
    with contextlib.chdir(place), contextlib.redirect_stdout(io.StringIO()):
        assert cli.main(["train", "recipe.toml", "--run.name", "warm", "--run.steps", "0"]) == 0
        assert cli.main(["train", "base.toml"]) == 0
        measure(Path("runs/run"), _plan().final)
    return place / "runs" / "run"


def _from(start: str) -> str:
    """The recipe with the weights of another run's warm start."""
    return RECIPE.replace(WARMSTART, f"from = {start!r}\n")


def _plan() -> Any:
    from deepgrpo.lab.compare.experiment import find_experiment, load_experiment
    from deepgrpo.lab.compare.plan import expand

    source = find_experiment("pair.toml")
    return expand(load_experiment(source), source)


@contextlib.contextmanager
def _as_arm(run: Path) -> Iterator[None]:
    """In the directory of an experiment whose first arm is this run; its jobs are not started."""
    from deepgrpo.lab.compare.jobs import Jobs

    place = run.parent / "experiment"
    shutil.rmtree(place, ignore_errors=True)
    arm = place / "runs" / "pair" / "arms" / "deep" / "seed-0"
    arm.parent.mkdir(parents=True)
    arm.symlink_to(run)
    (place / "base.toml").write_text(_from("start"))
    (place / "pair.toml").write_text(EXPERIMENT)
    original, Jobs.run = Jobs.run, lambda self, changed, tick: None  # type: ignore[method-assign]
    try:
        with contextlib.chdir(place):
            yield
    finally:
        Jobs.run = original  # type: ignore[method-assign]


@dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    code: int
    said: str
    fault: str | None = None
    """A traceback, or what is wrong with the answer; None if the command succeeded or ended in a sentence."""

    @property
    def sentence(self) -> str:
        """The error message; empty if there is none."""
        lines = [line for line in self.said.splitlines() if line.startswith("error: ")]
        return lines[0].removeprefix("error: ") if lines else ""


def outcome(command: str, run: Path) -> Outcome:
    """Run a command in this process on a run directory."""
    from deepgrpo import cli

    out = io.StringIO()
    there = _as_arm(run) if command == "compare" else contextlib.nullcontext()
    try:
        with there, contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            code = cli.main([str(run) if each == "RUN" else each for each in COMMANDS[command]])
    except SystemExit as left:
        code = left.code if isinstance(left.code, int) else 1
    except BaseException:
        return Outcome(70, out.getvalue(), traceback.format_exc())
    said = out.getvalue()
    if code and len(Outcome(code, said).sentence) < 30 and command != "compare":  # it ends with 1 while an arm is missing
        return Outcome(code, said, f"exit code {code} without a sentence: {said[-300:]!r}")
    return Outcome(code, said, "a traceback in the output" if "Traceback (most recent call last)" in said else None)


# ---------------------------------------------------------------- whole files and directories


def _gone(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def _half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _flip(path: Path) -> None:
    """One bit in the middle; the file keeps its length."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _dangling(path: Path) -> None:
    _gone(path)
    path.symlink_to("nowhere")


def _loop(path: Path) -> None:
    _gone(path)
    path.symlink_to(path.name)


def _file(path: Path) -> None:
    shutil.rmtree(path)
    path.write_text("a file")


def _emptied(path: Path) -> None:
    shutil.rmtree(path)
    path.mkdir()


def _garbage(path: Path) -> None:
    path.write_bytes(bytes((7 * i * i + 3 * i) % 256 for i in range(400)))


OF_FILES: dict[str, Damage] = {
    "missing": _gone, "empty": lambda path: path.write_bytes(b""), "cut in half": _half, "a flipped bit": _flip,
    "garbage": _garbage, "zeros": lambda path: path.write_bytes(b"\0" * 300), "a directory": _folder,
    "a dangling link": _dangling, "a link to itself": _loop,
    "UTF-16": lambda path: path.write_text("[run]\n", encoding="utf-16"),
    "a JSON list": lambda path: path.write_text("[1, 2]\n"), "a JSON number": lambda path: path.write_text("3\n"),
    "deeply nested": lambda path: path.write_text("[" * 20_000),
}  # fmt: skip
OF_FOLDERS: dict[str, Damage] = {
    "missing": _gone, "a file": _file, "empty": _emptied, "a dangling link": _dangling, "a link to itself": _loop
}  # fmt: skip


# ---------------------------------------------------------------- values


def _state(change: Callable[[dict[str, Any]], object], *, seal: bool = True) -> Damage:
    """Change the newest state; with `seal`, its checksum fits again, as that of another version would."""

    def damage(run: Path) -> None:
        path = run / STEP / "state.json"
        state = json.loads(path.read_text())
        change(state)
        if seal:
            state.pop("crc32", None)
            state["crc32"] = f"{zlib.crc32(json.dumps(state, sort_keys=True).encode()):08x}"
        path.write_text(json.dumps(state))

    return damage


def _put(*keys: str, value: Any) -> Callable[[dict[str, Any]], object]:
    def change(state: dict[str, Any]) -> None:
        for key in keys[:-1]:
            state = state[key]
        state[keys[-1]] = value

    return change


STATES: dict[str, Callable[[dict[str, Any]], object]] = {
    "a field is missing": lambda state: state.pop("cursor"),
    "a field of the ledger is missing": lambda state: state["ledger"].pop("sampled_tokens"),
    "a field too many": _put("coffee", value=1),
    "a field of the ledger too many": _put("ledger", "coffee", value=1),
    "a wrong step": _put("step", value=7),
    "a text for a number": _put("step", value="2"),
    "a list for a table": _put("ledger", value=[]),
    "a table for a number": _put("optimizer_steps", value={"a": 1}),
    "a truth value for a number": _put("step", value=True),
    "a fraction for a count": _put("optimizer_steps", value=1.5),
    "a null": _put("cursor", value=None),
    "a negative number": _put("ledger", "sampled_tokens", value=-5),
    "a negative position": _put("cursor", "position", value=-3),
    "NaN": _put("best_value", value=float("nan")),
    "infinity": _put("ledger", "seconds_learn", value=float("inf")),
    "a huge number": _put("optimizer_steps", value=10**30),
    "a huge position": _put("cursor", "position", value=10**40),
    "a cursor without position": _put("cursor", value={"epoch": 0}),
    "a negative position in a source": _put("cursor", "sources", value=[{"epoch": 0, "position": -1}]),
    "a source that is no cursor": _put("cursor", "sources", value=[3]),
    "sources that are no list": _put("cursor", "sources", value={}),
    "a place that is no table": _put("cursor", "place", value=3),
    "a nested strategy": _put("strategy", value={"a": {"b": {"c": [1]}}}),
    "the state of another strategy": _put("strategy", value={}),
    "a health without its fields": _put("health", value={"dead": "many"}),
    "another version": _put("format", value=99),
    "no version": lambda state: state.pop("format"),
    "no checksums": lambda state: state.pop("files"),
    "checksums of elsewhere": _put("files", value={"../../config.toml": {"bytes": 1, "crc32": "0"}}),
}  # fmt: skip


def _metrics(change: Callable[[list[str]], list[str]]) -> Damage:
    def damage(run: Path) -> None:
        path = run / "metrics.jsonl"
        path.write_text("".join(change(path.read_text().splitlines(keepends=True))))

    return damage


def _metric(key: str, value: Any) -> Damage:
    """Every line has this value."""
    return _metrics(lambda lines: [json.dumps({**json.loads(line), key: value}) + "\n" for line in lines])


METRICS: dict[str, Damage] = {
    "half a line": _metrics(lambda lines: [*lines[:-1], lines[-1][:40]]),
    "a half line within": _metrics(lambda lines: [lines[0][:40] + "\n", *lines[1:]]),
    "each line twice": _metrics(lambda lines: [*lines, *lines]),
    "other steps": _metrics(lambda lines: [line.replace('"step": ', '"step": 9') for line in lines]),
    "a step that is text": _metric("step", "two"),
    "a negative step": _metric("step", -4),
    "a huge step": _metric("step", 10**40),
    "an infinite step": _metrics(lambda lines: [*lines, '{"step": Infinity}\n', '{"step": 1e400}\n']),
    "a text": _metric("main/reward", "high"),
    "a text for an evaluation": _metric("eval/greedy", "high"),
    "a table": _metric("main/mixed", {"a": 1}),
    "a list": _metric("eval/greedy", [1, 2]),
    "a truth value": _metric("main/reward", True),
    "NaN": _metrics(lambda lines: [line.replace('"main/entropy": ', '"main/entropy": NaN, "x": ') for line in lines]),
    "a text for a histogram": _metric("pivots/ratio_histogram", "many"),
    "a short histogram": _metric("pivots/ratio_histogram", [1]),
    "texts in a histogram": _metric("pivots/rescue_by_ratio", ["a"] * 10),
    "a number for the warnings": _metric("warnings", 5),
    "a text for the fit": _metric("recoverability/w", "steep"),
    "a text for the ledger": _metric("ledger/sampled_tokens", "many"),
    "huge numbers": _metric("main/reward", 10**400),
}


def _config(change: Callable[[str], str]) -> Damage:
    def damage(run: Path) -> None:
        path = run / "config.toml"
        path.write_text(change(path.read_text()))

    return damage


CONFIGS: dict[str, Damage] = {
    "of another tool": _config(lambda text: '[tool.poetry]\nname = "x"\n'),
    "an unknown key": _config(lambda text: text + "\n[coffee]\ncups = 2\n"),
    "half a table": _config(lambda text: text[: len(text) // 2] + "\n[run"),
    "a wrong type": _config(lambda text: text.replace("steps = 2", 'steps = "two"')),
    "a list for a table": _config(lambda text: "explore = [1]\nlog = 3\nrun = 'x'\nmodel = []\n"),
    "a text for the threshold": _config(lambda text: text.replace("success_threshold = 0.0", 'success_threshold = "high"')),
    "a text for the trees": _config(lambda text: text.replace("trees_every = 1", 'trees_every = "often"')),
    "a wider model": _config(lambda text: text.replace("hidden_size = 32", "hidden_size = 64")),
    "another strategy": _config(lambda text: text.replace('type = "deep"', 'type = "root"')),
}


def _trees(change: Callable[[list[dict[str, Any]]], object]) -> Damage:
    def damage(run: Path) -> None:
        path = run / "trees" / "step-000002.jsonl.gz"
        lines = [json.loads(line) for line in gzip.decompress(path.read_bytes()).decode().splitlines()]
        found = change(lines)
        path.write_bytes(gzip.compress("".join(json.dumps(each) + "\n" for each in (found or lines)).encode()))  # type: ignore[attr-defined]

    return damage


def _nodes(**values: Any) -> Callable[[list[dict[str, Any]]], object]:
    return lambda lines: [node.update(values) for line in lines for node in line["nodes"]] and None


def _pivots(**values: Any) -> Callable[[list[dict[str, Any]]], object]:
    return lambda lines: [pivot.update(values) for line in lines for pivot in line["pivots"]] and None


TREES: dict[str, Damage] = {
    "not compressed": lambda run: (run / "trees/step-000002.jsonl.gz").write_text("{}\n"),
    "no line": _trees(lambda lines: []),
    "a number for a line": _trees(lambda lines: [3, 4]),
    "no nodes": _trees(lambda lines: [line.update(nodes=[]) for line in lines] and None),
    "a parent that is not there": _trees(_nodes(parent=99)),
    "a parent that is itself": _trees(lambda lines: [line["nodes"][0].update(parent=0) for line in lines] and None),
    "an offset beyond the end": _trees(_nodes(offset=9999)),
    "a pivot that is not there": _trees(_nodes(pivot=99)),
    "negative tokens": _trees(_nodes(tokens=[-5, -6])),
    "huge tokens": _trees(_nodes(tokens=[10**12])),
    "fewer log-probs than tokens": _trees(_nodes(logprobs=[])),
    "no pivots": _trees(lambda lines: [line.update(pivots=[]) for line in lines] and None),
    "a pivot of nobody": _trees(_pivots(parent=77)),
    "a ratio beyond one": _trees(_pivots(ratio=7.0)),
    "a negative ratio": _trees(_pivots(ratio=-1.0)),
    "candidates without Q": _trees(_pivots(q=[])),
    "credit of nobody": _trees(lambda lines: [s.update(node=55) for line in lines for s in line["credit"]] and None),
    "credit beyond the end": _trees(lambda lines: [s.update(end=999) for line in lines for s in line["credit"]] and None),
    "a huge reward": _trees(_nodes(score={"value": 1e308, "parsed": True, "passed": True, "problem": None})),
}  # fmt: skip


def _foreign_weights(run: Path, file: str) -> None:
    """Weights of the same shapes from another model."""
    from safetensors.torch import load_file, save_file

    found = load_file(run / file)
    save_file({name: tensor + 0.01 for name, tensor in found.items()}, run / file, metadata={"format": "pt"})


def _older_inside(run: Path) -> None:
    """Everything of step 1 under the name of step 2."""
    shutil.rmtree(run / STEP)
    shutil.copytree(run / "checkpoints" / "step-000001", run / STEP)


LAYOUT: dict[str, Damage] = {
    "an empty newer checkpoint": lambda run: (run / "checkpoints" / "step-000099").mkdir(),
    "a newer checkpoint that is a file": lambda run: (run / "checkpoints" / "step-000099").write_text("x"),
    "a newer checkpoint that leads nowhere": lambda run: (run / "checkpoints" / "step-000099").symlink_to("nowhere"),
    "step 1 as step 2": _older_inside,
    "half-written and half-deleted checkpoints": lambda run: [
        (run / "checkpoints" / name / "model").mkdir(parents=True) for name in (".tmp-step-000003", ".old-step-000001")
    ],
    "a leftover that is a file": lambda run: (run / "checkpoints" / ".tmp-step-000003").write_text("x"),
    "names of other things": lambda run: [
        (run / "checkpoints" / name).mkdir() for name in ("notes", "step-2", "step-٠٠٠٠٠٩", "step-0000002")
    ],
    "a name that is no UTF-8": lambda run: os.mkdir(os.fsencode(run / "trees") + b"/step-\xff.jsonl.gz"),
    "a tree file of a late step": lambda run: shutil.copy(
        run / "trees/step-000002.jsonl.gz", run / "trees/step-000077.jsonl.gz"
    ),
    "an evaluation that is a directory": lambda run: (run / "eval" / "step-000003.jsonl").mkdir(),
    "trees that are a directory": lambda run: (run / "trees" / "step-000003.jsonl.gz").mkdir(),
    "a report that is a directory": lambda run: (run / "report.html").mkdir(),
    "a final evaluation without figures": lambda run: _final(run, "metrics", {}),
    "a final evaluation with texts": lambda run: _final(run, "metrics", {"eval/greedy": "high"}),
    "a final evaluation of another step": lambda run: _final(run, "step", 1),
    "a lock that is a directory": lambda run: (run / ".lock").mkdir(),
    "a lock with garbage": lambda run: _garbage(run / ".lock"),
    "weights of another run": lambda run: _foreign_weights(run, f"{STEP}/model/model.safetensors"),
    "moments of another run": lambda run: _foreign_moments(run),
    "a start model of another run": lambda run: _foreign_weights(run, "start/model.safetensors"),
    "nothing at all": lambda run: (shutil.rmtree(run), run.mkdir()),
    "no directory": lambda run: shutil.rmtree(run),
    "a file": lambda run: (shutil.rmtree(run), run.write_text("x")),
    "a dangling link": lambda run: (shutil.rmtree(run), run.symlink_to("nowhere")),
}


def _final(run: Path, key: str, value: Any) -> None:
    path = run / "final.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))


def _foreign_moments(run: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = run / STEP / "optimizer.safetensors"
    save_file({n: t if n == "torch_random_state" else t * 2 for n, t in load_file(path).items()}, path)


def damages() -> list[tuple[str, Damage]]:
    """Every damage by name, each of a fresh copy of the run that `build` makes."""

    def at(name: str, damage: Damage) -> Damage:
        return lambda run: damage(run / name)

    found = [(f"{name}: {kind}", at(name, damage)) for name in FILES for kind, damage in OF_FILES.items()]
    found += [(f"{name}/: {kind}", at(name, damage)) for name in FOLDERS for kind, damage in OF_FOLDERS.items()]
    found += [(f"state: {name}", _state(change)) for name, change in STATES.items()]
    found += [(f"state, not sealed: {name}", _state(change, seal=False)) for name, change in STATES.items()]
    for title, table in (("metrics", METRICS), ("config", CONFIGS), ("trees", TREES), ("layout", LAYOUT)):
        found += [(f"{title}: {name}", damage) for name, damage in table.items()]
    return found
