"""The verdict of a probe: its figures in one sentence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from deepgrpo.lab.probe.findings import ArmFigures, Findings
from deepgrpo.lab.probe.measure import Measured

Code = Literal["best", "some", "none", "no_truth", "no_signal", "single"]

MUCH_FORWARDED = 0.05
"""Signal tokens per sampled token from which a remark mentions them."""


@dataclass(frozen=True, slots=True)
class ProbeVerdict:
    """Example: ProbeVerdict("best", ("deep",), "deep is best: ...")."""

    code: Code
    best: tuple[str, ...]
    """The best strategy; with "some", those that cannot be told apart at the top; empty if nothing is told apart."""
    sentence: str


def verdict(findings: Findings, measured: Measured) -> ProbeVerdict:
    """One sentence: the best strategy, or that none can be told apart."""
    ranked = sorted(findings.arms, key=lambda arm: -arm.snr.value)
    prompts, whole = measured.count, len(measured.shared) + len(measured.further)
    more = f"--prompts {4 * prompts} halves the intervals"
    if not findings.any_signal:
        rewards = [reward for arm in measured.arms for reward in arm.rewards if reward == reward]
        mean = sum(rewards) / max(1, len(rewards))
        return ProbeVerdict(
            "no_signal", (),
            f"no strategy has any gradient: all groups of all {prompts} prompts have equal rewards (mean reward {mean:.3g}); "
            f"take {'harder' if mean > 0.5 else 'easier'} questions, and check that the reward finds answers (deepgrpo eval)",
        )  # fmt: skip
    if not findings.truth_shown:
        return ProbeVerdict(
            "no_truth", (),
            f"nothing can be said: the true gradient itself cannot be told from the noise of {whole} prompts (two halves of "
            f"them agree with cosine {findings.agreement:.2f}); take more with --prompts {4 * prompts}",
        )  # fmt: skip
    first = ranked[0]
    if len(ranked) == 1:
        return ProbeVerdict(
            "single", (),
            f"{first.name} is alone and has nothing to be compared with: its snr² is {_snr(first)} per 1,000 sampled tokens",
        )
    level = [arm for arm in ranked[1:] if not findings.between(first.name, arm.name).apart]
    worse = [arm for arm in ranked[1:] if arm not in level]
    if not level:
        second = ranked[1]
        return ProbeVerdict("best", (first.name,), f"{first.name} is best: {_against(first, second)}")
    leads = f"{first.name} leads with snr² {_snr(first)} per 1,000 sampled tokens"
    if not worse:
        others = ", ".join(f"{arm.name} {_snr(arm)}" for arm in level)
        return ProbeVerdict("none", (), f"none can be told apart: {leads}, before {others}; {more}")
    return ProbeVerdict(
        "some", tuple(arm.name for arm in (first, *level)),
        f"{_list([first.name, *(arm.name for arm in level)], 'or')}: {leads} and cannot be told apart from "
        f"{_list([arm.name for arm in level], 'and')}; {_list([arm.name for arm in worse], 'and')} "
        f"{'is' if len(worse) == 1 else 'are'} worse; {more}",
    )  # fmt: skip


def remarks(findings: Findings, measured: Measured) -> list[str]:
    """Remarks on how to read the figures, one line each."""
    found: list[str] = []
    if measured.count < measured.plan.prompts:
        found.append(f"interrupted: {measured.count} of {measured.plan.prompts} prompts were measured")
    for result in measured.arms:
        ratio = result.signal_tokens / max(1, sum(result.tokens))
        if ratio > MUCH_FORWARDED:
            found.append(
                f"{result.arm.name} also forwards {ratio:.1f} tokens per sampled token to choose its pivots, which snr² per "
                "sampled token does not count"
            )
    learned = [result.arm.name for result in measured.arms if result.learned]
    if learned:
        whose = "its" if len(learned) == 1 else "their"
        found.append(f"{_list(learned, 'and')} learned {whose} state from one batch of prompts first")
    saved = [result.arm.name for result in measured.arms if result.saved]
    if saved:
        found.append(f"{_list(saved, 'and')}: with the state of the run")
    by_mixed = max(findings.arms, key=lambda arm: arm.mixed.value)
    by_snr = max(findings.arms, key=lambda arm: arm.snr.value)
    if len(findings.arms) > 1 and by_mixed is not by_snr and findings.truth_shown:
        found.append(
            f"{by_mixed.name} has the most mixed groups per token: how often there is a gradient, not where it points"
        )
    return found


def _against(first: ArmFigures, second: ArmFigures) -> str:
    said = f"its snr² per 1,000 sampled tokens is {_snr(first)}"
    if second.snr.value > 0:
        return f"{said}, {first.snr.value / second.snr.value:.1f} times that of {second.name}, the next"
    return f"{said}; that of {second.name}, the next, is {_snr(second)}"


def _snr(arm: ArmFigures) -> str:
    return f"{arm.snr.value:.2g}"


def _list(names: list[str], word: str) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} {word} {names[-1]}"
