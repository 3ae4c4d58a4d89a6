"""Probe against training, on made-up figures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.probe_validity import agreement, main, regime, spearman


def figures(**arms: tuple[float, float, float, float] | float) -> dict[str, Any]:
    """arm=(mean, difference, low, high); the baseline has a mean alone."""
    rows: list[dict[str, Any]] = [{"arm": "grpo", "metric": "other", "mean": 9.0}]
    for arm, each in arms.items():
        row: dict[str, Any] = {"arm": arm, "metric": "watched/greedy"}
        if isinstance(each, tuple):
            row |= dict(zip(("mean", "difference", "low", "high"), each, strict=True))
        rows.append(row if "mean" in row else row | {"mean": each})
    return {"baseline": "grpo", "rows": rows}


def probe(**arms: tuple[float, float, float]) -> dict[str, Any]:
    """arm=(snr, cos, mixed)."""
    keys = ("snr", "cos", "mixed")
    named = {arm: {key: {"value": v} for key, v in zip(keys, each, strict=True)} for arm, each in arms.items()}
    return {"strategies": named, "sentence": "said"}


TRAINED = figures(grpo=0.6, deep=(0.5, -0.1, -0.2, -0.05), random=(0.62, 0.02, -0.1, 0.14), lost=(0.1, -0.5, -0.6, -0.4))
PROBES = [
    probe(grpo=(0.02, 0.3, 2.0), deep=(0.01, 0.4, 3.0), random=(0.03, 0.5, 2.5), unknown=(1.0, 1.0, 1.0)),
    probe(grpo=(0.04, 0.3, 2.0), deep=(0.01, 0.4, 5.0), random=(0.01, 0.5, 2.5)),
]


def test_a_regime_by_hand() -> None:
    """Means over probes: snr .03, .01, .02; mixed 2, 4, 2.5. Trained: .6, .5, .62.

    Ranks 3, 1, 2 against 2, 1, 3: 1 - 6 · (1 + 0 + 1) / (3 · 8) = .5. Mixed 1, 3, 2 against 2, 1, 3: 1 - 6 · 6 / 24 = -.5.
    """
    found = regime(TRAINED, PROBES, "watched/greedy")
    assert list(found["arms"]) == ["grpo", "deep", "random"]  # no probe knows "lost"
    assert found["arms"]["deep"]["snr"] == pytest.approx(0.01) and found["arms"]["random"]["snr"] == pytest.approx(0.02)
    assert found["spearman"]["snr"] == 0.5 and found["spearman"]["mixed"] == -0.5
    assert [found["arms"][arm]["agrees_snr"] for arm in ("grpo", "deep", "random")] == [None, True, False]
    assert [found["arms"][arm]["agrees_mixed"] for arm in ("deep", "random")] == [False, True]
    both = agreement({"a": found, "b": found})
    assert (both["snr"]["right"], both["snr"]["of"], both["snr"]["right_clear"], both["snr"]["of_clear"]) == (2, 4, 2, 2)
    assert both["mixed"]["right_clear"] == 0 and both["snr"]["mean_spearman"] == 0.5 and both["snr"]["sign_p"] == 1.0


def test_ties_have_their_mean_rank() -> None:
    """Ranks 1.5, 1.5, 3 and 1, 2, 3: centred -.5, -.5, 1 and -1, 0, 1: 1.5 / sqrt(1.5 · 2)."""
    assert spearman([1, 1, 5], [1, 2, 3]) == pytest.approx(1.5 / 3**0.5)
    assert spearman([1, 1, 1], [1, 2, 3]) is None


@given(st.lists(st.integers(-50, 50), min_size=2, max_size=8, unique=True))
def test_the_order_alone_counts(values: list[int]) -> None:
    assert spearman(values, [3 * value + 1 for value in sorted(values)]) == spearman(values, sorted(values))
    assert spearman(values, values) == pytest.approx(1) and spearman(values, [-v for v in values]) == pytest.approx(-1)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ([probe(deep=(1, 1, 1), random=(1, 1, 1))], "the baseline 'grpo' is not in every probe"),
        ([probe(deep=(1, 1, 1), grpo=(1, 1, 1))], "a ranking needs at least three"),
    ],
)
def test_what_cannot_be_ranked(changes: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        regime(TRAINED, changes, "watched/greedy")


def test_files_in_tables_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, content in (("figures", TRAINED), ("one", PROBES[0]), ("two", PROBES[1])):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    paths = [str(tmp_path / f"{name}.json") for name in ("figures", "one", "two")]
    main([str(tmp_path / "out" / "validity"), "--regime", "chain", *paths, "--regime", "strict", *paths[:2]])
    text = (tmp_path / "out" / "validity.md").read_text()
    assert text in capsys.readouterr().out
    assert "| chain | deep | 0.01 | 0.40 | 4.00 | 0.500 | -0.100 [-0.200, -0.050] | yes | no |" in text
    assert "Spearman, strict" in text and "| 2 of 2 | " in text
    result = json.loads((tmp_path / "out" / "validity.json").read_text())
    assert result["regimes"]["chain"]["probes"] == 2 and result["regimes"]["strict"]["probes"] == 1
    with pytest.raises(SystemExit):
        main([str(tmp_path / "x"), "--regime", "chain", paths[0], str(tmp_path / "absent.json")])
    assert "absent.json" in capsys.readouterr().err
