"""`deepgrpo probe`: estimate, before any training, whether pivots would help.

    options ─► setting (setting.py) ─► failed rollouts and continuations (sampling.py)
                                    ─► figures (findings.py) ─► verdict (verdict.py), tables, JSON, plot

It samples like a step of DEEP-GRPO, with the same reward, temperature, segments and number of branches, but at all depths.
Nothing is trained, and only the files of --json and --plot are written. See docs/probe.md.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from deepgrpo.engines import build_engine
from deepgrpo.engines.base import SamplingParams
from deepgrpo.errors import DataError
from deepgrpo.explore.base import Limits
from deepgrpo.explore.segments import build_segmenter
from deepgrpo.lab.machine import machine_and_versions
from deepgrpo.lab.options import ProbeOptions
from deepgrpo.lab.probe.findings import Findings, analyse
from deepgrpo.lab.probe.sampling import ProbeStrategy, Sampled, sample_probe
from deepgrpo.lab.probe.setting import ProbeSetting, open_policy, resolve_setting, with_chat
from deepgrpo.lab.probe.tables import duration, say, show
from deepgrpo.lab.probe.verdict import ProbeVerdict, early_verdict, remarks, verdict
from deepgrpo.model.soundness import require_rows
from deepgrpo.prompts.source import build_source
from deepgrpo.prompts.tasks import build_task
from deepgrpo.rewards import build_reward
from deepgrpo.rewards.base import judge
from deepgrpo.rewards.overlong import OverlongPenalty
from deepgrpo.runs.text import json_text
from deepgrpo.terminal import Terminal


def run_probe(options: ProbeOptions, overrides: Sequence[tuple[str, str]] = (), console: Console | None = None) -> int:
    """Run the command. Returns exit code 0 for every verdict.

    Raises:
        ConfigError: impossible or unknown options.
        DataError: a file cannot be used, (nearly) every response is cut off, or too few fail for any conclusion.
        ModelError: the model cannot be loaded.
        MissingExtraError: --plot without matplotlib.
    """
    out = console or Terminal()
    setting = resolve_setting(options, overrides)
    K = setting.explore.branches_per_pivot
    most = estimate_tokens(options.rollouts, K, options.depths, setting.sampling.max_new_tokens)
    cap = options.max_sampled_tokens or 2 * most
    policy, threads = open_policy(setting, options)
    say(out, f"{setting.model} on {policy.device}, {setting.name} · {threads}")
    say(
        out,
        f"cost: {options.rollouts} failed responses, each continued {K} times from the prompt and from up to {options.depths} "
        f"depths: about {most:,} sampled tokens if all responses fail and have {setting.sampling.max_new_tokens} tokens, "
        "usually fewer",
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
    show(out, sampled, findings, said, notes)
    _write(options, setting, sampled, findings, said, notes, most, out)
    return 0


def estimate_tokens(rollouts: int, branches: int, depths: int, length: int) -> int:
    """Sampled tokens of a probe if every rollout fails and every response has this length.

    A continuation from the middle of band j has 1 - (j - 1/2)/S of a response, which sums to S/2 responses over the bands:
    `N · L · (1 + K · (1 + S/2))`. With 64 rollouts of 32 tokens, K = 4, S = 6: 64 · 32 · 17 = 34,816.
    """
    return round(rollouts * length * (1 + branches * (1 + depths / 2)))


def _sample(options: ProbeOptions, setting: ProbeSetting, policy: Any, cap: int, most: int, out: Console) -> Sampled:
    """Build data, engine and reward, and sample."""
    total = min(setting.sampling.max_total_tokens or policy.context, policy.context)
    limits = Limits(setting.sampling.max_new_tokens, total)
    data = with_chat(options, setting.data, policy.tokenizer)
    source = build_source(data, policy.tokenizer, seed=options.seed, context=total)
    require_rows(policy, source.known, f"the data set {setting.name!r}")
    for reason, count in source.skipped.items():
        say(out, f"{setting.name}: {count} rows left out ({reason})")
    explore, engine = setting.explore, setting.engine
    own_dtype = None if options.dtype == "auto" else options.dtype
    sampler = build_engine(engine, policy, dtype=own_dtype, longest=total)
    if sampler.remark:
        say(out, sampler.remark)
    overlong = setting.reward.overlong
    reward = build_reward(setting.reward, build_task(data) if setting.reward.uses_task else None)
    try:
        with _progress(out, options.rollouts) as advance:
            return sample_probe(
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
                params=SamplingParams.of(setting.sampling),
                limits=limits, wanted=options.rollouts, most_tokens=cap, seed=options.seed, max_rows=engine.max_rows,
                truncated_counts=setting.reward.truncated_value is None, progress=advance,
            )  # fmt: skip
    finally:
        sampler.close()
        reward.close()


# ---------------------------------------------------------------- progress


@contextmanager
def _progress(out: Console, wanted: int) -> Iterator[Callable[[Sampled], None]]:
    """A progress bar on a terminal's standard error, otherwise one line per batch; after the first batch the total cost."""

    def refine(found: Sampled) -> str:
        speed = found.tokens / max(found.seconds, 1e-9)
        head = f"after {found.rollouts} responses: {len(found.failed)} failed, {speed:,.0f} tokens/s"
        if not found.failed or len(found.failed) >= wanted:
            return head
        times = wanted / len(found.failed)
        return f"{head}; about {round(found.tokens * times, -2):,.0f} tokens and {duration(found.seconds * times)} in total"

    errors = Terminal(stderr=True)
    if errors.is_terminal:
        columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
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
            say(out, refine(found))
        else:
            say(errors, f"failed responses: {len(found.failed)} of {wanted}, {found.tokens:,} tokens")

    yield in_file


# ---------------------------------------------------------------- what is written


def _write(
    options: ProbeOptions, setting: ProbeSetting, sampled: Sampled, findings: Findings | None, said: ProbeVerdict,
    notes: Sequence[str], most: int, out: Console,
) -> None:  # fmt: skip
    try:
        if options.json is not None:
            result = as_dict(options, setting, sampled, findings, said, notes, most)
            text = json_text(result, indent=1, allow_nan=False)
            Path(options.json).expanduser().write_text(text + "\n", encoding="utf-8")
            say(out, f"figures: {options.json}")
        if options.plot is not None:
            if findings is None:
                say(out, f"no plot: there is nothing to plot, {options.plot} was not written")
            else:
                from deepgrpo.lab.probe.plot import draw

                draw(findings, Path(options.plot).expanduser(), title=f"{setting.model}, {setting.name}")
                say(out, f"plot: {options.plot}")
    except OSError as error:
        raise DataError(f"the results cannot be written: {error}; name another place with --json and --plot") from error


def as_dict(
    options: ProbeOptions, setting: ProbeSetting, sampled: Sampled, findings: Findings | None, said: ProbeVerdict,
    notes: Sequence[str], most: int,
) -> dict[str, Any]:  # fmt: skip
    """All figures as plain JSON. Two probes with equal seeds differ only in `seconds`, `machine` and `versions`."""
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
