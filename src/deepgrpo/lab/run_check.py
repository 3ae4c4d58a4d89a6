"""`deepgrpo doctor RUN`: is a run directory whole, and what to do next? Reads only, also while the run trains. No torch."""

from __future__ import annotations

import shutil
from collections.abc import Generator, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.text import Text

from deepgrpo.config import Config
from deepgrpo.errors import CheckpointError, ConfigError, DataError, DeepGRPOError
from deepgrpo.progress import phase
from deepgrpo.runs.checkpoints import Checkpoint, TrainState, saved_checkpoints
from deepgrpo.runs.files import has_leftovers
from deepgrpo.runs.layout import RunDir, shown
from deepgrpo.runs.lock import holder
from deepgrpo.runs.moved import load_run_recipe, moved_paths
from deepgrpo.runs.saved import SavedRun
from deepgrpo.runs.weights import damage_of_start
from deepgrpo.train.origin import resumed_origin

Verdict = Literal["ok", "note", "bad"]
_STYLES: dict[Verdict, str] = {"ok": "green", "note": "yellow", "bad": "red"}


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the answer. Example: Finding("ok", "lock", "no process trains here")."""

    verdict: Verdict
    part: str
    said: str


def check_run(directory: Path, out: Console) -> int:
    """Print what was found in a run directory, and the next command. Returns 1 if something is damaged, else 0."""
    run = RunDir(directory)
    found = []
    with phase("checking the run"):
        for each in findings(run):
            found.append(each)
            line = Text.assemble((f"{each.verdict:<5}", _STYLES[each.verdict]), f"{each.part:<12}", each.said)
            out.print(line, soft_wrap=not out.is_terminal)
    bad = any(each.verdict == "bad" for each in found)
    out.print(Text(f"\nnext: {_next(run, bad=bad)}"), soft_wrap=True)  # a command stays on one line, ready to copy
    return int(bad)


def findings(run: RunDir) -> Iterator[Finding]:
    """All findings about a run, cheap ones first."""
    held = holder(run)
    yield Finding("note", "lock", held) if held else Finding("ok", "lock", "no process trains here")
    config = None
    try:
        config = load_run_recipe(run)
        yield Finding("ok", "recipe", f"{run.config.name} can be read")
    except ConfigError as error:
        yield Finding("bad", "recipe", str(error))
    if config is not None:
        yield from (Finding("note", "moved", said) for said in moved_paths(run))
    saved = saved_checkpoints(run)
    whole = yield from _checkpoints(run, saved)
    yield from _start(run, config)
    yield from _metrics(run, whole)
    yield from _trees(run)
    if config is not None:
        yield from _origin(run, config, whole)
        yield from _room(run, config, saved)
    if not held and any(has_leftovers(folder) for folder in (run.path, run.checkpoints, run.tree_folder, run.eval_folder)):
        yield Finding("note", "left over", "files that a kill left half written; the next start deletes them")


def _checkpoints(run: RunDir, saved: list[Checkpoint]) -> Generator[Finding, None, TrainState | None]:
    """Yield a finding for each checkpoint; return the state of the newest one that is whole."""
    newest: TrainState | None = None
    for each in saved:
        try:
            newest = each.verify()
        except CheckpointError as error:
            yield Finding("bad", "checkpoint", str(error))
        else:
            best = ", the best so far" if newest.best_step == each.step else ""
            yield Finding("ok", "checkpoint", f"step {each.step}: all files are as they were written{best}")
    if not saved:
        yield Finding("note", "checkpoint", "none yet")
    return newest


def _start(run: RunDir, config: Config | None) -> Iterator[Finding]:
    if run.start.exists() or (config is not None and config.warmstart is not None):
        damage = damage_of_start(run)
        if damage is None:
            yield Finding("ok", "start", f"{shown(run.start)}: the start model is as it was written")
        else:
            needed: Verdict = "bad" if config is not None and config.loss.beta > 0 else "note"
            yield Finding(needed, "start", f"{shown(run.start)}: {damage}")


def _metrics(run: RunDir, newest: TrainState | None) -> Iterator[Finding]:
    if not run.has_metrics():
        yield Finding("note", "metrics", "none yet")
        return
    try:
        lines = SavedRun(run.path).metrics
        torn = sum(1 for line in run.metrics.open("rb") if line.strip()) - len(lines)
    except (DataError, OSError) as error:
        yield Finding("bad", "metrics", str(error))
        return
    last = lines[-1]["step"] if lines else 0
    said = f"{len(lines)} lines, up to step {last}"
    if torn > 0:
        yield Finding("note", "metrics", f"{said}; {torn} cannot be read or are repeated, as after a kill, and are left out")
    elif newest is not None and newest.step < last:
        yield Finding("ok", "metrics", f"{said}; a resume from step {newest.step} takes the steps after it again")
    else:
        yield Finding("ok", "metrics", said)


def _trees(run: RunDir) -> Iterator[Finding]:
    files = run.tree_files()
    if not files:
        yield Finding("note", "trees", "none saved")
        return
    count = 0
    with suppress(DataError):
        saved = SavedRun(run.path)
        damaged = []
        for step in files:
            try:
                count += sum(1 for _ in saved.trees(step))
            except DataError as error:
                damaged.append(Finding("bad", "trees", str(error)))
        yield from damaged
    yield Finding("ok", "trees", f"{count:,} trees of {len(files)} steps can be read")


def _origin(run: RunDir, config: Config, whole: TrainState | None) -> Iterator[Finding]:
    try:
        origin = resumed_origin(run, None, config)
    except DeepGRPOError as error:
        yield Finding("bad", "origin", str(error))
        return
    if origin.checkpoint is not None and (whole is None or whole.step != origin.step):
        said = f"a resume stops at the damaged checkpoint of step {origin.step}, unless --step names another"
        yield Finding("bad", "origin", said)
        return
    place = {"anew": "begins anew", "start": "begins with the start model"}.get(origin.kind, f"begins at step {origin.step}")
    yield Finding("ok", "origin", f"a resume {place}")


def _room(run: RunDir, config: Config, saved: list[Checkpoint]) -> Iterator[Finding]:
    """Compare the free space with what the coming checkpoints need: one more than are kept, while a new one is written."""
    free = shutil.disk_usage(run.path).free
    if not saved or _is_finished(run):
        yield Finding("ok", "disk", f"{_size(free)} free")
        return
    one = sum(file.stat().st_size for file in saved[-1].path.rglob("*") if file.is_file())
    wanted = one * max(1, config.checkpoint.keep_last + config.checkpoint.keep_best + 1 - len(saved))
    verdict: Verdict = "ok" if free > wanted else "bad"
    more = "" if free > wanted else "; make room, or lower checkpoint.keep_last"
    yield Finding(verdict, "disk", f"{_size(free)} free; a checkpoint takes {_size(one)}, those to come {_size(wanted)}{more}")


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def _is_finished(run: RunDir) -> bool:
    try:
        return SavedRun(run.path).is_finished()
    except DataError:
        return False


def _next(run: RunDir, *, bad: bool) -> str:
    at = shown(run.path)
    if holder(run):
        return f"wait for it to end; meanwhile: deepgrpo report {at}"
    if bad:
        return "see the lines marked bad: each names its remedy"
    if _is_finished(run):
        return f"the run is finished; look at it: deepgrpo report {at}, or measure it: deepgrpo eval {at}"
    return f"go on: deepgrpo train --resume {at}"
