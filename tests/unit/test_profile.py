"""Where the seconds of a step go."""

from __future__ import annotations

import io
import itertools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from torch.autograd import DeviceType

from deepgrpo.lab import profile
from deepgrpo.lab.options import ProfileOptions
from deepgrpo.lab.profile import OTHER, PYTHON, Peak, PhaseProfile, kind_of, product_cost, run_profile
from deepgrpo.train.loop import train

CPU = torch.device("cpu")
SMALL = [
    ("warmstart", "none"), ("run.prompts_per_step", "4"), ("run.steps", "1"), ("model.hidden_size", "16"),
    ("model.num_heads", "2"), ("model.num_layers", "1"), ("sampling.max_new_tokens", "6"), ("eval", "{}"),
    ("explore.num_rollouts", "4"), ("explore.branches_per_pivot", "2"),
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


def event(
    key: str, microseconds: float, count: int, *shapes: list[int], kernels: float = 0.0, kind: DeviceType = DeviceType.CPU
) -> Any:  # fmt: skip
    return SimpleNamespace(
        key=key, self_cpu_time_total=microseconds, self_device_time_total=kernels, device_type=kind, count=count,
        input_shapes=list(shapes),
    )  # fmt: skip


def test_events_of_the_profiler_are_added_up() -> None:
    """Three products of 60 operations on 31 numbers; one with a weight in blocks, [2·4, 3] by [5, 3]: 240 on 24 + 15 + 40."""
    phase = PhaseProfile()
    phase.add([event("aten::mm", 4e6, 3, [2, 3], [3, 5], []), event("mkldnn::_linear_pointwise", 1e6, 1, [2, 4, 3], [5, 3])], 4)
    phase.add([event("aten::mul", 2e6, 7, [2], [2])], 4)
    assert (phase.operations, phase.bytes) == (3 * 60 + 240, 4 * (3 * 31 + 79))
    assert phase.seconds == {"matrix products": 5.0, OTHER: 2.0}


def test_on_a_gpu_an_operator_takes_the_time_of_its_kernels() -> None:
    """Launched in 10 microseconds, computed in 3 seconds; the kernel is an event of its own, and not counted twice."""
    phase = PhaseProfile(wall_s=4.0)
    launched = event("aten::mm", 10, 3, [2, 3], [3, 5], kernels=3e6)
    phase.add([launched, event("ampere_sgemm", 0, 3, kernels=3e6, kind=DeviceType.CUDA)], 4, gpu=True)
    assert phase.seconds == {"matrix products": 3.0} and phase.operations == 3 * 60
    assert phase.shares() == {"matrix products": 0.75, PYTHON: 0.25}


def test_products_are_set_against_the_machine() -> None:
    """4 GFLOP and 6 GB in 2 seconds, on a machine that reaches 8 GFLOP/s and 4 GB/s."""
    phase = PhaseProfile(wall_s=4.0, seconds={"matrix products": 2.0}, operations=4e9, bytes=6e9)
    assert phase.summary(Peak(8e9, 4e9), "float32") == {
        "dtype": "float32", "shares": {"matrix products": 0.5, PYTHON: 0.5},
        "products": {"gflop_per_s": 2.0, "share_of_peak": 0.25, "gb_per_s": 3.0, "share_of_bandwidth": 0.75},
    }  # fmt: skip


def test_the_speed_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a second each: a product of 2·8³ operations; a copy of 1 MiB, read and written."""
    clock = itertools.count(step=0.5)
    monkeypatch.setattr(profile.time, "perf_counter", lambda: next(clock))
    assert profile.measure_peak("float32", CPU, size=8, copied_mb=1) == Peak(2048.0, 4_194_304.0)


def test_the_phases_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of 10 seconds by the clock: the median of three is reported, and what no phase accounts for is the rest."""
    monkeypatch.setattr(profile, "measure_peak", lambda dtype, device: Peak(1.0, 1.0))
    clock = itertools.count(step=10.0)
    monkeypatch.setattr(profile.time, "perf_counter", lambda: next(clock))
    sampled = iter([9, 100, 400, 300, 9])  # the first step warms up, the last one is profiled

    def step(run: Any, state: Any) -> Any:
        count = next(sampled)
        run.engine.sample()
        run.learner.update()
        return state, SimpleNamespace(
            metrics={"time/sample": count / 100, "time/reward": 1.0, "time/learn": 2.0, "sampled_tokens": count}
        )

    monkeypatch.setattr(profile, "train_step", step)
    parts = {"engine": SimpleNamespace(sample=int), "learner": SimpleNamespace(update=int)}
    parts["policy"] = SimpleNamespace(device=CPU)
    config = SimpleNamespace(engine_dtype="float32", learner=SimpleNamespace(dtype="float32"))
    run: Any = SimpleNamespace(config=config, **parts)
    state: Any = None
    found = profile.profile_steps(run, state, 3)
    assert found["seconds"] == {"sample": 3.0, "reward": 1.0, "learn": 2.0, "other": 4.0, "step": 10.0}
    assert found["sampled_tokens"] == 300


@pytest.mark.parametrize(("of_peak", "bound"), [(0.5, "arithmetic"), (0.3, "reading weights")])
def test_what_is_printed(of_peak: float, bound: str) -> None:
    out = Console(file=io.StringIO(), width=200)
    products = {"gflop_per_s": 20.0, "share_of_peak": of_peak, "gb_per_s": 3.0, "share_of_bandwidth": 0.4}
    phase = {"dtype": "float32", "shares": {"matrix products": 0.75, PYTHON: 0.25}, "products": products}
    seconds = {"sample": 4.0, "reward": 1.0, "learn": 3.0, "other": 2.0, "step": 10.0}
    profile.show(
        out, {"what": "demo", "threads": 2, "seconds": seconds, "sampled_tokens": 1200, "phases": {"sample": phase}}
    )
    text = " ".join(out.file.getvalue().replace("│", " ").split())  # type: ignore[attr-defined]
    assert "sample 4.00 40% reward 1.00 10% learn 3.00 30% other 2.00 20% step 10.00 100%" in text
    assert "1,200 tokens sampled, 300 a second" in text
    assert "matrix products 75%" in text and "Python and dispatch 25%" in text
    share = f"{of_peak:.0%} of a large square one"
    assert f"sample: matrix products at 20 GFLOP/s ({share}) and 3.0 GB/s (40% of a copy): bound by {bound}" in text


def test_a_recipe_and_a_run_are_profiled_and_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from deepgrpo.config import load_recipe, shipped

    monkeypatch.setattr(profile, "measure_peak", lambda dtype, device: Peak(1e9, 1e9))  # takes seconds; tested above
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
