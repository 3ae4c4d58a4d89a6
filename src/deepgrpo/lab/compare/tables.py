"""Tables of a comparison, from the result of `figures.compare`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from deepgrpo.lab.compare.cells import (
    ComparisonTable,
    Form,
    markdown_table,
    one,
    percent,
    short,
    three,
    whole,
    without_empty,
)
from deepgrpo.lab.compare.tune_tables import tuning_table


def comparison_tables(result: Mapping[str, Any]) -> list[ComparisonTable]:
    """All tables of a comparison, from the result of `figures.compare`."""
    arms = result["arms"]
    budget, steps = short(result["budget"]), f"{result['optimizer_steps_compared']:.0f}"
    k = [f"pass@{each}" for each in result["final"]["k"]]
    largest = [f"pass@{max(result['final']['k'])}"] if k else []
    untouched = [("greedy", "final/greedy"), ("sampled", "final/sampled"), *((each, "final/pass") for each in largest)]
    late = f"greedy, last {result['experiment']['curve']['last_share']:.0%}"
    watched = [
        ("greedy", "watched/greedy"), (late, "watched/late"), ("area over tokens", "watched/area"),
        (f"greedy, {steps} steps", "steps/greedy"), (f"area over {steps} steps", "steps/area"),
        ("greedy, equal steps of the two", "pair/greedy"),
    ]  # fmt: skip
    target = result["experiment"]["curve"]["target"]
    found = [
        _means(
            f"Untouched questions after {budget} sampled tokens, %", arms,
            [
                ("greedy", "final/greedy", percent), ("sampled", "final/sampled", percent),
                *((each, f"final/{each}", percent) for each in k),
            ],
        ),
        _differences("untouched questions", result, untouched),
        _means(
            f"Watched questions: at {budget} sampled tokens, and at {steps} optimizer steps, %", arms,
            [
                ("start", "start/greedy", percent), ("greedy", "watched/greedy", percent),
                ("sampled", "watched/sampled", percent),
                (late, "watched/late", percent), ("area over tokens", "watched/area", percent),
                (f"greedy, {steps} steps", "steps/greedy", percent),
                (f"sampled, {steps} steps", "steps/sampled", percent),
                (f"area over {steps} steps", "steps/area", percent),
                (f"tokens for {steps} steps", "steps/sampled_tokens", short),
            ],
        ),
        _differences("watched questions", result, watched),
        _means(
            "What a run spent", arms,
            [
                ("sampled tokens", "spent/sampled_tokens", short), ("optimizer steps", "spent/optimizer_steps", whole),
                ("trained tokens", "spent/trained_tokens", short), ("forwarded tokens", "spent/learner_tokens", short),
                ("verifier calls", "spent/verifier_calls", short), ("given tokens", "spent/given_tokens", short),
                ("tool calls", "spent/tool_calls", short), ("tool seconds", "spent/tool_seconds", one),
                ("epochs over the data", "spent/epochs", one),
                ("minutes", "spent/minutes", one),
            ],
        ),
        _means(
            "How the training went", arms,
            [
                ("gradient norm", "train/grad_norm", three), ("entropy at the end", "train/entropy", three),
                ("length at the end", "train/length", one), ("mixed groups, %", "train/mixed", percent),
                ("mixed groups per 1k tokens", "train/mixed_per_1k", three),
            ],
        ),
    ]  # fmt: skip
    if result["tuning"] is not None:
        found.append(tuning_table(result["tuning"]))
    if target is not None:
        rows = tuple((arm, *_to_target(each["tokens_to_target"], budget)) for arm, each in arms.items())
        title = f"Sampled tokens to reach {target:.0%} greedy (watched)"
        found.insert(4, ComparisonTable(title, ("arm", "median", "runs"), rows))
    return found


def as_markdown(result: Mapping[str, Any]) -> str:
    """The whole comparison as a markdown page."""
    seeds = result["experiment"]["seeds"]
    lines = [
        f"# {result['name']}", "",
        f"{len(result['arms'])} arms, {len(seeds)} seeds ({', '.join(map(str, seeds))}), {result['budget']:,} sampled tokens "
        f"per run, baseline {result['baseline']}.",
        "", *(f"- {note}" for note in result["notes"]),
    ]  # fmt: skip
    for table in comparison_tables(result):
        lines += ["", f"## {table.title}", "", *markdown_table(table)]
    return "\n".join(lines) + "\n"


# ---------------------------------------------------------------- cells


def _means(title: str, arms: Mapping[str, Any], columns: Sequence[tuple[str, str, Form]]) -> ComparisonTable:
    rows = []
    for arm, each in arms.items():
        cells = []
        for _, metric, form in columns:
            mean, sd = each["mean"].get(metric), each["sd"].get(metric)
            spread = f" ±{form(sd)}" if sd is not None and form is percent and len(each["runs"]) > 1 else ""
            cells.append("–" if mean is None else form(mean) + spread)
        rows.append((arm, str(len(each["runs"])), *cells))
    return without_empty(ComparisonTable(title, ("arm", "seeds", *(label for label, _, _ in columns)), tuple(rows)))


def _differences(questions: str, result: Mapping[str, Any], columns: Sequence[tuple[str, str]]) -> ComparisonTable:
    title = f"Difference to {result['baseline']} on {questions}, points, paired by seed [95% interval] (seeds above/below, p)"
    rows = tuple(
        (arm, *(_difference(each["differences"].get(metric)) for _, metric in columns))
        for arm, each in result["arms"].items() if "differences" in each
    )  # fmt: skip
    return ComparisonTable(title, ("arm", *(label for label, _ in columns)), rows)


def _difference(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return "–"
    mean, low, high = (f"{100 * found[key]:+.1f}" for key in ("mean", "low", "high"))
    at = f", {found['steps']:.0f} steps" if "steps" in found else ""
    return f"{mean} [{low}, {high}] ({found['above']}/{found['below']}, {found['sign_p']:.2g}){at}"


def _to_target(found: Mapping[str, Any], budget: str) -> tuple[str, str]:
    median = f"> {budget}" if found["median"] is None else short(found["median"])
    return median, f"{found['reached']} of {found['runs']}"
