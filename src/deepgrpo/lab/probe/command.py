"""`deepgrpo probe`: for each strategy, the signal-to-noise of its gradient per sampled token, with fixed weights.

    options ─► setting (setting.py), strategies (arms.py) ─► weights, engine (session.py)
            ─► rounds of prompts: trees, gradients (measure.py, gradient.py, sketch.py)
            ─► figures (estimate.py, findings.py) ─► verdict (verdict.py), tables, JSON, plot

Nothing is trained, and only the files of --json and --plot are written. See docs/probe.md.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from deepgrpo.errors import DataError
from deepgrpo.lab.machine import machine_and_versions
from deepgrpo.lab.options import ProbeOptions
from deepgrpo.lab.probe.arms import Arm, Arms, arms_of, reference_arm
from deepgrpo.lab.probe.cost import Cost, cost_of, duration
from deepgrpo.lab.probe.findings import Findings, analyse
from deepgrpo.lab.probe.gradient import GradientMeter
from deepgrpo.lab.probe.measure import ArmResult, Measured, Plan, measure
from deepgrpo.lab.probe.measure import Progress as Report
from deepgrpo.lab.probe.session import Session, open_session
from deepgrpo.lab.probe.setting import FEWEST, Setting, resolve_setting
from deepgrpo.lab.probe.sketch import Sketch, Whole
from deepgrpo.lab.probe.tables import rescue_by_depth, say, show
from deepgrpo.lab.probe.verdict import ProbeVerdict, remarks, verdict
from deepgrpo.model.bfloat16 import slow_dtype
from deepgrpo.progress import Display, phase, showing
from deepgrpo.runs.text import json_text
from deepgrpo.terminal import Terminal

ROUNDS = 4
"""Least rounds of a probe, so that an interruption leaves something."""
TRIAL = 4
"""Prompts per round of a dry run."""


@dataclass(frozen=True)
class Result:
    """Everything about a finished probe."""

    setting: Setting
    options: ProbeOptions
    arms: Arms
    reference: Arm
    measured: Measured
    findings: Findings
    verdict: ProbeVerdict
    notes: tuple[str, ...]
    cost: Cost


def run_probe(options: ProbeOptions, overrides: Sequence[tuple[str, str]] = (), console: Console | None = None) -> int:
    """Run the command. Returns exit code 0 for every verdict, 130 if it was interrupted.

    Raises:
        ConfigError: impossible or unknown options.
        DataError: a file cannot be used.
        ModelError: the model cannot be loaded.
        CheckpointError: the checkpoint is missing or damaged.
        MissingExtraError: --plot without matplotlib.
    """
    out = console or Terminal()
    setting = resolve_setting(options, overrides)
    arms = arms_of(setting.config, options.strategies, options.arms)
    reference = reference_arm(setting.config, options.rollouts)
    with Display(Terminal(stderr=True)) as display, showing(display):
        return _probe(options, setting, arms, reference, out)


def _probe(options: ProbeOptions, setting: Setting, arms: Arms, reference: Arm, out: Console) -> int:
    session = open_session(setting, betas=any(arm.config.loss.beta > 0 for arm in (*arms.measured, reference)))
    try:
        plan = _plan(options, setting, session, reference)
        say(out, f"{session.weights} on {session.policy.device}, {setting.config.data.type} · {session.threads}")
        for line in _preamble(session, arms):
            say(out, line)
        projection = Sketch(options.projection, options.seed) if options.projection else Whole()
        meter = GradientMeter(session.policy, session.start, projection)
        if options.dry_run:
            _forecast(session, arms, reference, meter, plan, setting, out)
            return 0
        measured = Measured(plan, [ArmResult(arm) for arm in arms.measured])
        code = 0
        try:
            with _told(out, plan, len(arms.measured)) as report:
                measure(session, arms.measured, reference, meter, plan, into=measured, progress=report)
        except KeyboardInterrupt:
            if measured.count < FEWEST:
                raise
            code = 130
    finally:
        session.close()
    findings = analyse(measured)
    said = verdict(findings, measured)
    own = Arm("own", setting.config)
    result = Result(
        setting, options, arms, reference, measured, findings, said, tuple(remarks(findings, measured)), cost_of(measured, own)
    )
    show(out, measured, findings, said, result.notes, result.cost)
    _write(result, out)
    return code


def _plan(options: ProbeOptions, setting: Setting, session: Session, reference: Arm) -> Plan:
    """Sizes, within the data. Raises DataError if it has too few prompts."""
    prompts, whole, size = options.prompts, options.reference or 3 * options.prompts, session.source.size
    if size is not None and size < FEWEST:
        raise DataError(
            f"the data has {size} prompts, and fewer than {FEWEST} prove nothing; add questions, or name others with --data"
        )
    if size is not None:
        prompts, whole = min(prompts, max(FEWEST, size // 2)), min(whole, size)
    rollouts: Any = reference.config.explore
    rows = max(1, setting.config.engine.max_rows // rollouts.num_rollouts)
    batch = max(1, min(max(rows, TRIAL), setting.config.run.prompts_per_step, -(-prompts // ROUNDS)))
    return Plan(prompts, whole, batch, options.seed)


def _preamble(session: Session, arms: Arms) -> list[str]:
    lines = [f"{count} rows left out ({reason})" for reason, count in session.source.skipped.items()]
    remarks = (session.engine.remark, slow_dtype(session.policy.dtype, session.policy.device))
    lines += [remark for remark in remarks if remark]
    lines += [f"{twin} has the gradient of {arm}, which stands for both" for twin, arm in arms.twins.items()]
    return lines


def _forecast(
    session: Session, arms: Arms, reference: Arm, meter: GradientMeter, plan: Plan, setting: Setting, out: Console
) -> None:
    """Measure a small round, and print what all of them would cost."""
    small = Plan(TRIAL, -(-TRIAL * plan.reference // plan.prompts), TRIAL, plan.seed)
    trial = Measured(small, [ArmResult(arm) for arm in arms.measured])
    began = time.perf_counter()
    with phase("trial", small.rounds * (len(arms.measured) + 2)) as advance:
        measure(session, arms.measured, reference, meter, small, into=trial, progress=lambda _, what: advance(1, what))
    spent = trial.measuring * (plan.prompts / small.prompts) + trial.learning * (plan.batch / small.batch)
    cost = cost_of(trial, Arm("own", setting.config), spent)
    say(out, f"measured {small.prompts} prompts with each strategy in {duration(time.perf_counter() - began)}")
    say(out, cost.sentence(f"the whole probe, {plan.prompts} prompts ({plan.reference} for the true gradient), about"))
    say(out, "dry run: no figures; the trial is too small for any")


# ---------------------------------------------------------------- progress


@contextmanager
def _told(out: Console, plan: Plan, arms: int) -> Iterator[Report]:
    """Yield the function that is told of every part of a round; after the first round it says the total cost."""
    parts = arms + 2
    began = time.perf_counter()
    done = 0
    with phase("probe", plan.rounds * parts) as advance:

        def told(found: Measured, what: str) -> None:
            nonlocal done
            done += 1
            advance(1, f"{found.spent.sampled_tokens:,} tokens")
            if done == parts:
                seconds = (time.perf_counter() - began) * plan.rounds
                say(out, f"after the first of {plan.rounds} rounds: about {duration(seconds)} in total")

        yield told


# ---------------------------------------------------------------- what is written


def _write(result: Result, out: Console) -> None:
    options = result.options
    try:
        if options.json is not None:
            text = json_text(as_dict(result), indent=1, allow_nan=False)
            Path(options.json).expanduser().write_text(text + "\n", encoding="utf-8")
            say(out, f"figures: {options.json}")
        if options.plot is not None:
            from deepgrpo.lab.probe.plot import draw

            draw(result.findings, Path(options.plot).expanduser(), title=f"{result.setting.name}: {result.verdict.code}")
            say(out, f"plot: {options.plot}")
    except OSError as error:
        raise DataError(f"the results cannot be written: {error}; name another place with --json and --plot") from error


def as_dict(result: Result) -> dict[str, Any]:
    """All figures as plain JSON. Two probes with equal seeds differ only in seconds, `machine` and `versions`."""
    measured, findings, setting = result.measured, result.findings, result.setting
    return {
        "model": setting.name,
        "verdict": result.verdict.code,
        "best": list(result.verdict.best),
        "sentence": result.verdict.sentence,
        "notes": list(result.notes),
        "strategies": {
            figures.name: {
                **asdict(figures),
                "explore": each.arm.config.explore.model_dump(mode="json"),
                "loss": each.arm.config.loss.model_dump(mode="json"),
                "state": "run" if each.saved else "learned" if each.learned else "initial",
                "signal_tokens": each.signal_tokens,
                "by_prompt": {
                    "tokens": each.tokens, "branch_tokens": each.branch_tokens, "groups": each.groups, "mixed": each.mixed,
                    "signal": each.signal, "reward": [None if reward != reward else reward for reward in each.rewards],
                },
            }
            for figures, each in zip(findings.arms, measured.arms, strict=True)
        },
        "same_gradient": dict(result.arms.twins),
        "differences": [asdict(each) for each in findings.differences],
        "reference": {
            "prompts": len(measured.shared) + len(measured.further), "agreement": findings.agreement,
            "shown": findings.truth_shown, "explore": result.reference.config.explore.model_dump(mode="json"),
        },
        "rescue_by_depth": {depth: asdict(share) for depth, share in rescue_by_depth(measured).items()},
        "prompts": measured.prompts,
        "cost": {**result.cost.as_dict(), **measured.spent.as_dict()},
        "setting": {
            "prompts": measured.plan.prompts, "reference": measured.plan.reference, "batch": measured.plan.batch,
            "seed": result.options.seed, "projection": result.options.projection, "step": setting.step,
            "data": setting.config.data.model_dump(mode="json"), "reward": setting.config.reward.model_dump(mode="json"),
            "sampling": setting.config.sampling.model_dump(mode="json"),
        },
        **machine_and_versions(),
    }  # fmt: skip
