"""Where the seconds of a step go."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from deepgrpo.lab.options import ProfileOptions
from deepgrpo.lab.profile import OTHER, PYTHON, PhaseProfile, kind_of, product_cost, run_profile
from deepgrpo.train.loop import train

SMALL = [
    ("warmstart", "none"), ("run.prompts_per_step", "4"), ("run.steps", "1"), ("model.hidden_size", "16"),
    ("model.num_heads", "2"), ("model.num_layers", "1"), ("sampling.max_new_tokens", "12"), ("eval", "{}"),
    ("reward", '{type = "user", function = "coin.py:reward"}'),
]  # fmt: skip


def test_the_cost_of_a_product_by_hand() -> None:
    # [2, 3] @ [3, 5]: 2 * 2*3*5 = 60 operations on 6 + 15 + 10 numbers
    assert product_cost([[2, 3], [3, 5]]) == (60.0, 31.0)
    # a bias comes first (addmm), a batch of 4 does it four times (bmm)
    assert product_cost([[5], [2, 3], [3, 5]]) == (60.0, 31.0)
    assert product_cost([[2, 5], [2, 3], [3, 5]]) == (60.0, 31.0)
    assert product_cost([[4, 2, 3], [4, 3, 5]]) == (240.0, 124.0)


def test_kinds_of_operators() -> None:
    assert kind_of("aten::addmm") == "matrix products"
    assert kind_of("aten::_scaled_dot_product_flash_attention_for_cpu_backward") == "attention"
    assert kind_of("aten::cumsum") == "softmax and draw"
    assert kind_of("aten::_fused_adamw_") == "optimizer"
    assert kind_of("aten::mul") == OTHER


def test_what_no_operator_accounts_for_is_python() -> None:
    shares = PhaseProfile(wall_s=4.0, seconds={"matrix products": 2.0, OTHER: 1.0}).shares()
    assert shares == {"matrix products": 0.5, OTHER: 0.25, PYTHON: 0.25}


def test_a_recipe_and_a_run_are_profiled_and_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from deepgrpo.config import load_recipe, shipped

    monkeypatch.chdir(tmp_path)
    # an untrained model is never right, and where all rewards are equal nothing is trained
    (tmp_path / "coin.py").write_text(
        "def reward(prompts, completions, **_):\n    return [float(len(c) % 2) for c in completions]\n"
    )
    assert run_profile(ProfileOptions("demo", steps=1, json=Path("out/profile.json")), SMALL) == 0
    found = json.loads((tmp_path / "out" / "profile.json").read_text())
    assert not (tmp_path / "runs").exists()
    seconds = found["seconds"]
    assert seconds["step"] == pytest.approx(sum(seconds[p] for p in ("sample", "reward", "learn", "other")))
    for phase in found["phases"].values():
        assert sum(phase["shares"].values()) == pytest.approx(1.0)
        assert phase["shares"]["matrix products"] > 0 and phase["products"]["gflop_per_s"] > 0
    assert "matrix products at" in capsys.readouterr().out

    run = train(load_recipe(shipped.find_recipe("demo"), SMALL))
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    assert run_profile(ProfileOptions(str(run), steps=1), []) == 0
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before
    assert "demo: a step" in capsys.readouterr().out
