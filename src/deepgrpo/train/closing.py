"""The closing line of a run: what its evaluations gained, and when they were made."""

from __future__ import annotations

from deepgrpo.runs.checkpoints import TrainState


def closing_line(state: TrainState, questions: int) -> str | None:
    """Compare the first evaluation with the last one; None without any.

    Rewards outside of 0 to 1 are means and no shares.

    Args:
        questions: held-out questions of an evaluation.
    """
    first, last = state.first_value, state.last_value
    if first is None or last is None:
        return None
    share = all(0 <= value <= 1 for value in (first, last))
    name = f"greedy {'accuracy' if share else 'reward'} on {questions} held-out questions"
    before, after = (f"{value:.1%}" if share else f"{value:.3g}" for value in (first, last))
    if not state.last_step:
        return f"{name}: {before} before the first step, and no evaluation since"
    steps = f"{state.last_step} step{'' if state.last_step == 1 else 's'}"
    gain = f"{100 * (last - first):+.1f} points" if share else f"{last - first:+.3g}"
    if state.last_step < state.step:
        return f"{name}: {before} before, {after} after {steps} ({gain}), the last evaluation before step {state.step}"
    return f"{name}: {before} before, {after} after {steps} ({gain}, {state.ledger.sampled_tokens:,} sampled tokens)"
