#!/usr/bin/env python
"""Probe against training: does the ranking of strategies by `deepgrpo probe` agree with the ranking after training?

    python -m benchmarks.probe_validity docs/results/lab/probe-validity \
        --regime chain runs/chain/figures.json probe-chain-1.json probe-chain-2.json \
        --regime strict runs/strict/figures.json probe-strict-1.json                    writes .json and .md

For each regime: the figures of `deepgrpo compare`, and probes (`deepgrpo probe START --arms EXPERIMENT --json FILE`) of the
warm starts that its runs began with, which are averaged. A figure predicts well if its Spearman correlation with the trained
metric is high within a regime, and if it says of each arm correctly whether it is above or below the baseline.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from deepgrpo.stats import sign_test

PREDICTORS = {"snr": "snr² per 1k tokens", "cos": "cos of a step", "mixed": "mixed groups per 1k tokens (the old probe)"}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("target", type=Path, help="path of the results, without suffix")
    parser.add_argument("--regime", nargs="+", action="append", required=True, metavar=("NAME FIGURES", "PROBE"))
    parser.add_argument("--metric", default="watched/greedy", help="trained figure, a metric of figures.json")
    options = parser.parse_args(arguments)
    regimes = {}
    for name, *files in options.regime:
        if len(files) < 2:
            parser.error(f"--regime {name} names {len(files)} files; name figures.json and at least one probe")
        try:
            figures, *probes = [json.loads(Path(file).read_text(encoding="utf-8")) for file in files]
            regimes[name] = regime(figures, probes, options.metric)
        except (OSError, ValueError, KeyError) as error:
            parser.error(f"--regime {name}: {type(error).__name__}: {error}")
    result = {"metric": options.metric, "regimes": regimes, "agreement": agreement(regimes)}
    options.target.parent.mkdir(parents=True, exist_ok=True)
    options.target.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    text = markdown(result)
    options.target.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)


def regime(figures: Mapping[str, Any], probes: Sequence[Mapping[str, Any]], metric: str) -> dict[str, Any]:
    """Predicted and trained figures of the arms that both know, and the Spearman correlation of each predictor.

    Raises ValueError if the baseline is not among them, or there are fewer than three arms.
    """
    trained = {row["arm"]: row for row in figures["rows"] if row["metric"] == metric}
    known = [arm for arm in trained if all(arm in probe["strategies"] for probe in probes)]
    baseline = figures["baseline"]
    if baseline not in known:
        raise ValueError(f"the baseline {baseline!r} is not in every probe and among the rows of {metric!r}: {known}")
    if len(known) < 3:
        raise ValueError(f"figures and probes share the arms {known}; a ranking needs at least three")
    arms = {
        arm: {
            "trained": trained[arm]["mean"], "difference": trained[arm].get("difference"),
            "low": trained[arm].get("low"), "high": trained[arm].get("high"),
            **{key: float(np.mean([probe["strategies"][arm][key]["value"] for probe in probes])) for key in PREDICTORS},
        }
        for arm in known
    }  # fmt: skip
    for each in arms.values():
        for key in PREDICTORS:
            each[f"agrees_{key}"] = (
                None if each["difference"] is None
                else bool((each[key] > arms[baseline][key]) == (each["difference"] > 0))
            )  # fmt: skip
    measured = [each["trained"] for each in arms.values()]
    return {
        "arms": arms, "baseline": baseline, "probes": len(probes), "verdicts": [probe["sentence"] for probe in probes],
        "spearman": {key: spearman([each[key] for each in arms.values()], measured) for key in PREDICTORS},
    }  # fmt: skip


def agreement(regimes: Mapping[str, Any]) -> dict[str, Any]:
    """For each predictor: arms × regimes with the right sign, of all and of those whose trained interval leaves out 0."""
    found = {}
    for key in PREDICTORS:
        cells = [each for one in regimes.values() for each in one["arms"].values() if each["difference"] is not None]
        clear = [each for each in cells if each["low"] is not None and (each["low"] > 0 or each["high"] < 0)]
        right, sure = (sum(each[f"agrees_{key}"] for each in chosen) for chosen in (cells, clear))
        correlations = [one["spearman"][key] for one in regimes.values() if one["spearman"][key] is not None]
        found[key] = {
            "right": right, "of": len(cells), "sign_p": sign_test(right, len(cells) - right),
            "right_clear": sure, "of_clear": len(clear),
            "mean_spearman": float(np.mean(correlations)) if correlations else None,
        }  # fmt: skip
    return found


def spearman(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Correlation of ranks, ties at their mean rank; None if all values of one are equal.

    >>> spearman([1, 2, 3], [10, 30, 20])
    0.5
    """
    x, y = (_ranks(values) - (len(values) + 1) / 2 for values in (a, b))
    norm = math.sqrt(float(x @ x) * float(y @ y))
    return round(float(x @ y) / norm, 12) if norm else None


def _ranks(values: Sequence[float]) -> np.ndarray:
    every = np.asarray(values, dtype=np.float64)
    below, equal = (every[:, None] > every).sum(axis=1), (every[:, None] == every).sum(axis=1)
    ranks: np.ndarray = below + (equal + 1) / 2
    return ranks


def markdown(result: Mapping[str, Any]) -> str:
    """Tables: every arm of every regime, then how well each figure predicts."""
    lines = [
        f"| regime | arm | snr²/1k tokens | cos | mixed/1k | {result['metric']} | to the baseline | sign by snr² | by mixed |",
        "|---|---|--:|--:|--:|--:|--:|:-:|:-:|",
    ]
    for name, one in result["regimes"].items():
        for arm, each in sorted(one["arms"].items(), key=lambda item: -item[1]["snr"]):
            to = "" if each["difference"] is None else f"{each['difference']:+.3f}"
            if to and each["low"] is not None:
                to += f" [{each['low']:+.3f}, {each['high']:+.3f}]"
            signs = [{None: "", True: "yes", False: "no"}[each[f"agrees_{key}"]] for key in ("snr", "mixed")]
            lines.append(
                f"| {name} | {arm} | {each['snr']:.2g} | {each['cos']:.2f} | {each['mixed']:.2f} | {each['trained']:.3f} "
                f"| {to} | {signs[0]} | {signs[1]} |"
            )
    names = list(result["regimes"])
    lines += [
        "", f"| figure | {' | '.join(f'Spearman, {name}' for name in names)} | mean | signs right | of the clear ones | p |",
        f"|---|{'--:|' * (len(names) + 4)}",
    ]
    for key, label in PREDICTORS.items():
        each = result["agreement"][key]
        values = [*(result["regimes"][name]["spearman"][key] for name in names), each["mean_spearman"]]
        cells = " | ".join("" if value is None else f"{value:.2f}" for value in values)
        lines.append(
            f"| {label} | {cells} | {each['right']} of {each['of']} | {each['right_clear']} of {each['of_clear']} "
            f"| {each['sign_p']:.2f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
