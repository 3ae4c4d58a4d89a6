"""The map of experiments: its table from figures worked by hand, its picture, and what is missing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import map as atlas


def figures(name: str, arms: dict[str, tuple[float, float, float] | None], **more: Any) -> dict[str, Any]:
    """Figures of an experiment: (difference, low, high) at equal tokens by arm; half of it at equal steps."""
    rows: list[dict[str, Any]] = []
    for arm, difference in arms.items():
        rows.append({"arm": arm, "metric": "spent/optimizer_steps", "seeds": 6, "mean": 1200.0, "sd": 1.0})
        for metric, scale in ((atlas.TOKENS, 1.0), (atlas.STEPS, 0.5)):
            row: dict[str, Any] = {"arm": arm, "metric": metric, "seeds": 6, "mean": 0.7, "sd": 0.02}
            if difference is not None:
                mean, low, high = (scale * each for each in difference)
                row |= {"steps": 120.0} if metric == atlas.STEPS else {}
                row |= {"difference": mean, "low": low, "high": high, "pairs": 6, "above": 6, "below": 0, "sign_p": 0.03125}
            rows.append(row)
    return {
        "name": name, "baseline": "grpo", "budget": 4_000_000, "optimizer_steps": 88.0, "seeds": [1], "rows": rows,
        "chosen": {}, "edges": {}, "tokens_to_target": {}, **more,
    }  # fmt: skip


@pytest.fixture
def experiments(tmp_path: Path) -> list[Path]:
    found = [
        figures("recovery", {"grpo": None, "deep": (0.031, 0.004, 0.052), "belief": (-0.01, -0.03, 0.02)},
                chosen={"grpo": {"optim.lr": 1e-4}, "deep": {"optim.lr": 3e-4, "optim.warmup_steps": 10}, "belief": {}},
                edges={"deep": ["optim.lr"]}),
        figures("search", {"grpo": None, "deep": (-0.2, -0.3, -0.1), "allocate": (0.0, -0.1, 0.1)}),
    ]  # fmt: skip
    for each in found:
        (tmp_path / each["name"]).mkdir()
        (tmp_path / each["name"] / "figures.json").write_text(json.dumps(each))
    return [tmp_path / each["name"] for each in found]


def test_the_table(experiments: list[Path]) -> None:
    regimes = [atlas.read_regime(path) for path in experiments]
    assert atlas.columns(regimes) == ["deep", "belief", "allocate"]
    lines = atlas.page(regimes, atlas.TOKENS, atlas.STEPS).splitlines()
    assert "- recovery: 4,000,000 sampled tokens; the fewest optimizer steps of any run are 88" in lines
    assert "| recovery | grpo | 6 | lr 0.0001 | 70.0 | baseline | 70.0 | baseline | 1,200 |   |" in lines
    assert (
        "| recovery | deep | 6 | lr 0.0003*, warmup_steps 10 | 70.0 | **+3.1 [+0.4, +5.2] (6/0, 0.031)** | 70.0 | "
        "**+1.6 [+0.2, +2.6] (6/0, 0.031) at 120** | 1,200 |   |"
    ) in lines
    # an interval around 0 is not bold; without tuning the rate is shared
    assert any(line.startswith("| search | allocate | 6 | shared | 70.0 | +0.0 [-10.0, +10.0]") for line in lines)


def test_the_picture_and_the_command(experiments: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    from PIL import Image

    monkeypatch.setattr("sys.argv", ["map", *map(str, experiments), "--out", str(tmp_path / "deep" / "map")])
    atlas.main()
    picture = tmp_path / "deep" / "map.png"
    with Image.open(picture) as image:
        colours = image.convert("RGB").getcolors(1 << 24) or []
    assert picture.stat().st_size < 60_000 and (tmp_path / "deep" / "map.md").is_file()
    # the largest clear difference, -20 points, is full orange; an arm that an experiment lacks is grey
    found = {colour for _, colour in colours}
    assert any(abs(r - 213) < 9 and abs(g - 94) < 9 and b < 9 for r, g, b in found)
    assert any(abs(r - 242) < 4 and r == g == b for r, g, b in found)


def test_colours_fade_where_the_interval_includes_0() -> None:
    clear, unclear = (atlas._colour(atlas.Difference(0.05, low, 0.08, 6, 6, 0, 0.03), 0.1) for low in (0.01, -0.01))
    # half of full blue (0, .447, .698), and .35 of that
    assert not atlas.Difference(0.05, 0.01, 0.08, 5, 5, 0, 0.06).clear
    assert clear == pytest.approx((0.5, 0.7235, 0.849)) and unclear == pytest.approx((0.825, 0.903225, 0.94715))


def test_an_experiment_without_figures_is_named(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"figures\.json does not exist; `deepgrpo compare` writes it"):
        atlas.read_regime(tmp_path)
