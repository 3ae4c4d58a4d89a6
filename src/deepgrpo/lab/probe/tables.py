"""Tables of a probe."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from rich.console import Console

from deepgrpo.lab.probe.cost import Cost
from deepgrpo.lab.probe.findings import Figure, Findings
from deepgrpo.lab.probe.measure import DEPTHS, Measured
from deepgrpo.lab.probe.verdict import ProbeVerdict
from deepgrpo.stats import Proportion, clustered_proportion
from deepgrpo.terminal import print_columns


def show(
    out: Console, measured: Measured, findings: Findings, said: ProbeVerdict, notes: Sequence[str], cost: Cost
) -> None:  # fmt: skip
    """Print everything that was found."""
    print_columns(out, *_strategies(findings))
    out.print()
    if findings.truth_shown and (streams := _streams(findings)):
        print_columns(out, STREAM_COLUMNS, streams)
        out.print()
    if rescued := rescue_by_depth(measured):
        shares = [f"{at} {share.rate:.0%} of {share.trials}" for at, share in rescued.items()]
        say(out, f"pivots with a branch that succeeds, by depth: {' · '.join(shares)}")
    whole = len(measured.shared) + len(measured.further)
    say(
        out,
        f"true gradient: {whole} prompts, two halves agree with cosine {findings.agreement:.2f}; strategies on "
        f"{measured.count} of them",
    )
    say(out, cost.sentence())
    for note in notes:
        say(out, f"note: {note}")
    say(out, said.sentence)


def rescue_by_depth(measured: Measured) -> dict[str, Proportion]:
    """Range of the depth ratio → share of the pivots of all strategies from which a branch succeeds; prompts are clusters."""
    found: dict[str, Proportion] = {}
    for depth in range(DEPTHS):
        total, saved = Counter[int](), Counter[int]()
        for result in measured.arms:
            for prompt, at, success in result.pivots:
                if at == depth:
                    total[prompt] += 1
                    saved[prompt] += success
        if total:
            prompts = sorted(total)
            share = clustered_proportion([saved[p] for p in prompts], [total[p] for p in prompts])
            found[f"{depth / DEPTHS:g}-{(depth + 1) / DEPTHS:g}"] = share
    return found


def _strategies(findings: Findings) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Columns and rows."""
    rows: list[tuple[str, ...]] = []
    for arm in findings.arms:
        # without a true gradient there is nothing to measure against
        cos, snr = (_interval(arm.cos, ".2f"), _interval(arm.snr, ".2g")) if findings.truth_shown else ("?", "?")
        rows.append((arm.name, f"{arm.tokens_per_prompt:,.0f}", cos, snr, f"{arm.mixed.value:.2f}"))
    return ("strategy", "tokens/ prompt", "cos of a step", "snr²/1k tokens", "mixed/1k"), rows


STREAM_COLUMNS = ("with branches", "cos main", "cos branch", "branch/main norm", "tokens in branches")


def _streams(findings: Findings) -> list[tuple[str, ...]]:
    """Main and branch stream apart, of the strategies with branches."""
    return [
        (
            arm.name, f"{arm.cos_main:.2f}", f"{arm.cos_branch:.2f}",
            "" if arm.norm_ratio is None else f"{arm.norm_ratio:.2f}", f"{arm.branch_share:.0%}",
        ) for arm in findings.arms if arm.cos_branch is not None
    ]  # fmt: skip


def _interval(figure: Figure, form: str) -> str:
    return f"{figure.value:{form}} [{figure.low:{form}}, {figure.high:{form}}]"


def say(console: Console, line: str) -> None:
    console.print(line, markup=False, soft_wrap=True)
