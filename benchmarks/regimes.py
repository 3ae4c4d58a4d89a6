#!/usr/bin/env python
"""Static measurement of the regimes: each recipe is warm-started with several seeds, and measured before any reinforcement.

    python -m benchmarks.regimes --page docs/results/regimes.md   all of recipes/lab/regimes, and the tables of their page
    python -m benchmarks.regimes strict recovery --seeds 101      some of them
    python -m benchmarks.regimes base@0.2 base@0.7                another sampled accuracy at the end of the warm start
    python -m benchmarks.regimes --run runs/strict --target DIR   the newest checkpoint of a run, or its start

Writes DIR/NAME.json for each regime and the tables of the page. What has been made is kept in --runs (warm starts, samples),
so an interrupted measurement goes on where it stopped. One core, a minute or two per regime and seed.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.plot_distribution import put, table
from benchmarks.regime_figures import KS, Amounts, measure, summary
from deepgrpo.config import Config, GeneratedData, load_recipe
from deepgrpo.config.shipped import recipe_dir
from deepgrpo.lab.compare.jobs import Job, Jobs
from deepgrpo.lab.machine import machine_and_versions
from deepgrpo.runs.checkpoints import newest_checkpoint
from deepgrpo.runs.layout import RunDir
from deepgrpo.train.setup import Run, open_run

ORDER = ("base", "strict", "recovery", "recovery-at-once", "search", "facts", "late", "horizon")
BEGIN = "<!-- written by benchmarks/regimes.py -->"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "recipes", nargs="*", help="names of recipes/lab/regimes, NAME@ACCURACY, or paths; default: all"
    )
    parser.add_argument("--run", type=Path, help="measure this run's newest checkpoint, or its start, instead")
    parser.add_argument("--name", help="name of the figures of --run; default: that of the run")
    parser.add_argument("--runs", type=Path, default=Path("runs/regimes"), help="warm starts and samples")
    parser.add_argument(
        "--target", type=Path, default=Path("docs/results/lab/regimes"), help="directory of the figures"
    )
    parser.add_argument("--page", type=Path, help="page whose tables are replaced, made of all figures in --target")
    parser.add_argument("--seeds", type=int, nargs="+", default=[101, 102, 103])
    for name, value in Amounts.__dataclass_fields__.items():
        parser.add_argument(f"--{name}", type=int, default=value.default)
    options = parser.parse_args()
    amounts = Amounts(**{name: getattr(options, name) for name in Amounts.__dataclass_fields__})
    options.target.mkdir(parents=True, exist_ok=True)
    if options.run is not None:
        found = [measured_run(options.run, amounts, options.seeds[0])]
        publish(options.name or options.run.name, found, options.target, amounts)
    else:
        for name in options.recipes or ORDER:
            found = [measured(name, seed, options.runs, amounts) for seed in options.seeds]
            publish(Path(name).stem if name.endswith(".toml") else name, found, options.target, amounts)
    if options.page is not None:
        results = {path.stem: json.loads(path.read_text()) for path in options.target.glob("*.json")}
        order = {name: place for place, name in enumerate(ORDER)}
        names = sorted(results, key=lambda name: (order.get(name.partition("@")[0], len(order)), name))
        put(tables({name: results[name] for name in names}), options.page, BEGIN)


def recipe_path(name: str) -> Path:
    """A recipe by path, or by its name among the shipped regimes."""
    return Path(name) if name.endswith(".toml") else recipe_dir() / "lab" / "regimes" / f"{name.partition('@')[0]}.toml"


# ---------------------------------------------------------------- one policy


def measured(regime: str, seed: int, runs: Path, amounts: Amounts) -> dict[str, Any]:
    """Warm-start a regime with a seed and measure it, unless both are there already."""
    recipe, (_, _, accuracy) = recipe_path(regime), regime.partition("@")
    name = f"{recipe.stem}{'@' * bool(accuracy)}{accuracy}-{seed}"
    start, file = RunDir(runs / name), runs / f"{name}.json"
    if file.is_file():
        kept: dict[str, Any] = json.loads(file.read_text())
        return kept
    changes = [("run.dir", str(runs)), ("run.name", name), ("run.seed", f"{seed}"), ("run.steps", "0")]
    if isinstance(load_recipe(recipe).data, GeneratedData):
        changes.append(("data.seed", f"{seed}"))  # as `deepgrpo compare` does
    if accuracy:
        changes.append(("warmstart.target_accuracy", accuracy))
    words = [word for key, value in changes for word in (f"--{key}", value)]
    began = time.monotonic()
    job = Job(name, ("deepgrpo.cli", "train", str(recipe), *words), runs / f"{name}.log", finished=start.start.is_dir)
    if load_recipe(recipe).warmstart is not None:
        Jobs([job], workers=1).run()
        if not start.start.is_dir():
            raise SystemExit(f"the warm start of {name} failed: see {job.log}")
    found = measure(opened(load_recipe(recipe, changes), start), amounts, seed)
    found["seconds"] = time.monotonic() - began
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(found, separators=(",", ":")) + "\n")
    return found


def measured_run(directory: Path, amounts: Amounts, seed: int) -> dict[str, Any]:
    """Measure the newest checkpoint of a run, or its start."""
    return measure(opened(load_recipe(RunDir(directory).config), RunDir(directory)), amounts, seed)


def opened(config: Config, where: RunDir) -> Run:
    """The parts of a run with the weights of its newest checkpoint, its start, or its recipe; nothing is written there."""
    with tempfile.TemporaryDirectory() as place:
        run = open_run(config.model_copy(update={"run": config.run.model_copy(update={"dir": place})}), None)
    checkpoint = newest_checkpoint(where)
    if checkpoint is not None:
        run.policy.load_weights(checkpoint.model)
    elif where.start.is_dir():
        run.policy.load_weights(where.start)
    run.learner.adopt()
    return run


# ---------------------------------------------------------------- files and tables


def publish(name: str, found: Sequence[Mapping[str, Any]], target: Path, amounts: Amounts) -> None:
    """Write the figures of a regime and print its tables."""
    figures = summary(found)
    result = {"regime": name, **figures, "amounts": {k: getattr(amounts, k) for k in Amounts.__dataclass_fields__}}
    (target / f"{name}.json").write_text(json.dumps(result | machine_and_versions(), indent=1) + "\n")
    print(f"{tables({name: figures})}\n", flush=True)


def tables(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Overview of all regimes, then rescue by depth of each."""
    parts = [overview(results), errors_table(results)]
    for name, each in results.items():
        parts += [f"**{name}**", depth_table(each)]
    return "\n\n".join(parts)


def overview(results: Mapping[str, Mapping[str, Any]]) -> str:
    given = any(each.get("given") for each in results.values())  # of episodes
    head = (
        "regime", "greedy, %", "sampled, %", *(f"pass@{k}" for k in KS[1:]), "luck, %", "entropy, nats", "tokens",
        *(["given tokens"] if given else []), "cut off, %", "mixed groups, %", "mixed per 1k tokens",
    )  # fmt: skip
    rows = [
        [
            f"`{name}`", percent(each["greedy"], 1), percent(each["sampled"], 1),
            *(percent(each["pass"].get(str(k))) for k in KS[1:]), percent(each["luck"]), f"{each['entropy']:.3f}",
            f"{each['length']:.0f}", *([f"{each['given']:.0f}"] if given else []), percent(each["truncated"]),
            percent(each["mixed"]), f"{each['mixed_per_1k']:.2f}",
        ]
        for name, each in results.items()
    ]  # fmt: skip
    return table(head, rows)


def errors_table(results: Mapping[str, Mapping[str, Any]]) -> str:
    head = (
        "regime", "failures with an error, %", "first error at, 10 / 50 / 90%", "rescued before it, %", "rescued behind it, %",
        "succeed behind it, %", "of these by a correction, %", "responses with a correction, %", "right with one, %",
        "right without, %",
    )  # fmt: skip
    rows = []
    for name, each in results.items():
        place, before, behind = each["error_position"], each["before"], each["behind"]
        rows.append(
            [
                f"`{name}`", percent(each["failed_with_error"]),
                "–" if place is None else " / ".join(f"{p:.2f}" for p in place), rescued(before), rescued(behind),
                percent(behind and behind["succeed"], 1), percent(behind and behind["by_correction"]),
                percent(each["corrected"]), percent(each["success_if_corrected"]), percent(each["success_if_not"]),
            ]
        )  # fmt: skip
    return table(head, rows)


def depth_table(each: Mapping[str, Any]) -> str:
    turns = each.get("error_turns")  # of episodes
    head = (
        "before turn" if turns else "depth r", "states", "rescued, %", "succeed, %", "mixed, %", "mixed per 1k tokens",
        "behind an error, %", "rescued before it, %", "rescued behind it, %",
        *(["first error in this turn, %"] if turns else []),
    )  # fmt: skip
    rows = []
    for band in each["bands"]:
        behind = (band["behind"] or {"states": 0})["states"] / band["states"]
        turn = str(band["band"] + 1)
        place = turn if turns else "prompt" if band["band"] == 0 else f"{band['ratio']:.2f}"
        rows.append(
            [
                place, f"{band['states']}", rescued(band),
                percent(band["succeed"], 1), percent(band["mixed"]), f"{band['mixed_per_1k']:.2f}", percent(behind),
                rescued(band["before"]), rescued(band["behind"]), *([percent(turns.get(turn, 0.0))] if turns else []),
            ]
        )  # fmt: skip
    return table(head, rows)


def rescued(side: Mapping[str, Any] | None) -> str:
    if side is None:
        return "–"
    low, high = side["interval"]
    return f"{percent(side['rescued'])} [{percent(low)}, {percent(high)}]"


def percent(share: float | None, digits: int = 0) -> str:
    return "–" if share is None else f"{100 * share:.{digits}f}"


if __name__ == "__main__":
    main()
