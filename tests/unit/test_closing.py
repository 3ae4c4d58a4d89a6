"""The line that ends a run."""

from __future__ import annotations

import pytest

from deepgrpo.ledger import Ledger
from deepgrpo.runs.checkpoints import TrainState
from deepgrpo.train.closing import closing_line


@pytest.mark.parametrize(
    ("state", "line"),
    [
        (
            {"step": 60, "first_value": 0.75, "last_value": 0.969, "last_step": 60},
            "greedy accuracy on 256 held-out questions: 75.0% before, 96.9% after 60 steps (+21.9 points, "
            "5,000 sampled tokens)",
        ),
        # stopped behind the first evaluation
        (
            {"step": 2, "first_value": 0.75, "last_value": 0.75, "last_step": 0},
            "greedy accuracy on 256 held-out questions: 75.0% before the first step, and no evaluation since",
        ),
        (
            {"step": 14, "first_value": 0.75, "last_value": 0.5, "last_step": 1},
            "greedy accuracy on 256 held-out questions: 75.0% before, 50.0% after 1 step (-25.0 points), the last evaluation "
            "before step 14",
        ),
        # rewards of a user: up to 3
        (
            {"step": 3, "first_value": 0.5, "last_value": 3.0, "last_step": 3},
            "greedy reward on 256 held-out questions: 0.5 before, 3 after 3 steps (+2.5, 5,000 sampled tokens)",
        ),
        (
            {"step": 3, "first_value": -0.25, "last_value": 0.5, "last_step": 3},
            "greedy reward on 256 held-out questions: -0.25 before, 0.5 after 3 steps (+0.75, 5,000 sampled tokens)",
        ),
        ({"step": 3}, None),
    ],
)
def test_closing_line(state: dict[str, float], line: str | None) -> None:
    assert closing_line(TrainState(**state, ledger=Ledger(sampled_tokens=5000)), 256) == line  # type: ignore[arg-type]
