"""The ratio that tree packing should give a learner step, worked by hand."""

from __future__ import annotations

import pytest

from benchmarks.suites.learner import cost_model
from deepgrpo.model.policy import Policy


def test_the_cost_model_by_hand(policy: Policy) -> None:
    """The tiny policy has 21,248 parameters, 19 · 32 = 608 of them in its head, so 20,640 in its trunk.

    rows    6 · 20,640 · 168 + 8 · 608 · 50 = 20,805,120 + 243,200 = 21,048,320
    packs   6 · 20,640 ·  72 + 8 · 608 · 50 =  8,916,480 + 243,200 =  9,159,680
    """
    found = cost_model(policy, path_tokens=168, unique_tokens=72, terms=50)
    assert found == {
        "path_tokens": 168, "unique_tokens": 72, "terms": 50, "token_ratio": pytest.approx(2 + 1 / 3),
        "predicted_ratio": pytest.approx(21_048_320 / 9_159_680),
    }  # fmt: skip
    # with 2 and 1 tokens and 100 terms, most of the cost is the head: 247,680 + 486,400 against 123,840 + 486,400
    assert cost_model(policy, 2, 1, 100)["predicted_ratio"] == pytest.approx((247_680 + 486_400) / (123_840 + 486_400))
