"""A probe's results in the terminal: figures, tables, notes and verdict."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from deepgrpo.eval.output import print_whole
from deepgrpo.lab.probe.findings import Band, Findings
from deepgrpo.lab.probe.sampling import Sampled
from deepgrpo.lab.probe.verdict import ProbeVerdict
from deepgrpo.stats import Proportion


def show(out: Console, sampled: Sampled, findings: Findings | None, said: ProbeVerdict, notes: Sequence[str]) -> None:
    say(
        out,
        f"{sampled.rollouts} responses, {len(sampled.failed)} failed ({sampled.failure_rate:.0%}), "
        f"{sampled.rollout_tokens / max(sampled.rollouts, 1):.0f} tokens each; {sampled.tokens:,} tokens in "
        f"{duration(sampled.seconds)}",
    )
    if findings is not None:
        print_whole(out, _depths(findings))
        fit = findings.fit
        if fit.fitted:
            say(
                out,
                f"P(rescue | r) = sigmoid(w r + b), fitted to {fit.items} states: w {fit.w:.2f} [{fit.w_low:.2f}, "
                f"{fit.w_high:.2f}], b {fit.b:.2f} [{fit.b_low:.2f}, {fit.b_high:.2f}]",
            )
        else:
            say(out, f"no fit: {fit.items} states, all with the same outcome or too few; P = 1 at every depth")
        if findings.gammas:
            print_whole(out, _gammas(findings))
        say(out, "[ ] are 95% intervals over prompts; those of × prompt hold simultaneously for all lines of a table")
    for note in notes:
        say(out, f"note: {note}")
    say(out, said.sentence)


def _depths(findings: Findings) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("depth r", "states", "rescued", "succeed", "tokens/group", "mixed", "mixed/1k tokens", "× prompt"):
        table.add_column(name, justify="left" if name == "depth r" else "right", no_wrap=True)
    for band in findings.bands:
        table.add_row(
            _place(band), str(band.states), _share(band.rescue), _share(band.success), f"{band.tokens:.0f}",
            f"{band.mixed / band.states:.2f}", f"{band.mixed_per_1k:.2f} [{band.mixed_low:.2f}, {band.mixed_high:.2f}]",
            "" if band.gain is None else f"{band.gain:.2f} [{band.gain_low:.2f}, {band.gain_high:.2f}]",
        )  # fmt: skip
    return table


def _gammas(findings: Findings) -> Table:
    """One line per gamma, one column of Q per possible position of a pivot."""
    places = [band.band for band in findings.bands]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("gamma", justify="right", no_wrap=True)
    for band in findings.bands:
        table.add_column("Q(prompt)" if not band.band else f"Q({band.ratio:.2f})", justify="right", no_wrap=True)
    for name in ("mean r", "mixed/1k tokens", "× prompt"):
        table.add_column(name, justify="right", no_wrap=True)
    for gamma in findings.gammas:
        table.add_row(
            f"{gamma.gamma:g}", *(f"{gamma.q[place]:.2f}" for place in places), f"{gamma.depth:.2f}",
            f"{gamma.mixed_per_1k:.2f}", f"{gamma.gain:.2f} [{gamma.gain_low:.2f}, {gamma.gain_high:.2f}]",
        )  # fmt: skip
    return table


def _place(band: Band) -> str:
    return f"{band.ratio:.2f} prompt" if not band.band else f"{band.ratio:.2f} ({band.low:.2f}–{band.high:.2f}]"


def _share(p: Proportion) -> str:
    return f"{p.rate:.2f} [{p.low:.2f}, {p.high:.2f}]"


def duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def say(console: Console, line: str) -> None:
    console.print(line, markup=False, soft_wrap=True)
