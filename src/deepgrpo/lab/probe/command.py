"""`deepgrpo probe`: before any training, tell whether pivots would help.

    options ─► setting (probe_setting.py) ─► failed rollouts and continuations (probe_sampling.py)
                                          ─► figures (probe_findings.py) ─► verdict (probe_verdict.py), table, JSON, plot

It samples as a step of DEEP-GRPO would, with the same reward, temperature, segments and number of branches, but at all
depths; nothing is trained and nothing but --json and --plot is written. See docs/probe.md.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from deepgrpo.config import TaskReward
from deepgrpo.engines import build_engine
from deepgrpo.engines.base import SamplingParams
from deepgrpo.errors import DataError
from deepgrpo.explore.base import Limits
from deepgrpo.explore.segments import build_segmenter
from deepgrpo.lab.machine import machine_and_versions
from deepgrpo.lab.options import ProbeOptions
from deepgrpo.lab.probe.findings import Band, Findings, analyse
from deepgrpo.lab.probe.sampling import ProbeStrategy, Sampled, gather
from deepgrpo.lab.probe.setting import ProbeSetting, open_policy, resolve_setting, with_chat
from deepgrpo.lab.probe.verdict import ProbeVerdict, early_verdict, remarks, verdict
from deepgrpo.prompts.source import build_source
from deepgrpo.prompts.tasks import build_task
from deepgrpo.rewards import build_reward
from deepgrpo.rewards.base import judge
from deepgrpo.rewards.overlong import OverlongPenalty
from deepgrpo.stats import Proportion


def run_probe(options: ProbeOptions, overrides: Sequence[tuple[str, str]] = (), console: Console | None = None) -> int:
    """Run the command. Returns the exit code: 0, whatever the verdict.

    Raises:
        ConfigError: impossible or unknown options.
        DataError: a file cannot be used, (nearly) every response is cut off, or too few of them fail to say anything.
        ModelError: the model cannot be loaded.
        MissingExtraError: --plot without matplotlib.
    """
    out = console or Console(highlight=False)
    setting = resolve_setting(options, overrides)
    K = setting.explore.branches_per_pivot
    most = estimate_tokens(options.rollouts, K, options.depths, setting.sampling.max_new_tokens)
    cap = options.max_sampled_tokens or 2 * most
    policy = open_policy(setting, options)
    _say(out, f"{setting.model} on {policy.device}, {setting.name}")
    _say(
        out,
        f"cost: {options.rollouts} failed responses, each continued {K} times from the prompt and from up to {options.depths} "
        f"depths: about {most:,} sampled tokens if all responses fail and have {setting.sampling.max_new_tokens} tokens, most "
        "often less",
    )
    sampled = _sample(options, setting, policy, cap, most, out)
    findings: Findings | None = None
    said = early_verdict(sampled, wanted=options.rollouts, branches=K)
    if said is None or said.code in ("too_short", "nothing_succeeds"):
        findings = analyse(
            sampled.failed, bands=options.depths, gammas=setting.gammas, recoverability=setting.explore.recoverability,
            root_pivot=setting.explore.root_pivot, seed=options.seed,
        )  # fmt: skip
    if said is None:
        assert findings is not None
        said = verdict(findings, wanted=options.rollouts, branches=K)
    notes = remarks(sampled, wanted=options.rollouts, most_tokens=cap)
    _show(out, sampled, findings, said, notes)
    _write(options, setting, sampled, findings, said, notes, most, out)
    return 0


def estimate_tokens(rollouts: int, branches: int, depths: int, length: int) -> int:
    """Tokens of a probe in which every rollout fails and every response has this length.

    A continuation from the middle of band j leaves 1 - (j - 1/2)/S of the response, S/2 responses over the bands:
    `N · L · (1 + K · (1 + S/2))`. With 64 rollouts of 32 tokens, K = 4, S = 6: 64 · 32 · 17 = 34,816.
    """
    return round(rollouts * length * (1 + branches * (1 + depths / 2)))


def _sample(
    options: ProbeOptions, setting: ProbeSetting, policy: Any, cap: int, most: int, out: Console
) -> Sampled:
    """Build what sampling needs, and sample."""
    total = min(setting.sampling.max_total_tokens or policy.context, policy.context)
    limits = Limits(setting.sampling.max_new_tokens, total)
    data = with_chat(options, setting.data, policy.tokenizer)
    source = build_source(data, policy.tokenizer, seed=options.seed, context=total)
    for reason, count in source.skipped.items():
        _say(out, f"{setting.name}: {count} rows left out ({reason})")
    explore, engine = setting.explore, setting.engine
    own_dtype = None if options.dtype == "auto" else options.dtype
    sampler = build_engine(engine, policy, dtype=own_dtype, longest=total)
    if sampler.remark:
        _say(out, sampler.remark)
    overlong = setting.reward.overlong
    reward = build_reward(setting.reward, build_task(data) if isinstance(setting.reward, TaskReward) else None)
    try:
        with _progress(out, options.rollouts) as advance:
            return gather(
                source,
                ProbeStrategy(
                    build_segmenter(explore.segments, policy.tokenizer), explore.branches_per_pivot, options.depths,
                    explore.success_threshold,
                ),
                sampler,
                functools.partial(
                    judge, reward, setting.reward.truncated_value,
                    penalty=None if overlong is None else OverlongPenalty(overlong, limits.max_new_tokens, total),
                ),
                decode=lambda tokens: policy.tokenizer.decode(tokens, skip_special_tokens=True),
                params=SamplingParams(setting.sampling.temperature, setting.sampling.top_p, stop=setting.sampling.stop),
                limits=limits, wanted=options.rollouts, most_tokens=cap, seed=options.seed, max_rows=engine.max_rows,
                truncated_counts=setting.reward.truncated_value is None, progress=advance,
            )  # fmt: skip
    finally:
        sampler.close()
        reward.close()


# ---------------------------------------------------------------- progress


@contextmanager
def _progress(out: Console, wanted: int) -> Iterator[Callable[[Sampled], None]]:
    """A bar on a terminal's standard error, elsewhere a line per batch; after the first batch what it will all cost."""

    def refine(found: Sampled) -> str:
        speed = found.tokens / max(found.seconds, 1e-9)
        head = f"after {found.rollouts} responses: {len(found.failed)} failed, {speed:,.0f} tokens/s"
        if not found.failed or len(found.failed) >= wanted:
            return head
        times = wanted / len(found.failed)
        return f"{head}; about {round(found.tokens * times, -2):,.0f} tokens and {_duration(found.seconds * times)} in all"

    errors = Console(stderr=True, highlight=False)
    if errors.is_terminal:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=errors, transient=True, speed_estimate_period=3600.0) as bar:
            task = bar.add_task("failed responses", total=wanted)

            def on_terminal(found: Sampled) -> None:
                bar.update(task, completed=min(len(found.failed), wanted))
                if found.batches == 1:
                    bar.console.print(refine(found), markup=False, soft_wrap=True)

            yield on_terminal
        return

    def in_file(found: Sampled) -> None:
        if found.batches == 1:
            _say(out, refine(found))
        else:
            _say(errors, f"failed responses: {len(found.failed)} of {wanted}, {found.tokens:,} tokens")

    yield in_file


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def _say(console: Console, line: str) -> None:
    console.print(line, markup=False, soft_wrap=True)


# ---------------------------------------------------------------- what is shown


def _show(out: Console, sampled: Sampled, findings: Findings | None, said: ProbeVerdict, notes: Sequence[str]) -> None:
    _say(
        out,
        f"{sampled.rollouts} responses, {len(sampled.failed)} failed ({sampled.failure_rate:.0%}), "
        f"{sampled.rollout_tokens / max(sampled.rollouts, 1):.0f} tokens each; {sampled.tokens:,} tokens in "
        f"{_duration(sampled.seconds)}",
    )
    if findings is not None:
        _print(out, _depths(findings))
        fit = findings.fit
        if fit.fitted:
            _say(
                out,
                f"P(rescue | r) = sigmoid(w r + b), fitted to {fit.items} states: w {fit.w:.2f} [{fit.w_low:.2f}, "
                f"{fit.w_high:.2f}], b {fit.b:.2f} [{fit.b_low:.2f}, {fit.b_high:.2f}]",
            )
        else:
            _say(out, f"no fit: {fit.items} states, all of one kind or too few; P = 1 at every depth")
        if findings.gammas:
            _print(out, _gammas(findings))
        _say(out, "[ ] are 95% intervals over prompts; those of × prompt hold for all lines of a table at once")
    for note in notes:
        _say(out, f"note: {note}")
    _say(out, said.sentence)


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
    """A line per gamma, a column of Q per place that a pivot can be at."""
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


def _print(out: Console, table: Table) -> None:
    if not out.is_terminal:
        # a file has no right edge: rich would otherwise cut the figures off at 80 columns
        out.width = max(out.width, out.measure(table, options=out.options.update(width=10_000)).maximum)
    out.print(table)


# ---------------------------------------------------------------- what is written


def _write(
    options: ProbeOptions, setting: ProbeSetting, sampled: Sampled, findings: Findings | None, said: ProbeVerdict,
    notes: Sequence[str], most: int, out: Console,
) -> None:  # fmt: skip
    try:
        if options.json is not None:
            result = as_dict(options, setting, sampled, findings, said, notes, most)
            text = json.dumps(result, indent=1, ensure_ascii=False, allow_nan=False)
            Path(options.json).expanduser().write_text(text + "\n", encoding="utf-8")
            _say(out, f"figures: {options.json}")
        if options.plot is not None:
            if findings is None:
                _say(out, f"no plot: there is nothing to draw, {options.plot} was not written")
            else:
                from deepgrpo.lab.probe.plot import draw

                draw(findings, Path(options.plot).expanduser(), title=f"{setting.model}, {setting.name}")
                _say(out, f"plot: {options.plot}")
    except OSError as error:
        raise DataError(f"the results cannot be written: {error}; name another place with --json and --plot") from error


def as_dict(
    options: ProbeOptions, setting: ProbeSetting, sampled: Sampled, findings: Findings | None, said: ProbeVerdict,
    notes: Sequence[str], most: int,
) -> dict[str, Any]:  # fmt: skip
    """All figures as plain JSON. What differs between two runs with one seed is in `seconds`, `machine` and `versions`."""
    explore = setting.explore
    return {
        "model": setting.model,
        "verdict": said.code,
        "recommended_gamma": said.gamma,
        "sentence": said.sentence,
        "notes": list(notes),
        "sampled": {
            "rollouts": sampled.rollouts, "failed": len(sampled.failed), "truncated": sampled.truncated,
            "rollout_tokens": sampled.rollout_tokens, "tokens": sampled.tokens, "tokens_estimated": most,
        },
        "depths": None if findings is None else [asdict(band) for band in findings.bands],
        "fit": None if findings is None else asdict(findings.fit),
        "gammas": None if findings is None else [asdict(gamma) for gamma in findings.gammas],
        "setting": {
            "rollouts": options.rollouts, "branches": explore.branches_per_pivot, "depths": options.depths,
            "seed": options.seed, "success_threshold": explore.success_threshold, "root_pivot": explore.root_pivot,
            "segments": explore.segments.model_dump(mode="json"),
            "recoverability": explore.recoverability.model_dump(mode="json"),
            "data": setting.data.model_dump(mode="json"), "reward": setting.reward.model_dump(mode="json"),
            "sampling": setting.sampling.model_dump(mode="json"),
        },
        "failed": [asdict(rollout) for rollout in sampled.failed],
        "seconds": sampled.seconds,
        **machine_and_versions(),
    }  # fmt: skip
