"""The verdict of a probe: its figures in one sentence."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Literal

from deepgrpo.errors import DataError
from deepgrpo.lab.probe.findings import MIN_MIXED, Findings
from deepgrpo.lab.probe.sampling import MIN_FAILED, Sampled
from deepgrpo.stats import wilson_interval

Code = Literal[
    "helps", "no_difference", "prompt_is_better", "too_few_mixed", "nothing_fails", "nothing_succeeds", "too_short"
]

ROOT = 'explore.type = "root"'
MANY_CUT = 0.25
"""Share of truncated responses from which a remark mentions them."""
FEW_PROMPTS = 20
"""Number of distinct prompts below which the intervals are unreliable."""


@dataclass(frozen=True, slots=True)
class ProbeVerdict:
    """Example: ProbeVerdict("helps", 2.0, "pivots would help: groups at depth 0.61 are mixed 1.5 [1.2, 1.8] times as ...")."""

    code: Code
    gamma: float | None
    """Recommended gamma; None: none is shown to beat sampling from the prompt."""
    sentence: str


def early_verdict(sampled: Sampled, *, wanted: int, branches: int) -> ProbeVerdict | None:
    """The verdict if it needs no comparison of depths; None if depths can be compared.

    Raises DataError if too few rollouts failed for any conclusion.
    """
    failed = sampled.failed
    if not failed and sampled.rollouts >= 4 * wanted:
        _, most = wilson_interval(0, sampled.rollouts)
        return ProbeVerdict(
            "nothing_fails", None,
            f"pivots would not help: none of {sampled.rollouts} responses failed (95%: at most {most:.1%} do), and only failed "
            f"ones get pivots; these questions are too easy for this model",
        )  # fmt: skip
    if len(failed) < MIN_FAILED:
        raise DataError(
            f"only {len(failed)} of {sampled.rollouts} responses failed within {sampled.tokens:,} sampled tokens, and fewer "
            f"than {MIN_FAILED} failed ones prove nothing; raise --max-sampled-tokens, or take harder questions"
        )
    short = [each for each in failed if not each.deep]
    if len(failed) - len(short) < MIN_FAILED:
        length = statistics.median(each.length for each in short)
        return ProbeVerdict(
            "too_short", None,
            f"pivots would not help: {len(short)} of {len(failed)} failed responses have no state to branch at besides the "
            f"prompt (one segment, {length:g} tokens in the median); train with {ROOT}, or cut finer: --segments tokens "
            "--segment-size 8, in a recipe explore.segments",
        )  # fmt: skip
    if not any(state.successes for each in failed for state in each.states):
        tried = sum(len(state.rewards) for each in failed for state in each.states)
        return ProbeVerdict(
            "nothing_succeeds", None,
            f"pivots would not help: none of {tried:,} continuations of {len(failed)} failed responses succeeded, neither "
            f"from any depth nor from the prompt ({branches} each); no method learns from groups that all fail: take easier "
            "questions or a better start model, and check that the reward finds the answers (deepgrpo eval)",
        )  # fmt: skip
    return None


def verdict(findings: Findings, *, wanted: int, branches: int) -> ProbeVerdict:
    """The verdict from the comparison of depths."""
    best, band = findings.best_gamma, findings.best_band
    if best is None:
        succeeded = sum(each.success.rate * each.success.trials for each in findings.bands)
        share = succeeded / sum(each.success.trials for each in findings.bands)
        return ProbeVerdict(
            "too_few_mixed", None,
            f"too few groups are mixed to compare depths: {findings.mixed}, and {MIN_MIXED} are needed; {share:.1%} of the "
            f"continuations succeed; raise --branches (now {branches}) or --rollouts (now {wanted}), or take other questions",
        )  # fmt: skip
    # a gamma that mostly samples from the prompt does not use pivots
    deep = max((gamma for gamma in findings.gammas if gamma.q[0] < 0.5), key=lambda gamma: gamma.gain, default=None)
    if deep is None:
        return ProbeVerdict(
            "no_difference", None,
            "no difference could be shown: with every gamma that was compared most pivots are the prompt itself; cut responses "
            "into more segments, or name larger --gammas",
        )  # fmt: skip
    if deep.gain_low > 1:
        if band is not None and band.gain and band.gain_low and band.gain_high and band.gain_low > 1:
            there = _times(band.gain, band.gain_low, band.gain_high)
            said = f"groups at depth {band.ratio:.2f} are mixed {there} as often per sampled token as at the prompt"
            said += f"; gamma {deep.gamma:g} ({_times(deep.gain, deep.gain_low, deep.gain_high)} in expectation)"
        else:
            there = _times(deep.gain, deep.gain_low, deep.gain_high)
            said = f"with gamma {deep.gamma:g} groups are mixed {there} as often per sampled token as at the prompt"
        return ProbeVerdict("helps", deep.gamma, f"pivots would help: {said}")
    there = _times(deep.gain, deep.gain_low, deep.gain_high)
    said = f"with gamma {deep.gamma:g}, the best that goes deep, groups are mixed {there} as often per sampled token as at "
    said += "the prompt"
    if deep.gain_high < 1:
        return ProbeVerdict("prompt_is_better", None, f"pivots would not help: {said}; train with {ROOT}{_why(findings)}")
    return ProbeVerdict(
        "no_difference", None,
        f"no difference could be shown: {said}; train with {ROOT}, or probe more: --rollouts {4 * wanted} halves the interval",
    )  # fmt: skip


def remarks(sampled: Sampled, *, wanted: int, most_tokens: int) -> list[str]:
    """Remarks on how to read the figures, one line each."""
    found: list[str] = []
    if MIN_FAILED <= len(sampled.failed) < wanted and sampled.tokens >= most_tokens:
        found.append(
            f"{len(sampled.failed)} failed responses instead of {wanted}: the limit of {most_tokens:,} sampled tokens was "
            "reached (--max-sampled-tokens)"
        )
    if sampled.rollouts and sampled.truncated >= MANY_CUT * sampled.rollouts:
        found.append(
            f"{sampled.truncated / sampled.rollouts:.0%} of the responses were cut off at the length limit; many failures may "
            "be just that (--max-new-tokens)"
        )
    short = sum(not each.deep for each in sampled.failed)
    if short:
        found.append(f"{short} of {len(sampled.failed)} failed responses have no state to branch at besides the prompt")
    prompts = len({each.prompt for each in sampled.failed})
    if sampled.failed and prompts < FEW_PROMPTS:
        found.append(f"they come from only {prompts} different prompts: the intervals, which are over prompts, are rough")
    return found


def _why(findings: Findings) -> str:
    root, last = findings.bands[0], findings.bands[-1]
    if last.band and root.rescue.rate > 2 * last.rescue.rate:
        return (
            f" (at depth {last.ratio:.2f} {last.rescue.rate:.0%} of the states are rescued, at the prompt "
            f"{root.rescue.rate:.0%}: what goes wrong goes wrong early)"
        )
    return ""


def _times(gain: float, low: float, high: float) -> str:
    return f"{gain:.2f} [{low:.2f}, {high:.2f}] times"
